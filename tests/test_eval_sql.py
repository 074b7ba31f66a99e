"""Queries judged by what they select."""

from __future__ import annotations

import pytest

from mftmerge.errors import BadInput
from mftmerge.evaluate import sql

A = 'SELECT MAX LANE_FIELD FROM TABLE WHERE REACT_FIELD < 0.164 AND NAME_FIELD = "philae sulcus";'


@pytest.mark.parametrize(
    "answer",
    [
        A,
        "select max(lane_field) from table where name_field = 'Philae  Sulcus' and react_field < .164",
        A.replace("< 0.164", "< 0.164 AND REACT_FIELD < 5"),  # says the same
    ],
)
def test_the_same_in_other_words(answer: str) -> None:
    assert sql.same(answer, A)


@pytest.mark.parametrize(
    "answer",
    [
        A.replace("MAX", "MIN"),
        A.replace("MAX ", ""),
        A.replace("LANE", "LINE"),
        A.replace("<", ">"),
        A.replace("<", "="),
        A.replace("0.164", "0.165"),
        A.replace("philae", "philip"),
        A.replace("REACT_FIELD", "ACT_FIELD"),
        A.replace(' AND NAME_FIELD = "philae sulcus"', ""),
        A.replace("TABLE WHERE", "TABLE WHERE YEAR_FIELD = 1997 AND"),
        "SELECT LANE_FIELD FROM",
        "DROP TABLE t",
        "",
    ],
)
def test_what_selects_something_else_is_wrong(answer: str) -> None:
    assert not sql.same(answer, A)


def test_on_the_rows_own_tables_and_reading_only() -> None:
    tables = "CREATE TABLE p (name TEXT, age INT); INSERT INTO p VALUES ('a', 1), ('b', 2), ('c', 2);"
    reference = "SELECT name FROM p WHERE age = 2"
    assert sql.same("SELECT name FROM p WHERE age > 1 ORDER BY name DESC", reference, tables)
    assert not sql.same("SELECT name FROM p", reference, tables)
    for wrong in (
        "DELETE FROM p",
        "ATTACH 'x.db' AS x",
        "SELECT load_extension('x')",
        "nonsense",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",  # without an end
    ):
        assert not sql.same(wrong, reference, tables)
    with pytest.raises(BadInput, match="row 3: its query does not run"):
        sql.require("SELECT x FROM p", tables, "row 3")
    with pytest.raises(BadInput, match="give tables"):
        sql.require("SELECT a, b FROM p JOIN q", None, "row 3")
