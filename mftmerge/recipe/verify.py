"""Run stock mergekit on an export, in a process that never saw mftmerge, and compare its result with ours."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mftmerge.checkpoint import Checkpoint, to_float32
from mftmerge.errors import MftmergeError
from mftmerge.recipe.build import build_into
from mftmerge.recipe.load import Recipe
from mftmerge.recipe.settings import BuildSettings

PIECE = 1 << 20  # elements compared at a time


@dataclass(frozen=True)
class Verification:
    """Stock mergekit's result against ours: tensors and weights compared, weights whose bits differ (zeros' signs)."""

    tensors: int
    weights: int
    different_bits: int


def command_line(out: Path, staged: bool, target: str = "OUT") -> str:
    """The stock command that runs an export."""
    config = shlex.quote(str(out / "config.yml"))
    if staged:
        return f"mergekit-multi {config} --intermediate-dir STAGES --out-path {target}"
    return f"mergekit-yaml {config} {target}"


def run_stock(jobs: Sequence[tuple[Path, bool, Path]], work: Path, seed: int | None = None) -> None:
    """Run stock mergekit on (config, several documents?, output) each, all in one new process.

    Raises MftmergeError with the end of mergekit's own output when it fails.
    """
    lines = ["import sys", "assert not any(m.startswith('mftmerge') for m in sys.modules)"]
    for i, (config, staged, out) in enumerate(jobs):
        arguments = [str(config), *(["-I", str(work / f"stages-{i}"), "--out-path"] if staged else []), str(out)]
        arguments += ["--quiet", "--lora-merge-cache", str(work / f"lora-{i}")]
        arguments += ["--random-seed", str(seed)] if seed is not None else []
        module = "multimerge" if staged else "run_yaml"
        lines.append(f"from mergekit.scripts.{module} import main as run")
        lines.append(f"run(args={arguments!r}, standalone_mode=False)")
    # From another directory and isolated: no plug-in of ours can be found by accident.
    done = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        cwd=work,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise MftmergeError("stock mergekit failed on the export: " + " ".join(done.stderr.split())[-600:])


def compare(ours: Path, theirs: Path) -> Verification:
    """Compare two checkpoints value by value. Raises MftmergeError at the first tensor that differs."""
    a, b = Checkpoint.open(ours), Checkpoint.open(theirs)
    if a.names != b.names:
        odd = sorted(set(a.names) ^ set(b.names))
        raise MftmergeError(f"stock mergekit writes other tensors: {len(odd)} differ, first {odd[0]}")
    weights = bits = 0
    for name in a.names:
        ea, eb = a.entry(name), b.entry(name)
        if (ea.dtype, ea.shape) != (eb.dtype, eb.shape):
            raise MftmergeError(f"{name} is {eb.dtype} {eb.shape} from stock mergekit, {ea.dtype} {ea.shape} from us")
        for start in range(0, ea.size, PIECE):
            stop = min(start + PIECE, ea.size)
            x, y = a.read_range(name, start, stop), b.read_range(name, start, stop)
            odd_bits = int(np.count_nonzero(x != y))
            if odd_bits:
                u, v = to_float32(x, ea.dtype), to_float32(y, ea.dtype)
                wrong = int(np.count_nonzero(~((u == v) | (np.isnan(u) & np.isnan(v)))))
                if wrong:
                    largest = float(np.nanmax(np.abs(u - v)))
                    raise MftmergeError(f"{name}: {wrong} weights of stock mergekit's result differ (by {largest:.3g})")
            bits += odd_bits
        weights += ea.size
    return Verification(len(a.names), weights, bits)


def verify_export(recipe: Recipe, configuration: str, staged: bool, scratch: Path, seed: int) -> Verification:
    """Run stock mergekit on an export's configuration (of several documents: `staged`), build, and compare."""
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        work = Path(folder)
        config = work / "config.yml"
        config.write_text(configuration, encoding="utf-8")
        run_stock([(config, staged, work / "theirs")], work, seed)
        (work / "ours").mkdir()
        build_into(recipe, work / "ours", name="ours", settings=BuildSettings(seed=seed))
        return compare(work / "ours", work / "theirs")
