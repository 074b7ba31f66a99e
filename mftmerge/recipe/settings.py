"""The options of `build`. mergekit's own have mergekit's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mftmerge.machine import cores
from mftmerge.settings import Flag, Seed, Settings


class MergeSettings(Settings):
    """What a recipe's checks need to know, for `build`, `export` and a dry run."""

    allow_lost: bool = Field(default=False, description="build without tensors of an input that would reach no output")
    allow_crimes: bool = Field(default=False, description="merge models of different architectures")
    trust_remote_code: bool = Field(default=False, description="run code that comes with a model (danger)")
    lora_merge_dtype: str | None = Field(default=None, description="dtype in which adapters are merged")
    lazy_unpickle: bool = Field(default=False, description="read pickled weights piece by piece, for less memory")

    def of_mergekit(self) -> dict[str, Any]:
        """mergekit's options among them."""
        from mftmerge.loading import trusted  # numpy, which `build --help` need not import

        found = self.model_dump(include={"allow_crimes", "lora_merge_dtype", "lazy_unpickle"})
        return found | {"trust_remote_code": trusted(self.trust_remote_code or None)}


class BuildSettings(MergeSettings):
    """The options of `build` and of `mftmerge build`."""

    overwrite: bool = Field(default=False, description="replace what is at OUT")
    seed: Annotated[Seed | None, Flag(("--seed", "--random-seed"))] = Field(
        default=None, description="seed of methods that draw random numbers (dare, della)"
    )
    device: str = Field(default="cpu", description="where mergekit does arithmetic: cpu, cuda")
    cuda: bool = Field(default=False, description="the same as --device cuda")
    num_threads: int | None = Field(default=None, ge=1, description="tensors merged at a time (default: one a core)")
    out_shard_size: str = Field(default="5B", description="bytes a file of weights at most, such as 500M or 5B")
    copy_tokenizer: bool = Field(default=True, description="copy a tokenizer where the recipe makes none of its own")
    lora_merge_cache: Path | None = Field(
        default=None, description="where models with merged adapters stay (default: nowhere)"
    )
    require_finite: bool = Field(default=False, description="fail when a weight is infinite or not a number")

    @property
    def threads(self) -> int:
        """How many tensors are merged at a time."""
        return self.num_threads or cores()

    @property
    def shard_bytes(self) -> int:
        """Bytes a shard. Raises BadInput for what is no size."""
        from mftmerge.errors import BadInput

        text, factor = self.out_shard_size.strip().upper(), 1
        if text[-1:] in ("K", "M", "B", "G"):
            text, factor = text[:-1], {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}[text[-1]]
        if not text.isdigit() or int(text) == 0:
            raise BadInput(f"--out-shard-size {self.out_shard_size}: give a size such as 500M or 5B")
        return int(text) * factor
