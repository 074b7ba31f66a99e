"""Reading and writing a `.mask`: a safetensors file of packed bits, in pieces, in memory that does not grow with it.

The header and its checks are in `maskheader`.
"""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from mftmerge import bits
from mftmerge import maskheader as header
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import located, read_at, refuse_existing, replacing, sidecar_name, sync_directory, write_at
from mftmerge.maskheader import BLOCK, INITIAL_SUFFIX, SCORE_SUFFIX, Entry, Header
from mftmerge.maskstore import MaskInfo, Scores, Store

SIDECAR_KEY = "mftmerge_scores"
SCORE_PIECE = 1 << 18  # float32 scores that are handled at a time
UNKNOWN = (1 << 64) - 1  # a check sum that is not known yet: as long as any


class MaskFile(Store):
    """An open `.mask`: reads the bits and scores of a tensor, or of a part of one, when asked.

    path: a file, or hf://owner/name/file.mask[@revision] on the Hub. Raises BadInput on anything that is not a mask.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = located(path)
        self._fd, self._data, metadata, found = header.open_container(path)
        # Open as long as the mask: where the file is replaced meanwhile, this is still the one that was checked.
        weakref.finalize(self, os.close, self._fd)
        try:
            self.header: Header = header.parse(metadata, found)
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None
        self.info = self.header.info
        self.shapes = {n: e.shape for n, e in self.header.entries.items()}
        self._directories: dict[str, npt.NDArray[np.int64]] = {}
        self._last = threading.local()  # .block: the block that this thread decompressed last
        self._sidecar = self._open_sidecar()
        self.has_scores, self.has_initial_scores = bool(self._scores(SCORE_SUFFIX)), bool(self._scores(INITIAL_SUFFIX))
        if not self.header.archive:
            for name, entry in self.header.entries.items():
                if entry.size % 8:
                    self._check_padding(name, entry, os.pread(self._fd, 1, self._data + entry.stop - 1)[-1])

    def count(self, name: str) -> int:
        return self.header.entries[name].kept

    def digest(self) -> str:
        return self.header.digest or super().digest()

    def verify(self, name: str, check: int) -> None:
        if check != self.header.entries[name].check:
            raise BadInput(f"{self.path}: tensor {name!r} is damaged (its check sum differs); get the file again")

    def read(self, name: str, start: int, stop: int) -> bits.Packed:
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
        for suffix in self.header.entries[name].score_checks:
            if name in self._scores(suffix):
                size, check = self.header.entries[name].size, 0
                for start in range(0, size, SCORE_PIECE):
                    piece = self._read_scores(name, suffix, start, start + SCORE_PIECE)
                    check ^= bits.check(piece.view(np.uint8))
                self._check_scores(name, suffix, check)

    def read_scores(self, name: str, start: int, stop: int) -> Scores:
        return self._read_scores(name, SCORE_SUFFIX, start, stop)

    def read_initial(self, name: str, start: int, stop: int) -> Scores:
        return self._read_scores(name, INITIAL_SUFFIX, start, stop)

    def _bytes(self, fd: int, start: int, length: int) -> bits.Packed:
        array = np.empty(length, np.uint8)
        try:
            read_at(fd, array.data, start, self.path)
        except MftmergeError:
            raise BadInput(f"{self.path}: the file became shorter while it was read") from None
        return array

    def _block(self, name: str, index: int) -> bits.Packed:
        """Block `index` of an archived tensor, decompressed. The last one is kept: pieces are smaller than blocks."""
        last: tuple[tuple[str, int], bits.Packed] | None = getattr(self._last, "block", None)
        if last is not None and last[0] == (name, index):
            return last[1]
        entry = self.header.entries[name]
        ends = self._directory(name, entry)
        begin = int(ends[index - 1]) if index else 0
        raw = self._bytes(self._fd, self._data + entry.start + 4 * len(ends) + begin, int(ends[index]) - begin)
        wanted = min(BLOCK, bits.nbytes(entry.size) - index * BLOCK)
        inflate = zlib.decompressobj()
        try:
            content = inflate.decompress(raw.data, wanted + 1)  # a limit: a hostile block may inflate without end
        except zlib.error:
            content = b""
        if len(content) != wanted or not inflate.eof or inflate.unused_data:
            raise BadInput(f"{self.path}: tensor {name!r} is damaged in block {index}; get the file again")
        block = np.frombuffer(content, np.uint8)
        self._last.block = (name, index), block
        return block

    def _directory(self, name: str, entry: Entry) -> npt.NDArray[np.int64]:
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

    def _check_scores(self, name: str, suffix: str, check: int) -> None:
        if check != self.header.entries[name].score_checks.get(suffix, check):
            raise BadInput(f"{self.path}: the scores of {name!r} are damaged (their check sum differs)")

    def _open_sidecar(self) -> tuple[int, int, dict[str, tuple[int, int]]] | None:
        """Descriptor, start of the data and entries of the scores file, None where there is none beside the mask."""
        path = self.path.parent / (self.header.sidecar or "")
        if self.header.sidecar is None or not path.is_file():
            return None
        fd, data, metadata, found = header.open_container(path)
        weakref.finalize(self, os.close, fd)
        if metadata.get(SIDECAR_KEY) != self.header.digest:
            raise BadInput(f"{path}: these scores belong to another mask than {self.path.name}; remove or replace them")
        for name, (dtype, start, stop) in found.items():
            owner = self.header.entries.get(name.removesuffix(SCORE_SUFFIX).removesuffix(INITIAL_SUFFIX))
            if owner is None or dtype != "F32" or stop - start != 4 * owner.size:
                raise BadInput(f"{path}: entry {name[:200]!r} does not fit {self.path.name}")
        return fd, data, {n: (start, stop) for n, (_, start, stop) in found.items()}

    def _scores(self, suffix: str) -> dict[str, tuple[int, int, int]]:
        """Tensor -> (descriptor, first byte, byte after the last) of its scores; empty unless all tensors have them."""
        own = self.header.scores[suffix]
        if own or self._sidecar is None:
            return {n: (self._fd, self._data + a, self._data + b) for n, (a, b) in own.items()}
        fd, data, places = self._sidecar
        here = {n: places[n + suffix] for n in self.shapes if n + suffix in places}
        return {n: (fd, data + a, data + b) for n, (a, b) in here.items()} if len(here) == len(self.shapes) else {}

    def _read_scores(self, name: str, suffix: str, start: int, stop: int) -> Scores:
        fd, begin, end = self._scores(suffix)[name]
        stop = min(stop, (end - begin) // 4)
        raw = self._bytes(fd, begin + 4 * start, 4 * (stop - start))
        if start == 0 and 4 * stop == end - begin:
            self._check_scores(name, suffix, bits.check(raw))
        return raw.view("<f4")


def compress(piece: bits.Packed) -> bytes:
    """One archived block: a zlib stream with Huffman coding only. Random bits have no repeats for deflate to find."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(piece.data) + deflate.flush()


