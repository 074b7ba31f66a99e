"""What goes wrong on real machines: full disks, kills, files that change, targets that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import random_mask, tensors
from safetensors.torch import load_file

from mftmerge.apply import apply_mask
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask
from mftmerge.outputdirectory import MANIFEST
from mftmerge.progress import Step


@pytest.fixture
def sharded(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of a checkpoint of several shards."""
    path = tmp_path / "in" / "model"
    shutil.copytree(tiny("llama", dtype="bfloat16", max_shard_size="100KB"), path)
    assert len(list(path.glob("*.safetensors"))) >= 4
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where outputs go; nothing else is there."""
    path = tmp_path / "place"
    path.mkdir()
    return path


def run(code: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


def test_a_disk_that_fills_up_leaves_nothing(sharded: Path, place: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses the write in the same place."""
    random_mask(sharded).save(place.parent / "a.mask")
    code = (
        "import resource, sys; from mftmerge.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, resource.RLIM_INFINITY));"
        f"main(['apply', {str(place.parent / 'a.mask')!r}, '--model', {str(sharded)!r}, '-o', {str(place / 'out')!r}])"
    )
    process = run(code)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.count(b"\n") == 1
    assert str(place / "out").encode() in error
    assert b"cannot be written" in error
    assert b"Traceback" not in error
    assert not list(place.iterdir())


