"""Two real domains that need no download: Python functions of the standard library, and arithmetic word problems.

Rows are `{"prompt": ..., "completion": ...}`, split into train, validation and test. Functions are split by source
file, so that two methods of one class never sit on both sides; word problems are split after removing duplicates.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from mftmerge.files import write_text

Row = dict[str, str]
Splits = dict[str, list[Row]]

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "turtledemo", "encodings"}


def standard_library_functions(root: Path | None = None, longest: int = 480) -> Iterator[tuple[str, Row]]:
    """Pairs (source file, row) for the functions under `root` that have a docstring; `longest` bounds characters.

    The prompt holds the signature and the docstring, the completion the body.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED & set(relative.parts[:-1]):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (row := _function_row(node, lines, longest)):
                yield str(relative), row


def _function_row(node: ast.FunctionDef, lines: list[str], longest: int) -> Row | None:
    documentation = ast.get_docstring(node)
    if not documentation or len(node.body) < 2 or node.body[1].lineno <= (node.body[0].end_lineno or 0):
        return None
    docstring_end = node.body[0].end_lineno or 0
    head = textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring_end]))
    body = textwrap.dedent("\n".join(lines[docstring_end : node.end_lineno])).strip("\n")
    if not (30 <= len(body) <= longest and len(head) <= longest):
        return None
    prompt = f"Complete this Python function. Answer with its body only.\n\n{head}"
    return {"prompt": prompt, "completion": textwrap.indent(body, "    ")}


