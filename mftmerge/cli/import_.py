"""`mftmerge import`: masks from other tools."""

from __future__ import annotations

from pathlib import Path

import typer

from mftmerge.cli.completing import files
from mftmerge.cli.reporting import new_mask


def command(
    source: Path = typer.Argument(
        help="A .pt pickle (dict of names to 0/1 tensors), or a .safetensors file of masks.",
        autocompletion=files(".pt", ".pth", ".bin", ".pkl", ".safetensors"),
    ),
    out: Path = typer.Option(..., "--out", "-o", help="The mask file to write."),
    model: str = typer.Option(
        None, "--model", "-m", help="The checkpoint it belongs to: checks names and shapes, records fingerprints."
    ),
    archive: bool = typer.Option(False, "--archive", help="Compress the result (about half the size)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the output where it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Import a mask from another tool's file: one bit a weight instead of a number.

    \b
    Reads the files of the MFT release (pickled float masks by module name) without running code in them,
    and safetensors of bool, integer or float masks. 1 means keep.
    Example:
      mftmerge import masks.pt --model ./fft-model -o code.mask
    """
    from mftmerge.files import refuse_existing
    from mftmerge.foreign import import_mask

    refuse_existing(out, overwrite)
    mask, notes = import_mask(source, model)
    mask.save(out, archive=archive, overwrite=overwrite)
    new_mask(mask, out, [*notes, f"{source.stat().st_size:,} bytes became {out.stat().st_size:,}"], as_json)
