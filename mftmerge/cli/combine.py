"""`mftmerge combine`: masks in, one mask out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import Field, create_model

from mftmerge import operations, plugins
from mftmerge.cli.options import MASKS, Archive, AsJson, MaskOut, Overwrite, files, options, pairs
from mftmerge.cli.reporting import print_json, say
from mftmerge.errors import BadInput
from mftmerge.settings import Flag

Masks = Annotated[
    list[Path],
    typer.Argument(
        help="Mask files, in the order that --weights and difference refer to.", autocompletion=files(*MASKS)
    ),
]


def combine(
    masks: Masks,
    out: MaskOut,
    given: dict[str, Any],
    archive: Archive = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", hidden=True, help="NAME=VALUE: as --NAME VALUE, for scripts of 0.1.0.")
    ] = None,
) -> None:
    """Combine masks into one and say what that did: densities, and how many bits changed.

    \b
    Masks are sets of kept weights: union prunes little, intersection prunes most.
    Example:
      mftmerge combine code.mask math.mask --op vote -o general.mask
    """
    from mftmerge.combine import combine_files

    op = given.pop("op", "vote")
    given |= {name: _scalar(value) for name, value in pairs(settings or [], "--set").items()}
    report = combine_files(op, masks, out, archive=archive, overwrite=overwrite, **given)
    if as_json:
        print_json(report.to_json())
        return
    width = max(len(i.name) for i in report.inputs)
    for i in report.inputs:
        weight = "" if i.weight is None else f", weight {i.weight:g}"
        say(f"{i.name:<{width}}  density {i.density:.4f}, {i.tensors} tensors{weight}, {i.changed:,} bits changed")
    shown = "".join(f", {k} {v}" for k, v in report.options.items())
    say(f"{report.operation}{shown}: density {report.density:.4f}, {report.kept:,} of {report.size:,} kept")
    for note in report.notes:
        say(f"note: {note}")
    say(f"wrote {report.out} ({out.stat().st_size:,} bytes)")
    say(f"next: mftmerge eval --model MODEL --mask {report.out} --data NAME=FILE, or mftmerge apply {report.out}")


def _scalar(text: str) -> Any:
    """A value as YAML reads it, so that an option means the same in a recipe."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def __getattr__(name: str) -> Callable[..., None]:
    """`command`, with an option for each option of the operations that there are now, those of plug-ins too."""
    if name != "command":
        raise AttributeError(name)
    with suppress(BadInput):  # a plug-in that fails has no options; who asks for its operation is told
        plugins.load()
    known = ", ".join(operations.OPERATIONS)
    flag = Flag(words=tuple(operations.OPERATIONS))
    fields: dict[str, Any] = {"op": (Annotated[str, flag], Field("vote", description=f"one of {known}"))}
    for name, (_, field) in operations.options().items():
        fields[name] = (
            Annotated[(field.annotation, Flag(), *field.metadata)],
            Field(None if field.is_required() else field.default, description=operations.meaning(name)),
        )
    model = create_model("CombineSettings", __base__=operations.Everywhere, **fields)
    return options(given=model)(combine)
