"""The example programs run as a user runs them, on tiny models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mftmerge.mask import Mask

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mftmerge.quickstart.domains import write_domains

    directory = tmp_path_factory.mktemp("examples")
    write_domains(directory, {"train": 20}, longest=120)
    return directory


def run(name: str, *arguments: object, lines: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_examples_one_after_the_other(here: Path, tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    printed = run("train_and_apply.py", model, here / "python-train.jsonl", here / "masked", 4)
    assert "weights set to 0" in printed
    AutoModelForCausalLM.from_pretrained(here / "masked")

    files = here / "python-train.jsonl", here / "arithmetic-train.jsonl"
    printed = run("score_combination.py", model, *files, here / "general.mask", 4)
    assert "general.mask: keeps 0.900" in printed
    code, math = here / "python-train.mask", here / "arithmetic-train.mask"
    assert Mask.load(here / "union.mask").density() >= Mask.load(code).density()

    lines = "code: one\nmath: two\nthree\ncode: one\n"
    answers = run("hot_switch.py", model, f"code={code}", f"math={math}", lines=lines)
    _, first, last = answers.split("[code] ")
    assert first.split("[math] ")[0] == last, "the same mask gives the same answer after other masks were in use"
    assert "[base] " in first

    printed = run("mask_on_merged.py", model, tiny("llama", seed=1), here / "general.mask", here / "merged")
    assert "39 tensors" in printed
    AutoModelForCausalLM.from_pretrained(here / "merged")


@pytest.mark.slow
def test_the_optimiser_works_in_a_trainer_of_ones_own(here: Path, tiny: Callable[..., Path]) -> None:
    printed = run("own_trainer.py", tiny("llama"), here / "python-train.jsonl", here / "own.mask", 4)
    assert "density 0.900, 28 tensors" in printed
    mask = Mask.load(here / "own.mask")
    assert all(mask.size(n) - mask.count(n) == mask.size(n) // 10 for n in mask.names)
    run("own_trainer.py", tiny("llama"), here / "python-train.jsonl", here / "start.mask", 1)
    start = Mask.load(here / "start.mask")
    assert any((mask.kept(n) != start.kept(n)).any() for n in mask.names), "it learnt something"


def test_examples_are_short() -> None:
    programs = sorted(EXAMPLES.glob("*.py"))
    assert programs
    for path in programs:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name
