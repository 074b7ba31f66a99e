"""What a run starts from: the model, the rows, and the place of the result."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mftmerge import data as rows_of
from mftmerge.checkpoint import resolve
from mftmerge.errors import BadInput
from mftmerge.loading import check_directory, load_causal_lm, load_tokenizer
from mftmerge.naming import decoder_layers
from mftmerge.train import memory, sharding
from mftmerge.train.settings import TrainSettings


class Output:
    """The mask's place, and the directory beside it that holds the run's checkpoints until it is done."""

    def __init__(self, out: str | Path | None, overwrite: bool, resume: bool) -> None:
        self.path, self.resume = None if out is None else Path(out), resume
        if self.path is None:
            if resume:
                raise BadInput("resume needs the output file of the run that is to be continued")
            return
        if self.path.exists() and not overwrite:
            raise BadInput(f"{self.path}: exists; give --overwrite to replace it, or another name")
        if not self.path.absolute().parent.is_dir():
            raise BadInput(f"{self.path}: its directory does not exist; make it first")

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """`<out>.run`, removed when the block ends well or left no checkpoint; a temporary one without an output."""
        if self.path is None:
            with tempfile.TemporaryDirectory() as d:
                yield Path(d)
            return
        path = Path(f"{self.path}.run")
        if path.exists() and not self.resume and is_main():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        except BaseException:
            if is_main() and not any(path.glob("checkpoint-*")):  # nothing that --resume could continue
                shutil.rmtree(path, ignore_errors=True)
            raise
        if is_main():
            shutil.rmtree(path, ignore_errors=True)

    def last(self, directory: Path, settings: TrainSettings, model: str, say: Callable[[str], None]) -> Path | None:
        """The checkpoint to continue from. Raises BadInput when the settings are not those of the interrupted run."""
        from mftmerge.train.trainer import last_checkpoint

        said = directory / "settings.json"
        now = {"model": model, **settings.model_dump()}
        found = last_checkpoint(directory) if self.resume else None
        if found is not None and said.exists():
            before = json.loads(said.read_text())
            changed = sorted(k for k in now if before.get(k) != now[k])
            if changed:
                raise BadInput(f"{self.path}: --resume needs the same settings; changed: {', '.join(changed)}")
        if self.resume:
            say(f"resuming at step {found.name.split('-')[1]}" if found else "nothing to resume: starting at step 0")
        if is_main():
            said.write_text(json.dumps(now))
        return found


def logging_place(log_to: str, out: str | Path | None) -> dict[str, str]:
    """Environment that makes tensorboard write to `<out>.logs`, since `<out>.run` goes away at the end.

    Raises BadInput when what `log_to` names is not installed.
    """
    from transformers.integrations import get_available_reporting_integrations

    if log_to == "none":
        return {}
    found = get_available_reporting_integrations()
    if log_to not in found:
        there = f"there is {', '.join(found)}" if found else "nor is any other logger"
        raise BadInput(f"--log-to {log_to}: not installed ({there}); pip install {log_to}, or leave --log-to out")
    return {"TENSORBOARD_LOGGING_DIR": os.environ.get("TENSORBOARD_LOGGING_DIR", f"{out}.logs")} if out else {}


def load_model(model: Any, tokenizer: Any, settings: TrainSettings, *, shard: bool = False) -> tuple[Any, Any, str]:
    """The loaded model, its tokenizer and its reference. shard: split the parameters over the ranks (FSDP2)."""
    reference = str(model) if isinstance(model, str | Path) else str(getattr(model, "name_or_path", "") or "")
    if isinstance(model, str | Path):
        path = resolve(model)
        check_directory(path)
        if settings.check_memory and not shard:  # a rank needs less than one process would
            memory.require(memory.estimate(path, settings), reference, settings)
        dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
        loaded: Any = load_causal_lm(path, dtype=dtype)
        if shard:
            sharding.shard(loaded, decoder_layers(loaded)[1])
        else:
            loaded.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    elif shard:
        raise BadInput("FSDP shards a model while it is loaded: give train_mask the checkpoint's path, not a model")
    else:
        path, loaded = Path(reference), model
    if tokenizer is None:
        if not reference:
            raise BadInput("the model does not say where its tokenizer is; give tokenizer")
        tokenizer = load_tokenizer(path)
    return loaded, tokenizer, reference


def is_tokenised(data: Any) -> bool:
    return isinstance(data, Sequence) and bool(data) and isinstance(data[0], Mapping) and "input_ids" in data[0]


def named(data: Any) -> Any:
    """What the settings file says about the data: names of files, not rows."""
    if isinstance(data, str | Path):
        return str(data)
    return [str(d) for d in data] if all(isinstance(d, str | Path) for d in data) else f"{len(data)} rows"


def read_rows(data: Any, eval_data: Any, tokenizer: Any, settings: TrainSettings) -> tuple[list[Any], list[Any]]:
    """Tokenised rows to train on and to validate on."""

    def tokens(source: Any) -> list[Any]:
        if is_tokenised(source):
            return list(source)
        several = isinstance(source, Sequence) and not isinstance(source, str | Path | Mapping)
        if several and source and all(isinstance(s, str | Path) for s in source):
            read = rows_of.mix([rows_of.load_rows(s) for s in source], settings.weights, settings.seed)
        else:
            read = rows_of.load_rows(source)
        return rows_of.tokenize(read, tokenizer, settings.max_length)

    rows = tokens(data)
    if eval_data is not None:
        return rows, tokens(eval_data)[: settings.eval_rows]
    held = min(settings.eval_rows, int(len(rows) * settings.eval_share))
    if not held:
        return rows, []
    order = random.Random(settings.seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in sorted(order[held:])], [rows[i] for i in sorted(order[:held])]


def is_main() -> bool:
    """Whether this process writes and speaks: rank 0 of those that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
