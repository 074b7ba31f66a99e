"""The mask as an optimiser in a training script of your own: `python own_trainer.py MODEL ROWS.jsonl OUT.mask`.

TRL's SFTTrainer does everything here but the optimiser, which learns scores in the place of weights. Any trainer that
takes a torch optimiser will do. Clipping is the optimiser's own: of the gradients of scores, not of weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import mftmerge


def main(path: str, rows: str, out: Path, steps: int = 60) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    optimizer = mftmerge.mask_optimizer(model, keep=0.9, steps=steps)  # the matrices of the last four layers
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(scratch, max_steps=steps, max_grad_norm=0.0, save_strategy="no", bf16=False)
        data = load_dataset("json", data_files=rows, split="train", cache_dir=scratch)
        SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None)).train()
    mask = mftmerge.learnt_mask(model, optimizer, path)
    mask.save(out)
    print(f"{out}: density {mask.density():.3f}, {len(mask.names)} tensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
