"""What a run starts from: the model, the rows, the first scores, and whoever logs it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate.tracking import get_available_trackers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftmerge import data as rows_of
from mftmerge.checkpoint import resolve
from mftmerge.data import Tokens
from mftmerge.errors import BadInput
from mftmerge.loading import check_directory, chosen_dtype, load_causal_lm, load_tokenizer, parts, placed
from mftmerge.loss import fitted, positions, token_losses
from mftmerge.naming import decoder_layers, unwrapped
from mftmerge.train import batches, memory, scores, sharding
from mftmerge.train.settings import TrainSettings
from mftmerge.train.targets import Target, is_attention


def require_logger(name: str) -> None:
    """Raise BadInput when what `log_to` names is not installed."""
    found = [str(t) for t in get_available_trackers()]
    if name != "none" and name not in found:
        there = f"there is {', '.join(found)}" if found else "nor is any other logger"
        raise BadInput(f"--log-to {name}: not installed ({there}); pip install {name}, or leave --log-to out")


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills the end of short rows: no loss sees it, and the tokenizer is left as it is."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found) if isinstance(found, int) else 0


def load_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: TrainSettings,
    *,
    shard: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The loaded model, its tokenizer and its reference. shard: split the parameters over the ranks (FSDP2)."""
    if not isinstance(model, str | Path):
        model = cast(PreTrainedModel, unwrapped(_without_adapters(model)))
    reference = str(model) if isinstance(model, str | Path) else str(getattr(model, "name_or_path", "") or "")
    if isinstance(model, str | Path):
        path, adapter = parts(model)
        check_directory(path)
        if settings.check_memory and not shard:  # a rank needs less than one process would
            memory.require(memory.estimate(path, settings), reference, settings)
        loaded = load_causal_lm(
            path, adapter=adapter, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code or None
        )
        _without_adapters(loaded)
        if shard:
            sharding.shard(loaded, decoder_layers(loaded)[1])
        else:
            placed(loaded)
    elif shard:
        raise BadInput("FSDP shards a model while it is loaded: give train_mask the checkpoint's path, not a model")
    else:
        path, loaded = Path(reference), model
    if tokenizer is None:
        if not reference:
            raise BadInput("the model does not say where its tokenizer is; give tokenizer")
        tokenizer = load_tokenizer(path, trust_remote_code=settings.trust_remote_code or None)
    return loaded, tokenizer, reference


def _without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it computes with weights of its own. Raises BadInput, with the way to such a model."""
    if hasattr(model, "peft_config") or any(hasattr(m, "base_layer") for m in model.modules()):
        raise BadInput(
            "the model has adapters (PEFT), and a mask is over weights: merge them first (model.merge_and_unload()), "
            "or give the model without them"
        )
    if getattr(model, "is_quantized", False):
        raise BadInput("the model is quantised, and a mask is over weights: give it in float32, float16 or bfloat16")
    return model


def with_dtype(settings: TrainSettings, model: object, *, shard: bool) -> TrainSettings:
    """The settings with the dtype that "auto" means here, so that a run's file says it and gives the mask again."""
    if not isinstance(model, str | Path) or shard:
        return settings
    return settings.model_copy(update={"dtype": chosen_dtype(parts(model)[0], settings.dtype)})


def is_tokenised(data: object) -> bool:
    return isinstance(data, Sequence) and bool(data) and isinstance(data[0], Mapping) and "input_ids" in data[0]


def named(data: object) -> Any:
    """What the settings file says about the data: names of files, not rows."""
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, list | tuple) and all(isinstance(d, str | Path) for d in data):
        return [str(d) for d in data]
    return f"rows of a {type(data).__name__} in memory"


def raw_rows(source: Any, settings: TrainSettings) -> Any:
    """The rows of files, mixed where there are several; those that are tokenised already, and None, as they are.

    Before the model is loaded, so that a row that cannot be used is said at once.
    """
    if source is None or is_tokenised(source):
        return source
    several = isinstance(source, Sequence) and not isinstance(source, str | Path | Mapping)
    if several and source and all(isinstance(s, str | Path) for s in source):
        read = [rows_of.load_rows(s, **settings.reading) for s in source]
        return rows_of.mix(read, settings.weights, settings.seed)
    return rows_of.load_rows(source, **settings.reading)


def read_rows(
    data: object,
    eval_data: object,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    model: PreTrainedModel,
    say: Callable[[str], None],
) -> tuple[list[Tokens], list[Tokens]]:
    """Tokenised rows to train on and to validate on, from what `raw_rows` gave, which the model can read.

    say: is told where some are cut for that.
    """

    def tokens(source: Any) -> list[Tokens]:
        read = source
        if not is_tokenised(source):
            read = rows_of.tokenize(source, tokenizer, settings.max_length, skip_bad=settings.skip_bad_rows)
        return within_positions(read, model, say)

    rows = tokens(data)
    if eval_data is not None:
        return rows, tokens(eval_data)[: settings.eval_rows]
    return held_out(rows, min(settings.eval_rows, int(len(rows) * settings.eval_share)), settings.seed)