def test_a_write_that_fails_half_way_leaves_nothing(
    sharded: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mftmerge import stream

    real, calls = stream.write_at, []

    def failing(fd: int, data: memoryview, offset: int) -> None:
        calls.append(offset)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        real(fd, data, offset)

    monkeypatch.setattr(stream, "write_at", failing)
    with pytest.raises(MftmergeError, match="No space left on device"):
        apply_mask(random_mask(sharded), sharded, place / "out")
    assert not list(place.iterdir())


def test_too_little_space_is_seen_before_writing(sharded: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(MftmergeError, match=r"1,000 bytes free, .* needed"):
        apply_mask(random_mask(sharded), sharded, place / "out")
    assert not list(place.iterdir())


def test_a_failure_keeps_the_old_output(sharded: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mftmerge import outputdirectory as writer

    apply_mask(random_mask(sharded, 1), sharded, place / "out")
    before = {p.name: p.read_bytes() for p in (place / "out").iterdir()}
    real = os.rename

    def failing(a: Path, b: Path) -> None:
        if str(a).endswith(".partial"):
            raise OSError(5, "Input/output error")
        real(a, b)

    monkeypatch.setattr(writer.os, "rename", failing)
    with pytest.raises(MftmergeError, match="Input/output error"):
        apply_mask(random_mask(sharded, 2), sharded, place / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (place / "out").iterdir()} == before
    assert [p.name for p in place.iterdir()] == ["out"]


KILLED = """
import os, sys, time
from pathlib import Path
from mftmerge import apply
from mftmerge import outputdirectory as writer
from mftmerge.apply import apply_mask
apply.WORTH_RESUMING = 0
record = writer.OutputDirectory.record
def counted(self, name, found):
    record(self, name, found)
    if len(self._finished) >= {after}:  # two threads may record at once
        os.kill(os.getpid(), 9)
writer.OutputDirectory.record = counted
new, last = apply.open_new, max(p.name for p in Path({model!r}).glob("*.safetensors"))
def after_the_others(path, size):
    if path.name == last:
        time.sleep(60)  # until the kill: what is not recorded when all is written never is
    return new(path, size)
apply.open_new = after_the_others
apply_mask({mask!r}, {model!r}, {out!r})
"""


def killed_after(shards: int, sharded: Path, place: Path) -> Path:
    """A leftover of a run that was killed when so many shards were recorded."""
    mask = place.parent / "a.mask"
    random_mask(sharded).save(mask)
    code = KILLED.format(after=shards, mask=str(mask), model=str(sharded), out=str(place / "out"))
    process = run(code)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in place.iterdir()] == [".out.partial"]
    return mask


def test_resume_takes_over_what_is_finished_and_sound(sharded: Path, place: Path) -> None:
    mask = killed_after(2, sharded, place)
    leftover = place / ".out.partial"
    recorded = json.loads((leftover / MANIFEST).read_text())["files"]
    first, second = sorted(recorded)[:2]
    inode = (leftover / first).stat().st_ino
    damaged = bytearray((leftover / second).read_bytes())
    damaged[-1] ^= 1
    (leftover / second).write_bytes(damaged)
    report = apply_mask(mask, sharded, place / "out", resume=True)
    assert report.continued == (first,)
    assert (place / "out" / first).stat().st_ino == inode
    apply_mask(mask, sharded, place / "fresh")
    assert {p.name for p in (place / "out").iterdir()} == {p.name for p in (place / "fresh").iterdir()}
    assert all((place / "out" / p.name).read_bytes() == p.read_bytes() for p in (place / "fresh").glob("*.safetensors"))
    assert sorted(p.name for p in place.iterdir()) == ["fresh", "out"]


@pytest.mark.parametrize("changed", ["mask", "model", "no resume"])
def test_a_leftover_of_other_inputs_is_not_continued(sharded: Path, place: Path, changed: str) -> None:
    mask = killed_after(2, sharded, place)
    if changed == "mask":
        random_mask(sharded, 9).save(mask, overwrite=True)
    if changed == "model":
        shard = sorted(sharded.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes())
    report = apply_mask(mask, sharded, place / "out", resume=changed != "no resume")
    assert report.continued == ()
    assert [p.name for p in place.iterdir()] == ["out"]


def test_a_failed_run_with_resume_keeps_what_is_finished(
    sharded: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mftmerge import apply

    names = sorted(p.name for p in sharded.glob("*.safetensors"))
    real = apply.open_new

    def failing(path: Path, size: int) -> int:
        if path.name == names[-1]:
            until = time.monotonic() + 30
            while not (path.parent / MANIFEST).exists() and time.monotonic() < until:
                time.sleep(0.01)
            raise OSError(28, "No space left on device")
        return real(path, size)

    monkeypatch.setattr(apply, "open_new", failing)
    with pytest.raises(MftmergeError, match="No space"):
        apply_mask(random_mask(sharded), sharded, place / "out", resume=True)
    assert [p.name for p in place.iterdir()] == [".out.partial"]
    monkeypatch.undo()
    assert apply_mask(random_mask(sharded), sharded, place / "out", resume=True).continued


@pytest.mark.parametrize("seed", range(4))
def test_kill_at_a_random_moment_then_resume(sharded: Path, place: Path, seed: int) -> None:
    mask = place.parent / "a.mask"
    random_mask(sharded).save(mask)
    code = (
        "import time; from mftmerge.apply import apply_mask; print('x', flush=True);"
        f"apply_mask({str(mask)!r}, {str(sharded)!r}, {str(place / 'out')!r}, progress=lambda *_: time.sleep(0.01))"
    )
    process = run(code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(float(np.random.default_rng(seed).uniform(0, 0.4)))
    process.kill()
    process.communicate(timeout=60)
    if (place / "out").exists():  # it was faster than the kill: then it must be complete
        assert [p.name for p in place.iterdir()] == ["out"]
    else:
        apply_mask(mask, sharded, place / "out", resume=True)
    apply_mask(mask, sharded, place / "fresh")
    a, b = tensors(place / "out"), tensors(place / "fresh")
    assert all((a[k] == b[k]).all() for k in b)
    assert sorted(p.name for p in place.iterdir()) == ["fresh", "out"]


def test_two_runs_into_one_target(sharded: Path, place: Path) -> None:
    mask = random_mask(sharded)
    seen: list[BaseException] = []

    def second(_: Step) -> None:
        if not seen:
            try:
                apply_mask(mask, sharded, place / "out")
            except MftmergeError as e:
                seen.append(e)

    apply_mask(mask, sharded, place / "out", progress=second)
    assert "another run is writing it" in str(seen[0])
    assert [p.name for p in place.iterdir()] == ["out"]


def test_a_target_that_cannot_be_written(sharded: Path, place: Path) -> None:
    with pytest.raises(MftmergeError, match="cannot write"):
        apply_mask(random_mask(sharded), sharded, "/proc/mftmerge/out")
    (place / "file").write_text("")
    with pytest.raises(MftmergeError, match="cannot write"):
        apply_mask(random_mask(sharded), sharded, place / "file" / "out")
    if os.geteuid() != 0:  # root may write anywhere
        place.chmod(0o555)
        with pytest.raises(MftmergeError, match="Permission denied"):
            apply_mask(random_mask(sharded), sharded, place / "out")
        place.chmod(0o755)


def test_a_truncated_shard_is_refused_before_anything_is_written(sharded: Path, place: Path) -> None:
    mask = random_mask(sharded)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(BadInput, match=r"truncated or altered"):
        apply_mask(mask, sharded, place / "out")
    os.truncate(shard, 5)
    with pytest.raises(BadInput, match=r"truncated"):
        apply_mask(mask, sharded, place / "out")
    shard.unlink()
    with pytest.raises(BadInput, match=r"missing"):
        apply_mask(mask, sharded, place / "out")
    assert not list(place.iterdir())


@pytest.mark.parametrize("what", ["touched", "replaced", "truncated", "base"])
def test_a_file_that_changes_while_being_read(tiny: Callable[..., Path], sharded: Path, place: Path, what: str) -> None:
    base = place.parent / "base"
    shutil.copytree(tiny("llama", dtype="bfloat16", seed=4), base)
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    done_once: list[int] = []

    def meddle(step: Step) -> None:
        if done_once:
            return
        done_once.append(step.done)
        if what == "base":
            os.utime(base / "model.safetensors", ns=(1, 1))
        elif what == "touched":
            with open(shard, "r+b") as f:
                f.seek(-1, 2)
                f.write(b"?")
        elif what == "replaced":
            shutil.copy2(shard, shard.with_suffix(".new"))
            os.replace(shard.with_suffix(".new"), shard)
        else:
            os.truncate(shard, shard.stat().st_size - 2)

    with pytest.raises(MftmergeError, match=r"changed while it was being read|ends early"):
        apply_mask(random_mask(sharded), sharded, place / "out", base=base if what == "base" else None, progress=meddle)
    assert not list(place.iterdir())


def test_a_damaged_mask_is_noticed(sharded: Path, place: Path) -> None:
    mask = place.parent / "a.mask"
    random_mask(sharded).save(mask)
    raw = bytearray(mask.read_bytes())
    raw[-20] ^= 4
    mask.write_bytes(raw)
    with pytest.raises(MftmergeError, match=r"damaged|check"):
        apply_mask(mask, sharded, place / "out")
    assert not list(place.iterdir())


def test_copying_without_the_kernels_help(sharded: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    from mftmerge import files, stream

    monkeypatch.setattr(stream, "_kernel_copy", impossible)
    monkeypatch.setattr(files, "_reserve", files.unsupported)
    apply_mask(Mask.from_bools({}), sharded, place / "out")
    assert all((place / "out" / p.name).read_bytes() == p.read_bytes() for p in sharded.glob("*.safetensors"))
    assert load_file(next((place / "out").glob("*.safetensors")))


def test_the_faster_way_of_copying_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way once, then the faster one; what is too short to be timed goes as it went best so far."""
    import time

    from mftmerge import stream

    size = stream.TELLING
    data = np.random.default_rng(0).bytes(5 * size)
    (tmp_path / "from").write_bytes(data)
    used: list[str] = []
    slow = {"kernel": 0.0, "through": 0.2}

    def timed(name: str, way: Callable[..., object]) -> Callable[..., object]:
        def copy(*given: object) -> object:
            used.append(name)
            time.sleep(slow[name])
            return way(*given)

        return copy

    monkeypatch.setattr(stream, "copy_range", timed("kernel", stream.copy_range))
    monkeypatch.setattr(stream, "_through", timed("through", stream._through))
    for fast, other in (("kernel", "through"), ("through", "kernel")):
        slow |= {fast: 0.0, other: 0.2}
        used.clear()
        copier, out = stream.Copier(), tmp_path / f"to-{fast}"
        with (tmp_path / "from").open("rb") as source, out.open("wb") as target:
            for part in range(4):
                copier.copy(source.fileno(), target.fileno(), part * size, (part + 1) * size, out)
            copier.copy(source.fileno(), target.fileno(), 4 * size, 4 * size + 100, out)
            copier.copy(source.fileno(), target.fileno(), 4 * size + 100, 5 * size, out)
        assert used == ["kernel", "through", fast, fast, fast, fast]
        assert out.read_bytes() == data


def test_memory_stays_small(tmp_path: Path) -> None:
    """Peak memory above that of the interpreter with numpy, for a 300 MB checkpoint fully masked, with a base."""
    from safetensors.numpy import save_file

    block = np.random.default_rng(0).integers(0, 1 << 16, (2048, 4096), dtype=np.uint16).view(np.float16)
    names = [f"layers.{i}.w" for i in range(18)]
    for name in ("model", "base"):
        (tmp_path / name).mkdir()
        save_file(dict.fromkeys(names, block), tmp_path / name / "model.safetensors")
    Mask.from_bools({n: block.view(np.uint16) % 10 > 0 for n in names}).save(tmp_path / "a.mask")
    code = (
        "import numpy, sys; from pathlib import Path\n"
        "def peak(): return int(next(x for x in Path('/proc/self/status').read_text().splitlines() "
        "if x.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "from mftmerge.apply import apply_mask\n"
        f"apply_mask({str(tmp_path / 'a.mask')!r}, {str(tmp_path / 'model')!r}, {str(tmp_path / 'out')!r},"
        f" base={str(tmp_path / 'base')!r})\n"
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 32, f"{done.stdout} MB"
