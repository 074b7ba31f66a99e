"""Reading a `.mask`: a safetensors container of packed bits, checked when it is opened and read piece by piece."""

from __future__ import annotations

import os
import stat
import threading
import weakref
import zlib
from pathlib import Path

import numpy as np

from mftmerge import bits
from mftmerge import maskheader as header
from mftmerge.errors import BadInput
from mftmerge.mask import Mask, Scores
from mftmerge.maskheader import BLOCK, INITIAL_SUFFIX, SCORE_SUFFIX, Entry, Header
from mftmerge.maskhub import located

SIDECAR_KEY = "mftmerge_scores"
SCORE_PIECE = 1 << 18  # float32 scores that are handled at a time


def open_container(path: str | Path) -> tuple[int, bytes, int, int]:
    """Open a safetensors file: descriptor, its JSON header, where its data starts, and how long that is.

    Raises BadInput where the length of the header does not fit the file, before reading it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be opened ({getattr(e, 'strerror', None) or e})") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path}: not a file; give the path of a .mask file")
        start = os.pread(fd, 8, 0)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(status.st_size - 8, header.LARGEST_HEADER):
            raise BadInput(f"{path}: not a .mask file, or cut short ({status.st_size} bytes)")
        text = os.pread(fd, length, 8)
        if len(text) != length or text[:1] != b"{":
            raise BadInput(f"{path}: not a .mask file (no safetensors header)")
        return fd, text, 8 + length, status.st_size - 8 - length
    except BaseException:
        os.close(fd)
        raise


class MaskFile:
    """An open `.mask`: reads the bits and scores of a tensor, or of a part of one, when asked.

    path: a file, or hf://owner/name/file.mask[@revision] on the Hub.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = located(path)
        self._fd, text, self._data, length = open_container(path)
        weakref.finalize(self, os.close, self._fd)
        try:
            self.header: Header = header.parse(text, length)
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None
        self.shapes = {n: e.shape for n, e in self.header.entries.items()}
        self.digest = self.header.digest
        self._directories: dict[str, np.ndarray] = {}
        self._last = threading.local()  # .block: the block that this thread decompressed last
        self._sidecar = self._open_sidecar()
        self.has_scores = bool(self._places(SCORE_SUFFIX))
        self.has_initial_scores = bool(self._places(INITIAL_SUFFIX))
        if not self.header.archive:
            for name, entry in self.header.entries.items():
                if entry.size % 8:
                    self._check_padding(name, entry, os.pread(self._fd, 1, self._data + entry.stop - 1)[-1])

    def count(self, name: str) -> int:
        """Ones in a tensor, from the header."""
        return self.header.entries[name].kept

    def verify(self, name: str, check: int) -> None:
        """Raise BadInput unless the bits that were read have the check sum in the header."""
        if check != self.header.entries[name].check:
            raise BadInput(f"{self.path}: tensor {name!r} is damaged (its check sum differs); get the file again")

    def read(self, name: str, start: int, stop: int) -> bits.Packed:
        """Packed bits [start, stop) of a tensor; start is a multiple of 8."""
        entry = self.header.entries[name]
        first, last = start // 8, bits.nbytes(stop)
        if last <= first:
            return np.empty(0, np.uint8)
        if self.header.archive:
            parts = [
                self._block(name, i)[max(first - i * BLOCK, 0) : last - i * BLOCK]
                for i in range(first // BLOCK, -(-last // BLOCK))
            ]
            packed = parts[0].copy() if len(parts) == 1 else np.concatenate(parts)
        else:
            packed = self._bytes(self._fd, self._data + entry.start + first, last - first)
        if stop == entry.size and stop % 8:
            self._check_padding(name, entry, int(packed[-1]))
        return packed

    def verify_scores(self, name: str) -> None:
        """Read all scores of a tensor; BadInput unless they have the check sums in the header."""
        for suffix in self.header.entries[name].score_checks:
            if name in self._places(suffix):
                size, check = self.header.entries[name].size, 0
                for start in range(0, size, SCORE_PIECE):
                    piece = self._read_scores(name, suffix, start, start + SCORE_PIECE)
                    check ^= bits.check(piece.view(np.uint8))
                self._check_scores(name, suffix, check)

    def _check_scores(self, name: str, suffix: str, check: int) -> None:
        if check != self.header.entries[name].score_checks.get(suffix, check):
            raise BadInput(f"{self.path}: the scores of {name!r} are damaged (their check sum differs)")

    def read_scores(self, name: str, start: int, stop: int) -> Scores:
        return self._read_scores(name, SCORE_SUFFIX, start, stop)

    def read_initial(self, name: str, start: int, stop: int) -> Scores:
        return self._read_scores(name, INITIAL_SUFFIX, start, stop)

    def _bytes(self, fd: int, start: int, length: int) -> bits.Packed:
        array = np.empty(length, np.uint8)
        if os.preadv(fd, [array.data], start) != length:  # more than 2 GiB at once, or a file cut while in use
            raw = b"".join(iter_pread(fd, start, length))
            if len(raw) != length:
                raise BadInput(f"{self.path}: the file became shorter while it was read")
            array[:] = np.frombuffer(raw, np.uint8)
        return array

    def _block(self, name: str, index: int) -> bits.Packed:
        """Block `index` of an archived tensor, decompressed. The last one is kept: pieces are smaller than blocks."""
        last = getattr(self._last, "block", None)
        if last is not None and last[0] == (name, index):
            return last[1]  # type: ignore[no-any-return]
        entry = self.header.entries[name]
        ends = self._directory(name, entry)
        begin = int(ends[index - 1]) if index else 0
        raw = self._bytes(self._fd, self._data + entry.start + 4 * len(ends) + begin, int(ends[index]) - begin)
        wanted = min(BLOCK, bits.nbytes(entry.size) - index * BLOCK)
        inflate = zlib.decompressobj()
        try:
            content = inflate.decompress(raw.data, wanted + 1)
        except zlib.error:
            content = b""
        if len(content) != wanted or not inflate.eof or inflate.unused_data:
            raise BadInput(f"{self.path}: tensor {name!r} is damaged in block {index}; get the file again")
        block = np.frombuffer(content, np.uint8)
        self._last.block = (name, index), block
        return block

    def _directory(self, name: str, entry: Entry) -> np.ndarray:
        """Where each compressed block of a tensor ends, in bytes after the directory."""
        if name not in self._directories:
            blocks = -(-bits.nbytes(entry.size) // BLOCK)
            lengths = self._bytes(self._fd, self._data + entry.start, 4 * blocks).view("<u4")
            ends = np.cumsum(lengths, dtype=np.int64)
            if blocks and ends[-1] != entry.stop - entry.start - 4 * blocks:
                raise BadInput(f"{self.path}: tensor {name!r} is damaged (lengths of its blocks)")
            self._directories[name] = ends
        return self._directories[name]

    def _check_padding(self, name: str, entry: Entry, byte: int) -> None:
        if byte >> entry.size % 8:
            raise BadInput(f"{self.path}: tensor {name!r} has padding bits that are not 0")

    def _open_sidecar(self) -> tuple[int, int, dict[str, tuple[int, int]]] | None:
        """Descriptor, start of the data and entries of the scores file, None where there is none beside the mask."""
        path = self.path.parent / (self.header.sidecar or "")
        if self.header.sidecar is None or not path.is_file():
            return None
        fd, text, data, length = open_container(path)
        weakref.finalize(self, os.close, fd)
        try:
            metadata, found = header.parse_container(text, length)
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None
        if metadata.get(SIDECAR_KEY) != self.header.digest:
            raise BadInput(f"{path}: these scores belong to another mask than {self.path.name}; remove or replace them")
        for name, (dtype, start, stop) in found.items():
            owner = self.header.entries.get(name.removesuffix(SCORE_SUFFIX).removesuffix(INITIAL_SUFFIX))
            if owner is None or dtype != "F32" or stop - start != 4 * owner.size:
                raise BadInput(f"{path}: entry {name[:200]!r} does not fit {self.path.name}")
        return fd, data, {n: (start, stop) for n, (_, start, stop) in found.items()}

    def _places(self, suffix: str) -> dict[str, tuple[int, int, int]]:
        """Tensor -> (descriptor, first byte, byte after the last) of its scores; empty unless all tensors have them."""
        own = self.header.scores if suffix == SCORE_SUFFIX else self.header.initial
        if own or self._sidecar is None:
            return {n: (self._fd, self._data + a, self._data + b) for n, (a, b) in own.items()}
        fd, data, places = self._sidecar
        here = {n: places[n + suffix] for n in self.shapes if n + suffix in places}
        return {n: (fd, data + a, data + b) for n, (a, b) in here.items()} if len(here) == len(self.shapes) else {}

    def _read_scores(self, name: str, suffix: str, start: int, stop: int) -> Scores:
        fd, begin, end = self._places(suffix)[name]
        stop = min(stop, (end - begin) // 4)
        raw = self._bytes(fd, begin + 4 * start, 4 * (stop - start))
        if start == 0 and 4 * stop == end - begin:
            self._check_scores(name, suffix, bits.check(raw))
        return raw.view("<f4")


def iter_pread(fd: int, start: int, length: int) -> list[bytes]:
    """`length` bytes of a file from `start`, or fewer at its end, in as many reads as it takes."""
    parts = []
    while length and (part := os.pread(fd, min(length, 1 << 28), start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return parts


def load(path: str | Path) -> Mask:
    """Open a .mask file. Raises BadInput with the path on anything that is not one."""
    file = MaskFile(path)
    return Mask.from_store(file, file.header.info)
