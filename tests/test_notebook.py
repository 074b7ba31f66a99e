"""The notebook runs from its first cell to its last, and its results show themselves as tables and pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_mask.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.copy(NOTEBOOK, tmp_path)
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [o.data.get("text/html", "") for c in book.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("<table>" in html for html in shown) >= 5
    assert sum("<svg" in html for html in shown) >= 2
    assert (tmp_path / "first_mask/general.mask").is_file()
