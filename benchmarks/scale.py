"""What a 7B or 8B model needs: the arithmetic behind docs/scale.md, and its check against runs of small models.

    python benchmarks/scale.py              # the tables of docs/scale.md, in Markdown; seconds, no model is made
    python benchmarks/scale.py --measure    # peak memory of small runs on this CPU against the same arithmetic

`docs/generate.py` puts the tables into the page. The memory is that of `mftmerge.train.memory`, by which
`mftmerge train` refuses what will not fit. Only the table of operations assumes a speed; no GPU has run any of this.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, machine, write

from mftmerge.train.memory import Need, Tensor, need
from mftmerge.train.settings import RUN_KEYS, TrainSettings

GB = 1e9
CONFIGS: dict[str, dict[str, int]] = {
    "LLaMA2-7B": {"layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "vocab": 32000, "kv": 4096},
    "LLaMA3.1-8B": {"layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab": 128256, "kv": 1024},
}
SCOPES = {"last 4": "28-31", "4-7": "4-7", "all 32": "0-31"}
ASSUMED = {"24 GB card": 60e12, "80 GB card": 400e12}  # operations a second that a step reaches: an assumption


def tensors(shape: dict[str, int]) -> list[Tensor]:
    """Names, shapes and dtypes of a Llama checkpoint in bfloat16."""
    hidden, inner, kv = shape["hidden_size"], shape["intermediate_size"], shape["kv"]
    found = [("model.embed_tokens.weight", (shape["vocab"], hidden)), ("lm_head.weight", (shape["vocab"], hidden))]
    for i in range(shape["layers"]):
        at = f"model.layers.{i}"
        found += [(f"{at}.self_attn.{n}_proj.weight", (hidden, hidden)) for n in "qo"]
        found += [(f"{at}.self_attn.{n}_proj.weight", (kv, hidden)) for n in "kv"]
        found += [(f"{at}.mlp.{n}_proj.weight", (inner, hidden)) for n in ("gate", "up")]
        found += [(f"{at}.mlp.down_proj.weight", (hidden, inner))]
    return [(name, size, "BF16") for name, size in found]


def needed(model: str, **settings: Any) -> Need:
    shape = CONFIGS[model]
    return need(tensors(shape), shape | {"num_attention_heads": 32}, TrainSettings.make(settings))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gb(size: float) -> str:
    return f"{size / GB:.1f}" if size < 99.95 * GB else f"{size / GB:.0f}"


def training_table() -> str:
    """GB of weights and of what training adds, on the device and beside it."""
    rows = []
    for model in CONFIGS:
        for scope, layers in SCOPES.items():
            wide, narrow = (needed(model, layers=layers, adam_bits=bits) for bits in (32, 8))
            scores = needed(model, layers=layers, scores=True)
            sizes = (wide.weights, wide.training, narrow.training, wide.step, wide.host, scores.host)
            rows.append([model, scope, f"{wide.training / 16e6:,.0f} M", *map(gb, sizes)])
    header = ["model", "masked layers", "masked weights", "weights", "training", "training, `adam_bits: 8`"]
    return table([*header, "room of a step", "host", "host, `scores: true`"], rows)


def activations_table() -> str:
    """GB that one row takes in a forward and backward pass."""
    rows = []
    for model in CONFIGS:
        for scope, layers in SCOPES.items():
            cells = []
            for length in (512, 2048, 4096):
                common = {"layers": layers, "batch_size": 1, "max_length": length}
                without = needed(model, **common)
                with_ = needed(model, **common, gradient_checkpointing=True)
                cells.append(f"{gb(without.activations)} / {gb(with_.activations)} ({gb(without.logits)})")
            rows.append([model, scope, *cells])
    return table(["model", "masked layers", "512 tokens", "2048 tokens", "4096 tokens"], rows)


def setups() -> dict[str, dict[str, Any]]:
    """The settings files in docs/scale.md, by their first line."""
    page = (Path(__file__).parent.parent / "docs/scale.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n# (.*?)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return {name: yaml.safe_load(text) for name, text in blocks}


def setups_table() -> str:
    """GB on each card and in the computer's memory for the settings files in docs/scale.md."""
    rows = []
    for name, values in setups().items():
        settings = {k: v for k, v in values.items() if k not in RUN_KEYS}
        shards = int(name.split()[0]) if "FSDP2" in name else 1
        cells = [name]
        for model in CONFIGS:
            found = needed(model, **settings)
            ends = 4 * CONFIGS[model]["vocab"] * CONFIGS[model]["hidden_size"]  # embeddings and head
            layer = (found.weights - ends) / CONFIGS[model]["layers"]
            whole = ends + 3 * layer if shards > 1 else 0  # gathered: the ends, a layer, its gradient, the next layer
            total = (found.weights + found.training) / shards + whole + found.working
            cells += [gb(total), gb(max(found.weights, found.host))]
        rows.append(cells)
    return table(["setup", "LLaMA2-7B", "host, each process", "LLaMA3.1-8B", "host, each process"], rows)


