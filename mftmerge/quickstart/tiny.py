"""The model of `quickstart --tiny`, made on the spot: a tokenizer and a Llama of a million weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mftmerge.data import Row, tokenize
from mftmerge.progress import Progress, Step

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(corpus: Iterable[str] = (), vocab_size: int = 512) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with a ChatML template; without a corpus it has one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def random_checkpoint(
    path: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model of random weights and its tokenizer to `path` and return the path.

    dtype: name of a torch dtype for the stored weights. Torch's random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.random.set_rng_state(state)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(path)
    return path


def tiny_checkpoint(
    path: Path, corpus: Iterable[str] = (), *, hidden: int = 64, layers: int = 4, seed: int = 0
) -> Path:
    """Write a Llama of random weights, its tokenizer and chat template to `path` and return the path."""
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer(corpus)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return random_checkpoint(path, config, tokenizer, seed=seed)


def tiny_base(
    path: Path, rows: Sequence[Row], *, steps: int = 80, seed: int = 0, progress: Progress | None = None
) -> Path:
    """A tiny Llama (1M weights, 4 layers), fine-tuned in full on `rows` for a few seconds: a base that knows a little.

    rows: as `data.load_rows` gives them. progress: called after each step. Written whole or not at all.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        complete = Path(temporary) / "checkpoint"
        tiny_checkpoint(complete, (row["prompt"] + row["completion"] for row in rows), hidden=128, seed=seed)
        tokenized = tokenize(rows, AutoTokenizer.from_pretrained(complete), 256)
        model = AutoModelForCausalLM.from_pretrained(complete, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
            chosen = torch.randint(len(tokenized), (8,), generator=generator).tolist()
            ids = [torch.tensor(tokenized[i]["input_ids"]) for i in chosen]
            batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
            labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
            model(input_ids=batch, attention_mask=(labels != -100).long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if progress:
                progress(Step("full fine-tuning of a tiny Llama", step + 1, steps))
        model.save_pretrained(complete)
        os.replace(complete, path)
    return path
