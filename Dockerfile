# docker build -t mftmerge . && docker run --rm -v "$PWD":/work mftmerge inspect code.mask
# For a GPU: --build-arg BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime, and docker run --gpus all.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=all
ARG TORCH_INDEX=
WORKDIR /opt/mftmerge
COPY . .
# With TORCH_INDEX (an index of CPU builds) torch comes from there first, gigabytes smaller.
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch; fi \
 && pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["mftmerge"]
