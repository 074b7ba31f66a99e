"""A step of training, by default settings, of every decoder class of transformers that a tiny configuration builds."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from mftmerge.train import targets
from mftmerge.train.run import train_mask

# Any name that a configuration knows gets its value; the rest stays as the class has it.
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 6,
    "n_layer": 6,
    "n_layers": 6,
    "num_layers": 6,
    "decoder_layers": 6,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROWS = [{"input_ids": [5 + i, 6, 7, 8, 9 + i, 2], "labels": [-100, -100, 7, 8, 9 + i, 2]} for i in range(4)]
KINDS = sorted(CLASSES)


def build(kind: str) -> Any:
    """A tiny model of one class, or a skip that says why none is built from these values."""
    try:
        config_class = transformers.AutoConfig.for_model(kind).__class__
        known = inspect.signature(config_class.__init__).parameters
        fields = set(known) | set(getattr(config_class, "attribute_map", {}))
        torch.manual_seed(0)
        given = {
            k: v for k, v in SMALL.items() if k in fields and not (k == "head_dim" and "qk_rope_head_dim" in fields)
        }
        config = config_class(**given)
        if "text_config" in known:  # a model for pictures or sound: a small text model beside its other towers
            text = config.get_text_config().__class__
            of_text = set(inspect.signature(text.__init__).parameters)
            config = config_class(text_config={k: v for k, v in SMALL.items() if k in of_text})
        if sum(p.numel() for p in _meta(config).parameters()) > 100_000_000:
            pytest.skip("not small")
        return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as e:
        pytest.skip(f"not built from these values: {type(e).__name__}: {str(e)[:80]}")


def _meta(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_class(kind: str) -> None:
    model = build(kind)
    try:
        model.train()(input_ids=torch.tensor([ROWS[0]["input_ids"]]), use_cache=False).logits.sum().backward()
    except Exception as e:
        pytest.skip(f"the class itself cannot be trained so: {type(e).__name__}: {str(e)[:80]}")
    model.zero_grad()
    result = train_mask(model.eval(), ROWS, None, tokenizer=Tokenizer(), steps=1, batch_size=2, eval_share=0.5)
    assert len(result.history) == 2
    linear = {id(m.weight) for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")}
    for t in targets.find(model):
        owner = type(model.get_submodule(t.name.rpartition(".")[0])).__name__
        assert id(t.parameter) in linear or "Expert" in owner or owner.endswith("Linear"), t.name


class Tokenizer:
    """Rows are tokens already; only the padding is asked for."""

    pad_token_id, eos_token_id = 0, 2
