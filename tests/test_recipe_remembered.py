"""A checkpoint whose tensors have other names than transformers' is merged in time that grows with their number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from mergekit.architecture import conversion
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from recipe_conformance_common import as_mergekit_is, make_picoLlaVa
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.core_model_loading import WeightTransform

from mftmerge.recipe import remembered
from mftmerge.recipe.build import build

RECIPE = """\
merge_method: linear
models:
  - {model: A, parameters: {weight: 0.4}}
  - {model: B, parameters: {weight: 0.6}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        make_picoLlaVa(folder / name)
    (folder / "recipe.yml").write_text(RECIPE)
    return folder


def test_names_and_configurations_are_found_out_once(models: Path, tmp_path: Path) -> None:
    calls: Counter[str] = Counter()
    rename, read = WeightTransform.rename_source_key, AutoConfig.from_pretrained

    def counted(self: Any, key: str) -> Any:
        calls["renamed"] += 1
        return rename(self, key)

    def counted_read(*given: Any, **more: Any) -> Any:
        calls["read"] += 1
        return read(*given, **more)

    stored = len(load_file(models / "A" / "model.safetensors"))
    with (
        patch.object(WeightTransform, "rename_source_key", counted),
        patch.object(AutoConfig, "from_pretrained", counted_read),
    ):
        build(models / "recipe.yml", tmp_path / "built", allow_lost=True)
    assert 0 < calls["renamed"] < 40 * stored  # of both models, by some transforms, planned and built
    assert calls["read"] < 20  # both models, wherever they are linked to


def test_the_bits_are_those_of_mergekit_as_it_is(models: Path, tmp_path: Path) -> None:
    build(models / "recipe.yml", tmp_path / "built", allow_lost=True)
    assert conversion._iter_transform_matches is not remembered._match
    text = yaml.safe_load(RECIPE)
    for model in text["models"]:
        model["model"] = str(models / model["model"])
    LoaderCache.loaders.clear()
    with as_mergekit_is():
        run_merge(MergeConfiguration.model_validate(text), str(tmp_path / "stock"), MergeOptions(quiet=True))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("built", "stock"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_configuration_that_changes_is_read_again(models: Path, tmp_path: Path) -> None:
    remembered.remember()
    file = tmp_path / "config.json"
    given = json.loads((models / "A" / "config.json").read_text())
    reference = ModelReference.model_validate(str(tmp_path))
    for token in (61, 62):
        file.write_text(json.dumps(given | {"image_token_index": token, "padding": "x" * token}))
        found = reference.config()
        assert found.image_token_id == token
        found.image_token_id = 0  # whoever gets one may change it
        assert reference.config().image_token_id == token


def test_other_ways_of_renaming_are_left_to_mergekit() -> None:
    class Upper(WeightTransform):
        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            return source_key.upper(), "x"

    found = list(remembered._iter_transform_matches(Upper("x", "y"), {"ax": 1, "bx": 2}))
    assert [(m.source_key, m.renamed_key, m.source_value) for m in found] == [("ax", "AX", 1), ("bx", "BX", 2)]
