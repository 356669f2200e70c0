"""Labelled data: every format gives the same rows, and what cannot be read is refused with a reason."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.errors import BadInputError, MissingDependencyError
from onnxsmith.pipeline.datasets import load_dataset


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_formats_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [{"text": 'a "quoted", text', "label": "pos"}, {"text": "two\nlines", "label": "neg"}]
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        (tmp_path / name).write_text("\ufeff" + text.getvalue(), newline="")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "d.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.csv", "d.tsv", "d.json", "d.jsonl", "d.parquet"):
        found = load_dataset(name, base=tmp_path)
        assert (found.texts("text"), found.column("label")) == (
            [r["text"] for r in rows],
            [r["label"] for r in rows],
        ), name
    (tmp_path / "d.txt").write_text("one\n\ntwo\n")
    assert load_dataset(str(tmp_path / "d.txt")).texts("text") == ["one", "two"]
    assert len(load_dataset(str(tmp_path / "d.csv"), limit=1)) == 1
    renamed = load_dataset(str(tmp_path / "d.csv"), columns={"target": "label"})
    assert renamed.texts("target") == ["pos", "neg"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "text,label\n", "no rows; expected at least one"),
        ("d.csv", "text,label\na\n", "line 2: another number of fields than the header has; expected 2"),
        ("d.jsonl", "{}\n[1]\n", "line 2: a list; expected a JSON object"),
        ("d.jsonl", "{\n", "line 1: cannot be read"),
        ("d.json", "{}", "no list of objects; expected one object for each row"),
        ("d.json", "[", "cannot be read: .*; expected JSON"),
        ("d.xml", "<a/>", "a file that ends in '.xml'; expected a .csv, .tsv, .jsonl"),
        ("d.parquet", "PAR1", "cannot be read: .*; expected a Parquet file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message):
        load_dataset(str(tmp_path / name))


def test_what_a_data_set_lacks_is_said(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": None, "n": 3}])
    rows = load_dataset(str(data))
    with pytest.raises(
        BadInputError, match=r"the columns text, label, n; expected one for target.*--column target=NAME"
    ):
        rows.column("target")
    with pytest.raises(BadInputError, match="row 1: no label; expected a label"):
        rows.column("label")
    with pytest.raises(BadInputError, match="row 1: text '3'; expected a text"):
        load_dataset(str(data), columns={"text": "n"}).texts("text")
    with pytest.raises(
        BadInputError, match="--column text=body: no such column; expected one of text, label, n"
    ):
        load_dataset(str(data), columns={"text": "body"})
    with pytest.raises(BadInputError, match="'txt'; expected one of text, text_pair"):
        load_dataset(str(data), columns={"txt": "text"})
    with pytest.raises(BadInputError, match="--limit: 0; expected at least 1"):
        load_dataset(str(data), limit=0)


def test_a_hugging_face_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets") is not None:
        monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingDependencyError, match=r"'datasets' is not installed. Run `pip install 'onnxsmith\[eval\]'`"
    ):
        load_dataset("hf:imdb")


def test_a_hugging_face_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"test": made}).save_to_disk(tmp_path / "saved")
    found = load_dataset(str(tmp_path / "saved"))
    assert (found.column("label"), found.label_names) == ([1, 0], ("neg", "pos"))


def test_a_directory_gives_the_files_of_its_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test-00001-of-00002.jsonl", [{"text": "c", "label": 1}])
    write_jsonl(
        tmp_path / "test-00000-of-00002.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    )
    write_jsonl(tmp_path / "train.jsonl", [{"text": "d", "label": 1}])
    (tmp_path / "README.md").write_text("what it is")
    assert load_dataset(str(tmp_path)).texts("text") == ["a", "b", "c"]
    assert load_dataset(str(tmp_path), split="train").texts("text") == ["d"]
    with pytest.raises(
        BadInputError, match=r"a directory with test-0.*train.jsonl; expected files of one kind"
    ):
        load_dataset(str(tmp_path), split="validation")
    (tmp_path / "test.csv").write_text("text,label\ne,1\n")
    with pytest.raises(BadInputError, match=r"test.csv; expected files of one kind called after the split"):
        load_dataset(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        BadInputError, match=r"no file of data; expected .*Name one file with --data, or a spl"
    ):
        load_dataset(str(empty))


def test_a_directory_of_files_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test-0.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "test-1.jsonl", [{"sentence": "b"}])
    with pytest.raises(BadInputError, match="row 2: no text; expected a text"):
        load_dataset(str(tmp_path)).texts("text")
