"""The masks themselves: what each one is, and how it was trained."""

from __future__ import annotations

import math
from pathlib import Path

from mftmerge.names import layer_of
from mftmerge.report.blocks import (
    Bold,
    Bullets,
    Cell,
    Content,
    Curve,
    Emphasis,
    PathText,
    Row,
    Section,
    Small,
    Span,
    Table,
    note,
)
from mftmerge.report.collect import Collection, MaskHere
from mftmerge.report.gains import mask_gains, verdict_style
from mftmerge.report.numbers import count, layers_in_words, nbytes, options, plain, signed

STARTS = {"normal": "random scores", "magnitude": "the smallest weights"}


def masks_section(found: Collection) -> Section | None:
    """The list of masks, a line each."""
    if not found.masks:
        return None
    heads: list[Row] = [["mask", *map(Cell, ("what it is", "base", "trained on")), "density", "weights", Cell("gain")]]
    rows: list[Row] = [_row(found, number, mask) for number, mask in enumerate(found.masks)]
    legend = "Density: share of the covered weights that is kept."
    if found.results:
        legend += (
            " Gain: difference from the results' reference row ± one paired standard error (losses in nats per token, "
            "below zero is better)."
        )
    name = found.directory.resolve().name
    return Section("masks", "Masks", [Table(f"Masks in {name}", heads, rows, "list"), note(legend)])


def training_section(found: Collection) -> Section | None:
    """How the trained masks' validation losses went."""
    trained = [mask for mask in found.masks if mask.kind == "trained"]
    return Section("training", "Training", _training(trained)) if trained else None


def what(mask: MaskHere) -> str:
    """What a mask is, in a few words."""
    info = mask.found.info
    return _what(mask) + (f", on the delta from {info.delta_base or 'a model not named'}" if info.on == "delta" else "")


def _what(mask: MaskHere) -> str:
    info = mask.found.info
    training = info.training
    if mask.kind == "combined":
        return f"{info.operation} of {', '.join(Path(p.name).stem for p in info.parents)}{options(info.options)}"
    if mask.kind == "trained":
        return f"trained, {plain(training['steps'])} steps"
    if mask.kind == "untrained":
        start = STARTS.get(str(training.get("init")), str(training.get("init")))
        return f"not trained: prunes {start}" if training.get("init") == "magnitude" else f"not trained: {start}"
    if "method" in training:
        return f"closed form, {training['method']}, from {training.get('pretrained', 'a pretrained model')}"
    return f"imported from {training['imported']}" if "imported" in training else "origin not recorded"


def trained_on(mask: MaskHere) -> str:
    """The data and the number of rows, as far as the mask or the file beside it says so."""
    training = mask.found.info.training
    if mask.kind != "trained":
        return ""
    source, rows = plain(mask.settings.get("data")), training.get("rows")
    counted = f"{rows} rows" if isinstance(rows, int) else ""
    return ", ".join(dict.fromkeys(t for t in (source, counted) if t)) or "not recorded"


def _row(found: Collection, number: int, mask: MaskHere) -> Row:
    inside = mask.found
    layers = sorted({n for n in map(layer_of, inside.tensors) if n is not None})
    copies = [Small(["also ", PathText(other)]) for other in mask.copies]
    name = Span([Bold(mask.name), Small(PathText(mask.path)), *copies], id=f"mask-{number}")
    said = [what(mask), Small(mask.note) if mask.note else None]
    covered = [count(inside.total.size), Small(layers_in_words(layers)) if layers else None]
    return [
        Cell(name),
        Cell(said),
        Cell(PathText(inside.info.base) if inside.info.base else "not recorded"),
        Cell(trained_on(mask)),
        f"{inside.total.density:.4f}",
        Cell(covered, "n", title=f"{inside.total.size:,} weights, {nbytes(inside.file_bytes)} on disk"),
        Cell(_gain(found, mask)),
    ]


def _gain(found: Collection, mask: MaskHere) -> Content:
    """Differences on held-out rows where there are results, else what training saw on its validation rows."""
    lines = mask_gains(found, mask)
    if lines:
        said = [
            (domain, " ", Span(number, f"num {verdict_style(word)}"), " ", Emphasis(word))
            for domain, number, word in lines
        ]
        return Bullets(said, "gains")
    measured = validation(mask)
    if mask.kind == "trained" and measured:
        best = min(loss for _, loss in measured)
        return f"{signed(best - measured[0][1])} on validation rows, from the mask it started with"
    return "not measured"


def validation(mask: MaskHere) -> list[tuple[float, float]]:
    """(step, validation loss) pairs of the training."""
    history = mask.found.info.training.get("validation")
    pairs = history if isinstance(history, list) else []
    return [
        (float(p[0]), float(p[1]))
        for p in pairs
        if isinstance(p, list) and len(p) == 2 and all(isinstance(x, int | float) and math.isfinite(x) for x in p)
    ]


def _training(masks: list[MaskHere]) -> Content:
    heads: list[Row] = [
        [
            "mask",
            "rows",
            "steps",
            "best step",
            "loss at step 0",
            "best loss",
            "change",
            Cell("validation loss", "pic"),
            Cell("verdict"),
        ]
    ]
    rows: list[Row] = []
    for mask in masks:
        training, points = mask.found.info.training, validation(mask)
        first, best = (points[0][1], min(loss for _, loss in points)) if points else (None, None)
        numbers = [plain(training.get(k)) for k in ("rows", "steps", "best_step")]
        losses = (
            [f"{first:.4f}", f"{best:.4f}", signed(best - first)]
            if first is not None and best is not None
            else [""] * 3
        )
        gained = "gained" if training.get("gained") else "nothing gained"
        rows.append([mask.name, *numbers, *losses, Cell(Curve(points), "pic"), Cell(gained, "word")])
    whole = Table("Training, in nats per token on validation rows", heads, rows)
    said = note("Step 0 is the mask that training started from. The best mask is kept, step 0 included.")
    return [whole, said, *(_control(m) for m in masks if m.found.info.comparison)]


def _control(mask: MaskHere) -> Table:
    """What `train --control` measured."""
    rows: list[Row] = []
    for name, measured in mask.found.info.comparison.items():
        if not isinstance(measured, dict):
            continue
        loss, change, error = (measured.get(k) for k in ("loss", "difference", "standard_error"))
        difference = ""
        if isinstance(change, int | float) and isinstance(error, int | float):
            difference = f"{signed(float(change))} ± {float(error):.4f}"
        rows.append([name, f"{loss:.4f}" if isinstance(loss, int | float) else "", difference])
    return Table(f"{mask.name}: against its controls, on validation rows", [["", "loss", "minus base ± error"]], rows)
