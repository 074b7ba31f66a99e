"""The options of a search for a combination, apart from it so that `choose --help` need not import torch."""

from __future__ import annotations

from pydantic import Field

from mftmerge.settings import Seed, Settings


class SearchSettings(Settings):
    """How long and how a search goes on."""

    search: int = Field(0, ge=0, description="search with so many combinations measured beside the usual ones")
    minutes: float | None = Field(None, gt=0, description="begin no measurement of the search after so many minutes")
    guided: bool = Field(True, description="let predictions choose what is measured first, where they can be made")
    proposals: int = Field(60, ge=1, description="combinations that are predicted")
    search_seed: Seed = Field(0, description="seed of the search's proposals")
