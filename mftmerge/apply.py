"""Mask x checkpoint -> checkpoint, as a stream: dropped weights become 0 or the base's value, nothing else changes.

The output has the input's layout: every shard keeps its header, tensors outside the mask are copied by the kernel, and
masked ones pass through in pieces as integers, so that each kept weight keeps its bits, NaNs included.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mftmerge import card, matching
from mftmerge.applysettings import ApplySettings
from mftmerge.checkpoint import INDEX, Checkpoint, resolve
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.files import COMPANION_FOLDERS, checksum, is_companion, open_new, protect, refuse_pointer, sync_file
from mftmerge.machine import cores
from mftmerge.mask import Mask
from mftmerge.matching import BaseDifference
from mftmerge.outputdirectory import OutputDirectory, check_target
from mftmerge.progress import Progress, Step
from mftmerge.stream import MaskStream

WORTH_RESUMING = 5.0  # seconds after which finished shards are recorded, so that a killed run can be continued
WORKERS = min(4, cores())  # for copying, and again for hashing: more gain nothing on one disk


@dataclass(frozen=True)
class ApplyReport:
    """What `apply_mask` did.

    tensors, covered, dropped: tensors masked, weights in them, and weights set to 0 or to the base's value.
    nbytes: size of the weight files written. continued: shards taken over from a killed run.
    difference: the model against the mask's own base; None when the mask has no fingerprints or the check was skipped.
    notes: what the user should know besides, one sentence each.
    """

    out: Path
    tensors: int
    covered: int
    dropped: int
    nbytes: int
    continued: tuple[str, ...]
    difference: BaseDifference | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """Inputs that were checked against each other, and the files that go along."""

    mask: Mask
    source: Checkpoint
    base: Checkpoint | None
    names: dict[str, str]  # checkpoint tensor -> mask tensor
    companions: tuple[str, ...]
    model: str
    base_name: str | None
    settings: ApplySettings


def apply_mask(
    mask: Mask | str | Path,
    model: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    **options: Any,  # fields of ApplySettings, which checks them
) -> ApplyReport:
    """Write a complete checkpoint to the directory `out`: `model` with `mask` applied.

    model: checkpoint directory or hub id. progress: called with bytes done, from any thread.
    options: see `ApplySettings`. base: checkpoint to whose values dropped weights return; without it they become 0, or,
    where the mask is over a delta, take the values of the model that the mask names.
    require_base refuses before anything is written; check_base hashes the covered tensors beside the copying.
    resume: continue what a killed run left, shard by shard, each checked against its checksum, and keep finished shards
    should this run fail too. include: patterns of further files to copy, such as `*.py` for code.

    Memory does not grow with the model. Raises BadInput before anything is written when names, shapes or types do not
    fit, MftmergeError on failures; either way `out` is then as it was.
    """
    if isinstance(options.get("base"), Path):
        options["base"] = str(options["base"])
    settings = ApplySettings.make(options)
    plan = _plan(mask, model, settings)
    target = Path(os.path.abspath(Path(out).expanduser()))
    protect(target, (plan.mask.path, plan.source.path, plan.base.path if plan.base else None))
    check_target(target, settings.overwrite)
    if settings.require_base and not plan.mask.info.fingerprints:
        raise BadInput("the mask records no fingerprints of its base, so --require-base cannot be checked")
    try:
        with ThreadPoolExecutor(WORKERS, "mftmerge-hash") as pool:
            differences: list[Future[BaseDifference | None]] = []
            if settings.check_base or settings.require_base:
                differences.append(pool.submit(matching.base_difference, plan.names, plan.mask, plan.source))
                if plan.base is not None:
                    differences.append(
                        pool.submit(matching.base_difference, plan.names, plan.mask, plan.base, delta=True)
                    )
            for future in differences if settings.require_base else ():
                if (found := future.result()) and found.tensors:
                    raise BadInput(f"{model}: {found}, and --require-base allows no difference")
            return _write(plan, target, pool, differences, progress)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        raise MftmergeError(f"cannot write {target}: {e.strerror or e}{where}; nothing was put there") from None


def companion_files(checkpoint: Checkpoint, include: Sequence[str] = ()) -> Iterator[str]:
    """Names of the files to copy beside the weights, relative to the checkpoint. `include`: more patterns than usual.

    Raises BadInput for a link that leads out of the checkpoint.
    """
    own = {s.name for s in checkpoint.shards}
    folders = [".", *(f for f in COMPANION_FOLDERS if (checkpoint.path / f).is_dir())]
    for folder in folders:
        for path in sorted((checkpoint.path / folder).iterdir()):
            name = str(path.relative_to(checkpoint.path))
            usual = is_companion(path.name) and not path.name.endswith(".index.json")
            index = name == INDEX and checkpoint.has_index
            wanted = usual or index or any(p and path.match(p) for p in include)
            if wanted and name not in own and name != "README.md" and (path.is_file() or path.is_symlink()):
                refuse_pointer(checkpoint.file(name))
                yield name


def copy_companions(model: Path, out: Path) -> None:
    """Copy a model's configuration, tokenizer, templates and licence, whatever kind of weights it has, beside others.

    What is in `out` already stays.
    """
    source = Checkpoint(model, (), has_index=False)
    copy_files(source, [name for name in companion_files(source) if not (out / name).exists()], out)


def copy_files(source: Checkpoint, names: Iterable[str], out: Path) -> None:
    """Copy files of a checkpoint, by their names in it, to the same names in another directory."""
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source.file(name), out / name)


def _plan(mask: Mask | str | Path, model: str | Path, settings: ApplySettings) -> _Plan:
    """Everything that can be checked without reading a weight."""
    if not isinstance(mask, Mask):
        mask = Mask.load(mask)
    source = Checkpoint.open(resolve(model), follow_links=settings.follow_links)
    reference = matching.delta_base(mask, settings.base, settings.on)
    base = None if reference is None else Checkpoint.open(resolve(reference), follow_links=settings.follow_links)
    names = matching.match(mask, source, str(model))
    if base is not None:
        matching.require_base_tensors(names, source, base, str(reference))
    companions = tuple(companion_files(source, settings.include))
    base_name = None if reference is None else card.public_name(str(reference))
    return _Plan(mask, source, base, names, companions, card.public_name(str(model)), base_name, settings)


def _write(
    plan: _Plan,
    out: Path,
    pool: ThreadPoolExecutor,
    differences: list[Future[BaseDifference | None]],
    progress: Progress | None,
) -> ApplyReport:
    """Fill the output directory and give it its name."""
    digest = pool.submit(lambda: plan.mask.digest)
    stopped = threading.Event()
    how = {"overwrite": plan.settings.overwrite, "resume": plan.settings.resume}
    with OutputDirectory(out, lambda: _job(plan, digest.result()), **how) as directory:
        try:
            continued = _write_shards(plan, directory, pool, stopped, progress)
            report = _report(plan, out, continued, [future.result() for future in differences])
            _write_companions(plan, directory.path, report, digest.result())
            directory.commit()
            if directory.left is not None:
                note = f"{directory.left} holds what was in the old {out.name} and could not be moved"
                report = replace(report, notes=(*report.notes, note))
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    return report


def _write_shards(
    plan: _Plan,
    directory: OutputDirectory,
    pool: ThreadPoolExecutor,
    stopped: threading.Event,
    progress: Progress | None,
) -> tuple[str, ...]:
    """Write each shard that is not there yet; one is synced and checked while the next is written."""
    shards = plan.source.shards
    started = time.monotonic()
    total, done, lock = sum(s.nbytes for s in shards), 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress:
                progress(Step("apply", done, total, "bytes"))

    def complete(name: str) -> None:
        sync_file(directory.path / name)
        if name == shards[-1].name or (not directory.resume and time.monotonic() - started < WORTH_RESUMING):
            return  # the directory gets its name next, or repeating all is quicker than checking
        if found := checksum(directory.path / name, stopped.is_set):
            directory.record(name, found)

    continued = [s.name for s in shards if directory.is_finished(s.name)]
    to_write = [s for s in shards if s.name not in continued]
    advance(total - sum(s.nbytes for s in to_write))
    _require_space(directory.path, sum(s.nbytes for s in to_write))
    completing: list[Future[None]] = []
    with MaskStream(plan.mask, plan.names, plan.base, advance, WORKERS) as stream:
        for shard in to_write:
            fd = open_new(directory.path / shard.name, shard.nbytes)
            try:
                stream.write(shard, fd)
            finally:
                os.close(fd)
            completing.append(pool.submit(complete, shard.name))
    stopped.set()
    for future in completing:
        future.result()
    return tuple(continued)


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if free < needed:
        raise MftmergeError(f"{path.parent}: {free:,} bytes free, {needed:,} needed; free some space")


def _job(plan: _Plan, digest: str) -> str:
    """Identifies the work, so that a leftover of other inputs is never continued."""
    inputs: list[Any] = [digest, sorted(plan.names.items())]
    for checkpoint in (plan.source, plan.base):
        shards = checkpoint.shards if checkpoint else ()
        inputs.append([(s.name, s.header_hash, s.identity) for s in shards])
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def _report(
    plan: _Plan, out: Path, continued: tuple[str, ...], differences: list[BaseDifference | None]
) -> ApplyReport:
    covered = sum(plan.source.entry(n).size for n in plan.names)
    kept = sum(plan.mask.count(n) for n in plan.names.values())
    notes = [str(d) for d in differences[1:] if d is not None and d.tensors]
    if plan.base_name and plan.settings.base is None:
        notes.append(f"the mask is over a delta: dropped weights have the values of {plan.base_name}")
    if plan.mask.info.on == "delta" and plan.base is None:
        notes.append("the mask was learnt over a delta, in which dropped weights are not 0 but the base's")
    if set(plan.names) - set(plan.names.values()):
        notes.append("some names differ between mask and model; tensors were matched by prefix or as tied embeddings")
    if any((plan.source.path).glob("*.py")) and not any(n.endswith(".py") for n in plan.companions):
        notes.append("the model directory has Python code, which was not copied (--include '*.py' copies it)")
    return ApplyReport(
        out=out,
        tensors=len(plan.names),
        covered=covered,
        dropped=covered - kept,
        nbytes=sum(s.nbytes for s in plan.source.shards),
        continued=continued,
        difference=differences[0] if differences else None,
        notes=tuple(notes),
    )


def _write_companions(plan: _Plan, directory: Path, report: ApplyReport, digest: str) -> None:
    """Copy configuration, tokenizer, templates and licence; write the model card."""
    copy_files(plan.source, plan.companions, directory)
    for name in plan.companions:
        sync_file(directory / name)
    density = 1 - report.dropped / report.covered if report.covered else 1.0
    facts = [
        f"{report.tensors} tensors masked: {report.dropped:,} of {report.covered:,} weights dropped "
        f"(density {density:.4f}).",
        f"Dropped weights have the value of `{plan.base_name}`." if plan.base_name else "Dropped weights are 0.",
        "All other values are bit for bit those of the original.",
    ]
    if report.difference:
        text = str(report.difference)
        facts.append(f"{text[0].upper()}{text[1:]}.")
    original = card.read_card(plan.source.file("README.md")) if _has_card(plan.source.path) else None
    text = card.model_card(report.out.name, plan.mask, digest, facts, plan.model, original)
    (directory / "README.md").write_text(text, encoding="utf-8")
    sync_file(directory / "README.md")


def _has_card(path: Path) -> bool:
    return (path / "README.md").exists() or (path / "README.md").is_symlink()
