"""Masks on models that have moved on, as they are and rebased: `python -m research.learning.moved LAB --model DIR`.

With the `--domain NAME=FILE` of `research.learning.run`, which has made the experts and the merge in LAB before.
A mask a domain is learnt over the base from the expert's rows, with the defaults of `train`. It is then put on every
model that the base became (each expert, and their tuned sum), as it is and fitted with other rows of its domain (32;
of Python 24), and the test rows of all domains are measured. LAB/moved.jsonl is the record: what is there stays.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
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
    """The cells of one seed. Names: `MODEL`, `MODEL, mask DOMAIN` and `MODEL, mask DOMAIN, rebased`."""

    def __init__(self, bench: Bench, seed: int, **training: object) -> None:
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

    def rebased(self, domain: str, model: str, path: Path) -> tuple[Mask, dict[str, object]]:
        """The domain's mask fitted to a model, and what the fit says."""
        rows = self.place / "rows" / f"{domain}-fresh.jsonl"
        write_rows(rows, self.fresh(domain))
        out = self.place / f"{domain} on {model}.mask"
        settings = {"max_length": self.bench.plan.max_length, "dtype": "float32"}
        result = mftmerge.rebase_mask(self.mask(domain), path, rows, out, settings=settings, overwrite=True, note=print)
        facts = {"chosen": result.chosen, "gained": result.gained, "dropped": round(result.dropped, 5)}
        return result.mask, facts | {"seconds": round(result.seconds, 1)}

    def cell(self, name: str) -> str:
        return name if name == "base" else self.made.name(name)

    def measure(self, name: str, weights: Mapping[str, torch.Tensor], **facts: object) -> None:
        cells, self.bench.cells = self.bench.cells, self.cells
        try:
            self.bench.measure(self.cell(name), weights, **facts)
        finally:
            self.bench.cells = cells

    def run(self) -> None:
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
                if model != "base" and self.cell(f"{what}, rebased") not in self.cells:
                    fitted, facts = self.rebased(domain, model, path)
                    self.measure(f"{what}, rebased", masked(weights, fitted), **facts)


def masked(weights: Weights, mask: Mask) -> Weights:
    """Weights without what a mask drops."""
    return {n: torch.where(torch.from_numpy(mask.kept(n)), w, 0) if n in mask.names else w for n, w in weights.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    bench = opened(given.lab, given.model, partial(read_rows, dict(given.domain)), Plan())
    with patch.object(PrefixCache, "as_set", bench.as_set):
        Moved(bench, given.seed).run()


if __name__ == "__main__":
    main()
