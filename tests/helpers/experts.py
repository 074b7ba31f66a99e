"""Fine-tunes of one tiny base, each a little better at a domain of its own, and rows of these domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.tiny_models import tiny_checkpoint

DOMAINS = ("count", "letters", "say")


def domain_rows(name: str, count: int = 40) -> list[dict[str, str]]:
    """Prompt and completion, which a tiny model learns a little of within a few steps."""
    rows = []
    for i in range(count):
        if name == "count":
            said = " ".join(str(j) for j in range(i, i + 4))
        elif name == "letters":
            said = " ".join(chr(97 + (i + j) % 26) for j in range(5))
        else:
            said = f"{name}, yes, {i} it is"
        rows.append({"prompt": f"{name} {i}", "completion": said})
    return rows


def make_experts(
    folder: Path,
    architecture: str = "llama",
    *,
    dtype: str = "float32",
    names: tuple[str, ...] = DOMAINS,
    layers: tuple[int, ...] = (2, 3),
    steps: int = 12,
    **options: Any,
) -> Path:
    """Write base/, one directory a domain and NAME.jsonl into `folder`. layers: what is fine-tuned; (): everything."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mftmerge.data import tokenize
    from mftmerge.loss import padded, token_losses

    folder.mkdir(parents=True, exist_ok=True)
    tiny_checkpoint(folder / "base", architecture, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for name in names:
        rows = domain_rows(name)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        parts = [f".{n}." for n in layers]
        tuned = [p for n, p in model.named_parameters() if not layers or any(part in n for part in parts)]
        optimizer = torch.optim.AdamW(tuned, lr=3e-3, weight_decay=0.0)
        tokens = tokenize(rows, tokenizer, 256)
        for step in range(steps):
            ids, labels, _ = padded([tokens[(8 * step + i) % len(tokens)] for i in range(8)])
            token_losses(model, ids, labels)[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def open_recipe(folder: Path, *, method: str = "task_arithmetic", rows: int = 20, **document: Any) -> Path:
    """A recipe with an open mask on each expert."""
    import yaml

    models = []
    for name in sorted(p.stem for p in folder.glob("*.jsonl")):
        entry: dict[str, Any] = {"model": name, "mask": {"learn": {"data": f"{name}.jsonl", "rows": rows}}}
        models.append(entry | ({"parameters": {"weight": 1.0}} if method == "task_arithmetic" else {}))
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump({"merge_method": method, "base_model": "base", "models": models} | document))
    return path
