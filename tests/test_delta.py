"""Masks over a delta: their header says so, and everything that uses a mask returns dropped weights to their base."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mftmerge.apply import apply_mask
from mftmerge.checkpoint import Checkpoint
from mftmerge.cli import main
from mftmerge.combine import combine, combine_files
from mftmerge.derive import DiffSettings, diff_mask, import_mask
from mftmerge.errors import BadInput
from mftmerge.evaluate.choosing import choose_combination
from mftmerge.evaluate.files import evaluate_files
from mftmerge.evaluate.measures import Measures
from mftmerge.inspection import inspect
from mftmerge.live import attach
from mftmerge.mask import Mask, MaskInfo
from tests.helpers.checkpoints import random_mask, tensors


@pytest.fixture(scope="module")
def toy(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, the one that it was tuned from, a mask over their difference, and one over the model's weights."""
    here = tmp_path_factory.mktemp("delta")
    tuned, pre = tiny("llama", layers=2, seed=1), tiny("llama", layers=2)
    mask = diff_mask(str(pre), str(tuned), DiffSettings(keep="0.2", only="layers"))
    mask.save(here / "delta.mask")
    random_mask(tuned).save(here / "plain.mask")
    rows = [{"prompt": f"{i} + {i}", "completion": f"it is {2 * i}"} for i in range(6)]
    (here / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {"delta": here / "delta.mask", "plain": here / "plain.mask", "rows": here / "rows.jsonl"}
    return SimpleNamespace(here=here, tuned=tuned, pre=pre, mask=mask, **files)


def test_diff_mask_and_training_say_what_dropped_weights_become(toy: SimpleNamespace) -> None:
    info = Mask.load(toy.delta).info
    assert (info.on, info.base, info.delta_base) == ("delta", str(toy.tuned), str(toy.pre))
    pre = Checkpoint.open(toy.pre)
    assert info.delta_fingerprints == {n: pre.fingerprint(n) for n in toy.mask.names}
    assert Mask.load(toy.plain).info.on == "weights"


def test_apply_returns_to_the_recorded_base(toy: SimpleNamespace, tmp_path: Path) -> None:
    report = apply_mask(toy.delta, toy.tuned, tmp_path / "said")
    apply_mask(toy.delta, toy.tuned, tmp_path / "given", base=toy.pre)
    found, given, tuned, pre = map(tensors, (tmp_path / "said", tmp_path / "given", toy.tuned, toy.pre))
    assert any(toy.pre.name in note for note in report.notes)
    assert toy.pre.name in (tmp_path / "said" / "README.md").read_text()
    for name, values in found.items():
        assert torch.equal(values, given[name])
        if name in toy.mask:
            assert torch.equal(values, torch.where(torch.from_numpy(toy.mask.kept(name)), tuned[name], pre[name]))


@pytest.mark.parametrize("base", [None, "nowhere/at-all", "/no/such\x1b[2J", "~nobody\0" + "x" * 5000, "the model"])
def test_without_its_base_a_delta_mask_asks(toy: SimpleNamespace, tmp_path: Path, base: str | None) -> None:
    info = replace(toy.mask.info, delta_base=str(toy.tuned) if base == "the model" else base)
    mask = Mask.from_bools({n: toy.mask.kept(n) for n in toy.mask.names}, info)
    model = AutoModelForCausalLM.from_pretrained(toy.tuned)
    mask.save(tmp_path / "x.mask")
    uses: list[Callable[[], object]] = [
        lambda: apply_mask(mask, toy.tuned, tmp_path / "out"),
        lambda: attach(model, {"x": mask}),
        lambda: evaluate_files({"m": toy.tuned}, {"x": tmp_path / "x.mask"}, {"t": toy.rows}),
        lambda: choose_combination(toy.tuned, dict.fromkeys("ab", tmp_path / "x.mask"), dict.fromkeys("ab", toy.rows)),
    ]
    for use in uses:
        with pytest.raises(BadInput, match=r"dropped weights return; give .*base") as error:
            use()
        assert "\n" not in str(error.value)
        assert "\x1b" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert apply_mask(mask, toy.tuned, tmp_path / "out", base=toy.pre).dropped  # what is given counts


def test_eval_measures_what_apply_writes(toy: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    """Both kinds of mask in one table, each as the checkpoint that `apply` makes of it."""
    masks = {"delta": toy.delta, "plain": toy.plain}
    result = evaluate_files({"m": toy.tuned}, masks, {"t": toy.rows}, dtype="float32")
    for name, path in masks.items():
        apply_mask(path, toy.tuned, tmp_path / name)
        alone = evaluate_files({"m": tmp_path / name}, {}, {"t": toy.rows}, dtype="float32")
        np.testing.assert_allclose(result.values(name, "t"), alone.values("m", "t"), rtol=1e-6)
    zeros = replace(toy.mask.info, on="weights", delta_base=None, delta_fingerprints={})
    Mask.from_bools({n: toy.mask.kept(n) for n in toy.mask.names}, zeros).save(tmp_path / "zeros.mask")
    other = evaluate_files({"m": toy.tuned}, {"z": tmp_path / "zeros.mask"}, {"t": toy.rows}, dtype="float32")
    assert abs(other.mean("z", "t") - result.mean("delta", "t")) > 1e-4
    given = Measures(base=str(toy.pre))
    again = evaluate_files(
        {"m": toy.tuned}, {"z": tmp_path / "zeros.mask"}, {"t": toy.rows}, measures=given, dtype="float32"
    )
    assert again.mean("z", "t") == result.mean("delta", "t")
    assert any(f"delta: dropped weights have their values in {toy.pre}" in line for line in result.remarks())
    with pytest.raises(SystemExit) as stop:
        main(["eval", "-m", str(toy.tuned), "--mask", str(toy.delta), "-d", str(toy.rows), "--base", str(toy.pre)])
    assert not stop.value.code
    assert "dropped weights have their values" in " ".join(capsys.readouterr().out.split())


def test_combining(toy: SimpleNamespace, tmp_path: Path) -> None:
    other = diff_mask(str(toy.pre), str(toy.tuned), DiffSettings("sign", merged=str(toy.tuned), only="layers"))
    other.save(tmp_path / "other.mask")
    combine_files("intersection", [toy.delta, tmp_path / "other.mask"], tmp_path / "both.mask")
    info = Mask.load(tmp_path / "both.mask").info
    assert (info.on, info.delta_base) == ("delta", str(toy.pre))
    assert info.delta_fingerprints == toy.mask.info.delta_fingerprints
    with pytest.raises(BadInput, match=r"plain\.mask keeps weights; they do not combine") as error:
        combine_files("union", [toy.delta, toy.plain], tmp_path / "mixed.mask")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mixed.mask").exists()
    moved = Mask.from_bools({n: other.kept(n) for n in other.names}, replace(other.info, delta_base="elsewhere"))
    assert combine("union", [toy.mask, moved]).info.delta_base is None


def _written_before(path: Path, out: Path) -> None:
    """The file without what headers of today say about deltas."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    container = json.loads(content[8 : 8 + length])
    header = json.loads(container["__metadata__"]["mftmerge"])
    for key in ("on", "delta_base", "delta_fingerprints"):
        header["info"].pop(key, None)
    text = json.dumps(header)
    container["__metadata__"] = {"mftmerge": text, "mftmerge_crc32": f"{zlib.crc32(text.encode()):08x}"}
    whole = json.dumps(container).encode()
    out.write_bytes(struct.pack("<Q", len(whole)) + whole + content[8 + length :])


def test_masks_of_before_are_understood(toy: SimpleNamespace, tmp_path: Path) -> None:
    trained = MaskInfo(base="tuned", training={"base": str(toy.pre), "steps": 3})
    Mask.from_bools({"w": np.ones(3, np.bool_)}, trained).save(tmp_path / "trained.mask")
    for path, base in ((toy.delta, toy.pre), (tmp_path / "trained.mask", toy.pre), (toy.plain, None)):
        _written_before(path, tmp_path / "old.mask")
        info = Mask.load(tmp_path / "old.mask").info
        assert (info.on, info.delta_base) == ("delta" if base else "weights", base and str(base))
    _written_before(toy.delta, tmp_path / "old.mask")
    with pytest.raises(BadInput, match=str(toy.pre)):  # it does not remember the base's weights
        apply_mask(tmp_path / "old.mask", toy.tuned, tmp_path / "old")
    apply_mask(tmp_path / "old.mask", toy.tuned, tmp_path / "old", base=toy.pre)
    apply_mask(toy.delta, toy.tuned, tmp_path / "new")
    old, new = tensors(tmp_path / "old"), tensors(tmp_path / "new")
    assert all(torch.equal(old[n], new[n]) for n in new)


def test_import_writes_it(toy: SimpleNamespace, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({n: toy.mask.kept(n) for n in toy.mask.names}, tmp_path / "x.safetensors")
    mask = import_mask(tmp_path / "x.safetensors", str(toy.tuned), str(toy.pre))
    assert (mask.info.on, mask.info.delta_base) == ("delta", str(toy.pre))
    assert mask.info.delta_fingerprints == toy.mask.info.delta_fingerprints
    plain = import_mask(tmp_path / "x.safetensors", str(toy.tuned))
    assert plain.info.on == "weights"


def test_inspect_and_report_show_it(toy: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    from mftmerge.report.collect import MaskHere
    from mftmerge.report.masks import what

    with pytest.raises(SystemExit):
        main(["inspect", str(toy.delta)])
    assert f"on: delta (a dropped weight takes its value in {toy.pre})" in capsys.readouterr().out
    found = inspect(toy.delta)
    assert found.to_json()["info"]["on"] == "delta"
    assert f"on the delta from {toy.pre}" in what(MaskHere("delta", "delta.mask", (), found, {}))


def test_a_recipe_says_on_delta(toy: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    models = f"base_model: {toy.pre}\nmodels: [{{model: {toy.tuned}, mask: {{file: {toy.delta}USE}}}}]\n"
    for number, (use, code) in enumerate((("", 2), (", on: delta", 0), (", on: weights", 0))):
        (tmp_path / "r.yml").write_text("merge_method: masked\n" + models.replace("USE", use))
        with pytest.raises(SystemExit) as stop:
            main(["build", str(tmp_path / "r.yml"), "-o", str(tmp_path / str(number))])
        assert (stop.value.code or 0) == code
        assert ("write on: delta" in capsys.readouterr().err) == (code == 2)
    apply_mask(toy.delta, toy.tuned, tmp_path / "applied")
    built, applied = tensors(tmp_path / "1"), tensors(tmp_path / "applied")
    assert all(torch.equal(built[n], applied[n]) for n in applied)
