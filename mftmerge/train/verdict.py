"""What a run came to, in numbers and in words: against the base, and what to change where nothing was gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mftmerge.evaluate.pairing import paired
from mftmerge.train.settings import TrainSettings
from mftmerge.train.validation import Judged


def compared(judged: Judged, base: Judged, name: str) -> dict[str, Any]:
    """A row of the comparison: loss and share of right answers, and their paired differences from the base."""
    row: dict[str, object] = {"loss": judged.loss}
    if name != "base":
        d = paired(judged.losses, base.losses)
        row |= {"difference": d.mean, "standard_error": d.standard_error, "rows": d.n}
    if judged.marks is not None and base.marks is not None:
        row["exact"] = judged.share
        if name != "base":
            d = paired(judged.marks, base.marks)
            row |= {"exact_difference": d.mean, "exact_standard_error": d.standard_error}
    return row


def verdict(comparison: Mapping[str, Any], step: int, gained: bool, *, kept_last: bool = False) -> str:
    """One line: how the mask that is kept compares with the base."""
    d = comparison["mask"]
    way = "below" if d["difference"] < 0 else "above"
    change = (
        f"loss {abs(d['difference']):.4f} {way} the base's, +- {d['standard_error']:.4f} "
        f"(nats a token, {d['rows']} validation rows)"
    )
    if "exact" in d:
        points, error = 100 * d["exact_difference"], 100 * d["exact_standard_error"]
        change = f"{d['exact']:.1%} of the answers right, {points:+.1f} +- {error:.1f} points; {change}"
    if kept_last:
        return f"the last mask is kept, as asked: {change}"
    if gained:
        return f"best mask: step {step}, {change}"
    if step == 0:
        return f"nothing was gained: no step was better than the initial mask, which is kept ({change})"
    return f"nothing was gained: the best mask (step {step}) is no better than the base ({change})"


def advice(history: Sequence[Mapping[str, Any]], settings: TrainSettings) -> str:
    """What to change after a run that gained nothing, from how its losses went."""
    validated = [h["validation"] for h in history if h.get("validation") is not None]
    learnt = [h["loss"] for h in history if h.get("loss") is not None]
    third = max(1, len(learnt) // 3)
    fell = len(learnt) > 2 and sum(learnt[-third:]) / third < sum(learnt[:third]) / third - 0.02
    moved = sum(h.get("flipped") or 0 for h in history)
    if not moved:
        return f"the mask never changed; try a higher rate (--lr {3 * settings.learning_rate:.2g}) or more --steps"
    if len(validated) > 1 and validated[1] > validated[0] + 0.01:
        return (
            f"the loss rose by {validated[1] - validated[0]:.3f} from the start: "
            f"try a lower rate (--lr {settings.learning_rate / 10:.2g})"
        )
    if fell:
        return "the training loss fell and the validation loss did not: give more rows, or fewer --steps"
    return (
        "where the base was fine-tuned on these very rows there may be nothing to gain: give other rows of the domain, "
        "drop weights to the model before fine-tuning instead of 0 (--target delta --base MODEL), or choose by answers "
        "(--metric exact:RULE)"
    )
