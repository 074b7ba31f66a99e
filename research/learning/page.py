"""Write the tables of docs/learnt-merges.md and the README's first: `python -m research.learning.page [LAB]`.

With LAB its record is copied to results/ first. The prose is written by hand; what stands between `<!-- NAME -->` and
`<!-- end -->` is the table of that name, made from the record. A test checks that page and record agree.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mftmerge.evaluate.pairing import standard_error
from mftmerge.files import replacing
from research.combining.tables import filled, markdown
from research.learning.tables import Record, verdicts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "learnt-merges.md"
README = PAGE.parents[1] / "README.md"
RECORDS = Path(__file__).resolve().parent / "results"
LONG = {"math": "GSM8K", "sql": "WikiSQL", "python": "Python"}
# What is judged with 100 rows, and with fewer: the product's teachers; for few rows, weight and start as is advised.
TEACHERS = ("answers", "expert", "both")
PLAIN, ADVISED = "masks by {}, {} rows", "masks by {}, {} rows, weight 0.7, start_density 1.0"
SELECTION = "selection by {}, {} rows"
HELD = ", base_kl 1.0"  # to the base on the prompts, which is the product's default
SUMS = PLAIN.format("answers", 100) + HELD
OURS = SELECTION.format("answers", 100) + HELD
FEW = [
    *((30, kind.format("both", 30) + HELD) for kind in (ADVISED, SELECTION)),
    (10, ADVISED.format("expert", 10)),  # with base_kl it was not measured
    (10, SELECTION.format("expert", 10) + HELD),
]
WITHOUT_DATA = ["plain average", "task arithmetic", "TIES", "DARE-TIES", "DELLA", "consensus", "localize-and-stitch"]
COUNTS = (10, 30, 100, 300)
SETTINGS = {"four": "the four-layer experts", "full": "experts fine-tuned in all layers"}


def difference(record: Record, model: str, reference: str, domain: str, digits: int = 3) -> str:
    """In bold where it is worse than the reference by more than two standard errors."""
    mean, error = record.difference(model, reference, domain)
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if mean > 2 * error else text


def share(record: Record, model: str, domain: str) -> str:
    value, low, high = record.share(model, domain)
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def merged(record: Record) -> list[str]:
    """Everything that serves all domains at once: without data, then what learns, by rows, then the ceiling."""

    def place(model: str) -> tuple[int, int, int]:
        rows = re.search(r", (\d+) rows", model)
        order = WITHOUT_DATA.index(model) if model in WITHOUT_DATA else len(WITHOUT_DATA)
        return (2 if model.startswith("joint") else int(rows is not None), -int(rows[1]) if rows else 0, order)

    return sorted((m for m in record.models if not m.startswith("expert ")), key=place)


def shares(record: Record) -> str:
    """Shares kept, the worst domain by seed, forgetting, and what learning took."""
    rows = []
    for model in merged(record):
        costs = [x for x in record.fact(model, "seconds") if x is not None]
        memory = [x for x in record.fact(model, "memory") if x is not None]
        rows.append(
            [
                model,
                *(share(record, model, d) for d in record.domains),
                ", ".join(f"{100 * s:.0f}" for s in record.lowest(model)),
                difference(record, model, "base", "other"),
                f"{sum(costs) / len(costs):.0f}" if costs else "",
                f"{min(memory):,.0f}" if memory else "",  # some seeds shared a process, which held the experts of all
            ]
        )
    names = [LONG[d] for d in record.domains]
    return markdown(["merge", *names, "lowest, by seed", "fourth domain", "seconds", "MB"], rows)


def losses(record: Record) -> str:
    """What the experts do on every domain: their losses minus the base's."""
    everything = [*record.domains, "other"]
    rows = [["base", *(f"{record.loss('base', d):.3f}" for d in everything)]]
    for domain in record.domains:
        model = f"expert {domain}"
        seeds = [s for s in record.seeds_of(model) if record.has(model, "other", [s])]
        cells = []
        for d in everything:
            only = Record({k: v for k, v in record.cells.items() if "/" not in k or k.split("/")[0] in seeds})
            cells.append(difference(only, model, "base", d))
        rows.append([f"expert of {LONG[domain]}", *cells])
    return markdown(["model", *(LONG[d] for d in record.domains), "fourth domain"], rows)


