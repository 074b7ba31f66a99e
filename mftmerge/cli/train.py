"""`mftmerge train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from mftmerge.cli.completing import ROWS, YAML, choices, files
from mftmerge.cli.reporting import print_json, quiet
from mftmerge.errors import BadInput


def command(
    model: str = typer.Option(None, "--model", "-m", help="The fine-tuned base model: checkpoint directory or hub id."),
    data: list[str] = typer.Option(
        [],
        "--data",
        "-d",
        help="Rows: .jsonl, .json, .parquet or a hub id. May be repeated.",
        autocompletion=files(*ROWS),
    ),
    out: Path = typer.Option(None, "--out", "-o", help="The .mask file to write."),
    config: Path = typer.Option(
        None, "--config", help="YAML file of settings; options given here win over it.", autocompletion=files(*YAML)
    ),
    eval_data: str = typer.Option(
        None,
        "--eval-data",
        help="Rows to validate on. Default: a share of the data held out.",
        autocompletion=files(*ROWS),
    ),
    keep: float = typer.Option(None, "--keep", help="Share of weights kept in each matrix [0.9]."),
    layers: str = typer.Option(None, "--layers", help="Decoder layers, such as 26-29 [the last four]."),
    modules: str = typer.Option(None, "--modules", help="attn, mlp, names such as q_proj, or a regular expression."),
    init: str = typer.Option(
        None,
        "--init",
        help="Scores start from magnitude (default), normal (the paper's) or taylor.",
        autocompletion=choices("magnitude", "normal", "taylor"),
    ),
    start: str = typer.Option(None, "--start", help="Go on from the scores of this mask (--scores) instead."),
    seed: int = typer.Option(None, "--seed", help="Of the data order and of normal scores [42]."),
    steps: int = typer.Option(None, "--steps", help="Optimiser steps [60]."),
    batch_size: int = typer.Option(None, "--batch-size", help="Rows in a forward pass, on each device [8]."),
    accumulate: int = typer.Option(None, "--accumulate", help="Forward passes in a step [1]."),
    lr: float = typer.Option(None, "--lr", help="Learning rate of the scores [scaled to the steps]."),
    warmup: float = typer.Option(None, "--warmup", help="Share of steps over which the learning rate rises [0.03]."),
    clip: float = typer.Option(None, "--clip", help="Largest norm of the score gradients [1.0]."),
    max_length: int = typer.Option(None, "--max-length", help="Tokens of a row at most [1024]."),
    weights: str = typer.Option(None, "--weights", help="Shares of several --data in the mixture, such as 2,1."),
    packing: bool = typer.Option(None, "--packing", help="Pack rows into full sequences."),
    scope: str = typer.Option(None, "--scope", help="One cut a 'matrix' (default) or one 'global' cut over all."),
    pattern: str = typer.Option(None, "--pattern", help="N:M sparsity such as 2:4, instead of --keep."),
    keep_warmup: int = typer.Option(None, "--keep-warmup", help="Steps over which the share kept falls from 1."),
    target: str = typer.Option(None, "--target", help="Mask the 'weights' (default) or the 'delta' from --base."),
    base: str = typer.Option(None, "--base", help="With --target delta: dropped weights take this model's values."),
    reference_rounding: bool = typer.Option(None, "--reference-rounding", help="Drop int((1 - keep) * n) in floats."),
    scores: bool = typer.Option(None, "--scores", help="Store the scores in the mask (for combine's `score`)."),
    eval_share: float = typer.Option(None, "--eval-share", help="Share of rows held out without --eval-data [0.1]."),
    eval_rows: int = typer.Option(None, "--eval-rows", help="Validation rows at most [64]."),
    eval_every: int = typer.Option(None, "--eval-every", help="Steps between validations [a sixth of the steps]."),
    patience: int = typer.Option(None, "--patience", help="Stop after so many validations without gain."),
    control: bool = typer.Option(None, "--control", help="Also train the weights for as many steps, and compare."),
    dtype: str = typer.Option(None, "--dtype", help="Of the weights: auto, float32, bfloat16."),
    adam_bits: int = typer.Option(None, "--adam-bits", help="32 (default), or 8: less memory, more time."),
    gradient_checkpointing: bool = typer.Option(None, "--gradient-checkpointing", help="Less memory, more time."),
    compile_layers: bool = typer.Option(None, "--compile", help="Compile the trained layers."),
    prefix: str = typer.Option(None, "--prefix", help="Cache states of the layers below in memory, on disk, or off."),
    save_every: int = typer.Option(None, "--save-every", help="Steps between checkpoints [as --eval-every]."),
    log_to: str = typer.Option(None, "--log-to", help="none, tensorboard (in OUT.logs) or wandb."),
    check_memory: bool = typer.Option(None, "--check-memory/--no-check-memory", help="Refuse what will not fit."),
    resume: bool = typer.Option(False, "--resume", help="Continue an interrupted run of the same settings."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing OUT."),
    as_json: bool = typer.Option(False, "--json", help="Print a summary for programs."),
) -> None:
    """Learn a mask for one domain over a fine-tuned base model.

    Every weight stays as it is; what is learnt is which 10 % of the chosen matrices to leave out. The best mask by
    validation is kept, the initial one included, and nothing is claimed when nothing was gained. Beside OUT, OUT.yaml
    says how to run it again (--config).

    \b
    mftmerge train --model HuggingFaceTB/SmolLM2-135M-Instruct --data code.jsonl -o code.mask
    mftmerge train -m base -d math.jsonl -o math.mask --layers 26-29 --steps 60 --eval-data val.jsonl --control
    """
    given = {k: v for k, v in locals().items() if v is not None and v != []}
    run, settings = _settings(given)
    for name in ("model", "data", "out"):
        if not run.get(name):
            raise BadInput(f"--{name} is missing; give it here or in --config")
    quiet()
    from mftmerge.train import inputs
    from mftmerge.train.run import train_mask

    main = inputs.is_main()
    bar = _Bar(int(settings.get("steps", 60))) if sys.stderr.isatty() and main and not as_json else None
    try:
        result = train_mask(
            run["model"],
            run["data"],
            run["out"],
            settings=settings,
            eval_data=run.get("eval_data"),
            resume=resume,
            overwrite=overwrite,
            progress=bar,
            note=lambda line: print(line, file=sys.stderr if as_json else sys.stdout) if main else None,
        )
    finally:
        if bar:
            bar.close()
    if not main:
        return
    if as_json:
        print_json(_summary(result, str(run["out"])))
    else:
        what = f"{len(result.mask.names)} tensors, density {result.mask.density():.4f}"
        print(f"{run['out']}: {what}, {result.seconds:.0f} s")


def _settings(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to train on, and the settings: the file's, then the options given."""
    for name in ("resume", "overwrite", "as_json"):
        given.pop(name, None)
    values: dict[str, Any] = {}
    if config := given.pop("config", None):
        from mftmerge.train.settings import RUN_KEYS, TrainSettings

        values = TrainSettings.load(config, RUN_KEYS)
    if "compile_layers" in given:
        given["compile"] = given.pop("compile_layers")
    if isinstance(given.get("weights"), str):
        try:
            given["weights"] = [float(w) for w in given["weights"].split(",")]
        except ValueError:
            raise BadInput(f"--weights {given['weights']}: give numbers such as 2,1") from None
    target = given.pop("target", None)
    if target not in (None, "weights", "delta"):
        raise BadInput(f"--target {target}: must be weights or delta")
    values |= given
    if (target == "delta") != bool(values.get("base")) and target is not None:
        raise BadInput("--target delta needs --base, the model that dropped weights go back to, and only it")
    from mftmerge.train.settings import RUN_KEYS

    return {k: values.pop(k) for k in RUN_KEYS if k in values}, values


def _summary(result: Any, out: str) -> dict[str, Any]:
    return {
        "out": out,
        "digest": result.mask.digest,
        "density": result.mask.density(),
        "best_step": result.best_step,
        "gained": result.gained,
        "stopped_early": result.stopped_early,
        "comparison": result.comparison,
        "history": result.history,
        "seconds": result.seconds,
    }


class _Bar:
    """A progress bar with loss, density and bits flipped."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=steps)
        self._validation = ""
        self._bar.start()

    def __call__(self, entry: dict[str, Any]) -> None:
        if entry.get("validation") is not None:
            self._validation = f"  validation {entry['validation']:.4f}"
        text = (
            f"loss {entry['loss']:.4f}  density {entry['density']:.3f}  flipped {entry['flipped']:,}{self._validation}"
        )
        self._bar.update(self._task, completed=entry["step"], description=text)

    def close(self) -> None:
        self._bar.stop()
