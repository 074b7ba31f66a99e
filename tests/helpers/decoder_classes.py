"""A tiny model of every decoder class that transformers has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

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
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}  # for pictures or sound
BLOCK = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
SHARED = ["linear_attention", "linear_attention", "hybrid"] * 2
BYTES: dict[str, Any] = BLOCK | {"vocab_size": 300, "hidden_size_global": 64}
# What some classes need besides, or otherwise; of a model with several towers by its text model's name.
OWN: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "patcher_config": BLOCK | {"vocab_size": 300},
        "encoder_config": BYTES,
        "decoder_config": BYTES,
        "global_config": BLOCK,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "num_key_value_heads": 4},
    "dots3_note": {
        "vision_config": TOWER
        | {"num_hidden_layers": 2, "adapter_in_dim": 32, "adapter_out_dim": 64, "per_layer_config": {}},
        "audio_config": {"adapter_out_dim": 64},
    },
    "dots3_note_text": {"per_layer_config": {}, "num_key_value_heads": 4, "head_dim": 32},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 300,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
        "laurel_rank": 8,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 300},
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 3]]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "longcat_flash": {"num_key_value_heads": 4, "qk_rope_head_dim": 16, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "phi4_multimodal": {
        "original_max_position_embeddings": 128,
        "vision_config": TOWER | {"num_hidden_layers": 8, "image_size": 28, "crop_size": 28, "image_token_id": 3},
        "audio_config": TOWER
        | {
            "num_blocks": 8,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
            "audio_token_id": 4,
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
        "ple_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
        "layers_block_type": SHARED,
    },
    "zamba2": {"num_key_value_heads": 4, "n_mamba_heads": 8, "layers_block_type": SHARED},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# Latent attention: every head has its own keys and values.
LATENT = "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear minicpm3"
OWN |= {kind: {"num_key_value_heads": 4} for kind in (*LATENT.split(), "youtu")}

# What is no language model by itself, cannot be trained in part, or is not installed.
PARTS = {
    "gemma3n": "needs timm for its pictures",
    "gemma4_assistant": "drafts from another model's states",
    "gemma4_unified_assistant": "drafts from another model's states",
    "moss_transcribe_diarize": "writes down speech",
    "reformer": "its reversible layers give no gradient where what is below them is frozen",
    "musicgen": "makes music, several codes a step",
    "musicgen_melody": "makes music, several codes a step",
}
KINDS = sorted(set(CLASSES) - set(PARTS))


def build(kind: str) -> Any:
    """A tiny model of one class, with random weights from seed 0."""
    config_class = transformers.AutoConfig.for_model(kind).__class__
    own = OWN.get(kind, {})
    if "text_config" in inspect.signature(config_class.__init__).parameters:  # a small text model beside other towers
        text = config_class().get_text_config()
        own = own | {"text_config": _given(text.__class__) | OWN.get(text.model_type, {})}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_class(**_given(config_class) | own))


def _given(config_class: type) -> dict[str, Any]:
    """Of the small values those that a configuration knows."""
    fields = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "attribute_map", {})}
    return {k: v for k, v in SMALL.items() if k in fields and not (k == "head_dim" and "qk_rope_head_dim" in fields)}
