"""The program for the day there is a GPU runs on a CPU, whole, so that it cannot rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_section_of_the_gpu_program_runs(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--shape", "tiny", "--out", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu_cpu.json").read_text())["results"]
    assert len(results) == 9
    assert not [title for title, found in results.items() if "FAILED" in found or "skipped" in found]
    assert results["check: the CPU's mask from the same gradients"]["bits compared"] > 500_000
    assert all(title[1:] in (tmp_path / "gpu_cpu.md").read_text() for title in results)
