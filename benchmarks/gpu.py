"""Everything that the pages leave open without a GPU, in ten minutes on one card and with nothing from the network.

    python benchmarks/gpu.py [--shape llama7b|small|tiny] [--minutes 10]

First the checks, which must hold: the same scores and gradients give the same mask on the card and on the CPU, bit for
bit; a run that was interrupted ends with the mask of one that was not; bfloat16 weights and 8-bit moments train;
switching between generations leaves the masked checkpoint's weights and answers. Then the figures: a training step of
a model of LLaMA2-7B's shape with random weights (four layers, and as many as fit) against fine-tuning the same layers
and the released algorithm, with tokens a second and peak memory; the cut against topk and sort; switching and applying.

A section that no time is left for is skipped, and the page says so. Results: results/gpu.json and results/gpu.md, or
results/gpu_cpu.* where there is no card: that run of the tiny shape only shows that the program works.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import common
import torch
from train_common import machine
from train_step import SHAPES, model_of, stepper

from mftmerge import Mask, apply_mask, attach, train_mask
from mftmerge.checkpoint import Checkpoint
from mftmerge.quickstart.tiny import random_checkpoint, tiny_tokenizer
from mftmerge.train import scores, selection, targets
from mftmerge.train.optimizer import MaskOptimizer

SHAPES["tiny"] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Result = dict[str, Any]


# -- what must hold ----------------------------------------------------------------------------------------------------


def same_mask_as_the_cpu() -> Result:
    """Ten optimiser steps from one start on the same gradients: the bits that differ between the card and the CPU."""
    differ = total = 0
    for init, bits in (("normal", 32), ("magnitude", 32), ("magnitude", 8)):
        masks = []
        for device in ("cpu", DEVICE):
            model = model_of("tiny", torch.float32, "cpu")
            found = targets.find(model, "0-3")
            start = scores.initial(found, init)
            model.to(device)
            found = targets.find(model, "0-3")
            optimizer = MaskOptimizer(found, start, signed=scores.is_signed(init), adam_bits=bits, lr=0.01)
            for step in range(10):
                for i, target in enumerate(found):
                    generator = torch.Generator().manual_seed(1000 * step + i)
                    target.parameter.grad = torch.randn(target.parameter.shape, generator=generator).to(device)
                optimizer.step()
            masks.append({n: kept.cpu() for n, kept in optimizer.mask().items()})
        differ += sum(int((masks[0][n] != masks[1][n]).sum()) for n in masks[0])
        total += sum(kept.numel() for kept in masks[0].values())
    if differ:
        raise AssertionError(f"{differ} of {total} bits differ between the CPU and {DEVICE}")
    return {"bits compared": total, "bits that differ": differ}


def same_cut_as_the_cpu() -> Result:
    """The cut of values with many ties: the kept bits on the card are those on the CPU."""
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).abs().mul_(50).round_().div_(50)
    for dropped in (1, len(values) // 10, len(values) // 2, len(values) - 1):
        here, there = selection.keep_top(values, dropped), selection.keep_top(values.to(DEVICE), dropped).cpu()
        assert torch.equal(here, there), f"{int((here != there).sum())} bits differ at {dropped} dropped"
    return {"values": len(values), "bits that differ": 0}


def resume_and_types(folder: Path) -> Result:
    """Interrupted and continued is uninterrupted, in float32 and bfloat16, with moments of 32 and of 8 bits."""
    rows = [{"prompt": f"count from {i}", "completion": f" {i}, {i + 1}, {i + 2}, {i + 3}"} for i in range(24)]
    base = small_checkpoint(folder / "base")
    digests = {}
    for dtype, bits in (("float32", 32), ("bfloat16", 32), ("bfloat16", 8)):
        options: dict[str, Any] = {"steps": 6, "batch_size": 4, "layers": "2-3", "lr": 0.01, "save_every": 1}
        options |= {"dtype": dtype, "adam_bits": bits, "eval_rows": 4, "max_length": 64, "overwrite": True}
        whole = train_mask(base, rows, folder / "whole.mask", **options)

        def stop(step: Any) -> None:
            if step.done == 3:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            train_mask(base, rows, folder / "cut.mask", progress=stop, **options)
        assert any((folder / "cut.mask.run").glob("checkpoint-*")), "the interrupted run left no checkpoint"
        rest = train_mask(base, rows, folder / "cut.mask", resume=True, **options)
        key = f"{dtype}, {bits}-bit moments"
        digests[key] = whole.mask.digest
        assert rest.mask.digest == whole.mask.digest, f"{key}: the continued run ends with another mask"
    return {"equal after an interruption": list(digests)}


def switching_while_generating(folder: Path) -> Result:
    """Answers under each mask, switched between, are those of the masked checkpoints loaded from disk."""
    from transformers import AutoModelForCausalLM

    base = small_checkpoint(folder / "base")
    masks = {name: random_mask(base, seed) for seed, name in enumerate(("a", "b"))}
    prompt = torch.arange(5, 13, device=DEVICE)[None]  # (1, tokens)

    def answer(model: Any) -> list[int]:
        return list(map(int, model.generate(prompt, max_new_tokens=12, do_sample=False)[0]))

    expected: dict[str | None, list[int]] = {}
    for name in (None, "a", "b"):
        place = base if name is None else folder / f"applied-{name}"
        if name is not None:
            apply_mask(masks[name], base, place, overwrite=True)
        expected[name] = answer(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(DEVICE).eval())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(DEVICE).eval()
    switcher = attach(model, masks)
    for name in ("a", "b", None, "b", "a", None):
        switcher.switch(name)
        assert answer(model) == expected[name], f"other answers under {name} than its checkpoint gives"
    switcher.detach()
    return {"switches": 6, "answers that differ": 0}


# -- figures -----------------------------------------------------------------------------------------------------------


def training_step(shape: str, tokens: int, layers: str | None, kinds: tuple[str, ...], rounds: int) -> Result:
    """Median seconds of a whole step, tokens a second and peak GiB of each way to train the same layers."""
    found: Result = {}
    for kind in kinds:
        try:
            with measured_memory() as memory:
                pass_, step = stepper(kind, shape, layers, tokens, torch.bfloat16, DEVICE)
                seconds = []
                for turn in range(rounds + 1):
                    started = time.perf_counter()
                    pass_()
                    step()
                    if turn:
                        seconds.append(time.perf_counter() - started)
                del pass_, step
        except torch.OutOfMemoryError:
            found[kind] = {"does not fit": True}
            continue
        median = statistics.median(seconds)
        found[kind] = {"seconds": round(median, 4), "tokens a second": round(tokens / median), **memory}
    own = found.get("mask", {}).get("seconds")
    for other in ("fft", "released"):
        if own and "seconds" in found.get(other, {}):
            found[f"mask / {other}"] = round(own / found[other]["seconds"], 3)
    return found


def most_layers(shape: str, tokens: int) -> str:
    """The last layers that a mask can be trained over in the memory that is free, as `first-last`."""
    count = SHAPES[shape]["num_hidden_layers"]
    if DEVICE == "cpu":
        return f"0-{count - 1}"
    free = torch.cuda.mem_get_info()[0]
    hidden, wide = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    layer = 4 * hidden * hidden + 3 * hidden * wide
    weights = 2 * (count * layer + 2 * 32000 * hidden)
    # A masked weight takes 18.1 bytes with its own two; activations of a layer about 34 values a token and channel.
    room = free * 0.9 - weights - 34 * 2 * tokens * hidden * count - 12 * 32000 * tokens
    fit = max(1, min(count, int(room / (16.1 * layer))))
    return f"{count - fit}-{count - 1}"


def cut(size: int) -> Result:
    """Seconds to find the k-th of so many float32 values, against torch's topk and sort on the same device."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).abs().to(DEVICE)
    dropped = size // 10
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: selection.smallest_kept(values, dropped),
        "histogram": lambda: selection.smallest_kept_over([values], dropped),
        "sort": lambda: float(torch.sort(values).values[dropped]),
        "topk": lambda: float(torch.topk(values, dropped + 1, largest=False).values[-1]),
        "abs": lambda: float(values.abs()[0]),
    }
    found = {name: way() for name, way in ways.items() if name != "abs"}
    assert len(set(found.values())) == 1, found
    seconds = common.interleaved(ways, 3)
    ratios = {f"{name} / ours": round(s / seconds["ours"], 2) for name, s in seconds.items() if name != "ours"}
    return {"values": size, "seconds of ours": round(seconds["ours"], 5), **ratios}


