"""`mftmerge init`, `run`, `chat` and `push`: a whole job from one file, answers side by side, a mask with its card."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mftmerge
from mftmerge.cli.main import main
from mftmerge.job import load_job, run_job
from mftmerge.mask import Mask, MaskInfo
from mftmerge.push import push
from mftmerge.sweepplan import load_plan


def program(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def place(tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of two domains and a job file made by `init`, at toy size."""
    monkeypatch.chdir(tmp_path)
    number = 0
    for domain in ("code", "math"):
        for part, count in (("", 12), ("-val", 6), ("-test", 6)):
            rows = [
                {"prompt": f"{domain} {i}", "completion": f"is {i * 7 % 10}"} for i in range(number, number + count)
            ]
            number += count
            (tmp_path / f"{domain}{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert program("init", "job.yml", "--model", tiny("llama"), "--domain", "code", "--domain", "math") == 0
    text = (tmp_path / "job.yml").read_text().replace("steps: 60", "steps: 8\n  lr: 0.01")
    (tmp_path / "job.yml").write_text(text)
    return tmp_path


@pytest.mark.slow
def test_a_job_is_done_and_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    result = run_job("job.yml", note=told.append)
    made = {p.name for p in (place / "job").iterdir()}
    assert {"code.mask", "math.mask", "general.mask", "results.json", "report.html"} <= made
    assert {"code", "math", "general"} <= set(result.models)
    before = {p.name: p.stat().st_mtime_ns for p in (place / "job").glob("*.mask")}
    told.clear()
    again = run_job("job.yml", note=told.append)
    assert {p.name: p.stat().st_mtime_ns for p in (place / "job").glob("*.mask")} == before
    assert sum("is there already" in line for line in told) == 4
    assert again.to_json() == result.to_json()
    (place / "math-test.jsonl").write_text((place / "math-test.jsonl").read_text().replace("is", "was"))
    told.clear()
    run_job("job.yml", note=told.append)
    assert {p.name: p.stat().st_mtime_ns for p in (place / "job").glob("*.mask")} == before
    assert "evaluating on test rows" in told, "only the test has other rows"
    capsys.readouterr()
    assert program("run", "job.yml") == 0
    (wrote,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote in job: "))
    assert set(wrote.partition(": ")[2].split(", ")) <= made


@pytest.fixture
def small(place: Path, tiny: Callable[..., Path]) -> Callable[..., dict[str, object]]:
    """A job of one domain, its rows in directories whose names have a bracket, over a model of its own."""
    import shutil

    shutil.copytree(tiny("llama"), place / "own+model")
    for part, suffix in (("train", ""), ("validation", "-val"), ("test", "-test")):
        (place / f"{part}[0]").mkdir()
        shutil.copy(place / f"code{suffix}.jsonl", place / f"{part}[0]" / "a.jsonl")

    def job(**train: object) -> dict[str, object]:
        rows = {part: str(place / f"{part}[0]") for part in ("train", "validation", "test")}
        return {"model": str(place / "own+model"), "out": "one", "domains": {"x": rows}, "train": {"steps": 1, **train}}

    return job


def test_what_a_job_reads_may_change_where_it_is(place: Path, small: Callable[..., dict[str, object]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def done(**train: object) -> list[str]:
        told: list[str] = []
        results.append(run_job(small(**train), note=told.append).to_json())
        return [line.split()[0] for line in told if line.startswith(("learning one/x.mask", "evaluating on test"))]

    results: list[str] = []
    assert done() == ["learning", "evaluating"]
    assert done() == []
    rows = place / "test[0]" / "a.jsonl"
    rows.write_text(rows.read_text().replace("is", "was"))
    assert done() == ["evaluating"]
    rows = place / "validation[0]" / "a.jsonl"
    rows.write_text(rows.read_text().replace("is", "was"))
    assert "learning" in done()
    model = AutoModelForCausalLM.from_pretrained(place / "own+model")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    model.save_pretrained(place / "own+model")
    assert done() == ["learning", "evaluating"]
    assert results[-1] != results[-2]
    (place / "own+model" / "README.md").write_text("a card decides nothing")
    assert done() == []
    start = place / "first.mask"
    mftmerge.train_mask(place / "own+model", "code.jsonl", start, steps=0, scores=True, eval_share=0.0)
    assert "learning" in done(start=str(start))
    assert done(start=str(start)) == []
    mftmerge.train_mask(place / "own+model", "math.jsonl", start, steps=3, scores=True, eval_share=0.0, overwrite=True)
    assert "learning" in done(start=str(start))


def test_a_plus_in_a_models_name(tmp_path: Path) -> None:
    """Of `model+adapter` both are beside the file; a directory of the whole name comes first, as in `loading.parts`."""
    job = "model: {model}\ndomains: {{x: {{train: t.jsonl, validation: v.jsonl, test: e.jsonl}}}}\n"
    sweep = "model: {model}\ntrain: t.jsonl\nvalidation: v.jsonl\ntest: {{x: e.jsonl}}\n"
    for name in ("my+model", "a", "b+c", "lora"):
        (tmp_path / name).mkdir()
    for model, parts in (
        ("my+model", ("my+model",)),
        ("a+lora", ("a", "lora")),
        ("b+c+lora", ("b+c", "lora")),
        ("org/a+lora", (Path("org/a"), "lora")),
        ("./a", ("a",)),
    ):
        expected = "+".join(str(p if isinstance(p, Path) else tmp_path / p) for p in parts)
        for text, load in ((job, load_job), (sweep, load_plan)):
            (tmp_path / "file.yml").write_text(text.format(model=model))
            assert load(tmp_path / "file.yml").model == expected


def test_what_files_name_is_beside_them(tmp_path: Path) -> None:
    """From another directory too: patterns, ranges, names with brackets, and the files that settings name."""
    for name in ("fft", "rows"):
        (tmp_path / name).mkdir()
    for name in ("rows/a.jsonl", "odd[1].jsonl", "start.mask"):
        (tmp_path / name).write_text("")
    rows = "train: 'rows/*.jsonl', validation: 'rows/a.jsonl[0:2]', test: 'odd[1].jsonl'"
    (tmp_path / "job.yml").write_text(
        f"model: org/a\ndomains: {{x: {{{rows}}}}}\ntrain: {{base: fft, start: start.mask, steps: 3}}\n"
    )
    job = load_job(tmp_path / "job.yml")
    place = str(tmp_path)
    assert job.train == {"base": f"{place}/fft", "start": f"{place}/start.mask", "steps": 3}
    found = job.domains["x"].model_dump()
    assert found == {
        "train": f"{place}/rows/*.jsonl",
        "validation": f"{place}/rows/a.jsonl[0:2]",
        "test": f"{place}/odd[1].jsonl",
    }
    (tmp_path / "sweep.yml").write_text(
        "model: org/a\ntrain: 'rows/*.jsonl'\nvalidation: absent.jsonl\ntest: {x: 'odd[1].jsonl'}\n"
        "settings: {base: fft, start: absent.mask}\n"
    )
    plan = load_plan(tmp_path / "sweep.yml")
    assert plan.settings == {"base": f"{place}/fft", "start": "absent.mask"}
    assert (plan.train, plan.validation) == (f"{place}/rows/*.jsonl", "absent.jsonl")


def test_a_job_is_checked_before_anything_is_loaded(place: Path) -> None:
    (place / "math-test.jsonl").write_text((place / "math.jsonl").read_text())
    with pytest.raises(mftmerge.BadInput, match="math"):
        run_job("job.yml")
    (place / "job.yml").write_text("model: x\ndomains: {code: {train: a, validation: b}}\n")
    with pytest.raises(mftmerge.BadInput, match=r"job\.yml: domains.code.test: Field required"):
        load_job("job.yml")


def test_answers_side_by_side(
    place: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mftmerge.checkpoint import Checkpoint

    names = [n for n in Checkpoint.open(tiny("llama")).names if "mlp" in n]
    shapes = {n: Checkpoint.open(tiny("llama")).entry(n).shape for n in names}
    Mask.from_bools({n: np.zeros(s, bool) for n, s in shapes.items()}).save("none.mask")
    Mask.from_bools({n: np.ones(s, bool) for n, s in shapes.items()}).save("all.mask")
    words = [
        "chat",
        "--model",
        str(tiny("llama")),
        "--mask",
        "none.mask",
        "--mask",
        "all.mask",
        "--max-new-tokens",
        "6",
    ]
    assert program(*words, "--prompt", "what is 3 + 4?") == 0
    said = dict(part.split("] ", 1) for part in capsys.readouterr().out.split("[") if "] " in part)
    assert set(said) == {"base", "none", "all"}
    assert said["base"].strip() == said["all"].strip(), "a mask that drops nothing changes nothing"
    assert program(*words, "--prompt", "hi", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)[0]["answers"]) == {"base", "none", "all"}
    monkeypatch.setattr("sys.stdin", io.StringIO("/use all\nhello\n/use nobody\n/quit\n"))
    assert program(*words) == 0
    out = capsys.readouterr().out
    assert "[all]" in out
    assert "[base]" not in out
    assert "there is no 'nobody'; there are base, none, all" in out


def test_a_card_says_what_a_mask_is(tmp_path: Path) -> None:
    Mask.from_bools({"w": np.arange(8) < 6}, MaskInfo(keep=0.75, base="org/base")).save(tmp_path / "code.mask")
    done = push(tmp_path / "code.mask", "me/code-mask", license="mit", dry_run=True)
    assert done.url is None
    for words in (
        "base_model:\n- org/base\n",
        "license: mit",
        "library_name: mftmerge",
        "75.0%",
        "hf://me/code-mask/general.mask",
    ):
        assert words in done.card
    compile(done.card.split("```python\n")[1].split("```")[0], "card", "exec")
    with pytest.raises(mftmerge.BadInput, match="OWNER/NAME"):
        push(tmp_path / "code.mask", "code-mask")


def test_a_model_with_an_adapter(place: Path, tiny: Callable[..., Path]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    torch.manual_seed(0)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapted.save_pretrained("adapter")
    both = f"{tiny('llama')}+adapter"
    rows = {"code": "code-test.jsonl"}
    plain = mftmerge.evaluate_files({"m": tiny("llama")}, {}, rows).mean("m", "code")
    changed = mftmerge.evaluate_files({"m": both}, {}, rows).mean("m", "code")
    assert plain != changed
    result = mftmerge.train_mask(both, "code.jsonl", "x.mask", eval_data="code-val.jsonl", steps=1)
    assert result.mask.info.base == both
    with pytest.raises(mftmerge.BadInput, match="after the \\+ stands a LoRA adapter"):
        mftmerge.train_mask(f"{tiny('llama')}+{tiny('llama')}", "code.jsonl", "y.mask")


def test_rows_are_read_before_the_model(place: Path) -> None:
    with pytest.raises(mftmerge.BadInput, match="absent"):
        mftmerge.train_mask("no-such-model", "absent.jsonl", "x.mask")
