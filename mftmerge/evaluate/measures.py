"""How an evaluation or a choice measures; apart from both, so that their `--help` need not import torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mftmerge.settings import Flag, Settings


class Opening(Settings):
    """How much of each domain is read, and how the model is loaded."""

    limit: int | None = Field(None, ge=1, description="use the first rows of each domain only")
    max_length: int = Field(1024, ge=2, description="tokens of a row; the rest is cut off")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the weights; auto: as stored, or what is fast here"
    )
    device: str | None = Field(None, description="where it runs: cpu, cuda, ...; by default a GPU if there is one")


class Measuring(Settings):
    """How rows are measured."""

    exact: Annotated[dict[str, str], Flag(metavar="DOMAIN=RULE")] = Field(
        default_factory=dict,
        description="let the model answer, count right answers; RULE is number (#### N), text, sql or re:PATTERN",
    )
    max_new_tokens: int = Field(256, ge=1, description="length of a generated answer")
    base: str | None = Field(
        None, description="dropped weights take the values of this checkpoint; by default what each mask says"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="the data's names of fields, such as prompt=question; may be repeated"
    )
    skip_bad_rows: bool = Field(False, description="leave out rows that cannot be used")
    batch_tokens: int = Field(4096, ge=1, description="padded tokens in one forward pass")


class Measures(Measuring):
    """How rows are measured, and what beside the loss."""

    run_tests: bool = Field(
        False,
        description='run the "tests" of rows on the Python that the model wrote (pass@1), in a sandbox',
    )
    trusted: Annotated[bool, Flag(names=("--i-trust-this-code",))] = Field(
        False, description="run tests even where the system cannot isolate them"
    )
    answers: int | None = Field(
        None, ge=1, description="rows of a domain that are answered, the first ones; the loss is on all"
    )
    resamples: Annotated[int, Flag(names=("--bootstrap",))] = Field(
        0, ge=0, description="resamples for paired 95 % intervals; 0 for none"
    )
    lm_eval: Annotated[tuple[str, ...], Flag(metavar="TASKS")] = Field(
        (), description="also run these tasks of lm-evaluation-harness, between commas"
    )
    lm_eval_limit: int | None = Field(None, ge=1, description="documents a harness task at most")

    @field_validator("lm_eval", mode="before")
    @classmethod
    def _tasks(cls, given: Any) -> Any:
        """Tasks between commas, once or several times."""
        texts = [given] if isinstance(given, str) else given
        return [task.strip() for text in texts for task in text.split(",") if task.strip()]
