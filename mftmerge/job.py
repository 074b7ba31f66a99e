"""A whole job from one file: a mask a domain, the combination that serves all, its test, a page.

`mftmerge init` writes such a file, `mftmerge run` does what it says. A job that was stopped goes on where it was: a
step is done again only where its settings, its data or the model have changed. Data are compared by the rows that are
read, whatever they are read from; a model by the bytes of its files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from pydantic import Field

from mftmerge.contents import Contents
from mftmerge.errors import worded
from mftmerge.files import write_text
from mftmerge.locks import locked
from mftmerge.nearby import beside, model_beside, settings_beside
from mftmerge.progress import Progress
from mftmerge.settings import Settings

if TYPE_CHECKING:
    from mftmerge.evaluate.results import GridResult
    from mftmerge.train.settings import TrainSettings

STATE = "job.json"
TEMPLATE = """\
# A job of mftmerge: `mftmerge run {name}` does all of it, and goes on where it stopped.
# Rows are JSON lines with prompt and completion, or messages, or text (docs/training.md). Paths are relative to here.

model: {model}          # a fine-tuned model: directory or hub id, or model+adapter
out: {out}              # masks, results.json and report.html go here

domains:                # one mask is learnt for each; validation rows choose, test rows judge, none may be in two files
{domains}
train:                  # settings of `mftmerge train`; all of them: docs/training.md
  steps: 60
  scores: true          # so that masks can be combined by what each has learnt; 8 bytes a weight beside its bit
  # control: true       # also train the weights for as many steps, to compare with

