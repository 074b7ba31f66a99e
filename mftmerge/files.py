"""Files: what belongs to a model, outputs that appear whole and cost no input, whole reads and writes.

A file is written through `replacing`, a directory through `outputdirectory.OutputDirectory`. Every command that writes
calls `protect` (or `refuse_existing`, which does) with its inputs before it starts.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from mftmerge.errors import BadInput, MftmergeError

# Files that belong to a model beside its weights: configuration, tokenizer, templates, licence. No pickles, no code.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
COMPANION_FOLDERS = ("additional_chat_templates",)
POINTER = b"version https://git-lfs.github.com/spec/"


def unsupported(*_: int) -> int:
    raise OSError(errno.EOPNOTSUPP, "not on this system")


_reserve = getattr(os, "posix_fallocate", unsupported)  # elsewhere files are extended without reserving space


def temporary(path: Path) -> Path:
    """A name beside `path`, with its ending, that no other process on any machine that sees the directory uses."""
    return path.with_name(f".{path.stem[:100]}.{os.getpid()}-{secrets.token_hex(6)}.tmp{path.suffix}")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around what writes to `path`: a full disk, which says neither where nor always what, becomes a MftmergeError."""
    try:
        yield
    except OSError as e:
        if e.filename is not None:
            raise
        raise MftmergeError(f"{path}: cannot be written ({e.strerror or e})") from e
    except Exception as e:
        # As safetensors and torch's archives put it; torch's talks of positions, not of the disk.
        if "I/O error" in str(e):
            raise MftmergeError(f"{path}: cannot be written ({' '.join(str(e).split())})") from e
        if "inline_container" in str(e):
            raise MftmergeError(f"{path}: cannot be written; is the disk full?") from e
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a name beside `path`, with its ending, to write to; the file takes its name when the block ends well."""
    path = Path(path)
    _refuse_special(path)
    beside = temporary(path)
    try:
        with writing(path):
            yield beside
            os.replace(beside, path)
    except OSError as e:
        if e.filename == str(beside):
            raise MftmergeError(f"{path}: cannot be written ({e.strerror or e})") from e
        raise
    finally:
        with suppress(OSError):  # not there; or nothing can be removed either, and the first error says why
            beside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_existing(path: str | Path, overwrite: bool, inputs: Iterable[object] = ()) -> None:
    """Raise BadInput for an output file that is there and may not be replaced, is a directory, or has none to be in.

    inputs: what the work reads, see `protect`. Called before the work as well, so that hours of it do not end in a
    misspelt path.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a directory; give the name of a file")
    _refuse_special(path)
    if path.exists() and not overwrite:
        raise BadInput(f"{path}: exists already; give another path or --overwrite")
    protect(path, inputs, directory=False)
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no directory {path.parent}; make it first")


def refuse_outputs(paths: Iterable[str | Path | None], overwrite: bool, inputs: Iterable[object] = ()) -> None:
    """`refuse_existing` for every output file of one command that is wanted, and BadInput for one file named twice."""
    inputs, seen = list(inputs), set[Path]()
    for path in paths:
        if path is not None:
            refuse_existing(path, overwrite, inputs)
            if (place := Path(path).resolve()) in seen:
                raise BadInput(f"{path}: two outputs would be written here; give each its own name")
            seen.add(place)


def _refuse_special(path: Path) -> None:
    """A pipe or a device cannot be written whole or not at all, and must not be replaced by a file of its name."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise BadInput(f"{path}: is a device or a pipe; give the name of a file")


def protect(out: str | Path, inputs: Iterable[object], *, directory: bool = True) -> None:
    """Raise BadInput when writing `out` (a directory, or else a file) would touch what the work reads.

    inputs: paths of files and directories, also in lists and mappings, with a slice (`rows.jsonl[0:9]`) or as patterns
    (`rows/*.jsonl`); what is no local path (a hub id, rows in memory, None) is passed over. Refused: an input that is
    `out` or lies in it, an output directory inside an input directory, and an output that is a file of an input model.
    Compared by what the paths lead to, not by how they are written: links, relative paths, hard links.
    """
    out = Path(out).expanduser()
    for path in _local(list(inputs)):
        if _same(path, out):
            raise BadInput(f"{out}: is itself an input; choose another output")
        if _inside(path, out) or (path.is_dir() and any(_inside(p, out) for p in path.iterdir() if p.is_symlink())):
            raise BadInput(f"{out}: holds an input ({path}); choose another output")
        if out.is_dir() and (shared := _hard_link(path, out)):
            raise BadInput(f"{out}: {shared.name} in it is an input too, as a hard link; choose another output")
        if path.is_dir() and _inside(out, path):
            replaced = out.exists() and (out.suffix in (".safetensors", ".py") or is_companion(out.name))
            if directory or replaced:  # a new file there, such as a model's masks, touches nothing
                raise BadInput(f"{out}: lies in an input ({path}); choose another output")


def sidecar_name(mask: Path) -> str:
    """What the file beside a mask is called that has its scores, where they are not in the mask's own."""
    return f"{mask.stem}.scores.safetensors"


