"""The JSON header of a `.mask` file: written here, and checked here before anything is allocated for it.

A `.mask` is a safetensors file: packed bits as U8, scores as F32, and in its metadata a JSON text that describes them.
The safetensors library checks the container; what it lets pass (a key given twice) and our own text are checked here.
"""

from __future__ import annotations

import json
import math
import os
import stat
import string
import sys
import zlib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from mftmerge import bits
from mftmerge.errors import BadInput
from mftmerge.files import once, refuse_pointer
from mftmerge.maskstore import DEEPEST_FAMILY, MOST_FORGOTTEN, MaskInfo, Parent, plain

FORMAT = 1
KEY, CRC_KEY = "mftmerge", "mftmerge_crc32"
SCORE_SUFFIX, INITIAL_SUFFIX = "::score", "::init"
CHECK_FIELDS = {SCORE_SUFFIX: "score_check", INITIAL_SUFFIX: "init_check"}
BLOCK = 1 << 20  # bytes of packed bits that `--archive` compresses on their own
LARGEST_HEADER = 100_000_000  # bytes; the safetensors limit
LARGEST_TENSOR = 1 << 48  # weights
BEST_DEFLATE = 1032  # deflate never expands more than this: a limit on what a small hostile file can ask for

Info = TypeVar("Info", MaskInfo, Parent)
Kind = TypeVar("Kind")
Places = dict[str, tuple[str, int, int]]  # entry -> its dtype, and its bytes [start, stop) of the data


@dataclass
class Entry:
    """One covered tensor: its shape, the ones in it, `bits.check` of its bits, and where its bytes are in the file.

    score_checks: the check sums of its scores, by suffix.
    """

    shape: tuple[int, ...]
    kept: int
    check: int
    start: int
    stop: int
    score_checks: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Header:
    """Everything that a `.mask` says before its data. scores: suffix -> tensor -> (start, stop) of float32 bytes."""

    entries: dict[str, Entry]
    archive: bool
    digest: str | None
    info: MaskInfo
    scores: dict[str, dict[str, tuple[int, int]]]
    sidecar: str | None


# -- the container ----------------------------------------------------------------------------------------------------


def open_container(path: Path) -> tuple[int, int, dict[str, Any], Places]:
    """Open a safetensors file: descriptor, where its data starts, its metadata, its entries. Raises BadInput.

    Bytes are read later with `pread` at the entries' places: `safe_open(...).get_slice` reads the whole tensor for each
    piece of it (3 s in the place of 5 ms for 64 MB in pieces of 1 MB).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be opened ({getattr(e, 'strerror', None) or e})") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path}: not a file; give the path of a .mask file")
        start = os.pread(fd, 8, 0)
        refuse_pointer(path, start)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(status.st_size - 8, LARGEST_HEADER):
            raise BadInput(f"{path}: not a .mask file, or cut short ({status.st_size} bytes)")
        text = os.pread(fd, length, 8)
        try:
            raw = parse_json(text)
            with safe_open(path, framework="numpy", backend="pread") as sound:
                names = sound.offset_keys()
            metadata = raw.pop("__metadata__", None) or {}
            return fd, 8 + length, metadata, {n: _place(n, raw[n]) for n in names}
        except (SafetensorError, OSError, KeyError) as e:
            reason = " ".join(str(e).split())[:200]
            raise BadInput(f"{path}: damaged, or no safetensors file ({reason}); get the file again") from None
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None
    except BaseException:
        os.close(fd)
        raise


def _place(name: str, described: dict[str, Any]) -> tuple[str, int, int]:
    """An entry that the library found sound; of the types only those that a mask has a use for."""
    dtype, (start, stop) = described["dtype"], described["data_offsets"]
    if dtype not in ("U8", "F32"):
        raise BadInput(f"entry {name[:200]!r}: dtype {str(dtype)[:20]!r} is neither U8 nor F32")
    return dtype, start, stop


def crc(text: str) -> str:
    """CRC-32 of a string in UTF-8, as 8 hexadecimal digits."""
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def _no_constant(text: str) -> None:
    raise BadInput(f"{text} is not JSON")


def parse_json(text: bytes | str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinities. Raises BadInput."""
    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=_no_constant)
    except BadInput:
        raise
    except (ValueError, RecursionError) as e:
        raise BadInput(f"not JSON: {str(e)[:80]}") from None
    return _need(value, dict, "header")


# -- our own text -----------------------------------------------------------------------------------------------------


def _need(value: object, kind: type[Kind], what: str) -> Kind:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInput(f"{what} should be {'an' if kind is int else 'a'} {kind.__name__}, is {type(value).__name__}")
    return value


