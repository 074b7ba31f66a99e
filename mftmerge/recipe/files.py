"""Checks of a recipe against the files it names: models and masks exist, and agree in names and shapes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftmerge.checkpoint import Checkpoint, read_config
from mftmerge.errors import BadInput
from mftmerge.files import refuse_pointer, refuse_pointers
from mftmerge.matching import match, require_base_tensors
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.check import groups, mask_parameters, references
from mftmerge.recipe.kmask import LAYER_KEYS
from mftmerge.recipe.lines import Location
from mftmerge.recipe.locate import WEIGHTS, MaskBook, local, model_directory
from mftmerge.recipe.schema import BaseInput, Document, MaskUse, ModelInput, Reference, SliceInput

if TYPE_CHECKING:
    from mftmerge.mask import Mask
    from mftmerge.recipe.result import Result


# Ends of the names under which quantised weights, or what restores them, are stored (GPTQ, AWQ, 8-bit, fp8, MXFP4).
QUANTISED = (".qweight", ".qzeros", ".SCB", ".quant_map", ".weight_scale", ".weight_scale_inv", "_packed", "_blocks")
UNMERGED = "and its numbers cannot be merged; give the model that it was made from, or a dequantised copy"
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")


class FileChecks:
    """Checks of one document. `stages`: by name of the recipe's documents, what stands for their results (result.py).

    work: a scratch directory. allow_lost: tensors of inputs that reach no output are a warning, no problem.
    """

    def __init__(
        self, document: Document, book: MaskBook, stages: Mapping[str, Path | None], work: Path, allow_lost: bool
    ) -> None:
        self.document, self.book, self.folder, self.stages = document, book, book.folder, stages
        self.work, self.allow_lost = work, allow_lost
        self.warnings: list[tuple[Location, str]] = []
        self.models_sound = True  # whether the merge can be planned, known after `problems`
        self._checkpoints: dict[str, Checkpoint | None] = {}
        method = METHODS.get(document.merge_method)  # there may be none of that name, which is said elsewhere
        self._as_parameter = method is not None and method.mask_as_parameter
        self._unsound: set[Location] = set()  # masks that cannot be evaluated or used; known after `problems`

    def problems(self) -> Iterator[tuple[Location, str]]:
        """Everything wrong with the files, with its place; fills `warnings`."""
        for where, reference in references(self.document):
            try:
                self._directories(reference)
                self._open(reference)
            except BadInput as e:
                yield where, str(e)
                self.models_sound = False
        for name, expression in (self.document.masks or {}).items():
            try:
                self.book.evaluate(expression)
            except BadInput as e:
                yield ("masks", name), str(e)
        for where, item in self.document.parts():
            if item.mask:
                yield from self._mask((*where, "mask"), item.mask, self.checkpoint(item.model), str(item.model))
        if self.document.mask:
            yield from self._mask(("mask",), self.document.mask, None, "the result")
        for where, file in mask_parameters(self.document):
            try:
                self.book.file(file)
                self.book.evaluate(MaskUse(file=file))
            except BadInput as e:
                self._unsound.add(where)
                yield where, f"mask {file}: {e}"
        for where, inputs, _ in groups(self.document):
            if where[-1] == "models":
                yield from self._same_shapes(where, inputs)
        for where, message in self._slices():
            yield where, message
            self.models_sound = False
        self._filters()

    def of_result(self, result: Result) -> Iterator[tuple[Location, str]]:
        """What the plan of the merge shows: problems in it, tensors that get lost, masks that do not fit the result."""
        yield from result.problems
        for where, whose, names in result.lost:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            text = f"{whose}: {names[0]}{more} would not be in the result, mergekit's plan does not read"
            text += f" {'them' if more else 'it'}"
            if self.allow_lost:
                self.warnings.append((where, text))
            else:
                yield where, f"{text}; --allow-lost builds without {'them' if more else 'it'}"
        if result.problems:
            return
        uses: list[tuple[Location, MaskUse]] = [(("mask",), self.document.mask)] if self.document.mask else []
        if self._as_parameter:
            uses += [((*where, "mask"), item.mask) for where, item in self.document.inputs() if item.mask]
        uses += [(where, MaskUse(file=file)) for where, file in mask_parameters(self.document)]
        shapes = {e.name: e.shape for e in result.tensors}
        for where, use in uses:
            if where not in self._unsound:
                found = [(where, text) for text in self._misfit(use, shapes)]
                found += [((*where, "base"), text) for text in self._off_base(use, result) if where == ("mask",)]
                yield from found[:1]

    def _misfit(self, use: MaskUse, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """What of a mask on the result's tensors does not fit them: the first one."""
        label, mask = self.book.label(use), self.book.evaluate(use)
        for name in mask.names:
            if name not in shapes:
                # Experts are fused in the result, where their names are not close to a checkpoint's.
                alike = [n for n in shapes if ("experts" in n) == ("experts" in name)]
                close = difflib.get_close_matches(name, alike, n=1, cutoff=0.4)
                hint = f"; it has {close[0]!r}" if close else ""
                yield f"mask {label}: the result will have no tensor {name!r}{hint}"
                return
            if shapes[name] != tuple(mask.shape(name)):
                yield f"mask {label}: {name} is {tuple(mask.shape(name))}, {shapes[name]} in the result"
                return

    def returned(self) -> frozenset[str]:
        """Tensors of the result whose dropped weights return to another model, as far as its mask is sound."""
        use = self.document.mask
        if use is None or use.on == "weights" or ("mask",) in self._unsound:
            return frozenset()
        return frozenset(self.book.evaluate(use).names)

    def _off_base(self, use: MaskUse, result: Result) -> Iterator[str]:
        """What a mask on the result covers and the model has not, or not so, to which its dropped weights return."""
        base = use.base or (self.document.base_model and self.document.base_model.model)
        for entry in result.tensors:
            shape = result.base.get(entry.name, entry.shape)
            if shape != entry.shape:
                there = f"{shape} in" if shape else "not in"
                text = (
                    f"mask {self.book.label(use)}: {entry.name} is {entry.shape} in the result, {there} base {base}, "
                )
                yield text + "to which its dropped weights return; give base: a model that has it so"

    def _slices(self) -> Iterator[tuple[Location, str]]:
        """Layer ranges past a model's end, and models of another width."""
        first: tuple[object, str] | None = None
        for where, item in self.document.inputs():
            directory = self._directory(item.model)
            if not isinstance(item, SliceInput) or directory is None:
                continue
            config = read_config(directory)
            depth, width = _number(config, LAYER_KEYS), _number(config, WIDTH_KEYS)
            if "modules" not in where and depth is not None and item.layer_range[1] > depth:
                text = f"layer_range ends at {item.layer_range[1]}, {item.model} has {depth} layers"
                yield (*where, "layer_range"), text
            first = first or (width, str(item.model))
            if "modules" not in where and width != first[0]:
                text = f"{item.model} has hidden size {width}, {first[1]} has {first[0]}; "
                yield where, text + "layers of different widths do not fit together"

    def _directory(self, reference: Reference) -> Path | None:
        """Where a model, or what stands for an earlier document's result, is; None where it is not there."""
        if reference.path in self.stages:
            return self.stages[reference.path]
        try:
            return model_directory(reference.path, self.folder, reference.revision)
        except BadInput:
            return None

    def _directories(self, reference: Reference) -> None:
        if reference.path not in self.stages:
            self._refuse_cut(reference)
            found = model_directory(reference.path, self.folder, reference.revision)
            if (found / "adapter_config.json").is_file() and not (found / "config.json").is_file():
                raise BadInput(f"{reference.path!r} is an adapter, not a model; write BASE+{reference.path}")
            if not (found / "config.json").is_file():
                raise BadInput(f"{reference.path!r} has no config.json; it is not a model directory")
            if not any((found / name).is_file() for name in WEIGHTS):
                hint = (
                    "; GGUF files cannot be merged, give the model that they were made from"
                    if any(found.glob("*.gguf"))
                    else ""
                )
                raise BadInput(f"{reference.path!r} has no weights ({WEIGHTS[0]} or {WEIGHTS[1]}){hint}")
            refuse_pointers(found)
            if isinstance(quantised := read_config(found).get("quantization_config"), dict):
                method = quantised.get("quant_method", "unknown")
                raise BadInput(f"{reference.path!r} is quantised ({method}), {UNMERGED}")
        if reference.lora:
            adapter = model_directory(reference.lora, self.folder, reference.lora_revision)
            if not (adapter / "adapter_config.json").is_file():
                raise BadInput(f"{reference.lora!r} has no adapter_config.json; it is not a LoRA adapter")
            for part in adapter.glob("adapter_*"):
                refuse_pointer(part)

    def _refuse_cut(self, reference: Reference) -> None:
        """Raise BadInput where a text that names a directory here is read as a revision or with an adapter.

        Of directories there are no revisions; a model and an adapter that are both here are meant.
        """
        folder, path, lora = self.folder, reference.path, reference.lora
        wholes = [f"{path}@{reference.revision}"] if reference.revision else []
        wholes += [str(reference)] if lora and not (local(path, folder) and local(lora, folder)) else []
        if whole := next((w for w in wholes if local(w, folder)), None):
            text = f"{whole!r} is a directory, but in a model's text @ begins a revision and + an adapter; "
            raise BadInput(f"{text}write {{path: {whole!r}}} for the directory")

    def _open(self, reference: Reference) -> None:
        """Read the headers of a model that is there. Raises BadInput for an unsound checkpoint."""
        key = reference.path
        if key not in self._checkpoints and (found := self._directory(reference)) is not None:
            from mftmerge.recipe.headers import check_config, opened  # torch

            check_config(found)
            has = any((found / name).is_file() for name in WEIGHTS)
            self._checkpoints[key] = opened(found, self.work) if has else None
            packed = next((e.name for e in self._checkpoints[key] or () if e.name.endswith(QUANTISED)), None)
            if packed:
                raise BadInput(f"{reference.path!r} is quantised (it has {packed}), {UNMERGED}")

    def checkpoint(self, reference: Reference) -> Checkpoint | None:
        """Headers of a model; None where they are not there to be read (a bad reference)."""
        return self._checkpoints.get(reference.path)

    def _mask(
        self, where: Location, use: MaskUse, model: Checkpoint | None, whose: str
    ) -> Iterator[tuple[Location, str]]:
        if use.learn:
            return  # there is none yet; `openmasks` says what is wrong with that
        label = self.book.label(use)
        try:
            mask = self.book.evaluate(use)
            # A method that takes masks as a parameter decides itself what becomes of dropped weights, of the result's
            # tensors: these masks are compared with them (`of_result`).
            applied = where == ("mask",) or not self._as_parameter
            if mask.info.on == "delta" and use.on == "weights" and "on" not in use.model_fields_set and applied:
                other = mask.info.delta_base or "another model"
                raise BadInput(f"keeps changes from {other}: write on: delta, or on: weights to set what it drops to 0")
            if model is not None and applied:
                names = match(mask, model, whose)
                self._moved(where, mask, names, model, whose)
                base = use.base or (self.document.base_model and self.document.base_model.model)
                if use.on == "delta" and base and (foundation := self.checkpoint(base)) is not None:
                    require_base_tensors(names, model, foundation, f"base {base}")
        except BadInput as e:
            self._unsound.add(where)
            yield where, f"mask {label}: {e}"
            return
        on_input = where != ("mask",) and not self._as_parameter
        if use.on == "weights" and self.document.merge_method in TASK_VECTOR_METHODS and on_input:
            message = f"mask {label} sets weights of {whose} to 0, so that its task vector is minus the base there; "
            self.warnings.append((where, message + "{file: ..., on: delta} returns them to the base instead"))

    def _moved(self, where: Location, mask: Mask, names: Mapping[str, str], model: Checkpoint, whose: str) -> None:
        """Warn of a model that is not the one its mask was made for, by the smallest tensor that the mask covers."""
        if whose in self.stages or "+" in whose or model.path.is_relative_to(self.work):  # the weights are not there
            return
        known = {n: mask.info.fingerprints[m] for n, m in names.items() if m in mask.info.fingerprints}
        least = min(known, key=lambda n: model.entry(n).size, default=None)
        if least is not None and model.fingerprint(least) != known[least]:
            text = f"{whose} is not the model that its mask was made for ({least} differs); "
            self.warnings.append((where, text + "`mftmerge rebase` fits the mask to it"))

    def _same_shapes(self, where: Location, inputs: tuple[ModelInput, ...]) -> Iterator[tuple[Location, str]]:
        items: list[tuple[int, ModelInput | BaseInput]] = list(enumerate(inputs))
        if self.document.base_model:
            items.append((-1, self.document.base_model))
        depths = [_number(read_config(d), LAYER_KEYS) if (d := self._directory(m.model)) else None for _, m in items]
        for (i, item), depth in zip(items, depths, strict=True):
            if None not in (depth, depths[0]) and depth != depths[0] and not self.document.modules:
                text = (
                    f"{item.model} has {depth} layers, {items[0][1].model} has {depths[0]}; choose layers with slices:"
                )
                yield ((*where, i) if i >= 0 else ("base_model",)), text
                self.models_sound = False
        opened = [(i, m, self.checkpoint(m.model)) for i, m in items]
        known = [(i, m, {e.name: e.shape for e in c}) for i, m, c in opened if c is not None]
        realigned = bool(self.document.tokenizer or self.document.tokenizer_source)
        for i, item, shapes in known[1:]:
            place = (*where, i) if i >= 0 else ("base_model",)
            _, first, reference = known[0]
            wrong = [n for n in reference if n in shapes and not _agree(reference[n], shapes[n], realigned)]
            if wrong:
                n = wrong[0]
                more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
                hint = "; set tokenizer: to align vocabularies" if reference[n][1:] == shapes[n][1:] else ""
                yield place, f"{n} is {shapes[n]} in {item.model}, {reference[n]} in {first.model}{more}{hint}"
            if missing := sorted(set(reference) ^ set(shapes)):
                self.warnings.append(
                    (place, f"{item.model} and {first.model} differ in {len(missing)} tensors ({missing[0]}, ...)")
                )

    def _filters(self) -> None:
        """Warn about filters that match no tensor of any model (mergekit passes over them silently)."""
        opened = [self.checkpoint(item.model) for _, item in self.document.inputs()]
        names = [n for c in opened if c is not None for n in c.names]
        settings: list[tuple[Location, object]] = [
            (("parameters", k), v) for k, v in (self.document.parameters or {}).items()
        ]
        for where, item in self.document.inputs():
            settings += [((*where, "parameters", k), v) for k, v in (item.parameters or {}).items()]
        for where, value in settings:
            for rule in value if isinstance(value, list) else [value]:
                wanted = rule.get("filter") if isinstance(rule, dict) else None
                if wanted not in (None, "*") and names and not any(wanted in n for n in names):
                    self.warnings.append((where, f"filter {wanted!r} matches no tensor"))


TASK_VECTOR_METHODS = frozenset(
    name for name, m in METHODS.items() if m.base == "required" and name not in ("slerp", "nearswap", "arcee_fusion")
)


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """A model's number under the first of these names that its configuration, or the part on text, has."""
    inner = config.get("text_config")
    part = inner if isinstance(inner, dict) else config
    return next((part[k] for k in keys if isinstance(part.get(k), int)), None)


def _agree(a: tuple[int, ...], b: tuple[int, ...], realigned: bool) -> bool:
    return a == b or (realigned and len(a) == len(b) and a[1:] == b[1:])
