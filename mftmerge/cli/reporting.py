"""What several commands print about their result."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftmerge.errors import shown

if TYPE_CHECKING:
    from mftmerge.mask import Mask


_level = 0  # of what is said: -1 with --quiet, 1 with --verbose


def verbosity() -> int:
    """-1 with --quiet, 1 with --verbose, else 0."""
    return _level


def set_verbosity(level: int) -> None:
    """For the whole run. With 1, what the libraries log is shown as well."""
    global _level
    _level = level
    if level > 0:
        logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)


def say(*lines: str, error: bool = False) -> None:
    """Lines for the reader, on stdout or stderr. What does not print, in names and texts of files, becomes escapes.

    With --quiet, notes and hints are left out; results and errors are not.
    """
    for line in lines:
        if _level < 0 and line.startswith(("note: ", "next: ")):
            continue
        print(shown(line), file=sys.stderr if error else sys.stdout)


def print_json(value: Any) -> None:
    """A report as the one JSON document on stdout; numbers that JSON does not have (NaN, infinities) become null."""
    import json

    print(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout; names are shown as they are, whatever a terminal or rich would make of them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, title=title and Text(shown(title), style="italic"), box=None)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console(width=1000).print(table)


def new_mask(mask: Mask, out: Path, notes: Sequence[str], as_json: bool) -> None:
    """A mask that was written to `out`: tensors, weights, density and notes, for people or as JSON."""
    facts = {"tensors": len(mask.names), "weights": sum(map(mask.size, mask.names)), "density": mask.density()}
    if as_json:
        whole = {"out": str(out), "bytes": out.stat().st_size, "digest": mask.digest, **facts, "notes": list(notes)}
        print_json(whole)
        return
    say(f"{out}: {facts['tensors']} tensors, {facts['weights']:,} weights, density {facts['density']:.4f}")
    for note in notes:
        say(f"note: {note}")
    say(f"next: mftmerge inspect {out}, or mftmerge apply {out} --model MODEL -o DIR")


def quiet() -> None:
    """Leave the terminal to our own lines, except with --verbose."""
    if _level > 0:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
