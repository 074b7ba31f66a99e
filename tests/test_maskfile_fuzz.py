"""Damaged and hostile mask files: thousands of mutations, each refused in one line or read as what was written."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mftmerge.combine import combine_files
from mftmerge.errors import BadInput
from mftmerge.inspection import inspect
from mftmerge.mask import Mask, MaskInfo, Parent

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**48, 2**63, 2**64, 2**80, 1.5, 1e308, "", "x", "F64", "BOOL", "../../x", "\0",
    [], [0], [-1], [2**40, 2**40], [1] * 40, [[1]], {}, {"a": 1}, "0" * 16, "f" * 32, "é" * 10, [0, 2**62],
    "raw", "zlib",
]  # fmt: skip


def example(seed: int = 0) -> Mask:
    rng = np.random.default_rng(seed)
    shapes = {"layers.0.q.weight": (13, 21), "layers.1.q.weight": (64,), "scalar": (), "empty": (0, 5)}
    kept = {n: rng.random(s) < 0.9 for n, s in shapes.items()}
    scores = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    parent = Parent("a.mask", "0" * 32, 0.5, "union", {"density": 0.9}, (Parent("b", "1" * 32),))
    info = MaskInfo(0.9, "base", {"scalar": "00"}, {"seed": 1}, {"loss": 0.1}, "vote", {"threshold": 2}, (parent,))
    return Mask.from_bools(kept, info, scores, scores)


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Container header, mask header, data."""
    length = struct.unpack("<Q", content[:8])[0]
    container = json.loads(content[8 : 8 + length])
    return container, json.loads(container["__metadata__"]["mftmerge"]), content[8 + length :]


def joined(container: dict[str, Any], header: Any, data: bytes) -> bytes:
    """A file again, its header's CRC-32 made to fit: a hostile file would have the right one."""
    metadata = container.get("__metadata__")
    if isinstance(metadata, dict) and isinstance(metadata.get("mftmerge"), str):
        metadata["mftmerge"] = header if isinstance(header, str) else json.dumps(header)
        metadata["mftmerge_crc32"] = f"{zlib.crc32(metadata['mftmerge'].encode()):08x}"
    text = json.dumps(container).encode()
    return struct.pack("<Q", len(text)) + text + data


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [p for k in keys for p in [(*at, k), *places(value[k], (*at, k))]]


def flip(content: bytes, rng: random.Random) -> bytes:
    out = bytearray(content)
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_data(content: bytes, rng: random.Random) -> bytes:
    out, start = bytearray(content), 8 + struct.unpack("<Q", content[:8])[0]
    out[rng.randrange(start, len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def lengthen(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]


def scribble(content: bytes, rng: random.Random) -> bytes:
    at, n = rng.randrange(len(content)), rng.randrange(1, 64)
    return content[:at] + rng.randbytes(n) + content[at + n :]


def header_length(content: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice([0, 1, 2, 2**31, 2**63, 2**64 - 1, rng.randrange(len(content))])) + content[8:]


def edit(content: bytes, rng: random.Random) -> bytes:
    """Put a hostile value somewhere in one of the two JSON headers, or take something out."""
    container, header, data = parts(content)
    target = rng.choice([container, header])
    *way, last = rng.choice(places(target))
    for key in way:
        target = target[key]
    if rng.random() < 0.2 and isinstance(target, dict):
        del target[last]
    else:
        target[last] = rng.choice(HOSTILE)
    return joined(container, header, data)


def number(content: bytes, rng: random.Random) -> bytes:
    """Change one number in a header by a little."""
    container, header, data = parts(content)
    target = rng.choice([container, header])
    numbers = [p for p in places(target) if type(_get(target, p)) is int]
    *way, last = rng.choice(numbers)
    _get(target, way)[last] += rng.choice([-8, -1, 1, 8])
    return joined(container, header, data)


def _get(value: Any, way: Any) -> Any:
    for key in way:
        value = value[key]
    return value


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip, flip_data, cut, lengthen, scribble, header_length, edit, number
]  # fmt: skip


@pytest.mark.parametrize("kind", ["raw", "archive", "scores"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_a_mutated_file_is_refused_or_says_what_was_written(
    tmp_path: Path, kind: str, mutation: Callable[[bytes, random.Random], bytes]
) -> None:
    mask, path = example(), tmp_path / "x.mask"
    mask.save(path, archive=kind == "archive", scores="embed" if kind == "scores" else "none")
    content, rng, refused = path.read_bytes(), random.Random(mutation.__name__ + kind), 0
    for case in range(500):
        path.write_bytes(mutation(content, rng))
        try:
            inspect(path)
            loaded = Mask.load(path)
            bits = {n: loaded.kept(n).reshape(-1) for n in loaded.names}
            for name in loaded.names if loaded.has_scores else ():
                assert np.array_equal(loaded.scores(name).reshape(-1), mask.scores(name).reshape(-1))
        except BadInput as e:
            refused += 1
            message = str(e)
            assert str(path) in message, message
            assert "\n" not in message, message
            assert len(message) < 600 + len(str(path)), message
            continue
        for name, kept in bits.items():
            assert np.array_equal(kept, mask.kept(name).reshape(-1)), (
                f"case {case} changed the bits of {name} unnoticed"
            )
    # Harmless: spare bits at the end of a zlib stream, provenance in the header edited with a right CRC.
    assert refused >= {"edit": 300, "number": 300}.get(mutation.__name__, 460)


@pytest.mark.parametrize("archive", [False, True])
def test_combining_a_damaged_file_leaves_no_output(tmp_path: Path, archive: bool) -> None:
    good, bad, out = tmp_path / "good.mask", tmp_path / "bad.mask", tmp_path / "out.mask"
    example().save(good, scores="none")
    example(1).save(bad, archive=archive, scores="none")
    content, rng = bad.read_bytes(), random.Random(0)
    for _ in range(100):
        bad.write_bytes(flip_data(content, rng))
        if archive and _harmless(bad):
            continue
        with pytest.raises(BadInput, match=r"bad\.mask"):
            combine_files("vote", [good, bad], out, density=rng.choice([None, 0.5]))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.mask", "good.mask"]


def _harmless(path: Path) -> bool:
    """Whether the flipped bit was a spare one at the end of a zlib stream: the bits are those that were written."""
    try:
        return all(np.array_equal(Mask.load(path).kept(n), example(1).kept(n)) for n in example(1).names)
    except BadInput:
        return False


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c, h: h.update(format=2), "version 2"),
        (lambda c, h: h["tensors"]["scalar"].update(shape=[2**30, 2**17]), "needs"),
        (lambda c, h: h["tensors"]["scalar"].update(shape=[2**60]), "out of range"),
        (lambda c, h: h["tensors"]["scalar"].update(kept=2), "2 kept of 1"),
        (lambda c, h: h["tensors"].pop("scalar"), "not described"),
        (lambda c, h: h["tensors"].update(ghost=h["tensors"]["scalar"]), "no bits"),
        (lambda c, h: c["scalar"].update(data_offsets=[0, 1]), "invalid offset for tensor"),
        (lambda c, h: c["scalar"].update(dtype="F32"), "invalid shape, data type, or offset"),
        (lambda c, h: c["scalar"].update(dtype="BOOL"), "neither U8"),
        (lambda c, h: c["__metadata__"].pop("mftmerge"), "without mask metadata"),
        (lambda c, h: h.update(scores_file="../x.safetensors"), "same directory"),
        (lambda c, h: h["info"].update(keep="0.9"), "keep"),
        (lambda c, h: h["info"].update(parents=[{"name": "x"}]), "parents.0.digest is missing"),
        (
            lambda c, h: h["info"].update(parents=[{"name": "x", "digest": "0", "weight": True}]),
            "0.weight should be a number",
        ),
        (lambda c, h: h["info"].update(on="both"), "weights or delta"),
        (lambda c, h: h["info"].update(fingerprints={"scalar": 1}), "fingerprints.scalar should be a str"),
    ],
)
def test_hostile_headers_are_named(tmp_path: Path, change: Callable[[Any, Any], Any], word: str) -> None:
    path = tmp_path / "x.mask"
    example().save(path, scores="none")
    container, header, data = parts(path.read_bytes())
    change(container, header)
    path.write_bytes(joined(container, header, data))
    with pytest.raises(BadInput, match=word):
        Mask.load(path)


