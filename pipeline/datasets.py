"""Labelled data: from CSV, TSV, JSON lines, Parquet, text, and Hugging Face datasets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith.errors import BadInputError, require
from onnxsmith.source import resolve_path

__all__ = ["COLUMNS", "Dataset", "load_dataset"]

# What a column is for, and what it is usually called.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "prompt", "input", "premise", "sentence1", "review", "source"),
    "text_pair": ("text_pair", "hypothesis", "sentence2"),
    "label": ("label", "labels", "score", "class", "category", "sentiment"),
    "target": ("target", "reference", "output", "summary", "translation", "completion"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "question": ("question",),
    "context": ("context",),
    "answers": ("answers", "answer"),
}
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
_KINDS = "a .csv, .tsv, .jsonl, .json, .parquet or .txt file, or hf:NAME of a Hugging Face data set"


class Dataset:
    """Rows, with columns found by what they are for.

    Attributes:
        where: For messages.
        rows: Column to value.
        label_names: Names of labels that are stored as numbers, where the data set has them.
        first: The number of the first row, for messages.
    """

    def __init__(
        self,
        where: str,
        rows: Sequence[Mapping[str, Any]],
        columns: Mapping[str, str],
        label_names: Sequence[str] = (),
        *,
        first: int = 1,
    ) -> None:
        """Checks that the named columns are there.

        Raises:
            BadInputError: No rows, or a column that does not exist.
        """
        if not rows:
            raise BadInputError(where, got="no rows", expected="at least one")
        self.where, self.rows, self.label_names, self.first = where, rows, tuple(label_names), first
        self._columns = dict(columns)
        for role, name in columns.items():
            if role not in COLUMNS:
                raise BadInputError(
                    f"--column {role}={name}", got=f"{role!r}", expected=f"one of {', '.join(COLUMNS)}"
                )
            if name not in rows[0]:
                raise BadInputError(
                    f"--column {role}={name}", got="no such column",
                    expected=f"one of {', '.join(map(str, rows[0]))}",
                )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, begin: int, end: int) -> Dataset:
        """Some of the rows, by number."""
        return Dataset(
            self.where, self.rows[begin:end], self._columns, self.label_names, first=self.first + begin
        )

    def has(self, role: str) -> bool:
        """Whether there is a column for it."""
        return self._find(role) is not None

    def column(self, role: str) -> list[Any]:
        """All values of a column.

        Raises:
            BadInputError: There is none, or a value is missing.
        """
        name = self._find(role)
        if name is None:
            raise BadInputError(
                self.where,
                got=f"the columns {', '.join(map(str, self.rows[0]))}",
                expected=f"one for {role}, such as {', '.join(COLUMNS[role][:3])}",
                remedy=f"Name it with --column {role}=NAME",
            )
        values = [row.get(name) for row in self.rows]
        for number, value in enumerate(values, self.first):
            if value is None:
                raise BadInputError(f"{self.where}, row {number}", got=f"no {name}", expected=f"a {role}")
        return values

    def texts(self, role: str) -> list[str]:
        """A column of texts.

        Raises:
            BadInputError: There is none, or a value is no text.
        """
        values = self.column(role)
        for number, value in enumerate(values, self.first):
            if not isinstance(value, str):
                raise BadInputError(
                    f"{self.where}, row {number}", got=f"{role} {str(value)[:40]!r}", expected="a text"
                )
        return values

    def take(self, index: Sequence[int]) -> Dataset:
        """Some of the rows."""
        return Dataset(self.where, [self.rows[i] for i in index], self._columns, self.label_names)

    def _find(self, role: str) -> str | None:
        if role in self._columns:
            return self._columns[role]
        return next((name for name in COLUMNS[role] if name in self.rows[0]), None)


def load_dataset(
    data: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "test",
    limit: int | None = None,
    base: Path | None = None,
) -> Dataset:
    """Reads labelled data.

    Args:
        data: A file, ``pkg:package/file``, a directory with files of the split such as ``test.csv`` or
            ``test-00000-of-00002.parquet``, or ``hf:NAME`` or ``hf:NAME/CONFIG:...`` of a Hugging Face data
            set, which may also be a directory that ``save_to_disk`` wrote.
        columns: What a column is for to its name, where that is not the usual one.
        split: Of a Hugging Face data set or a directory.
        limit: Rows to use, from the beginning; all where None.
        base: The directory that relative paths start from.

    Raises:
        BadInputError: It cannot be read, or has no rows.
        MissingDependencyError: A package for this format is not installed.
    """
    if limit is not None and limit < 1:
        raise BadInputError("--limit", got=str(limit), expected="at least 1")
    names: Sequence[str] = ()
    where = f"data {data}"
    if data.startswith("hf:"):
        rows, names = _hugging_face(data.removeprefix("hf:"), split, columns or {}, where)
    else:
        path = resolve_path(data, base=base)
        if path.is_dir() and not _is_saved(path):
            rows = [
                row for file in _files_of_split(path, split, where) for row in _rows(file, f"data {file}")
            ]
        elif path.is_dir():
            rows, names = _hugging_face(str(path), split, columns or {}, where)
        else:
            rows = _rows(path, where)
    return Dataset(where, rows[:limit], columns or {}, names)


def _is_saved(directory: Path) -> bool:
    """Whether ``save_to_disk`` of Hugging Face's datasets wrote a directory."""
    return any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _files_of_split(directory: Path, split: str, where: str) -> list[Path]:
    """The files of a directory that are called after a split, as they are on the Hugging Face hub.

    Raises:
        BadInputError: There are none, or they are of several kinds.
    """
    files = sorted(
        path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file()
    )
    found = [path for path in files if path.stem == split or path.stem.startswith(f"{split}-")]
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) != 1:
        names = ", ".join(path.name for path in (found or files)[:6])
        raise BadInputError(
            where,
            got=f"a directory with {names or 'no file of data'}",
            expected=f"files of one kind called after the split, such as {split}.csv or "
            f"{split}-00000-of-00002.parquet, or what save_to_disk of datasets wrote",
            remedy="Name one file with --data, or a split with --split",
        )
    return found


