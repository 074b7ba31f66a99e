"""The documentation's site (mkdocs): README.md is its first page; links out of docs/ become names of files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as the first page, its links as they are seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((?!https?:|#)((?!\w[\w-]*\.md|picture\.svg|quickstart/|results/)[^)]+)\)", r"](../\1)", text)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"):
        text = text.replace(f"]({name})", f"](../{name})")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """What stands outside of docs/ is named, not linked."""
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)
