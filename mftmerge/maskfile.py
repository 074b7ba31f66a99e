"""A `.mask` on disk: a safetensors container of packed bits, read piece by piece, written whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
import weakref
import zlib
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from mftmerge import bits, maskheader
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask, MaskInfo, Scores
from mftmerge.maskheader import BLOCK, INITIAL_SUFFIX, SCORE_SUFFIX, Entry, Header

SIDECAR_KEY = "mftmerge_scores"
SCORE_PIECE = 1 << 18  # float32 scores that are copied at a time


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
        if len(start) < 8 or not 2 <= length <= min(status.st_size - 8, maskheader.LARGEST_HEADER):
            raise BadInput(f"{path}: not a .mask file, or cut short ({status.st_size} bytes)")
        text = os.pread(fd, length, 8)
        if len(text) != length or text[:1] != b"{":
            raise BadInput(f"{path}: not a .mask file (no safetensors header)")
        return fd, text, 8 + length, status.st_size - 8 - length
    except BaseException:
        os.close(fd)
        raise


class MaskFile:
    """An open `.mask`: reads the bits and scores of a tensor, or of a part of one, when asked."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd, text, self._data, length = open_container(path)
        weakref.finalize(self, os.close, self._fd)
        try:
            self.header: Header = maskheader.parse(text, length)
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
            metadata, found = maskheader.parse_container(text, length)
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
        return self._bytes(fd, begin + 4 * start, 4 * (stop - start)).view("<f4")


def iter_pread(fd: int, start: int, length: int) -> list[bytes]:
    """`length` bytes of a file from `start`, or fewer at its end, in as many reads as it takes."""
    parts = []
    while length and (part := os.pread(fd, min(length, 1 << 28), start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return parts


def compress(piece: bits.Packed) -> bytes:
    """One archived block: a zlib stream with Huffman coding only. Random bits have no repeats for deflate to find."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(piece.data) + deflate.flush()


class MaskWriter:
    """Writes a `.mask` whose counts are known only at the end: the header's room is reserved, and filled last.

    Used as a context manager; the file takes its name when the block ends without an error, and is removed otherwise.
    Raw bits may be written in any order and from several threads; archived blocks in order, tensors as in `names`.
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
        sidecar: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self._scores = Path(path), scores
        refuse_existing(self.path, overwrite)
        bad = [n for n in shapes if n.endswith((SCORE_SUFFIX, INITIAL_SUFFIX)) or n == "__metadata__"]
        if bad:
            raise BadInput(f"{path}: a tensor cannot be called {bad[0]!r} in a .mask file")
        self.header = Header({}, archive, digest, info or MaskInfo(), {}, {}, sidecar)
        self.names = tuple(sorted(shapes))
        place = 0
        for suffix, places in ((SCORE_SUFFIX, self.header.scores), (INITIAL_SUFFIX, self.header.initial)):
            for name in self.names if suffix in scores else ():  # before the bits, so that float32 stays aligned
                size = Entry(shapes[name], 0, 0, 0, 0).size
                places[name] = place, place + 4 * size
                place += 4 * size
        self._cursor = place
        for name in self.names:
            entry = Entry(shapes[name], 0, (1 << 64) - 1, place, place)
            entry.kept = entry.size
            raw = bits.nbytes(entry.size)
            entry.stop = place = place + raw + (raw // 100 + 1024 * (raw // BLOCK + 1) if archive else 0)
            self.header.entries[name] = entry
        longest = len(maskheader.render(self.header)) + 8 * len(self.names)  # a density may round to more digits
        self._room = -(-longest // 64) * 64
        if self._room > maskheader.LARGEST_HEADER:
            raise MftmergeError(f"{path}: {len(self.names)} tensors need a header above 100 MB; split the mask")
        self._lengths: dict[str, list[int]] = {}
        self._fd = -1
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> MaskWriter:
        try:
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as e:
            raise BadInput(f"{self.path}: cannot be written ({e.strerror})") from None
        end = max((e.stop for e in self.header.entries.values()), default=0)
        if not self.header.archive and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, 8 + self._room + end)
            except OSError as e:
                if e.errno == 28:  # no space left: say so before the work
                    self._remove()
                    raise MftmergeError(f"{self.path}: no space left on the device") from None
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
        places = self.header.scores if suffix == SCORE_SUFFIX else self.header.initial
        self._put(places[name][0] + 4 * start, np.ascontiguousarray(scores, "<f4").reshape(-1).view(np.uint8))

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
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        place += 8 + self._room
        while view:
            done = os.pwrite(self._fd, view, place)
            view, place = view[done:], place + done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                text = maskheader.render(self.header).ljust(self._room)
                self._put(-8 - self._room, self._room.to_bytes(8, "little") + text)
                os.fsync(self._fd)
                os.replace(self._temporary, self.path)
                sync_directory(self.path.parent)
        finally:
            self._remove()

    def _remove(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._temporary.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """BadInput where an output exists and may not be replaced, or has no directory to be in."""
    if path.is_dir():
        raise BadInput(f"{path}: is a directory; give the name of a .mask file")
    if path.exists() and not overwrite:
        raise BadInput(f"{path}: exists; give --overwrite to replace it")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no directory {path.parent}; make it first")


def sync_directory(path: Path) -> None:
    """Make a rename durable, where the system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def save(
    mask: Mask,
    path: str | Path,
    *,
    archive: bool = False,
    scores: Literal["embed", "sidecar", "none"] = "embed",
    overwrite: bool = True,
) -> None:
    """Write `mask` to `path` atomically (temporary file beside it, fsync, rename). See `Mask.save`."""
    path = Path(path)
    shapes = {n: mask.shape(n) for n in mask.names}
    kinds = ((SCORE_SUFFIX,) if mask.has_scores else ()) + ((INITIAL_SUFFIX,) if mask.has_initial_scores else ())
    sidecar = f"{path.stem}.scores.safetensors" if scores == "sidecar" and kinds else None
    refuse_existing(path, overwrite)
    if sidecar:
        _save_sidecar(mask, path.with_name(sidecar), kinds, overwrite)
    embedded = kinds if scores == "embed" else ()
    writer = MaskWriter(
        path,
        shapes,
        archive=archive,
        info=mask.info,
        digest=mask.digest,
        scores=embedded,
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
            for suffix in embedded:
                read = mask.read_scores if suffix == SCORE_SUFFIX else mask.read_initial_scores
                for first in range(0, mask.size(name), SCORE_PIECE):
                    writer.write_scores(name, suffix, first, read(name, first, first + SCORE_PIECE))


def _save_sidecar(mask: Mask, path: Path, kinds: tuple[str, ...], overwrite: bool) -> None:
    """The scores as a plain safetensors file that names the mask that they belong to."""
    from safetensors.numpy import save_file

    refuse_existing(path, overwrite)
    entries = {n + SCORE_SUFFIX: mask.scores(n) for n in mask.names}
    if INITIAL_SUFFIX in kinds:
        entries |= {n + INITIAL_SUFFIX: mask.initial_scores(n) for n in mask.names}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(entries, temporary, metadata={SIDECAR_KEY: mask.digest})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> Mask:
    """Open a .mask file. Raises BadInput with the path on anything that is not one."""
    file = MaskFile(path)
    return Mask.from_store(file, file.header.info)
