"""Writing a `.mask`: whole or not at all, in pieces, in memory that does not depend on its size."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from mftmerge import bits
from mftmerge import maskheader as header
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import refuse_existing, replacing, sync_directory
from mftmerge.mask import Mask, MaskInfo, Scores
from mftmerge.maskfile import SCORE_PIECE, SIDECAR_KEY
from mftmerge.maskheader import BLOCK, INITIAL_SUFFIX, SCORE_SUFFIX, Entry, Header


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
        checked: tuple[str, ...] = (),
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
            entry = Entry(shapes[name], 0, (1 << 64) - 1, place, place, dict.fromkeys(checked, (1 << 64) - 1))
            entry.kept = entry.size
            raw = bits.nbytes(entry.size)
            entry.stop = place = place + raw + (raw // 100 + 1024 * (raw // BLOCK + 1) if archive else 0)
            self.header.entries[name] = entry
        longest = len(header.render(self.header)) + 8 * len(self.names)  # a density may round to more digits
        self._room = -(-longest // 64) * 64
        if self._room > header.LARGEST_HEADER:
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
        space = os.statvfs(self.path.parent)  # not fallocate, which on a memory file system costs as much as writing
        if not self.header.archive and end > space.f_bavail * space.f_frsize:
            self._remove()
            raise MftmergeError(f"{self.path}: needs {end:,} bytes, more than are free there")
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
                text = header.render(self.header).ljust(self._room)
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
    embedded, checked = kinds if scores == "embed" else (), kinds if scores != "none" else ()
    writer = MaskWriter(
        path,
        shapes,
        archive=archive,
        info=mask.info,
        digest=mask.digest,
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


def _save_scores(mask: Mask, name: str, suffix: str, writer: MaskWriter, write: bool) -> None:
    """Write a tensor's scores, or only record their check sum where they go to another file."""
    read = mask.read_scores if suffix == SCORE_SUFFIX else mask.read_initial_scores
    check = 0
    for first in range(0, mask.size(name), SCORE_PIECE):
        piece = np.ascontiguousarray(read(name, first, first + SCORE_PIECE), "<f4")
        check ^= bits.check(piece.view(np.uint8))
        if write:
            writer.write_scores(name, suffix, first, piece)
    writer.header.entries[name].score_checks[suffix] = check


def _save_sidecar(mask: Mask, path: Path, kinds: tuple[str, ...], overwrite: bool) -> None:
    """The scores as a plain safetensors file that names the mask that they belong to."""
    from safetensors.numpy import save_file

    refuse_existing(path, overwrite)
    entries = {n + SCORE_SUFFIX: mask.scores(n) for n in mask.names}
    if INITIAL_SUFFIX in kinds:
        entries |= {n + INITIAL_SUFFIX: mask.initial_scores(n) for n in mask.names}
    with replacing(path) as temporary:
        save_file(entries, temporary, metadata={SIDECAR_KEY: mask.digest})