def _shape(value: object, what: str) -> tuple[int, ...]:
    shape = tuple(_need(n, int, f"{what}: dimension") for n in _need(value, list, f"{what}: shape"))
    if len(shape) > 32 or any(not 0 <= n <= LARGEST_TENSOR for n in shape) or math.prod(shape) > LARGEST_TENSOR:
        raise BadInput(f"{what}: shape {str(shape)[:80]} is out of range")
    return shape


def _hex(value: object, digits: int, what: str) -> str:
    if not isinstance(value, str) or len(value) != digits or not set(value) <= set(string.hexdigits.lower()):
        raise BadInput(f"{what} should be {digits} hexadecimal digits")
    return value


def parse(metadata: dict[str, Any], found: Places) -> Header:
    """Check a whole header. found: the container's entries. Raises BadInput without naming the file."""
    if not isinstance(metadata.get(KEY), str):
        raise BadInput(f"a safetensors file without mask metadata ({KEY!r}); `mftmerge import` reads other masks")
    if metadata.get(CRC_KEY) != crc(metadata[KEY]):
        raise BadInput("the header is damaged (its CRC-32 differs); get the file again")
    header = parse_json(metadata[KEY])
    if header.get("format") != FORMAT:
        raise BadInput(f"format version {str(header.get('format'))[:20]}, this program reads {FORMAT}; update mftmerge")
    codec = header.get("codec")
    if codec not in ("raw", "zlib") or (codec == "zlib" and header.get("block") != BLOCK):
        raise BadInput(f"codec {str(codec)[:20]!r} with blocks of {str(header.get('block'))[:20]} is unknown")
    entries = {}
    for name, value in _need(header.get("tensors"), dict, "tensors").items():
        entries[name] = _entry(name, _need(value, dict, f"tensor {name[:200]!r}"), found, codec == "zlib")
    scores = {suffix: _scores(entries, found, suffix) for suffix in CHECK_FIELDS}
    extra = set(found) - set(entries) - {n + suffix for suffix, places in scores.items() for n in places}
    if extra:
        raise BadInput(f"entry {min(extra)[:200]!r} is not described in the mask metadata")
    digest = None if header.get("digest") is None else _hex(header["digest"], 32, "digest")
    sidecar = header.get("scores_file")
    if sidecar is not None and (not isinstance(sidecar, str) or not sidecar or set("/\\\0") & set(sidecar)):
        raise BadInput("scores_file should be the name of a file in the same directory")
    return Header(entries, codec == "zlib", digest, parse_info(header.get("info", {})), scores, sidecar)


