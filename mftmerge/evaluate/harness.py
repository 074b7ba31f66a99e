"""EleutherAI's lm-evaluation-harness on a model in memory. Optional: `pip install 'mftmerge[lm-eval]'`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mftmerge.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


EXTRA = "lm_eval"


def require() -> None:
    """Raise BadInput when the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise BadInput("--lm-eval needs lm-evaluation-harness, which is not installed: pip install 'mftmerge[lm-eval]'")


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Run tasks on the model as it is now, mask included: task -> metric -> number, as the harness names them.

    tasks: the harness's names, or files of task configuration (.yaml). limit: documents a task at most.
    Raises BadInput for tasks that the harness does not know.
    """
    require()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, log_samples=False)
    except (KeyError, ValueError) as e:
        raise BadInput(
            f"--lm-eval {','.join(tasks)}: {' '.join(str(e.args[0] if e.args else e).split())[:300]}"
        ) from None
    return {
        task: {m: float(value) for m, value in metrics.items() if "," in m and isinstance(value, int | float)}
        for task, metrics in (found or {})["results"].items()
    }
