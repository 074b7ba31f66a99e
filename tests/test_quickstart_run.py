"""The whole path, end to end: on the tiny model as users run it, and with few rows on the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from mftmerge.cli import main
from mftmerge.errors import BadInput
from mftmerge.evaluate.results import GridResult
from mftmerge.mask import Mask
from mftmerge.progress import Step
from mftmerge.quickstart.page import COMBINATIONS, DOMAINS
from mftmerge.quickstart.plan import LEARNT, RECIPE, Plan, tiny_plan
from mftmerge.quickstart.run import _Run, quickstart
from mftmerge.recipe.schema import Document

ROWS = {
    "base",
    "python mask",
    "arithmetic mask",
    *COMBINATIONS,
    "random mask",
    "magnitude mask",
    "recipe (average)",
    "weights trained on python",
    "weights trained on arithmetic",
    "learnt merge of the trained models",
}


def check(directory: Path) -> GridResult:
    """What every quickstart leaves: masks, checkpoints that generate, a recipe, a table, two pictures, a report."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in (*DOMAINS, *COMBINATIONS, "random", "magnitude"):
        assert Mask.load(directory / "masks" / f"{name}.mask").names
    found = GridResult.from_json(directory / "results.json")
    assert set(found.models) == ROWS
    assert set(found.domains) == set(DOMAINS)
    for domain in DOMAINS:
        assert found.difference("base", domain).mean == 0
        assert 0 < found.difference("random mask", domain).standard_error < 1
    for name in ("density.png", "overlap.png"):
        assert (directory / name).read_bytes()[:4] == b"\x89PNG"
    assert "| base |" in (directory / "results.md").read_text()
    assert "intersection of python, arithmetic" in (directory / "report.html").read_text()
    for checkpoint in ("built", "applied", "merged"):
        model = AutoModelForCausalLM.from_pretrained(directory / checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(directory / checkpoint)
        chat = [{"role": "user", "content": "What is 2 + 3?"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4
    return found


@pytest.mark.slow
def test_tiny_quickstart_as_users_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "try" / "masks" / "python.mask.run"

    def stop(step: Step) -> None:
        if list(saved.glob("checkpoint-*/complete")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # in the middle of the first training
        quickstart(tmp_path / "try", tiny_plan(), progress=stop)
    assert saved.exists()
    command = [sys.executable, "-c", "from mftmerge.cli import main; main()", "quickstart", "try", "--tiny"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    assert "resuming at step" in first.stderr
    assert not saved.exists()
    assert "weights trained on" in first.stdout
    found = check(tmp_path / "try")
    assert found.verdict("python mask", "python") == "gain"
    assert found.verdict("arithmetic mask", "arithmetic") == "gain"
    assert found.verdict("random mask", "arithmetic") == "worse"
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "try").rglob("*.mask")}
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["quickstart", "try", "--tiny", "--json"])
    assert done.value.code == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "try").rglob("*.mask")}, "a second run reuses"
    assert (
        json.loads(capsys.readouterr().out)["cells"]
        == json.loads((tmp_path / "try" / "results.json").read_text())["cells"]
    )
    with pytest.raises(BadInput, match="another seed"):
        quickstart(tmp_path / "try", tiny_plan(seed=1))


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(BadInput, match="not empty"):
        quickstart(tmp_path, tiny_plan())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_broken_record_is_bad_input(tmp_path: Path) -> None:
    for text in ("{}", "[]", '{"plan": 1, "seconds": {}, "peak_memory_bytes": 0}', "cut o"):
        (tmp_path / "quickstart.json").write_text(text)
        with pytest.raises(BadInput, match="not a quickstart's record"):
            quickstart(tmp_path, tiny_plan())


def test_an_absent_model_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no-such"):
        quickstart(tmp_path / "q", Plan(str(tmp_path / "no-such-model")))


@pytest.mark.parametrize("name", ["math@2", "math+code", "math"])
def test_recipes_name_a_model_with_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with ExitStack() as stack:
        run = _Run(tmp_path / "q", Plan(str(tmp_path / name)), None, lambda _: None, stack)
        for text in (RECIPE, LEARNT):
            document = Document.model_validate(yaml.safe_load(run.recipe("r.yml", text).read_text()))
            assert str(tmp_path / name) in [item.model.path for _, item in document.parts()]


@pytest.mark.real_model
@pytest.mark.slow
def test_real_model_with_few_rows(tmp_path: Path, smollm2: Path) -> None:
    small = Plan(str(smollm2), {"train": 16, "validation": 6, "test": 5}, steps=3, longest=200, weight_rates=(3e-4,))
    quickstart(tmp_path / "q", small)
    found = check(tmp_path / "q")
    assert found.mean("base", "arithmetic") < 2.0, "the converted model knows language"
    assert found.difference("arithmetic mask", "arithmetic").mean < 0
