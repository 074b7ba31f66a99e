"""docs/extending.md as it stands: its modules, as an installed plug-in, work in commands, recipes and Python."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_kitchen import make_kitchen, values

import mftmerge
from mftmerge import plugins
from mftmerge.cli.main import main
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.evaluate import candidates
from mftmerge.mask import Mask
from mftmerge.operations import OPERATIONS
from mftmerge.recipe.catalogue import ABOUT, METHODS
from mftmerge.recipe.schema import MaskExpression

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with three masks, where modules are found; what is registered there is forgotten afterwards."""
    random = np.random.default_rng(0)
    for name in "abc":
        Mask.from_bools({"w": random.random((40, 50)) < 0.5, "v": random.random(7) < 0.5}).save(
            tmp_path / f"{name}.mask"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from mergekit.merge_methods import registry as mergekits

    registries = OPERATIONS, METHODS, ABOUT, mergekits._METHODS
    before, modules = [dict(r) for r in registries], set(sys.modules)
    plugins.load.cache_clear()
    yield tmp_path
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)  # type: ignore[arg-type]
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    plugins.load.cache_clear()


def install(place: Path) -> None:
    """The page's two modules as an installed package would have them."""
    for block in blocks("python"):
        if found := re.match(r"# (\w+\.py)\n", block):
            assert sum(bool(line.strip()) for line in block.splitlines()) <= 20
            (place / found[1]).write_text(block)
    (toml,) = blocks("toml")
    points = toml.split('"mftmerge.plugins"]\n')[1].replace('"', "")
    (place / "my_masks-1.0.dist-info").mkdir()
    (place / "my_masks-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my-masks\nVersion: 1.0\n")
    (place / "my_masks-1.0.dist-info/entry_points.txt").write_text(f"[mftmerge.plugins]\n{points}")


def command(line: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line, comments=True)[1:])
    return stopped.value.code  # type: ignore[return-value]


def test_the_operation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(place)
    masks = [Mask.load(place / f"{n}.mask") for n in "abc"]
    a, b, c = (m.kept("w") for m in masks)
    expected = np.where(b == c, b, a)  # two others of one mind overrule the first
    (line,) = (line for block in blocks("sh") for line in block.splitlines() if "combine" in line)
    assert command(line) == 0
    assert "overruled, least 2" in capsys.readouterr().out
    made = Mask.load(place / "d.mask")
    assert np.array_equal(made.kept("w"), expected)
    assert made.info.operation == "overruled"
    assert made.info.options == {"least": 2}

    (place / "d.mask").unlink()
    (program,) = (b for b in blocks("python") if "combine_files" in b)
    exec(compile(program, "extending.md", "exec"), {})
    assert Mask.load(place / "d.mask").digest == made.digest

    # as scripts and recipes for version 0.1.0 give an option of a plug-in
    assert command("mftmerge combine a.mask b.mask c.mask --op overruled --set least=2 -o e.mask") == 0
    assert Mask.load(place / "e.mask").info == made.info
    old = MaskExpression.model_validate({"op": "overruled", "of": ["a.mask"], "set": {"least": 2}})
    assert old == MaskExpression.model_validate({"op": "overruled", "of": ["a.mask"], "least": 2})

    cut = mftmerge.combine_masks("overruled", masks, density=0.5)
    assert cut.kept("w").sum() == 1000
    with pytest.raises(BadInput, match="no option 'most'"):
        mftmerge.combine_masks("overruled", masks, most=1)


