"""Whole runs on a tiny model: what comes out, what is refused, and what survives an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.loss import row_losses
from mftmerge.mask import Mask
from mftmerge.progress import Step
from mftmerge.train.place import Place
from mftmerge.train.run import train_mask
from mftmerge.train.settings import TrainSettings

ROWS = [{"prompt": f"count from {i}", "completion": " ".join(str(j) for j in range(i, i + 6))} for i in range(60)]


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


def loaded(path: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def test_a_run_lowers_the_validation_loss_and_writes_what_it_did(base: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    out = tmp_path / "count.mask"
    result = train_mask(base, ROWS, out, layers="2-3", steps=12, scores=True, control=True, note=notes.append)
    assert result.gained
    assert result.losses["mask"].sum(0)[0] < result.losses["base"].sum(0)[0]
    assert {"base", "initial", "mask", "weights", "random", "magnitude"} == set(result.comparison)
    np.testing.assert_array_equal(result.losses["magnitude"], result.losses["initial"])

    mask, checkpoint = Mask.load(out), Checkpoint.open(base)
    assert mask.digest == result.mask.digest
    assert len(mask.names) == 14
    for name in mask.names:
        assert mask.size(name) - mask.count(name) == mask.size(name) // 10
        assert mask.info.fingerprints[name] == checkpoint.fingerprint(name)
        start = mask.initial_scores(name)
        weights = np.abs(checkpoint.read_float32(name))
        assert np.corrcoef(start.ravel(), weights.ravel())[0, 1] > 0.999999
        assert not np.array_equal(mask.scores(name), start)
        assert mask.scores(name)[mask.kept(name)].min() >= mask.scores(name)[~mask.kept(name)].max()
    assert mask.info.training["selection"] == "signed"
    assert mask.info.training["best_step"] == result.best_step > 0
    assert mask.info.comparison["weights"]["rows"] == 6
    assert "can travel 0.0060" in " ".join(notes)
    assert f"best mask: step {result.best_step}" in notes[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["count.mask", "count.mask.yaml"]
    written = yaml.safe_load((tmp_path / "count.mask.yaml").read_text())
    assert written["steps"] == 12
    assert written["model"] == str(base)


def test_a_loaded_model_comes_back_bit_for_bit(base: Path) -> None:
    model, tokenizer = loaded(base)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    forward, training = model.forward.__func__, model.training
    train_mask(model, ROWS, tokenizer=tokenizer, layers="3", steps=3, control=True)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None
    assert model.training == training
    assert model.forward.__func__ is forward
    assert "forward" not in vars(model)


def test_the_prefix_cache_does_not_change_the_mask(base: Path) -> None:
    model, tokenizer = loaded(base)
    common: dict[str, Any] = {"tokenizer": tokenizer, "layers": "2-3", "steps": 6, "eval_share": 0}
    whole = train_mask(model, ROWS, **common)
    without = train_mask(model, ROWS, settings={"prefix": "off"}, **common)
    on_disk = train_mask(model, ROWS, settings={"prefix": "disk"}, **common)
    assert whole.mask.digest == on_disk.mask.digest
    bits = sum(int((whole.mask.kept(n) != without.mask.kept(n)).sum()) for n in whole.mask.names)
    assert bits <= 4  # of 86,016: only float32 rounding differs


def test_step_0_is_kept_and_said_when_nothing_is_gained(base: Path) -> None:
    notes: list[str] = []
    model, tokenizer = loaded(base)
    result = train_mask(
        model, ROWS, tokenizer=tokenizer, layers="3", steps=6, lr=1e-12, patience=2, eval_every=1, note=notes.append
    )
    assert result.best_step == 0
    assert not result.gained
    assert not result.mask.info.training["gained"]
    assert "nothing was gained" in notes[-1]
    assert result.stopped_early
    assert len(result.history) < 6


def test_a_run_goes_on_from_another_masks_scores(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.mask", tmp_path / "second.mask"
    train_mask(base, ROWS, first, layers="2-3", steps=4, scores=True)
    train_mask(base, ROWS, second, layers="3", steps=0, start=str(first), scores=True)
    one, two = Mask.load(first), Mask.load(second)
    assert two.names == tuple(n for n in one.names if ".layers.3." in n)
    for name in two.names:
        np.testing.assert_array_equal(two.initial_scores(name), one.scores(name))
        np.testing.assert_array_equal(two.kept(name), one.kept(name))


def test_a_start_that_does_not_fit_is_named(base: Path, tmp_path: Path) -> None:
    bare, scored = tmp_path / "bare.mask", tmp_path / "scored.mask"
    train_mask(base, ROWS, bare, layers="3", steps=0)
    train_mask(base, ROWS, scored, layers="3", steps=0, scores=True)
    for start, settings, message in (
        (bare, {"layers": "3"}, "carries no scores to start from"),
        (scored, {"layers": "2-3"}, "has no scores for model.layers.2."),
        (scored, {"layers": "3", "init": "normal"}, "was trained with init magnitude"),
        (tmp_path / "absent.mask", {"layers": "3"}, "absent.mask"),
    ):
        with pytest.raises(BadInput, match=message):
            train_mask(base, ROWS, None, steps=1, start=str(start), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "normal", "seed": 3},
        {"init": "taylor"},
        {"scope": "global", "keep": 0.8},
        {"pattern": "2:4"},
        {"keep_warmup": 2},
        {"reference_rounding": True},
        {"packing": True, "max_length": 128},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True, "accumulate": 2},
        {"modules": "mlp", "clip": 0.1},
        {"adam_bits": 8},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_reach_the_run(base: Path, settings: dict[str, Any]) -> None:
    result = train_mask(base, ROWS[:40], layers="2-3", steps=3, batch_size=4, settings=settings)
    assert len(result.history) == 4
    assert all(np.isfinite(h["loss"]) for h in result.history[1:])
    expected = {"pattern": 0.5, "scope": 0.8}.get(next(iter(settings)), 0.9)
    assert result.mask.density() == pytest.approx(expected, abs=1e-3)
    if "modules" in settings:
        assert all("mlp" in n for n in result.mask.names)
    if "keep_warmup" in settings:
        assert [h["density"] for h in result.history[1:]] == [0.95, 0.9, 0.9]


def test_compiled_layers_give_the_same_mask(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time as always; only the code generator, which takes a minute, is left out."""
    compiled: list[torch.nn.Module] = []
    real = torch.nn.Module.compile

    def compile_layer(module: torch.nn.Module, **options: Any) -> None:
        compiled.append(module)
        real(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    model, tokenizer = loaded(base)
    common: dict[str, Any] = {"tokenizer": tokenizer, "layers": "3", "steps": 2, "batch_size": 4, "eval_share": 0}
    plain = train_mask(model, ROWS[:16], **common).mask
    mask = train_mask(model, ROWS[:16], compile=True, **common).mask
    assert [type(m).__name__ for m in compiled] == ["LlamaDecoderLayer"]
    assert compiled[0]._compiled_call_impl is None
    assert sum(int((mask.kept(n) != plain.kept(n)).sum()) for n in mask.names) <= 4  # of 43,008


def test_logs_are_kept_beside_the_mask(base: Path, tmp_path: Path) -> None:
    from transformers.integrations import get_available_reporting_integrations

    common: dict[str, Any] = {"layers": "3", "steps": 2, "batch_size": 4, "log_to": "tensorboard"}
    if "tensorboard" not in get_available_reporting_integrations():
        with pytest.raises(BadInput, match=r"log_to tensorboard: not installed .*pip install tensorboard"):
            train_mask(base, ROWS[:16], tmp_path / "a.mask", **common)
        return
    train_mask(base, ROWS[:16], tmp_path / "a.mask", **common)
    assert any("tfevents" in p.name for p in (tmp_path / "a.mask.logs").iterdir())
    with pytest.raises(BadInput, match="log_to nothing: not installed"):
        train_mask(base, ROWS[:16], **{**common, "log_to": "nothing"})


def test_the_default_learning_rate_is_capped_for_short_runs() -> None:
    def made(**given: Any) -> TrainSettings:
        return TrainSettings.make(given)

    assert made(steps=60).learning_rate == pytest.approx(0.025 / 60)
    assert made(steps=25).learning_rate == made(steps=5).learning_rate == 0.001
    assert made(steps=5).travel == pytest.approx(0.0025)
    assert made(steps=5, lr=0.01).learning_rate == 0.01


def test_controls_make_the_cut_that_the_run_makes(base: Path) -> None:
    """Under one global cut the smallest-magnitude mask is the initial one, whatever it drops in each tensor."""
    settings = {"scope": "global", "keep": 0.8, "layers": "2-3", "steps": 0, "control": True}
    losses = train_mask(base, ROWS, settings=settings).losses
    np.testing.assert_array_equal(losses["magnitude"], losses["initial"])
    assert not np.array_equal(losses["random"], losses["initial"])
    by_matrix = train_mask(base, ROWS, settings=settings | {"scope": "matrix"}).losses
    assert not np.array_equal(by_matrix["random"], losses["random"])


def test_fused_experts_are_named_as_in_the_checkpoint(tiny: Callable[..., Path]) -> None:
    path = tiny("mixtral")
    mask = train_mask(path, ROWS[:20], layers="3", modules="mlp", steps=2, batch_size=4).mask
    names = set(Checkpoint.open(path).names)
    assert set(mask.names) <= names
    assert len(mask.names) == 12
    assert all(mask.size(n) - mask.count(n) == mask.size(n) // 10 for n in mask.names)


def test_delta_target_scores_the_difference(base: Path, tiny: Callable[..., Path]) -> None:
    other = tiny("llama", seed=1)
    mask = train_mask(base, ROWS[:20], layers="3", modules="q_proj", steps=0, base=str(other)).mask
    (name,) = mask.names
    assert (mask.info.on, mask.info.delta_base) == ("delta", str(other))
    assert mask.info.delta_fingerprints == {name: Checkpoint.open(other).fingerprint(name)}
    a, b = Checkpoint.open(base).read_float32(name), Checkpoint.open(other).read_float32(name)
    assert np.abs(a - b)[mask.kept(name)].min() >= np.abs(a - b)[~mask.kept(name)].max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.5}, "keep: .*less than or equal to 1"),
        ({"layres": "1"}, "layres: .*there are keep, layers"),
        ({"layers": "12"}, "layers 0 to 3"),
        ({"modules": "nothing"}, "matches nothing in layers .*there are mlp"),
        ({"pattern": "4:2"}, "N:M"),
        ({"keep_warmup": 9}, "longer than the run"),
        ({"max_length": 4}, "max length 4"),
    ],
)
def test_wrong_settings_are_named(base: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        train_mask(base, ROWS, **{"steps": 3, **change})


def test_wrong_places_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mask").touch()
    with pytest.raises(BadInput, match=r"a\.mask: exists already; give .*overwrite=True"):
        train_mask(base, ROWS, tmp_path / "a.mask")
    with pytest.raises(BadInput, match=r"there is no directory .*; make it first"):
        train_mask(base, ROWS, tmp_path / "no" / "a.mask")
    with pytest.raises(BadInput, match="no such directory"):
        train_mask(tmp_path / "nothing", ROWS)
    with pytest.raises(BadInput, match=r"none\.jsonl: no such file"):
        train_mask(base, tmp_path / "none.jsonl")


def test_a_model_too_large_is_refused_before_loading(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mftmerge.train import memory

    monkeypatch.setattr(memory, "available", lambda *, on_gpu: 1 << 20)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        BadInput, match=r"needs about [\d.]+ [GM]iB .* and 1 MiB is free; use .*gradient_checkpointing=True"
    ):
        train_mask(base, ROWS)


def test_the_memory_that_a_run_needs(base: Path) -> None:
    from mftmerge.train import memory

    def need(**settings: object) -> memory.Need:
        common = {"layers": "2-3", "dtype": "float32", "batch_size": 2, "max_length": 50}
        return memory.estimate(base, TrainSettings.make({**common, **settings}))

    checkpoint, covered = Checkpoint.open(base), 86_016
    vocabulary, hidden = checkpoint.entry("model.embed_tokens.weight").shape
    queries, inner = hidden, checkpoint.entry("model.layers.0.mlp.up_proj.weight").shape[0]
    assert need().weights == 4 * sum(checkpoint.entry(n).size for n in checkpoint.names)
    assert need().training == covered * (4 + 4 + 12)
    assert need(adam_bits=8).training == covered * (4 + 4 + 4 + 2 + 8 / 256)
    assert need(control=True).training == covered * (4 + 4 + 12 + 6 * 4)
    assert need(control=True, dtype="bfloat16").training == covered * (2 + 2 + 12 + 2 + 8 + 16)
    assert (need().host, need(scores=True).host) == (covered * 6, covered * 14)
    assert need().logits == 100 * vocabulary * 12
    # what a layer keeps of a token: inputs of two norms, attention, gate, activation and up; then inputs of matrices
    plain = 4 * (2 * hidden + 4 * queries + 3 * inner)
    learning = plain + 4 * (2 * hidden + queries + inner)
    assert need().activations == 100 * 2 * learning
    assert need(layers="1-2").activations == 100 * (2 * learning + plain)  # gradients pass layer 3 as well
    assert need(gradient_checkpointing=True).activations == 100 * (2 * 4 * hidden + learning)
    assert need().device == need().weights + need().training + need().activations + need().logits


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(base: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(base)
    calls = 0

    def poison(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > 3 else None

    model.lm_head.register_forward_hook(poison)
    once = {"layers": "3", "steps": 6, "eval_share": 0, "batch_size": 1}  # one pass a step
    with pytest.raises(MftmergeError, match=r"step 4: the gradient is not finite.*resume=True"):
        train_mask(model, ROWS, tmp_path / "a.mask", tokenizer=tokenizer, **once)  # type: ignore[arg-type]
    assert (tmp_path / "a.mask.run" / "checkpoint-3" / "complete").exists()
    assert not (tmp_path / "a.mask").exists()


# -- interruptions --

SETTINGS: dict[str, Any] = {"layers": "2-3", "steps": 10, "save_every": 2, "eval_every": 4, "scores": True}
SLOW = """
import sys, time
from mftmerge.cli.main import main
from mftmerge.train import optimizer

step = optimizer.MaskOptimizer.step
optimizer.MaskOptimizer.step = lambda *a, **k: (time.sleep(0.4), step(*a, **k))[1]
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["sigint", "sigterm", "kill"])
def test_an_interrupted_run_continues_to_the_same_bits(base: Path, tmp_path: Path, how: signal.Signals) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "broken.mask"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    options = [w for k, v in SETTINGS.items() for w in (f"--{k.replace('_', '-')}", str(v)) if w != "True"]
    arguments = ["train", "-m", str(base), "-d", str(rows), "-o", str(out), *options]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(Path(f"{out}.run").glob("checkpoint-*/complete")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    assert (how == signal.SIGKILL) or b"continue with --resume" in stdout
    assert not out.exists()

    with pytest.raises(BadInput, match=r"checkpoints of a run that was stopped; resume=True .*overwrite=True"):
        train_mask(str(base), rows, out, settings=SETTINGS)
    with pytest.raises(BadInput, match="needs the same settings; changed: keep"):
        train_mask(str(base), rows, out, settings=SETTINGS, keep=0.8, resume=True)
    with pytest.raises(BadInput, match="needs the same settings; changed: data, eval_data"):
        train_mask(str(base), ROWS[1:], out, settings=SETTINGS, resume=True)
    notes: list[str] = []
    resumed = train_mask(str(base), rows, out, settings=SETTINGS, resume=True, note=notes.append)
    assert "resuming at step" in notes[0]
    straight = train_mask(str(base), rows, settings=SETTINGS)
    a, b = straight.mask, Mask.load(out)
    assert a.digest == b.digest
    assert all(np.array_equal(a.scores(n), b.scores(n)) for n in a.names)
    assert a.info.training == b.info.training
    assert resumed.history == straight.history
    assert not Path(f"{out}.run").exists()


def test_two_runs_do_not_write_to_one_place(base: Path, tmp_path: Path) -> None:
    with Place(tmp_path / "a.mask", overwrite=False, resume=False).open():
        with pytest.raises(BadInput, match=r"a\.mask: another run is writing it"):
            train_mask(base, ROWS, tmp_path / "a.mask", layers="3", steps=1)
        assert (tmp_path / "a.mask.run").is_dir()
    assert not (tmp_path / "a.mask.run").exists()


def test_a_stop_in_the_middle_of_a_validation_loses_no_step(base: Path, tmp_path: Path) -> None:
    """The step whose validation was cut off is validated when the run goes on."""
    settings: dict[str, Any] = {"layers": "3", "steps": 6, "eval_every": 3, "scores": True}
    calls = validations = 0

    def interrupt(step: Step) -> None:
        nonlocal calls
        calls += 1

    def cut_off(*given: Any) -> Any:
        nonlocal validations
        validations += 1
        if validations == 3:  # the base, the mask at step 0, that at step 3
            os.kill(os.getpid(), signal.SIGINT)
        return row_losses(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mftmerge.train.validation.row_losses", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train_mask(base, ROWS, tmp_path / "a.mask", settings=settings, progress=interrupt)
    assert calls == 2
    resumed = train_mask(base, ROWS, tmp_path / "a.mask", settings=settings, resume=True)
    straight = train_mask(base, ROWS, settings=settings)
    assert resumed.history == straight.history
    assert resumed.mask.digest == straight.mask.digest


def test_the_run_is_written_down_whole(base: Path, tmp_path: Path) -> None:
    """OUT.yaml names the validation rows too, so that running it again gives the same mask."""
    for name, rows in (("rows", ROWS[:40]), ("valid", ROWS[40:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, valid = str(tmp_path / "rows.jsonl"), str(tmp_path / "valid.jsonl")
    train_mask(base, data, tmp_path / "a.mask", eval_data=valid, layers="3", steps=2)
    written = yaml.safe_load((tmp_path / "a.mask.yaml").read_text())
    assert (written["data"], written["eval_data"]) == (data, valid)


def test_the_command_prints_one_line_of_json(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mftmerge.cli.main import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    out = tmp_path / "a.mask"
    with pytest.raises(SystemExit) as done:
        main(["train", "-m", str(base), "-d", str(rows), "-o", str(out), "--steps", "2", "--layers", "3", "--json"])
    assert done.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["digest"] == Mask.load(out).digest
    with pytest.raises(SystemExit) as done:
        main(["train", "--config", f"{out}.yaml", "-o", str(tmp_path / "b.mask"), "--json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["digest"] == said["digest"]
    with pytest.raises(SystemExit) as done:
        main(["train", "-m", str(base), "-o", str(out)])
    assert done.value.code == 2
    assert "--data is missing" in capsys.readouterr().err


# -- the published code's choices --


def test_rows_may_count_equally_whatever_their_length(base: Path) -> None:
    """Ten rows of one token and one of many: by token the long one decides, by row it is one of eleven."""
    model, tokenizer = loaded(base)
    short = [{"input_ids": [5 + i, 6, 7], "labels": [-100, -100, 7]} for i in range(3)]
    rows = [*short, {"input_ids": list(range(5, 45)), "labels": [-100, *range(6, 45)]}]
    from mftmerge.loss import row_losses

    losses = row_losses(model, rows)
    common: dict[str, Any] = {"tokenizer": tokenizer, "layers": "3", "steps": 1, "eval_share": 0, "keep": 1.0}
    expected = {"token": losses[:, 0].sum() / losses[:, 1].sum(), "row": (losses[:, 0] / losses[:, 1]).mean()}
    for average, value in expected.items():
        for how in ({"batch_size": 4}, {"batch_size": 2, "accumulate": 2}, {"packing": True, "max_length": 64}):
            found = train_mask(model, rows, None, loss_average=average, **common, **how)  # type: ignore[arg-type]
            assert found.history[-1]["loss"] == pytest.approx(value, rel=1e-5)


def test_rows_of_like_length_run_together_and_a_step_takes_the_same_rows(base: Path) -> None:
    from mftmerge.loss import token_losses
    from mftmerge.train.batches import loader

    model, _ = loaded(base)
    lengths = (300, 30, 40, 200, 35, 250)
    rows = [{"input_ids": list(range(5, 5 + n % 50)) + [7] * (n - n % 50), "labels": [7] * n} for n in lengths]
    found: list[torch.Tensor] = []
    for tokens, shapes in ((None, {(6, 300)}), (512, {(1, 300), (2, 250), (3, 40)})):
        (passes,) = loader(model, rows, 6, 0, tokens)
        assert {tuple(p["input_ids"].shape) for p in passes} == shapes
        assert sum(int((p["labels"] == 7).sum()) for p in passes) == sum(lengths)
        model.zero_grad()
        for p in passes:
            token_losses(model, p["input_ids"], p["labels"])[0].sum().backward()
        found.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_preset_gives_the_published_values_and_options_win() -> None:
    paper = TrainSettings.make({"preset": "paper"})
    assert (paper.init, paper.reference_rounding, paper.reference_schedule) == ("normal", True, True)
    assert (paper.loss_average, paper.epochs, paper.batch_size * paper.accumulate) == ("row", 2.0, 128)
    assert (paper.lr, paper.max_length) == (2e-5, 4096)
    own = TrainSettings.make({"preset": "paper", "steps": 30, "lr": 1e-3})
    assert (own.steps, own.epochs, own.lr) == (30, None, 1e-3)
    with pytest.raises(BadInput, match="give one of them"):
        TrainSettings.make({"steps": 3, "epochs": 1})


def test_the_published_schedule_is_transformers_linear_one() -> None:
    from transformers import get_linear_schedule_with_warmup

    from mftmerge.train.loop import factor

    settings = TrainSettings.make({"reference_schedule": True, "steps": 70, "warmup": 0.1})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 7, 70)
    for step in range(70):
        assert factor(step, settings) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_epochs_are_counted_in_rows_and_written_as_steps(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"layers": "3", "epochs": 1.5, "batch_size": 8, "accumulate": 2, "eval_share": 0}
    result = train_mask(base, ROWS[:40], tmp_path / "a.mask", settings=settings)
    assert len(result.history) == 5  # 5 batches, 3 steps an epoch
    assert yaml.safe_load((tmp_path / "a.mask.yaml").read_text())["steps"] == 5


def test_attention_and_the_rest_may_keep_different_shares(base: Path) -> None:
    result = train_mask(base, ROWS[:20], layers="3", steps=2, keep_attn=0.8, keep_warmup=2)
    for name in result.mask.names:
        assert result.mask.density(name) == pytest.approx(0.8 if "attn" in name else 0.9, abs=1e-3)


def test_rows_are_not_packed_for_a_model_that_mixes_them() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**sizes))
    rows = [{"input_ids": [5 + i, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]} for i in range(8)]

    class Tokenizer:
        pad_token_id = eos_token_id = 0

    notes: list[str] = []
    common: dict[str, Any] = {"tokenizer": Tokenizer(), "steps": 2, "batch_size": 4, "eval_share": 0}
    result = train_mask(model, rows, packing=True, note=notes.append, **common)
    assert "rows are not packed" in notes[0]
    whole = train_mask(model, rows, **common | {"batch_size": 32}).mask  # a pack would have held all 8 rows
    assert result.mask.digest == whole.digest
