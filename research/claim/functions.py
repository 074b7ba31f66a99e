"""Small Python functions with tests, for pass@1: 300 of 75 kinds, in the form of the study's Python rows.

The standard library's functions, which the Python base is tuned on, have no tests that a body alone could be judged by.
These have: what is asked is said in the docstring, and calls with their results decide. Functions of one kind differ in
a number or a letter, and mostly pass or fail together: errors are those over kinds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mftmerge.data import Row
from mftmerge.evaluate import sandbox
from mftmerge.evaluate.generation import code

ASKED = "Complete this Python function. Answer with its body only.\n\n"
VARIANTS = 4
# What a function of one kind is called with, by the kind's number and letter: these decide, so that they are among it.
INPUTS: dict[str, Callable[[int, str], list[tuple[Any, ...]]]] = {
    "number": lambda k, c: [(n,) for n in (0, 3, -4, 12, 25, 100, k, k + 1, 2 * k)],
    "optional": lambda k, c: [(None,), (0,), (k,), (k + 1,)],
    "pair": lambda k, c: [(1, 2), (0, -5), (10, 30), (7, 7), (k, k + 1), (k + 1, 1), (40, 40)],
    "text": lambda k, c: [(t,) for t in ("", "banana", "Hello World", "a1b2 c3", c, f"{c}x{c}y{c}", "z" * 19 + c)],
    "words": lambda k, c: [(t,) for t in ("red green blue", "one", f"the cat {c}at on a m{c}t", "x yy zzz")],
    "list of words": lambda k, c: [(["a", "b"],), ([],), (["one"],)],
    "list": lambda k, c: [([],), ([3, 1, 2],), ([k, k + 1, 30, 40],), ([k + 1, 20],), ([-7, 12, 0, 9, k - 1],)],
    "full list": lambda k, c: [([3, 1, 2],), ([5, 5, -1, 8],), ([k, k + 1, 30, 40],), ([-7, 12, 0, 9, k - 1],)],
    "table": lambda k, c: [({},), ({"a": 1, c: 5},), ({"x": k, "y": -3, "a": k, "z": k + 1},)],
}
# Name, parameters, docstring, the body's expression, and the name of what it is called with; {k} is a number,
# {c} a letter, other ones in each variant.
KINDS: tuple[tuple[str, str, str, str, str], ...] = (
    ("add_{k}", "n", "Return n plus {k}.", "n + {k}", "number"),
    ("subtract_{k}", "n", "Return n minus {k}.", "n - {k}", "number"),
    ("times_{k}", "n", "Return n multiplied by {k}.", "n * {k}", "number"),
    ("half_plus_{k}", "n", "Return half of n plus {k}.", "n / 2 + {k}", "number"),
    ("whole_parts_of_{k}", "n", "Return how many times {k} fits into n, rounded down.", "n // {k}", "number"),
    ("remainder_{k}", "n", "Return the remainder of n divided by {k}.", "n % {k}", "number"),
    ("is_multiple_of_{k}", "n", "Return True if n is a multiple of {k}.", "n % {k} == 0", "number"),
    ("is_above_{k}", "n", "Return True if n is greater than {k}.", "n > {k}", "number"),
    ("is_below_{k}", "n", "Return True if n is smaller than {k}.", "n < {k}", "number"),
    ("is_{k}", "n", "Return True if n is equal to {k}.", "n == {k}", "number"),
    ("is_not_{k}", "n", "Return True if n is not equal to {k}.", "n != {k}", "number"),
    ("between_0_and_{k}", "n", "Return True if n is at least 0 and at most {k}.", "0 <= n <= {k}", "number"),
    ("even_and_above_{k}", "n", "Return True if n is even and greater than {k}.", "n % 2 == 0 and n > {k}", "number"),
    ("at_most_{k}", "n", "Return the smaller one of n and {k}.", "min(n, {k})", "number"),
    ("at_least_{k}", "n", "Return the larger one of n and {k}.", "max(n, {k})", "number"),
    ("distance_to_{k}", "n", "Return the absolute difference of n and {k}.", "abs(n - {k})", "number"),
    ("negative_plus_{k}", "n", "Return minus n plus {k}.", "-n + {k}", "number"),
    ("square_plus_{k}", "n", "Return the square of n plus {k}.", "n ** 2 + {k}", "number"),
    ("double_minus_{k}", "n", "Return twice n minus {k}.", "2 * n - {k}", "number"),
    ("text_of_n_and_{k}", "n", "Return n as a string followed by '{k}'.", "str(n) + '{k}'", "number"),
    ("numbers_from_{k}", "n", "Return a list with n and {k}.", "[n, {k}]", "number"),
    ("pair_with_{k}", "n", "Return the tuple of n and {k}.", "(n, {k})", "number"),
    (
        "multiples_{k}",
        "n",
        "Return a list of the first {k} multiples of n.",
        "[n * i for i in range(1, {k} + 1)]",
        "number",
    ),
    ("sign_times_{k}", "n", "Return {k} if n is positive, otherwise minus {k}.", "{k} if n > 0 else -{k}", "number"),
    ("default_{k}", "n", "Return n, or {k} if n is None.", "{k} if n is None else n", "optional"),
    ("add_both_{k}", "a, b", "Return the sum of a and b and {k}.", "a + b + {k}", "pair"),
    ("product_{k}", "a, b", "Return {k} times the product of a and b.", "{k} * a * b", "pair"),
    ("difference_plus_{k}", "a, b", "Return a minus b plus {k}.", "a - b + {k}", "pair"),
    ("weighted_{k}", "a, b", "Return a plus {k} times b.", "a + {k} * b", "pair"),
    ("larger_plus_{k}", "a, b", "Return the larger one of a and b plus {k}.", "max(a, b) + {k}", "pair"),
    ("sum_is_above_{k}", "a, b", "Return True if a plus b is greater than {k}.", "a + b > {k}", "pair"),
    ("both_above_{k}", "a, b", "Return True if a and b are both greater than {k}.", "a > {k} and b > {k}", "pair"),
    ("any_above_{k}", "a, b", "Return True if a or b is greater than {k}.", "a > {k} or b > {k}", "pair"),
    ("close_{k}", "a, b", "Return True if a and b differ by less than {k}.", "abs(a - b) < {k}", "pair"),
    ("count_{c}", "text", "Return how often the letter {c} is in text.", "text.count('{c}')", "text"),
    ("has_{c}", "text", "Return True if the letter {c} is in text.", "'{c}' in text", "text"),
    ("lacks_{c}", "text", "Return True if the letter {c} is not in text.", "'{c}' not in text", "text"),
    ("find_{c}", "text", "Return the index of the first {c} in text, or -1.", "text.find('{c}')", "text"),
    ("starts_with_{c}", "text", "Return True if text starts with {c}.", "text.startswith('{c}')", "text"),
    ("ends_with_{c}", "text", "Return True if text ends with {c}.", "text.endswith('{c}')", "text"),
    ("without_{c}", "text", "Return text without the letter {c}.", "text.replace('{c}', '')", "text"),
    ("dash_for_{c}", "text", "Return text with every {c} replaced by a dash.", "text.replace('{c}', '-')", "text"),
    (
        "split_at_{c}",
        "text",
        "Return the list of the parts of text between the letters {c}.",
        "text.split('{c}')",
        "text",
    ),
    ("prefix_{c}", "text", "Return {c} followed by text.", "'{c}' + text", "text"),
    ("suffix_{c}", "text", "Return text followed by {c}.", "text + '{c}'", "text"),
    ("around_{c}", "text", "Return text with {c} before and after it.", "'{c}' + text + '{c}'", "text"),
    ("upper_plus_{c}", "text", "Return text in upper case followed by {c}.", "text.upper() + '{c}'", "text"),
    ("lower_plus_{c}", "text", "Return text in lower case followed by {c}.", "text.lower() + '{c}'", "text"),
    ("strip_{c}", "text", "Return text without {c} at its start and end.", "text.strip('{c}')", "text"),
    ("is_{c}_or_empty", "text", "Return True if text is empty or {c}.", "text == '' or text == '{c}'", "text"),
    ("first_{k}", "text", "Return the first {k} characters of text.", "text[:{k}]", "text"),
    ("after_{k}", "text", "Return text without its first {k} characters.", "text[{k}:]", "text"),
    ("last_{k}", "text", "Return the last {k} characters of text.", "text[-{k}:]", "text"),
    ("longer_than_{k}", "text", "Return True if text has more than {k} characters.", "len(text) > {k}", "text"),
    ("length_plus_{k}", "text", "Return the length of text plus {k}.", "len(text) + {k}", "text"),
    ("repeat_{k}", "text", "Return text repeated {k} times.", "text * {k}", "text"),
    ("pad_{k}", "text", "Return text with spaces after it up to a length of {k}.", "text.ljust({k})", "text"),
    (
        "words_with_{c}",
        "text",
        "Return a list of the words of text with a {c}.",
        "[w for w in text.split() if '{c}' in w]",
        "words",
    ),
    ("words_plus_{k}", "text", "Return the number of words in text plus {k}.", "len(text.split()) + {k}", "words"),
    (
        "join_with_{c}",
        "words",
        "Return the words joined with {c} between them.",
        "'{c}'.join(words)",
        "list of words",
    ),
    ("append_{k}", "values", "Return the list values with {k} appended.", "values + [{k}]", "list"),
    ("insert_{k}", "values", "Return a list of {k} followed by the values.", "[{k}] + values", "list"),
    ("take_{k}", "values", "Return the first {k} items of the list values.", "values[:{k}]", "list"),
    ("drop_{k}", "values", "Return the list values without its first {k} items.", "values[{k}:]", "list"),
    ("sum_plus_{k}", "values", "Return the sum of the list values plus {k}.", "sum(values) + {k}", "list"),
    ("size_plus_{k}", "values", "Return the number of values plus {k}.", "len(values) + {k}", "list"),
    ("contains_{k}", "values", "Return True if {k} is in the list values.", "{k} in values", "list"),
    ("above_{k}", "values", "Return a list of the values greater than {k}.", "[v for v in values if v > {k}]", "list"),
    (
        "count_above_{k}",
        "values",
        "Return how many values are greater than {k}.",
        "sum(v > {k} for v in values)",
        "list",
    ),
    (
        "all_above_{k}",
        "values",
        "Return True if all values are greater than {k}.",
        "all(v > {k} for v in values)",
        "list",
    ),
    ("scale_{k}", "values", "Return a list of the values multiplied by {k}.", "[v * {k} for v in values]", "list"),
    ("max_plus_{k}", "values", "Return the largest of the values plus {k}.", "max(values) + {k}", "full list"),
    ("last_plus_{k}", "values", "Return the last of the values plus {k}.", "values[-1] + {k}", "full list"),
    ("get_{c}", "table", "Return the value of the key {c} in table, or None.", "table.get('{c}')", "table"),
    (
        "keys_with_{k}",
        "table",
        "Return a list of the keys of table whose value is {k}.",
        "[x for x in table if table[x] == {k}]",
        "table",
    ),
)


def rows() -> list[Row]:
    """prompt, completion (a body that is right), head (the function up to its body), tests."""
    draw, found = random.Random("functions"), []
    for name, parameters, doc, body, inputs in KINDS:
        numbers, letters = draw.sample(range(2, 20), VARIANTS), draw.sample("abdelnoprstuvw", VARIANTS)
        for k, c in zip(numbers, letters, strict=True):
            called = name.format(k=k, c=c)
            head = f'def {called}({parameters}):\n    """{doc.format(k=k, c=c)}"""'
            known: dict[str, Any] = {}
            own = f"    return {body.format(k=k, c=c)}"
            exec(f"{head}\n{own}", known)  # a line of this file
            tests = [f"assert {called}(*{call!r}) == {known[called](*call)!r}" for call in INPUTS[inputs](k, c)]
            found.append({"prompt": ASKED + head, "completion": own, "head": head, "tests": "\n".join(tests)})
    return found


def passed(asked: Sequence[Row], answers: Sequence[str]) -> np.ndarray:
    """Of each answer, whether the function that it completes passes its tests: 1 or 0, (rows,).

    An answer is a body; one that repeats the function's head is taken as it is, as the later definition counts.
    """
    jobs = []
    for row, answer in zip(asked, answers, strict=True):
        body = code(answer)
        program = body if body.lstrip().startswith("def ") else f"{row['head']}\n{body}"
        jobs.append((program, str(row["tests"])))
    return np.array([float(outcome.passed) for outcome in sandbox.run_all(jobs)])
