"""Artifacts: the manifest, and `verify`, which finds each byte that was changed, is missing or too many."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith import load_package, optimize_model, verify_artifact
from onnxsmith.errors import ModelFileError, SourceError
from onnxsmith.pipeline.artifact import Manifest, to_plain


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    import onnx

    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> '
        "toy (float[batch, 64] x, float[64, 64] w) => (float[batch, 64] y) { h = MatMul(x, w) y = Relu(h) }"
    )
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model.graph.input.pop()
    onnx.save(model, tmp_path / "toy.onnx")
    optimize_model(tmp_path / "toy.onnx", tmp_path / "artifact", [("cleanup", {})])
    return tmp_path / "artifact"


def problems(directory: Path) -> dict[str, str]:
    """The first problem of each place: a changed file may be an invalid graph as well."""
    return {finding.where: finding.problem for finding in reversed(verify_artifact(directory))}


def edit(directory: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = False) -> None:
    """Changes the manifest; with ``seal`` as someone would who knows how its own hash is made."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if seal:
        content = {key: value for key, value in manifest.items() if key != "content_sha256"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        manifest["content_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def test_a_fresh_artifact_has_no_problem(artifact: Path) -> None:
    assert problems(artifact) == {}


def test_the_manifest_says_what_was_done_with_what(artifact: Path) -> None:
    manifest = Manifest.model_validate_json((artifact / "manifest.json").read_text())
    assert manifest.components == {"model": "model.onnx"}
    assert [(step.name, step.parameters["max_input_elements"]) for step in manifest.steps] == [
        ("cleanup", 1024)
    ]
    assert manifest.source["kind"] == "onnx"
    assert manifest.precision == "float32"
    assert {"onnx", "onnxruntime", "numpy"} <= set(manifest.environment["versions"])
    assert set(manifest.files) == {path.name for path in artifact.iterdir()} - {"manifest.json"}


def test_an_artifact_can_be_moved_and_linked(artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(artifact, moved)
    (tmp_path / "current").symlink_to(moved)
    assert problems(moved) == problems(tmp_path / "current") == {}


def test_every_byte_counts(artifact: Path) -> None:
    for path in sorted(p for p in artifact.iterdir() if p.name != "manifest.json"):
        before = path.read_bytes()
        for position in {0, len(before) // 2, len(before) - 1}:
            changed = bytearray(before)
            changed[position] ^= 1
            path.write_bytes(changed)
            assert problems(artifact)[path.name] == "its content was changed (SHA-256 differs)"
        path.write_bytes(before + b"\0")
        assert problems(artifact)[path.name] == f"it has {len(before) + 1} bytes; expected {len(before)}"
        path.unlink()
        assert problems(artifact)[path.name] == "it is missing"
        path.write_bytes(before)
    assert problems(artifact) == {}


def test_what_was_added_is_found(artifact: Path) -> None:
    (artifact / "extra").mkdir()
    (artifact / "extra" / "tool.py").write_text("pass")
    (artifact / "link").symlink_to("/etc/hostname")
    expected = "it is not in the manifest"
    assert problems(artifact) == {"extra/tool.py": expected, "link": expected}


def test_a_link_in_the_place_of_a_file_is_found(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    shutil.move(artifact / "model.onnx", copy)
    (artifact / "model.onnx").symlink_to(copy)
    assert problems(artifact)["model.onnx"] == "it is a link; expected a file"


@pytest.mark.parametrize("key", ["task", "precision", "source", "steps", "measurements", "environment"])
def test_an_edited_manifest_is_found(artifact: Path, key: str) -> None:
    values = {"task": "x", "precision": "int4", "source": {}, "steps": [], "measurements": {"a": 1}}
    edit(artifact, lambda manifest: manifest.update({key: values.get(key, {})}))
    assert problems(artifact)["manifest.json"] == "it was edited (content_sha256 differs)"


@pytest.mark.parametrize(
    ("change", "where", "problem"),
    [
        (lambda m: m.update(precision="int4"), "precision", "the manifest says int4, the graph is float32"),
        (lambda m: m.update(components={}), "components", "the manifest names no graph"),
        (
            lambda m: m["components"].update(model="../model.onnx"),
            "components.model",
            "is not inside the artifact",
        ),
        (lambda m: m["components"].update(model="gone.onnx"), "components.model", "not among the files"),
        (
            lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": ""}}),
            "/etc/hostname",
            "outside",
        ),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "../x", "outside the artifact"),
        (lambda m: m["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}), "a\0b", "it is missing"),
    ],
)
def test_a_manifest_that_was_sealed_again_must_still_fit(
    artifact: Path, change: Callable[[dict[str, Any]], object], where: str, problem: str
) -> None:
    edit(artifact, change, seal=True)
    assert problem in problems(artifact)[where]


def test_a_graph_that_is_no_model_is_found_even_where_the_hashes_fit(artifact: Path) -> None:
    broken = (artifact / "model.onnx").read_bytes()[:-7]
    (artifact / "model.onnx").write_bytes(broken)
    entry = {"bytes": len(broken), "sha256": hashlib.sha256(broken).hexdigest()}
    edit(artifact, lambda manifest: manifest["files"].update({"model.onnx": entry}), seal=True)
    assert "model.onnx" in problems(artifact)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest\.json: cannot be read"),
        ("[]", r"manifest\.json: a list; expected a JSON object"),
        ("{}", r"manifest\.json: \w+: Field required; expected a manifest of schema version 1"),
    ],
)
def test_a_manifest_that_is_none_is_refused(artifact: Path, text: str, message: str) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(ModelFileError, match=message):
        verify_artifact(artifact)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no manifest\.json; expected an artifact made by onnxsmith"):
        verify_artifact(tmp_path)
    with pytest.raises(SourceError, match="no such directory"):
        verify_artifact(tmp_path / "gone")


def test_a_component_outside_of_the_artifact_is_never_opened(artifact: Path) -> None:
    edit(artifact, lambda manifest: manifest["components"].update(model="../../etc/passwd"))
    with pytest.raises(
        ModelFileError, match=r"component 'model' at '\.\./\.\./etc/passwd'; expected a file inside"
    ):
        load_package(artifact)


def test_results_are_plain_json() -> None:
    value = {"a": (np.float32(0.5), float("nan"), float("-inf")), 3: Path("x"), "text": "\udce9"}
    plain = to_plain(value)
    assert plain == {"a": [0.5, None, None], "3": "x", "text": "\\udce9"}
    json.dumps(plain, allow_nan=False)
