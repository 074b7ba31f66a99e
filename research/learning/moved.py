"""Masks on models that have moved on, as they are and rebased: `python -m research.learning.moved LAB --model DIR`.

With the `--domain NAME=FILE` of `research.learning.run`, which has made the experts and the merge in LAB before.
A mask a domain is learnt over the base from the expert's rows, with the defaults of `train`. It is then put on every
model that the base became (each expert, and their tuned sum), as it is, fitted with other rows of its domain (32;
of Python 24), and fitted with as many rows of the other domains as guards; the test rows of all domains are measured.
LAB/moved.jsonl is the record: what is there stays. `--only` takes cells by their names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import mftmerge
from mftmerge.mask import Mask
from mftmerge.prefix import PrefixCache
from research.combining.common import Weights
from research.learning.common import Bench, Cells, Item, Plan, arguments, opened, read_rows, write_rows
from research.learning.run import Seed

ROWS = 32
MERGE = "their sum"


class Moved:
    """The cells of one seed. Names: `MODEL`, `MODEL, mask DOMAIN` and these with `, rebased` or `, guarded`."""

    def __init__(self, bench: Bench, seed: int, **training: Any) -> None:
        """training: settings of the masks over the base that are not the defaults."""
        self.bench, self.seed, self.made, self.training = bench, seed, Seed(bench, seed), training
        self.cells = Cells(bench.lab / "moved.jsonl")
        self.place = self.made.place / "moved"

    def models(self) -> dict[str, tuple[Weights, Path]]:
        """What the base became: weights, and the checkpoint of them."""
        found = {f"expert {d}": (w, self.made.checkpoint(d)) for d, w in self.made.experts.items()}
        merged = self.made.known("task arithmetic")[0]
        return {MERGE: (merged, self.made.written("merged", merged)), **found}

    def mask(self, domain: str) -> Path:
        """The file of the domain's mask over the base, learnt now if it is not there."""
        path, rows = self.place / f"{domain}.mask", self.place / "rows"
        if not path.exists():
            mftmerge.train_mask(
                self.bench.source,
                write_rows(rows / f"{domain}.jsonl", self.bench.expert_items(domain, self.seed)),
                path,
                eval_data=write_rows(rows / f"{domain}-validation.jsonl", self.bench.rows[domain]["validation"]),
                max_length=self.bench.plan.max_length,
                note=print,
                **self.training,
            )
        return path

    def fresh(self, domain: str) -> list[Item]:
        """Rows that are new to the domain's mask.

        Python's are those of validation, which chose among the mask's steps: the other rows of its pool are functions
        of the files that the mask was learnt from, and on these a mask looks better than it is.
        """
        if domain == "python":
            return self.bench.rows[domain]["validation"]
        return self.bench.learning_items(domain, self.seed, ROWS)

    def rebased(self, domain: str, model: str, path: Path, *, guarded: bool) -> tuple[Mask, dict[str, object]]:
        """The domain's mask fitted to a model, and what the fit says. guarded: the other domains are guards."""
        rows = {d: self.place / "rows" / f"{d}-fresh.jsonl" for d in self.bench.domains}
        for d, file in rows.items():
            write_rows(file, self.fresh(d))
        out = self.place / f"{domain} on {model}{', guarded' * guarded}.mask"
        guards = {d: file for d, file in rows.items() if guarded and d != domain}
        settings = {"max_length": self.bench.plan.max_length, "dtype": "float32"}
        options: dict[str, Any] = {"settings": settings, "guards": guards, "overwrite": True, "note": print}
        result = mftmerge.rebase_mask(self.mask(domain), path, rows[domain], out, **options)
        facts = {"chosen": result.chosen, "gained": result.gained, "dropped": round(result.dropped, 5)}
        return result.mask, facts | {"seconds": round(result.seconds, 1)}

    def cell(self, name: str) -> str:
        return name if name == "base" else self.made.name(name)

    def measure(self, name: str, weights: Mapping[str, torch.Tensor], **facts: Any) -> None:
        cells, self.bench.cells = self.bench.cells, self.cells
        try:
            self.bench.measure(self.cell(name), weights, **facts)
        finally:
            self.bench.cells = cells

    def run(self, only: str = "") -> None:
        """only: regular expression that a fitted mask's name must contain."""
        if "study" not in self.cells:
            self.cells.add("study", domains=self.bench.domains, rows=ROWS)
        models = {"base": (dict(self.bench.originals), Path(self.bench.source)), **self.models()}
        for model, (weights, _) in models.items():
            if self.cell(model) not in self.cells:
                self.measure(model, weights)
        for model, (weights, path) in models.items():
            for domain in self.bench.domains:
                what = f"{model}, mask {domain}"
                if self.cell(what) not in self.cells:
                    self.measure(what, masked(weights, Mask.load(self.mask(domain))))
                for how in ("rebased", "guarded") if model != "base" else ():
                    name = f"{what}, {how}"
                    if re.search(only, name) and self.cell(name) not in self.cells:
                        fitted, facts = self.rebased(domain, model, path, guarded=how == "guarded")
                        self.measure(name, masked(weights, fitted), **facts)


def masked(weights: Weights, mask: Mask) -> Weights:
    """Weights without what a mask drops."""
    return {n: torch.where(torch.from_numpy(mask.kept(n)), w, 0) if n in mask.names else w for n, w in weights.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression that a fitted mask's name must contain")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    bench = opened(given.lab, given.model, partial(read_rows, dict(given.domain)), Plan())
    with patch.object(PrefixCache, "as_set", bench.as_set):
        Moved(bench, given.seed).run(given.only)


if __name__ == "__main__":
    main()
