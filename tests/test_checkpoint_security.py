"""A checkpoint from a stranger: nothing outside its directory is read, no pickle is opened, bad headers are refused."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mftmerge.apply import apply_mask
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.errors import BadInput
from mftmerge.mask import Mask

EMPTY = Mask.from_bools({})


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_file({"a": np.arange(6, dtype=np.float32)}, path / "model-00001-of-00002.safetensors")
    save_file({"b": np.ones((2, 2), np.float16)}, path / "model-00002-of-00002.safetensors")
    index(path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    (path / "config.json").write_text("{}")
    return path


def index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "weights.bin",
        "a\0.safetensors",
    ],
)
def test_an_index_may_only_name_safetensors_files_beside_it(two_shards: Path, name: str) -> None:
    save_file({"b": np.ones(1, np.float32)}, two_shards.parent / "secret.safetensors")
    index(two_shards, {"a": "model-00001-of-00002.safetensors", "b": name})
    with pytest.raises(BadInput):
        Checkpoint.open(two_shards)


@pytest.mark.parametrize("broken", [[], {}, {"a": 1}, None, "x"])
def test_an_index_without_a_map_is_refused(two_shards: Path, broken: object) -> None:
    index(two_shards, broken)
    with pytest.raises(BadInput, match="weight_map"):
        Checkpoint.open(two_shards)


def test_links_out_of_the_directory_are_refused(two_shards: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shard = two_shards / "model-00002-of-00002.safetensors"
    os.rename(shard, outside)
    shard.symlink_to(outside)
    with pytest.raises(BadInput, match="leads outside"):
        Checkpoint.open(two_shards)
    shard.unlink()
    os.rename(outside, shard)
    (tmp_path / "secret.txt").write_text("secret")
    (two_shards / "tokenizer.json").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BadInput, match="leads outside"):
        apply_mask(EMPTY, two_shards, tmp_path / "out")
    (two_shards / "tokenizer.json").unlink()
    (two_shards / "README.md").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BadInput, match="leads outside"):
        apply_mask(EMPTY, two_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["option", "environment"])
def test_links_to_a_store_of_ones_own_are_followed_on_request(
    two_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (two_shards / "tokenizer.json").write_text("{}")
    (two_shards / "README.md").write_text("hello")
    for file in list(two_shards.iterdir()):  # as DVC and Nix do
        os.rename(file, store / file.name)
        file.symlink_to(store / file.name)
    with pytest.raises(BadInput, match="leads outside") as caught:
        apply_mask(EMPTY, two_shards, tmp_path / "out")
    assert "MFTMERGE_FOLLOW_LINKS=1" in str(caught.value)
    if how == "environment":
        monkeypatch.setenv("MFTMERGE_FOLLOW_LINKS", "1")
        assert Checkpoint.open(two_shards).names == ("a", "b")
    apply_mask(EMPTY, two_shards, tmp_path / "out", follow_links=how == "option")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in two_shards.iterdir()}
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    (store / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match=r"a link to .*store.*, where nothing is"):
        Checkpoint.open(two_shards, follow_links=True)


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "LICENSE"],
)
def test_git_lfs_pointers_are_named_as_such(two_shards: Path, tmp_path: Path, name: str) -> None:
    weights = {n: np.ones((4, 2), np.float32) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(weights, two_shards / "model-00002-of-00002.safetensors")
    index(
        two_shards,
        {"a": "model-00001-of-00002.safetensors", **dict.fromkeys(weights, "model-00002-of-00002.safetensors")},
    )
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    (two_shards / name).write_text(pointer)
    mask = Mask.from_bools({"lm_head.weight": np.ones((4, 2), bool)})
    with pytest.raises(BadInput, match="git lfs pull"):
        apply_mask(mask, two_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hub_caches_own_links_are_followed(two_shards: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(two_shards.iterdir())):
        os.rename(file, repository / "blobs" / f"hash{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash{i}")
    assert Checkpoint.open(snapshot).names == ("a", "b")
    apply_mask(EMPTY, snapshot, tmp_path / "out")
    names = {p.name for p in snapshot.iterdir()} | {"README.md"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    other = tmp_path / "hub" / "models--evil--name"
    (other / "blobs").mkdir(parents=True)
    (snapshot / "config.json").unlink()
    (other / "blobs" / "x").write_text("{}")
    (snapshot / "config.json").symlink_to(other / "blobs" / "x")
    with pytest.raises(BadInput, match="leads outside"):
        apply_mask(EMPTY, snapshot, tmp_path / "out2")


def test_special_files_and_loops_are_refused(two_shards: Path) -> None:
    shard = two_shards / "model-00002-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)  # opening it for reading would wait for ever
    with pytest.raises(BadInput, match="not a regular file"):
        Checkpoint.open(two_shards)
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(BadInput, match="missing"):
        Checkpoint.open(two_shards)


def test_a_tensor_in_two_shards_is_refused(two_shards: Path) -> None:
    save_file(
        {"b": np.ones((2, 2), np.float16), "a": np.ones(6, np.float32)}, two_shards / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(BadInput, match="is in both"):
        Checkpoint.open(two_shards)


def test_a_tensor_that_the_index_promises_must_be_there(two_shards: Path) -> None:
    save_file({"c": np.ones((2, 2), np.float16)}, two_shards / "model-00002-of-00002.safetensors")
    with pytest.raises(BadInput, match="but it is not"):
        Checkpoint.open(two_shards)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"{}x",
        b"\xff\xfe",
        b"[" * 5000,
        b'{"a": 1, "a": 2}',
        b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}',
        {"a": 5},
        {"a": {}},
        {"a": entry("F33")},
        {"a": entry(["F32"])},
        {"a": entry(shape=(3,))},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(2.0,))},
        {"a": entry(shape=(True, 2))},
        {"a": entry(shape="22")},
        {"a": entry(shape=(2**62, 2**62))},
        {"a": entry(shape=(1,) * 1000)},
        {"a": entry(offsets=(8, 0))},
        {"a": entry(offsets=(-8, 0))},
        {"a": entry(offsets=(0, 8, 16))},
        {"a": entry(offsets=(4, 12))},
        {"a": entry(offsets=(0, 2**70))},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(offsets=(4, 12))},
        {"a": entry(shape=(1,), offsets=(0, 4))},
        {"a": entry("F4", (3,), (0, 2))},
    ],
)
def test_headers_that_do_not_describe_their_file_are_refused(tmp_path: Path, header: object) -> None:
    raw_file(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 100_000_001, 10_000])
def test_absurd_header_lengths_allocate_nothing(tmp_path: Path, length: int) -> None:
    raw_file(tmp_path / "model.safetensors", {}, bytes(8), length)
    with pytest.raises(BadInput, match="header length"):
        Checkpoint.open(tmp_path)


def test_a_soundly_described_empty_file_is_fine(tmp_path: Path) -> None:
    raw_file(
        tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "z": entry(shape=(0, 3), offsets=(0, 0))}
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("z").shape == (0, 3)


def test_mutated_files_are_refused_or_read_as_described(tmp_path: Path) -> None:
    """Random damage to header and size: either BadInput, or every tensor can be read within its file."""
    good = tmp_path / "good"
    good.mkdir()
    save_file({"a": np.ones((3, 5), np.float16), "b": np.ones(7, np.float32)}, good / "model.safetensors")
    original = (good / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        raw = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            kind = rng.randrange(4)
            at = rng.randrange(min(header_end, len(raw))) if raw else 0
            if kind == 0 and raw:
                raw[at] = rng.randrange(256)
            elif kind == 1:
                raw[at:at] = bytes(rng.choices(b'0123456789{}[],:"', k=rng.randint(1, 4)))
            elif kind == 2:
                del raw[at : at + rng.randint(1, 4)]
            else:
                raw = raw[: rng.randrange(len(raw) + 1)]
        (good / "model.safetensors").write_bytes(raw)
        try:
            checkpoint = Checkpoint.open(good)
        except BadInput:
            refused += 1
            continue
        for name in checkpoint.names:
            entry_ = checkpoint.entry(name)
            try:
                array = checkpoint.read(name)
            except BadInput:
                continue
            assert array.nbytes == entry_.nbytes
            assert entry_.stop <= len(raw)
    assert refused > 400


@pytest.mark.parametrize("present", ["pytorch_model.bin", "consolidated.00.pth", "adapter_config.json"])
def test_pickles_and_adapters_are_explained_not_opened(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(BadInput, match=r"only safetensors is read|merge it into its base"):
        Checkpoint.open(tmp_path)


def test_references_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for reference in [
        tmp_path / "absent",
        tmp_path / "file",
        "a/b/c/d",
        "./nothing",
        "",
        "owner/name-that-is-not-cached",
    ]:
        with pytest.raises(BadInput):
            resolve(reference)


def test_an_unreadable_config_is_an_error_where_it_matters(tmp_path: Path) -> None:
    """Whether head and embeddings are tied decides what a mask over one of them means."""
    path = tmp_path / "m"
    path.mkdir()
    weights = {n: np.ones((4, 2), np.float32) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not readable JSON"):
        apply_mask(Mask.from_bools({"lm_head.weight": np.ones((4, 2), bool)}), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
