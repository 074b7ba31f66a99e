"""The two kinds of error that mftmerge raises on purpose. Each message says what is wrong, where, and what to do.

Messages name settings as the command line does (`--overwrite`); where Python reads them, they name arguments instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_on_terminal = False  # whether a user of the command line reads, who types options

OPTION = re.compile(r"(?<![\w`-])--([a-z][a-z0-9-]*)(?: ([a-z]+[0-9]*|[0-9.]+)(?=[\s,;:.)]|$))?(?![\w-])")
FLAGS = {
    *("overwrite", "resume", "archive", "elect", "scores", "control", "allow-different-init", "allow-lost", "cuda"),
    *("allow-crimes", "trust-remote-code", "require-base", "run-tests", "follow-links", "gradient-checkpointing"),
    *("packing", "compile", "check-memory", "skip-bad-rows", "check-base", "require-finite", "lazy-unpickle"),
    *("reference-rounding", "reference-schedule", "keep-last", "copy-tokenizer"),
}
OTHER_NAMES = {"i-trust-this-code": "trusted=True", "lambda": "strength", "try": "candidates", "bootstrap": "resamples"}
VALUES = {"abstain", "keep", "weights", "delta", "float32", "bfloat16", "magnitude", "tall", "sign", "cpu", "cuda"}


def worded(text: str) -> str:
    """A message for whoever reads: for Python `overwrite=True` and `dtype='float32'` where it names options.

    What stands between backticks is a command and stays one.
    """
    if _on_terminal or "--" not in text:
        return text
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else OPTION.sub(_argument, p) for p in parts)


def _argument(match: re.Match[str]) -> str:
    option, value = match[1], match[2]
    name, after = option.replace("-", "_"), f" {value}" if value else ""
    if option in OTHER_NAMES:
        return OTHER_NAMES[option] + after
    if option in FLAGS:
        return f"{name}=True{after}"
    if option.startswith("no-") and option[3:] in FLAGS:
        return f"{name[3:]}=False{after}"
    if value and (value in VALUES or value[0].isdigit()):
        return f"{name}={value}" if value[0].isdigit() else f"{name}={value!r}"
    return name + after


@contextmanager
def terminal() -> Iterator[None]:
    """Inside, messages speak of options: the command line's whole run."""
    global _on_terminal
    before, _on_terminal = _on_terminal, True
    try:
        yield
    finally:
        _on_terminal = before


class MftmergeError(Exception):
    """A failure during the work (disk full, training diverged). The command line exits with code 1."""

    exit_code = 1

    def __str__(self) -> str:
        return worded(super().__str__())


class BadInput(MftmergeError, ValueError):
    """Something the user gave is wrong (file, option, recipe). The command line exits with code 2."""

    exit_code = 2


def shown(text: str) -> str:
    """Text for a terminal: line breaks, escape sequences and all else that does not print become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# Package -> the extra that brings it. Inspecting, combining, comparing, applying and reporting need none of them.
TRAIN = ("torch", "transformers", "accelerate", "datasets", "trl", "psutil", "pyarrow", "pandas")
EXTRAS = dict.fromkeys(TRAIN, "train")
EXTRAS |= {
    "mergekit": "merge",
    "peft": "merge",
    "matplotlib": "plot",
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "numba"), "serve"),
    "gguf": "quickstart",
    "lm_eval": "lm-eval",
    "submitit": "jobs",
    "optuna": "search",
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install where an optional package is absent, in one line; None for a module that is none of ours."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"this needs {package}, which is not installed: pip install 'mftmerge[{EXTRAS[package]}]'"
