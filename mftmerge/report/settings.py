"""Settings of the trainings, and what the evaluations and sweeps were made with."""

from __future__ import annotations

from mftmerge.evaluate.results import BY_LAYER
from mftmerge.report.blocks import Bold, Cell, Code, Content, Details, Facts, Row, Section, Table
from mftmerge.report.collect import Collection, MaskHere, is_plain
from mftmerge.report.numbers import plain

SHOWN_ELSEWHERE = {"validation", "best_step", "gained", "rows", "init_digest", "data"}  # of a mask's header


def settings_section(found: Collection) -> Section | None:
    """Settings of the trainings, common ones once; what the evaluations were made with."""
    parts: list[Content] = []
    trained = {m.name: _all_settings(m) for m in found.masks if m.kind in ("trained", "untrained")}
    if trained:
        parts.append(_compared(trained))
    for here in found.results:
        facts = {f"rows of {d}": plain(f.get("rows")) for d, f in here.result.domains.items()}
        facts |= {f"digest of {d}": plain(f.get("digest")) for d, f in here.result.domains.items()}
        facts |= {k: plain(v) for k, v in here.result.versions.items() if is_plain(v)}
        facts |= _flat({k: v for k, v in here.result.extra.items() if k not in ("lm_eval", BY_LAYER)})
        parts.append(Details([Bold(here.path), ": data, versions and what else was recorded"], Facts(facts)))
    for sweep in found.sweeps:
        parts.append(Details([Bold(sweep.path), ": model, data and versions"], Facts(_flat(sweep.head))))
    return Section("settings", "Settings", parts) if parts else None


def _all_settings(mask: MaskHere) -> dict[str, str]:
    """Settings in the mask's header, and those in the file beside it that the header does not repeat."""
    training = mask.found.info.training
    header = {k: v for k, v in training.items() if k not in SHOWN_ELSEWHERE and is_plain(v)}
    header["data digest"] = str(training.get("data", ""))[:12]
    return {k: plain(v) for k, v in (mask.settings | header).items() if v not in (None, "")}


def _compared(settings: dict[str, dict[str, str]]) -> Content:
    names = sorted({name for own in settings.values() for name in own})
    same = {
        n: next(iter(settings.values())).get(n) for n in names if len({own.get(n) for own in settings.values()}) == 1
    }
    parts: list[Content] = []
    differing = [n for n in names if n not in same]
    if differing:
        heads: list[Row] = [["setting", *(Cell(name) for name in settings)]]
        rows: list[Row] = [[Code(n), *(Cell(own.get(n, "")) for own in settings.values())] for n in differing]
        parts.append(Table("Training settings that differ between the masks", heads, rows))
    title = "Training settings" if len(settings) == 1 else "Training settings that all these masks share"
    parts.append(Details(Bold(title), Facts({k: str(v) for k, v in same.items()})) if same else None)
    return parts


def _flat(value: dict[str, object], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, what can be shown of them."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and prefix.count(".") < 4:
            found |= _flat(item, f"{prefix}{key}.")
        elif is_plain(item):
            found[f"{prefix}{key}"] = plain(item)
    return found