def test_a_file_s_operation_is_an_option_a_preset_and_a_candidate(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--plugin` alone: nothing else names the operation or its option."""
    install(place)
    assert command("mftmerge --plugin my_masks.py combine --help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--least N How many others there must be (overruled) [1]." in said
    assert "score, overruled [vote]" in said
    masks = {n: Mask.load(place / f"{n}.mask") for n in "abc"}
    assert "overruled@0.5" in [c.text[:13] for c in candidates.defaults(masks)[0]]
    candidate = candidates.Candidate.parse("overruled@0.4,least=2")
    line = candidate.command(["a.mask", "b.mask", "c.mask"], "tried.mask")
    assert command(f"{line} --plugin my_masks.py") == 0
    made = candidate.combine(list(masks.values()), ["a.mask", "b.mask", "c.mask"])
    assert Mask.load(place / "tried.mask").info == made.info
    assert made.info.options == {"least": 2, "density": 0.4}
    assert command("mftmerge combine a.mask b.mask --op union --least 2 --plugin my_masks.py -o u.mask") == 2
    assert "union has no option 'least'" in capsys.readouterr().err


def test_an_option_needs_a_type_and_a_name_of_its_own(place: Path) -> None:
    with pytest.raises(BadInput, match="option 'least' needs a type"):

        @mftmerge.operation()
        def one(masks: list[np.ndarray], *, least=1) -> np.ndarray:  # type: ignore[no-untyped-def]
            return masks[0]

    with pytest.raises(BadInput, match="cannot be called 'density'"):

        @mftmerge.operation()
        def two(masks: list[np.ndarray], *, density: float = 1) -> np.ndarray:
            return masks[0]

    with pytest.raises(BadInput, match="vote has an option 'threshold' of another type"):

        @mftmerge.operation()
        def three(masks: list[np.ndarray], *, threshold: bool = False) -> np.ndarray:
            return masks[0]

    with pytest.raises(BadInput, match="the type of an option is not understood"):

        @mftmerge.operation()
        def four(masks: list[np.ndarray], *, unheard: Unheard = None) -> np.ndarray:  # type: ignore[name-defined]  # noqa: F821
            return masks[0]


@pytest.mark.slow
def test_the_merge_method(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(place)
    kitchen = make_kitchen(place / "kitchen", dtype="float32")
    (recipe,) = (b for b in blocks("yaml") if "merge_method" in b)
    text = recipe.replace("models/", f"{kitchen}/models/").replace("math.mask", f"{kitchen}/masks/math.mask")
    (place / "recipe.yml").write_text(text)
    for line in next(b for b in blocks("sh") if "build" in b).splitlines():
        assert command(line) == 0, capsys.readouterr().err
    built = values(place / "merged")
    base, math, code = (values(kitchen / "models" / n) for n in ("base", "math", "code"))
    mask = Mask.load(kitchen / "masks/math.mask")
    name, last = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    layers = 1 + max(int(n.split(".")[2]) for n in built if n.startswith("model.layers."))
    for tensor, share in ((name, 0.4), (last, 0.4 + 0.4 / (layers - 1))):
        kept = mask.kept(tensor) if tensor in mask else True
        changes = [np.where(kept, math[tensor] - base[tensor], 0), share * (code[tensor] - base[tensor])]
        strongest = np.where(np.abs(changes[1]) > np.abs(changes[0]), changes[1], changes[0])
        np.testing.assert_allclose(built[tensor], base[tensor] + 0.9 * strongest, atol=1e-6, err_msg=tensor)

    capsys.readouterr()
    (place / "recipe.yml").write_text((place / "recipe.yml").read_text().replace("scale:", "scala:"))
    assert command("mftmerge build recipe.yml -o never") == 2
    assert "has no parameter 'scala'; did you mean 'scale'?" in capsys.readouterr().err


def test_an_operation_in_a_recipe(place: Path) -> None:
    install(place)
    kitchen = make_kitchen(place / "kitchen", dtype="float32")
    (line,) = (b for b in blocks("yaml") if "overruled" in b)
    for old, new in (("a", "math"), ("b", "code"), ("c", "instruct")):
        line = line.replace(f"{old}.mask", f"{kitchen}/masks/{new}.mask")
    model = kitchen / "models/base"
    (place / "r.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n{line}")
    mftmerge.build_recipe(place / "r.yml", place / "out")
    masks = [Mask.load(kitchen / f"masks/{n}.mask") for n in ("math", "code", "instruct")]
    expected, built = mftmerge.combine_masks("overruled", masks, least=2), values(place / "out")
    for name in expected.names:
        assert not built[name][~expected.kept(name)].any()
    (place / "r.yml").write_text((place / "r.yml").read_text().replace("least", "leest"))
    with pytest.raises(BadInput, match=r"unknown key 'leest' at mask; did you mean 'least'"):
        mftmerge.build_recipe(place / "r.yml", place / "out2")


def test_names_are_not_taken_twice(place: Path) -> None:
    with pytest.raises(BadInput, match="operation 'union' exists already"):

        @mftmerge.operation()
        def union(masks: list[np.ndarray]) -> np.ndarray:
            return masks[0]

    with pytest.raises(BadInput, match="merge method 'linear' exists already"):

        @mftmerge.merge_method()
        def linear(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
            return base

    with pytest.raises(BadInput, match="parameter 'table' must be float"):

        @mftmerge.merge_method()
        def new(base: torch.Tensor, models: list[torch.Tensor], *, table: dict[str, int]) -> torch.Tensor:
            return base


def test_a_broken_plug_in_is_named_in_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(place)
    (place / "my_masks.py").write_text("raise RuntimeError('no\\nluck')\n")
    assert command("mftmerge combine a.mask b.mask --op overruled -o d.mask") == 2
    assert capsys.readouterr().err == (
        "mftmerge: error: plug-in my-masks (my_masks) fails: no luck; mend or uninstall it\n"
    )
    assert command("mftmerge combine a.mask b.mask --op union -o d.mask --json") == 0  # a name that is known
    assert json.loads(capsys.readouterr().out)["operation"] == "union"


def test_a_method_that_gives_another_shape_fails(place: Path) -> None:
    kitchen = make_kitchen(place / "kitchen", dtype="float32")

    @mftmerge.merge_method()
    def first_row(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
        return models[0][:1]

    models = ", ".join(f"{{model: {kitchen}/models/{n}}}" for n in ("math", "code"))
    (place / "r.yml").write_text(f"merge_method: first_row\nbase_model: {kitchen}/models/base\nmodels: [{models}]\n")
    with pytest.raises(MftmergeError, match="merge method first_row gave"):
        mftmerge.build_recipe(place / "r.yml", place / "out")
    assert not (place / "out").exists()
