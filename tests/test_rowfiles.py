"""Files of rows of every kind: what is read, and how what is not is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mftmerge import data
from mftmerge.errors import BadInput

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}, with a comma"} for i in range(5)]
LINES = "\n".join(map(json.dumps, ROWS))


def write_all(folder: Path) -> dict[str, Path]:
    """The same rows in every kind of file."""
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    table = "prompt,completion\r\n" + "".join(f'q{i},"a{i}, with a comma"\r\n' for i in range(5))
    texts = {
        "a.jsonl": LINES,
        "a.json": json.dumps(ROWS),
        "a.ndjson": LINES + "\n\n",
        "a.csv": table,
        "a.tsv": "prompt\tcompletion\n" + "".join(f"q{i}\ta{i}, with a comma\n" for i in range(5)),
    }
    found = {}
    for name, text in texts.items():
        found[name] = folder / name
        found[name].write_text(text, newline="")
        found[f"bom {name}"] = folder / f"bom-{name}"
        found[f"bom {name}"].write_bytes(b"\xef\xbb\xbf" + text.encode())
        found[f"{name}.gz"] = folder / f"{name}.gz"
        found[f"{name}.gz"].write_bytes(gzip.compress(text.encode()))
    dataset.to_parquet(folder / "a.parquet")
    found["parquet"] = folder / "a.parquet"
    dataset.save_to_disk(folder / "saved")
    found["saved"] = folder / "saved"
    found["arrow"] = next((folder / "saved").glob("*.arrow"))
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "splits")
    found["splits"] = folder / "splits"
    return found


def test_every_kind_of_file(tmp_path: Path) -> None:
    for name, path in write_all(tmp_path).items():
        assert data.load_rows(path) == ROWS, name
    assert data.load_rows(tmp_path / "splits", split="test") == ROWS[:1]


def test_ranges_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for i, row in enumerate(ROWS):
        (tmp_path / "many" / f"{i}.jsonl").write_text(json.dumps(row))
    (tmp_path / "many" / "notes.md").write_text("not rows")
    (tmp_path / "a.jsonl").write_text(LINES)
    assert data.load_rows(tmp_path / "many") == ROWS
    assert data.load_rows(f"{tmp_path}/many/[1-2].jsonl") == ROWS[1:3]
    assert data.load_rows(f"{tmp_path}/a.jsonl[1:3]") == ROWS[1:3]
    assert data.load_rows(f"{tmp_path}/a.jsonl[-2:]") == ROWS[-2:]
    assert data.load_rows([f"{tmp_path}/a.jsonl[:1]", tmp_path / "many"]) == [ROWS[0], *ROWS]
    (tmp_path / "odd[0:1].jsonl").write_text(json.dumps(ROWS[4]))
    assert data.load_rows(tmp_path / "odd[0:1].jsonl") == ROWS[4:]


def test_what_programs_hold(tmp_path: Path) -> None:
    import pandas as pd
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    assert data.load_rows(dataset) == ROWS
    assert data.load_rows(dataset.to_iterable_dataset()) == ROWS
    assert data.load_rows(DatasetDict({"train": dataset})) == ROWS
    assert data.load_rows(pd.DataFrame(ROWS)) == ROWS
    assert data.load_rows(row for row in ROWS) == ROWS
    mixed = pd.DataFrame([ROWS[0], {"text": "plain"}])  # of other columns: what is empty is not there
    assert data.load_rows(mixed) == [ROWS[0], {"text": "plain"}]
    with pytest.raises(BadInput, match="has the splits a, b; name one of them"):
        data.load_rows(DatasetDict({"a": dataset, "b": dataset}))


def test_conversations_in_frames_and_formatted_datasets(tmp_path: Path) -> None:
    """There lists are arrays, and what has no value is NaN, NaT or NA."""
    import numpy as np
    import pandas as pd
    from datasets import Dataset

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": turns * 2}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert data.load_rows(frame) == rows
    assert data.load_rows(frame.to_dict("records")) == rows
    assert data.load_rows([{"messages": np.array(turns), "n": np.int64(1)}]) == [{"messages": turns, "n": 1}]
    for form in ("numpy", "torch", "pandas", "arrow"):
        formatted = Dataset.from_list([{**row, "n": 1} for row in rows]).with_format(form, columns=["messages"])
        assert data.load_rows(formatted) == rows, form
    formatted.save_to_disk(tmp_path / "saved")
    assert data.load_rows(tmp_path / "saved") == rows
    assert data.load_rows(Dataset.from_list(rows).to_iterable_dataset().with_format("numpy")) == rows
    empty = pd.DataFrame({"prompt": ["q"], "completion": ["a"], "x": [pd.NA], "y": [pd.NaT], "text": [np.nan]})
    assert data.load_rows(empty) == [{"prompt": "q", "completion": "a"}]


def test_conversations_in_tables(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.tsv").write_text("messages\n" + json.dumps(talk) + "\n")
    assert data.load_rows(tmp_path / "a.tsv") == [{"messages": talk}]
    for answer in (talk[1:], '[{"red": 1}]'):  # an answer that is JSON stays text
        asked = talk[:1] if isinstance(answer, list) else "q"
        cells = [c if isinstance(c, str) else json.dumps(c) for c in (asked, answer)]
        (tmp_path / "b.tsv").write_text(
            "prompt\tcompletion\n" + "\t".join('"' + c.replace('"', '""') + '"' for c in cells) + "\n"
        )
        assert data.load_rows(tmp_path / "b.tsv") == [{"prompt": asked, "completion": answer}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "not a whole gzip file"),
        ("no.jsonl.gz", LINES.encode(), "not a whole gzip file"),
        ("a.csv", b"prompt,completion\nq\n", "a.csv:2: has another number of columns"),
        ("a.csv", b'prompt,completion\n"q,a\n', "not readable as .csv"),
        ("a.csv", b"prompt,completion\n", "no rows"),
        ("a.arrow", b"ARROW1" + bytes(50), "not a readable Arrow file"),
        ("a.jsonl", b"{}\xff", "not UTF-8"),
        ("a.jsonl[3:1]", b"", "no such file"),
    ],
    ids=range(8),
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    if "[" not in name:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        data.load_rows(path)


def test_places_without_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text(LINES)
    for source, message in (
        (tmp_path / "empty", "no file of rows in it"),
        (f"{tmp_path}/*.csv", "matches no file"),
        (f"{tmp_path}/a.jsonl[7:]", "no rows in this range"),
        (7, "cannot be read from a int"),
        ([7], "row 1: a row must be an object"),
        ([], "no rows to use"),
    ):
        with pytest.raises(BadInput, match=message):
            data.load_rows(source)


def test_bad_rows_are_skipped_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Any] = [*ROWS, {"prompt": "q", "completion": ""}, 7]
    with pytest.raises(BadInput, match="row 6: no assistant text"):
        data.load_rows(rows)
    with caplog.at_level("WARNING"):
        assert data.load_rows(rows, skip_bad=True) == ROWS
    assert "2 of 7 rows are skipped; the first: row 6: no assistant text" in caplog.text
    with pytest.raises(BadInput, match="no rows to use"):
        data.load_rows(rows[5:], skip_bad=True)


def test_bad_lines_are_skipped_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is no JSON, what has another number of columns, what a chat template refuses; each named by its place."""
    from mftmerge.quickstart.tiny import tiny_tokenizer

    (tmp_path / "a.jsonl").write_text(LINES + "\n{broken\n")
    (tmp_path / "a.csv").write_text("prompt,completion\nq,a\nq\n")
    for name, message, good in (("a.jsonl", "a.jsonl:6: not JSON", 5), ("a.csv", "a.csv:3: has another number", 1)):
        with pytest.raises(BadInput, match=message):
            data.load_rows(tmp_path / name)
        assert len(data.load_rows(tmp_path / name, skip_bad=True)) == good
        assert message in caplog.text
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length != 2 %}{{ raise_exception('two turns only') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps({"messages": turns * n}) for n in (1, 2, 1)))
    rows = data.load_rows(tmp_path / "talk.jsonl")
    with pytest.raises(BadInput, match=r"talk\.jsonl:2: the chat template refuses it: two turns only"):
        data.tokenize(rows, tokenizer, 100)
    assert len(data.tokenize(rows, tokenizer, 100, skip_bad=True)) == 2
    assert "1 of 3 rows are skipped; the first: " in caplog.text
    with pytest.raises(BadInput, match=r"no row can be used; .*talk\.jsonl:2"):
        data.tokenize(rows[1:2], tokenizer, 100, skip_bad=True)


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer,prompt\nq,a,not this\n")
    columns = {"prompt": "question", "completion": "answer"}
    assert data.load_rows(path, columns=columns) == [{"prompt": "q", "completion": "a"}]
    with pytest.raises(BadInput, match=r"a\.csv:2: there is no column 'reply'; this row has question, answer, prompt"):
        data.load_rows(path, columns={"completion": "reply"})
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert data.load_rows([{"dialog": talk}], columns={"messages": "dialog"}) == [{"messages": talk}]


def test_tables_in_memory() -> None:
    import pyarrow as pa

    class Polars:
        """The part of a polars data frame that is used: `to_dict` gives columns, `to_dicts` rows."""

        columns = ("prompt", "completion")

        def to_dict(self, as_series: bool = True) -> dict[str, Any]:
            raise AssertionError(as_series)

        def to_dicts(self) -> list[dict[str, Any]]:
            return ROWS

    assert data.load_rows(pa.Table.from_pylist(ROWS)) == ROWS
    assert data.load_rows(Polars()) == ROWS
