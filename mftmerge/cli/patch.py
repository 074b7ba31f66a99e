"""`mftmerge patch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import MASKS, AsJson, Overwrite, files
from mftmerge.cli.reporting import print_json, say
from mftmerge.errors import BadInput


def command(
    *,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The masks' model, or the checkpoint that a patch starts from.")
    ],
    source: Annotated[
        Path | None, typer.Option("--from", help="Mask to start from [no mask].", autocompletion=files(*MASKS))
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--to", help="Mask to lead to [no mask].", autocompletion=files(*MASKS))
    ] = None,
    to_model: Annotated[
        str | None, typer.Option("--to-model", help="In their place: the checkpoint of the same tensors to lead to.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Masks over a delta: the checkpoint whose values dropped weights take.")
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Bring the values, for receivers without the model [on].")
    ] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="The patch to write, NAME.patch.safetensors.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write what changes between a model under one mask and under another, or between two checkpoints.

    `mftmerge patch-apply` applies it, bit for bit, and undoes it. --no-values leaves out what a receiver has who
    has the model: then the patch is a part of a mask's size, and leads one way.

    \b
    mftmerge patch --model ./base --from code.mask --to math.mask -o code-math.patch.safetensors
    mftmerge patch --model ./step-100 --to-model ./step-200 -o step.patch.safetensors
    """
    from mftmerge.files import refuse_existing
    from mftmerge.patch import checkpoint_patch, mask_patch

    refuse_existing(out, overwrite, (model, source, target, to_model, base))
    if to_model is not None:
        if source or target or base or not values:
            raise BadInput("--to-model: a patch between checkpoints has values and no masks; leave the others out")
        patch = checkpoint_patch(model, to_model)
    elif source is None and target is None:
        raise BadInput("give --from and --to (one of them may be left out: no mask), or --to-model")
    else:
        patch = mask_patch(model, source, target, base=base, values=values)
    patch.save(out, overwrite=overwrite)
    tensors = patch.header.tensors.values()
    weights, size = sum(t.size for t in tensors), out.stat().st_size
    facts = {"tensors": len(tensors), "weights": weights, "bytes": size, "bits a weight": 8 * size / max(weights, 1)}
    if as_json:
        print_json({"out": str(out), **facts})
        return
    say(f"{out}: {len(tensors)} tensors change, {size:,} bytes, {facts['bits a weight']:.3f} bits a weight of theirs")
    say(f"next: mftmerge patch-apply {out} --model {'MODEL --base BASE' if not values else 'MODEL'} -o DIR")
