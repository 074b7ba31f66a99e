"""Shared fixtures: tiny checkpoints of several architectures, one torch thread, no hub, no shared random state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from helpers.commands import make_inputs
from helpers.hub import Hub
from helpers.hub import hub as running_hub
from helpers.tiny_models import tiny_checkpoint
from recipe_kitchen import add_adapter, make_kitchen


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(architecture, seed=..., dtype=...)` gives the path of a tiny checkpoint, made once a session. Read only."""
    made: dict[tuple[object, ...], Path] = {}

    def make(architecture: str = "llama", **options: object) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("tiny") / architecture
            made[key] = tiny_checkpoint(path, architecture, **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint (bfloat16), converted once a machine. Read only."""
    import fcntl
    import tempfile

    from mftmerge.quickstart.smollm2 import smollm2_checkpoint

    cache = Path(os.environ.get("MFTMERGE_TEST_CACHE", Path(tempfile.gettempdir()) / "mftmerge-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return smollm2_checkpoint(cache / "smollm2", cache)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """A directory with sound inputs for every command, see `helpers.commands.WORKING`. Read only."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), tiny)


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/{base,math,code,instruct,adapter} and masks/*.mask, as the files in recipes/ name them. Read only."""
    folder = make_kitchen(tmp_path_factory.mktemp("kitchen"))
    add_adapter(folder)
    return folder


@pytest.fixture
def in_kitchen(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kitchen, as the current directory."""
    monkeypatch.chdir(kitchen)
    return kitchen


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A stand-in for the Hugging Face Hub on localhost."""
    with running_hub() as found:
        yield found
