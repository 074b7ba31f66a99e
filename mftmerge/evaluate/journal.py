"""Answers on disk while an evaluation runs, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mftmerge.files import writing


class Journal:
    """The answers to one domain's rows by one model, in a file that several share.

    path: JSON lines; created with the first answer. facts: all that decides the answers (weights, mask, rows, length).
    answers: number of a row -> token ids of its answer. A line that a crash cut off is left out.
    """

    def __init__(self, path: Path, facts: object) -> None:
        self.path = path
        self.key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.answers: dict[int, list[int]] = {}
        written = path.read_text(encoding="utf-8") if path.exists() else ""
        self._torn = bool(written) and not written.endswith("\n")
        for line in written.splitlines():
            try:
                entry = json.loads(line)
                if entry["key"] == self.key:
                    self.answers[int(entry["row"])] = [int(i) for i in entry["ids"]]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, row: int, ids: list[int]) -> None:
        """Put an answer on record."""
        self.answers[row] = ids
        with writing(self.path), self.path.open("a", encoding="utf-8") as f:
            f.write("\n" * self._torn + json.dumps({"key": self.key, "row": row, "ids": ids}) + "\n")
        self._torn = False