_NAMES = (
    *("Ada", "Ben", "Chloe", "Dario", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas"),
    *("Kim", "Lena", "Omar", "Priya"),
)
_THINGS = ("apples", "pencils", "stickers", "marbles", "books", "tickets", "shells", "cookies", "stamps", "coins")


def _shop(r: random.Random) -> Row:
    name, thing = r.choice(_NAMES), r.choice(_THINGS)
    n, price = r.randint(3, 12), r.randint(2, 15)
    total = n * price
    paid = total + r.randint(1, 40)
    return {
        "prompt": f"{name} buys {n} {thing} that cost ${price} each and pays with ${paid}. How much change is due?",
        "completion": f"The {thing} cost {n} * {price} = ${total}.\nThe change is {paid} - {total} = ${paid - total}.\n"
        f"#### {paid - total}",
    }


def _share(r: random.Random) -> Row:
    name, other, thing = *r.sample(_NAMES, 2), r.choice(_THINGS)
    friends, each, extra = r.randint(2, 9), r.randint(3, 20), r.randint(2, 30)
    start = friends * each - extra
    if start < 2:
        start, extra = friends * each - 1, 1
    return {
        "prompt": f"{name} has {start} {thing}. {other} gives {name} {extra} more. "
        f"{name} then shares all of them equally among {friends} friends. How many {thing} does each friend get?",
        "completion": f"{name} has {start} + {extra} = {start + extra} {thing}.\n"
        f"Each friend gets {start + extra} / {friends} = {each} {thing}.\n#### {each}",
    }


def _work(r: random.Random) -> Row:
    name = r.choice(_NAMES)
    rate, hours, days, spent = r.randint(8, 30), r.randint(2, 8), r.randint(2, 6), r.randint(5, 90)
    week = rate * hours * days
    spent = min(spent, week - 1)
    return {
        "prompt": f"{name} earns ${rate} an hour and works {hours} hours a day for {days} days, then spends ${spent}. "
        "How much money is left?",
        "completion": f"A day brings {rate} * {hours} = ${rate * hours}.\n{days} days bring {rate * hours} * {days} = "
        f"${week}.\nAfter spending, {week} - {spent} = ${week - spent} is left.\n#### {week - spent}",
    }


def _travel(r: random.Random) -> Row:
    name = r.choice(_NAMES)
    speed, hours, second, more = r.randint(20, 80), r.randint(2, 6), r.randint(20, 80), r.randint(1, 5)
    total = speed * hours + second * more
    return {
        "prompt": f"{name} drives {hours} hours at {speed} km per hour and then {more} hours at {second} km per hour. "
        "How far does the trip go?",
        "completion": f"The first part is {hours} * {speed} = {hours * speed} km.\n"
        f"The second part is {more} * {second} = {more * second} km.\n"
        f"Together that is {hours * speed} + {more * second} = {total} km.\n#### {total}",
    }


def _percent(r: random.Random) -> Row:
    name, thing = r.choice(_NAMES), r.choice(_THINGS)
    share = r.choice([10, 20, 25, 50])
    total = r.randint(2, 20) * 20
    sold = total * share // 100
    return {
        "prompt": f"{name} has {total} {thing} and sells {share}% of them. How many {thing} are left?",
        "completion": f"{name} sells {total} * {share} / 100 = {sold} {thing}.\nThat leaves {total} - {sold} = "
        f"{total - sold} {thing}.\n#### {total - sold}",
    }


def _times(r: random.Random) -> Row:
    a, b, c = r.sample(_NAMES, 3)
    thing, n, factor, more = r.choice(_THINGS), r.randint(3, 25), r.randint(2, 6), r.randint(2, 20)
    second, third = n * factor, n * factor + more
    return {
        "prompt": f"{a} collects {n} {thing}. {b} collects {factor} times as many as {a}, "
        f"and {c} collects {more} more than {b}. How many {thing} do they have together?",
        "completion": f"{b} has {n} * {factor} = {second} {thing}.\n{c} has {second} + {more} = {third} {thing}.\n"
        f"Together they have {n} + {second} + {third} = {n + second + third} {thing}.\n#### {n + second + third}",
    }


_TEMPLATES: tuple[Callable[[random.Random], Row], ...] = (_shop, _share, _work, _travel, _percent, _times)


def arithmetic_problems(seed: int = 0) -> Iterator[Row]:
    """An endless stream of distinct word problems with worked answers that end in `#### N`."""
    r, seen = random.Random(seed), set[str]()
    while True:
        row = r.choice(_TEMPLATES)(r)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def python_splits(sizes: dict[str, int], seed: int = 0, root: Path | None = None, longest: int = 480) -> Splits:
    """Functions split by source file: a file's hash decides its split, then rows are shuffled and cut to size.

    longest: bound on the characters of head and body. There can be fewer rows than asked for.
    """
    total = sum(sizes.values())
    bounds, edge = [], 0.0
    for name, size in sizes.items():
        edge += size / total
        bounds.append((edge, name))
    rows: Splits = {name: [] for name in sizes}
    seen: set[str] = set()
    for file, row in standard_library_functions(root, longest):
        if row["completion"] in seen:  # the same body twice would leak between splits
            continue
        seen.add(row["completion"])
        place = int.from_bytes(hashlib.blake2b(file.encode(), digest_size=6).digest(), "big") / 2**48
        rows[next((name for bound, name in bounds if place < bound), bounds[-1][1])].append(row)
    for name in rows:
        random.Random(f"{seed}{name}").shuffle(rows[name])
        rows[name] = rows[name][: sizes[name]]
    return rows


def arithmetic_splits(sizes: dict[str, int], seed: int = 0) -> Splits:
    """Word problems, cut one after the other from one stream without duplicates."""
    stream = arithmetic_problems(seed)
    return {name: [next(stream) for _ in range(size)] for name, size in sizes.items()}


def write_domains(
    directory: Path, sizes: dict[str, int], seed: int = 0, longest: int = 480
) -> dict[str, dict[str, Path]]:
    """Write `DOMAIN-SPLIT.jsonl` files into `directory`; returns domain -> split -> path."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, Path]] = {}
    python, arithmetic = python_splits(sizes, seed, longest=longest), arithmetic_splits(sizes, seed)
    for domain, splits in (("python", python), ("arithmetic", arithmetic)):
        for split, rows in splits.items():
            path = directory / f"{domain}-{split}.jsonl"
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            paths.setdefault(domain, {})[split] = path
    return paths
