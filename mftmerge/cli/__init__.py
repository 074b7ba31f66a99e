"""The command line. Each command lives in a small file of its own that imports heavy modules only when it runs."""

from mftmerge.cli.main import main

__all__ = ["main"]
