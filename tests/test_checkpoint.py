"""Reading checkpoints: integer views, values, fingerprints and files that change between two reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.dtypes import to_float32
from mftmerge.errors import BadInput, MftmergeError

CODES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


@pytest.mark.parametrize("code", CODES)
def test_values_agree_with_torch_for_every_bit_pattern(tmp_path: Path, code: str) -> None:
    width = CODES[code].itemsize
    if code == "BOOL":
        stored = torch.arange(256).remainder(2).bool()
    else:
        patterns = np.arange(1 << 8 * min(width, 2), dtype=np.uint32)
        raw = (patterns * np.uint32(65537 if width == 4 else 1)).astype(f"u{width}")
        stored = torch.from_numpy(raw.view(np.uint8)).view(CODES[code])
    save_file({"w": stored.reshape(2, -1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.entry("w").dtype == code
    integers = checkpoint.read("w")
    assert integers.dtype == f"u{width}"
    assert integers.shape == (2, stored.numel() // 2)
    values = checkpoint.read_float32("w")
    assert np.array_equal(values, stored.reshape(2, -1).float().numpy(), equal_nan=True)
    assert values.dtype == np.float32


def test_complex_numbers_have_no_float_value() -> None:
    with pytest.raises(BadInput, match="C64"):
        to_float32(np.zeros(2, np.uint64), "C64")


def test_ranges_and_order(tiny: Callable[..., Path]) -> None:
    path = tiny("llama", dtype="bfloat16", max_shard_size="100KB")
    checkpoint = Checkpoint.open(path)
    assert len(checkpoint.shards) > 3
    name = "model.layers.2.mlp.up_proj.weight"
    whole = checkpoint.read(name).reshape(-1)
    assert np.array_equal(checkpoint.read_range(name, 17, 1003), whole[17:1003])
    assert len(checkpoint.read_range(name, 5, 5)) == 0
    for start, stop in [(-1, 2), (3, 2), (0, whole.size + 1)]:
        with pytest.raises(BadInput, match="elements, not"):
            checkpoint.read_range(name, start, stop)
    with pytest.raises(BadInput, match="no tensor 'absent'"):
        checkpoint.read("absent")
    assert sorted(e.name for e in checkpoint) == list(checkpoint.names)
    for before, after in zip(checkpoint, list(checkpoint)[1:], strict=False):
        assert before.file != after.file or before.stop <= after.start


def test_fingerprint_is_the_documented_hash(tiny: Callable[..., Path]) -> None:
    path = tiny("llama", dtype="bfloat16")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensor = load_file(path / "model.safetensors")[name]
    shape = ",".join(map(str, tensor.shape))
    content = f"BF16\0{shape}\0".encode() + tensor.view(torch.uint8).numpy().tobytes()
    assert Checkpoint.open(path).fingerprint(name) == xxhash.xxh3_128(content).hexdigest()


def test_the_single_file_wins_over_an_index(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{")
    assert len(Checkpoint.open(tmp_path / "m").shards) == 1


@pytest.mark.parametrize("change", ["touch", "truncate", "remove"])
def test_a_file_that_changed_since_it_was_opened(tiny: Callable[..., Path], tmp_path: Path, change: str) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path / "m")
    name = checkpoint.names[0]
    checkpoint.read(name)
    if change == "touch":
        os.utime(file, ns=(1, 1))
    elif change == "truncate":
        os.truncate(file, 1000)
    else:
        file.unlink()
    with pytest.raises(MftmergeError, match=r"changed while|was there when"):
        checkpoint.read(name)


def test_resolve_prefers_directories_and_refuses_files(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    assert resolve(path) == path
    assert resolve(str(path)) == path
    with pytest.raises(BadInput, match="a file"):
        resolve(path / "config.json")


def test_a_hub_id_is_found_in_the_cache(tiny: Callable[..., Path], tmp_path: Path) -> None:
    commit = "a" * 40
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in tiny("llama").iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    code = (
        "from mftmerge.checkpoint import Checkpoint, resolve; import sys;"
        "a, b = resolve('owner/name'), resolve('owner/name@main'); assert a == b;"
        "assert len(Checkpoint.open(a).names) > 10; assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
