"""The page put together, and the same in JSON: `write_report`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftmerge import __version__
from mftmerge.errors import BadInput
from mftmerge.evaluate.results import finite
from mftmerge.files import refuse_existing, write_text
from mftmerge.maskheader import info_json
from mftmerge.names import layer_name, layer_of
from mftmerge.overlap import Comparison
from mftmerge.report.blocks import Content, PathText
from mftmerge.report.collect import Collection, MaskHere, ResultHere, collect
from mftmerge.report.conclusion import conclusion_section
from mftmerge.report.density import density_section
from mftmerge.report.family import family_section
from mftmerge.report.gains import results_sections
from mftmerge.report.masks import masks_section, trained_on, training_section, what
from mftmerge.report.numbers import count, layers_in_words
from mftmerge.report.overlap import comparisons, overlap_section
from mftmerge.report.settings import settings_section
from mftmerge.report.template import render

NAME = "report.html"


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
    write_text(out, page(found, compared))
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
    facts = {"name": name, "version": __version__, "problems": found.problems}
    return render("page.html", glance=_glance(found), sections=sections, **facts)


@dataclass(frozen=True)
class Fact:
    """One thing at a glance: what it is about, in large letters, and more below it."""

    about: str
    value: Content
    more: str


def _glance(found: Collection) -> list[Fact]:
    """What is here."""
    facts: list[Fact] = []
    if found.masks:
        kinds = [m.kind for m in found.masks]
        said = [f"{kinds.count(k)} {w}" for k, w in _KINDS.items() if k in kinds]
        facts.append(Fact("masks", str(len(kinds)), ", ".join(said)))
        largest = max(found.masks, key=lambda m: m.found.total.size).found
        bases = sorted({m.found.info.base for m in found.masks if m.found.info.base})
        base = bases[0] if len(bases) == 1 else f"{len(bases)} different ones" if bases else "not recorded"
        facts.append(Fact("base", PathText(base), "that the masks were made for"))
        layers = layers_in_words(sorted({n for n in map(layer_of, largest.tensors) if n is not None}))
        covered = f"in {len(largest.tensors)} matrices{f' of {layers}' if layers else ''}"
        facts.append(Fact("weights covered", count(largest.total.size), covered))
    if found.results:
        rows = sum(len(r.result.models) for r in found.results)
        domains = list(dict.fromkeys(d for r in found.results for d in r.result.domains))
        facts.append(Fact("models measured", str(rows), f"on {', '.join(domains)}"))
    if found.sweeps:
        tried = sum(len(s.combinations) for s in found.sweeps)
        facts.append(Fact("sweeps", str(len(found.sweeps)), f"settings tried: {tried}"))
    newest = time.gmtime(found.newest)
    facts.append(Fact("newest file", time.strftime("%Y-%m-%d", newest), time.strftime("%H:%M UTC", newest)))
    return facts


_KINDS = {"trained": "trained", "combined": "combined", "other": "from elsewhere", "untrained": "not trained"}


def _mask_json(mask: MaskHere) -> dict[str, object]:
    inside = mask.found
    plain: dict[str, object] = {
        "name": mask.name,
        "path": mask.path,
        "copies": list(mask.copies),
        "kind": mask.kind,
        "what": what(mask),
    }
    plain |= {"digest": inside.digest, "density": inside.total.density, "weights": inside.total.size}
    plain |= {"tensors": len(inside.tensors), "base": inside.info.base, "trained_on": trained_on(mask) or None}
    plain |= {"by_layer": {layer_name(k): s.density for k, s in inside.by_layer().items()}}
    plain |= {"by_module": {k: s.density for k, s in inside.by_module().items()}}
    return plain | {"parents": info_json(inside.info).get("parents", [])}


def _result_json(here: ResultHere) -> dict[str, object]:
    result, cells = here.result, []
    for row, domain, metric in result.cells:
        difference = result.difference(row, domain, metric)
        cell: dict[str, object] = {"model": row, "domain": domain, "metric": metric}
        cell |= {"mean": result.mean(row, domain, metric), "difference": difference.mean}
        cell |= {"standard_error": finite(difference.standard_error), "rows": difference.n}
        word = "reference" if row == result.reference else result.verdict(row, domain, metric)
        cells.append(cell | {"verdict": word})
    return {"path": here.path, "contains": list(here.contained), "reference": result.reference, "measured": cells}
