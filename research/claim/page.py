"""The tables of docs/claim.md, from results/: `python -m research.claim.page` writes them between the page's markers.

The study writes results/ and calls this, part by part; with `--collect OUT NAME` it is done by hand for one part.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mftmerge.evaluate import pairing
from mftmerge.evaluate.pairing import Values
from mftmerge.evaluate.results import markdown_table
from mftmerge.files import replacing
from research.claim.functions import VARIANTS

RESULTS = Path(__file__).parent / "results"
AGREEMENT = RESULTS / "agreement.json"
PAGE = Path(__file__).parents[2] / "docs" / "claim.md"
BEGIN, END = "<!-- generated: claim -->\n", "<!-- end -->"
States = dict[str, dict[str, Any]]  # of one run: losses and marks of every test row, by state
MARKS = {"exact": "exact match", "executed": "selects the same"}  # of answers: by their text, and run on tables
OVERVIEW = ("mask", "weights 1e-4", "weights 3e-4", "lora of equal bytes, 1e-3", "lora of equal bytes, 3e-3")
CHOSEN = {"last": "last step", "loss": "by validation loss", "exact": "by validation answers"}


def collect(out: Path, name: str) -> None:
    """Put the files of one part, a state each, into results/NAME.json: every test row's loss and mark.

    States that are on record there and not in `out` stay where they are of the same test rows: they may have been
    measured on another machine.
    """
    states = {p.stem: json.loads(p.read_text()) for p in sorted(out.glob("*.json")) if p.stem != "signal"}
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text())["states"] if path.exists() else {}
    fresh = {
        n: {k: s[k] for k in ("loss", *MARKS, "passed", "others", "step", "course") if k in s}
        for n, s in states.items()
    }
    rows = [n for _, n in fresh["base"]["loss"]]
    stay = {n: s for n, s in known.items() if [tokens for _, tokens in s["loss"]] == rows}
    kept = dict(sorted((stay | fresh).items()))
    signal = json.loads((out / "signal.json").read_text()) if (out / "signal.json").exists() else {}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"signal": signal, "states": kept}, separators=(",", ":"))
    path.write_text(text.replace('},"', '},\n"') + "\n")


def tables() -> str:
    """One table a results file, and before them one over the seeds of a domain."""
    parts = _agreement(json.loads(AGREEMENT.read_text())) if AGREEMENT.exists() else []
    domains = defaultdict[str, list[States]](list)
    single = []
    for path in sorted(set(RESULTS.glob("*.json")) - {AGREEMENT}):
        states = json.loads(path.read_text())["states"]
        if "base" in states:
            domains[path.stem.rpartition("-")[0]].append(states)
            single += [f"### {path.stem}", "", *_table(states), "", *_new_rows(path, states)]
    parts += ["### All bases", "", *_overview(domains), ""]
    for domain, seeds in domains.items():
        if len(seeds) > 1:
            parts += [f"### {domain}, over seeds", "", *_over_seeds(seeds), ""]
    return "\n".join([*parts, *single])


def _overview(parts: Mapping[str, Sequence[States]]) -> list[str]:
    """What the last states of the main runs gain or lose over each base."""
    rows = []
    for part, seeds in parts.items():
        found = [_mean_difference(seeds, f"{name} last", "base", ()) for name in OVERVIEW]
        if any(change for _, change in found):
            fewer = [f" ({n})" if change and int(n) < len(seeds) else "" for n, change in found]
            rows.append([part, str(len(seeds)), *(c + f for (_, c), f in zip(found, fewer, strict=True))])
    return markdown_table(["test loss at the last step, minus the base's", "seeds", *OVERVIEW], rows)


def _over_seeds(seeds: Sequence[States]) -> list[str]:
    """The last state of every run that more than one seed has, minus the base of its seed, and the mask minus it."""
    shown = [how for how in MARKS if any(how in states["base"] for states in seeds)]
    points = [f"points, {MARKS[how]}" for how in shown]
    head = ["state, last step", "seeds", "loss, minus the base's", *points, "the mask minus it: loss", *points]
    rows = []
    for name in sorted({n for states in seeds for n in states if not n.endswith((" loss", " exact", "base"))}):
        if len([s for s in seeds if name in s]) < 2:
            continue
        cells = [name.removesuffix(" last"), *_mean_difference(seeds, name, "base", shown)]
        if name.endswith(" last") and name != "mask last":
            cells += _mean_difference(seeds, "mask last", name, shown)[1:]
        rows.append(cells + [""] * (len(head) - len(cells)))
    return markdown_table(head, rows)


def _mean_difference(seeds: Sequence[States], name: str, other: str, shown: Sequence[str]) -> list[str]:
    """How many seeds have both states; difference in loss and in points of each mark, of means over these seeds.

    Seeds share their test rows: of each row the mean over seeds is taken first, so that the errors are those over rows.
    """
    both = [(s[name], s[other]) for s in seeds if name in s and other in s]

    def means(pairs: Sequence[Sequence[Values]]) -> list[Values]:
        return [np.mean([pair[side] for pair in pairs], 0) for side in (0, 1)]

    if not both:
        return ["0", ""]
    cells = [str(len(both)), _change(*means([[_losses(state) for state in pair] for pair in both]))]
    for how in shown:
        marked = [[_marks(state, how) for state in pair] for pair in both if all(how in state for state in pair)]
        found = pairing.paired(*means(marked)) if marked else None
        fewer = f" ({len(marked)})" if len(marked) < len(both) else ""
        cells.append(f"{100 * found.mean:+.1f} ± {100 * found.standard_error:.1f}{fewer}" if found else "")
    return cells


def _agreement(found: dict[str, Any]) -> list[str]:
    """How far batches agree, by base."""
    head = [
        "base",
        "same sign in two halves of the rows",
        "share of a batch's squared gradient that all have in common",
    ]
    rows = [[name, f"{f['agreement']:.3f}", f"{f['share']:.2f}"] for name, f in found.items()]
    return [*markdown_table(head, rows), ""]


def _losses(state: dict[str, Any]) -> Values:
    return np.array(state["loss"], np.float64)


def _marks(state: dict[str, Any], how: str) -> Values:
    """Marks of the test rows, each with the weight 1; none where a run was asked for losses alone."""
    marks = np.array(state.get(how, []), np.float64)
    return np.stack([marks, np.ones_like(marks)], 1)


def _change(losses: Values, others: Values) -> str:
    """Difference of losses, with its standard error."""
    difference = pairing.paired(losses, others)
    return f"{difference.mean:+.4f} ± {difference.standard_error:.4f}"


def _points(marks: Values, others: Values) -> list[str]:
    """Difference of exact matches in points with its interval, and McNemar's p; empty without marks."""
    if not len(marks) or not len(others):
        return ["", ""]
    low, high = pairing.newcombe(marks, others)
    difference = 100 * pairing.paired(marks, others).mean
    return [f"{difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", f"{pairing.mcnemar(marks, others):.2f}"]


