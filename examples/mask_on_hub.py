"""A mask as a repository on the Hugging Face Hub.

python examples/mask_on_hub.py upload code.mask ME/code-mask BASE code "loss=1.94 (base 2.14)"
python examples/mask_on_hub.py apply ME/code-mask MODEL OUT

BASE is the model that the mask was trained over, `code` the domain; then any number of NAME=VALUE results for the card.
Uploading needs a token with write access (`hf auth login`).
"""

from __future__ import annotations

import sys

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, hf_hub_download

import mftmerge

FILE = "general.mask"  # one name in every repository: whoever downloads a mask need not ask for its file's name


def card(mask: mftmerge.Mask, repository: str, base: str, domain: str, results: tuple[str, ...]) -> ModelCard:
    tags = ["mftmerge", "mask-fine-tuning", domain]
    metadata = ModelCardData(base_model=base, library_name="mftmerge", tags=tags)
    lines = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {domain} mask for {base}\n",
        f"One bit a weight for {len(mask.names)} tensors; {mask.density():.1%} are kept. Digest `{mask.digest}`.",
        "\n```sh",
        f"hf download {repository} {FILE} --local-dir .",
        f"mftmerge apply {FILE} --model {base} -o {domain}-model",
        "```\n\n| measured | |\n| --- | --- |",
        *(f"| {name} | {value} |" for name, _, value in (result.partition("=") for result in results)),
    ]
    return ModelCard("\n".join(lines) + "\n")


def upload(path: str, repository: str, base: str, domain: str, *results: str) -> None:
    mask = mftmerge.Mask.load(path)
    files = {"README.md": str(card(mask, repository, base, domain, results)).encode(), FILE: path}
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    print(api.create_commit(repository, operations, commit_message=f"Mask for {domain}").commit_url)


def apply(repository: str, model: str, out: str) -> None:
    report = mftmerge.apply_mask(hf_hub_download(repository, FILE), model, out)
    print(f"{out}: {report.dropped:,} of {report.covered:,} weights set to 0")


if __name__ == "__main__":
    {"upload": upload, "apply": apply}[sys.argv[1]](*sys.argv[2:])
