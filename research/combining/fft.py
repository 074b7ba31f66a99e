"""Fully fine-tune a base on the mixture of domains: `python -m research.combining.fft OUT --model DIR --domain ...`.

All matrices of all layers learn, on the first `rows` training rows of every domain, one pass, the best state by
validation. The result is a checkpoint: the further-tuned model of the transfer study.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mftmerge.evaluate.pairing import Values
from mftmerge.loss import row_losses
from mftmerge.train.control import trained_weights
from mftmerge.train.inputs import pad_id
from mftmerge.train.settings import TrainSettings
from mftmerge.train.targets import find
from research.combining.common import Plan, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--domain", action="append", required=True)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    plan = Plan()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    rows = read_rows(dict(d.split("=", 1) for d in given.domain), tokenizer, plan)
    train = [row for splits in rows.values() for row in splits["train"][: given.rows]]
    valid = [row for splits in rows.values() for row in splits["validation"]]
    layers = f"0-{model.config.num_hidden_layers - 1}"
    steps = len(train) // plan.batch
    settings = TrainSettings.make(
        {
            "layers": layers,
            "steps": steps,
            "batch_size": plan.batch,
            "max_length": plan.max_length,
            "eval_every": 15,
            "seed": 7,
            "prefix": "off",
        }
    )
    targets = find(model, layers)

    def losses() -> Values:
        found = row_losses(model, valid)
        print(f"validation {found[:, 0].sum() / found[:, 1].sum():.4f}", flush=True)
        return found

    with trained_weights(model, targets, train, settings, losses, lr=given.lr, pad=pad_id(tokenizer)) as best:
        print(f"best step {best.step}, {best.loss:.4f}")
        model.bfloat16().save_pretrained(given.out)
        tokenizer.save_pretrained(given.out)
        facts = {"steps": steps, "rows": len(train), "lr": given.lr, "best_step": best.step, "validation": best.loss}
        (given.out / "fft.json").write_text(json.dumps(facts) + "\n")
        model.float()


if __name__ == "__main__":
    main()
