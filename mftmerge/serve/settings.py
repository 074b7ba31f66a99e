"""The options of `mftmerge serve`. They stand beside the server, so that `serve --help` need not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mftmerge.settings import Flag, Settings


class ServeSettings(Settings):
    """The options of `mftmerge serve`."""

    mask: Annotated[dict[str, str], Flag(metavar="NAME=MASK")] = Field(
        {}, description="a mask and the name that requests call it by; may be repeated"
    )
    name: str | None = Field(None, description="what requests call the model without mask; by default its directory")
    base: str | None = Field(None, description="masks over a delta: the checkpoint whose values dropped weights take")
    on: Literal["weights", "delta"] | None = Field(
        None, description="what dropped weights become: 0 or the base's values; by default as each mask says"
    )
    require_base: bool = Field(False, description="refuse masks that were not made for this very model")
    host: str = Field("127.0.0.1", description="address to listen at; by default only this machine reaches the server")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0 takes a free one")
    api_key: str | None = Field(
        None, description="key that requests must carry; better given as MFTMERGE_API_KEY in the environment"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="type to compute in; auto: as stored, but float32 on a processor without bfloat16 arithmetic",
    )
    device: str | None = Field(None, description="where the model computes, such as cuda; a GPU when there is one")
    max_rows: int = Field(16, ge=1, le=1024, description="answers written at a time, in one batch")
    max_queue: int = Field(256, ge=0, description="requests that may wait; more are refused with 429")
    max_tokens: int = Field(1024, ge=1, description="most new tokens of an answer")
    max_prompt: int = Field(8192, ge=1, description="most tokens of a prompt, and of the prompts read in one step")
    max_body: int = Field(1 << 20, ge=1024, description="most bytes of a request; more are refused with 413")
    max_mask: int = Field(1 << 30, ge=1024, description="most bytes of a mask that is added while the server runs")
    check: bool = Field(False, description="load and check everything, say what would be served, and stop")
    drain: float = Field(30.0, ge=0, description="seconds that answers get to finish after SIGTERM")
