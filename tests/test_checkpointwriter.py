"""The one writer of checkpoints: readable by safetensors whatever order, threads and sizes; whole or an error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mftmerge.checkpoint import Checkpoint
from mftmerge.checkpointwriter import CheckpointWriter
from mftmerge.dtypes import of_torch
from mftmerge.errors import MftmergeError


def raw(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def read_back(path: Path) -> dict[str, torch.Tensor]:
    Checkpoint.open(path)  # our own checks hold as well
    return {k: t for f in path.glob("*.safetensors") for k, t in load_file(f).items()}


@pytest.fixture
def data() -> dict[str, torch.Tensor]:
    """Odd sizes, several dtypes, an empty and a scalar tensor."""
    g = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, generator=g).bfloat16(),
        "b": torch.randn(2, 2, generator=g),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(7),
        "e": torch.arange(5, dtype=torch.uint8),
        **{f"layers.{i}.w": torch.randn(7, 11, generator=g) for i in range(20)},
    }


def same(found: dict[str, torch.Tensor], data: dict[str, torch.Tensor]) -> bool:
    return found.keys() == data.keys() and all(torch.equal(found[n], data[n]) for n in data)


@pytest.mark.parametrize("shard_bytes", [10**9, 1000])
def test_as_they_come_from_several_threads(tmp_path: Path, data: dict[str, torch.Tensor], shard_bytes: int) -> None:
    def add(name: str) -> None:
        writer.add(name, of_torch(data[name].dtype).code, tuple(data[name].shape), raw(data[name]))

    with CheckpointWriter(tmp_path / "out", data, shard_bytes) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(add, data))
    assert same(read_back(tmp_path / "out"), data)
    assert writer.total == sum(t.numel() * t.element_size() for t in data.values())
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize("shard_bytes", [10**9, 1000])
def test_planned_in_pieces_in_any_order(tmp_path: Path, data: dict[str, torch.Tensor], shard_bytes: int) -> None:
    plan = {n: (of_torch(t.dtype).code, tuple(t.shape)) for n, t in data.items()}
    pieces = [(n, i) for n, t in data.items() for i in range(0, t.numel() * t.element_size(), 7)]
    for out, seed in (("one", 1), ("two", 2)):
        random.Random(seed).shuffle(pieces)
        with CheckpointWriter.planned(tmp_path / out, plan, shard_bytes) as writer, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda p, w=writer: w.write(p[0], p[1], bytes(raw(data[p[0]])[p[1] : p[1] + 7])), pieces))
        assert same(read_back(tmp_path / out), data)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    if shard_bytes == 1000:
        index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == data.keys()


def test_what_is_missing_wrong_or_there_twice_is_an_error(tmp_path: Path, data: dict[str, torch.Tensor]) -> None:
    def attempt(call: Callable[[CheckpointWriter], None], match: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(MftmergeError, match=match), CheckpointWriter.planned(folder, {"a": ("F32", (2,))}) as w:
            call(w)
        assert not (folder / "model.safetensors").exists()

    attempt(lambda w: None, "0 of 8 planned")
    attempt(lambda w: w.write("a", 4, bytes(8)), "has 8 bytes")
    attempt(lambda w: w.add("a", "F32", (2,), bytes(8)), "already")
    with pytest.raises(MftmergeError, match="has 4 bytes"), CheckpointWriter(tmp_path / "x", ["a"]) as writer:
        writer.add("a", "F32", (2,), bytes(4))


def test_an_empty_checkpoint_is_one_empty_file(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out"):
        pass
    assert read_back(tmp_path / "out") == {}
