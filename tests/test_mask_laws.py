"""Laws of the algebra, on random masks of awkward sizes: what each operation promises, whatever the bits."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftmerge.combine import OPERATIONS, combine
from mftmerge.cut import drop_count
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, MaskInfo

Bools = dict[str, npt.NDArray[np.bool_]]
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
SIZES = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 127, 200, 1000])


@st.composite
def groups(draw: st.DrawFn, least: int = 1, most: int = 6, cover: bool = False) -> list[Bools]:
    """Some masks over the same two tensors, with cover=True each leaving some out."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(SIZES), draw(SIZES)
    masks: list[Bools] = []
    for _ in range(draw(st.integers(least, most))):
        density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
        one: Bools = {"a": rng.random(sizes[0]) < density, "b.c": (rng.random(sizes[1]) < density).reshape(1, -1)}
        if cover and rng.random() < 0.5:
            one.pop("a")
        masks.append(one)
    return masks


def made(groups: list[Bools]) -> list[Mask]:
    return [Mask.from_bools(g) for g in groups]


def same(a: Mask, b: Mask) -> None:
    assert a.names == b.names
    for name in a.names:
        np.testing.assert_array_equal(a.kept(name), b.kept(name))
        assert a.digest == b.digest


def same_as(mask: Mask, expected: dict[str, Any]) -> None:
    assert set(mask.names) == set(expected)
    for name in mask.names:
        np.testing.assert_array_equal(mask.kept(name), expected[name])


@given(groups())
def test_operations_mean_what_numpy_says(some: list[Bools]) -> None:
    stacked = {n: np.stack([g[n] for g in some]) for n in some[0]}
    masks, n = made(some), len(some)
    same_as(combine("union", masks), {k: v.any(0) for k, v in stacked.items()})
    same_as(combine("intersection", masks), {k: v.all(0) for k, v in stacked.items()})
    same_as(combine("vote", masks), {k: 2 * v.sum(0) >= n for k, v in stacked.items()})
    same_as(combine("xor", masks), {k: v.sum(0) % 2 == 1 for k, v in stacked.items()})
    same_as(combine("difference", masks), {k: v[0] & ~v[1:].any(0) for k, v in stacked.items()})
    same_as(combine("complement", masks[:1]), {k: ~v[0] for k, v in stacked.items()})
    for k in range(1, n + 1):
        same_as(combine("vote", masks, threshold=k), {name: v.sum(0) >= k for name, v in stacked.items()})


@given(groups(least=2))
def test_de_morgan(some: list[Bools]) -> None:
    masks = made(some)
    opposites = [combine("complement", [m]) for m in masks]
    same(combine("complement", [combine("union", masks)]), combine("intersection", opposites))
    same(combine("complement", [combine("intersection", masks)]), combine("union", opposites))


@given(groups())
def test_idempotence_and_inverses(some: list[Bools]) -> None:
    mask = made(some)[0]
    for op in ("union", "intersection", "vote"):
        same(combine(op, [mask, mask, mask]), mask)
        same(combine(op, [mask]), mask)
    same(combine("complement", [combine("complement", [mask])]), mask)
    same(combine("xor", [combine("xor", [mask, made(some)[-1]]), made(some)[-1]]), mask)
    assert all(combine("difference", [mask, mask]).count(n) == 0 for n in mask.names)


@given(groups())
def test_vote_of_one_is_union_and_of_all_is_intersection(some: list[Bools]) -> None:
    masks = made(some)
    same(combine("vote", masks, threshold=1), combine("union", masks))
    same(combine("vote", masks, threshold=len(masks)), combine("intersection", masks))
    same(combine("vote", masks, threshold=1.0), combine("intersection", masks))


@given(groups(), st.sampled_from([1, 0.1, 2.5, 7]), st.data())
def test_equal_weights_are_no_weights(some: list[Bools], weight: float, data: st.DataObject) -> None:
    masks = made(some)
    threshold = data.draw(st.sampled_from([None, 0.3, 0.5, 1.0, *range(1, len(masks) + 1)]))
    weighted = combine("vote", masks, threshold=threshold, weights=[weight] * len(masks))
    same(weighted, combine("vote", masks, threshold=threshold))