def switch_and_apply(folder: Path, shape: str) -> Result:
    """Seconds of a switch between masks over all layers, of a reload, and of applying a mask to files."""
    from transformers import AutoModelForCausalLM

    base = small_checkpoint(folder / shape, shape)
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    masks = {name: random_mask(base, seed) for seed, name in enumerate(("a", "b", "c"))}

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(DEVICE)
        wait()
        return model

    model = load()
    switcher = attach(model, masks)
    switches, reloads, applied = [], [], []
    for turn in range(6):
        started = time.perf_counter()
        switcher.switch("abc"[turn % 3])
        wait()
        switches.append(time.perf_counter() - started)
    switcher.detach()
    for _ in range(3):
        started = time.perf_counter()
        load()
        reloads.append(time.perf_counter() - started)
        started = time.perf_counter()
        apply_mask(masks["a"], base, folder / "applied", overwrite=True, check_base=False)
        applied.append(time.perf_counter() - started)
    seconds = {n: statistics.median(v) for n, v in (("switch", switches[1:]), ("reload", reloads), ("apply", applied))}
    found: Result = {f"seconds of a {n}": round(s, 4) for n, s in seconds.items()}
    return found | {
        "checkpoint MB": round(size / 1e6),
        "reload / switch": round(seconds["reload"] / seconds["switch"], 2),
    }


