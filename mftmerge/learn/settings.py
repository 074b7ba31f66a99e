"""All settings of a merge that is learnt; those that mean the same as in training are declared there."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

from pydantic import Field

from mftmerge.settings import Seed, Settings
from mftmerge.train.settings import TrainSettings

# Steps by the rows that the smallest domain trains on. With 10 and 30 rows 20 steps had done what 60 did; 100 rows gave
# one point more by step 60.
FEWEST, MOST, PER_ROW = 20, 60, 0.6
# Rows of the smallest domain from which their answers, where every row has one, teach more than the experts do, alone
# and beside them (docs/learnt-merges.md): experts can teach what they know, from any row; fewer answers are learnt by
# heart. Of validation rows' gain, with 30 rows 97, 99, 105 % were kept by both and 97, 98, 101 % by the expert; with 10
# rows 95, 98, 94 and 96, 99, 100 %.
ANSWERS_FROM, BOTH_FROM = 60, 20
TRAVEL = 1.0  # how far a score can move in the run; scores are ranks, from 0 to 1


def as_in_training(name: str) -> Any:
    """A setting that means what it does in training: its default, bounds and description are declared there."""
    return copy.copy(TrainSettings.model_fields[name])


class LearnSettings(Settings):
    """Settings of `learn_merge`."""

    # What is learnt
    teacher: Literal["auto", "expert", "answers", "both"] = Field(
        "auto",
        description="what a domain's rows ask for: the expert's own next-token distribution, the answers, or both to "
        f"equal parts; auto: where every row has an answer, the answers if the smallest domain has {ANSWERS_FROM} rows "
        f"and both if it has {BOTH_FROM}; else the expert",
    )
    base_kl: float = Field(
        1.0,
        ge=0,
        description="how much the merge is held to the base on the prompts: the divergence from the base's next-token "
        "distribution there, in nats, counts this much beside a domain's loss over its expert's gain; 0: not at all",
    )
    start_density: float = Field(
        0.5, ge=0, le=1, description="share of each expert's changes in a tensor that is kept at first, the largest"
    )
    density: float | None = Field(
        None, gt=0, le=1, description="share of each tensor that each mask keeps, exactly; free by default"
    )
    scores: bool = Field(False, description="store final and initial scores in the masks")

    # The steps
    steps: int | None = Field(
        None, ge=0, description="optimiser steps; by default 0.6 for each row of the smallest domain, 20 to 60"
    )
    batch_size: int = Field(3, ge=1, description="rows of each domain in a step")
    lr: float | None = Field(
        None, gt=0, description="learning rate of the scores, which are ranks; by default 2 / steps"
    )
    clip: float | None = Field(None, gt=0, description="largest norm of the weights' gradients; none by default")
    seed: Seed = Field(42, description="seed of which rows are taken, of those held out, and of their order")

    # The data
    max_length: int = as_in_training("max_length")
    columns: dict[str, str] | None = as_in_training("columns")
    skip_bad_rows: bool = as_in_training("skip_bad_rows")
    answer_tokens: int = Field(
        128, ge=1, description="longest answer that an expert writes to a prompt without one, in tokens"
    )
    teacher_top: int = Field(
        256,
        ge=1,
        description="tokens of a distribution that is learnt which are told apart; the others count as one",
    )

    # Validation
    eval_share: float = Field(0.1, ge=0, lt=1, description="share of each domain's rows that is held out, at least two")
    eval_rows: int = Field(32, ge=1, description="validation rows of each domain at most")
    eval_every: int | None = as_in_training("eval_every")
    patience: int | None = as_in_training("patience")

    # The machine
    dtype: Literal["auto", "float32", "bfloat16"] = as_in_training("dtype")
    adam_bits: Literal[8, 32] = as_in_training("adam_bits")
    gradient_checkpointing: bool = as_in_training("gradient_checkpointing")
    prefix: Literal["memory", "disk", "off"] = as_in_training("prefix")
    save_every: int | None = as_in_training("save_every")
    log_to: str = as_in_training("log_to")
    trust_remote_code: bool = as_in_training("trust_remote_code")
    check_memory: bool = as_in_training("check_memory")

    @property
    def asks_experts(self) -> bool:
        """Whether the experts' distributions are learnt, of settings that have their teacher."""
        return self.teacher in ("expert", "both")

    @property
    def asks_answers(self) -> bool:
        """Whether the rows' answers are learnt, of settings that have their teacher."""
        return self.teacher in ("answers", "both")

    def settled(self, rows: int, answered: bool) -> LearnSettings:
        """The settings with their steps and teacher, where the smallest domain trains on so many rows.

        answered: whether every row has an answer.
        """
        found: dict[str, object] = {}
        if self.steps is None:
            found["steps"] = min(MOST, max(FEWEST, math.ceil(PER_ROW * rows)))
        if self.teacher == "auto":
            taught = "answers" if rows >= ANSWERS_FROM else "both" if rows >= BOTH_FROM else "expert"
            found["teacher"] = taught if answered else "expert"
        return self.model_copy(update=found)

    def of_loop(self) -> TrainSettings:
        """What the training loop needs to know of these settings, which have their steps."""
        steps = self.steps or 0
        same = (
            *("batch_size", "seed", "eval_every", "patience", "save_every", "log_to", "scores", "adam_bits", "dtype"),
            *("max_length", "gradient_checkpointing", "clip"),
        )
        rate = self.lr or 2 * TRAVEL / max(1, steps)
        return TrainSettings.make({k: getattr(self, k) for k in same} | {"steps": steps, "lr": rate, "warmup": 0.0})