@given(groups(most=15), st.data())
@settings(max_examples=60)
def test_weighted_vote_is_exact(some: list[Bools], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.decimals("0.01", "9", places=2), min_size=len(some), max_size=len(some)))
    share = data.draw(st.sampled_from(["0.5", "0.25", "0.9", "1.0"]))
    exact = [Fraction(w) for w in weights]
    needed = Fraction(share) * sum(exact)
    result = combine("vote", made(some), threshold=share, weights=[float(w) for w in weights])
    for name in result.names:
        votes = [sum((w for w, kept in zip(exact, column, strict=True) if kept), Fraction(0))
                 for column in zip(*(g[name].reshape(-1) for g in some), strict=True)]  # fmt: skip
        assert result.kept(name).reshape(-1).tolist() == [v >= needed for v in votes]


@given(groups(least=2, cover=True))
def test_who_does_not_cover_abstains_or_keeps(some: list[Bools]) -> None:
    masks = made(some)
    covering = [g for g in some if "a" in g]
    shape = covering[0]["a"].shape if covering else None
    for op in ("union", "intersection", "vote"):
        result = combine(op, masks)
        assert ("a" in result) == bool(covering)
        if covering:
            same_as(combine(op, [Mask.from_bools({"a": g["a"]}) for g in covering]), {"a": result.kept("a")})
            filled = [g if "a" in g else g | {"a": np.ones(shape, np.bool_)} for g in some]
            same(combine(op, masks, uncovered="keep"), combine(op, made(filled)))


@given(groups(), st.decimals("0.01", "1", places=3).map(str), st.sampled_from(sorted(set(OPERATIONS) - {"score"})))
def test_projection_hits_the_exact_count(some: list[Bools], density: str, op: str) -> None:
    masks = made(some)[: 1 if op == "complement" else None]
    plain, cut = combine(op, masks), combine(op, masks, density=density)
    for name in cut.names:
        size = cut.size(name)
        assert cut.count(name) == size - int((1 - Fraction(density)) * size)
        # Nested: a projection only adds to the result, or only takes from it.
        a, b = plain.kept(name), cut.kept(name)
        assert not (a & ~b).any() or not (b & ~a).any()


