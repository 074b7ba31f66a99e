"""All settings of fitting a mask to another model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mftmerge.learn.settings import as_in_training
from mftmerge.settings import Seed, Settings


class RebaseSettings(Settings):
    """Settings of `rebase_mask`."""

    rows: int | None = Field(None, ge=4, description="how many rows are used, drawn by the seed; all by default")
    eval_share: float = Field(0.5, gt=0, lt=1, description="share of the rows that decides how much is dropped")
    steps: int = Field(8, ge=0, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="rows in a step")
    lr: float = Field(0.05, gt=0, description="learning rate of the scores, which are ranks")
    shares: list[float] = Field(
        [0.003, 0.01, 0.03, 0.1, 0.3, 1.0], description="how much of what may be dropped is tried, the best first"
    )
    errors: float = Field(1.0, ge=0, description="standard errors that a gain on the validation rows must exceed")
    seed: Seed = Field(42, description="seed of which rows are used and held out, and of their order")
    max_length: int = as_in_training("max_length")
    columns: dict[str, str] | None = as_in_training("columns")
    skip_bad_rows: bool = as_in_training("skip_bad_rows")
    dtype: Literal["auto", "float32", "bfloat16"] = as_in_training("dtype")
    prefix: Literal["memory", "disk", "off"] = as_in_training("prefix")
    trust_remote_code: bool = as_in_training("trust_remote_code")

    @field_validator("shares")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if wrong := [share for share in value if not 0 < share <= 1]:
            raise ValueError(f"a share is above 0 and at most 1, not {wrong[0]:g}")
        return value
