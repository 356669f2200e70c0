"""Graphs that were checked before are opened without being read again; all others are checked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxsmith.errors import ModelFileError, SourceError
from onnxsmith.onnx_file import save_model
from onnxsmith.package_io import load_files, load_package, sole_graph
from onnxsmith.pipeline.generation import generate_text
from onnxsmith.runtime import OrtSession
from onnxsmith.runtime.graph_file import GraphFile

TEXT = """<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 64] x, float[64, 64] w) => (float[batch, 64] y) { y = MatMul(x, w) }"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where notes go: switched off for all other tests."""
    monkeypatch.delenv("ONNXSMITH_CACHE_SIZE")
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "known-graphs"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A graph with its weights in a file beside it."""
    directory = tmp_path / "model"
    directory.mkdir()
    model = ir.serde.deserialize_model(onnx.parser.parse_model(TEXT))
    value = next(one for one in model.graph.inputs if one.name == "w")
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(np.eye(64, dtype=np.float32), name="w")
    model.graph.register_initializer(value)
    save_model(model, directory / "model.onnx", inline_limit_bytes=0)
    assert (directory / "model.onnx.data").stat().st_size == 64 * 64 * 4
    return directory


def test_the_same_bytes_are_not_read_again(
    notes: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert GraphFile.known(stored) is None
    first = GraphFile.open(stored)
    assert len(list(notes.iterdir())) == 1

    def refuse(path: Path) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("onnxsmith.runtime.graph_file.load_package", refuse)
    assert GraphFile.open(stored) == first
    assert GraphFile.open(stored / "model.onnx") == first
    # Another place, the same bytes.
    copy = shutil.copytree(stored, stored.parent / "copy")
    assert GraphFile.open(copy).path == copy / "model.onnx"
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    with OrtSession(GraphFile.open(stored), threads=1) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], x, rtol=1e-6)


def test_other_bytes_are_checked(notes: Path, stored: Path) -> None:
    GraphFile.open(stored)
    graph = stored / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-20])
    with pytest.raises(ModelFileError):
        GraphFile.open(stored)
    graph.write_bytes(content)
    assert GraphFile.known(stored) is not None
    data = stored / "model.onnx.data"
    weights = data.read_bytes()
    data.write_bytes(weights[:-4])
    assert GraphFile.known(stored) is None
    with pytest.raises(ModelFileError):
        GraphFile.open(stored)
    outside = stored.parent / "outside"
    outside.write_bytes(weights)
    data.unlink()
    data.symlink_to(outside)
    assert GraphFile.known(stored) is None
    with pytest.raises(ModelFileError):
        GraphFile.open(stored)


def test_a_note_that_is_damaged_is_none(notes: Path, stored: Path) -> None:
    first = GraphFile.open(stored)
    note = next(notes.iterdir())
    for text in ("", "[]", '{"facts": {}}', '{"facts": {}, "data": {"model.onnx.data": "x"}}'):
        note.write_text(text)
        assert GraphFile.known(stored) is None
        assert GraphFile.open(stored) == first
    notes.rename(notes.with_name("away"))
    notes.write_text("no directory")
    assert GraphFile.open(stored) == first


def test_no_cache_keeps_no_notes(notes: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSMITH_CACHE_SIZE", "0")
    GraphFile.open(stored)
    assert GraphFile.known(stored) is None
    assert not notes.exists()


def test_a_model_of_several_graphs_has_no_sole_one(stored: Path, tmp_path: Path) -> None:
    assert sole_graph(stored) == stored / "model.onnx"
    shutil.copy(stored / "model.onnx", stored / "other.onnx")
    assert sole_graph(stored) is None
    assert sole_graph(tmp_path / "nowhere") is None
    with pytest.raises(SourceError):
        GraphFile.open(stored)


@pytest.mark.usefixtures("notes")
def test_text_of_a_known_model_is_the_same(tiny_artifact_dir: Path) -> None:
    first = list(generate_text(tiny_artifact_dir, "the quick", max_new_tokens=8))
    graph = GraphFile.known(tiny_artifact_dir)
    assert graph is not None
    assert load_files(tiny_artifact_dir) == load_package(tiny_artifact_dir).files
    assert list(generate_text(tiny_artifact_dir, "the quick", max_new_tokens=8)) == first
    # What reads ONNX files is not even loaded.
    code = f"""
import sys
from onnxsmith import generate_text
from pathlib import Path
text = list(generate_text(Path({str(tiny_artifact_dir)!r}), "the quick", max_new_tokens=8))
assert text == {first!r}, text
found = {{"onnx", "onnx_ir", "torch", "transformers", "pydantic"}} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
