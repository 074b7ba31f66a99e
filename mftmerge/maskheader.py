"""The JSON header of a `.mask` file: written here, and checked here before anything is allocated for it."""

from __future__ import annotations

import json
import math
import string
import zlib
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from mftmerge import bits
from mftmerge.errors import BadInput
from mftmerge.mask import MaskInfo, Parent

FORMAT = 1
KEY, CRC_KEY = "mftmerge", "mftmerge_crc32"
SCORE_SUFFIX, INITIAL_SUFFIX = "::score", "::init"
CHECK_FIELDS = {SCORE_SUFFIX: "score_check", INITIAL_SUFFIX: "init_check"}
BLOCK = 1 << 20  # bytes of packed bits that `--archive` compresses on their own
LARGEST_HEADER = 100_000_000  # bytes; the safetensors limit
LARGEST_TENSOR = 1 << 48  # weights
DEEPEST_FAMILY = 64
BEST_DEFLATE = 1032  # deflate never expands more than this: a limit on what a small hostile file can ask for


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
    """Everything that a `.mask` says before its data. scores, initial: name -> (start, stop) of float32 bytes."""

    entries: dict[str, Entry]
    archive: bool
    digest: str | None
    info: MaskInfo
    scores: dict[str, tuple[int, int]]
    initial: dict[str, tuple[int, int]]
    sidecar: str | None


def crc(text: str) -> str:
    """CRC-32 of a string in UTF-8, as 8 hexadecimal digits."""
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [k for k, _ in pairs]
        raise BadInput(f"key {next(k for k in names if names.count(k) > 1)[:80]!r} appears twice")
    return result


def _no_constant(text: str) -> None:
    raise BadInput(f"{text} is not JSON")


