"""The page put together, and the same in JSON: `write_report`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mftmerge import __version__
from mftmerge.errors import BadInput
from mftmerge.evaluate.results import finite
from mftmerge.files import refuse_existing, replacing
from mftmerge.maskheader import info_json
from mftmerge.names import layer_of
from mftmerge.overlap import Comparison
from mftmerge.report.collect import Collection, MaskHere, ResultHere, collect
from mftmerge.report.conclusion import conclusion_section
from mftmerge.report.density import density_section
from mftmerge.report.family import family_section
from mftmerge.report.gains import results_sections
from mftmerge.report.html import Html, el, join
from mftmerge.report.html import path as path_text
from mftmerge.report.masks import masks_section, trained_on, training_section, what
from mftmerge.report.numbers import count, layers_in_words
from mftmerge.report.overlap import comparisons, overlap_section
from mftmerge.report.settings import settings_section

NAME = "report.html"
# The page needs nothing from anywhere: a browser that reads this line refuses scripts and every request.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Report:
    """A report that was written: where, about what, and the overlaps that it shows."""

    path: Path
    found: Collection
    compared: list[Comparison]

    def to_json(self) -> dict[str, Any]:
        """What is on the page, as plain values; differences are from each result's reference row."""
        return {
            "report": str(self.path),
            "masks": [_mask_json(m) for m in self.found.masks],
            "results": [_result_json(r) for r in self.found.results],
            "sweeps": [{"path": s.path, "runs": len(s.masks), "tests": s.tests} for s in self.found.sweeps],
            "overlaps": [{k: v for k, v in c.to_json().items() if k != "moved"} for c in self.compared],
            "problems": [{"file": name, "problem": what} for name, what in self.found.problems],
        }

    def summary(self) -> str:
        """One line: what the page holds."""
        rows = sum(len(r.result.models) for r in self.found.results)
        parts = [(len(self.found.masks), "mask"), (rows, "measured model"), (len(self.found.sweeps), "sweep")]
        return ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in parts if n)


