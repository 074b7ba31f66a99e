"""The quickstart's results as a Markdown page."""

from __future__ import annotations

from mftmerge.evaluate.results import GridResult, markdown_table

DOMAINS = ("python", "arithmetic")
COMBINATIONS = ("union", "intersection", "vote", "score")  # operations, and rows of the table
AVERAGE = "recipe (average)"  # the table's row of the model that the recipe builds
MERGED = "learnt merge of the trained models"  # and of the one that is merged from the controls


def page(found: GridResult) -> str:
    """The results as a Markdown page: what was done, the table, a generated answer, how long it took."""
    sample, plan = found.extra["sample"], found.extra["plan"]
    quote = "\n".join(f"> {line}" for line in f"{sample['prompt']}\n\n{sample['answer']}".splitlines())
    return (
        f"# Quickstart results: {plan['model']}\n\n"
        f"One mask a domain over the last four layers, {plan['sizes']['train']} training rows, {plan['steps']} steps "
        f"of {plan['batch_size']} rows; the best of the validated masks (step 0 included) is kept. Measured on "
        f"{' and '.join(str(facts['rows']) for facts in found.domains.values())} test rows that nothing was chosen "
        "on.\n\n"
        "Rows: the base model; each mask; combinations of the two (vote cut to the density of one mask, score to its "
        "default); a random and a smallest-magnitude mask of the same density; the model built by `recipe.yml`; for "
        "comparison, as many steps of ordinary weight training on the same layers; and these two trained models in "
        "one, by masks that `merge.yml` leaves to be learnt from the validation rows.\n\n"
        f"{found.to_markdown()}\n{_against_control(found)}\n{_shares(found)}\n"
        f"An answer of the built model:\n\n{quote}\n\n"
        "![density of the intersection by layer](density.png)\n\n![overlap of what the masks prune](overlap.png)\n\n"
        f"Seconds: {', '.join(f'{name} {value:.0f}' for name, value in found.extra['seconds'].items())}; "
        f"peak memory {found.extra['peak_memory_bytes'] / 1e9:.1f} GB.\n"
    )


def _against_control(found: GridResult) -> str:
    """Each mask against as many steps of weight training, on its own domain."""
    lines = ["Loss of each mask minus that of its control, on its own domain:\n"]
    for domain in DOMAINS:
        d = found.difference(f"{domain} mask", domain, reference=f"weights trained on {domain}")
        lines.append(f"- {domain}: {d.mean:+.4f} ± {d.standard_error:.4f} ({d.verdict()})")
    return "\n".join(lines) + "\n"


def _shares(found: GridResult) -> str:
    """What share of each mask's own gain the combinations keep; says so where there is no gain to keep."""

    def kept(name: str, domain: str, alone: str) -> str:
        gain = found.difference(alone, domain).mean
        return f"{found.difference(name, domain).mean / gain:.0%}" if gain < 0 else "no gain to keep"

    rows = [[name, *(kept(name, d, f"{d} mask") for d in DOMAINS)] for name in (*COMBINATIONS, AVERAGE)]
    rows.append([MERGED, *(kept(MERGED, d, f"weights trained on {d}") for d in DOMAINS)])
    table = "\n".join(markdown_table(["combination", *DOMAINS], rows))
    return f"Share that a combination keeps of what each mask, or trained model, gains alone:\n\n{table}\n"
