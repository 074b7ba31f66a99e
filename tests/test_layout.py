"""The layout that docs/architecture.md states: arrows point one way, masks need no torch, no module is too long."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mftmerge"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p
    for p in PACKAGE.rglob("*.py")
    if p != PACKAGE / "__init__.py"  # its names are loaded when first used
}

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LONGEST = 400  # lines


def blocks() -> list[list[str]]:
    """Lines of the page's fenced blocks: the modules, then the levels."""
    return [b.strip("\n").splitlines() for b in re.findall(r"^```\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)]


def levels() -> dict[str, int]:
    """Module or package -> its level, 0 at the bottom."""
    found = {}
    for number, line in enumerate(reversed(blocks()[1])):
        found |= {f"mftmerge.{name.strip().replace('/', '.')}": number for name in line.split(",")}
    return found


LEVEL = levels()


def place(module: str) -> str:
    """The longest name in LEVEL that holds a module."""
    fitting = [name for name in LEVEL if module == name or module.startswith(f"{name}.")]
    assert fitting, f"{module}: say in docs/architecture.md at which level it is"
    return max(fitting, key=len)


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of the modules that a module imports anywhere in it, also in functions and for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_one_way(module: str) -> None:
    here = place(module)
    for other in imported(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if other.startswith("mftmerge."):
            there = place(other)
            assert there == here or LEVEL[there] < LEVEL[here], f"{module} imports {other}, which is above it"


def test_the_page_lists_the_modules() -> None:
    """All of them, and none that is not there. Of `cli/` it says that a command is a file."""
    listed, package = set(), "mftmerge"
    for line in blocks()[0]:
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            package = "mftmerge" if name == "mftmerge/" else f"mftmerge.{name[:-1]}"
        elif name:
            listed.add(f"{package}.{name.removesuffix('.py')}")
    there = {m for m in MODULES if not m.endswith(".__init__") and not m.startswith("mftmerge.cli.")}
    assert there - listed == set(), "not in docs/architecture.md"
    assert listed - there == set(), "in docs/architecture.md, but gone"


def test_masks_and_checkpoint_files_need_no_torch() -> None:
    names = [
        m for m in MODULES if place(m) in ("mftmerge.masks", "mftmerge.models.shard", "mftmerge.models.checkpoint")
    ]
    assert len(names) > 10
    script = (
        f"import sys, importlib\nfor name in {sorted(names)}:\n    importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'mergekit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_is_too_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES.values()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}