def parse_json(text: bytes | str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinities. Raises BadInput."""
    try:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except BadInput:
        raise
    except (ValueError, RecursionError) as e:
        raise BadInput(f"not JSON: {str(e)[:80]}") from None
    return _need(value, dict, "header")


def _need(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInput(f"{what} should be {'an' if kind is int else 'a'} {kind.__name__}, is {type(value).__name__}")
    return value


def _shape(value: Any, what: str) -> tuple[int, ...]:
    shape = tuple(_need(n, int, f"{what}: dimension") for n in _need(value, list, f"{what}: shape"))
    if len(shape) > 32 or any(not 0 <= n <= LARGEST_TENSOR for n in shape) or math.prod(shape) > LARGEST_TENSOR:
        raise BadInput(f"{what}: shape {str(shape)[:80]} is out of range")
    return shape


def _hex(value: Any, digits: int, what: str) -> str:
    if not isinstance(value, str) or len(value) != digits or not set(value) <= set(string.hexdigits.lower()):
        raise BadInput(f"{what} should be {digits} hexadecimal digits")
    return value


def parse_container(text: bytes, data: int) -> tuple[dict[str, Any], dict[str, tuple[str, int, int]]]:
    """The metadata and the entries (name -> dtype, start, stop) of a safetensors header before `data` bytes.

    Raises BadInput on anything that plain safetensors would refuse, and on every dtype that a mask has no use for.
    """
    entries: dict[str, tuple[str, int, int]] = {}
    raw = parse_json(text)
    metadata = _need(raw.pop("__metadata__", {}), dict, "metadata")
    for name, value in raw.items():
        what = f"entry {name[:200]!r}"
        value = _need(value, dict, what)
        dtype = value.get("dtype")
        if dtype not in ("U8", "F32"):
            raise BadInput(f"{what}: dtype {str(dtype)[:20]!r} is neither U8 nor F32")
        offsets = _need(value.get("data_offsets"), list, f"{what}: data_offsets")
        if len(offsets) != 2:
            raise BadInput(f"{what}: data_offsets should be two numbers")
        start, stop = (_need(n, int, f"{what}: offset") for n in offsets)
        wanted = math.prod(_shape(value.get("shape"), what)) * (4 if dtype == "F32" else 1)
        if not 0 <= start <= stop <= data:
            raise BadInput(f"{what}: bytes {start} to {stop} are outside the file's {data} bytes of data")
        if stop - start != wanted:
            raise BadInput(f"{what}: its shape needs {wanted} bytes, it has {stop - start}")
        entries[name] = dtype, start, stop
    end = 0
    for name, (_, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise BadInput(f"entry {name[:200]!r} {'overlaps another' if start < end else 'leaves a gap before it'}")
        end = stop
    if end != data:
        raise BadInput(f"the entries end at byte {end} of {data}")
    return metadata, entries


def parse(text: bytes, data: int) -> Header:
    """Check a whole header. `data`: bytes that follow it in the file. Raises BadInput without naming the file."""
    metadata, found = parse_container(text, data)
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
    scores, initial = _scores(entries, found, SCORE_SUFFIX), _scores(entries, found, INITIAL_SUFFIX)
    extra = set(found) - set(entries) - {n + SCORE_SUFFIX for n in scores} - {n + INITIAL_SUFFIX for n in initial}
    if extra:
        raise BadInput(f"entry {min(extra)[:200]!r} is not described in the mask metadata")
    digest = None if header.get("digest") is None else _hex(header["digest"], 32, "digest")
    sidecar = header.get("scores_file")
    if sidecar is not None and (not isinstance(sidecar, str) or not sidecar or set("/\\\0") & set(sidecar)):
        raise BadInput("scores_file should be the name of a file in the same directory")
    return Header(entries, codec == "zlib", digest, parse_info(header.get("info", {})), scores, initial, sidecar)


def _entry(name: str, value: dict[str, Any], found: dict[str, tuple[str, int, int]], archive: bool) -> Entry:
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


def _scores(
    entries: dict[str, Entry], found: dict[str, tuple[str, int, int]], suffix: str
) -> dict[str, tuple[int, int]]:
    """Entries of float32 scores: for every covered tensor or for none."""
    present = {n: found[n + suffix] for n in entries if n + suffix in found}
    for name, (dtype, start, stop) in present.items():
        if dtype != "F32" or stop - start != 4 * entries[name].size:
            raise BadInput(f"tensor {name[:200]!r}: its scores should be {entries[name].size} float32")
    if present and len(present) != len(entries):
        raise BadInput(f"only {len(present)} of {len(entries)} tensors have an entry '{suffix}'")
    return {n: (start, stop) for n, (_, start, stop) in present.items()}


_KINDS: dict[str, type | tuple[type, ...]] = {
    "keep": (int, float, type(None)),
    "base": (str, type(None)),
    "operation": (str, type(None)),
    "weight": (int, float, type(None)),
    "name": str,
    "digest": str,
    "parents": list,
}


def _known(cls: type, value: Any, depth: int) -> dict[str, Any]:
    """The fields of a dataclass in a JSON object, each of its kind; other keys are from later versions: ignored."""
    value = _need(value, dict, "info")
    result = {f.name: value[f.name] for f in fields(cls) if f.name in value}
    for key, item in result.items():
        if not isinstance(item, _KINDS.get(key, dict)) or isinstance(item, bool):
            raise BadInput(f"info: {key} is a {type(item).__name__}")
    if depth > DEEPEST_FAMILY:
        raise BadInput(f"info: more than {DEEPEST_FAMILY} generations of parents")
    if "parents" in result:
        result["parents"] = tuple(Parent(**_parent(p, depth + 1)) for p in result["parents"])
    return result


def _parent(value: Any, depth: int) -> dict[str, Any]:
    result = _known(Parent, value, depth)
    if not {"name", "digest"} <= set(result):
        raise BadInput("info: a parent without name and digest")
    return result


def parse_info(value: Any) -> MaskInfo:
    """MaskInfo from its JSON form. Raises BadInput."""
    info = MaskInfo(**_known(MaskInfo, value, 0))
    if any(not isinstance(v, str) for v in info.fingerprints.values()):
        raise BadInput("info: a fingerprint is not a string")
    return info


def info_json(info: MaskInfo | Parent) -> dict[str, Any]:
    """MaskInfo as plain JSON values, without what is empty; numbers that JSON does not have become null."""
    result = {f.name: getattr(info, f.name) for f in fields(info)}
    result["parents"] = [info_json(p) for p in info.parents]
    return {k: _plain(v) for k, v in result.items() if v not in (None, {}, [], ())}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def render(header: Header) -> bytes:
    """The safetensors header (JSON, without its length and padding) of a mask file."""
    container: dict[str, Any] = {}
    tensors = {}
    for name, entry in header.entries.items():
        density = round(entry.kept / entry.size, 6) if entry.size else 1.0
        tensors[name] = {"shape": entry.shape, "kept": entry.kept, "density": density, "check": f"{entry.check:016x}"}
        tensors[name] |= {CHECK_FIELDS[suffix]: f"{check:016x}" for suffix, check in entry.score_checks.items()}
        place = [entry.start, entry.stop]
        container[name] = {"dtype": "U8", "shape": [entry.stop - entry.start], "data_offsets": place}
    for suffix, places in ((SCORE_SUFFIX, header.scores), (INITIAL_SUFFIX, header.initial)):
        for name, place2 in places.items():
            shape = header.entries[name].shape
            container[name + suffix] = {"dtype": "F32", "shape": shape, "data_offsets": place2}
    metadata: dict[str, Any] = {"format": FORMAT, "codec": "zlib" if header.archive else "raw"}
    metadata |= {"block": BLOCK} if header.archive else {}
    metadata |= {"digest": header.digest} if header.digest else {}
    metadata |= {"scores_file": header.sidecar} if header.sidecar else {}
    metadata |= {"info": info_json(header.info), "tensors": tensors}
    text = json.dumps(metadata, separators=(",", ":"))
    container = {"__metadata__": {KEY: text, CRC_KEY: crc(text)}} | container
    return json.dumps(container, separators=(",", ":")).encode()
