"""The documentation says what the program does: generated pages are current, and nothing is without a description."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pydantic import BaseModel

from mftmerge.combine import combine
from mftmerge.mask import Mask, MaskInfo
from mftmerge.operations import OPERATIONS
from mftmerge.recipe.catalogue import ABOUT, METHODS, meaning
from mftmerge.recipe.schema import Strict
from mftmerge.train.settings import TrainSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_as_the_program_declares(generate: ModuleType) -> None:
    for path, text in generate.pages().items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path}: run python docs/generate.py"


def test_every_key_and_setting_has_a_description(generate: ModuleType) -> None:
    parts: set[type[BaseModel]] = {part for part, _ in generate.PARTS}
    assert parts == set(recipe_parts(Strict))
    for part in [*parts, TrainSettings]:
        for name, field in part.model_fields.items():
            assert field.description, f"{part.__name__}.{name}"


def recipe_parts(parent: type[BaseModel]) -> list[type[BaseModel]]:
    return [part for child in parent.__subclasses__() for part in (child, *recipe_parts(child))]


def test_every_merge_method_and_parameter_is_described() -> None:
    assert set(ABOUT) == set(METHODS)
    for name, method in METHODS.items():
        assert all(meaning(name, key) for key in method.parameters)


def table(page: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table of a page with this heading in its first cell: by first cell, the others."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): others for first, *others in cells}


def test_every_operation_and_option_is_in_the_tables() -> None:
    readme, page = table("README.md", "operation"), table("docs/operations.md", "operation")
    assert {name.split()[0] for name in readme} == set(OPERATIONS)
    assert set(page) == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        assert operation.summary, f"{name}: a docstring is its documentation"
        assert {f"`--{option.replace('_', '-')}`" for option in operation.options} == set(
            filter(None, page[name][1].split(", "))
        )


def test_densities_in_the_readme_are_those_of_the_operations() -> None:
    size, random = 1_000_000, np.random.default_rng(0)
    info = MaskInfo(keep=0.9, training={"init": "normal", "selection": "signed", "init_digest": "same"})
    masks = []
    for _ in range(2):
        scores = random.random(size, np.float32)
        masks.append(Mask.from_bools({"w": scores >= np.quantile(scores, 0.1)}, info, {"w": scores}, {"w": 0 * scores}))
    for row, (_, density) in table("README.md", "operation").items():
        name, *options = row.split()
        assert options in ([], ["--density", "0.9"]), row
        found = combine(name, masks[: OPERATIONS[name].most], **({"density": 0.9} if options else {})).density()
        assert f"{found:.2f}" == density, row


PYTHON = {
    p.name: "\n".join(re.findall(r"^```python\n(.*?)^```", p.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


@pytest.mark.parametrize("page", [page for page, code in PYTHON.items() if "mftmerge" in code])
def test_names_of_the_package_in_examples_exist(page: str) -> None:
    """By the modules' text: an example that imports what has moved is found without importing torch."""
    wanted = {
        (module, name.split(" as ")[0].strip())
        for module, names in re.findall(r"^\s*from (mftmerge[\w.]*) import ([\w, ]+)", PYTHON[page], re.MULTILINE)
        for name in names.split(",")
    }
    for module, name in wanted:
        file = source(module)
        assert file, f"{page}: there is no {module}"
        found = re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) or source(f"{module}.{name}")
        assert found, f"{page}: {module} has no {name}"
    for chain in re.findall(r"\bmftmerge((?:\.\w+)+)\(", PYTHON[page]):  # modules, then a name in the last of them
        module = "mftmerge"
        for name in chain[1:].split("."):
            if not source(f"{module}.{name}"):
                file = source(module)
                assert file
                assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{page}: mftmerge{chain}"
                break
            module += f".{name}"


def source(module: str) -> Path | None:
    """The file of a module of the package."""
    place = ROOT.joinpath(*module.split("."))
    return next((f for f in (place / "__init__.py", place.with_suffix(".py")) if f.is_file()), None)


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", text):
        if target.startswith("http"):
            continue
        file = ROOT / "docs" / target if target else ROOT / "docs" / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor[1:] in anchors, f"{target}{anchor}"
