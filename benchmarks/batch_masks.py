"""Claim: eight rows under eight masks in one batch cost little more than eight rows under one mask.

A randomly initialised Llama of SmolLM2-135M's shape in float32 on one thread; masks of density 0.9 over all linear
layers of four layers; greedy answers to eight prompts. Beside it: the eight rows one after the other, eight copies of
the four layers, and eight LoRA adapters in one batch (peft). Then the kernels alone that were tried for one step of the
masked layers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from common import interleaved, machine, write
from live_switch import make_model, random_masks

from mftmerge import attach, rowmasks, rowproduct

ROWS, LAST = 8, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_copies(model: torch.nn.Module, masks: dict[str, object]) -> None:
    """Give each masked layer one masked copy of its weights a row."""
    for name in masks["0"].names:  # type: ignore[attr-defined]
        module = model.get_submodule(name.removesuffix(".weight"))
        weight = module.weight.detach()
        copies = [weight * torch.from_numpy(m.kept(name)) for m in masks.values()]  # type: ignore[attr-defined]

        def forward(self: torch.nn.Module, x: torch.Tensor, copies: list[torch.Tensor] = copies) -> torch.Tensor:
            return torch.stack([torch.nn.functional.linear(row, copy) for row, copy in zip(x, copies, strict=True)])

        module.forward = types.MethodType(forward, module)


def lora(path: Path) -> torch.nn.Module:
    """The model with eight LoRA adapters of rank 16 over the same layers."""
    config = peft.LoraConfig(
        r=16, target_modules=TARGETS, layers_to_transform=list(range(LAST)), init_lora_weights=False
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = peft.get_peft_model(base, config, adapter_name="0").eval()
    for i in range(1, ROWS):
        model.add_adapter(str(i), config)
    return model


def kernels(model: torch.nn.Module, masks: dict[str, object], rounds: int) -> dict[str, float]:
    """One step of the masked layers alone: seconds against the dense product under one mask."""
    weights = [model.get_parameter(n).detach() for n in masks["0"].names]  # type: ignore[attr-defined]
    kept = [[torch.from_numpy(m.kept(n)) for m in masks.values()] for n in masks["0"].names]  # type: ignore[attr-defined]
    packed = [[torch.from_numpy(np.packbits(k.numpy().reshape(-1), bitorder="little")) for k in row] for row in kept]
    inputs = [torch.randn(ROWS, w.shape[1]) for w in weights]
    sparse = [[(w * ~k).to_sparse_csr() for k in row] for w, row in zip(weights, kept, strict=True)]
    places = [[(~k).view(-1).nonzero().view(-1) for k in row] for row in kept]

    def dense() -> None:
        for x, w in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(x, w)

    def from_bits() -> None:
        for x, w, p in zip(inputs, weights, packed, strict=True):
            rowproduct.row_product(x, w, p, None)

    def minus_sparse() -> None:
        for x, w, rows in zip(inputs, weights, sparse, strict=True):
            y = torch.nn.functional.linear(x, w)
            for i, dropped in enumerate(rows):
                y[i] -= dropped @ x[i]

    def minus_gathered() -> None:  # positions alone are kept, the values are looked up
        for x, w, rows in zip(inputs, weights, places, strict=True):
            y = torch.nn.functional.linear(x, w)
            for i, at in enumerate(rows):
                products = w.view(-1)[at] * x[i][at % w.shape[1]]
                y[i].index_add_(0, at // w.shape[1], products, alpha=-1)

    def rebuilt() -> None:
        for x, w, rows in zip(inputs, weights, kept, strict=True):
            for i, k in enumerate(rows):
                torch.nn.functional.linear(x[i], w.masked_fill(~k, 0))

    def as_int8() -> None:  # a mask as a byte a weight, multiplied in
        for x, w, rows in zip(inputs, weights, kept, strict=True):
            for i, k in enumerate(rows):
                torch.nn.functional.linear(x[i], w * k)

    ways: dict[str, Callable[[], object]] = {
        "dense, one mask": dense,
        "from the bits": from_bits,
        "dense minus torch.sparse": minus_sparse,
        "dense minus gathered positions": minus_gathered,
        "masked weights rebuilt": rebuilt,
        "weights times int8": as_int8,
    }
    with torch.no_grad():
        seconds = interleaved(ways, rounds, clock=time.thread_time)
    return {name: round(s / seconds["dense, one mask"], 2) for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shallow model, few rounds")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    layers, rounds, new = (6, 1, 4) if options.quick else (30, options.rounds, 32)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model"
        make_model(path, layers)
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # noqa: E731
        model, copied, adapted = load(), load(), lora(path)
        masks = random_masks(path, ROWS, LAST)
        switcher = attach(model, masks)
        beside = switcher.nbytes
        with_copies(copied, masks)  # type: ignore[arg-type]
        names = list(masks)
        ids = torch.from_numpy(np.random.default_rng(0).integers(5, 49000, (ROWS, 16)))
        how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        how["attention_mask"] = torch.ones_like(ids)

        def one_mask() -> torch.Tensor:
            with switcher.use("0"):
                return model.generate(ids, **how)

        def batch() -> torch.Tensor:
            with switcher.batch(names):
                return model.generate(ids, **how)

        def eight_runs() -> torch.Tensor:
            rows = []
            for i, name in enumerate(names):
                with switcher.use(name):
                    rows.append(model.generate(ids[i : i + 1], **how | {"attention_mask": how["attention_mask"][:1]}))
            return torch.cat(rows)

        ways: dict[str, Callable[[], object]] = {
            "one mask": one_mask,
            "a mask a row": batch,
            "eight runs": eight_runs,
            "copies of the layers": lambda: copied.generate(ids, **how),
            "LoRA, an adapter a row": lambda: adapted.generate(input_ids=ids, adapter_names=names, **how),
        }
        same = torch.equal(batch(), eight_runs())
        with switcher.batch(names):
            logits = model(ids).logits
        apart = 0.0
        for i, name in enumerate(names):
            with switcher.use(name):
                alone = model(ids[i : i + 1]).logits
            apart = max(apart, float((logits[i] - alone[0]).abs().max() / alone.abs().max()))
        seconds = interleaved(ways, rounds, clock=time.thread_time)
        weights = sum(map(masks["0"].size, masks["0"].names))
        results: dict[str, object] = {
            "time against one mask": {n: round(s / seconds["one mask"], 3) for n, s in seconds.items()},
            "eight runs / a mask a row": round(seconds["eight runs"] / seconds["a mask a row"], 2),
            "bytes beside the model, a masked weight and mask": {
                "a mask a row": round(beside / weights / ROWS, 3),
                "copies of the layers": 4.0,
                "LoRA, an adapter a row": round(
                    4 * sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) / weights / ROWS, 3
                ),
            },
            "greedy answers equal to eight runs'": same,
            "largest difference of a logit / largest logit": apart,
            "a step of the masked layers alone, against dense": kernels(model, masks, 3 * rounds),  # type: ignore[arg-type]
            "tokens of one mask from which its weights are made": rowmasks.FEW + 1,
        }
    for name, value in results.items():
        print(f"{name}: {value}")
    results |= {"rounds": rounds, "torch": torch.__version__, "peft": peft.__version__, **machine()}
    if not options.quick:
        write("batch_masks", results)


if __name__ == "__main__":
    main()
