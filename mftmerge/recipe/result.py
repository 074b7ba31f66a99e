"""What a merge will give, from mergekit's plan and the headers of files: names, shapes, layers, and what gets lost.

mergekit plans the merge as for a build; then each tensor's inputs are read without their data, on torch's meta device,
by mergekit's own tasks, so that its renaming and fusing of checkpoint tensors is in. An earlier document's result,
which does not exist yet, is stood for by a directory with its configuration and a file that has a header and a hole.
"""

from __future__ import annotations

import io
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit import merge as stock
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo

from mftmerge.checkpoint import SINGLE, TensorEntry
from mftmerge.dtypes import of_torch
from mftmerge.errors import BadInput
from mftmerge.names import layer_of
from mftmerge.recipe.catalogue import METHODS
from mftmerge.recipe.check import groups
from mftmerge.recipe.headers import Header, header, hole
from mftmerge.recipe.inputs import Inputs, OrderedConfiguration, named_as
from mftmerge.recipe.lines import Location
from mftmerge.recipe.locate import MaskBook
from mftmerge.recipe.methods import register
from mftmerge.recipe.reading import quiet, reading
from mftmerge.recipe.remembered import remember
from mftmerge.recipe.resultconfig import copy_generation_config, result_config
from mftmerge.recipe.schema import BaseInput, Document, ModelInput, Reference, SliceInput

# Buffers that old checkpoints store and that models compute: nothing is lost with them.
COMPUTED = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.masked_bias|\.attn(ention)?\.bias|position_ids)$"
)


@dataclass
class Result:
    """What a document will give. lost: of each input (place, tensors that reach no output); problems: (place, text).

    base: shapes of tensors in the model to which the result's mask returns dropped weights; None where it has none.
    """

    tensors: tuple[TensorEntry, ...] = ()
    base: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    lost: list[tuple[Location, str, list[str]]] = field(default_factory=list)
    problems: list[tuple[Location, str]] = field(default_factory=list)


class HeaderLoader(LazyTensorLoader):
    """A checkpoint's tensors without their data; `asked`: names that were read."""

    def __init__(self, header: Header) -> None:
        super().__init__(ShardedTensorIndex("", True, dict.fromkeys(header, SINGLE), []), False)
        self.header = header
        self.asked: set[str] = set()

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        found = next((name for name in (key, *(aliases or ())) if name in self.header), None)
        if found is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        self.asked.add(found)
        shape, dtype = self.header[found]
        return torch.empty(shape, dtype=dtype, device="meta")


class HeaderInputs(Inputs):
    """Inputs for a plan: each, with its mask, a directory of links of its own, as in a build."""

    def __init__(self, document: Document, book: MaskBook, stages: Mapping[str, Path], work: Path) -> None:
        super().__init__(document, book, stages, work)
        self.loaders: dict[ModelReference, HeaderLoader] = {}
        self.items: dict[ModelReference, tuple[Location, ModelInput | BaseInput]] = {}
        self.given: dict[tuple[object, ...], torch.dtype] = {}  # what the method makes of inputs of certain dtypes
        self._made: dict[tuple[str, str], object] = {}
        for where, item in document.parts():
            self.items.setdefault(ModelReference.model_validate(self.input(item)), (where, item))
        self.result_base = self.delta_base(document.mask) if document.mask else None

    def input(self, item: ModelInput | BaseInput) -> Any:
        reference, mask = self.absolute(item.model), self.mask_of(item)
        key = (str(reference), mask.model_dump_json() if mask else "")
        if key not in self._made:
            original = Path(reference.path)
            view = self.work / str(len(self._made)) / original.name
            view.mkdir(parents=True)
            for file in original.iterdir():
                if file.is_file():
                    (view / file.name).symlink_to(file.resolve())
            found = Reference(path=str(view), override_architecture=reference.override_architecture).to_mergekit()
            self.loaders[ModelReference.model_validate(found)] = HeaderLoader(header(original))
            self._made[key] = found
        return self._made[key]

    def where(self, model: ModelReference) -> tuple[Location, str]:
        """An input's place in the document, and how the recipe calls it."""
        where, item = self.items[model]
        return where, str(item.model)


