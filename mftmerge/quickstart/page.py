"""The quickstart's results as a Markdown page."""

from __future__ import annotations

from mftmerge.quickstart.plan import Plan
from mftmerge.results import GridResult


def page(found: GridResult, plan: Plan) -> str:
    """The results as a Markdown page: what was done, the table, a generated answer, how long it took."""
    sample, seconds = found.extra["sample"], found.extra["seconds"]
    quote = "\n".join(f"> {line}" for line in f"{sample['prompt']}\n\n{sample['answer']}".splitlines())
    return (
        f"# Quickstart results: {plan.model}\n\n"
        f"One mask a domain over the last four layers, {plan.sizes['train']} training rows, {plan.steps} steps of "
        f"{plan.batch_size} rows; the best of the validated masks (step 0 included) is kept. Measured on "
        f"{' and '.join(str(facts['rows']) for facts in found.domains.values())} test rows that nothing was chosen "
        "on.\n\n"
        "Rows: the base model; each mask; combinations of the two (vote and score are cut to the density of one mask); "
        "a random and a smallest-magnitude mask of the same density; the model built by `recipe.yml`; and, for "
        "comparison, as many steps of ordinary weight training on the same layers.\n\n"
        f"{found.to_markdown()}\n"
        f"An answer of the built model:\n\n{quote}\n\n"
        "![density of the intersection by layer](density.png)\n\n![overlap of what the masks prune](overlap.png)\n\n"
        f"Seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}; "
        f"peak memory {found.extra['peak_memory_bytes'] / 1e9:.1f} GB.\n"
    )
