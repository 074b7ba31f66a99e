"""The layout that docs/architecture.md states: what needs no torch has none, and no module is too long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mftmerge"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p
    for p in PACKAGE.rglob("*.py")
    if p != PACKAGE / "__init__.py"  # its names are loaded when first used
}
LONGEST = 400  # lines
NUMPY_ONLY = ("bits", "cut", "mask", "maskfile", "operations", "overlap", "inspection", "derive", "checkpoint", "apply")


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
