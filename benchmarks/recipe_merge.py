"""Claim: `mftmerge build` against stock mergekit-yaml (and against mergekit-yaml, then apply) on a 1 GB checkpoint.

Wall time, processor time and peak anonymous memory of whole processes, start-up included, all sides interleaved in one
run. On a busy machine only processor time says what the work is, and only an idle one shows what threads gain.
`--before DIR` measures an older checkout of this program beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import RESULTS, machine, write

from mftmerge.checkpoint import Checkpoint
from mftmerge.checkpointwriter import CheckpointWriter
from mftmerge.mask import Mask

# Times faster than stock, times less memory.
TARGETS = {
    "linear": (2.7, 4),
    "task_arithmetic": (2.7, 4),
    "masked": (2.7, 4),
    "slerp": (1.5, 4),
    "dare_ties": (1.5, 4),
    "ties": (3, 4),
}
TARGETS |= dict.fromkeys(("della", "breadcrumbs", "nuslerp", "model_stock", "sce", "karcher", "multislerp"), (1.5, 4))


def make_model(path: Path, seed: int, hidden: int, layers: int, vocabulary: int) -> None:
    """A bf16 Llama checkpoint of random weights, with no tokenizer."""
    rng, wide = np.random.default_rng(seed), hidden * 11 // 4
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + f"self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {p + f"mlp.{n}_proj.weight": (wide, hidden) for n in ("up", "gate")}
        shapes |= {p + "mlp.down_proj.weight": (hidden, wide)}
        shapes |= {p + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    writer = CheckpointWriter(path, shapes)
    for name, shape in shapes.items():
        values = rng.standard_normal(int(np.prod(shape)), np.float32) * 0.02
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        writer.add(name, "BF16", shape, raw.view(np.uint8).data)
    writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))


def measure(command: list[str], path: Path | None = None) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak anonymous megabytes (sampled every 10 ms) of a process.

    path: where it finds mftmerge.
    """
    started, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd="/")
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            row = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
            peak = max(peak, int(row.split()[1]))
        except (OSError, StopIteration):
            pass
        time.sleep(0.01)
    wall = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{command}: {process.stderr.read().decode()[-2000:] if process.stderr else ''}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak / 1000


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def stock(config: Path, out: Path) -> list[str]:
    """Stock mergekit-yaml."""
    return python(
        "from mergekit.scripts.run_yaml import main; "
        f"main(args=[{str(config)!r}, {str(out)!r}, '--quiet', '--random-seed', '1', '--no-copy-tokenizer'], "
        "standalone_mode=False)"
    )


def ours(recipe: Path, out: Path, *more: str) -> list[str]:
    return python(
        f"from mftmerge.cli import main; main(['build', {str(recipe)!r}, '-o', {str(out)!r}, *{list(more)!r}])"
    )


def equal(a: Path, b: Path) -> tuple[int, int]:
    """Weights compared, and how many differ in their bits."""
    x, y = Checkpoint.open(a), Checkpoint.open(b)
    assert x.names == y.names
    sizes = [(x.entry(n).size, int(np.count_nonzero(x.read(n) != y.read(n)))) for n in x.names]
    return sum(s for s, _ in sizes), sum(d for _, d in sizes)


def configuration(case: str, models: Path) -> dict[str, Any]:
    """The mergekit configuration of a case."""
    method = "task_arithmetic" if case == "masked" else case
    parameters = {"weight": 0.5} | ({"density": 0.5} if case in ("ties", "dare_ties", "della", "breadcrumbs") else {})
    if case == "della":
        parameters["epsilon"] = 0.1
    inputs = [{"model": str(models / n), "parameters": parameters} for n in ("a", "b")]
    if case == "slerp":
        return {"merge_method": case, "base_model": inputs[0]["model"], "models": inputs, "parameters": {"t": 0.3}}
    if case in ("model_stock", "sce", "karcher"):
        inputs = [{"model": i["model"]} for i in inputs]
    return {"merge_method": method, "models": inputs} | (
        {} if case in ("linear", "karcher") else {"base_model": str(models / "base")}
    )


