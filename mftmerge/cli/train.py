"""`mftmerge train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mftmerge.cli.options import ROWS, YAML, AsJson, Overwrite, files, options
from mftmerge.cli.progress import shown_progress
from mftmerge.cli.reporting import print_json, quiet, say
from mftmerge.errors import BadInput
from mftmerge.learn.settings import LearnSettings
from mftmerge.train.settings import RUN_KEYS, TrainSettings

RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="Learn the open masks of this recipe instead.", autocompletion=files(*YAML)),
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="The fine-tuned base model: checkpoint directory or hub id.")
]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help="Rows: .jsonl, .json, .parquet or a hub id. May be repeated.",
        autocompletion=files(*ROWS),
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of settings; options given here win over it.", autocompletion=files(*YAML)),
]
EvalData = Annotated[
    str | None,
    typer.Option(help="Rows to validate on. Default: a share of the data held out.", autocompletion=files(*ROWS)),
]
Target = Annotated[
    Literal["weights", "delta"] | None, typer.Option(help="Mask the weights (default) or the delta from --base.")
]


@options(given=TrainSettings, learning=LearnSettings)
def command(
    *,
    recipe: RecipeFile = None,
    model: Model = None,
    data: Data = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The .mask file to write; of a recipe, a directory.")
    ] = None,
    config: Config = None,
    eval_data: EvalData = None,
    target: Target = None,
    given: dict[str, Any],
    learning: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same settings.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Learn a mask for one domain over a fine-tuned base model, or with --recipe all open masks of a merge.

    Every weight stays as it is; what is learnt is which 10 % of the chosen matrices to leave out. The best mask by
    validation is kept, the initial one included, and nothing is claimed when nothing was gained. Beside OUT, OUT.yaml
    says how to run it again (--config).

    \b
    mftmerge train --model HuggingFaceTB/SmolLM2-135M-Instruct --data code.jsonl -o code.mask
    mftmerge train -m base -d math.jsonl -o math.mask --layers 26-29 --steps 60 --eval-data val.jsonl --control
    mftmerge train --recipe recipe.yml -o learnt
    """
    if recipe is not None:
        if stray := [
            n for n, v in {"model": model, "data": data, "eval-data": eval_data, "target": target}.items() if v
        ]:
            raise BadInput(f"--{stray[0]}: has no place beside --recipe, which says what is learnt from what")
        if stray := sorted(given.keys() - learning.keys()):
            raise BadInput(f"--{stray[0].replace('_', '-')}: has no meaning with --recipe")
        _learn(recipe, out, config, learning, resume=resume, overwrite=overwrite, as_json=as_json)
        return
    if stray := sorted(learning.keys() - given.keys()):
        raise BadInput(f"--{stray[0].replace('_', '-')}: belongs to --recipe")
    values = TrainSettings.load(config, RUN_KEYS) if config else {}
    here = {"model": model, "data": data, "eval_data": eval_data, "out": out}
    values |= {k: v for k, v in here.items() if v} | given
    run = {k: values.pop(k, None) for k in RUN_KEYS}
    for name in ("model", "data", "out"):
        if not run[name]:
            raise BadInput(f"--{name} is missing; give it here or in --config")
    if target and (target == "delta") != bool(values.get("base")):
        raise BadInput("--target delta needs --base, the model that dropped weights go back to, and only it")

    quiet()
    from mftmerge.train import sharding
    from mftmerge.train.run import train_mask

    main = sharding.is_main()  # one process of several that train together speaks
    with shown_progress(quiet=as_json or not main) as show:
        result = train_mask(
            run["model"],
            run["data"],
            run["out"],
            settings=values,
            eval_data=run["eval_data"],
            resume=resume,
            overwrite=overwrite,
            progress=show,
            note=lambda line: say(line, error=as_json) if main else None,
        )
    if not main:
        return
    if as_json:
        names = ("best_step", "gained", "stopped_early", "comparison", "history", "seconds")
        facts = {name: getattr(result, name) for name in names}
        mask = result.mask
        print_json({"out": str(run["out"]), "digest": mask.digest, "density": mask.density(), **facts})
    else:
        what = f"{len(result.mask.names)} tensors, density {result.mask.density():.4f}"
        say(f"wrote {run['out']} ({what}) and {run['out']}.yaml (its settings) in {result.seconds:.0f} s")
        test = "next: mftmerge eval --model {} --mask {} --data test.jsonl, on rows that nothing was chosen on"
        more = "next: more rows, more --steps or another --lr; --control shows what training weights gives"
        say(test.format(run["model"], run["out"]) if result.gained else more)


def _learn(
    recipe: Path,
    out: Path | None,
    config: Path | None,
    given: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """`mftmerge train --recipe`."""
    if out is None:
        raise BadInput("--out is missing; give the directory for the masks and their recipe")
    quiet()
    from mftmerge.learn.run import learn_merge
    from mftmerge.train import sharding

    main = sharding.is_main()  # one process of several that learn together speaks
    with shown_progress(quiet=as_json or not main) as show:
        result = learn_merge(
            recipe,
            out,
            settings=(LearnSettings.load(config) if config else {}) | given,
            resume=resume,
            overwrite=overwrite,
            progress=show,
            note=lambda line: say(line, error=as_json) if main else None,
        )
    if not main:
        return
    if as_json:
        names = ("best_step", "gained", "stopped_early", "domains", "history", "seconds")
        made = {n: {"digest": m.digest, "density": m.density()} for n, m in result.masks.items()}
        print_json({"out": str(out), "masks": made, **{name: getattr(result, name) for name in names}})
        return
    masks = ", ".join(f"{n}.mask (density {m.density():.2f})" for n, m in result.masks.items())
    say(f"wrote {out}: {masks} and recipe.yml in {result.seconds:.0f} s")
    say(f"next: mftmerge build {out / 'recipe.yml'} -o MERGED")
