"""mergekit's own tests of merges and tokenizers, from its source distribution, through our builder and bit-equal.

pip fetches the source distribution when the test runs; without a package index the test is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("test_basic_merges.py", "test_tokenizer.py")
VERSION = "0.1.5"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mergekit's source distribution, unpacked: its tests only."""
    folder = tmp_path_factory.mktemp("mergekit")
    given = os.environ.get("MFTMERGE_MERGEKIT_SDIST")
    if given is None:
        command = ["download", "--no-deps", "--no-binary", "mergekit", f"mergekit=={VERSION}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command, "-q", "-d", str(folder)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            pytest.skip("pip cannot fetch mergekit's source distribution here")
    archive = Path(given) if given else next(folder.glob("mergekit*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir()) / "tests"


@pytest.mark.slow
def test_mergekit_s_own_tests(source: Path, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "__init__.py").touch()
    shutil.copy(HERE / "recipe_conformance_common.py", tests / "common.py")
    for file in FILES:
        shutil.copy(source / file, tests / file)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "tests"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    passed = re.findall(r"^PASSED (tests/\S+)", done.stdout, re.M)
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", done.stdout, re.M)
    assert not failed, "\n".join(failed) + done.stdout[-3000:]
    assert len(passed) == 46, done.stdout[-2000:]
