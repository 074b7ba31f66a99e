"""Model cards: foreign front matter is bounded and harmless, foreign metadata is inert text."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from mftmerge import card
from mftmerge.checkpoint import Checkpoint
from mftmerge.combine import combine, combine_files
from mftmerge.mask import Mask, MaskInfo, Parent
from mftmerge.maskstore import DEEPEST_FAMILY
from mftmerge.recipe.build import build

BOMB = (
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9))
    + "tags: [*j]\n"
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "date: 2024-02-30\n",
        "tags: 2024-02-30\n",
        f"tags: {'[' * 5000}{']' * 5000}\n",
        f"x: {'[' * 5000}{']' * 5000}\n",
        "tags: &a [*a]\n",
        "tags: !!python/object/apply:os.system ['true']\n",
        "tags: {a: b}\n",
        "tags: [{a: b}]\n",
        f"tags: [{'x' * 100_000}]\n",
        "tags: ['\\e[2J']\n",
        "tags:\n  - [a\n",
        "tags: &t [a]\nlanguage: [*u]\n",
        "? [a]\n: b\n",
        "\0",
    ],
)
def test_front_matter_that_is_hostile_or_broken_costs_nothing_else(text: str) -> None:
    started = time.perf_counter()
    front, body = card.split_front_matter(f"---\nlicense: mit\n{text}license_name: fine\n---\n# Body\n")
    assert time.perf_counter() - started < 1
    assert front.get("license") == "mit"
    assert front.get("license_name", "fine") == "fine"
    assert body.strip() == "# Body"
    assert all(len(str(v)) < 10_000 for v in front.values())
    made = card.model_card("out", Mask.from_bools({"w": np.ones(3, bool)}), "d" * 32, [], "o/m", f"---\n{text}---\n# B")
    head = yaml.safe_load(made.split("---")[1])
    assert head["base_model"] == ["o/m"]
    assert {"mftmerge", "mask-fine-tuning"} <= set(head["tags"])


def test_ordinary_front_matter_is_kept() -> None:
    text = "---\nlicense: apache-2.0\ntags:\n- chat\n- code\nlanguage:\n  - en\n"
    text += "model-index:\n- name: x\n  results: []\n---\nhello"
    front, body = card.split_front_matter(text)
    assert front == {"license": "apache-2.0", "tags": ["chat", "code"], "language": ["en"]}
    assert body.strip() == "hello"


def test_a_masks_metadata_is_inert_text() -> None:
    evil = "x\n```\n# Heading\n<img src=a onerror=b>\x1b[2J" + "y" * 10_000
    info = MaskInfo(
        operation="vote",
        options={"note": evil, evil: 1},
        parents=(
            Parent(evil, "c" * 32, operation=evil, options={"a": evil}),
            Parent("~nobody/" + "z" * 5000, "b" * 32),
        ),
    )
    for given in (info, MaskInfo(base=evil)):
        mask = Mask.from_bools({"w": np.ones(3, bool)}, given)
        text = card.model_card(evil, mask, "d" * 32, ["a fact"], evil, None)
        assert text.count("```") == 2
        assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# {card.inert(evil)}"]
        assert "<img" not in text
        assert "\x1b" not in text
        assert len(text) < 5000


def test_a_family_is_remembered_as_far_as_a_header_holds_it(tmp_path: Path) -> None:
    """Long chains, and masks combined with their own ancestors, which double the tree each time, open again."""
    a, b = (Mask.from_bools({"w": np.arange(8) < n}) for n in (4, 6))
    chain, doubled = a, a
    for i in range(100):
        chain, doubled = chain | b, doubled & doubled if i < 40 else doubled
    for mask, forgotten in ((chain, 72), (doubled, 2**41 - 2 - (2**12 - 2))):
        mask.save(tmp_path / "x.mask")
        family = list(Mask.load(tmp_path / "x.mask").info.family())
        assert sum(parent.forgotten for _, parent in family) == forgotten
        assert max(generation for generation, _ in family) <= DEEPEST_FAMILY
        combine_files("union", [tmp_path / "x.mask", a], tmp_path / "y.mask", overwrite=True)
        assert "older ones are not recorded" in card.model_card("t", Mask.load(tmp_path / "y.mask"), "", [], "m", None)
    wide = combine("union", [a] * 5000)
    assert len(list((wide & wide).info.family())) == 2


def test_a_built_models_card_is_inert_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Names of models and masks are one cell of its table each, and a recipe cannot leave its fence."""
    model = tmp_path / "m|<img src=a> [x](javascript:y)"
    shutil.copytree(tiny("llama", layers=2), model)
    name = "model.layers.0.mlp.up_proj.weight"
    Mask.from_bools({name: np.ones(Checkpoint.open(model).entry(name).shape, bool)}).save(tmp_path / "a`|<b>.mask")
    given = {"models": [{"model": str(model), "mask": {"file": "a`|<b>.mask"}, "parameters": {"weight": 1}}]}
    text = yaml.safe_dump({"merge_method": "linear", **given, "dtype": "float32"})
    (tmp_path / "r.yml").write_text(f"# ```\n# <script>\n{text}")
    build(tmp_path / "r.yml", tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    before, _, fenced = page.partition("````yaml\n")
    assert fenced.count("````") == 1
    assert "<" not in before
    rows = [line for line in before.splitlines() if line.startswith("| `")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [5]
