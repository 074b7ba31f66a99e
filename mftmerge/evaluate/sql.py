"""Whether two SQL queries select the same: run on the row's own tables, or on tables made up for the two.

A row may carry `tables`, a script that creates and fills its tables; queries then run on these. Without it, queries of
the form that WikiSQL has, `SELECT [MAX] column FROM table [WHERE column = value AND ...];` with values in quotes or
not, run on tables made up so that every condition of either query decides something: two queries that select the same
from all of them mean the same, whatever their text. SQLite runs them, in memory, reading only, for a bounded time.
"""

from __future__ import annotations

import random
import re
import sqlite3
from dataclasses import dataclass

from mftmerge.errors import BadInput

TABLES, ROWS = 80, 9  # made up for a pair of queries; small ones, so that a row decides a MAX
TICKS, TICK = 2000, 1000  # a query may take so many times 1,000 of SQLite's instructions
QUERY = re.compile(
    r"\s*SELECT\s+(?:(MIN|MAX|COUNT|SUM|AVG)[\s(]+)?(\S+?)\)?\s+FROM\s+(\S+?)(?:\s+WHERE\s+(.+?))?\s*;?\s*", re.I | re.S
)
CONDITION = re.compile(r"(\S+)\s*(=|<=|>=|<|>|!=)\s*(.+)", re.S)
AND = re.compile(r"""\s+AND\s+(?=(?:[^"]*"[^"]*")*[^"]*$)""", re.I)  # outside of quotes
Value = float | str


@dataclass(frozen=True)
class Query:
    """SELECT aggregate(column) WHERE all conditions hold. conditions: (column, operator, value)."""

    aggregate: str
    column: str
    conditions: frozenset[tuple[str, str, Value]]

    @property
    def columns(self) -> set[str]:
        return {self.column, *(column for column, _, _ in self.conditions)}


def parse(text: str) -> Query | None:
    """A query of WikiSQL's form; None for anything else."""
    match = QUERY.fullmatch(text)
    if not match:
        return None
    conditions = set()
    for part in AND.split(match[4]) if match[4] else []:
        found = CONDITION.fullmatch(part.strip())
        if not found:
            return None
        conditions.add((found[1].upper(), found[2], _value(found[3])))
    return Query((match[1] or "").upper(), match[2].upper(), frozenset(conditions))


def _value(text: str) -> Value:
    bare = " ".join(text.strip().strip("\"'").casefold().split())
    try:
        return float(bare.replace(",", ""))
    except ValueError:
        return bare


def same(answer: str, reference: str, tables: str | None = None) -> bool:
    """Whether an answer selects what the reference selects, rows in any order."""
    if tables is not None:
        expected = _run_script(tables, reference)
        return expected is not None and _run_script(tables, answer) == expected
    a, b = parse(answer), parse(reference)
    if a is None or b is None:
        return False
    return a == b or all(_select(a, t, names) == _select(b, t, names) for t, names in _made_up(a, b))


def require(reference: str, tables: str | None, where: str) -> None:
    """Raise BadInput for a row whose own query cannot be run."""
    if tables is None and parse(reference) is None:
        raise BadInput(f"{where}: its query is not SELECT column FROM table WHERE ...; give tables (a script) with it")
    if tables is not None and _run_script(tables, reference) is None:
        raise BadInput(f"{where}: its query does not run on its tables")


# -- the row's own tables ----------------------------------------------------------------------------------------------


def _run_script(script: str, query: str) -> list[str] | None:
    """What a query selects, sorted; None where it fails."""
    with sqlite3.connect(":memory:") as db:
        try:
            db.executescript(script)
            allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
            db.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
            return _fetched(db, query)
        except (sqlite3.Error, sqlite3.Warning):
            return None


def _fetched(db: sqlite3.Connection, query: str, values: list[Value] | None = None) -> list[str]:
    left = [TICKS]

    def tick() -> int:
        left[0] -= 1
        return left[0] < 0  # true stops the query

    db.set_progress_handler(tick, TICK)
    return sorted(map(repr, db.execute(query, values or []).fetchmany(100_000)))


# -- made-up tables ----------------------------------------------------------------------------------------------------


def _made_up(a: Query, b: Query) -> list[tuple[list[tuple[Value, ...]], list[str]]]:
    """Tables (rows, column names). A third of the rows satisfies each query's conditions but for one, at most."""
    names = sorted(a.columns | b.columns)
    every = a.conditions | b.conditions
    pools: dict[str, list[Value]] = {name: [] for name in names}
    for column, _, value in sorted(every, key=repr):
        others = [v for c, _, v in every if c == column and isinstance(v, float) and v != value]
        pools[column] += [(value + v) / 2 for v in others if isinstance(value, float)]
        near: list[Value] = [value - 1, value, value + 1] if isinstance(value, float) else [value, f"not {value}"]
        pools[column] += near
    draw = random.Random(repr((sorted(map(repr, a.conditions)), sorted(map(repr, b.conditions)), a.column, b.column)))
    tables = []
    for _ in range(TABLES):
        rows = []
        for _ in range(ROWS):
            row = {n: draw.choice(pools[n]) if pools[n] else float(draw.randrange(10**6)) for n in names}
            for query in draw.sample([a, b], 2)[: draw.randrange(3)]:
                spared = draw.choice([*query.conditions, None]) if query.conditions else None
                for condition in query.conditions:
                    if condition != spared:
                        row[condition[0]] = _satisfying(condition)
            rows.append(tuple(row[n] for n in names))
        tables.append((rows, names))
    return tables


def _satisfying(condition: tuple[str, str, Value]) -> Value:
    _, operator, value = condition
    if isinstance(value, float):
        return value + {">": 1, "<": -1, "!=": 1}.get(operator, 0)
    return value + {">": "z", "!=": "z"}.get(operator, "") if operator != "<" else value[:-1]


def _select(query: Query, rows: list[tuple[Value, ...]], names: list[str]) -> list[str]:
    with sqlite3.connect(":memory:") as db:
        columns = [f"c{i}" for i in range(len(names))]
        db.execute(f"CREATE TABLE t ({', '.join(columns)})")
        db.executemany(f"INSERT INTO t VALUES ({', '.join('?' * len(names))})", rows)
        ordered = sorted(query.conditions, key=repr)
        where = " AND ".join(f"c{names.index(column)} {operator} ?" for column, operator, _ in ordered)
        what = f"{query.aggregate}(c{names.index(query.column)})"
        text = f"SELECT {what} FROM t" + (f" WHERE {where}" if where else "")
        return _fetched(db, text, [value for _, _, value in ordered])
