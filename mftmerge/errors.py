"""The two kinds of error that mftmerge raises on purpose. Each message says what is wrong, where, and what to do."""


class MftmergeError(Exception):
    """A failure during the work (disk full, training diverged). The command line exits with code 1."""

    exit_code = 1


class BadInput(MftmergeError, ValueError):
    """Something the user gave is wrong (file, option, recipe). The command line exits with code 2."""

    exit_code = 2


def shown(text: str) -> str:
    """Text for a terminal: line breaks, escape sequences and all else that does not print become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# Package -> the extra that brings it. Inspecting, combining, comparing, applying and reporting need none of them.
EXTRAS = dict.fromkeys(("torch", "transformers", "accelerate", "datasets", "trl", "psutil", "pyarrow"), "train")
EXTRAS |= {
    "mergekit": "merge",
    "peft": "merge",
    "matplotlib": "plot",
    "gguf": "quickstart",
    "lm_eval": "lm-eval",
    "submitit": "jobs",
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install where an optional package is absent, in one line; None for a module that is none of ours."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"this needs {package}, which is not installed: pip install 'mftmerge[{EXTRAS[package]}]'"
