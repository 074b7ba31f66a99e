"""Search for a combination: operation, density (by layer too) and weights, proposed by optuna, guided by predictions.

A proposal is a candidate as `mftmerge choose --try` takes it, so that what is found is a command. Where predictions can
be had (`prediction`), many proposals are drawn and predicted at once, and those that are predicted best are measured
first; then optuna goes on from what was measured. All measurements go to a journal, a line each: a search that was
stopped proposes the same candidates again and takes from the journal what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.errors import BadInput
from mftmerge.evaluate.candidates import Candidate
from mftmerge.evaluate.prediction import Outlook
from mftmerge.evaluate.searchsettings import SearchSettings
from mftmerge.mask import Mask
from mftmerge.names import layer_of
from mftmerge.progress import Progress, Step

Shares = dict[str, float]  # domain -> share of the own mask's gain
FIRST = 0.4  # of the evaluations, for what the predictions favour
WEIGHTS = (0.35, 2.5)  # of a mask's evidence
SHARES = 4  # of a density by layer at most, from the first layer to the last: few enough for a search to learn about
HELD = 2**30  # bytes of proposals that are held at once; more are predicted in groups, with backward passes for each


def search(
    masks: Mapping[str, Mask],
    measure: Callable[[Candidate, Mask], Shares],
    settings: SearchSettings,
    *,
    scores: bool,
    predict: Callable[[list[Mask]], Mapping[str, Outlook]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Mask]:
    """Candidates that were measured, text -> mask, in order.

    measure: builds nothing, gives the shares under a combined mask. scores: whether the masks can be added by their
    scores; else votes are searched. predict: what masks will do to every judged domain.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    say = progress or (lambda step: None)
    space = _Space(list(masks), _own_density(masks.values()), _places(masks.values()), scores)
    made: dict[str, Mask] = {}
    digests: set[str] = set()

    def build(candidate: Candidate) -> Mask:
        return candidate.combine(list(masks.values()), [f"{d}.mask" for d in masks])

    guesses: list[tuple[float, dict[str, Any]]] = []
    if predict is not None:
        drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=settings.search_seed))
        trials = [drawn.ask() for _ in range(settings.proposals)]
        size = _group(masks.values())
        for group in (trials[i : i + size] for i in range(0, len(trials), size)):
            outlooks = predict([build(space.proposal(trial)) for trial in group])
            if outlooks:
                lowest = np.min([o.shares for o in outlooks.values()], axis=0)
                guesses += [(float(value), trial.params) for value, trial in zip(lowest, group, strict=True)]
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=settings.search_seed))
    for params in _best(guesses, round(FIRST * settings.search)):
        study.enqueue_trial(params)
    started, asked = time.monotonic(), 0
    while len(made) < settings.search and asked < 10 * settings.search:
        if settings.minutes is not None and time.monotonic() - started > 60 * settings.minutes:
            break
        trial, asked = study.ask(), asked + 1
        candidate = space.proposal(trial)
        kept = build(candidate)
        if candidate.text in made or kept.digest in digests:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)  # the same mask again: nothing to learn from it
            continue
        say(Step("searching", len(made), settings.search, "runs", detail=candidate.text))
        study.tell(trial, min(measure(candidate, kept).values()))
        made[candidate.text] = kept
        digests.add(kept.digest)
    return made


def _own_density(masks: Iterable[Mask]) -> float:
    return float(np.mean([mask.density() for mask in masks]))


def _places(masks: Iterable[Mask]) -> int:
    """How many shares a density by layer has: `SHARES`, or one a layer where there are fewer."""
    return min(SHARES, len({layer_of(name) for mask in masks for name in mask} - {None}))


def _group(masks: Iterable[Mask]) -> int:
    """How many combined masks, of a bit a weight, `HELD` bytes have room for."""
    sizes = {name: mask.size(name) for mask in masks for name in mask}
    return max(1, 8 * HELD // max(1, sum(sizes.values())))


@dataclass(frozen=True)
class _Space:
    """What a trial's parameters mean. density: the masks' own; shares: of a density by layer."""

    domains: Sequence[str]
    density: float
    shares: int
    scores: bool

    def proposal(self, trial: Any) -> Candidate:
        """A candidate; weights are relative, and scaled to a mean of 1."""
        room = trial.suggest_float("room", 0.0, 0.7)
        rooms = [room]
        if self.shares > 1 and trial.suggest_categorical("by layer", [False, True]):
            around = [trial.suggest_float(f"layer {i}", -0.3, 0.3) for i in range(self.shares)]
            rooms = [min(max(room + a, 0.0), 0.9) for a in around]
        density = ":".join(f"{self.density + (1 - self.density) * r:.4f}" for r in rooms)
        weights = [trial.suggest_float(f"weight {domain}", *WEIGHTS, log=True) for domain in self.domains]
        mean = sum(weights) / len(weights)
        text = ":".join(f"{w / mean:.2f}" for w in weights)
        if not self.scores:
            return Candidate.parse(f"vote@{density},weights={text}")
        elect = ",elect" if trial.suggest_categorical("elect", [False, True]) else ""
        return Candidate.parse(f"score@{density}{elect},weights={text}")


def _best(guesses: list[tuple[float, dict[str, Any]]], count: int) -> Iterator[dict[str, Any]]:
    """The parameters that the predictions favour, best first, apart from each other by more than a hair."""
    taken: list[dict[str, Any]] = []
    for _, params in sorted(guesses, key=lambda guess: -guess[0]):
        if len(taken) == count:
            return
        if all(_distance(params, other) > 0.05 for other in taken):
            taken.append(params)
            yield params


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Of the parameters that both have: one with a density by layer is apart from one without, by what says so."""
    return max(abs(float(a[name]) - float(b[name])) for name in a.keys() & b.keys())


class SearchJournal:
    """What a search measured: digest of a mask -> (domain, metric) -> losses or marks; a line cut off is dropped."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        """path: None keeps nothing. identity: of model, rows and settings; another search's journal is BadInput."""
        self.path, self.known = path, dict[str, dict[tuple[str, str], Any]]()
        if path is None:
            return
        head = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        if not path.exists():
            path.write_text(json.dumps({"search": head}) + "\n", encoding="utf-8")
            return
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            mine = first["search"] == head
            for line in lines:
                cells = {(c["domain"], c["metric"]): np.array(c["values"], np.float64) for c in line["cells"]}
                self.known[line["mask"]] = cells
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path}: not the journal of a search ({e}); remove it") from None
        if not mine:
            raise BadInput(f"{path}: holds a search with another model, other rows or settings; remove it")
        os.truncate(path, len(whole))

    def add(self, mask: Mask, cells: Mapping[tuple[str, str], Any]) -> None:
        """Put the cells of a mask on record."""
        self.known[mask.digest] = dict(cells)
        if self.path is None:
            return
        entries = [{"domain": d, "metric": m, "values": v.tolist()} for (d, m), v in cells.items()]
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"mask": mask.digest, "cells": entries}) + "\n")
            f.flush()
            os.fsync(f.fileno())