def _table(states: States) -> list[str]:
    base, rows, widest = states["base"], [], 0.0
    shown = [how for how in MARKS if how in base]
    for name in sorted(states, key=lambda n: (n != "base", n)):
        state = states[name]
        cell, _, how = name.rpartition(" ")
        title, kept = (cell, CHOSEN[how]) if how in CHOSEN else (name, "")
        if kept and how != "last":
            kept += f": step {state['step']}" if state["step"] else ": the initial state"
        loss = _change(_losses(state), _losses(base)) if state is not base else f"{pairing.mean(_losses(state)):.4f}"
        cells = ["the base" if state is base else title, kept, loss]
        for mark in shown:
            marks, base_marks = _marks(state, mark), _marks(base, mark)
            share = f"{pairing.mean(marks):.1%}" if len(marks) else ""
            if state is base:
                low, high = pairing.wilson(marks[:, 0].sum(), len(marks))
                cells += [f"{share} [{low:.1%}, {high:.1%}]", "", ""]
            else:
                if len(marks):
                    widest = max(widest, pairing.visible(pairing.paired(marks, base_marks)))
                cells += [share, *_points(marks, base_marks)]
        rows.append(cells)
    columns = [column for how in shown for column in (MARKS[how], "points over the base, 95 %", "McNemar's p")]
    table = markdown_table(["state", "kept", "loss, minus the base's", *columns], rows)
    said = f"{len(base['loss'])} test rows"
    said += f"; of these, differences below {100 * widest:.1f} points would mostly be missed." if widest else "."
    return [*table, "", said, *_against(states), *_passed(states), *_forgotten(states)]


