"""Where rows come from: files of many kinds, directories, globs, the hub, and what Python programs hold in memory.

Each row comes with its place ("rows.jsonl:12"), so that what is wrong with it can be named. A file's name may end in a
range of rows, as a slice in Python: `rows.jsonl[100:200]`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from mftmerge.errors import BadInput
from mftmerge.files import refuse_pointer

if TYPE_CHECKING:
    from datasets import Dataset

Placed = Iterator[tuple[str, Any]]  # (place, row, or the BadInput that says why it cannot be read as one)

TEXTS, TABLES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv", ".parquet", ".arrow")
ENDINGS = (*TEXTS, *TABLES, *(f"{e}.gz" for e in (*TEXTS, ".csv", ".tsv")))
RANGE = re.compile(r"(.+?)\[(-?\d*):(-?\d*)\]")
TEXTUAL = ("prompt", "completion", "chosen")  # columns of texts, or of conversations
LISTED = ("messages", "conversations", "conversation", "tools", "history", *TEXTUAL)
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` of datasets leaves in a directory


def raw_rows(source: Any, split: str | None = None) -> Placed:
    """The rows of a source, unchecked, with their places; in the place of a line that is no row, what is wrong with it.

    source: a path (a file, a directory of them or one that `save_to_disk` wrote, a glob), a hub id, a data frame, a
    dataset, or an iterable of rows and sources. split: of what has several, "train" by default.
    Raises BadInput for what is absent, empty, or not readable as what its name says.
    """
    if isinstance(source, str | Path):
        yield from _named(str(source), split)
    elif hasattr(source, "to_pylist") or hasattr(source, "to_dicts"):  # a table of pyarrow, a data frame of polars
        yield from _table("row", source.to_pylist() if hasattr(source, "to_pylist") else source.to_dicts())
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):  # a data frame of pandas
        yield from _table("row", source.to_dict("records"))
    elif hasattr(source, "column_names"):  # one of datasets' kinds, streaming ones among them
        yield from _table("row", _one_split(source, split, "the dataset"))
    elif isinstance(source, Iterable):
        for number, item in enumerate(source, 1):
            if isinstance(item, Mapping):
                yield f"row {number}", _filled(item)
            elif isinstance(item, str | Path) or hasattr(item, "column_names") or hasattr(item, "columns"):
                yield from raw_rows(item, split)
            else:
                yield f"row {number}", item  # none at all: whoever checks rows says so
    else:
        raise BadInput(f"rows cannot be read from a {type(source).__name__}; give a file, a list of rows or a dataset")


def _named(text: str, split: str | None) -> Placed:
    match = RANGE.fullmatch(text)
    if match and not Path(text).exists():
        start, stop = (int(x) if x else None for x in match.group(2, 3))
        rows = list(_named(match[1], split))[start:stop]
        if not rows:
            raise BadInput(f"{text}: no rows in this range")
        yield from rows
        return
    path = Path(text)
    if path.is_dir():
        yield from _directory(path, split)
    elif path.is_file():
        yield from _file(path)
    elif glob.has_magic(text):
        found = sorted(glob.glob(text))
        if not found:
            raise BadInput(f"{text}: matches no file")
        yield from itertools.chain.from_iterable(_file(Path(f)) for f in found)
    elif text.endswith(ENDINGS) or path.is_absolute() or text.startswith((".", "~")):
        raise BadInput(
            f"{text}: no such file of rows; give a {', '.join(TEXTS[:1] + TABLES)} file (texts also as .gz), "
            "a directory or glob of them, or a dataset id on the hub"
        )
    else:
        yield from _table(text, _hub(text, split or "train"))


def _directory(path: Path, split: str | None) -> Placed:
    if any((path / name).is_file() for name in SAVED):
        from datasets import load_from_disk

        try:
            saved = load_from_disk(str(path))
        except Exception as e:  # datasets and pyarrow raise many kinds
            raise BadInput(f"{path}: not a dataset that can be loaded ({_reason(e)})") from None
        yield from _table(str(path), _one_split(saved, split, str(path)))
        return
    found = sorted(p for p in path.iterdir() if p.name.endswith(ENDINGS) and p.is_file())
    if not found:
        raise BadInput(f"{path}: a directory with no file of rows in it ({', '.join(ENDINGS[:7])})")
    yield from itertools.chain.from_iterable(map(_file, found))


def _one_split(dataset: object, split: str | None, what: str) -> object:
    """The dataset, or that split of it where it has several; its rows as Python's own objects."""
    if not isinstance(dataset, Mapping):
        form = getattr(dataset, "format", None) or {"type": None}
        if form["type"] in (None, "custom"):  # a function of the user's own makes its rows
            return dataset
        return cast("Dataset", dataset).with_format(None, columns=form["columns"])
    name = split or ("train" if "train" in dataset else next(iter(dataset), ""))
    if name not in dataset or (split is None and name != "train" and len(dataset) > 1):
        raise BadInput(f"{what}: has the splits {', '.join(map(str, dataset))}; name one of them")
    return _one_split(dataset[name], None, what)


