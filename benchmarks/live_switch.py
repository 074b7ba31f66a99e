"""Claim: switching masks on a live model beats reloading a checkpoint, in a fraction of k checkpoints' memory.

A randomly initialised Llama of SmolLM2-135M's shape in bf16, k masks of density 0.9 over all linear layers, or over
four layers. Reloading is `from_pretrained` plus nothing else, files in the page cache. Every switch is checked to leave
exactly the weights of the masked checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from common import machine, small_llama, write

from mftmerge import Mask, attach
from mftmerge.checkpoint import Checkpoint


def make_model(path: Path, layers: int) -> None:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(small_llama(49152, layers)).to(torch.bfloat16).save_pretrained(path)


def random_masks(path: Path, k: int, last: int | None) -> dict[str, Mask]:
    checkpoint = Checkpoint.open(path)
    names = [n for n in checkpoint.names if n.endswith("proj.weight") and (last is None or int(n.split(".")[2]) < last)]
    rng = np.random.default_rng(0)
    return {str(i): Mask.from_bools({n: rng.random(checkpoint.entry(n).shape) < 0.9 for n in names}) for i in range(k)}


def seconds_of(call: object) -> tuple[float, float]:
    """Seconds on the clock and of this process, which other programs' load does not change."""
    started = time.perf_counter(), time.process_time()
    call()  # type: ignore[operator]
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shallow model, few rounds")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    layers, rounds, k = (6, 4, 3) if options.quick else (30, 6, 4)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        make_model(path, layers)
        size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")  # noqa: E731
        for title, last in (("all layers", None), ("four layers", 4)):
            model = load()
            original = {n: p.detach().clone() for n, p in model.named_parameters()}
            masks = random_masks(path, k, last)
            switcher = attach(model, masks)
            switches, reloads = [], []
            for i in range(rounds):
                name = str(i % k)
                switches.append(seconds_of(functools.partial(switcher.switch, name)))
                reloads.append(seconds_of(load))
                for n in masks[name].names:
                    expected = original[n] * torch.from_numpy(masks[name].kept(n))
                    assert torch.equal(model.get_parameter(n), expected), n
            kept_beside = switcher.nbytes
            switcher.detach()
            assert all(torch.equal(p, original[n]) for n, p in model.named_parameters())
            clock, process = (
                statistics.median([r[i] for r in reloads]) / statistics.median([s[i] for s in switches[1:]])
                for i in range(2)
            )
            memory = (size + kept_beside) / (k * size)
            print(
                f"{title}: reload / switch {clock:.2f} on the clock, {process:.2f} in processor time (target >= 1); "
                f"{k} masks take {memory:.2f}x {k} checkpoints"
            )
            results[title] = {
                "reload / switch": round(clock, 2),
                "reload / switch, processor time": round(process, 2),
                "target": ">= 1",
                "met": clock >= 1,
                "median seconds of a switch": statistics.median(s for s, _ in switches[1:]),
                "median seconds of a reload": statistics.median(r for r, _ in reloads),
                "memory with all masks / k checkpoints": round(memory, 3),
                "k": k,
            }
    results |= {"checkpoint MB": round(size / 1e6, 1), "threads": torch.get_num_threads(), "torch": torch.__version__}
    results |= {"transformers": transformers.__version__, **machine()}
    if not options.quick:
        write("live_switch", results)


if __name__ == "__main__":
    main()