def _entry(name: str, value: dict[str, object], found: Places, archive: bool) -> Entry:
    what = f"tensor {name[:200]!r}"
    shape = _shape(value.get("shape"), what)
    size = math.prod(shape)
    kept = _need(value.get("kept"), int, f"{what}: kept")
    if not 0 <= kept <= size:
        raise BadInput(f"{what}: {kept} kept of {size} weights")
    check = int(_hex(value.get("check"), 16, f"{what}: check"), 16)
    dtype, start, stop = found.get(name, ("", 0, 0))
    if dtype != "U8":
        raise BadInput(f"{what}: {'has no bits in the file' if not dtype else 'its bits should be U8'}")
    if archive:
        blocks = -(-bits.nbytes(size) // BLOCK)
        if not 4 * blocks <= stop - start or bits.nbytes(size) > BEST_DEFLATE * (stop - start):
            raise BadInput(f"{what}: {stop - start} bytes cannot hold {size} bits")
    elif stop - start != bits.nbytes(size):
        raise BadInput(f"{what}: shape {shape} needs {bits.nbytes(size)} bytes of bits, the file has {stop - start}")
    checks = {k: int(_hex(value[f], 16, f"{what}: {f}"), 16) for k, f in CHECK_FIELDS.items() if f in value}
    return Entry(shape, kept, check, start, stop, checks)


def _scores(entries: dict[str, Entry], found: Places, suffix: str) -> dict[str, tuple[int, int]]:
    """Entries of float32 scores: for every covered tensor or for none."""
    present = {n: found[n + suffix] for n in entries if n + suffix in found}
    for name, (dtype, start, stop) in present.items():
        if dtype != "F32" or stop - start != 4 * entries[name].size:
            raise BadInput(f"tensor {name[:200]!r}: its scores should be {entries[name].size} float32")
    if present and len(present) != len(entries):
        raise BadInput(f"only {len(present)} of {len(entries)} tensors have an entry '{suffix}'")
    return {n: (start, stop) for n, (_, start, stop) in present.items()}


def parse_info(value: object) -> MaskInfo:
    """MaskInfo from its JSON form; keys of later versions are ignored. Raises BadInput."""
    whole = _need(value, dict, "info")
    generation: list[object] = [whole]
    for _ in range(DEEPEST_FAMILY + 1):  # counted here, before anything walks down the tree by recursion
        parents = [p["parents"] for p in generation if isinstance(p, dict) and isinstance(p.get("parents"), list)]
        generation = [p for several in parents for p in several]
    if generation:
        raise BadInput(f"info: more than {DEEPEST_FAMILY} generations of parents")
    info = _described(MaskInfo, whole, "info")
    return info if "on" in whole else _before_on(info)


def _described(kind: type[Info], value: object, what: str) -> Info:
    """A MaskInfo or a Parent from its JSON form: each field as its annotation says. Raises BadInput.

    By hand, because importing a library for it costs more than half of the time that opening a mask takes.
    """
    described = _need(value, dict, what)
    given: dict[str, Any] = {}
    for f in fields(kind):
        if f.name in described:
            given[f.name] = READ[str(f.type)](described[f.name], f"{what}.{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise BadInput(f"{what}.{f.name} is missing")
    return kind(**given)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        raise BadInput(f"{what} should be a number, is {type(value).__name__}")
    return float(value)


def _count(value: object, what: str) -> int:
    if not 0 <= (count := _need(value, int, what)) <= MOST_FORGOTTEN:
        raise BadInput(f"{what} is out of range")
    return count


def _text(value: object, what: str) -> str:
    return _need(value, str, what)


def _texts(value: object, what: str) -> dict[str, str]:
    return {k: _text(v, f"{what}.{k[:80]}") for k, v in _need(value, dict, what).items()}


def _kind_of_mask(value: object, what: str) -> str:
    if value not in ("weights", "delta"):
        raise BadInput(f"{what} should be weights or delta")
    return str(value)


READ: dict[str, Callable[[Any, str], object]] = {  # annotation of a field -> how its JSON value is read
    "str": _text,
    "str | None": lambda value, what: None if value is None else _text(value, what),
    "int": _count,
    "float | None": lambda value, what: None if value is None else _number(value, what),
    "dict[str, str]": _texts,
    "Facts": lambda value, what: _need(value, dict, what),
    "tuple[Parent, ...]": lambda value, what: tuple(
        _described(Parent, parent, f"{what}.{i}") for i, parent in enumerate(_need(value, list, what))
    ),
    "Literal['weights', 'delta']": _kind_of_mask,
}


def _before_on(info: MaskInfo) -> MaskInfo:
    """What files of before `on` was recorded say in other words: masks learnt over a delta, and those of diff-mask."""
    training = info.training
    base = training.get("base", training.get("pretrained") if "method" in training else None)
    return replace(info, on="delta", delta_base=base) if isinstance(base, str) else info


def info_json(info: MaskInfo | Parent) -> dict[str, Any]:
    """MaskInfo as plain JSON values, without what is empty or as by default."""
    values: dict[str, object] = {}
    for f in fields(info):
        value = getattr(info, f.name)
        if value != (f.default_factory() if f.default_factory is not MISSING else f.default):
            values[f.name] = [info_json(p) for p in value] if f.name == "parents" else plain(value)
    if isinstance(info, MaskInfo) and info.on == "weights" and _before_on(info).on == "delta":
        values["on"] = "weights"  # said here, where its absence would be taken for a file of before
    return values


def render(header: Header) -> bytes:
    """The safetensors header (JSON, without its length and padding) of a mask file."""
    container: dict[str, object] = {}
    tensors = {}
    for name, entry in header.entries.items():
        density = round(entry.kept / entry.size, 6) if entry.size else 1.0
        tensors[name] = {"shape": entry.shape, "kept": entry.kept, "density": density, "check": f"{entry.check:016x}"}
        tensors[name] |= {CHECK_FIELDS[suffix]: f"{check:016x}" for suffix, check in entry.score_checks.items()}
        place = [entry.start, entry.stop]
        container[name] = {"dtype": "U8", "shape": [entry.stop - entry.start], "data_offsets": place}
    for suffix, places in header.scores.items():
        for name, place2 in places.items():
            shape = header.entries[name].shape
            container[name + suffix] = {"dtype": "F32", "shape": shape, "data_offsets": place2}
    metadata: dict[str, object] = {"format": FORMAT, "codec": "zlib" if header.archive else "raw"}
    metadata |= {"block": BLOCK} if header.archive else {}
    metadata |= {"digest": header.digest} if header.digest else {}
    metadata |= {"scores_file": header.sidecar} if header.sidecar else {}
    metadata |= {"info": info_json(header.info), "tensors": tensors}
    text = json.dumps(metadata, separators=(",", ":"))
    container = {"__metadata__": {KEY: text, CRC_KEY: crc(text)}} | container
    return json.dumps(container, separators=(",", ":")).encode()