def operations(model: str, layers: str, tokens: int, rows_seen: int, cached: bool, checkpointing: bool) -> float:
    """Multiplications and additions of one training run over `rows_seen` rows of `tokens` tokens, without attention.

    Two for each weight and token that a product meets. Forward and the gradient of the activations pass all layers from
    the first masked one on and the head; the gradient of the weights is formed for masked matrices. Layers below run
    once a row where they are cached (not counted here), else in every forward pass.
    """
    shape = CONFIGS[model]
    per_layer = sum(s[0] * s[1] for n, s, _ in tensors(shape) if ".layers.0." in n)
    first, last = map(int, layers.split("-"))
    above, masked = shape["layers"] - first, last - first + 1
    head = shape["vocab"] * shape["hidden_size"]
    passes = (3 if checkpointing else 2) * above * per_layer + 2 * head + masked * per_layer
    return 2.0 * rows_seen * tokens * (passes + (0 if cached else first * per_layer))


def time_table() -> str:
    """Operations of 10,000 rows of 512 tokens, and minutes at the assumed speeds."""
    rows = []
    for model in CONFIGS:
        for scope, layers in SCOPES.items():
            for cached in (False, True) if scope != "all 32" else (False,):
                total = operations(model, layers, 512, 10_000, cached, True)
                minutes = [f"{total / speed / 60:.0f} min" for speed in ASSUMED.values()]
                rows.append([model, scope, "cached" if cached else "run each time", f"{total / 1e15:,.0f}", *minutes])
    header = [f"{name} at {speed / 1e12:.0f} Tflop/s" for name, speed in ASSUMED.items()]
    return table(["model", "masked layers", "layers below", "operations / 10^15", *header], rows)


def files_table() -> str:
    """Sizes of mask files, and seconds of applying one at the measured speed."""
    apply = json.loads((RESULTS / "apply_speed.json").read_text())["disk"]
    copied = apply["gigabytes"] / apply["median seconds"]["all layers"]
    sizes = json.loads((RESULTS / "mask_size.json").read_text())["rows"]
    archived = next(
        r["value"] for r in sizes if r["case"].startswith("density 0.9,") and r["case"].endswith("archived")
    )
    rows = []
    for model in CONFIGS:
        weights = needed(model, layers="0-31").weights
        for scope, layers in SCOPES.items():
            masked = needed(model, layers=layers).training / 16
            files = [masked / 8, masked * archived / 8, masked * (8 + 1 / 8)]
            rows.append([model, scope, *(f"{s / 1e6:,.0f} MB" for s in files), f"{weights / GB / copied:.0f} s"])
    return table(["model", "masked layers", "mask", "archived, density 0.9", "with `scores`", "apply"], rows)


