"""How many functions of the package a recipe, a mask and a row pass, and through which modules, on a toy model.

    python benchmarks/travel.py

Counted are distinct named functions whose call begins between the start and the end of each journey, on all threads;
expressions in comprehensions and lambdas are not. docs/architecture.md cites the numbers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType

import numpy as np

import mftmerge
from mftmerge.checkpoint import Checkpoint
from mftmerge.data import load_rows, tokenize
from mftmerge.loading import load_causal_lm, load_tokenizer
from mftmerge.loss import row_losses
from mftmerge.mask import Mask
from mftmerge.quickstart.tiny import tiny_checkpoint

PACKAGE = str(Path(mftmerge.__file__).parent)


def passed(journey: Callable[[], object]) -> list[CodeType]:
    """The package's functions that a call passes, in the order of their first calls."""
    seen: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        named = code.co_flags & CO_OPTIMIZED and not code.co_name.startswith("<")  # a class's body is no function
        if event == "call" and named and code.co_filename.startswith(PACKAGE):
            seen.setdefault(code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        journey()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(seen)


def module(code: CodeType) -> str:
    """The name of a function's module in the package."""
    return ".".join(Path(code.co_filename).relative_to(PACKAGE).with_suffix("").parts)


def journeys(here: Path) -> dict[str, Callable[[], object]]:
    """What travels -> its way through the program, on files in a directory."""
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(24)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in enumerate(("base", "math", "code")):
        tiny_checkpoint(here / name, seed=number)
    base = Checkpoint.open(here / "base")
    for number, name in enumerate(("a", "b")):
        random = np.random.default_rng(number)
        kept = {n: random.random(base.entry(n).shape) < 0.9 for n in base.names if "mlp" in n}
        Mask.from_bools(kept).save(here / f"{name}.mask")
    (here / "recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
        "  - {model: math, mask: {file: a.mask, on: delta}, parameters: {weight: 0.5}}\n"
        "  - {model: code, parameters: {weight: 0.5}}\nmask: b.mask\n"
    )
    model, tokenizer = load_causal_lm(here / "base"), load_tokenizer(here / "base")

    def mask() -> None:
        mftmerge.train_mask(here / "base", here / "rows.jsonl", here / "learnt.mask", steps=2)
        mftmerge.apply_mask(here / "learnt.mask", here / "base", here / "applied")

    return {
        "row, from file to loss": lambda: row_losses(model, tokenize(load_rows(here / "rows.jsonl"), tokenizer, 512)),
        "mask, from training to a checkpoint": mask,
        "masks, combined": lambda: mftmerge.combine_files("vote", [here / "a.mask", here / "b.mask"], here / "c.mask"),
        "recipe, from text to a model": lambda: mftmerge.build_recipe(here / "recipe.yml", here / "built"),
    }


def main() -> None:
    """Print each journey: its length, and the modules that it passes with how many of their functions."""
    with tempfile.TemporaryDirectory() as folder:
        for name, journey in journeys(Path(folder)).items():
            found = passed(journey)
            modules: dict[str, int] = {}
            for code in found:
                modules[module(code)] = modules.get(module(code), 0) + 1
            print(f"{name}: {len(found)} functions in {len(modules)} modules")
            print("  " + ", ".join(f"{m} {n}" for m, n in modules.items()))


if __name__ == "__main__":
    main()
