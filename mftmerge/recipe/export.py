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

from mftmerge.apply import apply_mask, companion_files
from mftmerge.checkpoint import Checkpoint
from mftmerge.dtypes import BY_CODE
from mftmerge.mask import Mask
from mftmerge.outputdirectory import OutputDirectory
from mftmerge.recipe.build import build_into, needed, refuse_own_input
from mftmerge.recipe.card import slug
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.kmask import complement_everywhere, write_kmask
from mftmerge.recipe.load import Recipe, load_recipe
from mftmerge.recipe.locate import absolute, model_directory
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput, Reference
from mftmerge.recipe.settings import BuildSettings, MergeSettings
from mftmerge.recipe.translate import Translation
from mftmerge.recipe.verify import Verification, command_line, verify_export

BAKED = ("localize_and_stitch", "select", "emr")  # methods of ours that no stock method computes
PUSH_DOWN = ("task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties")


def stock_form(method: str) -> str:
    """What a merge method becomes in an export, for the reference."""
    if not METHODS[method].ours:
        return "the method itself"
    if method in BAKED or METHODS[method].function:
        return "the result itself, passed through"
    return {
        "masked": "`passthrough` of a masked checkpoint: equal bits",
        "consensus": "its mask computed, then `task_arithmetic` over localised checkpoints: equal values",
    }[method]


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
        exporter.run()
        verification = verify_export(recipe, output.path, out, exporter.seed) if verify else None
        shutil.rmtree(output.path / ".work", ignore_errors=True)
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
    made: dict[tuple[str, str], str] = field(default_factory=dict)
    entries: dict[str, list[Any]] = field(default_factory=dict)
    donors: dict[str, Path] = field(default_factory=dict)
    seed: int = 0

    @property
    def staged(self) -> bool:
        """Whether the configuration has several documents, which mergekit-multi runs."""
        return len(self.documents) > 1

    def run(self) -> None:
        """Write everything."""
        baked = {id(d) for d in self.recipe.documents if self.why_baked(d)}
        for document in needed(self.recipe.documents, alone=lambda d: id(d) in baked):
            self.add(document)
        text = yaml.safe_dump_all(self.documents, sort_keys=False)
        header = "".join(f"# {line}\n" for line in ["Exported by mftmerge; stock mergekit runs it:", self.command()])
        (self.here / "config.yml").write_text(header + text)
        (self.here / "mftmerge_recipe.yml").write_text(self.recipe.text)
        forms = "".join(f"- {form}\n" for form in self.forms) or "- the recipe has no masks: paths made absolute\n"
        (self.here / "README.md").write_text(
            f"# {self.final.name}\n\nA recipe for stock mergekit:\n\n```sh\n{self.command()}\n```\n\n{forms}"
        )

    def command(self) -> str:
        return command_line(self.final, self.staged)

    def add(self, document: Document) -> None:
        """Append the stock documents of one document."""
        reason = self.why_baked(document)
        if reason:
            self.bake(document, reason)
            return
        self.remember(document)
        mask = document.mask
        if document.merge_method == "masked":
            document = self.as_passthrough(document)
        elif document.merge_method == "consensus":
            document = self.as_task_arithmetic(document)
        pushed = None if mask is None else self.pushed_down(document.model_copy(update={"mask": mask}))
        if pushed is not None:
            document, mask = pushed, None
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

    def why_baked(self, document: Document) -> str | None:
        """Why a document has no exact stock form; None when it has one."""
        if document.merge_method in BAKED or METHODS[document.merge_method].function:
            return f"stock mergekit has no method that computes {document.merge_method}"
        if document.merge_method == "consensus" and not document.models:
            return "consensus over slices has no stock form"
        if not document.mask or (document.models and len(document.models) == 1):
            return None
        if document.tokenizer or document.tokenizer_source:
            return "the shapes that the output mask needs depend on the merged tokenizer"
        if document.modules:
            return "an output mask over several modules has no stock form"
        types = {e.dtype for e in self.recipe.tensors(document)}
        if types - {"F16"} and types - {"F32", "BF16", "F64"}:
            return f"its tensors are of types {', '.join(sorted(types))}, for which no one K-mask is exact"
        return None

    def bake(self, document: Document, reason: str) -> None:
        """Export a document's result itself."""
        here, final = self.folder(document.name or "result")
        here.mkdir()
        self.notify(f"building {document.name or 'the result'}")
        build_into(self.recipe, here, name=here.name, result=document, settings=BuildSettings(seed=self.seed))
        for name in ("mergekit_config.yml", "mftmerge_recipe.yml"):
            (here / name).unlink(missing_ok=True)
        named = {"name": document.name} if document.name else {}
        self.documents.append(named | {"merge_method": "passthrough", "models": [{"model": final}]})
        self.entries[document.name or ""], self.donors[document.name or ""] = list(Checkpoint.open(here)), here
        self.forms.append(f"{document.name or 'result'}: exported as its result and passed through, because {reason}")

    def as_passthrough(self, document: Document) -> Document:
        """`masked` as stock passthrough of its one model; its mask becomes the model's."""
        parameters = dict(document.parameters or {})
        given = parameters.pop("mask", None)
        models = []
        for item in document.models or ():
            own = dict(item.parameters or {})
            text = own.pop("mask", given)
            own.pop("missing", None)
            mask = item.mask
            if mask is None and text is not None:
                mask = MaskUse(file=text, on="delta" if document.base_model else "weights")
            base = document.base_model
            if base is None or (item.model, item.mask) != (base.model, base.mask):
                models.append(item.model_copy(update={"mask": mask, "parameters": own or None}))
        changes: dict[str, object] = {"merge_method": "passthrough", "parameters": None}
        return document.model_copy(update=changes | ({"models": tuple(models)} if models else {}))

    def as_task_arithmetic(self, document: Document) -> Document:
        """`consensus` as stock task arithmetic over models that hold their own values where the consensus keeps."""
        from mftmerge.recipe.methods import recorded_consensus

        scratch = self.here / ".work" / self.fresh("consensus")
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
            path = StockTranslation(self, document).input(item)
            item = item.model_copy(update={"model": Reference.model_validate(path), "mask": None})
        return item.model_copy(update={"mask": use})

    def pushed_down(self, document: Document) -> Document | None:
        """The document with its result's mask put on its inputs, where that is exact and no larger; else None."""
        mask = document.mask
        stages = {d.name for d in self.recipe.documents if d.name}
        items = document.models or ()
        if mask is None or not items or any(i.model.path in stages for i in items):
            return None
        label = self.recipe.masks(document).label(mask)
        if document.merge_method == "passthrough" and not document.sets("scale") and not items[0].model.lora:
            models: tuple[ModelInput, ...] = (self.once_masked(items[0], document, mask),)
            self.forms.append(f"output mask {label}: applied to the one model (1 checkpoint, bit-exact)")
        elif (
            document.merge_method in PUSH_DOWN
            and mask.on == "delta"
            and mask.base is None
            and len(items) <= 2
            and not any(document.sets(k) for k in ("density", "rescale"))
        ):
            base = document.base_model and (document.base_model.model, document.base_model.mask)
            models = tuple(i if (i.model, i.mask) == base else self.once_masked(i, document, mask) for i in items)
            self.forms.append(f"output mask {label} on the delta: each model localised, the same for this method")
        else:
            return None
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
            "base_model": final,
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
        base = BaseInput(model=mask.base) if mask.base else document.base_model
        assert base is not None
        rest_here, rest = self.folder(f"base-where-dropped-{slug(label)}")
        source = self.now(Reference.model_validate(translation.input(base)).path)
        apply_mask(complement_everywhere(evaluated, entries), source, rest_here, check_base=False)
        one = {"weight": 1.0}
        dtype = BY_CODE[entries[0].dtype].name
        self.documents.append(
            ({"name": name} if name else {})
            | {
                "merge_method": "linear",
                "models": [{"model": kept_name, "parameters": one}, {"model": rest, "parameters": one}],
                "parameters": {"normalize": False},
                "dtype": dtype,
            }
        )
        self.forms.append(f"mask {label} on the delta of {stage}: kept part by a K-mask, plus the base where dropped")
        self.entries[name or ""], self.donors[name or ""] = entries, self.donors[stage]
        return name or ""


