"""One batch, every row under its own mask: the layers that masks cover take each row's product with its own weights.

The model's weights stay as they are. Covered modules get another `forward` for the length of a block: rows are grouped
by mask; where the tokens are few, as in decoding, matrices are multiplied straight from the bits (`rowproduct`),
elsewhere a group's masked weights are made in scratch memory and the module's own forward runs on its rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from mftmerge import rowproduct
from mftmerge.attachment import Attachment
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.maskedparameter import MaskedParameter

FEW = 16  # tokens of one mask; from more on, making its weights once is quicker (benchmarks/batch_masks.py)
INPUTS = ("input_ids", "inputs_embeds")


class RowMasks:
    """Which mask each row of the coming forward passes is under. Given by `Switcher.batch`; used in its block only."""

    def __init__(self, attachment: Attachment, masks: Sequence[str | None]) -> None:
        self._attachment = attachment
        self._modules = [_Covered(self, name, m, leaves) for name, m, leaves in _holders(attachment)]
        self._hooks: list[RemovableHandle] = []
        self._checked = False
        self.assign(masks)

    def assign(self, masks: Sequence[str | None]) -> None:
        """Masks of the rows from now on, None for no mask. Raises BadInput for a name that is not attached.

        A batch of k times as many rows (beams, `num_return_sequences`) gives each of them k rows, one after the other.
        """
        if isinstance(masks, str):
            raise BadInput(f"batch({masks!r}): give a list with one name (or None) for each row")
        for name in masks:
            if name is not None and name not in self._attachment.names:
                raise BadInput(f"no mask {name!r} is attached; there are {', '.join(self._attachment.names)}")
        self.masks = tuple(masks)
        for module in self._modules:
            module.groups.clear()

    def rows(self, count: int) -> list[str | None]:
        """The masks of `count` rows. Raises BadInput where the list does not fit."""
        if not self.masks or count % len(self.masks):
            raise BadInput(f"a batch of {count} rows for {len(self.masks)} masks; give one mask, or None, for each row")
        return [name for name in self.masks for _ in range(count // len(self.masks))]

    def __enter__(self) -> RowMasks:
        inner = self._attachment.inner
        self._hooks = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            inner.register_forward_hook(self._after),
        ]
        for module in self._modules:
            module.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            module.uninstall()

    def _before(self, model: torch.nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        given = next((named[n] for n in INPUTS if isinstance(named.get(n), torch.Tensor)), None)
        given = arguments[0] if given is None and arguments else given
        if not isinstance(given, torch.Tensor) or given.dim() < 2:
            raise BadInput("masks a row need input_ids or inputs_embeds of shape (rows, tokens, ...)")
        batch = _Batch(given.shape[0], given.shape[1], self.rows(given.shape[0]))
        for module in self._modules:
            module.batch = batch

    def _after(self, model: torch.nn.Module, arguments: object, output: object) -> None:
        """At the first pass: a module whose forward was not called had its weights used in some other way."""
        if not self._checked and (missed := [m.name for m in self._modules if m.batch is not None]):
            raise MftmergeError(
                f"{missed[0]!r} was used without calling its module, so no row was masked in it; use one mask at a time"
            )
        self._checked = True


class _Batch:
    """The rows and tokens of the pass that is running, and each row's mask."""

    def __init__(self, rows: int, tokens: int, masks: list[str | None]) -> None:
        self.rows, self.tokens, self.masks = rows, tokens, masks


