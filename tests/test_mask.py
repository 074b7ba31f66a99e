"""`Mask` as a Python object: shown, counted, compared, combined by operators, copied."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

from mftmerge import combine_files, combine_masks
from mftmerge.cli import main
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")


def random_mask(seed: int, names: tuple[str, ...] = NAMES, **info: object) -> Mask:
    rng = np.random.default_rng(seed)
    kept = {n: rng.random((5, 7)) < 0.8 for n in names}
    scores = {n: rng.standard_normal((5, 7)).astype(np.float32) for n in names}
    return Mask.from_bools(kept, MaskInfo(base="a/base", fingerprints=dict.fromkeys(names, "x"), **info), scores)  # type: ignore[arg-type]


def test_a_mask_is_a_collection_of_its_tensors(tmp_path: Path) -> None:
    mask = random_mask(1)
    assert (len(mask), list(mask), NAMES[0] in mask) == (3, sorted(NAMES), True)
    np.testing.assert_array_equal(mask[NAMES[0]], mask.kept(NAMES[0]))
    with pytest.raises(KeyError):
        mask["nothing"]
    assert Mask.from_bools({})
    mask.save(tmp_path / "x.mask")
    loaded = Mask.load(tmp_path / "x.mask")
    assert loaded == mask
    assert hash(loaded) == hash(mask)
    assert mask != random_mask(2)
    assert mask != "mask"


def test_it_shows_density_and_base() -> None:
    mask = random_mask(1)
    assert repr(mask) == f"Mask(3 tensors, 105 weights, density {mask.density():.4f}, base 'a/base')"
    assert "on the delta from 'pre'" in repr(random_mask(1, on="delta", delta_base="pre"))
    html = Mask.from_bools({"<b>.weight": np.ones(3, np.bool_)}, MaskInfo(base="<script>"))._repr_html_()
    assert "<b>.weight" not in html
    assert "<script>" not in html
    assert "mlp.up_proj" in mask._repr_html_()


def test_operators_are_the_operations() -> None:
    """Bits, coverage, bases and family as `combine` gives them, also where only one covers a tensor."""
    a, b = random_mask(1), random_mask(2, (*NAMES[:2], "model.extra.weight"))
    for made, operation in ((a & b, "intersection"), (a | b, "union"), (a ^ b, "xor")):
        expected = combine_masks(operation, [a, b])
        assert made == expected
        assert made.info == expected.info
    assert ~a == combine_masks("complement", [a])
    assert (~a).info == combine_masks("complement", [a]).info
    assert ~~a == a
    with pytest.raises(TypeError):
        a & 1  # type: ignore[operator]
    with pytest.raises(BadInput, match="shape"):
        a | Mask.from_bools({NAMES[0]: np.ones((7, 5), np.bool_)})
    with pytest.raises(BadInput, match="do not combine"):
        a | random_mask(2, on="delta")


def test_paths_and_masks_combine(tmp_path: Path) -> None:
    a, b = random_mask(1), random_mask(2)
    a.save(tmp_path / "a.mask")
    assert combine_masks("union", [tmp_path / "a.mask", b]) == (a | b)
    combine_files("union", [a, tmp_path / "a.mask", b], tmp_path / "out.mask")
    assert Mask.load(tmp_path / "out.mask") == (a | b)


def test_what_a_file_says_is_printed_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "x\x1b]0;title\x07\x1b[2J\rdensity 1.0000"
    names = ("model.layers.0.[/x][link=y]a.weight", f"model.layers.1.{evil}.weight")
    paths = [tmp_path / "code[v2].mask", tmp_path / "b.mask"]
    for seed, path in enumerate(paths):
        random_mask(seed, names, training={evil: evil}, delta_base=evil).save(path)
    combine_files("union", paths, tmp_path / "c.mask", names=[evil, evil])
    commands = (["inspect", paths[0]], ["inspect", tmp_path / "c.mask"], ["compare", *paths])
    for command in (*commands, ["combine", *paths, "-o", tmp_path / "d.mask"]):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in command])
        assert not stop.value.code
        shown = capsys.readouterr().out
        assert not {"\x1b", "\r", "\x07"} & set(shown)
        assert command[0] != "compare" or "code[v2].mask" in shown


@pytest.mark.parametrize("archive", [False, True])
def test_copies_hold_the_bits(tmp_path: Path, archive: bool) -> None:
    mask, path = random_mask(1), tmp_path / "x.mask"
    mask.save(path, archive=archive)
    loaded = Mask.load(path)
    copies = [copy.deepcopy(loaded), copy.copy(loaded), pickle.loads(pickle.dumps(loaded)), copy.deepcopy(mask)]
    path.unlink()
    for other in copies:
        assert other == mask
        assert other.info == mask.info
        np.testing.assert_array_equal(other.scores(NAMES[0]), mask.scores(NAMES[0]))


def test_inspecting_and_drawing(tmp_path: Path) -> None:
    mask = random_mask(1)
    mask.save(tmp_path / "x.mask")
    for one in (mask, Mask.load(tmp_path / "x.mask")):
        found = one.inspect()
        assert found.total.density == mask.density()
        assert found.scores == "embedded"
    strange = Mask.from_bools({"model.layers.0.$x^{$.weight": np.eye(8, dtype=np.bool_)})
    strange.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
