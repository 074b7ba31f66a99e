"""The scores that training starts from.

- `magnitude`: `S0 = |W|`, each matrix scaled so that its mean equals that of |N(0, 0.02)|. The first mask prunes the
  smallest weights, which costs little; scores are ranked as signed numbers. The default: better for short runs.
- `normal`: `S0 ~ N(0, 0.02)` from a seed, ranked by absolute value: the paper's. Starts from a random mask.
- `taylor`: `S0 = -mean(dL/dW * W)`: to first order, what dropping a weight adds to the loss. Scaled and ranked like
  `magnitude`.

Masks that start from the same scores (the same model and init, or the same seed) can be added in score space.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mftmerge import naming
from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.seeded import SIGMA, normal_scores
from mftmerge.train.sharding import whole
from mftmerge.train.targets import Target

MEAN = SIGMA * math.sqrt(2 / math.pi)  # mean of |N(0, sigma)|
INITS = ("magnitude", "normal", "taylor")


def is_signed(init: str) -> bool:
    """Whether scores of this origin are ranked as signed numbers."""
    return init != "normal"


@torch.no_grad()
def initial(
    targets: Sequence[Target],
    init: str = "magnitude",
    *,
    seed: int = 42,
    dropped: Mapping[str, Tensor] | None = None,
    evidence: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """float32 initial scores by parameter name, on the CPU, of the whole parameters' shapes.

    dropped: values that dropped weights take, so that magnitudes are those of the difference. evidence: for taylor, the
    mean of dL/dW * W by name.
    """
    if init not in INITS:
        raise BadInput(f"--init {init}: must be one of {', '.join(INITS)}")
    out = {}
    for t in targets:
        if init == "normal":
            out[t.name] = normal_scores(t.name, t.parameter.shape, seed)
            continue
        if init == "taylor":
            if evidence is None:
                raise BadInput("init taylor needs gradients: give `evidence`, the mean of dL/dW * W by name")
            values = -evidence[t.name].detach().float().cpu()
        else:
            weight = whole(t.parameter.detach())
            values = (weight.cpu() - dropped[t.name].cpu() if dropped else weight.cpu()).float().abs()
        out[t.name] = _scaled(values, t.blocks)
    return out


def of_mask(path: str | Path, model: nn.Module, targets: Sequence[Target], *, signed: bool) -> dict[str, Tensor]:
    """The scores that a mask file carries, to go on training from them: float32 by parameter name, on the CPU.

    signed: how the run that goes on ranks scores. Raises BadInput for a mask without scores, with scores that are
    ranked in another way, or that does not cover a target.
    """
    mask = Mask.load(path)
    if not mask.has_scores:
        raise BadInput(f"{path}: carries no scores to start from; train it with --scores")
    rule = "signed" if signed else "abs"
    if mask.info.training.get("selection", rule) != rule:
        raise BadInput(f"{path}: was trained with init {mask.info.training.get('init')}; give that init with --start")
    found = naming.to_parameters(model, {n: torch.from_numpy(mask.scores(n).copy()) for n in mask.names})
    absent = [t.name for t in targets if t.name not in found]
    if absent:
        raise BadInput(f"{path}: has no scores for {absent[0]}; choose --layers and --modules that it covers")
    return {t.name: found[t.name] for t in targets}


def _scaled(values: Tensor, blocks: int) -> Tensor:
    """Each matrix times a factor of 8 significant bits: exact on bfloat16 weights, so that it makes no new ties."""
    pieces = values.reshape(blocks, -1)
    means = pieces.abs().mean(dim=1, dtype=torch.float64)
    factors = torch.where(means > 0, MEAN / means, 1.0).to(torch.bfloat16).float()
    return (pieces * factors[:, None]).view(values.shape)


def digest(scores: Mapping[str, Tensor]) -> str:
    """Hash over all tensors in the order of their names: equal for masks that may be added in score space."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(scores):
        h.update(f"{name}\0{tuple(scores[name].shape)}\0".encode())
        h.update(scores[name].contiguous().numpy().tobytes())
    return h.hexdigest()


def typical_cut(scores: Mapping[str, Tensor], keep: float, signed: bool) -> float:
    """The median over tensors of the score at the cut: what a score's total travel is compared with."""
    from mftmerge.train.selection import smallest_kept

    cuts = []
    for s in scores.values():
        values = s.reshape(-1) if signed else s.reshape(-1).abs()
        cuts.append(smallest_kept(values, min(values.numel() - 1, int((1 - keep) * values.numel()))))
    return sorted(cuts)[len(cuts) // 2]