def write_report(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Write one HTML page about the masks and results below `directory`, whole or not at all.

    out: `report.html` in that directory by default. Files that cannot be read are named on the page and in
    `found.problems`. Raises BadInput where there is nothing to report, or `out` exists and `overwrite` is not given.
    """
    out = Path(directory) / NAME if out is None else Path(out)
    if out.is_dir():
        raise BadInput(f"{out}: is a directory; give the name of a file, such as {out / NAME}")
    refuse_existing(out, overwrite, (directory,))
    if out.exists() and out.suffix not in (".html", ".htm"):  # any other file may be what the report is about
        raise BadInput(f"{out}: is no HTML page, so it is not overwritten; give another path")
    if Path(directory).is_dir() and not out.parent.is_dir():
        raise BadInput(f"{out}: there is no directory {out.parent}; make it first")
    found = collect(directory, say)
    compared = comparisons(found, say)
    with replacing(out) as temporary:
        temporary.write_text(page(found, compared), encoding="utf-8")
    return Report(out, found, compared)


def page(found: Collection, compared: list[Comparison]) -> str:
    """The whole page. The same files give the same page."""
    wanted = [
        conclusion_section(found),
        *results_sections(found),
        masks_section(found),
        density_section(found),
        overlap_section(found, compared),
        family_section(found),
        training_section(found),
        settings_section(found),
    ]
    sections = [s for s in wanted if s is not None]
    name = found.directory.resolve().name or "masks and results"
    contents = el("nav", *(el("a", s.title, href=f"#{s.id}") for s in sections), aria_label="Contents")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{name}: masks and results"),
        el("style", Html(files("mftmerge.report").joinpath("style.css").read_text(encoding="utf-8"))),
    )
    header = el("header", el("p", "mftmerge report", cls="brand"), el("h1", name), _facts(found), _problems(found))
    main = el("main", *(el("section", el("h2", s.title), s.body, id=s.id, tabindex="-1") for s in sections))
    footer = el("footer", f"Made by mftmerge {__version__} from the files in {name}.")
    body = el("body", header, contents, main, footer)
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def _facts(found: Collection) -> Html:
    """What is here, at a glance."""
    facts: dict[str, Any] = {}
    if found.masks:
        kinds = [m.kind for m in found.masks]
        said = [f"{kinds.count(k)} {w}" for k, w in _KINDS.items() if k in kinds]
        facts["masks"] = join([el("b", str(len(kinds))), el("span", ", ".join(said), cls="sub")])
        largest = max(found.masks, key=lambda m: m.found.total.size).found
        bases = sorted({m.found.info.base for m in found.masks if m.found.info.base})
        base = bases[0] if len(bases) == 1 else f"{len(bases)} different ones" if bases else "not recorded"
        facts["base"] = join([el("b", path_text(base)), el("span", "that the masks were made for", cls="sub")])
        layers = layers_in_words(sorted({n for n in map(layer_of, largest.tensors) if n is not None}))
        covered = f"in {len(largest.tensors)} matrices{f' of {layers}' if layers else ''}"
        facts["weights covered"] = join([el("b", count(largest.total.size)), el("span", covered, cls="sub")])
    if found.results:
        rows = sum(len(r.result.models) for r in found.results)
        domains = list(dict.fromkeys(d for r in found.results for d in r.result.domains))
        facts["models measured"] = join([el("b", str(rows)), el("span", f"on {', '.join(domains)}", cls="sub")])
    if found.sweeps:
        tried = sum(len(s.combinations) for s in found.sweeps)
        facts["sweeps"] = join([el("b", str(len(found.sweeps))), el("span", f"settings tried: {tried}", cls="sub")])
    day = time.strftime("%Y-%m-%d", time.gmtime(found.newest))
    facts["newest file"] = join(
        [el("b", day), el("span", time.strftime("%H:%M UTC", time.gmtime(found.newest)), cls="sub")]
    )
    return el("dl", *(el("div", el("dt", k), el("dd", v)) for k, v in facts.items()), cls="glance")


_KINDS = {"trained": "trained", "combined": "combined", "other": "from elsewhere", "untrained": "not trained"}


def _problems(found: Collection) -> Html | None:
    """What could not be read, said where it cannot be missed."""
    if not found.problems:
        return None
    lines = [el("li", el("b", name), ": ", said) for name, said in found.problems]
    title = f"{len(lines)} {'thing is' if len(lines) == 1 else 'things are'} missing from this page"
    return el("div", el("p", el("b", title)), el("ul", *lines), cls="problems", role="alert")


def _mask_json(mask: MaskHere) -> dict[str, Any]:
    inside = mask.found
    plain: dict[str, Any] = {
        "name": mask.name,
        "path": mask.path,
        "copies": list(mask.copies),
        "kind": mask.kind,
        "what": what(mask),
    }
    plain |= {"digest": inside.digest, "density": inside.total.density, "weights": inside.total.size}
    plain |= {"tensors": len(inside.tensors), "base": inside.info.base, "trained_on": trained_on(mask) or None}
    plain |= {"by_layer": {"other" if k is None else str(k): s.density for k, s in inside.by_layer().items()}}
    plain |= {"by_module": {k: s.density for k, s in inside.by_module().items()}}
    return plain | {"parents": info_json(inside.info).get("parents", [])}


def _result_json(here: ResultHere) -> dict[str, Any]:
    result, cells = here.result, []
    for row, domain, metric in result.cells:
        difference = result.difference(row, domain, metric)
        cell: dict[str, Any] = {"model": row, "domain": domain, "metric": metric}
        cell |= {"mean": result.mean(row, domain, metric), "difference": difference.mean}
        cell |= {"standard_error": finite(difference.standard_error), "rows": difference.n}
        word = "reference" if row == result.reference else result.verdict(row, domain, metric)
        cells.append(cell | {"verdict": word})
    return {"path": here.path, "contains": list(here.contained), "reference": result.reference, "measured": cells}
