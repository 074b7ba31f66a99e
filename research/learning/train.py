"""What is trained beside the product's masks: experts, the mixture, and two controls that learn from the same rows.

The controls start from the tuned task arithmetic: ordinary fine-tuning of the merged weights, and one coefficient a
matrix and expert. They ask of a domain what the masks are asked for: its answers, or agreement with its expert.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mftmerge.learn.domains import Told, answers_and_prompts, disagreement, listen, prompt_of, stacked
from mftmerge.loss import labelled_logits, padded
from research.combining.common import Weights
from research.learning.common import Bench, Tokens
from research.learning.merges import Judge

TOP = 256  # as the product's default: tokens of an expert's distribution that are told apart


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Process seconds of the block, and the largest resident memory while it ran, in MB."""
    process, stop = psutil.Process(), threading.Event()
    found = {"seconds": 0.0, "memory": 0.0}

    def watch() -> None:
        while not stop.wait(0.2):
            found["memory"] = max(found["memory"], process.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    start = time.process_time()
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found |= {"seconds": round(time.process_time() - start, 1), "memory": round(found["memory"])}


def supervised(bench: Bench, rows: Sequence[Tokens], steps: int, seed: int) -> Weights:
    """The weights after ordinary training of the base on rows: an expert, or joint training on the mixture."""
    plan, parameters = bench.plan, learnt(bench)
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.expert_rate, weight_decay=0.0, fused=True)
    order = list(rows) * (1 + steps * plan.batch // len(rows))
    random.Random(1 + seed).shuffle(order)
    with bench.using({}), bench.cache.use():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.expert_rate * (1 - step / steps)
            answers(bench, order[plan.batch * step : plan.batch * (step + 1)]).backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {n: p.detach().clone() for n, p in parameters.items()}


def learnt(bench: Bench) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in bench.model.named_parameters() if n in bench.originals}


def answers(bench: Bench, rows: Sequence[Tokens]) -> Tensor:
    ids, labels, attention = padded(rows)
    logits, targets, _ = labelled_logits(bench.model, ids, labels, attention_mask=attention)
    return cross_entropy(logits, targets)