def is_companion(name: str) -> bool:
    """Whether a file of this name goes along with a model's weights."""
    return any(Path(name).match(p) for p in COMPANIONS)


def _local(given: object) -> Iterator[Path]:
    """The files and directories that exist here among what was given."""
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, str | Path):
        text = str(given)
        sliced = text.rpartition("[")[0] if text.endswith("]") else ""
        for spelt in (text, sliced):
            try:
                path = Path(spelt).expanduser()
                if spelt and path.exists():
                    yield path
                    if (scores := path.with_name(sidecar_name(path))).exists():
                        yield scores
                elif any(c in spelt for c in "*?"):
                    yield from map(Path, glob.glob(str(path), recursive=True))
            except (OSError, ValueError, RuntimeError):  # text that is no path
                continue
    elif isinstance(given, list | tuple | set | frozenset):
        for each in given:
            yield from _local(each)


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _inside(path: Path, directory: Path) -> bool:
    """Whether `path` leads into `directory`, seen by inode, so that other mounts and spellings of it count."""
    real = Path(os.path.realpath(path))  # unlike `resolve` it says nothing of links in a circle: their reader does
    return any(_same(parent, directory) for parent in real.parents)


def _hard_link(path: Path, out: Path) -> Path | None:
    """A file in the directory `out` that is also a file of the input `path` under another name."""

    def inodes(place: Path) -> dict[tuple[int, int], Path]:
        found = place.rglob("*") if place.is_dir() else (place,)
        stats = [(p, p.stat()) for p in found if p.is_file() and not p.is_symlink()]
        return {(s.st_dev, s.st_ino): p for p, s in stats if s.st_nlink > 1}

    theirs = inodes(path)
    return next((p for key, p in inodes(out).items() if key in theirs), None) if theirs else None


def once(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    """A JSON object, for `json.loads(object_pairs_hook=once)`. Raises BadInput for a key that stands twice in it."""
    found = dict(pairs)
    if len(found) != len(pairs):  # readers disagree on which of the two counts
        repeated = Counter(k for k, _ in pairs).most_common(1)[0][0]
        raise BadInput(f"key {repeated[:80]!r} occurs twice")
    return found


def refuse_pointer(path: Path, start: bytes | None = None) -> None:
    """Raise BadInput for a file that begins as Git LFS's stand-in for a large file does. start: its first bytes."""
    if start is None:
        with open(path, "rb") as f:
            start = f.read(len(POINTER))
    if start.startswith(POINTER[: len(start)]) and len(start) >= 8:
        raise BadInput(f"{path}: a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`")


def refuse_pointers(directory: Path) -> None:
    """Raise BadInput where a file of a model's directory, pickled weights included, is Git LFS's stand-in."""
    for path in sorted(directory.iterdir()):
        if (is_companion(path.name) or path.suffix == ".bin") and path.is_file():
            refuse_pointer(path)


def sync_directory(path: Path) -> None:
    """Make a rename durable, where the system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def open_new(path: Path, size: int) -> int:
    """Create a file of `size` bytes with its blocks reserved, so that a full disk shows now. Returns its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if size:
            try:
                _reserve(fd, 0, size)
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """`pwrite` of all of `data`."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def read_at(fd: int, into: memoryview, offset: int, what: Path) -> None:
    """`pread` that fills all of `into`. Raises MftmergeError when the file ends before that."""
    while into:
        got = os.preadv(fd, [into], offset)
        if not got:
            raise MftmergeError(f"{what}: the file ends early; it was truncated while being read")
        into, offset = into[got:], offset + got


def checksum(path: Path, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """XXH3-128 of a file as text, or None when `stopped()` became true before the end.

    Many times faster than a cryptographic hash, which would take longer than the copying: it has to find a file that
    a crash or a bad disk left damaged, not a forged one.
    """
    digest = xxhash.xxh3_128()
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as f:
        while got := f.readinto(buffer):
            if stopped():
                return None
            digest.update(memoryview(buffer)[:got])
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- masks on the Hub -------------------------------------------------------------------------------------------------

HUB_SCHEME = "hf:/"  # a Path has made one slash of two
HUB_MASK = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)/([^@]+)(?:@([\w./-]+))?")


def located(reference: str | Path) -> Path:
    """The local file of a mask: a path is itself; `hf://owner/name/file.mask[@revision]` is downloaded once.

    Raises BadInput for a reference of another form, and for what the Hub does not have or does not give.
    """
    text = str(reference)
    if not text.startswith(HUB_SCHEME):
        return Path(reference)
    match = HUB_MASK.fullmatch(text)
    text = f"hf://{text.removeprefix(HUB_SCHEME).lstrip('/')}"
    if match is None:
        raise BadInput(f"{text}: give hf://owner/name/file.mask, with @revision at the end if need be")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(match[1], match[2], revision=match[3]))
    except Exception as e:  # the hub's client raises many kinds: absent, gated, offline, no such revision
        reason = (str(e).strip().splitlines() or [""])[0]
        raise BadInput(f"{text}: cannot be had from the Hub ({type(e).__name__}: {reason})") from None