class MaskWriter:
    """Writes a `.mask` whose counts are known only at the end: the header's room is reserved, and filled last.

    Not through `serialize_file`, which wants all tensors in memory and the header's text before them. Used as a context
    manager; the file takes its name when the block ends without an error, and is removed otherwise. Raw bits may be
    written in any order and from several threads; archived blocks in order, tensors as in `names`.

    scores: suffixes of the scores that go into the file; sidecar: name of the file that they are in otherwise; checked:
    suffixes of those whose check sums are recorded.
    """

    def __init__(
        self,
        path: str | Path,
        shapes: dict[str, tuple[int, ...]],
        *,
        archive: bool = False,
        info: MaskInfo | None = None,
        digest: str | None = None,
        scores: tuple[str, ...] = (),
        checked: tuple[str, ...] = (),
        sidecar: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        refuse_existing(self.path, overwrite)
        bad = [n for n in shapes if n.endswith((SCORE_SUFFIX, INITIAL_SUFFIX)) or n == "__metadata__"]
        if bad:
            raise BadInput(f"{path}: a tensor cannot be called {bad[0]!r} in a .mask file")
        self.header = Header({}, archive, digest, info or MaskInfo(), {s: {} for s in header.CHECK_FIELDS}, sidecar)
        self.names = tuple(sorted(shapes))
        place = 0
        for suffix in scores:  # before the bits, so that float32 stays aligned
            for name in self.names:
                size = Entry(shapes[name], 0, 0, 0, 0).size
                self.header.scores[suffix][name] = place, place + 4 * size
                place += 4 * size
        self._cursor = place
        for name in self.names:
            entry = Entry(shapes[name], 0, UNKNOWN, place, place, dict.fromkeys(checked, UNKNOWN))
            entry.kept = entry.size
            raw = bits.nbytes(entry.size)
            # For an archive the room that it may need: blocks of random bits come out a little longer than they were.
            entry.stop = place = place + raw + (raw // 100 + 1024 * (raw // BLOCK + 1) if archive else 0)
            self.header.entries[name] = entry
        longest = len(header.render(self.header)) + 8 * len(self.names)  # a density may round to more digits
        self._room = -(-longest // 64) * 64
        if self._room > header.LARGEST_HEADER:
            raise MftmergeError(f"{path}: {len(self.names)} tensors need a header above 100 MB; split the mask")
        self._lengths: dict[str, list[int]] = {}
        self._fd = -1
        self._open = ExitStack()

    def __enter__(self) -> MaskWriter:
        end = max((e.stop for e in self.header.entries.values()), default=0)
        space = os.statvfs(self.path.parent)  # not fallocate, which on a memory file system costs as much as writing
        if not self.header.archive and end > space.f_bavail * space.f_frsize:
            raise MftmergeError(f"{self.path}: needs {end:,} bytes, more than are free there")
        temporary = self._open.enter_context(replacing(self.path))
        self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._open.callback(os.close, self._fd)
        return self

    def write(self, name: str, start: int, data: bits.Packed | bytes) -> None:
        """Packed bits from byte `start` of a tensor on; for an archive the next block, from `compress`."""
        if not self.header.archive:
            self._put(self.header.entries[name].start + start, data)
            return
        entry = self.header.entries[name]
        if name not in self._lengths:
            self._lengths[name] = []
            entry.start = self._cursor
            self._cursor += 4 * -(-bits.nbytes(entry.size) // BLOCK)
        self._lengths[name].append(len(data))
        self._put(self._cursor, data)
        self._cursor += len(data)

    def write_scores(self, name: str, suffix: str, start: int, scores: Scores) -> None:
        """float32 scores from element `start` of a tensor on; suffix is one of those given to the writer."""
        place = self.header.scores[suffix][name][0] + 4 * start
        self._put(place, np.ascontiguousarray(scores, "<f4").reshape(-1).view(np.uint8))

    def finish(self, name: str, kept: int, check: int) -> None:
        """Record what was written for a tensor."""
        entry = self.header.entries[name]
        entry.kept, entry.check = kept, check
        if self.header.archive:
            lengths = self._lengths.setdefault(name, [])
            if not lengths:
                entry.start = self._cursor
            self._put(entry.start, np.array(lengths, "<u4").view(np.uint8))
            entry.stop = self._cursor

    def _put(self, place: int, data: bits.Packed | bytes) -> None:
        write_at(self._fd, memoryview(data if isinstance(data, bytes) else data.data).cast("B"), place + 8 + self._room)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if error is not None:
                self._open.__exit__(kind, error, trace)
                return
            text = header.render(self.header).ljust(self._room)
            self._put(-8 - self._room, np.frombuffer(self._room.to_bytes(8, "little") + text, np.uint8))
            os.fsync(self._fd)
        sync_directory(self.path.parent)


def save(
    mask: Store,
    info: MaskInfo,
    path: str | Path,
    *,
    archive: bool = False,
    scores: Literal["embed", "sidecar", "none"] = "embed",
    overwrite: bool = True,
) -> None:
    """Write a mask to `path`, whole or not at all (temporary file beside it, fsync, rename). See `Mask.save`."""
    path = Path(path)
    kinds = ((SCORE_SUFFIX,) if mask.has_scores else ()) + ((INITIAL_SUFFIX,) if mask.has_initial_scores else ())
    sidecar = sidecar_name(path) if scores == "sidecar" and kinds else None
    refuse_existing(path, overwrite)
    digest = mask.digest()
    if sidecar:
        _save_sidecar(mask, digest, path.with_name(sidecar), kinds, overwrite)
    embedded, checked = kinds if scores == "embed" else (), kinds if scores != "none" else ()
    writer = MaskWriter(
        path,
        {n: mask.shapes[n] for n in mask.names},
        archive=archive,
        info=info,
        digest=digest,
        scores=embedded,
        checked=checked,
        sidecar=sidecar,
        overwrite=overwrite,
    )
    with writer:
        for name in mask.names:
            start = kept = check = 0
            for piece in mask.pieces(name, BLOCK):
                writer.write(name, start, compress(piece) if archive else piece)
                start, kept, check = start + piece.size, kept + bits.count(piece), check ^ bits.check(piece)
            writer.finish(name, kept, check)
            for suffix in checked:
                _save_scores(mask, name, suffix, writer, write=suffix in embedded)


def _save_scores(mask: Store, name: str, suffix: str, writer: MaskWriter, write: bool) -> None:
    """Write a tensor's scores, or only record their check sum where they go to another file."""
    read = mask.read_scores if suffix == SCORE_SUFFIX else mask.read_initial
    check = 0
    for first in range(0, mask.size(name), SCORE_PIECE):
        piece = np.ascontiguousarray(read(name, first, first + SCORE_PIECE), "<f4")
        check ^= bits.check(piece.view(np.uint8))
        if write:
            writer.write_scores(name, suffix, first, piece)
    writer.header.entries[name].score_checks[suffix] = check


def _save_sidecar(mask: Store, digest: str, path: Path, kinds: tuple[str, ...], overwrite: bool) -> None:
    """The scores as a plain safetensors file that names the mask that they belong to."""
    refuse_existing(path, overwrite)
    reads = {SCORE_SUFFIX: mask.read_scores, INITIAL_SUFFIX: mask.read_initial}
    entries = {n + k: reads[k](n, 0, mask.size(n)).reshape(mask.shapes[n]) for k in kinds for n in mask.names}
    with replacing(path) as temporary:
        save_file(entries, temporary, metadata={SIDECAR_KEY: digest})