# -- learning from the rows of a merge --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What a control learns from. rows: by domain; told: what each domain's expert says of them, empty for answers.

    scales: what a domain's loss is divided by, so that all count alike. prompts: what the base says of the rows'
    prompts, to which the model is held with `base_kl` a nat, as in the product; empty for nothing.
    """

    rows: Mapping[str, Sequence[Tokens]]
    told: Mapping[str, Sequence[Told]]
    scales: Mapping[str, float]
    steps: int
    seconds: float = 0.0  # process time that asking the experts took
    per_step: int = 3
    prompts: Mapping[str, Sequence[Told]] = field(default_factory=dict)
    base_kl: float = 0.0

    def batches(self) -> Iterator[list[tuple[str, list[int]]]]:
        """For every step, numbers of rows by domain: every row once before any comes again."""
        draw, queues = random.Random(0), {d: list[int]() for d in self.rows}
        for _ in range(self.steps):
            step = []
            for domain, queue in queues.items():
                while len(queue) < self.per_step:
                    queue[:0] = draw.sample(range(len(self.rows[domain])), len(self.rows[domain]))
                step.append((domain, [queue.pop() for _ in range(self.per_step)]))
            yield step

    def loss(self, bench: Bench, domain: str, chosen: Sequence[int]) -> Tensor:
        """The loss of some rows of a domain over its scale and the number of domains."""
        rows = [self.rows[domain][i] for i in chosen]
        ids, labels, attention = padded(rows)
        asked = padded([prompt_of(r) for r in rows])[1] if self.prompts else None
        said, targets, prompts = answers_and_prompts(bench.model, ids, labels, asked, attention_mask=attention)
        if self.told:
            found = disagreement(said, *stacked(self.told[domain], chosen)).mean()
        else:
            found = cross_entropy(said, targets)
        found = found / self.scales[domain]
        if self.prompts:
            apart = disagreement(prompts, *stacked(self.prompts[domain], chosen))
            found = found + self.base_kl * apart.mean()
        return found / len(self.rows)


def lesson(
    bench: Bench,
    experts: Mapping[str, Weights],
    rows: Mapping[str, Sequence[Tokens]],
    teacher: str,
    steps: int,
    base_kl: float = 0.0,
) -> Lesson:
    """The lesson of these rows; teacher: "expert" or "answers". The scale is the base's loss minus the expert's."""
    told: dict[str, list[Told]] = {}
    scales: dict[str, float] = {}
    began = time.process_time()
    with bench.cache.use(), torch.no_grad():
        for domain, weights in experts.items():
            few = rows[domain][:32]
            with bench.using(weights):
                told[domain] = listen(bench.model, rows[domain] if teacher == "expert" else few, TOP)
                own = distance(bench, few, told[domain], teacher)
            scales[domain] = distance(bench, few, told[domain], teacher) - own
        prompts = {d: listen(bench.model, [prompt_of(r) for r in rows[d]], TOP) for d in experts} if base_kl else {}
    spent = time.process_time() - began
    return Lesson(rows, told if teacher == "expert" else {}, scales, steps, spent, prompts=prompts, base_kl=base_kl)


def distance(bench: Bench, rows: Sequence[Tokens], told: Sequence[Told], teacher: str) -> float:
    """Nats a token of some rows by the teacher, one row at a time."""
    total = count = 0.0
    for row, say in zip(rows, told, strict=False):
        ids, labels, _ = padded([row])
        logits, targets, _ = labelled_logits(bench.model, ids, labels)
        sums = (
            disagreement(logits, say.likely, say.logs)
            if teacher == "expert"
            else cross_entropy(logits, targets, reduction="none")
        )
        total, count = total + float(sums.sum()), count + len(targets)
    return total / count


def controlled(
    bench: Bench, judge: Judge, given: Lesson, start: Weights, step: Callable[[float], None], looks: int = 4
) -> tuple[Weights, dict[str, Any]]:
    """Run a lesson from `start`; step: takes what is left of the learning rate, with gradients in the parameters.

    Gives the best validated weights, step 0 among them, and the validations: (step, lowest share).
    """
    parameters = learnt(bench)
    with bench.using(start):
        shares = [(0, min(judge.now().values()))]
        best, kept = shares[0][1], dict(start)
        for number, batch in enumerate(given.batches(), 1):
            with bench.cache.use():
                for domain, chosen in batch:
                    given.loss(bench, domain, chosen).backward()
            step(1 - (number - 1) / given.steps)
            for p in parameters.values():
                p.grad = None
            if number % max(1, given.steps // looks) == 0:
                share = min(judge.now(best).values())
                shares.append((number, share))
                if share > best:
                    best, kept = share, {n: p.detach().clone() for n, p in parameters.items()}
    return kept, {"validated": [[s, round(x, 4)] for s, x in shares], "best": round(best, 4)}


def fine_tuned(
    bench: Bench, judge: Judge, given: Lesson, start: Weights, rate: float
) -> tuple[Weights, dict[str, Any]]:
    """Ordinary fine-tuning of a merged model: AdamW, gradients clipped to norm 1, linear decay."""
    parameters = list(learnt(bench).values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)

    def step(left: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = rate * left
        optimizer.step()

    return controlled(bench, judge, given, start, step)


def coefficients(
    bench: Bench, judge: Judge, given: Lesson, experts: Mapping[str, Weights], scale: float, rate: float
) -> tuple[Weights, dict[str, Any]]:
    """One coefficient a matrix and expert, learnt by Adam from `scale`."""
    parameters = learnt(bench)
    change = {n: torch.stack([e[n] - bench.originals[n] for e in experts.values()]) for n in parameters}
    values = {n: torch.full((len(experts),), scale, requires_grad=True) for n in parameters}
    optimizer = torch.optim.Adam(values.values(), lr=rate)

    def weights() -> Weights:
        return {n: bench.originals[n] + torch.einsum("k,k...->...", values[n].detach(), change[n]) for n in values}

    def step(left: float) -> None:
        for n, value in values.items():
            gradient = parameters[n].grad
            assert gradient is not None
            value.grad = torch.einsum("...,k...->k", gradient, change[n])
        optimizer.param_groups[0]["lr"] = rate * left
        optimizer.step()
        bench.put(weights())

    return controlled(bench, judge, given, weights(), step)