# -- pieces ------------------------------------------------------------------------------------------------------------


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def measured_memory() -> Iterator[Result]:
    """Peak GiB on the card, filled in when the block ends; nothing on a CPU."""
    found: Result = {}
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield found
    finally:
        if DEVICE == "cuda":
            found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def small_checkpoint(path: Path, shape: str = "tiny") -> Path:
    from transformers import LlamaConfig

    if not (path / "config.json").exists():
        tokenizer = tiny_tokenizer()
        words = {"vocab_size": len(tokenizer)} if shape == "tiny" else {"vocab_size": 32000}
        config = LlamaConfig(**SHAPES[shape], **words, max_position_embeddings=512, pad_token_id=0)
        random_checkpoint(path, config, tokenizer, dtype="float32" if shape == "tiny" else "bfloat16")
    return path


def random_mask(base: Path, seed: int) -> Mask:
    checkpoint = Checkpoint.open(base)
    draw = torch.Generator().manual_seed(seed)
    names = [n for n in checkpoint.names if n.endswith("proj.weight")]
    return Mask.from_bools({n: (torch.rand(checkpoint.entry(n).shape, generator=draw) < 0.9).numpy() for n in names})


def sections(shape: str, folder: Path) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What is done, in order: title and work."""
    size, tokens = (1 << 16, 64) if shape == "tiny" else (45_000_000, 2048)
    last = SHAPES[shape]["num_hidden_layers"] - 1
    yield "check: the CPU's mask from the same gradients", same_mask_as_the_cpu
    yield "check: the CPU's cut", same_cut_as_the_cpu
    yield "check: resume, bfloat16, 8-bit moments", lambda: resume_and_types(folder)
    yield "check: switching while generating", lambda: switching_while_generating(folder)
    four, every = f"{max(0, last - 3)}-{last}", ("mask", "fft", "released")
    yield "the cut", lambda: cut(size)
    yield "a step, four layers", lambda: training_step(shape, tokens, four, every, 5)
    yield "a step, four layers, a quarter of the tokens", lambda: training_step(shape, tokens // 4, four, every, 5)
    room = most_layers(shape, tokens)
    yield f"a step, layers {room}", lambda: training_step(shape, tokens, room, ("mask", "fft"), 3)
    yield "switching and applying", lambda: switch_and_apply(folder, "tiny" if shape == "tiny" else "small")


def page(results: dict[str, Result], facts: Result) -> str:
    """The results as Markdown."""
    lines = [
        "# On a GPU",
        "",
        f"`python benchmarks/gpu.py` on {facts['gpu'] or 'no GPU: this shows only that it runs'}.",
        "",
    ]
    for title, found in results.items():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for key, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" if v is not True else k for k, v in value.items())
            lines.append(f"- {key}: {', '.join(value) if isinstance(value, list) else value}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama7b" if DEVICE == "cuda" else "tiny")
    parser.add_argument("--minutes", type=float, default=10, help="no section begins after so many")
    parser.add_argument("--out", type=Path, help="directory of gpu.json and gpu.md instead of benchmarks/results")
    arguments = parser.parse_args()
    started, failed = time.monotonic(), False
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as d:
        for title, work in sections(arguments.shape, Path(d)):
            begun = time.monotonic()
            if begun - started > 60 * arguments.minutes:
                results[title] = {"skipped": "no time left"}
                continue
            try:
                results[title] = work()
            except Exception as e:  # the other sections are still worth having
                traceback.print_exc()
                failed, results[title] = True, {"FAILED": f"{type(e).__name__}: {e}"}
            results[title]["took seconds"] = round(time.monotonic() - begun, 1)
            print(f"{title}: {results[title]}", flush=True)
    facts = machine()
    if arguments.out:
        common.RESULTS = arguments.out
    name = "gpu" if DEVICE == "cuda" else "gpu_cpu"
    common.write(name, {"shape": arguments.shape, "results": results, "machine": facts})
    (common.RESULTS / f"{name}.md").write_text(page(results, facts), encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
