"""Tiny random checkpoints of several architectures, made on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mftmerge.quickstart.tiny import random_checkpoint, tiny_tokenizer


def tiny_config(architecture: str, vocab_size: int, hidden: int = 64, layers: int = 4, positions: int = 1024) -> Any:
    """Configuration of a small model: llama, qwen2, qwen3, gemma3, mixtral (fused experts) or gpt2 (Conv1D)."""
    import transformers as tf

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": hidden * 5 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture == "llama":
        return tf.LlamaConfig(**common)
    if architecture == "qwen2":
        return tf.Qwen2Config(**common, tie_word_embeddings=True)
    if architecture == "qwen3":
        return tf.Qwen3Config(**common, head_dim=hidden // 4)
    if architecture == "gemma3":
        return tf.Gemma3TextConfig(**common, head_dim=hidden // 4, sliding_window=64)
    if architecture == "mixtral":
        return tf.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    if architecture == "gpt2":
        return tf.GPT2Config(
            vocab_size=vocab_size,
            n_embd=hidden,
            n_layer=layers,
            n_head=4,
            n_positions=positions,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    raise ValueError(f"unknown architecture {architecture!r}")


def tiny_checkpoint(
    path: str | Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    hidden: int = 64,
    layers: int = 4,
    positions: int = 1024,
    corpus: Iterable[str] = (),
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random checkpoint with tokenizer and chat template to `path` and return the path.

    dtype: name of a torch dtype for the stored weights. A small `max_shard_size` gives a sharded checkpoint.
    """
    tokenizer = tiny_tokenizer(corpus)
    config = tiny_config(architecture, len(tokenizer), hidden, layers, positions)
    return random_checkpoint(Path(path), config, tokenizer, seed=seed, dtype=dtype, max_shard_size=max_shard_size)


def scaled(model: str | Path, path: str | Path, factor: float) -> Path:
    """Write a checkpoint to `path`, over what is there: another one's with all weights times a factor."""
    import shutil

    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(model, path, dirs_exist_ok=True))
    tensors = load_file(Path(model) / "model.safetensors")
    save_file({n: t * factor for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path
