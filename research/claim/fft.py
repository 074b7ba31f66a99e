"""Full fine-tuning: `python -m research.claim.fft LAB --model DIR --data FOLDER wikisql gsm8k python [--seed 0]`.

All parameters of all layers, float32, AdamW (no decay of weights, gradients clipped to norm 1), warm-up of 5 % and
linear decay to zero, the learning rate from two short annealed runs on the first domain. LAB/fft-DOMAIN-sSEED is the
best state by validation loss, a plain checkpoint; beside it the state after a quarter of the steps (`-quarter`), and
with `--over` the state after `--over` more steps on a constant rate (`-over`). A run that was killed goes on where its
last state was saved.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from research.claim.common import (
    DOMAINS,
    Domain,
    Tokens,
    batches,
    load,
    losses,
    read_rows,
    row_losses,
    shared_start,
    write_json,
)

RATES = (1e-4, 3e-4)
PROBE = 10  # steps of the short runs that choose among RATES
VALIDATED = 64  # rows that choose the state
SAVED_EVERY = 20


class FineTuning:
    """One run, with its state on disk."""

    def __init__(self, place: Path, source: str, domain: Domain, rows: dict[str, list[Tokens]], seed: int) -> None:
        self.place, self.domain, self.seed = place, domain, seed
        self.model, self.tokenizer = load(source)
        self.rows = rows["train"]
        self.valid = rows["validation"][:VALIDATED]
        self.start = shared_start([*self.rows, *self.valid])
        self.state = Path(f"{place}.state")

    def loss(self) -> float:
        found = row_losses(self.model, self.valid, self.start)
        return float(found[:, 0].sum() / found[:, 1].sum())

    def run(self, rate: float, steps: int, *, save: bool = True, over: int = 0) -> list[dict[str, Any]]:
        """Train; gives the history. over: steps after the best state, on half the rate, for an over-fitted base."""
        parameters = list(self.model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
        history, step, lowest = [], 0, math.inf
        if save and (self.state / "state.pt").exists():
            saved = torch.load(self.state / "state.pt", weights_only=True)
            self.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            history, step, lowest = saved["history"], saved["step"], saved["lowest"]
        feed = batches(self.rows, self.domain.batch, f"{self.domain.name} {self.seed}")
        for _ in range(step):
            next(feed)
        warm = max(1, round(0.05 * steps))
        every = math.ceil(steps / 4)
        while step < steps + over:
            began = time.perf_counter()
            share = min(1.0, (step + 1) / warm) * min(1.0, (steps - step) / (steps - warm)) if step < steps else 0.5
            optimizer.param_groups[0]["lr"] = rate * share
            found, _ = losses(self.model, next(feed), self.start)
            optimizer.zero_grad()
            loss = found.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            entry: dict[str, Any] = {"step": step, "loss": float(loss.detach())}
            if (save and step % every == 0) or step == steps or step == steps + over:
                entry["validation"] = self.loss()
                if save and step <= steps and entry["validation"] < lowest:
                    lowest = entry["validation"]
                    self.keep("best")
            if save and step == math.ceil(steps / 4):
                self.keep("quarter")
            entry["seconds"] = round(time.perf_counter() - began, 1)
            history.append(entry)
            print(self.place.name, f"rate {rate:g}", entry, flush=True)
            if save and (step % SAVED_EVERY == 0 or "validation" in entry):
                self._save(optimizer, history, step, lowest)
        return history

    def keep(self, what: str) -> None:
        """The model as it is, as a plain checkpoint."""
        out, temporary = self.path(what), Path(f"{self.place}.new")
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)

    def path(self, what: str) -> Path:
        return Path(f"{self.place}.best" if what == "best" else f"{self.place}-{what}")

    def _save(self, optimizer: torch.optim.Optimizer, history: list[Any], step: int, lowest: float) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"history": history, "step": step, "lowest": lowest}, self.state / "new.pt")
        (self.state / "new.pt").rename(self.state / "state.pt")


def chosen_rate(lab: Path, source: str, domain: Domain, rows: dict[str, list[Tokens]]) -> float:
    """The rate with the lower validation loss after a short annealed run; the same for all domains."""
    path = lab / "rate.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for rate in RATES:
        if str(rate) not in found:
            short = FineTuning(lab / "probe", source, domain, rows, seed=0)
            found[str(rate)] = short.run(rate, PROBE, save=False)[-1]["validation"]
            write_json(path, found)
    return float(min(found, key=found.__getitem__))


def fine_tune(lab: Path, source: str, folder: Path, domain: Domain, seed: int) -> None:
    """One domain, unless it is there. The checkpoint gets its plain name once the run is over."""
    place = lab / f"fft-{domain.name}-s{seed}"
    if place.exists():
        return
    _, tokenizer = load(source)
    rows = {s: [tokens for _, tokens in found] for s, found in read_rows(domain, folder, tokenizer).items()}
    rate = chosen_rate(lab, source, domain, rows)
    run = FineTuning(place, source, domain, rows, seed)
    history = run.run(rate, domain.steps)
    facts = {"domain": domain.name, "seed": seed, "rate": rate, "steps": domain.steps, "batch": domain.batch}
    write_json(Path(f"{place}.json"), facts | {"rows": len(rows["train"]), "history": history})
    run.path("best").rename(place)


def over_fit(lab: Path, source: str, folder: Path, domain: Domain, seed: int, over: int) -> None:
    """Go on from the end of a run, unless that is there."""
    place = lab / f"fft-{domain.name}-s{seed}"
    if Path(f"{place}-over").exists():
        return
    _, tokenizer = load(source)
    rows = {s: [tokens for _, tokens in found] for s, found in read_rows(domain, folder, tokenizer).items()}
    run = FineTuning(place, source, domain, rows, seed)
    history = run.run(chosen_rate(lab, source, domain, rows), domain.steps, over=over)
    write_json(Path(f"{place}-over.json"), {"over": over, "history": history})
    run.keep("over")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lab", type=Path)
    parser.add_argument("domains", nargs="+", choices=list(DOMAINS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikisql/ and gsm8k/train.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--over", type=int, default=0, help="also this many steps past the end")
    options = parser.parse_args(given)
    options.lab.mkdir(parents=True, exist_ok=True)
    for name in options.domains:
        fine_tune(options.lab, options.model, options.data, DOMAINS[name], options.seed)
        if options.over:
            over_fit(options.lab, options.model, options.data, DOMAINS[name], options.seed, options.over)


if __name__ == "__main__":
    main()
