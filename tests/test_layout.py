"""The layout that docs/architecture.md states: arrows point down, no circles, what needs no torch has none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mftmerge"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
    if p.parent != PACKAGE or p.stem not in ("__init__", "__main__")  # its names are loaded when first used
}
LONGEST = 400  # lines
NUMPY_ONLY = ("bits", "cut", "mask", "maskfile", "operations", "overlap", "inspection", "derive", "checkpoint", "apply")


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports, also inside functions, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    unseen = {id(inner) for block in blocks for child in block.body for inner in ast.walk(child)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {n if (n := f"{node.module}.{a.name}") in MODULES else node.module for a in node.names}
    return found & set(MODULES)


GRAPH = {name: imported(path) - {name} for name, path in MODULES.items()}


def level_of() -> dict[str, int]:
    """Module or package at the top -> its group on the page, counted from the top."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(cli .*?)^```", page, re.DOTALL | re.MULTILINE)
    found = {}
    for level, group in enumerate(block.split("\n\n")):
        for line in group.splitlines():
            names = re.split(r"  +", line)[0]
            found |= dict.fromkeys(names.split(", "), level)
    return found


def test_every_module_is_on_the_page() -> None:
    assert {name.split(".")[1] for name in MODULES} == set(level_of())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    levels = level_of()
    own = levels[name.split(".")[1]]
    up = {other for other in GRAPH[name] if levels[other.split(".")[1]] < own}
    assert not up, f"{name} imports from above: {up}"


def test_no_circles() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_masks_and_checkpoint_files_need_no_torch() -> None:
    script = (
        f"import sys, importlib\nfor name in {NUMPY_ONLY}:\n    importlib.import_module('mftmerge.' + name)\n"
        "print(sorted({'torch', 'transformers', 'mergekit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_is_too_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES.values()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}
