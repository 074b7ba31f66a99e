"""YAML that somebody wrote: plain values alone, with limits on what aliases and nesting can ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mftmerge.errors import BadInput
from mftmerge.files import refuse_pointer

LARGEST = 16 << 20  # bytes of a file
MOST_VALUES = 100_000  # of a document, with every alias written out: a few lines of aliases can ask for billions


def read_text(path: Path) -> str:
    """A text file's content. Raises BadInput for one that is absent, no regular file, too large or not UTF-8."""
    if not path.is_file():
        raise BadInput(f"{path}: {'not a file' if path.exists() else 'no such file'}; give the path of a YAML file")
    if path.stat().st_size > LARGEST:
        raise BadInput(f"{path}: {path.stat().st_size:,} bytes, too large to be settings or a recipe")
    try:
        text = path.read_text(encoding="utf-8-sig")  # the mark that some editors write is no part of the text
        refuse_pointer(path, text[:64].encode())
        return text
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from None


def documents(path: Path, text: str, visit: Callable[[yaml.Node], None] = lambda node: None) -> list[Any]:
    """The values of a YAML text's documents. `visit` sees each document's nodes, and may change them, before.

    Raises BadInput, with path and line, for what is not YAML, for tags other than YAML's own (nothing is ever run),
    and for aliases that contain themselves or that stand for more than MOST_VALUES values.
    """
    found = []
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node: Any = loader.get_node()
            if _values(node, {}) > MOST_VALUES:
                raise BadInput(f"{path}: more than {MOST_VALUES:,} values, aliases written out; make it smaller")
            visit(node)
            found.append(loader.construct_document(node))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise BadInput(f"{path}: line {mark.line + 1 if mark else '?'}: not valid YAML: {e.problem}") from None
    except RecursionError:
        raise BadInput(f"{path}: not valid YAML: nested too deeply") from None
    except BadInput:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as e:  # an unhashable key is a TypeError
        raise BadInput(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    return found


def read_document(path: Path) -> Any:
    """The value of a file that holds one document; None where it is empty. Raises BadInput as `documents` does."""
    found = documents(path, read_text(path))
    if len(found) > 1:
        raise BadInput(f"{path}: {len(found)} YAML documents; keep one and remove the lines '---' between them")
    return found[0] if found else None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node with every alias written out, without writing them out."""
    if id(node) not in known:
        known[id(node)] = 0
        children: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    elif not known[id(node)]:
        raise yaml.MarkedYAMLError(
            problem="an alias stands for something that contains it", problem_mark=node.start_mark
        )
    return known[id(node)]