def _file(path: Path) -> Placed:
    with path.open("rb") as f:
        refuse_pointer(path, f.read(64))
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind == ".parquet":
        yield from _table(str(path), _parquet(path))
    elif kind == ".arrow":
        yield from _table(str(path), _arrow(path))
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, "\t" if kind == ".tsv" else ",")
    elif kind == ".json" and (text := _text(path)).lstrip().startswith("["):
        yield from _numbered(str(path), _json(text, str(path)))
    else:
        yield from _lines(path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """A text file, compressed or not, with or without a byte order mark. Raises BadInput where it is neither."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as f:
                yield f
        else:
            with path.open(encoding="utf-8-sig", newline="") as f:
                yield f
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text ({e.reason}); rows are JSON, one object a line") from None
    except (gzip.BadGzipFile, EOFError) as e:
        raise BadInput(f"{path}: not a whole gzip file ({e})") from None


def _text(path: Path) -> str:
    with _opened(path) as f:
        return f.read()


def _lines(path: Path) -> Placed:
    found = False
    with _opened(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                found = True
                yield f"{path}:{number}", _line(line, f"{path}:{number}")
    if not found:
        raise BadInput(f"{path}: no rows in this file")


def _line(text: str, where: str) -> object:
    """A row, or what is wrong with it."""
    try:
        return _json(text, where)
    except BadInput as e:
        return e


def _csv(path: Path, delimiter: str) -> Placed:
    csv.field_size_limit(sys.maxsize)
    found = False
    with _opened(path) as f:
        try:
            reader = csv.DictReader(f, delimiter=delimiter, strict=True)
            for row in reader:
                found, where = True, f"{path}:{reader.line_num}"
                whole = None not in row and None not in row.values()
                cut = BadInput(f"{where}: has another number of columns than the first line")
                yield where, {k: _cell(k, v) for k, v in row.items()} if whole else cut
        except csv.Error as e:
            raise BadInput(f"{path}: not readable as {path.suffix} ({e})") from None
    if not found:
        raise BadInput(f"{path}: no rows in this file")


def _cell(name: str, value: str) -> object:
    """A cell; conversations stand in tables as JSON, whose text is not what is to be learnt."""
    if name not in LISTED or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    turns = isinstance(found, list) and found and all(isinstance(t, dict) and {"role", "from"} & {*t} for t in found)
    return found if turns or name not in TEXTUAL else value  # an answer in JSON is one all the same


def _numbered(what: str, rows: Any) -> Placed:
    return ((f"{what}: row {number}", row) for number, row in enumerate(rows, 1))


def _table(what: str, rows: Any) -> Placed:
    """Rows of a table, in which every row has every column: those without a value are left out."""
    for number, row in enumerate(rows, 1):
        filled = _filled(row) if isinstance(row, Mapping) else row
        yield (f"{what}: row {number}" if what != "row" else f"row {number}"), filled


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the fields that have no value, and without arrays."""
    return {k: v for k, given in row.items() if not _missing(v := _plain(given))}


def _plain(value: Any) -> Any:
    """A value in Python's own types: data frames hold lists as arrays, formatted datasets tensors too."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _missing(value: Any) -> bool:
    """Whether it is None, or what data frames have in its place: NaN and NaT, and NA, which compares with nothing."""
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True


def _parquet(path: Path) -> object:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise BadInput(f"{path}: not a readable Parquet file ({_reason(e)})") from None


def _arrow(path: Path) -> object:
    from datasets import Dataset

    try:
        return Dataset.from_file(str(path))
    except Exception as e:  # datasets and pyarrow raise many kinds
        raise BadInput(f"{path}: not a readable Arrow file ({_reason(e)})") from None


def _json(text: str, where: str) -> object:
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON and no text
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError as e:
        raise BadInput(f"{where}: not JSON ({e.msg})") from None
    except RecursionError:
        raise BadInput(f"{where}: nested too deeply to be rows") from None
    except UnicodeEncodeError:
        raise BadInput(f"{where}: half of a surrogate pair, which is no character; mend or remove the row") from None


def _hub(name: str, split: str) -> object:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as e:  # the hub's client raises many kinds: absent, gated, offline, no such split
        raise BadInput(f"{name}: neither a file here nor a readable dataset on the hub ({_reason(e)})") from None


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
