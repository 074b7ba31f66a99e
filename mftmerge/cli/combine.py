"""`mftmerge combine`: masks in, one mask out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mftmerge.cli.options import MASKS, Archive, AsJson, MaskOut, Overwrite, files, operations, pairs
from mftmerge.cli.reporting import print_json, say
from mftmerge.errors import BadInput

Masks = Annotated[
    list[Path],
    typer.Argument(
        help="Mask files, in the order that --weights and difference refer to.", autocompletion=files(*MASKS)
    ),
]
Op = Annotated[
    str,
    typer.Option(
        help="union, intersection, vote, difference, xor, complement or score (see docs/operations.md).",
        autocompletion=operations,
    ),
]


def command(
    masks: Masks,
    out: MaskOut,
    op: Op = "vote",
    threshold: Annotated[
        str | None,
        typer.Option(help="vote: a count such as 2, or a share such as 0.5 (the default: half or more keep)."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="vote, score: one number a mask, as in 2,1,1.")] = None,
    density: Annotated[
        str | None, typer.Option(help="Keep exactly this share of every tensor: by votes, then scores, then position.")
    ] = None,
    uncovered: Annotated[
        Literal["abstain", "keep"],
        typer.Option(help="A mask on a tensor that it does not cover: 'abstain', or 'keep' all of it."),
    ] = "abstain",
    elect: Annotated[
        bool, typer.Option("--elect", help="score: at each weight add only the evidence that has the sign of the sum.")
    ] = False,
    allow_different_init: Annotated[
        bool, typer.Option("--allow-different-init", help="score: add masks that started from different scores.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE: an option of an operation of another package. May be repeated."),
    ] = None,
    archive: Archive = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Combine masks into one and say what that did: densities, and how many bits changed.

    \b
    Masks are sets of kept weights: union prunes little, intersection prunes most.
    Example:
      mftmerge combine code.mask math.mask --op vote -o general.mask
    """
    from mftmerge.combine import combine_files

    options: dict[str, Any] = {"threshold": threshold, "elect": elect, "allow_different_init": allow_different_init}
    options |= {name: _scalar(value) for name, value in pairs(settings or [], "--set").items()}
    if weights is not None:
        try:
            options["weights"] = tuple(float(w) for w in weights.replace(",", " ").split())
        except ValueError:
            raise BadInput(f"--weights {weights!r}: give one number a mask, such as 2,1,1") from None
    report = combine_files(
        op, masks, out, archive=archive, overwrite=overwrite, density=density, uncovered=uncovered, **options
    )
    if as_json:
        print_json(report.to_json())
        return
    width = max(len(i.name) for i in report.inputs)
    for i in report.inputs:
        weight = "" if i.weight is None else f", weight {i.weight:g}"
        say(f"{i.name:<{width}}  density {i.density:.4f}, {i.tensors} tensors{weight}, {i.changed:,} bits changed")
    given = "".join(f", {k} {v}" for k, v in report.options.items())
    say(f"{report.operation}{given}: density {report.density:.4f}, {report.kept:,} of {report.size:,} kept")
    for note in report.notes:
        say(f"note: {note}")
    say(f"wrote {report.out} ({out.stat().st_size:,} bytes)")
    say(f"next: mftmerge eval --model MODEL --mask {report.out} --data NAME=FILE, or mftmerge apply {report.out}")


def _scalar(text: str) -> bool | int | float | str:
    """A value as YAML reads it, so that an option means the same in a recipe."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return found if isinstance(found, bool | int | float) else text
