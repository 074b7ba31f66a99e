"""The two built-in domains: splits do not leak, answers are right, the draw is deterministic."""

from __future__ import annotations

import ast
import email
import re
import textwrap
from itertools import islice
from pathlib import Path

from mftmerge.quickstart.domains import (
    arithmetic_problems,
    arithmetic_splits,
    python_splits,
    standard_library_functions,
)

SIZES = {"train": 60, "validation": 12, "test": 20}


def test_arithmetic_answers_follow_from_their_own_steps() -> None:
    for row in islice(arithmetic_problems(seed=3), 500):
        *steps, answer = row["completion"].split("\n")
        for left, right in re.findall(r"([\d+*/ -]*\d) = \$?(\d+)", "\n".join(steps)):
            assert eval(left) == int(right), row
        result = re.findall(r"= \$?(\d+)", steps[-1])[-1]
        assert answer == f"#### {result}", row


def test_arithmetic_splits_are_disjoint_and_deterministic() -> None:
    first, second = arithmetic_splits(SIZES, seed=1), arithmetic_splits(SIZES, seed=1)
    assert first == second
    assert first != arithmetic_splits(SIZES, seed=2)
    prompts = [row["prompt"] for rows in first.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == sum(SIZES.values())


def test_python_rows_are_the_body_that_follows_the_docstring(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        'class A:\n    def f(self, x):\n        """Add one."""\n'
        "        y = x + 1\n        return y if y > 0 else None\n"
        '\ndef one_liner(): "doc"; return 1\n\ndef undocumented(x):\n    return [x, x, x, x, x, x, x, x]\n'
    )
    rows = [row for _, row in standard_library_functions(tmp_path)]
    assert [row["completion"] for row in rows] == ["    y = x + 1\n    return y if y > 0 else None"]
    assert rows[0]["prompt"].endswith('def f(self, x):\n    """Add one."""')


def test_python_functions_of_one_file_stay_in_one_split() -> None:
    root = Path(email.__file__).parent  # a part of the library: reading all of it takes seconds
    rows = python_splits(SIZES, root=root)
    home: dict[str, str] = {}
    for file, row in standard_library_functions(root):
        home.setdefault(row["completion"], file)  # of equal bodies the first is kept
    files = {split: {home[row["completion"]] for row in rows[split]} for split in rows}
    assert all(0 < len(rows[split]) <= size for split, size in SIZES.items())
    assert not files["train"] & files["test"]
    assert not files["train"] & files["validation"]
    for row in rows["train"]:
        head = row["prompt"].split("\n\n", 1)[1]
        ast.parse(textwrap.dedent(head) + "\n" + row["completion"])
