"""What is trained: masks for a domain, for the mixture and one after the other; and the weight controls."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mftmerge.loss import row_losses
from mftmerge.mask import Mask
from mftmerge.train.control import trained_weights
from mftmerge.train.inputs import pad_id
from mftmerge.train.run import train_mask
from mftmerge.train.settings import TrainSettings
from mftmerge.train.targets import find
from research.combining.common import Bench, Weights


def mask(bench: Bench, seed: int, name: str, domains: list[str], **more: Any) -> Mask:
    """A mask learnt on the rows of `domains` (mixed by the data loader's order), from the file if it is there."""
    path = bench.out / f"seed{seed}" / "masks" / f"{name}.mask"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for domain in domains for row in bench.training_rows(domain, seed)]
        valid = [row for domain in domains for row in bench.rows[domain]["validation"]]
        settings = bench.plan.settings(seed, **more)
        found = train_mask(
            bench.model,
            rows,
            path,
            settings=settings,
            eval_data=valid,
            tokenizer=bench.tokenizer,
            prefix=bench.cache,
            resume=Path(f"{path}.run").exists(),
        )
        print(f"seed {seed}: {name}: best step {found.best_step}, {found.seconds:.0f} s", flush=True)
    return Mask.load(path)


def weights(bench: Bench, seed: int, name: str, domains: list[str], **more: Any) -> Weights:
    """The masked matrices after ordinary training: same rows, steps and validation; the best of the learning rates."""
    path = bench.out / f"seed{seed}" / "weights" / f"{name}.safetensors"
    if path.exists():
        return load_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for domain in domains for row in bench.training_rows(domain, seed)]
    valid = [row for domain in domains for row in bench.rows[domain]["validation"]]
    settings = TrainSettings.make(bench.plan.settings(seed, **more))
    targets = find(bench.model, settings.layers)
    lowest, kept = float("inf"), {}
    judge, pad = partial(row_losses, bench.model, valid), pad_id(bench.tokenizer)
    for rate in bench.plan.weight_rates:
        with (
            bench.cache.use(),
            trained_weights(bench.model, targets, rows, settings, judge, lr=rate, pad=pad) as best,
        ):
            print(f"seed {seed}: weights {name}: rate {rate:g}, step {best.step}, {best.loss:.4f}", flush=True)
            if best.loss < lowest:
                lowest, kept = best.loss, {t.name: t.parameter.detach().clone() for t in targets}
    save_file(kept, path)
    return kept
