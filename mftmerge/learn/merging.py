"""The merge that a recipe says, one tensor at a time, under masks that change: what `build` would write, bit for bit.

mergekit plans the merge, as for a build, and the same tasks do the arithmetic on the same pieces of a tensor. A mask is
open over the difference between its expert and the base: a dropped weight takes the base's value before the merge.

Which experts keep a weight is a whole number, its *code*: bit k is 1 where the mask of open expert k keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import GatherTensors, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from torch import Tensor

from mftmerge.errors import BadInput
from mftmerge.recipe.inputs import MaskedInputs
from mftmerge.recipe.load import Recipe
from mftmerge.recipe.methods import register
from mftmerge.recipe.reading import quiet, reading
from mftmerge.recipe.remembered import remember
from mftmerge.recipe.resultconfig import result_config
from mftmerge.recipe.settings import MergeSettings
from mftmerge.select import choose
from mftmerge.train.sharding import Shard

MOST_EXPERTS = 31  # bits of a code
Kept = Callable[[slice], Sequence[Tensor]]  # of a piece of a flat tensor: booleans of each open expert

PIECE = 1 << 18  # weights handled at a time: of every expert and score they stay in the processor's cache


def ranks(change: Tensor) -> Tensor:
    """Rank of each weight by |change| among those that changed, above 0 to 1; -inf where nothing changed. float32.

    Of equal changes the one with the lower index ranks lower.
    """
    size = change.abs().reshape(-1)
    order = torch.argsort(size, stable=True)
    zeros = int((size == 0).sum())
    found = torch.empty_like(size)
    count = size.numel() - zeros
    found[order[zeros:]] = torch.arange(1, count + 1, dtype=torch.float32, device=size.device) / max(1, count)
    found[order[:zeros]] = -torch.inf
    return found.view(change.shape)


@dataclass
class Part:
    """One tensor of the result and what goes into it.

    values: the inputs' tensors as they are stored, by whatever names them; parent: the base. experts: the inputs whose
    masks are open, in the recipe's order. task: mergekit's, which merges; None: each weight is one parent's. math: in
    which dtype each input takes part, where that is another; dtype: of the result, likewise. whole_ranks: of each
    expert, where the values are only some rows of the tensor (FSDP2).
    """

    name: str
    values: dict[Hashable, Tensor]
    parent: Hashable
    experts: tuple[Hashable, ...]
    task: ExecuteMergeMethodTask | None = None
    math: dict[Hashable, torch.dtype | None] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    whole_ranks: list[Tensor] | None = None

    @property
    def selecting(self) -> bool:
        return self.task is None

    @property
    def base(self) -> Tensor:
        return self.values[self.parent]

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def expert(self, number: int) -> Tensor:
        """The tensor of an open expert, as it is stored."""
        return self.values[self.experts[number]]

    def changed(self) -> bool:
        """Whether any open expert's tensor differs from the base's."""
        return any(not torch.equal(self.values[e], self.base) for e in self.experts)

    def change(self, number: int) -> Tensor:
        """An open expert's task vector, float32."""
        return self.expert(number).float() - self.base.float()

    def ranks(self, number: int) -> Tensor:
        """`ranks` of an open expert's change, among those of the whole tensor."""
        return ranks(self.change(number)) if self.whole_ranks is None else self.whole_ranks[number]

    def keep_rows(self, shard: Shard) -> Part:
        """The part with a rank's rows alone, and what is known of the whole tensor; changed in place."""
        if shard.group is not None:
            self.whole_ranks = [shard.rows(self.ranks(k)).clone() for k in range(len(self.experts))]
            self.values = {m: shard.rows(t).clone() for m, t in self.values.items()}
        return self

    def factors(self) -> tuple[float, ...]:
        """What one unit of each open expert adds to the result: its weight, as the method has it."""
        if self.selecting:
            return (1.0,) * len(self.experts)
        found = []
        for expert in self.experts:
            unit = {m: torch.full((1,), float(m == expert)) for m in self.values}
            found.append(float(self._merged(unit)))
        return tuple(found)

    @torch.no_grad()
    def pieces(self, kept: Kept | None) -> Iterator[tuple[slice, Tensor]]:
        """The result's tensor, flat, piece by piece, each where it belongs; in the result's dtype.

        kept: tells of a piece which weights each open expert keeps, booleans; None: every expert whole.
        """
        flat = {m: t.reshape(-1) for m, t in self.values.items()}
        base = flat[self.parent]
        for start in range(0, max(1, base.numel()), PIECE):
            piece = slice(start, start + PIECE)
            tensors = {m: t[piece] for m, t in flat.items()}
            own = None if kept is None else kept(piece)
            for expert, keeps in zip(self.experts, own or (), strict=own is not None):
                tensors[expert] = choose(keeps, tensors[expert], tensors[self.parent])
            values = self._selected(tensors, own) if self.selecting else self._merged(tensors)
            # Rounded as the file is: a live model may be wider, where the processor has no bfloat16 arithmetic.
            yield piece, values.to(self.dtype or values.dtype)

    def merged(self, kept: Kept | None) -> Tensor:
        """The result's tensor, in its dtype. kept: as for `pieces`."""
        out: Tensor | None = None
        for piece, merged in self.pieces(kept):
            if out is None:
                out = torch.empty(self.base.numel(), dtype=merged.dtype, device=self.base.device)
            out[piece] = merged
        assert out is not None
        return out.view(self.shape)

    def _merged(self, tensors: dict[Hashable, Tensor]) -> Tensor:
        assert self.task is not None
        result = self.task.execute(tensors={m: t.to(self.math.get(m) or t.dtype) for m, t in tensors.items()})
        assert result is not None  # of what every input has
        return result

    def _selected(self, tensors: dict[Hashable, Tensor], kept: Sequence[Tensor] | None) -> Tensor:
        base = tensors[self.parent]
        merged = base.to(self.math.get(self.parent) or base.dtype)
        for number, expert in reversed(list(enumerate(self.experts))):  # the first one that keeps a weight wins
            own = tensors[expert].to(self.math.get(expert) or base.dtype)
            merged = own if kept is None else choose(kept[number], own, merged)
        return merged

    def to(self, device: torch.device) -> Part:
        """The part with its tensors on a device; changed in place."""
        self.values = {m: t.to(device) for m, t in self.values.items()}
        self.whole_ranks = self.whole_ranks and [t.to(device) for t in self.whole_ranks]
        return self


