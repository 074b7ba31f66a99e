"""`mftmerge patch-apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftmerge.cli.options import AsJson, ModelOut, Overwrite
from mftmerge.cli.reporting import print_json, say


def command(
    patch: Annotated[Path, typer.Argument(help="The patch, as `mftmerge patch` writes it.")],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint that the patch starts from.")],
    out: ModelOut,
    undo: Annotated[bool, typer.Option("--undo", help="Lead back: from what the patch leads to.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="A patch without values: the model that its masks share.")
    ] = None,
    delta_base: Annotated[
        str | None, typer.Option("--delta-base", help="And where they are over a delta: what dropped weights take.")
    ] = None,
    reverse: Annotated[
        Path | None, typer.Option("--reverse", help="A patch without values: write the one that leads back here.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Apply a patch to a checkpoint, or undo it, and write the result as a complete one.

    Every changed tensor is compared with its fingerprint before and after; anything else is refused.

    \b
    mftmerge patch-apply code-math.patch.safetensors --model ./code-model -o math-model
    mftmerge patch-apply code-math.patch.safetensors --model ./math-model -o code-again --undo
    """
    from mftmerge.patch import apply_patch

    how = {"base": base, "delta_base": delta_base, "reverse": reverse}
    names = apply_patch(patch, model, out, undo=undo, overwrite=overwrite, **how)
    if as_json:
        print_json({"out": str(out), "tensors": names})
        return
    say(f"{out}: {len(names)} tensors {'led back' if undo else 'changed'}, all others as they were")
    if reverse is not None:
        say(f"wrote {reverse}, which leads back")
    say(f"next: load {out} with transformers or vLLM{'' if undo or base else ', or lead it back with --undo'}")
