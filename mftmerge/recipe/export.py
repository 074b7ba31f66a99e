"""Export a recipe to a form that stock mergekit runs with no plug-in, with exactly the same result.

Masks on inputs become masked checkpoints. A mask on a result becomes a second merge whose base model is a K-mask (see
kmask.py), or masked inputs where that is the same and smaller. What no stock method computes is exported as its result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mftmerge.apply import apply_mask
from mftmerge.checkpoint import Checkpoint
from mftmerge.dtypes import BY_CODE
from mftmerge.errors import MftmergeError
from mftmerge.mask import Mask
from mftmerge.outputdirectory import OutputDirectory, list_export
from mftmerge.recipe.build import build_into, needed, refuse_own_input, texts
from mftmerge.recipe.card import slug
from mftmerge.recipe.kmask import complement_everywhere, write_kmask
from mftmerge.recipe.load import Recipe, load_recipe
from mftmerge.recipe.locate import model_directory
from mftmerge.recipe.schema import Document, MaskUse, ModelInput, Reference
from mftmerge.recipe.settings import BuildSettings, MergeSettings
from mftmerge.recipe.stockform import StockForms, as_passthrough
from mftmerge.recipe.stocktranslation import StockTranslation
from mftmerge.recipe.verify import Verification, command_line, verify_export
from mftmerge.recipe.weights import Weights


@dataclass(frozen=True)
class ExportReport:
    """What was exported: directory, configuration, command that runs it, why each part has its form, bytes written."""

    out: Path
    config: Path
    command: str
    forms: tuple[str, ...]
    nbytes: int
    verification: Verification | None
    warnings: tuple[str, ...]


def export(
    recipe_path: str | Path,
    out: str | Path,
    *,
    verify: bool = False,
    overwrite: bool = False,
    allow_lost: bool = False,
    notify: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write `config.yml` and the checkpoints that it needs to the directory `out`, whole or not at all.

    verify: run stock mergekit on the export in a process of its own and compare its result with ours, tensor by tensor;
    raises MftmergeError, and writes nothing, when they differ. allow_lost: export although tensors of an input would
    reach no output. notify: told in words what is being done.
    Raises BadInput for everything wrong with the recipe, before a tensor is read.
    """
    recipe = load_recipe(recipe_path, settings=MergeSettings(allow_lost=allow_lost))
    out = Path(out).absolute()
    refuse_own_input(recipe, out)
    with OutputDirectory(out, lambda: "export", overwrite=overwrite) as output:
        exporter = Exporter(recipe, output.path, out, notify or (lambda _: None))
        try:
            exporter.run()
        except MftmergeError as e:
            raise e if str(recipe.path) in str(e) else type(e)(f"{recipe.path}: {e}") from e
        verification = exporter.verify() if verify else None
        shutil.rmtree(exporter.work, ignore_errors=True)
        list_export(output.path)
        nbytes = sum(p.stat().st_size for p in output.path.rglob("*") if p.is_file())
        output.commit()
    command = command_line(out, exporter.staged)
    forms = tuple(exporter.forms)
    return ExportReport(out, out / "config.yml", command, forms, nbytes, verification, recipe.warnings)


