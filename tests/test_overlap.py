"""Overlaps against their baselines, pictures of them, and masks derived from checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mftmerge import plots
from mftmerge.checkpoint import Checkpoint
from mftmerge.cut import drop_count, keep_top
from mftmerge.derive import DiffSettings, diff_mask
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo
from mftmerge.overlap import compare, picture, untrained

NAME = "model.layers.{}.mlp.up_proj.weight"


def masks_from_one_start(noise: float, initial: bool = True) -> list[Mask]:
    rng = np.random.default_rng(0)
    before = {NAME.format(i): rng.standard_normal((64, 80)).astype(np.float32) for i in range(2)}
    made = []
    for _ in range(2):
        after = {n: v + np.float32(noise) * rng.standard_normal(v.shape).astype(np.float32) for n, v in before.items()}
        kept = {n: keep_top(v, 512) for n, v in after.items()}
        made.append(Mask.from_bools(kept, MaskInfo(0.9), after, before if initial else None))
    return made


def test_overlap_is_what_sets_say() -> None:
    a, b = masks_from_one_start(0.3)
    found = compare([a, b], ["a", "b"]).pairs[0]
    pruned = [np.concatenate([~m.kept(n).reshape(-1) for n in m.names]) for m in (a, b)]
    assert found.total.jaccard == (pruned[0] & pruned[1]).sum() / (pruned[0] | pruned[1]).sum()
    assert found.total.agreement == pytest.approx((pruned[0] == pruned[1]).mean())
    assert found.total.jaccard_independent == pytest.approx(0.0526, abs=1e-4)
    assert found.total.agreement_independent == pytest.approx(0.82)
    first = ~a.kept(a.names[0]) & ~b.kept(a.names[0])
    assert found.by_layer[0].both == first.sum()


def test_masks_from_a_common_start() -> None:
    """Random changes overlap about as much as the baseline says, and much more than independence says."""
    a, b = masks_from_one_start(0.05)
    found = compare([a, b], ["a", "b"])
    pair = found.pairs[0]
    assert pair.start is not None
    assert pair.start.jaccard == 1
    assert pair.total.jaccard > 0.6
    assert pair.total.jaccard_from_start == pytest.approx(pair.total.jaccard, abs=0.15)
    assert found.moved["a"].jaccard == pytest.approx(0.85, abs=0.1)
    without = compare(masks_from_one_start(0.05, initial=False), ["a", "b"])
    assert without.pairs[0].total.jaccard_from_start is None
    assert without.moved == {}


def test_the_untrained_mask_of_a_seed_is_drawn_again() -> None:
    """As the trainer draws it; a digest of other scores is not believed."""
    from mftmerge.seeded import normal_scores
    from mftmerge.train.scores import digest as digest_of

    name = NAME.format(0)
    drawn = {name: normal_scores(name, (32, 50), 5)}
    kept = {name: keep_top(np.abs(drawn[name].numpy()), 160)}
    for digest, known in ((digest_of(drawn), True), ("0" * 32, False)):
        info = MaskInfo(0.9, training={"init": "normal", "seed": 5, "selection": "abs", "init_digest": digest})
        mask = Mask.from_bools(kept, info)
        begun = untrained(mask)
        assert (begun is not None) == known
        if begun is not None:
            assert begun.digest == mask.digest


def test_the_untrained_mask_of_magnitudes_comes_from_the_base(tiny: Any) -> None:
    base = Checkpoint.open(tiny())
    name = next(n for n in base.names if "up_proj" in n)
    weight = np.abs(base.read_float32(name))
    kept = {name: keep_top(weight, drop_count(weight.size, 0.9))}
    assert kept[name].sum() == weight.size - weight.size // 10
    assert weight[~kept[name]].max() <= weight[kept[name]].min()
    info = MaskInfo(0.9, str(tiny()), {name: base.fingerprint(name)}, {"init": "magnitude"})
    begun = untrained(Mask.from_bools(kept, info))
    assert begun is not None
    assert begun.digest == Mask.from_bools(kept).digest
    other = MaskInfo(0.9, str(tiny()), {name: "0" * 32}, {"init": "magnitude"})
    assert untrained(Mask.from_bools(kept, other)) is None


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mftmerge.cli import main

    paths = [tmp_path / f"{n}.mask" for n in "ab"]
    for mask, path in zip(masks_from_one_start(0.1), paths, strict=True):
        mask.save(path)
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, paths), "--json", "--plot", str(tmp_path / "overlap.svg")])
    assert not stop.value.code
    shown = json.loads(capsys.readouterr().out)
    assert shown["pairs"][0]["jaccard"] > shown["pairs"][0]["jaccard_independent"]
    assert set(shown["pairs"][0]["by_layer"]) == {"0", "1"}
    assert "<svg" in (tmp_path / "overlap.svg").read_text()[:1000]
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(paths[0])])
    assert stop.value.code == 2


def test_masks_without_common_tensors_and_full_masks(tmp_path: Path) -> None:
    full = Mask.from_bools({"a": np.ones(8, np.bool_)})
    found = compare([full, Mask.from_bools({"b": np.ones(8, np.bool_)}), full], list("xyz"))
    assert [p.tensors for p in found.pairs] == [0, 1, 0]
    assert found.pairs[1].total.jaccard == 1
    plots.save(picture(found), tmp_path / "x.png")
    with pytest.raises(BadInput, match="shape"):
        compare([full, Mask.from_bools({"a": np.ones(9, np.bool_)})], list("xy"))


def differences(tiny: Any) -> tuple[str, list[str], str, np.ndarray, np.ndarray]:
    paths = [str(tiny(seed=seed, dtype="bfloat16")) for seed in range(3)]
    name = "model.layers.1.mlp.down_proj.weight"
    base, *tuned = (Checkpoint.open(p).read_float32(name) for p in paths)
    return paths[0], paths[1:], name, tuned[0] - base, tuned[1] - base


def test_magnitude_of_the_task_vector(tiny: Any) -> None:
    base, tuned, name, tau, _ = differences(tiny)
    mask = diff_mask(base, tuned[0], DiffSettings(keep="0.1", only="down_proj"))
    order = np.argsort(np.abs(tau).reshape(-1), kind="stable")
    expected = np.zeros(tau.size, np.bool_)
    expected[order[drop_count(tau.size, "0.1") :]] = True
    np.testing.assert_array_equal(mask.kept(name).reshape(-1), expected)
    assert mask.info.fingerprints[name] == Checkpoint.open(tuned[0]).fingerprint(name)
    assert all("down_proj" in n for n in mask.names)


def test_tall_and_sign_rules(tiny: Any) -> None:
    base, tuned, name, tau, other = differences(tiny)
    mask = diff_mask(base, tuned[0], DiffSettings("tall", strength=0.6, others=[tuned[1]]))
    np.testing.assert_array_equal(mask.kept(name), np.abs(tau) >= np.float32(0.6) * np.abs(tau + other - tau))
    mask = diff_mask(base, tuned[0], DiffSettings("tall", strength=0.6, merged=tuned[1]))
    np.testing.assert_array_equal(mask.kept(name), np.abs(tau) >= np.float32(0.6) * np.abs(other - tau))
    mask = diff_mask(base, tuned[0], DiffSettings("sign", others=[tuned[1]]))
    np.testing.assert_array_equal(mask.kept(name), (tau != 0) & (np.sign(tau) == np.sign(tau + other)))
    assert 0.5 < mask.density() < 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (DiffSettings(), "keep"),
        (DiffSettings(keep=2), "density 2"),
        (DiffSettings("tall"), "merged or others"),
        (DiffSettings("tall", keep=0.5, others=["x"]), "keep"),
        (DiffSettings("taller"), "choose from"),  # type: ignore[arg-type]
        (DiffSettings("tall", strength=-1, others=["x"]), "strength"),
        (DiffSettings(keep=0.5, only="("), "regular expression"),
        (DiffSettings(keep=0.5, only="nothing"), "only"),
    ],
)
def test_bad_settings_are_refused(tiny: Any, settings: DiffSettings, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        diff_mask(str(tiny(seed=0, dtype="bfloat16")), str(tiny(seed=1, dtype="bfloat16")), settings)


def test_checkpoints_that_do_not_match_are_refused(tiny: Any) -> None:
    with pytest.raises(BadInput, match="no tensor differs"):
        diff_mask(str(tiny()), str(tiny()), DiffSettings(keep=0.5))
    with pytest.raises(BadInput, match="shape"):
        diff_mask(str(tiny()), str(tiny(hidden=32)), DiffSettings(keep=0.5))


def test_diff_mask_does_not_import_torch(tiny: Any, tmp_path: Path) -> None:
    import subprocess

    paths = [str(tiny(seed=s)) for s in range(2)]
    script = (
        "import sys; from mftmerge.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: print(e.code)\n"
    )
    script += "print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "diff-mask", *paths, "--keep", "0.1", "-o", str(tmp_path / "x.mask")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["0", "False"], done.stdout + done.stderr


def test_the_picture_shows_what_training_changed() -> None:
    """Of the dropped weights, those that were kept before; the density is the same everywhere and shows nothing."""
    from mftmerge.overlap import exchanged, learnt_picture

    scores = np.arange(100, dtype=np.float32).reshape(10, 10)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    moved = scores.copy()
    moved[0, :3], moved[0, 3] = 1000, 500  # three of the ten that were lowest; one more only in the picture's noise
    after = {names[0]: moved, names[1]: scores}
    kept = {n: a >= np.sort(a.ravel())[10] for n, a in after.items()}
    info = MaskInfo(0.9, training={"init": "magnitude", "selection": "signed"})
    mask = Mask.from_bools(kept, info, after, dict.fromkeys(names, scores))
    start = untrained(mask)
    assert start is not None
    assert exchanged(mask, start) == {names[0]: 4, names[1]: 0}
    figure = learnt_picture(mask)
    image = figure.axes[1].images[0]
    assert image.get_clim() == (0, 1)
    assert np.allclose(np.asarray(image.get_array()), [[0.4, 0.0]])
    assert "20.0%" in figure.axes[0].get_title()
