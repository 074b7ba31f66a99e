"""Measure learnt merges: `python -m research.learning.run LAB --model DIR --domain math=FILE ...`.

Every measured cell is a line of LAB/cells.jsonl as soon as it is known, and every expert and merge a file in LAB: a run
that was killed goes on where it was. What says most comes first; `--only` takes some parts.
Then `python -m research.learning.page LAB` copies the record and writes the page's tables.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

import mftmerge.learn.run as product
from mftmerge.evaluate.generation import EXACT, Marker
from mftmerge.files import replacing
from mftmerge.prefix import PrefixCache
from research.combining.common import Weights, average
from research.learning import train
from research.learning.common import (
    CLAIMED,
    Bench,
    Plan,
    Tokens,
    arguments,
    claimed_rows,
    opened,
    read_rows,
    write_rows,
)
from research.learning.merges import METHODS, Judge, merged, tuned

# Learning rates of fine-tuning the merged model, by rows; the first seed tries both, the others take its choice.
RATES = {10: (1e-4, 3e-4), 30: (1e-4, 3e-4), 100: (3e-4, 1e-3), 300: (3e-4, 1e-3)}
RATES_OF_ALL_LAYERS = (3e-5, 1e-4)  # there higher ones, 3e-4 and 1e-3, lost to the merge that they began from
STEPS = {10: 20, 30: 20, 100: 60, 300: 60}  # the product's defaults, for every method that learns
TEACHERS = ("expert", "answers", "both")


class Seed:
    """The cells of one seed."""

    def __init__(self, bench: Bench, seed: int, given: Path | None = None) -> None:
        """given: a directory of research/claim, whose experts are taken instead of making some."""
        self.bench, self.seed, self.cells, self.given = bench, seed, bench.cells, given
        self.place = bench.lab / f"seed{seed}"
        self.markers: dict[str, Marker] = {}

    def name(self, what: str) -> str:
        return f"seed{self.seed}/{what}"

    def weights(self, what: str, make: Callable[[], tuple[Weights, dict[str, Any]]]) -> tuple[Weights, dict[str, Any]]:
        """Weights and what is known about them, from their file or made now."""
        path = self.place / f"{what.replace('/', '-')}.safetensors"
        facts = path.with_suffix(".json")
        if not facts.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found, known = make()
            with replacing(path) as temporary:
                save_file({n: w.contiguous() for n, w in found.items()}, temporary)
            with replacing(facts) as temporary:
                temporary.write_text(json.dumps(known), encoding="utf-8")
        return load_file(path), json.loads(facts.read_text(encoding="utf-8"))

    def known(self, what: str) -> tuple[Weights, dict[str, Any]]:
        """Weights that were made before. Raises FileNotFoundError where there are none."""

        def absent() -> tuple[Weights, dict[str, Any]]:
            raise FileNotFoundError(f"{self.place}: there is no {what!r} yet; run that part first")

        return self.weights(what, absent)

    def cell(self, what: str, make: Callable[[], tuple[Weights, dict[str, Any]]]) -> None:
        """A merge, made and measured unless it is on record."""
        if self.name(what) not in self.cells:
            weights, facts = self.weights(what, make)
            self.bench.measure(self.name(what), weights, **facts)

    def made(self, model: str) -> Weights:
        """The weights of a model that is on record."""
        if model == "base":
            return {}
        if model.startswith("expert "):
            return self.experts[model.removeprefix("expert ")]
        return self.known(model)[0]

    # -- what the others are made of ----------------------------------------------------------------------------------

    @cached_property
    def experts(self) -> dict[str, Weights]:
        if self.given:
            found = {d: load_file(self.checkpoint(d) / "model.safetensors") for d in self.bench.domains}
            return {d: {n: w[n].float() for n in self.bench.originals} for d, w in found.items()}

        def make(domain: str) -> tuple[Weights, dict[str, Any]]:
            rows = [i.tokens for i in self.bench.expert_items(domain, self.seed)]
            with train.watched() as cost:
                found = train.supervised(self.bench, rows, self.bench.plan.expert_steps, self.seed)
            return found, dict(cost)

        return {d: self.weights(f"expert {d}", partial(make, d))[0] for d in self.bench.domains}

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.bench, self.experts)

    def tune(self, what: str) -> tuple[Weights, dict[str, Any]]:
        def make() -> tuple[Weights, dict[str, Any]]:
            method, experts = METHODS[what], list(self.experts.values())
            chosen, found, facts = tuned(
                method, self.judge, lambda s: merged(self.bench.originals, experts, method.name, s, self.seed)
            )
            return found, {"setting": chosen, **facts}

        return self.weights(what, make)

    def rows(self, count: int) -> dict[str, list[Tokens]]:
        """So many rows of each domain to learn from, the lower layers' states of which are there."""
        rows = {d: [i.tokens for i in self.bench.learning_items(d, self.seed, count)] for d in self.bench.domains}
        for of_domain in rows.values():
            self.bench.warm(of_domain)
        return rows

    def lesson(self, teacher: str, count: int, base_kl: float = 0.0, steps: int = 0) -> train.Lesson:
        """steps: 0 for those of so many rows."""
        return train.lesson(self.bench, self.experts, self.rows(count), teacher, steps or STEPS[count], base_kl)

    # -- cells --------------------------------------------------------------------------------------------------------

    def fundamentals(self) -> None:
        """The base, the experts, and the merge by hand that the others start from."""
        if "base" not in self.cells:
            self.bench.measure("base")
        for domain in self.experts:
            if self.name(f"expert {domain}") not in self.cells:
                _, facts = ({}, {}) if self.given else self.known(f"expert {domain}")
                seen = () if self.seed == 0 else (domain,)  # what an expert does to other domains is asked once
                self.bench.measure(self.name(f"expert {domain}"), self.experts[domain], seen, **facts)
        self.cell("task arithmetic", lambda: self.tune("task arithmetic"))

    def data_free(self) -> None:
        self.cell("plain average", lambda: (average(list(self.experts.values())), {}))
        for what in METHODS:
            self.cell(what, partial(self.tune, what))

    def joint(self) -> None:
        """The ceiling: the base trained on the rows of all experts, in as many steps as all of them."""

        def make() -> tuple[Weights, dict[str, Any]]:
            rows = [i.tokens for d in self.bench.domains for i in self.bench.expert_items(d, self.seed)]
            steps = self.bench.plan.expert_steps * len(self.bench.domains)
            with train.watched() as cost:
                found = train.supervised(self.bench, rows, steps, self.seed)
            return found, dict(cost)

        self.cell("joint training", make)

    def fine_tuning(self, teacher: str, count: int, base_kl: float = 0.0, steps: int = 0) -> None:
        """Ordinary fine-tuning of the tuned task arithmetic; rate and steps by validation.

        The first seed tries two rates in 20 steps, and the better one in as many as the masks have; the other seeds
        take its rate. Whatever was tried may be the choice.
        """
        what = f"fine-tuning by {teacher}, {count} rows" + (f", base_kl {base_kl}" if base_kl else "")
        what += f", steps {steps}" if steps else ""

        def make() -> tuple[Weights, dict[str, Any]]:
            start = self.tune("task arithmetic")[0]
            lesson = self.lesson(teacher, count, base_kl, steps)
            best: tuple[float, Weights, dict[str, Any]] = (-math.inf, {}, {})
            tried = []

            def attempt(rate: float, steps: int) -> None:
                nonlocal best
                with train.watched() as cost:
                    given = replace(lesson, steps=steps)
                    found, facts = train.fine_tuned(self.bench, self.judge, given, start, rate)
                tried.append([rate, steps, facts["best"]])
                if facts["best"] > best[0]:
                    seconds = round(cost["seconds"] + lesson.seconds * (teacher == "expert"), 1)
                    best = (facts["best"], found, {"rate": rate, **facts, **cost, "seconds": seconds})

            first = self.cells.found.get(f"seed0/{what}")
            if first is None:
                for rate in RATES_OF_ALL_LAYERS if self.given else RATES[count]:
                    attempt(rate, min(STEPS.values()))
                rate = max(tried, key=lambda t: t[2])[0]
            else:
                rate = first["facts"]["rate"]
            if [rate, lesson.steps] not in [t[:2] for t in tried]:
                attempt(rate, lesson.steps)
            return best[1], {**best[2], "tried": tried}

        self.cell(what, make)

    def coefficients(self, teacher: str, count: int) -> None:
        def make() -> tuple[Weights, dict[str, Any]]:
            scale = self.tune("task arithmetic")[1]["setting"]["lambda"]
            lesson = self.lesson(teacher, count)
            with train.watched() as cost:
                found, facts = train.coefficients(self.bench, self.judge, lesson, self.experts, scale, 0.05)
            cost["seconds"] = round(cost["seconds"] + lesson.seconds * (teacher == "expert"), 1)
            return found, {**facts, **cost}

        self.cell(f"coefficients by {teacher}, {count} rows", make)

    def masks(self, teacher: str, count: int, arithmetic: str = "sums", weight: float = 1.0, **settings: Any) -> None:
        """The product: `mftmerge train --recipe` from checkpoints and row files. weight: of every expert's change."""
        named = "masks" if arithmetic == "sums" else "selection"
        extra = ({"weight": weight} if weight != 1 else {}) | settings
        what = f"{named} by {teacher}, {count} rows" + "".join(f", {k} {v}" for k, v in extra.items())

        def make() -> tuple[Weights, dict[str, Any]]:
            self.rows(count)
            recipe, out = self.recipe(count, arithmetic, weight), self.place / f"{what}.masks"
            steps = settings.get("steps", STEPS[count])
            given = {
                "teacher": teacher,
                "steps": steps,
                "eval_every": steps // 4,
                "max_length": self.bench.plan.max_length,
                "base_kl": 0,  # as the first cells were learnt, before there was this setting
                **settings,
            }
            with train.watched() as cost, patch.object(PrefixCache, "as_set", self.bench.as_set):
                result = product.learn_merge(
                    recipe, out, settings=given, note=print, resume=out.exists(), overwrite=True
                )
            change = {d: {n: w - self.bench.originals[n] for n, w in e.items()} for d, e in self.experts.items()}
            found = {n: w.clone() for n, w in self.bench.originals.items()}
            density = {}
            for domain, mask in zip(self.experts, result.masks.values(), strict=True):
                kept = {n: torch.from_numpy(mask.kept(n)) for n in found}
                density[domain] = round(
                    sum(float(k.sum()) for k in kept.values()) / sum(k.numel() for k in kept.values()), 4
                )
                for n, k in kept.items():
                    found[n] = torch.where(k, found[n] + weight * change[domain][n], found[n])
            return found, {"density": density, "best_step": result.best_step, **cost}

        self.cell(what, make)

    def recipe(self, count: int, arithmetic: str, weight: float) -> dict[str, Any]:
        """The recipe with open masks that a user would write."""
        rows, models = self.bench.lab / "rows", list[dict[str, Any]]()
        for domain in self.bench.domains:
            fresh = self.bench.learning_items(domain, self.seed, count)
            learn = {
                "data": write_rows(rows / f"seed{self.seed}-{domain}-{count}.jsonl", fresh),
                "eval_data": write_rows(rows / f"{domain}-validation.jsonl", self.bench.rows[domain]["validation"]),
            }
            models.append({"model": str(self.checkpoint(domain)), "mask": {"learn": learn}})
        method = "select"
        if arithmetic == "sums":
            method, models = "task_arithmetic", [{**m, "parameters": {"weight": weight}} for m in models]
        head = {"merge_method": method, "base_model": self.bench.source, "dtype": "float32"}
        return {**head, "models": models}

    def checkpoint(self, domain: str) -> Path:
        """An expert as a directory that the product reads."""
        if self.given:
            return self.given / f"fft-{CLAIMED[domain]}-s{self.seed}"
        return self.written(domain, self.experts[domain])

    def written(self, name: str, weights: Weights) -> Path:
        """A model as a directory that the product reads: the base's files with these tensors, in float32."""
        place = self.place / f"checkpoint-{name}"
        if not place.exists():
            scratch = place.with_name(f"{place.name}.new")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for path in Path(self.bench.source).iterdir():
                if path.suffix == ".safetensors":
                    save_file(load_file(path) | weights, scratch / path.name, {"format": "pt"})
                elif path.is_file():
                    shutil.copy(path, scratch)
            os.replace(scratch, place)
        return place

    def answers(self, model: str, domain: str, exact: str, new_tokens: int) -> None:
        """Exact match of the answers that a model writes to a domain's test questions."""
        name = f"answers/{self.name(model)}"
        right = dict(self.cells[name]["right"]) if name in self.cells else {}
        if domain in right:
            return
        weights = self.made(model)
        if domain not in self.markers:  # one for all models: answers that stay the same take one pass
            items = [i.row for i in self.bench.rows[domain]["test"]]
            self.markers[domain] = Marker(items, self.bench.tokenizer, exact=exact, max_new_tokens=new_tokens)
        self.bench.model.config.use_cache = True
        with self.bench.using(weights):
            found = self.markers[domain](self.bench.model).metrics[EXACT]
        self.bench.model.config.use_cache = False
        self.cells.add(name, right=right | {domain: [int(x) for x in found[:, 0]]})
        print(name, domain, f"{found[:, 0].mean():.3f}", flush=True)


