"""Sound and broken inputs for every command of the program, and one command line each that works."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import mftmerge

# A sound command line: {name:kind} is one of the inputs, {name:out} something in the working directory.
WORKING = {
    "quickstart": "{try:out} --tiny",
    "train": "--model {model:model} --data {rows.jsonl:rows} -o {new.mask:out} --config {train.yml:settings} --steps 1",
    "rebase": "{a.mask:mask} --model {model:model} --data {rows.jsonl:rows} -o {new.mask:out}",
    "combine": "{a.mask:mask} {b.mask:mask} -o {new.mask:out}",
    "choose": "a={a.mask:mask} b={b.mask:mask} --model {model:model} -o {new.mask:out}"
    " --data a={rows.jsonl:rows} --data b={rows.jsonl:rows}",
    "inspect": "{a.mask:mask}",
    "compare": "{a.mask:mask} {b.mask:mask}",
    "apply": "{a.mask:mask} --model {model:model} -o {new:out}",
    "build": "{recipe.yml:recipe} -o {new:out}",
    "export": "{recipe.yml:recipe} -o {new:out}",
    "eval": "--model {model:model} --mask {a.mask:mask} --data {rows.jsonl:rows}",
    "import": "{foreign.safetensors:foreign} --model {model:model} -o {new.mask:out}",
    "diff-mask": "{model:model} {tuned:model} --keep 0.1 -o {new.mask:out}",
    "import-recipe": "{plain.yml:recipe} -o {new.yml:out}",
    "mergekit-yaml": "{plain.yml:recipe} {new:out} --quiet",
    "sweep": "{sweep.yml:sweep} -o {new:out}",
    "patch": "--model {model:model} --to {a.mask:mask} -o {new.patch.safetensors:out}",
    "patch-apply": "{ab.patch.safetensors:patch} --model {model:model} -o {new:out}",
    "serve": "--model {model:model} --mask a={a.mask:mask} --check",
    "init": "{new.yml:out}",
    "run": "{job.yml:job} -o {new:out}",
    "chat": "--model {model:model} --mask {a.mask:mask} --prompt hello --max-new-tokens 2",
    "push": "{a.mask:mask} me/code-mask --base org/base --dry-run",
    "report": "{results:results} -o {new.html:out}",
}
SLOT = re.compile(r"\{([^:}]+):(\w+)\}")
INPUTS = ("mask", "rows", "recipe", "settings", "sweep", "foreign", "model", "results", "patch", "job")

RECIPE = "merge_method: linear\nmodels:\n- model: {model}\n  parameters: {{weight: 1.0}}\n"
SWEEP = """model: {model}
train: rows.jsonl[0:6]
validation: rows.jsonl[6:8]
test: {{near: "rows.jsonl[8:10]"}}
settings: {{steps: 1, batch_size: 2}}
grid: {{lr: [0.001]}}
seeds: [0]
"""

JOB = """model: {model}
domains:
  near: {{train: "rows.jsonl[0:6]", validation: "rows.jsonl[6:8]", test: "rows.jsonl[8:10]"}}
