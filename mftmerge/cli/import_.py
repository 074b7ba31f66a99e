"""`mftmerge import`: masks from other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import Archive, AsJson, MaskOut, Overwrite, files
from mftmerge.cli.reporting import new_mask

MODEL = "The checkpoint it belongs to: checks names and shapes, records fingerprints."


def command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .pt pickle (dict of names to 0/1 tensors), or a .safetensors file of masks.",
            autocompletion=files(".pt", ".pth", ".bin", ".pkl", ".safetensors"),
        ),
    ],
    out: MaskOut,
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL)] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The mask keeps changes from this checkpoint (a delta); without it dropped weights are 0."),
    ] = None,
    archive: Archive = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Import a mask from another tool's file: one bit a weight instead of a number.

    \b
    Reads the files of the MFT release (pickled float masks by module name) without running code in them,
    and safetensors of bool, integer or float masks. 1 means keep.
    Example:
      mftmerge import masks.pt --model ./fft-model -o code.mask
    """
    from mftmerge.derive import import_mask
    from mftmerge.files import refuse_existing

    refuse_existing(out, overwrite, (source, model))
    notes: list[str] = []
    mask = import_mask(source, model, base, note=notes.append)
    mask.save(out, archive=archive, overwrite=overwrite)
    new_mask(mask, out, [*notes, f"{source.stat().st_size:,} bytes became {out.stat().st_size:,}"], as_json)