def by_rows(record: Record) -> str:
    """Shares, means over seeds, by how many rows a domain there are."""
    kinds = {(m[1], m[2]) for m in (re.fullmatch(r"(.+), \d+ rows(.*)", model) for model in record.models) if m}
    rows = []
    for kind, settings in sorted(kinds):
        cells = []
        for count in COUNTS:
            model = f"{kind}, {count} rows{settings}"
            if record.seeds_of(model):
                each = " / ".join(f"{100 * record.share(model, d)[0]:.0f}" for d in record.domains)
                cells.append(f"{each} ({len(record.seeds_of(model))})")
            else:
                cells.append("not measured")
        rows.append([kind + settings, *cells])
    return markdown(["share kept, %: " + " / ".join(LONG[d] for d in record.domains), *map(str, COUNTS)], rows)


def against_fine_tuning(record: Record) -> str:
    """Masks, or a selection, minus fine-tuning of the merged model on the same rows, by what each learns from."""
    rows = []
    for count in COUNTS:
        kinds = [
            f"{kind.format(t, count)}{held}"
            for held in ("", HELD)
            for kind in (PLAIN, ADVISED, SELECTION)
            for t in TEACHERS
        ]
        for mine in kinds:
            for teacher, held in (("answers", ""), ("expert", ""), ("answers", HELD)):
                pair = mine, f"fine-tuning by {teacher}, {count} rows{held}"
                if seeds := record.seeds_of(*pair):
                    cells = [difference(record, *pair, d) for d in [*record.domains, "other"]]
                    rows.append([f"{pair[0]}; fine-tuning by {teacher}{held} ({len(seeds)})", *cells])
    return markdown(
        ["masks minus fine-tuning on the same rows (seeds)", *(LONG[d] for d in record.domains), "fourth domain"], rows
    )


def goal(record: Record) -> str:
    found = verdicts(record, OURS, FEW, WITHOUT_DATA, LONG)
    said = {True: "yes", None: "level", False: "**no**"}
    return markdown(["goal", "met", "measured"], [[v.what, said[v.met], v.numbers] for v in found])


def chosen(record: Record) -> str:
    """What validation chose for the merges without data and for fine-tuning, by seed."""
    rows = []
    for model in WITHOUT_DATA:
        if settings := [s for s in record.fact(model, "setting") if s] if model in record.models else []:
            tried = [len(t) for t in record.fact(model, "tried") if t]
            texts = [", ".join(f"{k} {v}" for k, v in s.items() if k != "weight") for s in settings]
            rows.append([model, "; ".join(texts), ", ".join(map(str, tried))])
    for model in sorted(m for m in record.models if m.startswith("fine-tuning")):
        steps = [max(v, key=lambda x: x[1])[0] for v in record.fact(model, "validated")]
        texts = [f"rate {r:g}, step {s}" for r, s in zip(record.fact(model, "rate"), steps, strict=True)]
        rows.append([model, "; ".join(texts), ", ".join(str(len(t)) for t in record.fact(model, "tried"))])
    for model in sorted(m for m in record.models if m.startswith(("masks", "selection"))):
        densities = [", ".join(f"{100 * x:.0f}" for x in d.values()) for d in record.fact(model, "density")]
        steps = record.fact(model, "best_step")
        texts = [f"step {s}, keeps {d} %" for s, d in zip(steps, densities, strict=True)]
        rows.append([model, "; ".join(texts), ""])
    return markdown(["merge", "chosen, by seed", "tried"], rows)


def answers(record: Record) -> str:
    """Exact match of generated answers."""
    rows = []
    for name, cell in record.cells.items():
        if name.startswith("answers/"):
            texts = []
            for d in ("math", "sql"):
                right = np.array(cell["right"].get(d, []), np.float64)
                error = standard_error(np.stack([right, np.ones_like(right)], 1)) if len(right) else 0
                texts.append(f"{100 * right.mean():.1f} ± {100 * error:.1f} ({len(right)})" if len(right) else "")
            rows.append([name.removeprefix("answers/seed0/"), *texts])
    return markdown(["model (first seed)", "GSM8K, % right (rows)", "WikiSQL, % right (rows)"], rows)