Part = Callable[[], None]


def parts(seeds: Mapping[int, Seed]) -> list[tuple[str, Part]]:
    """Every part of the study by name, what says most first."""
    found: list[tuple[str, Part]] = []

    def add(what: str, numbers: Sequence[int], make: Callable[[Seed], Part]) -> None:
        found.extend((f"seed{n}/{what}", make(seeds[n])) for n in numbers if n in seeds)

    def learning(numbers: Sequence[int], kind: str, teacher: str, count: int, **more: Any) -> None:
        extra = "".join(f", {k} {v}" for k, v in more.items())
        add(
            f"{kind} by {teacher}, {count} rows{extra}",
            numbers,
            lambda s: partial(getattr(s, kind.replace("-", "_")), teacher, count, **more),
        )

    def answers(*given: Any) -> Callable[[Seed], Part]:
        return lambda seed: partial(seed.answers, *given)

    first, others = (0,), (1, 2)
    for numbers in (first, others):
        add("fundamentals", numbers, lambda s: s.fundamentals)
        learning(numbers, "masks", "expert", 100)
        learning(numbers, "fine-tuning", "answers", 100)
        add("data-free", numbers, lambda s: s.data_free)
        learning(numbers, "masks", "expert", 30)
        learning(numbers, "fine-tuning", "answers", 30)
        learning(numbers, "masks", "answers", 100)
        if numbers is first:
            learning(first, "masks", "expert", 10)
            learning(first, "fine-tuning", "answers", 10)
            learning(first, "coefficients", "expert", 100)
            learning(first, "coefficients", "expert", 10)
            add("joint", first, lambda s: s.joint)
    learning(first, "fine-tuning", "expert", 30)
    learning(first, "fine-tuning", "expert", 100)
    learning(first, "masks", "expert", 100, arithmetic="selection")
    learning(first, "fine-tuning", "expert", 10)
    learning(first, "masks", "answers", 30)
    learning(first, "masks", "answers", 10)
    masks = "masks by answers, 100 rows, base_kl 1.0"
    selection = masks.replace("masks", "selection")
    asked = ("base", "expert sql", "task arithmetic", masks, selection, "fine-tuning by answers, 100 rows")
    for model in asked:
        add(f"answers of {model}, sql", first, answers(model, "sql", "text", 48))
    for model in ("base", "expert math", *asked[2:]):
        add(f"answers of {model}, math", first, answers(model, "math", "number", 160))
    for count in (300,):
        learning(first, "masks", "expert", count)
        learning(first, "fine-tuning", "answers", count)
    learning(others, "fine-tuning", "expert", 30)
    learning(others, "fine-tuning", "expert", 100)
    learning(others, "coefficients", "expert", 100)
    learning(first, "masks", "expert", 100, start_density=1.0)
    for count in (100, 30, 10):
        for teacher in TEACHERS:
            learning(first, "masks", teacher, count, weight=0.7, start_density=1.0)
    learning(others, "masks", "expert", 30, weight=0.7, start_density=1.0)
    learning(others, "masks", "both", 30, weight=0.7, start_density=1.0)
    learning(others, "masks", "answers", 100, weight=0.7, start_density=1.0)
    learning(first, "masks", "answers", 100, weight=0.5, start_density=1.0)
    for numbers in (first, others):
        learning(numbers, "masks", "answers", 100, base_kl=1.0)
        learning(numbers, "masks", "both", 30, weight=0.7, start_density=1.0, base_kl=1.0)
        learning(numbers, "masks", "expert", 10, weight=0.7, start_density=1.0, base_kl=1.0)
    learning((*first, *others), "masks", "expert", 30, weight=0.7, start_density=1.0, base_kl=1.0)
    learning(first, "masks", "answers", 100, base_kl=3.0)
    learning(first, "masks", "answers", 100, weight=0.7, start_density=1.0, base_kl=1.0)
    learning((*first, *others), "masks", "answers", 100, arithmetic="selection", base_kl=1.0)
    learning((*first, *others), "masks", "both", 30, arithmetic="selection", base_kl=1.0)
    learning((*first, *others), "masks", "expert", 10, arithmetic="selection", base_kl=1.0)
    learning(first, "masks", "answers", 300, arithmetic="selection", base_kl=1.0)
    learning(first, "fine-tuning", "answers", 100, base_kl=1.0)
    learning(first, "masks", "answers", 300)
    learning(first, "masks", "answers", 100, arithmetic="selection", base_kl=1.0, steps=120)
    learning(first, "fine-tuning", "answers", 100, steps=120)
    learning(first, "masks", "expert", 100, density=0.5)
    add("joint", others, lambda s: s.joint)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--claim", type=Path, help="a directory of research/claim: its experts, of all layers")
    parser.add_argument("--data", type=Path, help="with --claim: the folder of its row files")
    parser.add_argument("--seed", type=int, action="append", help="all three by default")
    parser.add_argument("--only", default="", help="regular expression that a part's name must contain")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    failed: list[str] = []
    if given.claim:
        plan, seeds = Plan(layers="", expert_rows=0, pool=0, skipped=0), given.seed or [0]
        bench = opened(given.lab, given.model, partial(claimed_rows, given.data), plan)
    else:
        plan, seeds = Plan(), given.seed or [0, 1, 2]
        bench = opened(given.lab, given.model, partial(read_rows, dict(given.domain)), plan)
    for name, part in parts({n: Seed(bench, n, given.claim) for n in seeds}):
        if re.search(given.only, name):
            try:
                part()
            except Exception:  # one cell that fails takes no other with it
                failed.append(name)
                print(f"{name} failed\n{traceback.format_exc()}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