def _rows(path: Path, where: str) -> list[Mapping[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        parquet = require("pyarrow.parquet", purpose="reading Parquet")
        try:
            table: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
        except Exception as error:  # pyarrow raises kinds of its own
            raise BadInputError(where, got=f"cannot be read: {error}", expected="a Parquet file") from error
        return table
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(where, got=f"cannot be read: {error}", expected=_KINDS) from error
    if suffix in (".csv", ".tsv"):
        return list(_delimited(text, "\t" if suffix == ".tsv" else ",", where))
    if suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [_object(line, f"{where}, line {n}") for n, line in lines]
    if suffix == ".json":
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInputError(where, got=f"cannot be read: {error}", expected="JSON") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadInputError(where, got="no list of objects", expected="one object for each row")
        return entries
    if suffix == ".txt":
        return [{"text": line} for line in text.splitlines() if line.strip()]
    raise BadInputError(where, got=f"a file that ends in {suffix!r}", expected=_KINDS)


def _delimited(text: str, delimiter: str, where: str) -> Iterator[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise BadInputError(
                    f"{where}, line {reader.line_num}", got="another number of fields than the header has",
                    expected=f"{len(reader.fieldnames or ())} fields",
                )  # fmt: skip
            yield row
    except csv.Error as error:
        raise BadInputError(f"{where}, line {reader.line_num}", got=str(error), expected="CSV") from error


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(where, got=f"cannot be read: {error}", expected="a JSON object") from error
    if not isinstance(row, dict):
        raise BadInputError(where, got=f"a {type(row).__name__}", expected="a JSON object")
    return row


def _hugging_face(
    name: str, split: str, columns: Mapping[str, str], where: str
) -> tuple[list[Mapping[str, Any]], Sequence[str]]:
    datasets: Any = require("datasets", purpose="reading a Hugging Face data set")
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            loaded = loaded[split] if hasattr(loaded, "keys") else loaded
        else:
            path, _, config = name.partition(":")
            loaded = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # whatever the package raises
        raise BadInputError(
            where, got=f"cannot be loaded: {error}", expected=f"a data set with a split {split!r}"
        ) from error
    names: Sequence[str] = ()
    for role in ("label", "tags"):
        for column in (columns.get(role), *COLUMNS[role]):
            feature = loaded.features.get(column) if column else None
            inner = getattr(feature, "feature", feature)
            names = names or getattr(inner, "names", ()) or ()
    return list(loaded), names
