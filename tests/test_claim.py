"""The page on the claim holds what its program writes from the results."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mftmerge import data  # noqa: E402
from mftmerge.train.targets import Target  # noqa: E402
from research.claim import bench, fft, functions, page, study  # noqa: E402
from research.claim.cells import cells  # noqa: E402
from research.claim.common import DOMAINS, read_rows  # noqa: E402
from research.claim.lora import SCALE, LoraOptimizer  # noqa: E402


def test_the_page_is_what_the_program_writes() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page(text) == text


def reading(rows: list[Any], train: int, validation: int) -> Callable[..., dict[str, list[tuple[Any, Any]]]]:
    """`read_rows` of these rows: those before `train`, then before `validation`, and the rest to test."""

    def read(domain: Any, folder: Path, tokenizer: Any, splits: Any = ()) -> dict[str, list[tuple[Any, Any]]]:
        tokens = list(zip(rows, data.tokenize(rows, tokenizer, 64), strict=True))
        return {"train": tokens[:train], "validation": tokens[train:validation], "test": tokens[validation:]}

    return read


def test_a_table_compares_rows_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    out = tmp_path / "cells"
    out.mkdir()
    losses = [[float(i), 10] for i in range(1, 5)]
    (out / "signal.json").write_text("{}")
    better = [[s - 1, n] for s, n in losses]
    states: dict[str, dict[str, Any]] = {
        "base": {
            "loss": losses,
            "exact": [1, 0, 0, 1],
            "executed": [1, 1, 0, 1],
            "others": {"math": losses},
            "passed": [1, 1, 1, 1, 0, 0, 0, 0],
        },
        "mask last": {
            "loss": better,
            "exact": [1, 1, 1, 1],
            "others": {"math": losses},
            "step": 4,
            "course": [],
            "passed": [1, 1, 1, 1, 1, 1, 0, 0],
        },
        "weights last": {"loss": losses, "exact": [1, 1, 1, 0], "others": {"math": better}, "step": 4, "course": []},
        "lora last": {"loss": better, "others": {"math": better}, "step": 4, "course": []},  # its answers: not asked
    }
    for name, state in states.items():
        (out / f"{name}.json").write_text(json.dumps(state))
    page.collect(out, "toy")
    text = page.tables()
    assert "| weights | -0.1000 ± 0.0000 | +25.0 [" in text, "the mask minus the weights"
    assert "| the base |  | 0.2500 | 50.0%" in text
    assert "| mask | last step | -0.1000 ± 0.0000 | 100.0% | +50.0 [" in text
    assert "| 0.50 |" in text  # two rows differ, both in one direction: 2 / 2^2
    assert "| lora | last step | -0.1000 ± 0.0000 |  |  |  |" in text
    assert "| lora | +0.0000 ± 0.0000 |  |  |" in text, "the mask minus LoRA"
    assert "75.0% [" in text, "queries of the base that select the same"
    assert "| lora | last step | -0.1000 ± 0.0000 |  |  |  |  |  |  |" in text
    assert "| base | 50.0% |  |  |" in text, "of eight functions of two kinds"
    assert "| mask | 75.0% | +25.0 ± 25.0 |  |" in text, "the error is that over kinds"
    forgotten = text[text.index("loss on the other domains") :]
    assert "| mask | +0.0000 ± 0.0000 |" in forgotten
    assert "| weights | -0.1000 ± 0.0000 |" in forgotten


def test_lora_moves_weights_by_its_product_alone() -> None:
    """Against torch's own gradients of A and B, over three steps."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5))
    optimizer = LoraOptimizer([Target("w", weight, layer=0)], lr=0.01, rank=2, clip=1e9)
    a, b = (p.detach().clone().requires_grad_() for p in optimizer.pairs["w"])
    start, x = weight.detach().clone(), torch.randn(3, 5)
    other = torch.optim.AdamW([a, b], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        weight.grad = None
        (x @ weight.T).square().sum().backward()
        optimizer.step()
        other.zero_grad()
        (x @ (start + SCALE * b @ a).T).square().sum().backward()
        other.step()
    np.testing.assert_allclose(weight.detach(), (start + SCALE * b @ a).detach(), rtol=1e-4, atol=1e-5)
    assert optimizer.bytes() == 2 * (2 * 5 + 2 * 6)
    optimizer.restore()
    assert torch.equal(weight, start)


def test_a_cell_keeps_its_last_and_its_best_states(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end on a tiny model: each state is measured on the test rows, and the initial one may be the best."""
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(10)]
    source = tiny("llama")

    monkeypatch.setattr(bench, "read_rows", reading(rows, 4, 7))
    made = bench.Bench(source, "wikisql", tmp_path, tmp_path, 0, "1")
    made.record("base", {})
    assert {n: len(rows) for n, rows in json.loads((tmp_path / "base.json").read_text())["others"].items()} == {
        "gsm8k": 3,
        "python": 3,
    }
    before = {n: w.clone() for n, w in made.originals.items()}
    losses = iter([(0.5, 0.1), (0.4, 0.1), (0.6, 0.2)])
    monkeypatch.setattr(made, "validate", lambda: next(losses))
    made.run(bench.Cell("mask", lr=1e-2), steps=2)
    found = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert {n: f.get("step") for n, f in found.items()} == {
        "base": None,
        "mask last": 2,
        "mask loss": 1,
        "mask exact": 2,
    }
    assert found["mask last"]["loss"] == found["mask exact"]["loss"] != found["mask loss"]["loss"]
    assert len(found["mask last"]["exact"]) == len(found["mask last"]["executed"]) == 3
    assert [c["step"] for c in found["mask last"]["course"]] == [0, 1, 2]
    assert all(torch.equal(before[t.name], t.parameter) for t in made.targets)


def test_a_cell_can_do_without_answers(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(6)]

    monkeypatch.setattr(bench, "read_rows", reading(rows, 2, 4))
    made = bench.Bench(tiny("llama"), "wikisql", tmp_path, tmp_path, 0, "1", answers=())
    made.run(bench.Cell("mask", lr=1e-2), steps=2)
    assert sorted(p.stem for p in tmp_path.glob("*.json")) == ["mask last", "mask loss"]
    found = json.loads((tmp_path / "mask last.json").read_text())
    assert "exact" not in found
    assert [c["exact"] for c in found["course"]] == [None] * 3


def test_one_command_makes_all_of_it_and_goes_on(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning, cells, record and page; a second call makes nothing again, and states of another lab stay."""
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(140)]
    source, lab, results = tiny("llama"), tmp_path / "lab", tmp_path / "results"
    tuned: list[str] = []

    def fine_tune(lab: Path, model: str, folder: Path, domain: Any, seed: int) -> None:
        place = lab / f"fft-{domain.name}-s{seed}"
        if not place.exists():
            tuned.append(place.name)
            shutil.copytree(source, place)

    page_file = tmp_path / "claim.md"
    page_file.write_text(f"# A page\n{page.BEGIN}{page.END}\n")
    monkeypatch.setattr(bench, "read_rows", reading(rows, -4, -2))
    monkeypatch.setattr(fft, "fine_tune", fine_tune)
    monkeypatch.setattr(page, "RESULTS", results)
    monkeypatch.setattr(page, "PAGE", page_file)
    monkeypatch.setattr(
        study, "PARTS", [study.Part(f"wikisql-seed{n}", "wikisql", ("mask",), n, layers="1") for n in (0, 1)]
    )
    monkeypatch.setattr(sys, "argv", ["study", str(lab), "--model", str(source), "--data", str(tmp_path)])
    study.main()
    assert tuned == ["fft-wikisql-s0", "fft-wikisql-s1"]
    record = results / "wikisql-seed0.json"
    found = json.loads(record.read_text())["states"]
    assert set(found) == {"base", "mask last", "mask loss", "random mask", "smallest rows", "smallest weights"}
    assert "### wikisql, over seeds" in page_file.read_text()
    other = {"loss": [[s + 1, n] for s, n in found["base"]["loss"]]}
    odd = {"loss": [[s, n + 1] for s, n in found["base"]["loss"]]}  # of rows that are tested no longer
    states = found | {"paper's start last": other, "weights last": odd}
    record.write_text(json.dumps({"signal": {}, "states": states}))
    monkeypatch.setattr(bench.Bench, "using", None)  # nothing is measured a second time
    study.main()
    assert len(tuned) == 2
    assert json.loads(record.read_text())["states"] == found | {"paper's start last": other}


def test_every_cell_is_in_some_part() -> None:
    assert {cell.name for cell in cells("before")} == {name for part in study.PARTS for name in part.cells}


def test_functions_are_judged_by_their_tests() -> None:
    asked = functions.rows()
    assert len({row["prompt"] for row in asked}) == len(asked) == 300
    some = [row for row in asked if "def add_" in row["prompt"]][:2] + asked[-1:]
    right = [row["completion"] for row in some]
    assert functions.passed(some, right).tolist() == [1, 1, 1]
    repeated = f"```python\n{some[0]['head']}\n{right[0]}\n```"
    wrong = [repeated, "    return n", "    return ["]  # the head once more, another value, no program
    assert functions.passed(some, wrong).tolist() == [1, 0, 0]
    for row in asked:
        for value in (False, True):
            with pytest.raises(AssertionError):  # no test is passed by a constant
                exec(f"{row['head']}\n    return {value}\n{row['tests']}", {})


def test_functions_are_completed_where_they_are_asked_for(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(6)]

    monkeypatch.setattr(bench, "read_rows", reading(rows, 2, 4))
    asked = functions.rows()[:3]
    monkeypatch.setattr(functions, "rows", lambda: asked)
    monkeypatch.setattr(functions, "passed", lambda rows, answers: np.array([0.0, 1.0, float(len(answers))]))
    made = bench.Bench(tiny("llama"), "python", tmp_path, tmp_path, 0, "1", answers=("functions",))
    made.record("base", {})
    found = json.loads((tmp_path / "base.json").read_text())
    assert found["passed"] == [0, 1, 3]
    assert "exact" not in found
    assert made.kept == ("last", "loss")


def test_new_rows_are_in_no_other_split(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "wikisql").mkdir()
    lines = [json.dumps({"prompt": f"q {i}", "completion": f"a {i}"}) for i in range(3900)]
    (tmp_path / "wikisql" / "train.jsonl").write_text("\n".join(lines * 2))
    domain = replace(DOMAINS["wikisql"], rows=40, validation=5, test=6)
    found = read_rows(domain, tmp_path, AutoTokenizer.from_pretrained(tiny("llama")))
    assert {split: len(rows) for split, rows in found.items()} == {"test": 6, "validation": 5, "train": 40, "new": 40}
    prompts = [row["prompt"] for rows in found.values() for row, _ in rows]
    assert len(set(prompts)) == len(prompts)
    fewer = read_rows(replace(domain, rows=20), tmp_path, AutoTokenizer.from_pretrained(tiny("llama")))
    assert [*fewer["train"], *fewer["new"]] == found["train"]  # no base's rows are another's for it
    tested = read_rows(domain, tmp_path, AutoTokenizer.from_pretrained(tiny("llama")), ("test",))
    assert tested == {"test": found["test"]}


def test_what_new_rows_teach_is_compared_with_the_bases_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(loss: float, *right: int) -> dict[str, Any]:
        return {"loss": [[loss, 1], [2 * loss, 1]], "exact": list(right), "step": 1}

    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "AGREEMENT", tmp_path / "agreement.json")
    own = {"base": state(4.0, 0, 0), "mask last": state(3.0, 0, 0), "weights last": state(2.0, 1, 0)}
    new = {"base": state(4.0, 0, 0), "mask last": state(2.0, 0, 1)}
    for name, states in {"wikisql-seed0": own, "wikisql new rows-seed0": new}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"signal": {}, "states": states}))
    lines = page.tables().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| learnt from new rows"))
    assert lines[at + 2].startswith("| mask | -1.5000 ± ")
    assert "| +50.0 [" in lines[at + 2]
    assert "weights" not in lines[at + 3]
