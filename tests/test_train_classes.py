"""Every decoder class of transformers: a step of training by default settings, what is masked, and packed rows."""

from __future__ import annotations

import copy

import pytest
from helpers.decoder_classes import KINDS, build

from mftmerge.train import batches, targets
from mftmerge.train.run import train_mask

ROWS = [{"input_ids": [5 + i, 6, 7, 8, 9 + i, 2], "labels": [-100, -100, 7, 8, 9 + i, 2]} for i in range(4)]
# Of each habit one: layers that return tuples, lists in a configuration, shared layers, experts stored either way,
# state that goes from token to token, a deeper tower beside the text model.
QUICK = (
    "bloom",
    "mpt",
    "gptj",
    "gemma3n_text",
    "zamba",
    "mamba",
    "gpt_oss",
    "llama4_text",
    "jetmoe",
    "phi4_multimodal",
)
ALL = [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", ALL)
def test_a_step_of_every_class(kind: str) -> None:
    model = build(kind).eval()
    notes: list[str] = []
    result = train_mask(
        model, ROWS, None, tokenizer=Tokenizer(), steps=1, batch_size=2, eval_share=0.5, note=notes.append
    )
    assert len(result.history) == 2
    assert "% of these layers')" in next(n for n in notes if "tensors of layers" in n)
    linear = {id(m.weight) for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")}
    for t in targets.find(model):
        owner = type(model.get_submodule(t.name.rpartition(".")[0])).__name__
        assert id(t.parameter) in linear or "Expert" in owner or owner.endswith("Linear"), t.name
        assert not any(w in t.name for w in ("router", "altup", "A_log", "hyper", "indexer", ".gate.")), t.name


@pytest.mark.parametrize("kind", ALL)
def test_packed_rows_stay_apart_or_it_is_noticed(kind: str) -> None:
    """In bfloat16 too, where the loss of a small leak is lost in rounding: the verdict is the same."""
    model = build(kind).eval()
    packs = batches.pack([{k: v[i:] for k, v in ROWS[i].items()} for i in range(3)], 32)
    verdicts = [batches.leak(m, packs, 0) for m in (model, copy.deepcopy(model).bfloat16())]
    if not verdicts[0].startswith("loss "):  # of other positions, which rounding may hide
        assert bool(verdicts[0]) == bool(verdicts[1]), verdicts
    assert all(p.grad is None for p in model.parameters())


class Tokenizer:
    """Rows are tokens already; only the padding is asked for."""

    pad_token_id, eos_token_id = 0, 2
