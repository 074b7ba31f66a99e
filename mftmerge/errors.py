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
