"""Stands in for `tests/common.py`, which mergekit's source distribution lacks: tiny models, and merges done twice.

`run_and_check_merge` merges with stock mergekit and, from the same configuration written as YAML and imported as a
recipe, with our builder; both must succeed or fail together, and every tensor must be equal bit for bit.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as tf
import yaml
from mergekit.architecture import conversion
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mftmerge.errors import MftmergeError
from mftmerge.recipe import remembered
from mftmerge.recipe.build import build
from mftmerge.recipe.importing import import_recipe

SEED = 11


@contextmanager
def as_mergekit_is() -> Iterator[None]:
    """Renaming all tensors for each, whatever was built before.

    Configurations are remembered: to read one for every tensor takes half of the time of these tests.
    """
    with (
        patch.object(ModelReference, "config", remembered._config),
        patch.object(conversion, "_iter_transform_matches", remembered._match),
    ):
        yield


def _save(model: Any, path: Any) -> str:
    model.save_pretrained(str(path), safe_serialization=True)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    config = tf.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    return _save(tf.LlamaForCausalLM(config), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    config = tf.GraniteConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    return _save(tf.GraniteForCausalLM(config), path)


def make_gpt2size(path: Any, vocab_size: int = 128) -> str:
    config = tf.GPT2Config(n_ctx=128, n_embd=32, n_head=4, n_layer=12, vocab_size=vocab_size)
    return _save(tf.GPT2LMHeadModel(config), path)


def make_picoLlaVa(path: Any) -> str:
    vision = tf.CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    text = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return _save(tf.LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    index_json_name: str | None = None,
    auto_arch: bool = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = Path(folder) / "stock", Path(folder) / "ours"
        mergekit_yaml = Path(folder) / "config.yml"
        mergekit_yaml.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        failure: Exception | None = None
        LoaderCache.loaders.clear()
        try:
            with as_mergekit_is():
                run_merge(copy.deepcopy(config), str(stock), MergeOptions(random_seed=SEED, quiet=True))
        except Exception as e:
            failure = e
        LoaderCache.loaders.clear()
        recipe = Path(folder) / "recipe.yml"
        try:
            recipe.write_text(import_recipe(mergekit_yaml).text)
            # Of LLaVA's checkpoint mergekit reads no language model, and says nothing; we refuse that unless asked.
            build(recipe, ours, seed=SEED, allow_lost=True)
        except MftmergeError:
            assert failure is not None, "our builder fails where mergekit does not"
            raise failure from None
        assert failure is None, f"mergekit fails where our builder does not: {failure}"
        a, b = LazyTensorLoader.from_disk(str(stock)), LazyTensorLoader.from_disk(str(ours))
        assert sorted(a.index.tensor_paths) == sorted(b.index.tensor_paths)
        for name in a.index.tensor_paths:
            x, y = a.get_tensor(name), b.get_tensor(name)
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert torch.equal(
                x.contiguous().reshape(-1).view(torch.uint8), y.contiguous().reshape(-1).view(torch.uint8)
            )
            assert not check_nan or not x.is_floating_point() or not x.isnan().any()
        if validate:
            validate(str(ours))
