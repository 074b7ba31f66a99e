"""`mftmerge eval` end to end on tiny checkpoints: files in, a table, JSON, Markdown and a picture out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mftmerge import checkpoint
from mftmerge.cli import main
from mftmerge.data import load_rows, tokenize
from mftmerge.errors import BadInput
from mftmerge.evaluate import files
from mftmerge.evaluate.measures import Measures
from mftmerge.evaluate.results import GridResult
from mftmerge.mask import Mask, MaskInfo


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def kitchen(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two tiny models, two masks of the first, two domains."""
    here = tmp_path_factory.mktemp("eval")
    model, other = tiny("llama", layers=2), tiny("llama", layers=2, seed=1)
    opened = checkpoint.Checkpoint.open(model)
    names = [n for n in opened.names if "layers.1.mlp" in n]
    for seed, name in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        kept = {n: rng.random(opened.entry(n).shape) < 0.7 for n in names}
        prints = {n: opened.fingerprint(n) for n in names}
        Mask.from_bools(kept, MaskInfo(base=str(model), fingerprints=prints)).save(here / f"{name}.mask")
    math = [{"prompt": f"{i} + {i}", "completion": f"it is\n#### {2 * i}"} for i in range(6)]
    code = [{"prompt": f"f{i}", "completion": f"def f(): return {i}", "tests": f"assert f() == {i}"} for i in range(4)]
    for name, rows in {"math": math, "code": code}.items():
        (here / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return SimpleNamespace(here=here, model=model, other=other, a=here / "a.mask", b=here / "b.mask")


def test_rows_of_other_names_and_bad_ones(kitchen: SimpleNamespace, tmp_path: Path) -> None:
    """As in training: the same file is measured as it was learnt; a path may have the sign that names are given by."""
    rows = [{"question": r["prompt"], "answer": r["completion"]} for r in load_rows(kitchen.here / "math.jsonl")]
    file = tmp_path / "a=b.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"question": "q", "answer": ""}]))
    names = ["--columns", "prompt=question", "--columns", "completion=answer"]
    common = ["eval", "--model", kitchen.model, "--mask", kitchen.a]
    assert run(*common, "--data", file, *names) == 2  # the last row has no answer
    assert run(*common, "--data", file, *names, "--skip-bad-rows", "--out", tmp_path / "a.json") == 0
    assert run(*common, "--data", kitchen.here / "math.jsonl", "--out", tmp_path / "b.json") == 0
    a, b = (json.loads((tmp_path / f"{n}.json").read_text())["domains"] for n in "ab")
    assert [d["rows"] for d in a.values()] == [d["rows"] for d in b.values()] == [6]


def test_rows_that_a_template_refuses_are_skipped_for_all_models(
    kitchen: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One refuses a system's turn, the other, where it is asked, what comes without one."""
    refuse = "{% if WHEN %}{{ raise_exception('not so') }}{% endif %}"
    models = {}
    for name, condition in (
        ("one", "messages[0].role == 'system'"),
        ("two", "add_generation_prompt and messages[0].content == 'q1'"),
    ):
        models[name] = shutil.copytree(kitchen.model, tmp_path / name)
        template = models[name] / "chat_template.jinja"
        template.write_text(refuse.replace("WHEN", condition) + template.read_text())
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(6)]
    turns[4].insert(0, {"role": "system", "content": "s"})
    rows = [{"messages": t} for t in turns]
    skipping = {"skip_bad_rows": True}
    with pytest.raises(BadInput, match="the chat template refuses it: not so"):
        files.evaluate_files(models, {}, {"x": rows})
    found = files.evaluate_files(models, {}, {"x": rows}, measures=Measures.make(skipping))
    assert [found.values(name, "x", "loss").shape for name in models] == [(5, 2), (5, 2)]
    exact = Measures.make({**skipping, "exact": {"x": "text"}, "max_new_tokens": 2})
    found = files.evaluate_files(models, {}, {"x": rows}, measures=exact)
    for name in models:
        assert {metric: len(found.values(name, "x", metric)) for metric in ("loss", "exact")} == {"loss": 4, "exact": 4}
    assert "2 of 6 rows are skipped; the first: row 2: the chat template refuses it: not so" in caplog.text
    with pytest.raises(BadInput, match="domain 'x': no row can be used; row 1: the chat template refuses it"):
        files.evaluate_files(models, {}, {"x": rows[4:5]}, measures=Measures.make(skipping))


def test_names_are_shown_as_text(kitchen: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name is somebody else's: no escape sequence in the terminal, no HTML, link or column in Markdown."""
    name = "a[v](x)<img src=x>|`\x1b[31m"
    (tmp_path / f"{name}.mask").write_bytes(kitchen.a.read_bytes())
    (tmp_path / f"{name}.jsonl").write_bytes((kitchen.here / "math.jsonl").read_bytes())
    given = ["--mask", tmp_path / f"{name}.mask", "--data", tmp_path / f"{name}.jsonl"]
    assert run("eval", "--model", kitchen.model, *given, "--markdown", tmp_path / "r.md") == 0
    text = (tmp_path / "r.md").read_text()
    for found in (capsys.readouterr().out, text):
        assert "\x1b" not in found
        assert "x1b[31m" in found
    assert r"a[v]\(x)\<img src=x>\|\`\\x1b[31m" in text
    assert "|`" not in text.replace(r"\|\`", "")


def test_the_whole_command(kitchen: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ["--out", tmp_path / "r.json", "--markdown", tmp_path / "r.md", "--plot", tmp_path / "r.png"]
    arguments = ["--model", f"fft={kitchen.model}", "--mask", kitchen.a, "--mask", f"second={kitchen.b}"]
    arguments += ["--data", kitchen.here / "math.jsonl", f"py={kitchen.here / 'code.jsonl'}", "--bootstrap", 50]
    answers = ["--exact", "math=number", "--run-tests", "--max-new-tokens", 4]
    assert run("eval", *arguments, *answers, *outputs) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "second" in shown
    assert "py: own answers of the rows pass 4 of 4 tests" in shown
    assert "the mask's base" not in shown  # as it should be, so there is nothing to say
    result = GridResult.from_json(tmp_path / "r.json")
    assert list(result.models) == ["fft", "a", "second"]
    assert result.metrics == [("math", "loss"), ("math", "exact"), ("py", "loss"), ("py", "pass@1")]
    assert result.models["a"]["mask"] == Mask.load(kitchen.a).digest
    assert result.values("second", "py").shape == (4, 2)
    assert result.mean("fft", "math") != result.mean("a", "math")
    assert len(result.extra["answers"]["a"]["math"]) == 6
    assert "| second | 0.7" in (tmp_path / "r.md").read_text()
    assert run("eval", *arguments, *outputs) == 2
    assert "exists already" in capsys.readouterr().err


def test_several_models_and_a_named_reference(kitchen: SimpleNamespace) -> None:
    result = files.evaluate_files(
        {"one": kitchen.model, "two": kitchen.other},
        {"m": kitchen.a},
        {"math": kitchen.here / "math.jsonl"},
        reference="two+m",
        limit=3,
    )
    assert list(result.models) == ["one", "one+m", "two", "two+m"]
    assert result.difference("two+m", "math").mean == 0
    assert result.difference("one", "math").n == 3
    assert result.models["one"]["weights"] != result.models["two"]["weights"]
    assert "is not the mask's base" in result.models["two+m"]["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "x=a.mask", "--mask", "x=b.mask"], "two are called 'x'"),
        (["--mask", "{here}/none.mask"], "none.mask"),
        (["--exact", "math"], "give DOMAIN=RULE"),
        (["--exact", "poetry=text"], "no such domain"),
        (["--exact", "math=numbers"], "give number, text, sql or re:PATTERN"),
        (["--reference", "x"], "reference 'x' is not one of the rows"),
        (["--data", "{here}/none.jsonl"], "no such file of rows"),
        (["--dtype", "int4"], "'int4' is not one of 'auto', 'float32'"),
        (["--lm-eval", "gsm8k"], "not installed"),
    ],
)
def test_errors_are_one_line_and_come_before_the_work(
    kitchen: SimpleNamespace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(files, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    given = [a.format(here=kitchen.here) for a in arguments]
    assert run("eval", "--model", kitchen.model, "--data", f"math={kitchen.here / 'math.jsonl'}", *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_is_none_is_one_line(kitchen: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "--model", kitchen.here, "--data", kitchen.here / "math.jsonl") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_harness_tasks_run_on_the_masked_model(
    kitchen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the package, that sees what the model's weights are when it is called."""
    seen: list[float] = []

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None, log_samples: bool) -> dict[str, Any]:
        weight = model.pretrained.model.layers[1].mlp.up_proj.weight
        seen.append(float((weight == 0).float().mean()))
        assert (tasks, limit, model.batch_size) == (["t1", "t2"], 5, 8)
        scores = {"alias": "t1", "sample_len": 7, "acc,none": 0.25, "acc_stderr,none": 0.125}
        return {"results": dict.fromkeys(tasks, scores)}

    package, models, huggingface = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    package.__dict__.update(simple_evaluate=simple_evaluate, __spec__=SimpleNamespace())
    huggingface.__dict__.update(HFLM=SimpleNamespace)
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    data = ["--data", kitchen.here / "math.jsonl", "--lm-eval", "t1,t2", "--lm-eval-limit", 5]
    assert run("eval", "--model", f"fft={kitchen.model}", "--mask", kitchen.a, *data) == 0
    assert "0.2500 ± 0.1250" in capsys.readouterr().out
    density = Mask.load(kitchen.a).density("model.layers.1.mlp.up_proj.weight")
    assert seen == [0, pytest.approx(1 - density)]


def test_inside_autocast_every_mask_is_seen(kitchen: SimpleNamespace) -> None:
    """Autocast keeps the weights that it has cast, which a switch in place must not leave standing."""
    import torch

    from mftmerge.evaluate.grid import grid

    model, tokenizer = files.load_model(kitchen.model, dtype="float32")
    rows = tokenize(load_rows(kitchen.here / "math.jsonl"), tokenizer, 64)
    masks = {"a": Mask.load(kitchen.a), "b": Mask.load(kitchen.b)}
    plain = grid(model, masks, {"math": rows})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = grid(model, masks, {"math": rows})
    for row in masks:
        assert plain.difference(row, "math").mean != 0
        assert cast.difference(row, "math").mean == pytest.approx(plain.difference(row, "math").mean, abs=0.02)
        assert cast.difference(row, "math").mean != 0
    assert cast.difference("a", "math", reference="b").mean != 0
