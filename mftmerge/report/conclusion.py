"""What the results come to, before everything else: what combinations keep of each own gain, and who harms whom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mftmerge.evaluate.results import LOSS, GridResult
from mftmerge.report.blocks import Bar, Bold, Cell, Content, Paragraph, Row, Section, Small, Span, Table, note
from mftmerge.report.collect import Collection, ResultHere, layer_changes
from mftmerge.report.numbers import measured, signed

LEGEND = (
    "Kept: what a row gains over the reference on a domain, of what its own mask gains there, ± one standard "
    "error; 100 % is all of it, below 0 is worse than the reference. A domain counts where that gain is beyond two "
    "standard errors. Best is the row whose worst served domain keeps most."
)
OTHERS = (
    "What each domain's own mask does to the other domains' loss, nats per token ± one paired standard error: helps or "
    "harms beyond two of them, else it could be chance."
)
WORDS = {"gain": "helps", "worse": "harms", "identical": "changes nothing"}
LAYERS = (
    "Predicted loss on top of the own mask's, nats per token, if only this layer of it were that of the combination: "
    "the layers where a domain gives most to the others."
)
MOST = 12  # rows of the table


@dataclass(frozen=True)
class Kept:
    """A row of results: domain -> (share kept, standard error)."""

    row: str
    shares: dict[str, tuple[float, float]]

    @property
    def lowest(self) -> float:
        return min(share for share, _ in self.shares.values())


def conclusion_section(found: Collection) -> Section | None:
    """For the results that have masks of several domains, the share of each own gain that is kept, and what each own
    mask does to the others' domains; else none."""
    kept_shares = [part for here in found.results if (part := _result(here)) is not None]
    others = [part for here in found.results if (part := _others(here)) is not None]
    layers = [table for here in found.results for table in _layers(here)]
    title = "What the combinations keep" if kept_shares else "Who helps and who harms whom"
    return Section("conclusion", title, [*kept_shares, *others, *layers]) if kept_shares or others else None


def own_masks(result: GridResult) -> dict[str, str]:
    """Domain -> the row of its own mask: the one named after it, else the learnt one with the lowest loss there."""
    found = {}
    learnt = [r for r, f in result.models.items() if f.get("mask") and not f.get("operation") and r != result.reference]
    for domain in result.domains:
        named = [r for r in learnt if domain in (r, r.rpartition("+")[2], r.removesuffix(" mask"))]
        measured = [r for r in named or learnt if (r, domain, LOSS) in result.cells]
        if measured and (result.reference, domain, LOSS) in result.cells:
            own = min(measured, key=lambda row: result.mean(row, domain))
            if result.verdict(own, domain) == "gain":
                found[domain] = own
    return found if len(set(found.values())) > 1 else {}


def kept(result: GridResult) -> list[Kept]:
    """Of every other row that was measured on all domains that count, best first."""
    own = own_masks(result)
    rows = [
        Kept(row, {domain: result.share(row, own[domain], domain) for domain in own})
        for row in result.models
        if row != result.reference and row not in own.values() and all((row, d, LOSS) in result.cells for d in own)
    ]
    return sorted((r for r in rows if own and math.isfinite(r.lowest)), key=lambda r: -r.lowest)


def _result(here: ResultHere) -> Content:
    result, rows = here.result, kept(here.result)
    if not rows:
        return None
    own = own_masks(result)
    best = rows[0]
    said = ", ".join(f"{100 * share:.0f} % of {domain}'s" for domain, (share, _) in best.shares.items())
    gains = ", ".join(f"{domain} {-result.difference(row, domain).mean:.3f}" for domain, row in own.items())
    words = f" keeps {said} own gain. A domain's own mask lowers its loss, in nats per token, by: {gains}."
    lead = Paragraph((Bold(best.row), words), "lead")
    heads: list[Row] = [["", *(Cell(domain, "pic") for domain in own), "lowest"]]
    body: list[Row] = [
        [Span(r.row), *(_share(*r.shares[d]) for d in own), f"{100 * r.lowest:.0f} %"] for r in rows[:MOST]
    ]
    left = note(f"{len(rows) - MOST} further rows are below.") if len(rows) > MOST else None
    table = Table(f"{here.path}: share of each own gain that is kept", heads, body, "grid")
    return [lead, table, left, note(LEGEND)]


def _share(share: float, error: float) -> Cell:
    words = f"{100 * share:.0f} % ± {100 * error:.0f}" if math.isfinite(error) else f"{100 * share:.0f} %"
    return Cell([Bar(share), Span(words.replace("-", "\u2212"), "num")], "pic share")


def _others(here: ResultHere) -> Content:
    """Who helps and who harms whom: the own masks on each other's domains, where all of these were measured."""
    result, own = here.result, own_masks(here.result)
    if not own or any((row, domain, LOSS) not in result.cells for row in own.values() for domain in own):
        return None
    heads: list[Row] = [["own mask of", *(Cell(f"on {domain}", "pic") for domain in own)]]
    body: list[Row] = []
    for domain, row in own.items():
        cells: Row = [Span(domain)]
        for other in own:
            change, verdict = result.difference(row, other), result.verdict(row, other)
            said = f"{measured(change.mean, LOSS, sign=True)} ± {measured(change.standard_error, LOSS)}"
            word = "its own" if other == domain else WORDS.get(verdict, "could be chance")
            style = "even" if other == domain else {"gain": "good", "worse": "bad"}.get(verdict, "even")
            cells.append(Cell([said, Small(word)], f"n {style}"))
        body.append(cells)
    return [Table(f"{here.path}: who helps and who harms whom", heads, body, "grid"), note(OTHERS)]


def _layers(here: ResultHere) -> Iterator[Content]:
    """What each layer of a combination costs every domain, where `mftmerge choose` predicted that."""
    for row, domains in layer_changes(here.result).items():
        layers = list(dict.fromkeys(layer for changes in domains.values() for layer in changes))
        heads: list[Row] = [["", *(Cell(f"layer {layer}", "n") for layer in layers)]]
        body: list[Row] = [
            [domain, *(Cell(signed(changes[n]) if n in changes else "", "n") for n in layers)]
            for domain, changes in domains.items()
        ]
        yield Table(f"{here.path}: what each layer of {row} costs, as predicted", heads, body, "grid")
        yield note(LAYERS)