def plan_result(
    document: Document,
    book: MaskBook,
    stages: Mapping[str, Path],
    work: Path,
    options: Mapping[str, object],
    returned: Collection[str] = (),
) -> tuple[Result, Callable[[Path], None]]:
    """The result of one document, and a function that writes a directory which stands for it in later documents.

    stages: such directories by name. work: a scratch directory. options: mergekit's, by name. returned: tensors of the
    result to look for in the base of its mask. The function may be called unless there are problems.
    """
    register()
    remember()
    result = Result()
    with quiet():
        inputs = HeaderInputs(document, book, stages, work)
        # Tensors are "read to the GPU" meta: the device of mergekit's own conversions has to be that of its inputs.
        chosen = MergeOptions(**{**options, "device": "meta", "read_to_gpu": True, "quiet": True})
        configuration = inputs.configuration()
        try:
            with reading(chosen, inputs.loaders):
                return result, _plan(result, inputs, configuration, chosen, returned)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError, NotImplementedError) as e:
            if isinstance(e, BadInput):
                raise
            result.problems.append(explained(e, document))
            return result, lambda _: None


def explained(error: Exception, document: Document) -> tuple[Location, str]:
    """mergekit's refusal of a plan in our words."""
    text = " ".join(str(error).split()) or type(error).__name__
    models = ", ".join(dict.fromkeys(str(i.model) for _, i in document.parts()))
    if isinstance(error, KeyError) and error.args[:1] and error.args[0] in (document.modules or {}):
        return ("modules", error.args[0]), f"the models have no module {error.args[0]!r}"
    if "allow-crimes" in text:
        return ("merge_method",), f"different architectures ({models}); --allow-crimes merges them anyway"
    if "trust_remote_code" in text:
        return ("merge_method",), f"a model has code of its own ({models}); --trust-remote-code runs it"
    return ("merge_method",), f"mergekit cannot plan this merge: {text[:300]}"


def _plan(
    result: Result,
    inputs: HeaderInputs,
    configuration: OrderedConfiguration,
    options: MergeOptions,
    returned: Collection[str],
) -> Callable[[Path], None]:
    architecture = get_architecture_info(configuration, options)
    try:
        config = result_config(configuration, architecture, options.trust_remote_code)
    except BadInput as fault:
        result.problems.append((("slices",), str(fault)))
        return lambda _: None
    donor = configuration.base_model or configuration.referenced_models()[0]
    targets = MergePlanner(configuration, architecture, options=options, out_model_config=config).plan_to_disk("")
    saves = [t for t in targets if isinstance(t, SaveTensor)]
    tokenizer: TokenizerInfo | None = None
    for task in targets:
        if isinstance(task, BuildTokenizer):
            with redirect_stderr(io.StringIO()):  # it draws a bar, which nothing else turns off
                tokenizer = task.execute()
    faults = Faults()
    entries = [e for save in saves if (e := _entry(save, inputs, tokenizer, faults)) is not None]
    result.problems += faults.problems()
    result.tensors = tuple(entries)
    result.lost = _lost(inputs, {e.name for e in entries})
    if inputs.result_base is not None:
        named = [t for t in saves if t.tensor_name in returned]
        result.base = {t.tensor_name: _shape_in(inputs.result_base, t) for t in named}

    def stand_in(folder: Path) -> None:
        folder.mkdir(parents=True)
        hole(entries, folder / SINGLE)
        if tokenizer is not None:
            section = configuration.tokenizer
            padding = section.pad_to_multiple_of if section else None
            stock._update_config_vocab(config, architecture, tokenizer.tokenizer, pad_to_multiple_of=padding)
            tokenizer.tokenizer.save_pretrained(folder)
        else:
            for file in Path(donor.model.path).iterdir():
                if file.suffix not in (".safetensors", ".bin") and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)
        config.save_pretrained(folder)
        copy_generation_config(configuration, folder)

    return stand_in


class Faults:
    """What is wrong with tensors of inputs, one row for each place and kind: the first tensor, and how many more."""

    def __init__(self) -> None:
        self._found: dict[tuple[Location, str], tuple[str, str, set[str]]] = {}

    def add(self, where: Location, kind: str, name: str, text: str, hint: str = "") -> None:
        self._found.setdefault((where, kind), (text, hint, set()))[2].add(name)

    def problems(self) -> list[tuple[Location, str]]:
        rows = []
        for (where, _), (text, hint, names) in self._found.items():
            more = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
            rows.append((where, f"{text}{more}{hint}"))
        return rows


