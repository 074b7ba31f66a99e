"""The options of `apply`. They stand beside `apply.py` and not in it, so that `apply --help` need not import numpy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mftmerge.settings import Settings


class ApplySettings(Settings):
    """The options of `apply_mask` and of `mftmerge apply`."""

    base: str | None = Field(None, description="apply to the delta: dropped weights get this checkpoint's values")
    on: Literal["weights", "delta"] | None = Field(
        None, description="what dropped weights become: 0 or the base's values; by default as the mask says"
    )
    overwrite: bool = Field(False, description="replace what is at OUT")
    require_base: bool = Field(
        False, description="refuse a model whose covered tensors are not those of the mask's base"
    )
    check_base: bool = Field(True, description="say how much the model differs from the mask's base (hashes it)")
    resume: bool = Field(False, description="continue what a killed run left; keep finished shards")
    follow_links: bool = Field(False, description="follow links that lead out of the checkpoint's directory")
    include: list[str] = Field([], description="copy further files too, e.g. '*.py'; may be repeated")
