"""Where the decoder layers of a live model are."""

from __future__ import annotations

from torch import nn

from mftmerge.errors import BadInput


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a causal LM's decoder layers: the longest ModuleList that is not inside another one."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{o}.") for o, _ in found)]
    if not outer:
        raise BadInput(f"{type(model).__name__}: no list of decoder layers found; is it a causal language model?")
    return max(outer, key=lambda pair: len(pair[1]))
