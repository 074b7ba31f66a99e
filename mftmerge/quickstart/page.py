"""The quickstart's results as a Markdown page."""

from __future__ import annotations

from mftmerge.evaluate.results import GridResult
from mftmerge.quickstart.plan import COMBINATIONS, DOMAINS, Plan


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
        "Rows: the base model; each mask; combinations of the two (vote cut to the density of one mask, score to its "
        "default); a random and a smallest-magnitude mask of the same density; the model built by `recipe.yml`; and, "
        "for comparison, as many steps of ordinary weight training on the same layers.\n\n"
        f"{found.to_markdown()}\n"
        f"{against_control(found)}\n{shares(found)}\n"
        f"An answer of the built model:\n\n{quote}\n\n"
        "![density of the intersection by layer](density.png)\n\n![overlap of what the masks prune](overlap.png)\n\n"
        f"Seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}; "
        f"peak memory {found.extra['peak_memory_bytes'] / 1e9:.1f} GB.\n"
    )


def against_control(found: GridResult) -> str:
    """Each mask against as many steps of weight training, on its own domain."""
    lines = []
    for domain in DOMAINS:
        d = found.difference(f"{domain} mask", domain, reference=f"weights trained on {domain}")
        lines.append(f"- {domain}: {d.mean:+.4f} ± {d.standard_error:.4f} ({d.verdict()})\n")
    return "Loss of each mask minus that of its control, on its own domain:\n\n" + "".join(lines)


def shares(found: GridResult) -> str:
    """What share of each mask's own gain the combinations keep; says so where there is no gain to keep."""
    gains = {domain: found.difference(f"{domain} mask", domain).mean for domain in DOMAINS}
    rows = [
        "Share of each mask's own gain that a combination keeps:\n",
        "| combination | " + " | ".join(DOMAINS) + " |",
    ]
    rows.append("| --- |" + " --- |" * len(DOMAINS))
    for name in (*COMBINATIONS, "recipe (average)"):
        kept = [
            f"{found.difference(name, domain).mean / gain:.0%}" if gain < 0 else "no gain to keep"
            for domain, gain in gains.items()
        ]
        rows.append(f"| {name} | " + " | ".join(kept) + " |")
    return "\n".join(rows) + "\n"
