"""Settings of the trainings, and what the evaluations and sweeps were made with."""

from __future__ import annotations

from typing import Any

from mftmerge.report.blocks import Cell, Section, details, table
from mftmerge.report.collect import Collection, MaskHere, is_plain
from mftmerge.report.html import Html, el, join
from mftmerge.report.numbers import plain

SHOWN_ELSEWHERE = {"validation", "best_step", "gained", "rows", "init_digest", "data"}  # of a mask's header
LONG = 60  # characters of a value that takes a line of its own


def settings_section(found: Collection) -> Section | None:
    """Settings of the trainings, common ones once; what the evaluations were made with."""
    parts: list[Any] = []
    trained = {m.name: _all_settings(m) for m in found.masks if m.kind in ("trained", "untrained")}
    if trained:
        parts.append(_compared(trained))
    for here in found.results:
        facts = {f"rows of {d}": plain(f.get("rows")) for d, f in here.result.domains.items()}
        facts |= {f"digest of {d}": plain(f.get("digest")) for d, f in here.result.domains.items()}
        facts |= {k: plain(v) for k, v in here.result.versions.items() if is_plain(v)}
        facts |= _flat({k: v for k, v in here.result.extra.items() if k != "lm_eval"})
        parts.append(details(join([el("b", here.path), ": data, versions and what else was recorded"]), _pairs(facts)))
    for sweep in found.sweeps:
        parts.append(details(join([el("b", sweep.path), ": model, data and versions"]), _pairs(_flat(sweep.head))))
    return Section("settings", "Settings", join(parts)) if parts else None


def _all_settings(mask: MaskHere) -> dict[str, str]:
    """Settings in the mask's header, and those in the file beside it that the header does not repeat."""
    training = mask.found.info.training
    header = {k: v for k, v in training.items() if k not in SHOWN_ELSEWHERE and is_plain(v)}
    header["data digest"] = str(training.get("data", ""))[:12]
    return {k: plain(v) for k, v in (mask.settings | header).items() if v not in (None, "")}


def _compared(settings: dict[str, dict[str, str]]) -> Html:
    names = sorted({name for own in settings.values() for name in own})
    same = {
        n: next(iter(settings.values())).get(n) for n in names if len({own.get(n) for own in settings.values()}) == 1
    }
    parts: list[Any] = []
    differing = [n for n in names if n not in same]
    if differing:
        heads = [["setting", *(Cell(name) for name in settings)]]
        rows = [[el("code", n), *(Cell(own.get(n, "")) for own in settings.values())] for n in differing]
        parts.append(table("Training settings that differ between the masks", heads, rows))
    title = "Training settings" if len(settings) == 1 else "Training settings that all these masks share"
    parts.append(details(el("b", title), _pairs({k: str(v) for k, v in same.items()})) if same else None)
    return join(parts)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, what can be shown of them."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and prefix.count(".") < 4:
            found |= _flat(item, f"{prefix}{key}.")
        elif is_plain(item):
            found[f"{prefix}{key}"] = plain(item)
    return found


def _pairs(facts: dict[str, str]) -> Html:
    rows = [(el("dt", k), el("dd", v), "wide" if len(v) > LONG else None) for k, v in facts.items()]
    return el("dl", *(el("div", name, value, cls=style) for name, value, style in rows), cls="facts")