@given(groups(least=2), st.sampled_from(["0.1", "0.5", "0.9"]), st.booleans(), st.integers(0, 2**32 - 1))
def test_projection_is_the_sort_by_vote_then_score_then_index(
    some: list[Bools], density: str, scored: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = [
        {n: rng.integers(-2, 3, v.shape).astype(np.float32) for n, v in g.items()} if scored else None for g in some
    ]
    masks = [Mask.from_bools(g, scores=s) for g, s in zip(some, scores, strict=True)]
    plain, cut = combine("vote", masks), combine("vote", masks, density=density)
    for name in cut.names:
        votes = np.stack([g[name].reshape(-1) for g in some]).sum(0)
        total = np.sum([s[name].reshape(-1) for s in scores if s], axis=0) if scored else np.zeros(votes.shape)
        order = np.lexsort((np.arange(votes.size), total, votes, plain.kept(name).reshape(-1)))
        expected = np.zeros(votes.size, np.bool_)
        expected[order[drop_count(votes.size, density) :]] = True
        np.testing.assert_array_equal(cut.kept(name).reshape(-1), expected)


@given(st.integers(0, 10**12), st.decimals("0.0001", "1", places=4))
def test_the_number_dropped_is_exact_and_wipes_nothing(size: int, keep: Any) -> None:
    dropped = drop_count(size, str(keep))
    assert dropped == int((1 - Fraction(keep)) * size)
    assert dropped == drop_count(size, float(keep))
    assert dropped < size or size == 0


def test_several_densities_go_from_the_first_covered_layer_to_the_last() -> None:
    """Where there are as many as layers each has its own, exactly; between fewer there are straight lines."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.w" for i in (3, 4, 7)]  # covered layers count, not their numbers
    masks = [Mask.from_bools({n: rng.random((40, 25)) < 0.9 for n in [*names, "head"]}) for _ in range(2)]
    for density in ("0.95,0.5,0.9", [0.95, 0.5, 0.9], (0.95, 0.5, 0.9)):
        found = combine("vote", masks, density=density)
        assert [found.count(n) for n in names] == [950, 500, 900]
        assert found.count("head") == 784, "the mean of the shares; 0.7833 of 1000 drops 216"
        for name, one in zip(names, ("0.95", "0.5", "0.9"), strict=True):
            np.testing.assert_array_equal(found.kept(name), combine("vote", masks, density=one).kept(name))
    assert found.info.keep is None
    assert found.info.options["density"] == [0.95, 0.5, 0.9]
    found = combine("vote", masks, density="0.9,0.7")
    assert [found.count(n) for n in names] == [900, 800, 700]


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ("0.9,", "density '' is not a number"),
        ("0.9,1.2", "density 1.2 is out of range"),
        ([], "density has no value"),
        ("0.9,0.8,0.7", "3 shares for 2 covered layers"),
    ],
)
def test_wrong_lists_of_densities_are_refused(density: Any, message: str) -> None:
    mask = Mask.from_bools({f"layers.{i}.w": np.ones(8, np.bool_) for i in range(2)})
    with pytest.raises(BadInput, match=message):
        combine("union", [mask], density=density)


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, "x", float("nan"), "1/0", None])
def test_densities_out_of_range_are_refused(keep: Any) -> None:
    with pytest.raises(BadInput, match="density"):
        drop_count(10, keep)


def scored(rng: np.random.Generator, initial: bool, digest: str = "same", size: int = 301) -> tuple[Mask, Any, Any]:
    before = np.random.default_rng(7).standard_normal(size).astype(np.float32)
    after = before + rng.standard_normal(size).astype(np.float32)
    info = MaskInfo(keep=0.9, training={"init_digest": digest, "selection": "signed"})
    kept = {"w": np.ones(size, np.bool_)}
    return Mask.from_bools(kept, info, {"w": after}, {"w": before} if initial else None), before, after


def test_score_adds_evidence_and_cuts_once() -> None:
    rng = np.random.default_rng(0)
    made = [scored(rng, True) for _ in range(3)]
    result = combine("score", [m for m, _, _ in made], weights=[1, 0.5, -0.25], density="0.9")
    start = made[0][1].astype(np.float64)
    total = start + sum(w * (a - start) for w, (_, _, a) in zip([1, 0.5, -0.25], made, strict=True))
    expected = np.argsort(total.astype(np.float32), kind="stable")[30:]
    assert sorted(np.flatnonzero(result.kept("w"))) == sorted(expected)


def test_score_of_several_masks_drops_seven_tenths_of_what_one_drops() -> None:
    rng = np.random.default_rng(0)
    masks = [scored(rng, True, size=1000)[0] for _ in range(3)]
    for count in (2, 3):
        result = combine("score", masks[:count])
        assert result.count("w") == 930
        assert result.info.keep == result.info.options["density"] == 0.93
    assert combine("score", masks[:1]).count("w") == 900
    other = Mask.from_bools({"v": np.ones(100, np.bool_)}, masks[0].info, {"v": rng.standard_normal(100, np.float32)})
    apart = combine("score", [masks[0], other])
    assert (apart.count("w"), apart.count("v")) == (900, 90)


def test_elected_evidence_has_the_sign_of_the_sum() -> None:
    before = np.zeros(8, np.float32)
    first = np.float32([3, -3, 1, 1, 0, 2, -5, 4])
    second = np.float32([-1, 1, 2, -4, 0, 0, -1, -4])  # opposed twice, agreed, outvoted, none, one, agreed, even
    info = MaskInfo(keep=0.5, training={"init_digest": "same", "selection": "signed"})
    masks = [Mask.from_bools({"w": np.ones(8, np.bool_)}, info, {"w": s}, {"w": before}) for s in (first, second)]
    expected = [3, -3, 3, -4, 0, 2, -6, 0]
    options = {"density": "0.5", "elect": True}
    assert combine("score", masks, **options).kept("w").tolist() == [True, False, True, False, False, True, False, True]
    scores = [first, second], [before, before]
    np.testing.assert_array_equal(OPERATIONS["score"].function(*scores, elect=True), expected)
    np.testing.assert_array_equal(OPERATIONS["score"].function(*scores), first + second)
    doubled = OPERATIONS["score"].function(*scores, weights=[1, 4], elect=True)
    np.testing.assert_array_equal(doubled, [-4, 4, 9, -16, 0, 2, -9, -16])
    with pytest.raises(BadInput, match="before training"):
        combine("score", [scored(np.random.default_rng(0), False)[0]] * 2, elect=True)


def test_score_without_initial_scores_scales_the_weights_to_one() -> None:
    rng = np.random.default_rng(0)
    made = [scored(rng, False) for _ in range(2)]
    result = combine("score", [m for m, _, _ in made], weights=[3, 1], density=0.5)
    mean = 0.75 * made[0][2].astype(np.float64) + 0.25 * made[1][2]
    assert sorted(np.flatnonzero(result.kept("w"))) == sorted(np.argsort(mean.astype(np.float32))[150:])


def test_score_of_one_mask_is_that_mask() -> None:
    rng = np.random.default_rng(0)
    after = rng.standard_normal((30, 11)).astype(np.float32)
    for rule, key in (("signed", after), ("abs", np.abs(after))):
        kept = np.ones(330, np.bool_)
        kept[np.argsort(key.reshape(-1), kind="stable")[:33]] = False
        info = MaskInfo(keep=0.9, training={"selection": rule})
        mask = Mask.from_bools({"w": kept.reshape(30, 11)}, info, {"w": after})
        same(combine("score", [mask]), mask)


def test_score_refuses_what_it_cannot_add() -> None:
    rng = np.random.default_rng(0)
    a, b = scored(rng, False)[0], scored(rng, False, "other")[0]
    with pytest.raises(BadInput, match="different scores"):
        combine("score", [a, b])
    combine("score", [a, b], allow_different_init=True)
    with pytest.raises(BadInput, match="no scores"):
        combine("score", [a, Mask.from_bools({"w": np.ones(301, np.bool_)})])
    with pytest.raises(BadInput, match="sum to 0"):
        combine("score", [a, a], weights=[1, -1])
    broken = Mask.from_bools({"w": np.ones(3, np.bool_)}, MaskInfo(keep=0.5), {"w": np.float32([1, np.nan, 2])})
    with pytest.raises(BadInput, match="NaN"):
        combine("score", [broken])


def test_masks_over_different_layers_share_a_start_where_they_overlap() -> None:
    """Their digests of all initial scores differ, but the seed says that those of a common tensor do not."""
    rng = np.random.default_rng(0)
    masks = []
    for other in ("x", "y"):
        info = MaskInfo(keep=0.5, training={"init": "normal", "seed": 3, "init_digest": other, "selection": "abs"})
        kept = {n: rng.random(64) < 0.5 for n in ("shared", other)}
        masks.append(Mask.from_bools(kept, info, {n: rng.standard_normal(64).astype(np.float32) for n in kept}))
    assert combine("score", masks).names == ("shared", "x", "y")


@pytest.mark.parametrize(
    ("op", "count", "options", "word"),
    [
        ("vot", 2, {}, "unknown operation"),
        ("vote", 2, {"threshold": 0}, "threshold 0"),
        ("vote", 2, {"threshold": 3}, "above the number of masks"),
        ("vote", 2, {"threshold": 1.5}, "threshold 1.5"),
        ("vote", 2, {"threshold": "nan"}, "threshold"),
        ("vote", 2, {"weights": [1]}, "1 weights for 2 masks"),
        ("vote", 2, {"weights": [1, 0]}, "above 0"),
        ("vote", 2, {"weights": [1, float("inf")]}, "finite"),
        ("union", 2, {"threshold": 1}, "no option 'threshold'"),
        ("union", 0, {}, "at least 1"),
        ("complement", 2, {}, "takes 1 mask"),
        ("union", 2, {"density": 0}, "density"),
        ("union", 2, {"uncovered": "x"}, "abstain"),
        ("score", 2, {"uncovered": "keep"}, "abstain"),
    ],
)
def test_bad_arguments_are_refused(op: str, count: int, options: dict[str, Any], word: str) -> None:
    mask = Mask.from_bools({"w": np.ones(9, np.bool_)})
    with pytest.raises(BadInput, match=word):
        combine(op, [mask] * count, **options)


def test_masks_of_different_shapes_are_refused() -> None:
    masks = [Mask.from_bools({"w": np.ones(n, np.bool_)}) for n in (8, 9)]
    with pytest.raises(BadInput, match=r"'w' has shape \(9,\)"):
        combine("union", masks)


def test_every_registered_operation_is_documented() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    for name, operation in OPERATIONS.items():
        assert f"`{name}`" in page
        assert operation.summary.endswith(".")
        assert all(f"{option.replace('_', '-')}" in page for option in operation.options)


def test_every_option_of_an_operation_is_on_the_command_line() -> None:
    import inspect

    from mftmerge.cli.combine import command

    options = {option for operation in OPERATIONS.values() for option in operation.options}
    assert options <= set(inspect.signature(command).parameters)