def speeds() -> str:
    """Seconds of building at the measured speeds, and the size of cached states."""
    builds = json.loads((RESULTS / "recipe_merge.json").read_text())
    result = builds["checkpoint bytes"] / GB
    linear, masked = (result / builds["cases"][k]["ours"]["seconds"] for k in ("linear", "masked"))
    whole = needed("LLaMA2-7B", layers="0-31").weights / GB
    cached = ", ".join(f"{n:,} rows {gb(n * 512 * 8192)} GB" for n in (1000, 10_000, 60_000))
    return (
        f"Building wrote {linear:.2f} GB/s of result (linear, two models) and {masked:.2f} (task arithmetic, a mask "
        f"on the result): {whole / linear:.0f} and {whole / masked:.0f} s for LLaMA2-7B.\n\n"
        f"Cached states of the layers below the first masked one take 2 x 4096 bytes a token; of 512 tokens: {cached}."
    )


def measured_table() -> str:
    """Peak memory of small runs against the estimate, as `--measure` found it."""
    found = json.loads((RESULTS / "scale.json").read_text())["peak memory of a run"]
    rows = [[name, *(str(run[key]) for key in ("measured MB", "estimated MB", "ratio"))] for name, run in found.items()]
    return table(["run", "measured, MB", "estimated, MB", "ratio"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "training": training_table,
    "activations": activations_table,
    "setups": setups_table,
    "time": time_table,
    "files": files_table,
    "speeds": speeds,
    "measured": measured_table,
}


# -- the check against runs -------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
EVERY = {"layers": "0-3", "dtype": "float32", "batch_size": 2, "max_length": 256, "prefix": "off"}
RUNS: dict[str, dict[str, Any]] = {
    "last layer": EVERY | {"layers": "3"},
    "all layers": EVERY,
    "all layers, 8-bit moments": EVERY | {"adam_bits": 8},
    "all layers, bfloat16": EVERY | {"dtype": "bfloat16", "max_length": 128},
    "all layers, longer rows": EVERY | {"max_length": 1024},
    "the same with gradient checkpointing": EVERY | {"max_length": 1024, "gradient_checkpointing": True},
    "layers 0-1, normal scores, stored": EVERY | {"layers": "0-1", "init": "normal", "scores": True},
    "all layers, with the control": EVERY | {"control": True, "max_length": 64},
}


def measure() -> None:
    """Peak memory of small runs against the estimate."""
    # Blocks that are freed go back to the system at once, so that a run does not hide in what an earlier one left.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--runs"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    write("scale", {"peak memory of a run": json.loads(done.stdout.splitlines()[-1]), "machine": machine()})


def runs() -> None:
    """Train two steps with each settings; print the peak memory above that before it, and the estimate."""
    import gc

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mftmerge.quickstart.tiny import tiny_tokenizer
    from mftmerge.train.memory import estimate
    from mftmerge.train.run import train_mask

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        LlamaForCausalLM(LlamaConfig(vocab_size=8192, **SMALL)).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        warm = EVERY | {"layers": "3", "max_length": 8}
        for name, settings in {"": warm, **RUNS}.items():
            length = settings["max_length"]
            rows = [{"input_ids": [(7 * i + j) % 250 for j in range(length)]} for i in range(5)]
            rows = [r | {"labels": list(r["input_ids"])} for r in rows]
            chosen = TrainSettings.make(settings | {"steps": 2, "eval_rows": 1, "eval_share": 0.2})
            need = estimate(model, chosen)
            gc.collect()
            with watched() as peak:
                train_mask(model, rows, settings=chosen)
            if name:
                ratio = peak[0] / (need.device + need.host)
                megabytes = {
                    "measured MB": round(peak[0] / 1e6),
                    "estimated MB": round((need.device + need.host) / 1e6),
                }
                found[name] = megabytes | {"ratio": round(ratio, 2)}
                print(f"{name:38s} {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list whose one element is, afterwards, the peak of memory inside the block above that before it."""
    before, peak, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], resident() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def resident() -> int:
    """Bytes of this process in memory, those of mapped files included: a model that is loaded may be one."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run small models and compare")
    parser.add_argument("--runs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.runs:
        runs()
    elif options.measure:
        measure()
    else:
        print("\n\n".join(f"{(part.__doc__ or '').strip()}\n\n{part()}" for part in TABLES.values()))


if __name__ == "__main__":
    main()