def run_case(case: str, work: Path, models: Path, repeats: int, before: Path | None) -> dict[str, Any]:
    """Interleaved runs of one case: stock mergekit, this program, and an older checkout of it."""
    config = configuration(case, models)
    if case == "slerp":
        for item in config["models"]:
            del item["parameters"]
    (work / "config.yml").write_text(yaml.safe_dump(config))
    recipe = config | ({"mask": str(models / "a.mask")} if case == "masked" else {})
    (work / "recipe.yml").write_text(yaml.safe_dump(recipe))
    apply = python(
        f"from mftmerge import apply_mask; apply_mask({str(models / 'a.mask')!r}, {str(work / 'stock')!r}, "
        f"{str(work / 'applied')!r}, check_base=False)"
    )
    seed = ["--seed", "1"]
    sides: dict[str, tuple[list[str], Path | None]] = {
        "mergekit": (stock(work / "config.yml", work / "stock"), None),
        "ours": (ours(work / "recipe.yml", work / "ours", *seed), None),
    }
    if before:
        sides["before"] = ours(work / "recipe.yml", work / "before", *seed), before
    times: dict[str, list[float]] = {s: [] for s in sides}
    processor: dict[str, list[float]] = {s: [] for s in sides}
    memory: dict[str, list[float]] = {s: [] for s in sides}
    for _ in range(repeats):
        for side, (command, path) in sides.items():
            for name in ("stock", "applied") if side == "mergekit" else (side,):
                shutil.rmtree(work / name, ignore_errors=True)
            wall, work_done, peak = measure(command, path)
            if case == "masked" and side == "mergekit":
                more, more_done, peak_apply = measure(apply)
                wall, work_done, peak = wall + more, work_done + more_done, max(peak, peak_apply)
            times[side].append(wall)
            processor[side].append(work_done)
            memory[side].append(peak)
    result: dict[str, Any] = {
        s: {
            "seconds": round(statistics.median(times[s]), 2),
            "processor seconds": round(statistics.median(processor[s]), 2),
            "megabytes": round(statistics.median(memory[s])),
        }
        for s in sides
    }
    base = result["mergekit"]
    for side in sides:
        if side != "mergekit":
            result[side]["times faster"] = round(base["seconds"] / result[side]["seconds"], 2)
            result[side]["times less processor time"] = round(
                base["processor seconds"] / result[side]["processor seconds"], 2
            )
            result[side]["times less memory"] = round(base["megabytes"] / result[side]["megabytes"], 2)
    compared, different = equal(work / ("applied" if case == "masked" else "stock"), work / "ours")
    result["weights compared"], result["weights that differ"] = compared, different
    result["load average"] = round(os.getloadavg()[0], 1)
    result["repeats"], result["target"] = repeats, dict(zip(("time", "memory"), TARGETS[case], strict=True))
    return result


def verdict(result: dict[str, Any]) -> str:
    """A case's figures beside its targets."""
    ours, target, differ = result["ours"], result["target"], result["weights that differ"]
    rows = [(n, ours[n], t) for n, t in (("times faster", target["time"]), ("times less memory", target["memory"]))]
    text = ", ".join(f"{n} {v:.2f} (target {t}: {'met' if v >= t else 'NOT met'})" for n, v, t in rows)
    return f"{text}, times less processor time {ours['times less processor time']:.2f}, {differ} weights differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a 70 MB checkpoint, one repeat, nothing saved")
    parser.add_argument("--small", action="store_true", help="a 270 MB checkpoint, results of its own")
    parser.add_argument("--case", choices=list(TARGETS), action="append", help="only these; merged into the results")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path, help="an older checkout of this program, to measure too")
    arguments = parser.parse_args()
    shape = (512, 6, 16000) if arguments.quick else (1024, 8, 16000) if arguments.small else (2048, 8, 32000)
    name = "recipe_merge_small" if arguments.small else "recipe_merge"
    with tempfile.TemporaryDirectory(prefix="recipe-merge-") as folder:
        models = Path(folder) / "models"
        for i, model in enumerate(("base", "a", "b")):
            make_model(models / model, i, *shape)
        checkpoint, rng = Checkpoint.open(models / "a"), np.random.default_rng(9)
        names = [n for n in checkpoint.names if "proj" in n]
        Mask.from_bools({n: rng.random(checkpoint.entry(n).shape, np.float32) < 0.9 for n in names}).save(
            models / "a.mask"
        )
        nbytes = sum(e.nbytes for e in checkpoint)
        last = RESULTS / f"{name}.json"
        found = {} if arguments.quick or not last.exists() else json.loads(last.read_text())["cases"]
        for case in arguments.case or TARGETS:
            work = Path(folder) / case
            work.mkdir()
            found[case] = run_case(case, work, models, 1 if arguments.quick else arguments.repeats, arguments.before)
            shutil.rmtree(work)
            print(f"{case:16s} {verdict(found[case])}", flush=True)
    about = {
        "checkpoint bytes": nbytes,
        **machine(),
        "versions": {p: version(p) for p in ("torch", "numpy", "mergekit")},
        "cases": found,
    }
    if not arguments.quick:
        write(name, about)


if __name__ == "__main__":
    main()
