"""Write the tables and pictures of docs/results.md: `python -m research.combining.page` (after `collect.py`).

The page's prose is written by hand; what stands between `<!-- NAME -->` and `<!-- end -->` is replaced by the table of
that name, made from research/combining/results/*.json. A test checks that the page holds what this program would write.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mftmerge.files import replacing
from research.combining.pictures import picture_of_shares, picture_of_transfer
from research.combining.tables import Study, filled, markdown

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECORDS = Path(__file__).resolve().parent / "results"
LONG = {"math": "GSM8K", "sql": "WikiSQL", "python": "Python"}


def difference(study: Study, name: str, reference: str, domain: str) -> str:
    mean, error = study.difference(name, reference, domain)
    text = f"{mean:+.3f} ± {error:.3f}"
    return f"**{text}**" if mean > 2 * error else text


def share(study: Study, name: str, domain: str) -> str:
    value, low, high = study.share(name, domain)
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def own_gains(study: Study) -> str:
    """What single masks and single weight controls do on every domain."""
    rows = [["base", *(f"{study.loss('base', d):.3f}" for d in study.domains)]]
    own = [f"{d} {kind}" for kind in ("mask", "weights") for d in study.domains]
    for name in ["untrained mask", *own]:
        rows.append([name, *(difference(study, name, "base", d) for d in study.domains)])
    return markdown(["model", *(LONG[d] for d in study.domains)], rows)


def mask_against_control(study: Study) -> str:
    """Own masks minus own weight controls, and the spread over seeds."""
    rows = []
    for d in study.domains:
        seeds = [f"{x:+.3f}" for x in study.by_seed(f"{d} mask", d)]
        best = [str(x) for x in study.fact(f"{d} mask", "best_step")]
        rows.append([LONG[d], ", ".join(seeds), ", ".join(best), difference(study, f"{d} mask", f"{d} weights", d)])
    return markdown(["domain", "own mask minus base, by seed", "best step", "mask minus weights"], rows)


def combined(study: Study, every_seed: bool = True) -> list[str]:
    """Everything that serves all domains at once, for every seed or only some, best lowest validation share first."""
    single = {f"{d} {kind}" for d in study.domains for kind in ("mask", "weights")}
    names = [n for n in study.names(every_seed=every_seed) if n not in single]
    return sorted(names, key=study.validation_share, reverse=True)


def combinations_table(study: Study, every_seed: bool = True) -> str:
    """Differences from the base, shares of the own gain, and the lowest share by seed."""
    rows = []
    for name in combined(study, every_seed):
        by_seed = [min(s) for s in zip(*(study.shares_by_seed(name, d) for d in study.domains), strict=True)]
        density = [x for x in study.fact(name, "density") if x is not None]
        rows.append(
            [
                name,
                f"{sum(density) / len(density):.3f}" if density else "",
                *(difference(study, name, "base", d) for d in study.domains),
                *(share(study, name, d) for d in study.domains),
                ", ".join(f"{100 * s:.0f}" for s in by_seed),
                f"{100 * study.validation_share(name):.0f}",
            ]
        )
    names = [LONG[d] for d in study.domains]
    heads = ["combination", "density", *names, *(f"{n}, share kept" for n in names), "lowest, by seed", "validation"]
    return markdown(heads, rows)


def answer(study: Study) -> str:
    """The combinations that the answer speaks of, in brief."""
    masks_only = [n for n in combined(study) if "weights" not in n]
    spoken = {
        masks_only[0]: "chosen by validation rows",
        "score at 0.93": "the default of `--op score`",
        "score": "at the masks' own density",
        "task arithmetic of the weights 0.5": "no masks: the weight controls merged",
    }
    rows = []
    for name, what in spoken.items():
        by_seed = [min(s) for s in zip(*(study.shares_by_seed(name, d) for d in study.domains), strict=True)]
        seeds = ", ".join(f"{100 * s:.0f}" for s in by_seed)
        rows.append([f"{name} ({what})", *(share(study, name, d) for d in study.domains), seeds])
    return markdown(["share kept", *(LONG[d] for d in study.domains), "lowest, by seed"], rows)


def transfer_table(study: Study) -> str:
    """Masks on other models: differences from the same model without a mask."""
    targets = sorted({n.rsplit("/", 1)[0] for n in study.names()})
    rows = []
    for target in targets:
        bare = f"{target}/no mask"
        rows.append([f"**{target}**, loss", *(f"{study.loss(bare, d):.3f}" for d in study.domains)])
        for kind in ("untrained mask", "random mask", "combined mask"):
            rows.append([kind, *(difference(study, f"{target}/{kind}", bare, d) for d in study.domains)])
        for kind in ("mask", "task vector"):
            cells = [difference(study, f"{target}/{d} {kind}", bare, d) for d in study.domains]
            rows.append([f"the domain's own {kind}", *cells])
    return markdown(["model", *(LONG[d] for d in study.domains)], rows)


def blocks() -> dict[str, Callable[[], str]]:
    """Name of a block on the page -> its table."""
    instruct, transfer = (Study.load(RECORDS / f"{name}.json") for name in ("instruct", "transfer"))
    return {
        "answer": lambda: answer(instruct),
        "gains": lambda: own_gains(instruct),
        "control": lambda: mask_against_control(instruct),
        "combinations": lambda: combinations_table(instruct),
        "fewer seeds": lambda: combinations_table(instruct, every_seed=False),
        "transfer": lambda: transfer_table(transfer),
    }


def page(text: str) -> str:
    """A page with every block made again."""
    return filled(text, blocks())


def main() -> None:
    path = DOCS / "results.md"
    with replacing(path) as temporary:
        temporary.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
    study = Study.load(RECORDS / "instruct.json")
    picture_of_shares(study, combined(study), DOCS / "results" / "shares.png")
    picture_of_transfer(Study.load(RECORDS / "transfer.json"), DOCS / "results" / "transfer.png")


if __name__ == "__main__":
    main()