class _Covered:
    """A module with masked parameters, and the forward that stands in its place. parts: by the module's own name."""

    def __init__(self, owner: RowMasks, name: str, module: torch.nn.Module, parts: dict[str, MaskedParameter]) -> None:
        self.owner, self.name, self.module, self.parts = owner, name, module, parts
        self.batch: _Batch | None = None  # of the running pass, until its first call
        self.current: _Batch | None = None
        self.groups: dict[tuple[int, int], list[tuple[str | None, torch.Tensor]]] = {}
        self.dense: dict[tuple[str, str], torch.Tensor] = {}
        self.lock = threading.Lock()  # weights stand in the module while a group's forward runs
        weight = parts["weight"].parameter if set(parts) == {"weight"} else None
        plain = type(module) is torch.nn.Linear and weight is not None
        self.weight = weight if plain and weight is not None and rowproduct.possible(weight) else None

    def install(self) -> None:
        self.own = self.module.__dict__.get("forward")  # of accelerate, for instance
        self.forward: Callable[..., Any] = self.module.forward
        self.module.forward = self  # as a module's instance may

    def uninstall(self) -> None:
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own
        self.dense.clear()

    def __call__(self, *arguments: object, **named: object) -> Any:
        x = next((a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)), None)
        if x is None:
            raise MftmergeError(f"{self.name!r} is called without a tensor; use one mask at a time")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters(recurse=False)):
            raise MftmergeError("masks a row are for inference: call the model inside torch.no_grad()")
        if self.batch is not None:
            self.current, self.batch = self.batch, None
        groups = self._groups(x)
        direct = self.weight is not None and x.is_floating_point() and not torch.is_autocast_enabled(x.device.type)
        if len(groups) == 1 and not (direct and groups[0][0] is not None and x[..., 0].numel() <= FEW):
            with self._weights(groups[0][0]):
                return self.forward(*arguments, **named)
        if direct:
            return self._linear(x, groups)
        return self._by_group(groups, len(x), arguments, named)

    def _groups(self, x: torch.Tensor) -> list[tuple[str | None, torch.Tensor]]:
        """Mask -> its places in the first dimension of `x`; masks that do not cover the module count as None."""
        batch = self.current
        if batch is None:
            raise MftmergeError(f"{self.name!r} is called outside its model; call the model")
        if len(x) not in (batch.rows, batch.rows * batch.tokens if x.dim() == 2 else batch.rows):
            raise MftmergeError(
                f"{self.name!r} gets an input of shape {tuple(x.shape)} in a batch of {batch.rows} x {batch.tokens}, "
                "whose rows cannot be told apart; use one mask at a time"
            )
        key = len(x), batch.rows
        if key not in self.groups:
            places: dict[str | None, list[int]] = {}
            for place in range(len(x)):
                mask = batch.masks[place * batch.rows // len(x)]
                covered = mask if any(mask in part.kept for part in self.parts.values()) else None
                places.setdefault(covered, []).append(place)
            self.groups[key] = [(mask, torch.tensor(found, device=x.device)) for mask, found in places.items()]
        return self.groups[key]

    def _linear(self, x: torch.Tensor, groups: list[tuple[str | None, torch.Tensor]]) -> torch.Tensor:
        """`nn.Linear` on x (places, ..., in): few tokens of a mask from its bits, without masked weights."""
        assert self.weight is not None
        each = x[0].numel() // x.shape[-1]  # tokens a place
        result = x.new_empty(*x.shape[:-1], len(self.weight))
        packed: dict[int, list[torch.Tensor]] = {}  # by dropped values: those of one base go together
        places: dict[int, list[torch.Tensor]] = {}
        values: dict[int, torch.Tensor | None] = {}
        part = self.parts["weight"]
        for mask, where in groups:
            if mask is None or len(where) * each > FEW:
                with self._weights(mask):
                    result[where] = self.forward(x[where])
                continue
            dropped = self._dropped("weight", mask)
            values[id(dropped)] = dropped
            packed.setdefault(id(dropped), []).extend([part.kept[mask]] * (len(where) * each))
            places.setdefault(id(dropped), []).append(where)
        for key, bits in packed.items():
            where = torch.cat(places[key])
            product = rowproduct.row_product(x[where].view(-1, x.shape[-1]), self.weight, bits, values[key])
            if self.module.bias is not None:
                product += cast(torch.Tensor, self.module.bias)
            result[where] = product.view(len(where), *result.shape[1:]).to(result.dtype)
        return result

    def _by_group(
        self,
        groups: list[tuple[str | None, torch.Tensor]],
        size: int,
        arguments: tuple[object, ...],
        named: dict[str, object],
    ) -> object:
        """The module's own forward for each group, on the parts of all tensors whose first dimension is the places."""
        results: list[object] = []
        for mask, where in groups:

            def mine(value: Any, where: torch.Tensor = where) -> Any:
                rows = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == size
                return value[where] if rows else value

            with self._weights(mask):
                results.append(self.forward(*map(mine, arguments), **{k: mine(v) for k, v in named.items()}))
        where = torch.cat([places for _, places in groups])
        if all(isinstance(r, torch.Tensor) for r in results):
            return self._joined(results, where, size)
        if all(isinstance(r, tuple) for r in results):
            return tuple(self._joined(list(each), where, size) for each in zip(*results, strict=True))
        raise MftmergeError(f"{self.name!r} gives something other than tensors; use one mask at a time")

    def _joined(self, results: list[Any], where: torch.Tensor, size: int) -> torch.Tensor:
        joined = torch.cat(results)
        if len(joined) != size:
            raise MftmergeError(f"{self.name!r} does not give one result for each row; use one mask at a time")
        return torch.empty_like(joined).index_copy_(0, where, joined)

    @contextmanager
    def _weights(self, mask: str | None) -> Iterator[None]:
        """The module holds the weights under `mask`, made for the length of the block."""
        covered = {leaf: part for leaf, part in self.parts.items() if mask is not None and mask in part.kept}
        if not covered:
            yield
            return
        own = {leaf: self.module._parameters[leaf] for leaf in covered}
        with self.lock:
            try:
                for leaf, part in covered.items():
                    made = part.masked(str(mask), self._dropped(leaf, str(mask)))
                    self.module._parameters[leaf] = torch.nn.Parameter(made, requires_grad=False)
                yield
            finally:
                self.module._parameters.update(own)

    def _dropped(self, leaf: str, mask: str) -> torch.Tensor | None:
        """The values that dropped weights take, all of them (of the block's first use on); None: 0."""
        part = self.parts[leaf]
        if mask not in part.dropped:
            return None
        key = leaf, str(id(part.dropped[mask]))  # one for all masks of a base
        if key not in self.dense:
            self.dense[key] = part.spread(part.dropped[mask])
        return self.dense[key]


def _holders(attachment: Attachment) -> Iterator[tuple[str, torch.nn.Module, dict[str, MaskedParameter]]]:
    """Every module that holds a covered parameter, tied ones included, with its name. Raises BadInput for those whose
    input does not have the batch's rows."""
    inner = attachment.inner
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise BadInput(f"{type(inner).__name__}: masks a row need a decoder alone; use one mask at a time")
    parts = {id(part.parameter): part for part in attachment.parts.values()}
    get_decoder = getattr(inner, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    inside = {id(m) for m in decoder.modules()} if isinstance(decoder, torch.nn.Module) else None
    for name, module in inner.named_modules():
        leaves = {leaf: parts[id(p)] for leaf, p in module._parameters.items() if id(p) in parts}
        if not leaves:
            continue
        head = name.rpartition(".")[2] in ("lm_head", "embed_out", "output")
        if "experts" in name.split(".")[:-1] or not (inside is None or id(module) in inside or head):
            raise BadInput(
                f"{name!r} sees other rows than the batch's, so they cannot be masked apart; use one at a time"
            )
        yield name, module, leaves
