"""The layout: imports run one way and in no circle, what needs no torch has none, and no module is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mftmerge"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
    if p != PACKAGE / "__init__.py"  # its names are loaded when first used
}
LONGEST = 400  # lines
NUMPY_ONLY = ("bits", "cut", "mask", "maskfile", "operations", "overlap", "inspection", "derive", "checkpoint", "apply")
# From top to bottom; a module imports from its own entry and from lower lines. What is not named is at the bottom.
LEVELS = (
    ("cli",),
    ("quickstart",),
    ("report",),
    ("sweep", "recipe"),
    ("train",),
    ("evaluate",),
    ("prefix", "loss"),
    ("live", "loading"),
)


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a module imports anywhere in it, also in functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found = whole if whole in MODULES else str(node.module)
                if found in MODULES:
                    yield found


GRAPH = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def place(module: str) -> tuple[int, str]:
    """The level of a module, 0 at the bottom, and the entry that holds it."""
    for height, entries in enumerate(reversed(LEVELS), 1):
        for entry in entries:
            if module == f"mftmerge.{entry}" or module.startswith(f"mftmerge.{entry}."):
                return height, entry
    return 0, ""


def test_imports_run_one_way() -> None:
    wrong = []
    for module, others in GRAPH.items():
        height, entry = place(module)
        for other in others:
            there, owner = place(other)
            if there > height or (there == height and owner != entry):
                wrong.append(f"{module} imports {other}, which is not below it")
    assert not wrong


def test_no_imports_in_a_circle() -> None:
    """Each module can be put after all that it imports."""
    left = {name: set(others) for name, others in GRAPH.items()}
    while ready := {name for name, others in left.items() if not others & left.keys()}:
        for name in ready:
            del left[name]
    assert set(left) <= KNOWN_CIRCLE, "these import each other, or something that does"


# Being rebuilt, and what imports it; to be emptied.
KNOWN_CIRCLE = {n for n in MODULES if n.startswith(("mftmerge.recipe", "mftmerge.cli", "mftmerge.quickstart"))}


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
