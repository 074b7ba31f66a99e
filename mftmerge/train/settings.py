"""All settings of a training run, explained where declared; the same in Python, on the command line and in YAML."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mftmerge.settings import Flag, Seed, Settings

# A score can travel about lr * steps / 2 under linear decay (Adam moves each by about lr a step). The default learning
# rate makes this 5 times 0.0025, where the cut of N(0, 0.02) at keep 0.9 lies (and near the cut of scaled magnitudes).
TRAVEL = 0.0125
LR_CAP = 1e-3  # of the default learning rate: runs of less than 25 steps travel less instead of leaping at the start


# The published code's values (arXiv 2503.22764). A batch of 128 rows, one at a time.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "init": "normal",
        "keep": 0.9,
        "seed": 42,
        "lr": 2e-5,
        "warmup": 0.03,
        "reference_schedule": True,
        "reference_rounding": True,
        "loss_average": "row",
        "epochs": 2.0,
        "batch_size": 1,
        "accumulate": 128,
        "max_length": 4096,
        "dtype": "bfloat16",
    }
}


class TrainSettings(Settings):
    """Settings of `train_mask`."""

    # What is masked
    keep: float = Field(0.9, gt=0, le=1, description="share of weights kept in each matrix")
    layers: str | None = Field(None, description="decoder layers, such as 4-7; the last four by default")
    modules: str = Field("attn,mlp", description="matrices: attn, mlp, names such as q_proj, or a regular expression")
    keep_attn: float | None = Field(None, gt=0, le=1, description="keep of attention's matrices, if another")
    keep_mlp: float | None = Field(None, gt=0, le=1, description="keep of all other matrices, if another")
    scope: Literal["matrix", "global"] = Field("matrix", description="one cut a matrix, or one over all")
    pattern: str | None = Field(None, description="N:M sparsity such as 2:4, instead of keep")
    base: str | None = Field(None, description="learn a mask over the difference from this model instead")
    reference_rounding: bool = Field(False, description="drop int((1 - keep) * n), as the published code does")

    # The scores
    init: Literal["magnitude", "normal", "taylor"] = Field("magnitude", description="where the scores start")
    start: Annotated[str | None, Flag(endings=(".mask",))] = Field(
        None, description="a mask with scores to go on from, instead of init's scores"
    )
    seed: Seed = Field(42, description="seed of the data order and of normal scores")
    keep_warmup: int = Field(0, ge=0, description="steps over which the share kept falls from 1 to keep")
    scores: bool = Field(False, description="store final and initial scores in the mask, for score arithmetic")

    # The steps
    preset: Literal["paper"] | None = Field(
        None, description="paper: the published code's values, where no other is given"
    )
    steps: int = Field(60, ge=0, description="optimiser steps")
    epochs: float | None = Field(None, gt=0, description="times that all rows are seen, instead of steps")
    batch_size: int = Field(8, ge=1, description="rows in a forward pass, on each device")
    accumulate: int = Field(1, ge=1, description="forward passes in a step")
    lr: float | None = Field(
        None,
        gt=0,
        description="learning rate of the scores; by default 2 * 0.0125 / steps, at most 0.001",
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of steps over which the learning rate rises")
    reference_schedule: bool = Field(False, description="rise from rate 0 in int(warmup * steps), as published")
    loss_average: Literal["token", "row"] = Field(
        "token", description="what counts equally in a step's loss; the published code's is row"
    )
    clip: float | None = Field(1.0, gt=0, description="largest norm of the score gradients")

    # The data
    max_length: int = Field(1024, ge=2, description="tokens of a row; longer rows are cut on the right")
    columns: dict[str, str] | None = Field(
        None, description="the data's names of fields, such as prompt=question, where they are others"
    )
    skip_bad_rows: bool = Field(False, description="leave out rows that cannot be used, and count them")
    packing: bool = Field(False, description="pack rows into full sequences")
    weights: list[float] | None = Field(None, description="shares of several data files in the mixture")

    # Validation
    eval_share: float = Field(0.1, ge=0, lt=1, description="share of rows held out when there is no eval data")
    eval_rows: int = Field(256, ge=1, description="validation rows at most")
    eval_every: int | None = Field(None, ge=1, description="steps between validations; a sixth of the steps by default")
    metric: str = Field(
        "loss", description="what states are chosen by: loss, or exact:RULE with a rule of eval --exact"
    )
    max_new_tokens: int = Field(256, ge=1, description="length of an answer, with another metric than the loss")
    keep_last: bool = Field(False, description="write the last mask, whatever validation says of it")
    patience: int | None = Field(None, ge=1, description="validations without gain after which training stops")
    control: bool = Field(False, description="also run the matched control and the random and magnitude masks")
    control_lr: list[float] = Field(
        [1e-4, 3e-4, 1e-3], min_length=1, description="rates of the control's weights; the best by validation counts"
    )

    # The machine
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type of the weights; auto: as stored, but float32 on a processor without bfloat16 arithmetic",
    )
    adam_bits: Literal[8, 32] = Field(32, description="bits of each of Adam's moments; 8 saves memory and costs time")
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    compile: bool = Field(False, description="compile the trained layers")
    prefix: Literal["memory", "disk", "off"] = Field("memory", description="where hidden states below are cached")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; eval_every by default")
    log_to: str = Field("none", description="where the numbers go: none, tensorboard (in <out>.logs) or wandb")
    trust_remote_code: bool = Field(False, description="run the Python code that comes with the checkpoint")
    check_memory: bool = Field(True, description="refuse a model that will not fit, before loading it")

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        match = re.fullmatch(r"(\d+):(\d+)", value or "1:2")
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ValueError("give N:M with 0 < N < M, such as 2:4")
        return value

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        if value != "loss" and not value.startswith("exact:"):
            raise ValueError("give loss, exact:number, exact:text or exact:re:PATTERN")
        return value

    @field_validator("control_lr")
    @classmethod
    def _rates(cls, value: list[float]) -> list[float]:
        if min(value) <= 0:
            raise ValueError("learning rates are above 0")
        return value

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: object) -> object:
        """A preset's values below those that are given; `steps` and `epochs` are two ways to say one thing."""
        if not isinstance(given, dict):
            return given
        preset = PRESETS.get(str(given.get("preset")), {})
        if given.get("epochs") is not None and "steps" in given:
            raise ValueError("steps and epochs say the same; give one of them")
        if "accumulate" in preset:  # the published batch is that of all processes together
            preset = preset | {"accumulate": max(1, preset["accumulate"] // int(os.environ.get("WORLD_SIZE", "1")))}
        return {k: v for k, v in preset.items() if k != "epochs" or "steps" not in given} | given

    @model_validator(mode="after")
    def _together(self) -> TrainSettings:
        if self.keep_warmup and self.keep_warmup > self.steps and self.epochs is None:
            raise ValueError(f"keep_warmup {self.keep_warmup} is longer than the run's {self.steps} steps")
        if self.pattern and (self.keep_warmup or self.scope == "global"):
            raise ValueError("pattern fixes the share kept: leave keep_warmup and scope out")
        if (self.keep_attn or self.keep_mlp) and (self.pattern or self.scope == "global"):
            raise ValueError("keep_attn and keep_mlp need a cut in each matrix: leave pattern and scope out")
        return self

    def settled(self, rows: int) -> TrainSettings:
        """The settings with the steps in which so many rows (or packs) are seen `epochs` times, by all processes."""
        if self.epochs is None:
            return self
        batches = -(-rows // self.batch_size)
        own = -(-batches // int(os.environ.get("WORLD_SIZE", "1")))
        steps = max(1, math.ceil(self.epochs * -(-own // self.accumulate)))
        return TrainSettings.of(self, {"steps": steps, "epochs": None})

    # -- what follows from the settings -------------------------------------------------------------------------------

    @property
    def reading(self) -> dict[str, Any]:
        """How rows are read, as arguments of `data.load_rows`."""
        return {"skip_bad": self.skip_bad_rows, "columns": self.columns}

    @property
    def learning_rate(self) -> float:
        """As given, or the default."""
        return self.lr if self.lr is not None else min(LR_CAP, 2 * TRAVEL / max(1, self.steps))

    @property
    def exact(self) -> str | None:
        """The rule for exact match of answers, where they choose."""
        return None if self.metric == "loss" else self.metric.removeprefix("exact:")

    @property
    def travel(self) -> float:
        """How far a score can move in the run: lr * steps / 2, in units of the score."""
        return self.learning_rate * self.steps / 2

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup * self.steps)

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of a checkpoint for each masked weight: score, moments, the best mask, and its scores if stored."""
        return 4 + (8 if self.adam_bits == 32 else 2 + 8 / 256) + 1 / 8 + 4 * self.scores

    @property
    def every(self) -> int:
        """Steps between validations."""
        return self.eval_every or max(1, math.ceil(self.steps / 6))

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)


RUN_KEYS = ("model", "data", "eval_data", "out")  # a settings file may also say what to train on
