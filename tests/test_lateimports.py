"""A build starts without what it does not need, and gets it where it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mergekit.architecture import NAME_TO_ARCH
from recipe_kitchen import add_adapter, assert_equal, make_kitchen, stock, tensors

from mftmerge.cli import lateimports

HEAVY = ("peft", "scipy", "sympy", "transformers.modeling_utils", "torch.distributed.tensor", "torch._dynamo")


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_kitchen(tmp_path_factory.mktemp("late"))
    add_adapter(folder)
    return folder


def built(config: dict[str, object], folder: Path, more: str = "") -> tuple[Path, list[str]]:
    """The output of `mftmerge build` in a process of its own, and which of HEAVY it had loaded."""
    (folder / "r.yml").write_text(yaml.safe_dump(config))
    out = folder / "out"
    code = f"""
import json, sys
from mftmerge.cli import main
try:
    main(["build", {str(folder / "r.yml")!r}, "-o", {str(out)!r}, "--seed", "5"])
except SystemExit as e:
    assert not e.code
{more}
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def test_a_merge_loads_no_models_and_no_peft(kitchen: Path, tmp_path: Path) -> None:
    models = [{"model": str(kitchen / "models" / n), "parameters": {"weight": 0.5}} for n in ("math", "code")]
    config = {"merge_method": "linear", "models": models}
    out, loaded = built(config, tmp_path)
    assert loaded == []
    assert_equal(tensors(out), tensors(stock(config, tmp_path / "theirs")))


def test_what_was_put_off_is_whole_afterwards(kitchen: Path, tmp_path: Path) -> None:
    config = {"merge_method": "passthrough", "models": [{"model": str(kitchen / "models/math")}]}
    more = f"""
import peft, transformers, mergekit.common, mergekit.architecture.conversion
from mftmerge.cli.lateimports import Postponed
for name in ("PreTrainedModel", "AutoModelForCausalLM"):
    assert isinstance(getattr(transformers, name), type), name
assert mergekit.common.peft.PeftModel.from_pretrained.__func__ is peft.PeftModel.from_pretrained.__func__
assert mergekit.architecture.conversion.get_checkpoint_conversion_mapping("mixtral")
from transformers.core_model_loading import WeightRenaming
assert isinstance(WeightRenaming("a", "b"), mergekit.architecture.conversion.WeightRenaming)
assert not isinstance(3, mergekit.architecture.conversion.WeightRenaming)
assert not any(isinstance(v, Postponed) for v in vars(transformers).values())
model = transformers.AutoModelForCausalLM.from_pretrained({str(kitchen / "models/math")!r})
model.generate(torch.tensor([[1, 2]]), max_new_tokens=2) if (torch := __import__("torch")) else None
"""
    built(config, tmp_path, more)


def test_an_adapter_is_merged(kitchen: Path, tmp_path: Path) -> None:
    """For which mergekit loads a model and peft."""
    model = f"{kitchen / 'models/base'}+{kitchen / 'models/adapter'}"
    config: dict[str, object] = {"merge_method": "passthrough", "models": [{"model": model}]}
    assert_equal(tensors(built(config, tmp_path)[0]), tensors(stock(config, tmp_path / "theirs")))


def test_an_architecture_without_a_description(tmp_path: Path) -> None:
    """For which mergekit asks transformers for a model's tied weights and renamed keys."""
    from transformers import HeliumConfig, HeliumForCausalLM

    assert "HeliumForCausalLM" not in NAME_TO_ARCH
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    for name in ("a", "b"):
        shaped = HeliumConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
        HeliumForCausalLM(shaped).save_pretrained(tmp_path / name)
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 0.5}} for n in ("a", "b")]
    config: dict[str, object] = {"merge_method": "linear", "models": models}
    assert_equal(tensors(built(config, tmp_path)[0]), tensors(stock(config, tmp_path / "theirs")))


def test_a_module_that_wants_more_at_once_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may make a class of what it imports, which no stand-in can be the base of."""
    (tmp_path / "late_base.py").write_text("class Base: ...\n")
    (tmp_path / "late_user.py").write_text("from late_base import Base\nclass User(Base): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lateimports, "LATER", {"late_user": ("late_base",)})
    lateimports.postpone()
    import late_user  # type: ignore[import-not-found]

    assert late_user.User.__mro__[1].__module__ == "late_base"
