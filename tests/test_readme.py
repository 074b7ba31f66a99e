"""What the README tells people to type works as it stands there: commands, Python, and the recipe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
RECIPE = """\
merge_method: linear
models:
  - model: my-model
    mask: code.mask
    parameters: {weight: 1.0}
  - model: my-general-model
    parameters: {weight: 1.0}
"""


def blocks(language: str, heading: str) -> list[str]:
    """Fenced blocks of a language below a heading."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """A directory with the files that the README takes for granted, at toy size."""
    from mftmerge.quickstart.domains import write_domains

    here = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny("llama"), here / "my-model")
    paths = write_domains(here / "data", {"train": 24, "validation": 6, "test": 6}, longest=120)
    for domain, name in (("python", "code"), ("arithmetic", "math")):
        for split, suffix in (("train", ""), ("validation", "-val"), ("test", "-test")):
            shutil.copy(paths[domain][split], here / f"{name}{suffix}.jsonl")
    (here / "recipe.yml").write_text(RECIPE)
    return here


def run(command: str, cwd: Path) -> str:
    program = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def lines(script: str) -> list[str]:
    return [line for line in script.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.slow
def test_the_first_five_lines_and_a_job_from_one_file(workplace: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for here in (first, second):
        shutil.copytree(workplace, here)
    top = README.split("\n## ", 1)[0]
    script, learnt = re.findall(r"```sh\n(.*?)```", top, re.DOTALL)  # the second's files are those of docs/learning.md
    assert len(lines(script)) == 5
    assert [line.split()[1] for line in lines(learnt)] == ["train", "build"]
    for command in lines(script):
        run(command, first)
    assert (first / "my-better-model/model.safetensors").is_file()
    (script,) = blocks("sh", "Your model and data, in one file")
    for command in lines(script):
        run(command, second)
    made = {p.name for p in (second / "job").iterdir()}
    assert {"code.mask", "math.mask", "results.json", "report.html"} <= made


@pytest.mark.slow
def test_the_commands_and_then_the_python(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = blocks("sh", "The same by hand, on your model and data")
    commands = lines(script)
    assert len(commands) >= 9
    outputs = {command.split()[1]: run(command, workplace) for command in commands}
    assert "density" in outputs["inspect"]
    assert "code" in outputs["eval"]
    for made in ("general.mask", "my-general-model/model.safetensors", "merged/config.json", "for-mergekit/config.yml"):
        assert (workplace / made).is_file()
    for mask in ("code.mask", "general.mask"):
        (workplace / mask).rename(workplace / f"first-{mask}")
    shutil.rmtree(workplace / "my-general-model")
    _python(workplace, monkeypatch)


def _python(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(workplace)
    model = AutoModelForCausalLM.from_pretrained("my-model")
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = AutoTokenizer.from_pretrained("my-model")("hello", return_tensors="pt", return_token_type_ids=False)
    namespace: dict[str, Any] = {"model": model, "inputs": inputs}
    (program,) = blocks("python", "From Python")
    exec(compile(program, "README.md", "exec"), namespace)
    assert namespace["general"].density() == pytest.approx(0.93, abs=1e-3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert (workplace / "my-general-model" / "config.json").is_file()


def test_the_recipe_is_a_recipe(tmp_path: Path) -> None:
    from mftmerge.errors import BadInput
    from mftmerge.recipe.load import load_recipe

    (text,) = blocks("yaml", "Recipes")
    (tmp_path / "recipe.yml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yml", files=False).documents
    (tmp_path / "recipe.yml").write_text(text.replace("threshold", "treshold"))
    with pytest.raises(BadInput, match="treshold"):
        load_recipe(tmp_path / "recipe.yml", files=False)


def test_every_file_that_is_linked_exists() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (root / target).exists(), target