class Merging:
    """A recipe whose open masks are to be learnt, as mergekit plans it. Use `parts` inside `reading()`.

    work: a scratch directory for adapters and links. experts: numbers in `models:` of the inputs with open masks.
    """

    def __init__(self, recipe: Recipe, work: Path, settings: MergeSettings) -> None:
        register()
        remember()
        self.recipe, self.document = recipe, recipe.documents[0]
        self.options = MergeOptions(
            **settings.of_mergekit(), lora_merge_cache=str(work / "lora"), quiet=True, write_model_card=False
        )
        self.inputs = MaskedInputs(self.document, recipe.masks(recipe.documents[0]), {}, work, self.options)
        assert self.document.base_model
        assert self.document.models
        with quiet():
            self.configuration = self.inputs.configuration()
        self.base = ModelReference.model_validate(self.inputs.input(self.document.base_model))
        chosen = [self.document.models[i] for i, _ in recipe.to_learn]
        self.experts = tuple(ModelReference.model_validate(self.inputs.input(m)) for m in chosen)
        self.names = tuple(str(m.model) for m in chosen)
        if self.base in self.experts:
            raise BadInput(f"{recipe.path}: a mask is to be learnt over the base itself; take it from that entry")
        if len(self.experts) > MOST_EXPERTS:
            raise BadInput(f"{recipe.path}: masks of at most {MOST_EXPERTS} experts can be learnt together")

    def directory(self, model: ModelReference) -> Path:
        """Where a model's files are, an adapter merged into it."""
        return Path(model.merged(**self.inputs.adapters).model.path)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, this thread reads the inputs, closed masks applied."""
        with quiet(), reading(self.options, self.inputs.loaders()):
            yield

    def plan(self) -> list[SaveTensor]:
        """The tensors of the result, as mergekit plans them; not all optional ones need be there."""
        architecture = get_architecture_info(self.configuration, self.options)
        config = result_config(self.configuration, architecture, self.options.trust_remote_code)
        planner = MergePlanner(self.configuration, architecture, options=self.options, out_model_config=config)
        return [t for t in planner.plan_to_disk(out_path="") if isinstance(t, SaveTensor)]

    def parts(self) -> Iterator[Part]:
        """Every tensor of the result, with the inputs' tensors read: hold on to those that are needed."""
        for save in self.plan():
            if (part := self._part(save)) is not None:
                yield part

    def _part(self, save: SaveTensor) -> Part | None:
        task = save.tensor_task
        assert isinstance(task, ExecuteMergeMethodTask)
        assert isinstance(task.gather_tensors, GatherTensors)
        gather = task.gather_tensors
        loads: dict[str, Any] = gather.arguments()
        stored = {name: load.model_copy(update={"dtype": None}).execute() for name, load in loads.items()}
        values = gather.execute(**stored)
        if not values:
            return None
        math = {m: dtype_from_name(loads[f"{m}:{w.name}"].dtype) for m, w in gather.weight_info.items()}
        chosen = None if self.document.merge_method == "select" else task
        for model in (self.base, *self.experts):
            if model not in values:
                raise BadInput(f"{model}: has no tensor {save.tensor_name}, which others of the merge have")
        return Part(save.tensor_name, values, self.base, self.experts, chosen, math, dtype_from_name(save.dtype))