def _entry(
    save: SaveTensor, inputs: HeaderInputs, tokenizer: TokenizerInfo | None, faults: Faults
) -> TensorEntry | None:
    """An output tensor as the headers tell; None for an optional one that no input has. Adds to `faults`."""
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    aligned = task.gather_tensors if isinstance(task.gather_tensors, PermutedVocabulary) else None
    gather = aligned.gather_tensors if aligned else task.gather_tensors
    loads = gather.arguments()
    found: dict[ModelReference, torch.Tensor] = {}
    for model, weight in gather.weight_info.items():
        try:
            tensor = loads[f"{model}:{weight.name}"].execute()
        except RuntimeError as e:
            if "required but not present" not in str(e):
                raise
            where, called = inputs.where(model)
            faults.add(where, "absent", weight.name, f"{called} has no tensor {weight.name}")
            continue
        if tensor is not None:
            found[model] = tensor
    if not found:
        return None
    first, like = next(iter(found.items()))
    axis = task.output_weight.vocabulary_axis
    shape = list(like.shape)
    for model, tensor in found.items():
        own = list(tensor.shape)
        alike = (
            axis is not None
            and len(own) == len(shape)
            and own[:axis] + own[axis + 1 :] == shape[:axis] + shape[axis + 1 :]
        )
        if own == shape or (aligned and alike):
            continue
        where, called = inputs.where(model)
        pair = f"{save.tensor_name} is {tuple(own)} in {called}, {tuple(shape)} in {inputs.where(first)[1]}"
        faults.add(where, "shape", save.tensor_name, pair, "; set tokenizer: to align vocabularies" if alike else "")
    dtype = like.dtype
    for tensor in found.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    if aligned and axis is not None and tokenizer is not None:
        for model, tensor in found.items():
            tokens = max(tokenizer.permutations[model].values(), default=-1) + 1
            if tokens > tensor.shape[axis]:
                where, called = inputs.where(model)
                text = f"{called}: its tokenizer has {tokens} tokens, {save.tensor_name} {tensor.shape[axis]} rows; "
                faults.add(
                    where,
                    "rows",
                    save.tensor_name,
                    text + "enlarge the embeddings, or take tokens out of the tokenizer",
                )
        rows, multiple = len(tokenizer.tokenizer.get_vocab()), aligned.pad_to_multiple_of or 1
        shape[axis] = -(-rows // multiple) * multiple
    kind = task.method_name, tuple((m == task.base_model, t.dtype, t.dim()) for m, t in found.items())
    if kind not in inputs.given:
        inputs.given[kind] = _given(task, found, dtype)
    code = of_torch(dtype_from_name(save.dtype) or inputs.given[kind]).code
    return TensorEntry(save.tensor_name, code, tuple(shape), Path(), 0, 0)


def _shape_in(model: ModelReference, save: SaveTensor) -> tuple[int, ...] | None:
    """The shape that an output tensor has in a model; None where the model has none of that name."""
    assert isinstance(save.tensor_task, ExecuteMergeMethodTask)
    found = named_as(save.tensor_task.output_weight, model, "meta").execute()
    return None if found is None else tuple(found.shape)


def _given(
    task: ExecuteMergeMethodTask, found: Mapping[ModelReference, torch.Tensor], promoted: torch.dtype
) -> torch.dtype:
    """The dtype of what the method makes of such inputs. Some methods widen them; a few numbers show it."""
    if METHODS[task.method_name].ours or not all(t.is_floating_point() for t in found.values()):
        return promoted
    generator = torch.Generator().manual_seed(0)
    few = {m: torch.rand([3] * t.dim(), generator=generator).to(t.dtype) for m, t in found.items()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            merged = task.execute(tensors=few)
    except (RuntimeError, ValueError, TypeError, IndexError):  # what such small tensors do not allow
        return promoted
    return promoted if merged is None else merged.dtype


def _lost(inputs: HeaderInputs, written: set[str]) -> list[tuple[Location, str, list[str]]]:
    """Tensors of inputs that no output reads, but for layers that the recipe leaves out."""
    found = []
    ranges: dict[ModelReference, list[tuple[int, int]]] = defaultdict(list)
    for _, sources, _ in groups(inputs.document):
        for source in sources:
            if isinstance(source, SliceInput):
                ranges[ModelReference.model_validate(inputs.input(source))].append(source.layer_range)
    for model, (where, item) in inputs.items.items():
        loader = inputs.loaders[model]
        chosen = ranges.get(model)
        base_only = where[0] == "base_model" and not loader.asked  # a base that the method does not read
        names = [
            name
            for name in loader.header
            if name not in loader.asked and name not in written and not COMPUTED.search(name)
        ]
        if chosen is not None:
            numbers = {n: layer for n in names if (layer := layer_of(n)) is not None}
            names = [n for n in names if n not in numbers or any(a <= numbers[n] < b for a, b in chosen)]
        if names and not base_only:
            found.append((where, str(item.model), names))
    return found