def test_duplicate_keys_deep_nesting_and_nan_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mask"
    example().save(path, scores="none")
    container, header, data = parts(path.read_bytes())
    twice = json.dumps(header).replace('"format": 1', '"format": 1, "format": 1')
    nan = json.dumps(header).replace('"kept": ', '"kept": NaN, "x": ')
    family: dict[str, Any] = {"name": "x", "digest": "y"}
    for _ in range(100):
        family = {"name": "x", "digest": "y", "parents": [family]}
    deep = json.dumps(header | {"info": {"parents": [family]}})
    for text, word in ((twice, "twice"), (nan, "NaN"), ("[" * 100_000, "JSON"), (deep, "generations"), ("[]", "dict")):
        path.write_bytes(joined(container, text, data))
        with pytest.raises(BadInput, match=word):
            Mask.load(path)


def test_many_keys_of_which_one_is_repeated_are_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "x.mask"
    for count in (1_000, 200_000):
        keys = ",".join(f'"k{i:07d}":1' for i in range(count))
        text = f'{{{keys},"k{count - 1:07d}":1}}'.encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        started = time.process_time()
        with pytest.raises(BadInput, match="twice"):
            Mask.load(path)
    assert time.process_time() - started < 10  # quadratic: a quarter of an hour


def test_padding_bits_must_be_zero(tmp_path: Path) -> None:
    path = tmp_path / "x.mask"
    Mask.from_bools({"w": np.ones(3, np.bool_)}).save(path)
    content = path.read_bytes()
    assert content[-1] == 0b111
    path.write_bytes(content[:-1] + b"\x0f")
    with pytest.raises(BadInput, match="padding"):
        Mask.load(path)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """Headers that promise terabytes, and a block that inflates without end, under a limit on the address space."""
    path, bomb = tmp_path / "x.mask", tmp_path / "bomb.mask"
    example().save(path, archive=True, scores="none")
    container, header, data = parts(path.read_bytes())
    name = "layers.1.q.weight"
    block = zlib.compress(bytes(1 << 28), 9)  # 256 MiB of zeros in 260 kB
    swollen = struct.pack("<I", len(block)) + block
    before, after = container[name]["data_offsets"]
    for entry in container.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= after:
            entry["data_offsets"] = [o + len(swollen) - (after - before) for o in entry["data_offsets"]]
    container[name].update(shape=[len(swollen)], data_offsets=[before, before + len(swollen)])
    bomb.write_bytes(joined(container, header, data[:before] + swollen + data[after:]))
    header["tensors"]["scalar"]["shape"] = [2**47]
    path.write_bytes(joined(container, header, data))
    script = """
        import resource, sys
        from mftmerge.inspection import inspect
        from mftmerge.errors import BadInput
        import numpy, zlib
        now = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (now + (100 << 20),) * 2)
        for path in sys.argv[1:]:
            try:
                inspect(path)
            except BadInput as e:
                print("refused", e)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path, bomb], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("refused") == 2, done.stdout
    assert "damaged in block 0" in done.stdout