# choose: [score, score@0.93, "vote,threshold=2"]   # combinations to try in place of the usual ones
"""


class Domain(Settings):
    """The rows of one domain."""

    train: str = Field(description="rows to learn from")
    validation: str = Field(description="rows that the best step and the combination are chosen on")
    test: str = Field(description="rows that the result is judged on")


class Job(Settings):
    """A job file."""

    model: str = Field(description="the fine-tuned model: directory, hub id, or model+adapter")
    out: str = Field("job", description="directory for masks, results and the page")
    domains: dict[str, Domain] = Field(min_length=1, description="name -> its rows")
    train: dict[str, Any] = Field(default_factory=dict, description="settings of training, as in train --config")
    choose: list[str] | None = Field(None, description="combinations to try, as choose --try takes them")


def template(name: str, model: str, domains: list[str], out: str) -> str:
    """A job file to begin with, commented."""
    lines = "".join(
        f"  {d}:\n    train: {d}.jsonl\n    validation: {d}-val.jsonl\n    test: {d}-test.jsonl\n" for d in domains
    )
    return TEMPLATE.format(name=name, model=model, out=out, domains=lines)


def load_job(path: str | Path) -> Job:
    """Read a job file; paths in it are relative to it. Raises BadInput, also for files that are not there."""
    path = Path(path)
    job = Job.read(path, "a job is a mapping with model and domains; `mftmerge init` writes one")

    def near(text: str) -> str:
        return beside(path.parent, text)

    domains = {
        name: Domain(train=near(d.train), validation=near(d.validation), test=near(d.test))
        for name, d in job.domains.items()
    }
    placed = {"model": model_beside(path.parent, job.model), "train": settings_beside(path.parent, job.train)}
    return job.model_copy(update=placed | {"domains": domains, "out": str(path.parent / job.out)})


def run_job(
    job: Job | Mapping[str, object] | str | Path,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> GridResult:
    """Do what a job file (or its entries) says, and give the test's table.

    In `out`: `DOMAIN.mask` for each, `general.mask` (with more than one domain), `results.json`, `report.html`.
    note: called with each step and what a user should read. Raises BadInput before anything is trained.
    """
    if not isinstance(job, Job):
        job = Job.make(job) if isinstance(job, Mapping) else load_job(job)
    from mftmerge.data import load_rows, require_disjoint

    reading = _training(job).reading
    rows = {
        f"{name} {part}": load_rows(getattr(domain, part), **reading)
        for name, domain in job.domains.items()
        for part in ("train", "validation", "test")
    }
    require_disjoint(rows)  # all rows are read before a model is
    with locked(job.out):
        return _Run(job, {name: _identity(read) for name, read in rows.items()}, progress, note).all()


def _training(job: Job) -> TrainSettings:
    """The settings of training, which also say how rows of every domain are read."""
    from mftmerge.train.settings import TrainSettings

    return TrainSettings.make(job.train)


class _Run:
    """A job and what of it is done. rows: digests of the rows that were read, by `DOMAIN PART`."""

    def __init__(
        self,
        job: Job,
        rows: Mapping[str, str],
        progress: Progress | None,
        note: Callable[[str], None] | None,
    ) -> None:
        self.job, self.rows, self.progress = job, rows, progress
        self.note = note or (lambda line: None)
        self.out = Path(job.out)
        file = self.out / STATE
        state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.done: dict[str, str] = state.get("done", {})
        self.contents = Contents(state.get("files"))
        self.model = self._model()

    def _model(self) -> list[object]:
        """What every step depends on: the model, what weights are dropped to, and the scores that a mask starts from.

        Names stay in it: results say them.
        """
        from mftmerge.loading import parts

        settings, model = _training(self.job), self.job.model
        own = self.contents.of_model(p for p in parts(model) if p is not None)
        return [model, own, self.contents.of_inputs(settings.base, settings.start)]

    def all(self) -> GridResult:
        from mftmerge.evaluate.files import evaluate_files
        from mftmerge.evaluate.measures import Measures
        from mftmerge.evaluate.results import GridResult
        from mftmerge.report.page import write_report

        job, results, how = self.job, self.out / "results.json", _training(self.job)
        masks = {name: self._learn(name, domain) for name, domain in job.domains.items()}
        if len(masks) > 1:
            masks["general"] = self._choose(masks)
        tests = {name: domain.test for name, domain in job.domains.items()}
        facts = [self.model, self._digests("test"), self._of_masks(masks)]
        if self._due("evaluating on test rows", results, facts):
            name = Path(job.model).name
            measures = Measures(columns=how.columns or {}, skip_bad_rows=how.skip_bad_rows)
            found = evaluate_files({name: job.model}, masks, tests, measures=measures, progress=self.progress)
            found.to_json(results, overwrite=True)
            self._is_done(results, facts)
        self.note(f"writing {self.out / 'report.html'}")
        write_report(self.out, overwrite=True)
        return GridResult.from_json(results)

    def _learn(self, name: str, domain: Domain) -> Path:
        from mftmerge.train.run import train_mask

        path = self.out / f"{name}.mask"
        facts = [self.model, self.job.train, self._digests("train", name), self._digests("validation", name)]
        if self._due(f"learning {path}", path, facts):
            begun = self.done.get(f"{path.name} begun") == _identity(facts)
            self.done[f"{path.name} begun"] = _identity(facts)
            self._save()
            train_mask(
                self.job.model,
                domain.train,
                path,
                settings=self.job.train,
                eval_data=domain.validation,
                resume=begun and Path(f"{path}.run").exists(),
                overwrite=True,
                progress=self.progress,
                note=self.note,
            )
            self._is_done(path, facts)
        return path

    def _choose(self, masks: Mapping[str, Path]) -> Path:
        from mftmerge.evaluate.choosing import choose_combination

        path, how = self.out / "general.mask", _training(self.job)
        rows = {name: domain.validation for name, domain in self.job.domains.items()}
        facts = [self.model, self.job.choose, self._digests("validation"), self._of_masks(masks)]
        if self._due("choosing a combination on validation rows", path, facts):
            choice = choose_combination(
                self.job.model,
                masks,
                rows,
                path,
                candidates=self.job.choose,
                columns=how.columns,
                skip_bad_rows=how.skip_bad_rows,
                overwrite=True,
                progress=self.progress,
            )
            self.note(f"chosen: {choice.chosen}, density {choice.mask.density():.4f}")
            for line in choice.notes:
                self.note(f"note: {line}")
            self._is_done(path, facts)
        return path

    def _due(self, what: str, out: Path, facts: object) -> bool:
        """Whether a step is to be done; said either way."""
        due = not out.exists() or self.done.get(out.name) != _identity(facts)
        self.note(worded(what if due else f"{out} is there already, of the same settings, data and model"))
        return due

    def _is_done(self, out: Path, facts: object) -> None:
        self.done[out.name] = _identity(facts)
        self.done.pop(f"{out.name} begun", None)
        self._save()

    def _save(self) -> None:
        state = {"done": self.done, "files": self.contents.known}
        write_text(self.out / STATE, json.dumps(state, indent=1) + "\n")

    def _digests(self, part: str, *names: str) -> dict[str, list[str]]:
        """Of these domains (all by default), where a part's rows are from and what was read there."""
        domains = {name: self.job.domains[name] for name in names or self.job.domains}
        return {name: [getattr(domain, part), self.rows[f"{name} {part}"]] for name, domain in domains.items()}

    def _of_masks(self, masks: Mapping[str, Path]) -> dict[str, str]:
        return {name: self.contents.of_file(path) for name, path in masks.items()}


def _identity(facts: object) -> str:
    return xxhash.xxh3_128(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
