"""What works without torch and the other optional packages, and what is said where one is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import EXTRAS
from mftmerge.mask import Mask

WITHOUT = f"""
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(EXTRAS)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tiny: Callable[..., Path], tmp_path: Path) -> Run:
    """Runs the program where no optional package is installed, beside a model, two masks, rows and a recipe."""
    model = Checkpoint.open(tiny("llama"))
    names = [n for n in model.names if "layers.3.mlp" in n]
    for seed, name in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        Mask.from_bools({n: rng.random(model.entry(n).shape) < 0.9 for n in names}).save(tmp_path / f"{name}.mask")
    (tmp_path / "model").symlink_to(model.path)
    (tmp_path / "tuned").symlink_to(tiny("llama", seed=1))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "r.yml").write_text("merge_method: passthrough\nmodels: [{model: model}]\n")

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = f"{WITHOUT}\nfrom mftmerge.cli import main; main({list(arguments)!r})"
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return start


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect a.mask",
        "compare a.mask b.mask",
        "combine a.mask b.mask --op vote --density 0.9 -o c.mask",
        "apply a.mask --model model -o out",
        "diff-mask model tuned --keep 0.5 -o d.mask",
        "report . -o report.html",
        "train --help",
        "build --help",
    ],
)
def test_mask_work_needs_numpy_alone(run: Run, arguments: str) -> None:
    done = run(*arguments.split())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ("train --model model --data rows.jsonl -o n.mask", "train"),
        ("eval --model model --mask a.mask --data rows.jsonl", "train"),
        ("build r.yml -o merged", "merge"),
        ("inspect a.mask --plot a.png", "plot"),
    ],
)
def test_what_is_missing_is_named(run: Run, arguments: str, extra: str) -> None:
    done = run(*arguments.split())
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"pip install 'mftmerge[{extra}]'" in done.stderr


def test_python_says_the_same() -> None:
    code = f"{WITHOUT}\nimport mftmerge\nmftmerge.Mask, mftmerge.apply_mask\nmftmerge.train_mask"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ImportError: mftmerge.train_mask: this needs" in done.stderr
    assert "pip install 'mftmerge[train]'" in done.stderr


def test_every_package_is_declared_in_the_extra_that_is_named() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=!\[]", r)[0].replace("-", "_") for r in requirements}

    assert not names(project["dependencies"]) & set(EXTRAS)
    for package, extra in EXTRAS.items():
        dependencies = {"peft": "mergekit", "pyarrow": "datasets", "pandas": "datasets"}  # come with these
        assert dependencies.get(package, package) in names(project["optional-dependencies"][extra]), package


def test_floors_are_the_versions_that_were_tried() -> None:
    root = Path(__file__).parent.parent
    project = (root / "pyproject.toml").read_text().lower()
    for line in (root / "constraints-lowest.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.lower().split("==")
            floors = {tuple(map(int, v.split("."))) for v in re.findall(rf'"{name}[>=]=([\d.]+)"', project)}
            tried = tuple(map(int, version.split(".")))
            assert {f + (0,) * (3 - len(f)) for f in floors} == {tried}, name
