"""The page of learnt merges holds what its program writes, its numbers are what they say, and its search finds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mftmerge import data  # noqa: E402
from mftmerge.prefix import PrefixCache  # noqa: E402
from research.learning import merges, moved, page, tables, train  # noqa: E402
from research.learning.common import Cells, Item, Plan, opened  # noqa: E402
from research.learning.run import Seed  # noqa: E402


def test_the_page_is_what_the_program_writes() -> None:
    text = (ROOT / "docs" / "learnt-merges.md").read_text(encoding="utf-8")
    blocks = page.blocks()
    assert blocks
    readme = page.README.read_text(encoding="utf-8")
    four = [name for name in blocks if name.startswith("four")]  # of the other experts the page shows what there is
    assert all(f"<!-- {name} -->\n" in (readme if name.endswith("readme") else text) for name in four)
    assert set(re.findall(r"<!-- (\w+: \w+) -->", text + readme)) <= set(blocks)
    assert page.page(text) == text
    assert page.page(readme) == readme


def test_a_record_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Cells(path).add("base", test={"math": [1.0]})
    Cells(path).add("seed0/x", test={})
    again = Cells(path)
    assert list(again.found) == ["base", "seed0/x"]
    assert "base" in again
    assert again["base"]["test"] == {"math": [1.0]}


def toy(ours: list[float], few: list[float]) -> tables.Record:
    """One seed, one domain of four rows with ten tokens each; losses of `ours` with 100 rows and with 10."""

    def cell(losses: list[float]) -> dict[str, Any]:
        return {"facts": {}, "test": {"math": losses, "other": losses}}

    return tables.Record(
        {
            "study": {"domains": ["math"]},
            "tokens": {"math": [10] * 4, "other": [10] * 4},
            "base": cell([20, 30, 40, 10]),
            "seed0/expert math": cell([10, 20, 30, 0]),
            "seed0/TIES": cell([13, 22, 33, 2]),
            f"seed0/{page.OURS}": cell(ours),
            "seed0/masks by expert, 10 rows": cell(few),
            "seed0/fine-tuning by answers, 100 rows": cell([11, 21, 31, 1]),
            "seed0/fine-tuning by answers, 10 rows": cell([15, 25, 35, 5]),
            "seed1/expert of a seed that is not whole": cell([0, 0, 0, 0]),
        }
    )


def test_shares_and_the_goal() -> None:
    record, few = toy([10, 20, 30, 0.4], [16, 26, 36, 6]), [(10, "masks by expert, 10 rows")]
    assert record.seeds == ["seed0"]
    assert record.share("TIES", "math")[0] == pytest.approx(0.75)
    assert record.lowest("TIES") == pytest.approx([0.75])
    mean, error = record.difference("TIES", "base", "math")
    changes = np.array([-7, -8, -7, -8]) / 10
    assert mean == pytest.approx(changes.mean())
    assert error == pytest.approx(changes.std(ddof=1) / 2)
    found = {v.what: v.met for v in tables.verdicts(record, page.OURS, few, page.WITHOUT_DATA, page.LONG)}
    assert found == {
        "98 % of the gain of GSM8K with 100 rows, lowest seed 95 %": True,
        "ahead of every merge without data on GSM8K by two standard errors": True,
        "ahead of fine-tuning the merge on the same 10 rows on GSM8K (sums)": False,
        "less forgetting than fine-tuning at 10 rows (sums)": False,
        "less forgetting than fine-tuning at 100 rows": True,
    }
    worse = tables.verdicts(toy([13, 22, 33, 2], [10, 20, 30, 0]), page.OURS, few, page.WITHOUT_DATA, page.LONG)
    assert [v.met for v in worse] == [False, False, False, True, True]


class FakeJudge:
    """Two domains whose shares are known functions of the weight; how often each was asked for."""

    def __init__(self) -> None:
        self.bench, self.asked = self, 0

    def using(self, weights: dict[str, torch.Tensor]) -> Any:
        import contextlib

        self.x = float(weights["w"])
        return contextlib.nullcontext()

    def now(self, enough: float = -float("inf")) -> dict[str, float]:
        self.asked += 1
        return {"a": 1 - (self.x - 5.3) ** 2, "b": 1.0}


def test_tuning_climbs_to_the_best_setting() -> None:
    method = merges.Method("any", {"x": tuple(range(9)), "y": (0.0, 0.3)}, {"x": 1, "y": 0}, {"z": 1})
    judge = FakeJudge()
    setting, weights, facts = merges.tuned(
        method,
        judge,  # type: ignore[arg-type]
        lambda s: {"w": torch.tensor(float(s["x"] + s["y"]))},
    )
    assert setting == {"x": 5, "y": 0.3, "z": 1}
    assert float(weights["w"]) == pytest.approx(5.3)
    assert len(facts["tried"]) == judge.asked < 18


def test_merges_are_those_of_the_methods() -> None:
    base, first, second = ({"w": torch.tensor([v, 1.0])} for v in (1.0, 3.0, 2.0))
    found = merges.merged(base, [first, second], "task_arithmetic", {"weight": 1.0, "lambda": 0.5}, 0)
    assert found["w"].tolist() == [2.5, 1.0]
    for method in merges.METHODS.values():
        start = {a: method.axes[a][method.start[a]] for a in method.axes} | dict(method.fixed)
        assert merges.merged(base, [first, second], method.name, start, 0)["w"].shape == (2,)


def test_every_row_comes_once_before_any_comes_again() -> None:
    lesson = train.Lesson({"a": [{}] * 4, "b": [{}] * 6}, {}, {}, steps=4, per_step=3)
    drawn: dict[str, list[int]] = {"a": [], "b": []}
    for step in lesson.batches():
        for domain, numbers in step:
            drawn[domain] += numbers
    assert sorted(drawn["b"][:6]) == sorted(drawn["b"][6:]) == list(range(6))
    assert sorted(drawn["a"][:4]) == sorted(drawn["a"][4:8]) == list(range(4))


def test_a_model_that_was_never_made_is_not_asked(tmp_path: Path) -> None:
    """Its answers would be the base's."""
    bench: Any = SimpleNamespace(lab=tmp_path, cells={})
    with pytest.raises(FileNotFoundError, match="masks by hand"):
        Seed(bench, 0).answers("masks by hand", "sql", "text", 8)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_masks_on_models_that_have_moved_on(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """End to end on a tiny model: each model with a mask, as it is and fitted; a second run makes nothing again."""

    def read(tokenizer: Any, plan: Plan) -> dict[str, dict[str, list[Item]]]:
        def items(domain: str, count: int) -> list[Item]:
            rows = [{"prompt": f"{domain} {i}", "completion": f"is {i}"} for i in range(count)]
            return [Item(r, t) for r, t in zip(rows, data.tokenize(rows, tokenizer, 64), strict=True)]

        splits = {"train": 60, "validation": 3, "test": 4}
        found = {d: {s: items(f"{d} {s}", n) for s, n in splits.items()} for d in ["math", "sql"]}
        return found | {"other": {"test": items("other", 3)}}

    plan = Plan(layers="1", expert_rows=8, expert_steps=2, batch=2, max_length=64)
    bench = opened(tmp_path / "lab", str(tiny("llama")), read, plan)
    study = moved.Moved(bench, 0, steps=4)
    made = study.made
    made.weights("task arithmetic", lambda: (made.experts["math"], {}))
    with patch.object(PrefixCache, "as_set", bench.as_set):
        study.run("math, rebased|their sum.*guarded")
        asked = patch.object(moved.mftmerge, "rebase_mask", wraps=moved.mftmerge.rebase_mask)
        assert not any("guarded" in name and "expert" in name for name in study.cells.found)
        with asked as seen:
            study.run()
    assert [sorted(call.kwargs["guards"]) for call in seen.call_args_list if "guarded" in str(call.args[3])] == [
        ["sql"],
        ["math"],
        ["sql"],
        ["math"],
    ]
    models = ["base", "their sum", "expert math", "expert sql"]
    names = [f"{m}, mask {d}" for m in models for d in ("math", "sql")]
    fitted = [f"{n}, {how}" for n in names if not n.startswith("base") for how in ("rebased", "guarded")]
    assert set(study.cells.found) == {"study", "tokens", "base"} | {
        f"seed0/{n}" for n in [*models[1:], *names, *fitted]
    }
    assert study.cells["seed0/base, mask math"]["test"] != study.cells["base"]["test"]
    text = page.rebased(tables.Record.load(bench.lab / "moved.jsonl"))
    assert text.count("\n") == 2 + len(names)
    bench.measure = None  # type: ignore[assignment, method-assign]  # nothing is measured a second time
    moved.Moved(bench, 0).run()
