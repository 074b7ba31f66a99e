"""Tensors of a checkpoint in the parameters of a live model, and back: what is fused on loading, and what is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mftmerge import naming
from mftmerge.errors import BadInput
from mftmerge.naming import decoder_layers
from mftmerge.train.targets import Target


class Holders:
    """Which parameter of a live model holds which of the checkpoint's tensors `stored`.

    `of`: parameter name -> the tensors it holds. A parameter that is one tensor under its own name is passed through.
    `copies`: of tied parameters that are stored under two names, the other name -> the one that `of` has.
    """

    def __init__(self, model: PreTrainedModel, stored: Iterable[str]) -> None:
        self.model, self.stored = model, frozenset(stored)
        self.parameters = dict(model.named_parameters())
        self.of: dict[str, tuple[str, ...]] = {}
        self._plain: dict[str, str] = {}
        for name, p in self.parameters.items():
            if name in self.stored:
                self.of[name], self._plain[name] = (name,), name
                continue
            numbers = torch.arange(p.numel(), dtype=torch.int32).view(p.shape)
            held = naming.to_checkpoint(model, {name: numbers}, names=self.stored)
            self.of[name] = tuple(held)
            if len(held) == 1 and torch.equal(next(iter(held.values())), numbers):
                self._plain[name] = next(iter(held))
        self._holder = {tensor: name for name, held in self.of.items() for tensor in held}
        names = {id(p): name for name, p in self.parameters.items()}
        every = {n: names[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        second = {n: self.of[p][0] for n, p in every.items() if n in self.stored and n not in self._holder}
        self.copies: dict[str, str] = second

    def renew(self) -> None:
        """Take the model's parameters again, under the same names: sharding made others of them."""
        self.parameters = dict(self.model.named_parameters())

    def holder(self, tensor: str) -> str:
        """The parameter that holds a tensor of the checkpoint. Raises BadInput where none does."""
        if tensor not in self._holder:
            raise BadInput(
                f"{tensor}: no parameter of the live model holds this tensor, so nothing can be learnt of it"
            )
        return self._holder[tensor]

    def plain(self, parameter: str) -> str | None:
        """The one tensor that a parameter holds as it is; None where it holds several, or another layout."""
        return self._plain.get(parameter)

    def split(self, parameter: str, values: Tensor) -> dict[str, Tensor]:
        """Values of a parameter's shape (a gradient) as those of the tensors it holds."""
        if parameter in self._plain:
            return {self._plain[parameter]: values}
        return naming.to_checkpoint(self.model, {parameter: values}, names=self.stored)

    def join(self, parameter: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter's values from those of all the tensors that it holds."""
        if parameter in self._plain:
            return tensors[self._plain[parameter]]
        return naming.to_parameters(self.model, tensors)[parameter]

    def targets(self, tensors: Iterable[str]) -> list[Target]:
        """The parameters that hold these tensors, in the model's order. The layer of one outside the layers is -1."""
        wanted = {self.holder(t) for t in tensors}
        prefix = f"{decoder_layers(self.model)[0]}."
        found = []
        for name, p in self.parameters.items():
            if name in wanted:
                number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else "-1"
                found.append(Target(name, p, int(number)))
        return found


AFTER = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")  # modules that run after the last layer


def first_layer(model: PreTrainedModel, targets: Iterable[Target]) -> int:
    """The lowest decoder layer that a change of the targets reaches: below it, hidden states stay as they are."""
    head = model.get_output_embeddings()
    entry = model.get_input_embeddings()
    after = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    after -= {id(p) for p in entry.parameters()}
    lowest = len(decoder_layers(model)[1])
    for t in targets:
        if t.layer >= 0:
            lowest = min(lowest, t.layer)
        elif id(t.parameter) not in after and t.name.split(".")[-2] not in AFTER:
            return 0
    return lowest