class StockTranslation(Translation):
    """A document in stock terms: masked inputs become checkpoints in the export, or merges of their own."""

    def __init__(self, exporter: Exporter, document: Document) -> None:
        super().__init__(document, exporter.recipe.masks(document))
        self.exporter = exporter
        self.stages = {d.name: Path(d.name) for d in exporter.recipe.documents if d.name}

    def absolute(self, reference: Reference) -> Reference:
        if str(self.exporter.final) in reference.path:
            return reference
        return absolute(reference, self.folder, self.stages)

    def input(self, item: ModelInput | BaseInput) -> Any:
        reference = self.absolute(item.model)
        if item.mask is None:
            return reference.to_mergekit()
        key = (str(reference), item.mask.model_dump_json())
        if key not in self.exporter.made:
            make = self._stage if reference.path in self.stages else self._checkpoint
            self.exporter.made[key] = make(reference, item.mask)
        return self.exporter.made[key]

    def _stage(self, reference: Reference, mask: MaskUse) -> str:
        name = self.exporter.fresh(f"{reference.path}-masked")
        return self.exporter.masked_stage(reference.path, mask, self.document, name)

    def _checkpoint(self, reference: Reference, mask: MaskUse) -> str:
        exporter, label = self.exporter, self.book.label(mask)
        model = exporter.now(reference.path)
        here, final = exporter.folder(f"{slug(Path(reference.path).name)}-{slug(label)}")
        base: Path | None = None
        if mask.on == "delta":
            item = BaseInput(model=mask.base) if mask.base else self.document.base_model
            assert item is not None
            base = exporter.now(Reference.model_validate(self.input(item)).path)
        exporter.notify(f"masking {reference}")
        merged = _merged_adapter(reference, exporter.here / ".work") if reference.lora else model
        apply_mask(self.book.evaluate(mask), merged, here, base=base, check_base=False)
        for name in companion_files(Checkpoint.open(model)) if reference.lora else ():
            if not name.endswith(".index.json") and not (here / name).exists():
                shutil.copyfile(model / name, here / name)
        what = "its dropped weights from the base" if base else "its dropped weights 0"
        exporter.forms.append(f"{reference} with {label}: a checkpoint with {what} (bit-exact)")
        return final


def _merged_adapter(reference: Reference, cache: Path) -> Path:
    from mergekit.common import ModelReference

    return Path(ModelReference.model_validate(reference.to_mergekit()).merged(cache_dir=str(cache)).model.path)