train: {{steps: 1, batch_size: 2}}
"""


def command_line(command: str, here: Path, place: Path, **instead: str) -> list[str]:
    """Arguments of a command that works, with other values for some of the slots; outputs are in `place`."""

    def value(match: re.Match[str]) -> str:
        if match[1] in instead:
            return instead[match[1]]
        return str((place if match[2] == "out" else here) / match[1])

    return [command, *(SLOT.sub(value, word) for word in WORKING[command].split())]


def make_inputs(here: Path, tiny: Callable[..., Path]) -> Path:
    """Write into `here` what the command lines above read."""
    for name, seed in (("model", 0), ("tuned", 1)):
        shutil.copytree(tiny("llama", layers=2, seed=seed), here / name)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (160, 64) for i in (0, 1)}
    for seed, name in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        scores = {n: rng.random(s, np.float32) for n, s in shapes.items()}
        mask = mftmerge.Mask.from_bools({n: s > 0.1 for n, s in scores.items()}, scores=scores)
        mask.save(here / f"{name}.mask")
    (here / "results").mkdir()
    shutil.copy(here / "a.mask", here / "results")
    rows = [{"prompt": f"{i} + {i}", "completion": f"it is {2 * i}"} for i in range(10)]
    (here / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (here / "train.yml").write_text("batch_size: 2\nmax_length: 64\n")
    (here / "plain.yml").write_text(RECIPE.format(model=here / "model"))
    (here / "recipe.yml").write_text(RECIPE.format(model=here / "model") + "mask: a.mask\n")
    (here / "sweep.yml").write_text(SWEEP.format(model=here / "model"))
    (here / "job.yml").write_text(JOB.format(model=here / "model"))
    from safetensors.numpy import save_file

    from mftmerge.patch import mask_patch

    mask_patch(here / "model", None, here / "a.mask").save(here / "ab.patch.safetensors")
    save_file({n: np.ones(s, np.bool_) for n, s in shapes.items()}, here / "foreign.safetensors")
    return here


def broken(here: Path) -> dict[str, dict[str, str]]:
    """Write what must be refused. Kind -> {what is wrong with it: its path}; "any" goes for every kind."""
    here.mkdir()
    found: dict[str, dict[str, str]] = {}

    def add(kind: str, what: str, content: bytes | str, ending: str) -> None:
        path = here / f"{kind}-{what.replace(' ', '-')}{ending}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        found.setdefault(kind, {})[what] = str(path)

    names = {
        "missing": str(here / "absent"),
        "line break in the name": "./one\ntwo",
        "escape sequence in the name": "./\x1b[31mred\x1b[0m\r\x07",
        "bytes that are no text in the name": "./\udcff\udcfe",
        "NUL in the name": "./a\0b",
        "long name": "./" + "x" * 5000,
        "no name": "",
        "device": "/dev/null",
    }
    noise = bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))
    endings = {
        "mask": ".mask",
        "rows": ".jsonl",
        "recipe": ".yml",
        "settings": ".yml",
        "sweep": ".yml",
        "job": ".yml",
        "foreign": ".safetensors",
        "model": "",
        "results": "",
        "patch": ".patch.safetensors",
    }
    for kind, ending in endings.items():
        found[kind] = {what: name + (ending if what == "missing" else "") for what, name in names.items()}
        (here / f"{kind}-directory{ending}").mkdir()
        found[kind]["empty directory"] = str(here / f"{kind}-directory{ending}")
        add(kind, "empty", "", ending)
        add(kind, "noise", noise, ending)
        add(kind, "only NUL", bytes(100), ending)
        add(kind, "Latin 1", "grün: böse\n".encode("latin-1"), ending)
    _masks(here, add)
    _rows(add)
    for kind in ("recipe", "settings", "sweep", "job"):
        _yaml(kind, add)
    _models(here, found["model"])
    return found


def _masks(here: Path, add: Callable[..., None]) -> None:
    whole = (here.parent / "a.mask").read_bytes()
    add("mask", "truncated", whole[: len(whole) // 2], ".mask")
    add("mask", "only a header length", (1 << 62).to_bytes(8, "little"), ".mask")
    add("mask", "more at the end", whole + b"x", ".mask")
    add("mask", "another kind of safetensors", (here.parent / "foreign.safetensors").read_bytes(), ".mask")
    add("mask", "flipped bit in its header", whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], ".mask")
    foreign = (here.parent / "foreign.safetensors").read_bytes()
    add("foreign", "truncated", foreign[:-1], ".safetensors")
    add("foreign", "neither 0 nor 1", foreign[:-1] + b"\x07", ".safetensors")
    add("foreign", "pickle that runs code", b"cos\nsystem\n(S'touch run-by-a-pickle'\ntR.", ".pt")


def _rows(add: Callable[..., None]) -> None:
    good = '{"prompt": "a", "completion": "b"}\n'
    for what, line in {
        "broken line": '{"prompt": "a", "comple',
        "a list": '["a", "b"]',
        "a number": "7",
        "no assistant text": '{"messages": [{"role": "user", "content": "a"}]}',
        "empty answer": '{"prompt": "a", "completion": " "}',
        "messages that are no list": '{"messages": 3}',
        "messages of numbers": '{"messages": [1, 2]}',
        "content that is a number": '{"messages": [{"role": "assistant", "content": 5}]}',
        "message without role": '{"messages": [{"content": "a"}]}',
        "completion that is a number": '{"prompt": "a", "completion": 5}',
        "text that is null": '{"text": null}',
        "other keys": '{"question": "a", "\\u001b[31manswer\\n": "b"}',
        "deep nesting": "[" * 100_000,
        "template arguments that are a list": '{"prompt": "a", "completion": "b", "chat_template_kwargs": [5]}',
        "tools that are words": '{"prompt": "a", "completion": "b", "tools": "hammer"}',
        "calls that are a number": '{"messages": [{"role": "assistant", "tool_calls": 5}]}',
        "call of a number": '{"messages": [{"role": "assistant", "tool_calls": [{"function": 5}]}]}',
        "weight that is text": '{"messages": [{"role": "assistant", "content": "a", "weight": "b"}]}',
        "speaker that is a list": '{"conversations": [{"from": ["human"], "value": "a"}]}',
        "lone surrogate": '{"text": "\\ud800"}',
    }.items():
        add("rows", what, good * 9 + line + "\n", ".jsonl")
    add("rows", "broken JSON list", "[1, 2", ".json")
    add("rows", "Latin 1 JSON list", '["grün"]'.encode("latin-1"), ".json")
    add("rows", "broken Parquet", b"PAR1" + bytes(100) + b"PAR1", ".parquet")


def _yaml(kind: str, add: Callable[..., None]) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n"
    for what, text in {
        "list at top": "- a\n- b\n",
        "text at top": "just words\n",
        "broken": "a: [1, 2\nb: }\n",
        "tab": "a:\n\t- b\n",
        "Python tag": "a: !!python/object/apply:os.system ['touch run-by-a-yaml']\n",
        "unknown tag": "model: !secret x\n",
        "alias to nothing": "model: *nothing\n",
        "bomb of aliases": bomb + "model: *i\nkeep: *i\nmerge_method: *i\nmodels: *i\n",
        "alias to itself": "model: &m [*m]\nkeep: *m\nmerge_method: linear\nmodels: &a [*a]\n",
        "deep nesting": "a: " + "[" * 400 + "]" * 400 + "\n",
        "mapping as key": "? {a: 1}\n: 2\n",
        "unknown key": "merge_methid: linear\n",
        "control character": "a: \x07\n",
        "escaped control characters": 'model: "\\e[31m\\n"\nmerge_method: "\\e[31m\\n"\nkeep: "\\e[31m\\n"\n',
        "two documents": "keep: 0.9\n---\nkeep: 0.8\n",
        "a date": "2020-01-01\n",
    }.items():
        add(kind, what, text, ".yml")


def _models(here: Path, found: dict[str, str]) -> None:
    """Directories that are almost checkpoints."""
    model = here.parent / "model"
    index = "model.safetensors.index.json"

    def variant(what: str) -> Path:
        path = here / f"model-{what.replace(' ', '-')}"
        shutil.copytree(model, path)
        found[what] = str(path)
        return path

    (variant("no config") / "config.json").unlink()
    (variant("config that is no JSON") / "config.json").write_text('{"model_type": \n')
    (variant("config that is a list") / "config.json").write_text("[1]")
    (variant("config of an unknown kind") / "config.json").write_text('{"model_type": "no_such_model"}')
    sizes = json.loads((model / "config.json").read_text())
    (variant("size that is text") / "config.json").write_text(json.dumps(sizes | {"hidden_size": "x"}))
    (variant("heads that do not divide") / "config.json").write_text(json.dumps(sizes | {"num_attention_heads": 3}))
    looped = variant("config that is a link to itself") / "config.json"
    looped.unlink()
    looped.symlink_to(looped.name)
    pickled = variant("pickle that runs code")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch run-by-a-pickle'\ntR.")
    (variant("no tokenizer") / "tokenizer.json").unlink()
    (variant("no weights") / "model.safetensors").unlink()
    weights = variant("truncated weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = variant("weights of noise") / "model.safetensors"
    weights.write_bytes(b"\xff" * 1000)
    weights = variant("empty weights") / "model.safetensors"
    weights.write_bytes(b"")
    path = variant("link outside")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(model / "model.safetensors")
    for what, name in {
        "index that points outside": "../../model/model.safetensors",
        "index with an absolute path": str(model / "model.safetensors"),
        "index of pickles": "pytorch_model.bin",
        "index of an absent shard": "model-00001-of-00002.safetensors",
    }.items():
        path = variant(what)
        (path / "model.safetensors").unlink()
        (path / index).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    for what, text in {"index that is no JSON": "{", "index that is a list": "[]", "empty index": "{}"}.items():
        path = variant(what)
        (path / "model.safetensors").unlink()
        (path / index).write_text(text)