def _passed(states: States) -> list[str]:
    """Functions that the last states complete and that pass their tests. Those of one kind mostly pass or fail
    together, so that errors are those over kinds."""

    def by_kind(name: str) -> Values:
        marks = np.array(states[name]["passed"], np.float64).reshape(-1, VARIANTS)
        return np.stack([marks.mean(1), np.ones(len(marks))], 1)

    def points(name: str, other: str) -> str:
        found = pairing.paired(by_kind(name), by_kind(other))
        return f"{100 * found.mean:+.1f} ± {100 * found.standard_error:.1f}"

    measured = sorted(n for n, state in states.items() if "passed" in state and not n.endswith((" loss", " exact")))
    if "base" not in measured:
        return []
    rows = []
    for name in sorted(measured, key=lambda n: (n != "base", n)):
        share = f"{pairing.mean(by_kind(name)):.1%}"
        over = points(name, "base") if name != "base" else ""
        behind = points("mask last", name) if "mask last" in measured and name.endswith(" last") else ""
        rows.append([name.removesuffix(" last"), share, over, behind if name != "mask last" else ""])
    count = f"pass@1 of {len(states['base']['passed'])} functions"
    return ["", *markdown_table([count, "", "points over the base", "the mask minus it: points"], rows)]


def _forgotten(states: States) -> list[str]:
    """What the last states do to the other domains, minus the base, where that was measured."""
    if "others" not in states["base"]:
        return []
    domains = list(states["base"]["others"])
    rows = []
    measured = (n for n, state in states.items() if n != "base" and "others" in state)
    for name in sorted(n for n in measured if not n.endswith((" loss", " exact"))):
        cells = [name.removesuffix(" last")]
        for domain in domains:
            found, base = (np.array(states[n]["others"][domain], np.float64) for n in (name, "base"))
            cells.append(_change(found, base))
        rows.append(cells)
    head = ["loss on the other domains, minus the base's", *domains]
    return ["", *markdown_table(head, rows)] if rows else []


def _against(states: States) -> list[str]:
    """The default mask's last state minus that of every other run, row by row: both say the same of most rows."""
    if "mask last" not in states:
        return []
    mask, rows = states["mask last"], []
    shown = [how for how in MARKS if how in mask]
    for name in sorted(n for n in states if n.endswith(" last") and n != "mask last"):
        marked = [cell for how in shown for cell in _points(_marks(mask, how), _marks(states[name], how))]
        rows.append([name.removesuffix(" last"), _change(_losses(mask), _losses(states[name])), *marked])
    columns = [column for how in shown for column in (f"points of {MARKS[how]}, 95 %", "McNemar's p")]
    return ["", *markdown_table(["the mask minus ...", "loss", *columns], rows)] if rows else []


def _new_rows(path: Path, states: States) -> list[str]:
    """What a run gains more from rows that the base has not seen than from those it was tuned on; test rows paired."""
    known = path.with_name(path.name.replace(" new rows", ""))
    if known == path or not known.exists():
        return []
    others = json.loads(known.read_text())["states"]
    rows = []
    for name in sorted(n for n in states if n.endswith(" last") and n in others):
        pair = states[name], others[name]
        rows.append(
            [name.removesuffix(" last"), _change(*map(_losses, pair)), *_points(*(_marks(s, "exact") for s in pair))]
        )
    head = ["learnt from new rows, minus from the base's own", "loss", "points of exact match, 95 %", "McNemar's p"]
    return [*markdown_table(head, rows), ""]


def page(text: str) -> str:
    """The page with its tables made again."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + tables() + END + rest.split(END, 1)[1]


def write() -> None:
    with replacing(PAGE) as temporary:
        temporary.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", nargs=2, metavar=("OUT", "NAME"))
    given = parser.parse_args()
    if given.collect:
        collect(Path(given.collect[0]), given.collect[1])
    write()


if __name__ == "__main__":
    main()
