"""Claim: a thousand switches of masks leave the model bit for bit; merging and unmerging LoRA adapters does not.

A randomly initialised Llama of SmolLM2-135M's shape in bfloat16, two masks of density 0.9 over four layers, and two
LoRA adapters of rank 16 (peft) over the same layers. peft is asked in both ways: merged into the weights, which makes
passes as fast as without; and beside them (`set_adapter`), which leaves the weights alone and costs in each pass.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from common import interleaved, machine, write
from live_switch import make_model, random_masks

from mftmerge import attach

LAST = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().view(torch.int16).clone() for n, p in model.named_parameters() if "lora_" not in n}


def differing(before: dict[str, torch.Tensor], model: torch.nn.Module, covered: list[str]) -> dict[str, float]:
    """Of the covered weights: the share that differs, the bits that do, and the mean size of the difference."""
    now, weights, changed, flipped, off, size = bits(model), 0, 0, 0, 0.0, 0.0
    for name in covered:
        a, b = before[name], now[name]
        weights += a.numel()
        changed += int((a != b).sum())
        flipped += sum(int(((a ^ b) >> i & 1).sum()) for i in range(16))
        off += float((a.view(torch.bfloat16).float() - b.view(torch.bfloat16).float()).abs().sum())
        size += float(a.view(torch.bfloat16).float().abs().sum())
    return {"share of weights": changed / weights, "bits": flipped, "mean difference / mean weight": off / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shallow model, few switches")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers, switches, rounds = (6, 10, 1) if options.quick else (30, 1000, 5)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model"
        make_model(path, layers)
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()  # noqa: E731
        model, base = load(), load()
        masks = random_masks(path, 2, LAST)
        covered = list(masks["0"].names)
        switcher = attach(model, masks)
        config = peft.LoraConfig(
            r=16, target_modules=TARGETS, layers_to_transform=list(range(LAST)), init_lora_weights=False
        )
        adapted = peft.get_peft_model(base, config, adapter_name="0").eval()
        adapted.add_adapter("1", config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)  # of a trained adapter's size
        own = {
            n.replace(".weight", ".base_layer.weight").replace("model.", "base_model.model.model.", 1) for n in covered
        }
        before, before_lora = bits(model), bits(adapted)

        def merged(name: str) -> None:
            adapted.merge_adapter([name])
            adapted.unmerge_adapter()

        def beside(name: str) -> None:
            adapted.set_adapter(name)

        spent: dict[str, float] = {}
        for title, switch in (("masks", switcher.switch), ("peft, merged", merged), ("peft, beside", beside)):
            start = time.process_time()  # of all threads: masks are written by a pool of them
            for i in range(switches):
                switch(str(i % 2))
                if (title, i) == ("peft, merged", 0):
                    early = time.process_time()
                    once = differing(before_lora, adapted, sorted(own))
                    start += time.process_time() - early
            spent[title] = (time.process_time() - start) / switches
            if title == "peft, merged":
                off = differing(before_lora, adapted, sorted(own))
        deltas = [m.get_delta_weight("0") for m in adapted.modules() if hasattr(m, "get_delta_weight")]
        deltas = [d for d in deltas if d.any()]
        change = float(sum(d.float().abs().sum() for d in deltas)) / sum(
            float(before[n].view(torch.bfloat16).float().abs().sum()) for n in covered
        )
        switcher.switch(None)
        exact = differing(before, model, covered)
        ids = torch.arange(5, 21).view(1, -1)
        adapted.merge_adapter(["0"])
        seconds = interleaved({"peft, merged": lambda: adapted(ids)}, rounds, clock=time.thread_time)
        adapted.unmerge_adapter()
        switcher.switch("0")
        seconds |= interleaved(
            {"masks": lambda: model(ids), "peft, beside": lambda: adapted(ids)}, rounds, clock=time.thread_time
        )
        weights = sum(map(masks["0"].size, covered))
        adapter = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) / 2
        results = {
            "switches": switches,
            "after them, of the covered weights": {
                "masks": exact,
                "peft, merged": off,
                "peft, merged, after one": once,
            },
            "mean change by an adapter / mean weight": change,
            "time of a switch against masks'": {n: round(s / spent["masks"], 3) for n, s in spent.items()},
            "seconds of a switch": spent,
            "time of a pass of 16 tokens against masks'": {
                n: round(s / seconds["masks"], 3) for n, s in seconds.items()
            },
            "bytes of one more, a covered weight": {"masks": 0.125, "peft": round(2 * adapter / weights, 3)},
            "bytes of originals, a covered weight": {
                "masks": round((switcher.nbytes - 2 * weights / 8) / weights, 3),
                "peft": 0,
            },
        }
    for name, value in results.items():
        print(f"{name}: {value}")
    results |= {"torch": torch.__version__, "peft": peft.__version__, **machine()}
    if not options.quick:
        write("lora_switching", results)


if __name__ == "__main__":
    main()
