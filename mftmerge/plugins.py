"""Operations and merge methods of other packages: modules named under the entry point group `mftmerge.plugins`.

A package says in its pyproject.toml

    [project.entry-points."mftmerge.plugins"]
    my-masks = "my_masks"

and `my_masks` uses `@mftmerge.operation` and `@mftmerge.merge_method`. Such modules are imported only when a name is
asked for that this program does not have. A file of one's own needs no package: `mftmerge --plugin my_masks.py ...`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path

from mftmerge.errors import BadInput

GROUP = "mftmerge.plugins"


@cache
def load() -> None:
    """Import every plug-in, once. Raises BadInput that names the one that fails."""
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as e:  # whatever another package does must not become a traceback
            reason = " ".join(str(e).split()) or type(e).__name__
            raise BadInput(f"plug-in {point.name} ({point.value}) fails: {reason}; mend or uninstall it") from e


def load_file(reference: str) -> None:
    """Import a Python file, or a module by its name, for what it registers. Raises BadInput that names it."""
    path = Path(reference)
    if path.suffix == ".py" and not path.is_file():
        raise BadInput(f"--plugin {reference}: no such file")
    try:
        if path.suffix != ".py":
            importlib.import_module(reference)
            return
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except BadInput:
        raise
    except Exception as e:  # whatever the file does must not become a traceback
        reason = " ".join(str(e).split()) or type(e).__name__
        raise BadInput(f"--plugin {reference} fails: {reason}; --debug shows where") from e


def free(name: str, module: str, owner: str | None, what: str) -> None:
    """Raise BadInput when `name` is taken by another module (`owner`); a module may define its own again."""
    if owner is not None and owner != module:
        raise BadInput(f"{what} {name!r} exists already (in {owner}); give yours another name")