@dataclass
class Exporter:
    """The state of one export. `here`: where files are written now; `final`: where the configuration says they are."""

    recipe: Recipe
    here: Path
    final: Path
    notify: Callable[[str], None]
    forms: list[str] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    made: dict[tuple[str, ...], Reference] = field(default_factory=dict)
    entries: dict[str, list[Any]] = field(default_factory=dict)
    donors: dict[str, Path] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.work = self.here / ".work"
        self.stock = StockForms(self.recipe)
        self.weights = Weights(self.recipe, self.work, self.seed, self.notify)

    @property
    def staged(self) -> bool:
        """Whether the configuration has several documents, which mergekit-multi runs."""
        return len(self.documents) > 1

    def run(self) -> None:
        """Write everything."""
        for document, reason in self.plan():
            if reason is None:
                self.add(document)
            else:
                self.add_result(document, reason)
        self.leave_out_unused()
        header = "".join(f"# {line}\n" for line in ["Exported by mftmerge; stock mergekit runs it:", self.command()])
        (self.here / "config.yml").write_text(header + self.configuration(self.final), encoding="utf-8")
        (self.here / "mftmerge_recipe.yml").write_text(self.recipe.text, encoding="utf-8")
        forms = "".join(f"- {form}\n" for form in self.forms) or "- the recipe has no masks: paths made absolute\n"
        (self.here / "README.md").write_text(
            f"# {self.final.name}\n\nA recipe for stock mergekit:\n\n```sh\n{self.command()}\n```\n\n{forms}",
            encoding="utf-8",
        )

    def configuration(self, place: Path) -> str:
        """The configuration for an export that is at `place`."""

        def placed(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: placed(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [placed(v) for v in value]
            inside = isinstance(value, str) and Path(value).is_relative_to(self.final)
            return str(place / Path(value).relative_to(self.final)) if inside else value

        return yaml.safe_dump_all(placed(self.documents), sort_keys=False, allow_unicode=True)

    def command(self) -> str:
        return command_line(self.final, self.staged)

    def verify(self) -> Verification:
        """Run stock mergekit on what is written, and compare with a build."""
        return verify_export(self.recipe, self.configuration(self.here), self.staged, self.work, self.seed)

    def leave_out_unused(self) -> None:
        """Take out merges that no later one reads: those that only checkpoints of the export were made from."""
        kept, read = self.documents[-1:], set(texts(self.documents[-1]))
        for document in reversed(self.documents[:-1]):
            name = document["name"]
            if any(text == name or text.startswith(f"{name}+") for text in read):
                kept.insert(0, document)
                read |= set(texts(document))
        kept[-1].pop("name", None)  # mergekit-multi puts what has a name among the stages, not where it is asked to
        self.documents = kept

    def plan(self) -> list[tuple[Document, str | None]]:
        """The documents to export, each with the reason why it is exported as its result, if it is."""
        stock = self.stock
        reasons = {id(d): stock.why_result(d) for d in self.recipe.documents}
        documents = needed(self.recipe.documents, alone=lambda d: reasons[id(d)] is not None)
        last = documents[-1]
        second = last.mask is not None and reasons[id(last)] is None and not stock.pushes_down(last)
        if (len(documents) > 1 or second) and (reason := stock.why_not_staged(documents, self.final)):
            return [(last, reason)]
        return [(d, reasons[id(d)]) for d in documents]

    def add(self, document: Document) -> None:
        """Append the stock documents of one document."""
        self.remember(document)
        mask = document.mask
        pushes_down = self.stock.pushes_down(document)
        if document.merge_method == "masked":
            document = as_passthrough(document)
        elif document.merge_method == "consensus":
            document = self.as_task_arithmetic(document)
        if pushes_down:
            document, mask = self.pushed_down(document), None
        final_name = document.name
        stock = StockTranslation(self, document).data()
        if document.merge_method == "passthrough":  # a base served only for `on: delta`; stock would count it as input
            stock.pop("base_model", None)
        if mask is None:
            self.documents.append(({"name": final_name} if final_name else {}) | stock)
            return
        stage = self.fresh(f"{final_name or 'result'}-unmasked")
        self.entries[stage], self.donors[stage] = self.entries[final_name or ""], self.donors[final_name or ""]
        self.documents.append({"name": stage} | stock)
        self.masked_stage(stage, mask, document, final_name)

    def remember(self, document: Document) -> None:
        """Note tensors and configuration donor of a document's result, for masks on it."""
        self.entries[document.name or ""] = list(self.recipe.tensors(document))
        source = document.base_model or document.inputs()[0][1]
        path = source.model.path
        self.donors[document.name or ""] = self.donors.get(path) or model_directory(path, self.recipe.folder)

    def fresh(self, wanted: str) -> str:
        """A document name not used yet."""
        taken = {d.get("name") for d in self.documents} | {d.name for d in self.recipe.documents}
        names = [wanted, *(f"{wanted}-{i}" for i in range(2, 1000))]
        return next(n for n in names if n not in taken)

    def folder(self, wanted: str) -> tuple[Path, str]:
        """A new directory for a checkpoint: where it is now, and where it will be."""
        parent = self.here / "checkpoints"
        parent.mkdir(exist_ok=True)
        names = [wanted, *(f"{wanted}-{i}" for i in range(2, 1000))]
        name = next(n for n in names if not (parent / n).exists())
        return parent / name, str(self.final / "checkpoints" / name)

    def now(self, path: str) -> Path:
        """Where a directory that the configuration names is at the moment."""
        inside = Path(path).is_relative_to(self.final)
        return self.here / Path(path).relative_to(self.final) if inside else Path(path)

    def add_result(self, document: Document, reason: str) -> None:
        """Export a document's result itself."""
        here, final = self.folder(document.name or "result")
        here.mkdir()
        self.notify(f"building {document.name or 'the result'}, because {reason}")
        build_into(self.recipe, here, name=here.name, result=document, settings=BuildSettings(seed=self.seed))
        for name in ("mergekit_config.yml", "mftmerge_recipe.yml"):
            (here / name).unlink(missing_ok=True)
        named = {"name": document.name} if document.name else {}
        place = Reference(path=final).to_mergekit()
        self.documents.append(named | {"merge_method": "passthrough", "models": [{"model": place}]})
        self.entries[document.name or ""], self.donors[document.name or ""] = list(Checkpoint.open(here)), here
        self.forms.append(f"{document.name or 'result'}: exported as its result and passed through, because {reason}")

    def as_task_arithmetic(self, document: Document) -> Document:
        """`consensus` as stock task arithmetic over models that hold their own values where the consensus keeps."""
        from mftmerge.recipe.methods import recorded_consensus

        scratch = self.work / self.fresh("consensus")
        scratch.mkdir(parents=True)
        self.notify("computing the consensus mask")
        with recorded_consensus() as kept:
            build_into(self.recipe, scratch, name="consensus", result=document.model_copy(update={"mask": None}))
        mask = Mask.from_bools(kept)
        path = self.here / f"{document.name or 'result'}-consensus.mask"
        mask.save(path)
        shutil.rmtree(scratch)
        drop = ("k", "tall_lambda")
        use = MaskUse(file=str(path), on="delta")
        models = []
        for item in document.models or ():
            own = {"weight": 1.0} | {k: v for k, v in (item.parameters or {}).items() if k not in drop}
            if document.parameters and "weight" in document.parameters and "weight" not in (item.parameters or {}):
                own["weight"] = document.parameters["weight"]
            is_base = document.base_model and (item.model, item.mask) == (
                document.base_model.model,
                document.base_model.mask,
            )
            item = item.model_copy(update={"parameters": own})
            models.append(item if is_base else self.once_masked(item, document, use))
        parameters = {k: v for k, v in (document.parameters or {}).items() if k not in (*drop, "weight")}
        self.forms.append(
            "consensus: its mask computed (saved beside), then stock task_arithmetic over localised models"
        )
        return document.model_copy(
            update={"merge_method": "task_arithmetic", "models": tuple(models), "parameters": parameters or None}
        )

    def once_masked(self, item: ModelInput, document: Document, use: MaskUse) -> ModelInput:
        """The input with one more mask, applied after its own."""
        if item.mask is not None:
            item = item.model_copy(update={"model": StockTranslation(self, document).checkpoint(item)})
        return item.model_copy(update={"mask": use})

    def pushed_down(self, document: Document) -> Document:
        """The document with its result's mask put on its inputs."""
        mask, items = document.mask, document.models or ()
        assert mask is not None
        label = self.recipe.masks(document).label(mask)
        if document.merge_method == "passthrough":
            self.forms.append(f"output mask {label}: applied to the one model (1 checkpoint, bit-exact)")
        else:
            self.forms.append(f"output mask {label} on the delta: each model localised, the same for this method")
        base = document.base_model and (document.base_model.model, document.base_model.mask)
        kept = None if document.merge_method == "passthrough" else base
        models = tuple(i if (i.model, i.mask) == kept else self.once_masked(i, document, mask) for i in items)
        return document.model_copy(update={"models": models, "mask": None})

    def masked_stage(self, stage: str, mask: MaskUse, document: Document, name: str | None) -> str:
        """Append the documents that mask the result of an earlier one; gives the name of the last."""
        translation = StockTranslation(self, document)
        evaluated = translation.book.evaluate(mask)
        label = translation.book.label(mask)
        entries = self.entries[stage]
        here, final = self.folder(f"kmask-{slug(label)}")
        is_half = any(e.dtype == "F16" for e in entries)
        write_kmask(evaluated, entries, self.donors[stage], here, "float16" if is_half else None)
        kept: dict[str, Any] = {
            "merge_method": "task_arithmetic",
            "base_model": Reference(path=final).to_mergekit(),
            "models": [{"model": stage, "parameters": {"weight": 1.0}}],
            "parameters": {"normalize": False, "lambda": 1.0},
        } | ({"dtype": "float32", "out_dtype": "float16"} if is_half else {})
        if mask.on == "weights":
            self.documents.append(({"name": name} if name else {}) | kept)
            self.forms.append(f"mask {label} on {stage}: a second merge over a K-mask (1 checkpoint, equal values)")
            self.entries[name or ""], self.donors[name or ""] = entries, self.donors[stage]
            return name or ""
        kept_name = self.fresh(f"{stage}-kept")
        self.documents.append({"name": kept_name} | kept)
        base = translation.delta_base(mask)
        assert base is not None
        rest_here, rest = self.folder(f"base-where-dropped-{slug(label)}")
        source = translation.directory(base)
        apply_mask(complement_everywhere(evaluated, entries), source, rest_here, check_base=False)
        one = {"weight": 1.0}
        dtype = BY_CODE[entries[0].dtype].name
        self.documents.append(
            ({"name": name} if name else {})
            | {
                "merge_method": "linear",
                "models": [
                    {"model": kept_name, "parameters": one},
                    {"model": Reference(path=rest).to_mergekit(), "parameters": one},
                ],
                "parameters": {"normalize": False},
                "dtype": dtype,
            }
        )
        self.forms.append(f"mask {label} on the delta of {stage}: kept part by a K-mask, plus the base where dropped")
        self.entries[name or ""], self.donors[name or ""] = entries, self.donors[stage]
        return name or ""