def within_positions(rows: Sequence[Tokens], model: PreTrainedModel, say: Callable[[str], None]) -> list[Tokens]:
    """Tokenised rows as the model can read them, see `loss.fitted`. say: is told where some are cut for that."""
    kept, longer = fitted(rows, model)
    if longer:
        say(f"{longer} of {len(rows)} rows are cut: the model has {positions(model)} positions")
    return kept


def held_out(
    rows: Sequence[Tokens], count: int, seed: int, most: int | None = None
) -> tuple[list[Tokens], list[Tokens]]:
    """Of `most` rows, drawn by the seed (all by default): those that stay and `count` others, both in their order."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))[:most]
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


class Reading(Protocol):
    """The settings that say how rows are read."""

    max_length: int
    columns: dict[str, str] | None
    skip_bad_rows: bool


def tokens_of(source: Any, tokenizer: PreTrainedTokenizerBase, settings: Reading) -> list[Tokens]:
    """Rows of anything that `data.load_rows` takes, tokenised; those that are tokenised already as they are."""
    if is_tokenised(source):
        return list(source)
    skip = settings.skip_bad_rows
    read = rows_of.load_rows(source, skip_bad=skip, columns=settings.columns)
    return rows_of.tokenize(read, tokenizer, settings.max_length, skip_bad=skip)


def packed(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    say: Callable[[str], None],
) -> tuple[list[batches.Pack], TrainSettings]:
    """Rows put together, where that is asked for and the model keeps them apart; else none, and said why.

    Where it does not, batches of the settings have as many rows more as a pack would have held.
    """
    if not settings.packing:
        return [], settings
    packs = batches.pack(rows, settings.max_length)
    if why := batches.leak(model, packs, pad_id(tokenizer)):
        size = settings.batch_size * -(-len(rows) // len(packs))
        say(f"this model does not keep packed rows apart ({why}): rows are not packed, a batch has {size} of them")
        return [], settings.model_copy(update={"packing": False, "batch_size": size})
    return packs, settings


def with_keep(targets: Sequence[Target], settings: TrainSettings) -> list[Target]:
    """Targets with the shares that attention and the rest keep, where these are given apart."""
    shares = {True: settings.keep_attn, False: settings.keep_mlp}
    own = {t.name: shares[is_attention(t.name)] for t in targets}
    return [t if own[t.name] is None else replace(t, keep=str(own[t.name])) for t in targets]


def dropped_values(
    model: PreTrainedModel, targets: Sequence[Target], settings: TrainSettings
) -> dict[str, Tensor] | None:
    """The base model's values of the covered parameters, for a mask over the difference."""
    if settings.base is None:
        return None
    trusted = settings.trust_remote_code or None
    other = load_causal_lm(resolve(settings.base), dtype=model.dtype, trust_remote_code=trusted)
    theirs = {n: p.detach() for n, p in other.named_parameters()}
    for t in targets:
        found = theirs.get(t.name)
        if found is None or found.shape != t.parameter.shape:
            raise BadInput(f"{settings.base}: has no tensor {t.name} of shape {tuple(t.parameter.shape)}")
    return {t.name: theirs[t.name] for t in targets}


def initial_scores(
    model: PreTrainedModel,
    targets: Sequence[Target],
    rows: Sequence[Tokens],
    settings: TrainSettings,
    dropped: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Where the scores start: another mask's, or what `settings.init` says."""
    if settings.start is not None:
        return scores.of_mask(settings.start, model, targets, signed=scores.is_signed(settings.init))
    evidence = (
        _evidence(model, targets, rows[: 8 * settings.batch_size], dropped) if settings.init == "taylor" else None
    )
    return scores.initial(targets, settings.init, seed=settings.seed, dropped=dropped, evidence=evidence)


def _evidence(
    model: PreTrainedModel, targets: Sequence[Target], rows: Sequence[Tokens], dropped: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Mean of dL/dW * (W - dropped) over rows."""
    model.zero_grad()
    for row in rows:
        ids, labels = (torch.tensor([row[k]], device=model.device) for k in ("input_ids", "labels"))
        (token_losses(model, ids, labels)[0].sum() / len(rows)).backward()
    out = {}
    for t in targets:
        weight = sharding.whole(t.parameter.detach())
        change = weight if dropped is None else weight - dropped[t.name]
        assert t.parameter.grad is not None
        out[t.name] = sharding.whole(t.parameter.grad).float() * change.float()
    model.zero_grad()
    return out