SHORT = {  # the README's rows, where they were measured
    "plain average": "plain average of the three",
    "task arithmetic": "best sum of the three's changes (scale tuned)",
    "TIES": "best TIES merge (scale and density tuned)",
    OURS: "**each weight one parent's (`select`), learnt from 100 rows a skill**",
    SELECTION.format("both", 30) + HELD: "the same from 30 rows a skill",
    SELECTION.format("expert", 10) + HELD: "the same from 10 rows a skill, without answers",
    SUMS: "masks learnt from 100 rows a skill, changes added up",
    "fine-tuning by answers, 100 rows": "for comparison: the best sum, fine-tuned on these 100 rows",
}


def readme(record: Record) -> str:
    """What the README shows of it: the seeds that have all of its rows."""
    shown = [m for m in SHORT if m in record.models]
    seeds = record.seeds_of(*shown)
    if not shown or not seeds:
        return ""
    same = Record({k: v for k, v in record.cells.items() if "/" not in k or k.split("/")[0] in seeds})
    rows = []
    for model in shown:
        kept = (f"{100 * same.share(model, d)[0]:.0f} %" for d in same.domains)
        rows.append([SHORT[model], *kept, difference(same, model, "base", "other").strip("*")])
    names = [f"keeps of {LONG[d]}" for d in record.domains]
    return markdown([f"one model of three ({len(seeds)} seed{'s' * (len(seeds) > 1)})", *names, "loss elsewhere"], rows)


def rebased(record: Record) -> str:
    """What a mask does to a model that its base became, as it is and fitted: losses minus that model's."""
    rows = []
    for model in dict.fromkeys(["base", *(m.split(", ")[0] for m in record.models)]):
        for domain in record.domains:
            mask = f"{model}, mask {domain}"
            if not record.seeds_of(mask):
                continue
            cells = [difference(record, mask, model, domain)]
            for how in ("rebased", "guarded"):
                fitted = f"{mask}, {how}"
                if not record.seeds_of(fitted):
                    cells += [""] * 3
                    continue
                others = [o for o in [*record.domains, "other"] if o != domain]
                worst = max(others, key=lambda o: record.difference(fitted, model, o)[0])
                cells += [
                    difference(record, fitted, model, domain),
                    ", ".join(f"{100 * d:.2f} %" for d in record.fact(fitted, "dropped")),
                    f"{difference(record, fitted, model, worst)} ({LONG.get(worst, 'fourth domain')})",
                ]
            called = f"expert of {LONG[model.removeprefix('expert ')]}" if model.startswith("expert ") else model
            rows.append([called, LONG[domain], *cells])
    fitted_heads = [head for how in ("rebased", "guarded") for head in (how, "drops", f"{how}, the worst other domain")]
    return markdown(["model", "mask of", "as it is", *fitted_heads], rows)


def table(make: Callable[[Record], str], record: Record) -> str:
    text = make(record)
    return text if text.count("\n") > 2 else "Not measured.\n"


def blocks() -> dict[str, Callable[[], str]]:
    """Name of a block on the page -> its table."""
    found: dict[str, Callable[[], str]] = {}
    tables = (shares, losses, by_rows, against_fine_tuning, goal, chosen, answers, readme)
    for name in SETTINGS:
        path = RECORDS / f"{name}.jsonl"
        if path.exists():
            record = Record.load(path)
            found |= {f"{name}: {t.__name__}": lambda t=t, r=record: table(t, r) for t in tables}  # type: ignore[misc]
    path = RECORDS / "moved.jsonl"
    if path.exists():
        moved = Record.load(path)
        found["moved: rebased"] = lambda: table(rebased, moved)
    return found


def page(text: str) -> str:
    """A page with every block made again."""
    return filled(text, blocks())


def main() -> None:
    if len(sys.argv) > 1:
        RECORDS.mkdir(exist_ok=True)
        lab = Path(sys.argv[1])
        shutil.copy(lab / "cells.jsonl", RECORDS / f"{'full' if lab.name.endswith('full') else 'four'}.jsonl")
        if (lab / "moved.jsonl").exists():
            shutil.copy(lab / "moved.jsonl", RECORDS)
    for path in (PAGE, README):
        with replacing(path) as temporary:
            temporary.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
