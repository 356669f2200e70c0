"""Packages on disk: a directory with ONNX files, configuration and, in an artifact, a manifest."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from pathlib import Path, PurePosixPath
from typing import Any

from onnxsmith.errors import ModelFileError, SourceError
from onnxsmith.onnx_file import load_model, save_model
from onnxsmith.package import (
    COMPONENT_ORDER,
    MAIN,
    TEXT_GENERATION,
    Component,
    ModelPackage,
    StepRecord,
    cache_pairs,
)

__all__ = [
    "MANIFEST_NAME",
    "RECORDS_NAME",
    "RECORD_NAMES",
    "is_inside",
    "load_files",
    "load_package",
    "read_manifest",
    "save_package",
    "sole_graph",
]

MANIFEST_NAME = "manifest.json"
RECORDS_NAME = "records.json"
# Of one run alone: times, and what shows them. All other bytes of an artifact follow from its inputs.
RECORD_NAMES = frozenset({RECORDS_NAME, "report.html", "report.json"})

# Configuration and tokenizer files are small; a stranger's directory may hold anything.
_MAX_FILE_BYTES = 64 * 1024 * 1024
_FILE_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# Made anew for each artifact, from what it is.
_NOT_PACKAGE_FILES = frozenset(
    {
        MANIFEST_NAME,
        *RECORD_NAMES,
        "genai_config.json",
        "modules.json",
        "requirements.txt",
        "sbom.cdx.json",
        "sentence_bert_config.json",
    }
)


def save_package(
    package: ModelPackage, directory: Path, *, hashes: MutableMapping[Path, str] | None = None
) -> None:
    """Writes the graphs and files of a package to a directory that exists.

    Afterwards the package's components know where they are, and its weights are mapped from there.

    Args:
        package: What to write.
        directory: Where to.
        hashes: Takes the SHA-256 of the files with weights; see ``save_model``.

    Raises:
        DestinationError: A file cannot be written.
        ResourceError: The disk is full.
    """
    for name, component in package.components.items():
        path = directory / f"{name}.onnx"
        save_model(component.model, path, hashes=hashes)
        component.model, component.path = load_model(path), path
    for name, content in package.files.items():
        (directory / name).write_bytes(content)


def load_package(path: Path) -> ModelPackage:
    """Opens an artifact, a directory with ONNX files of any origin, or one ONNX file.

    Weights stay on disk, memory-mapped. A manifest is believed for the task and the lineage, but not
    checked; see ``verify`` for that.

    Raises:
        SourceError: There is no model.
        ModelFileError: A file is damaged, invalid or hostile.
    """
    if not path.exists():
        raise SourceError(str(path), got="no such file or directory", expected="an artifact or an ONNX file")
    if path.is_file():
        # Beside a lone file there may be the files of another model; only a directory is a package.
        return _finish(ModelPackage({"model": Component(load_model(path), path)}), {})
    manifest = read_manifest(path) if (path / MANIFEST_NAME).is_file() else {}
    names = _component_files(path, manifest)
    package = ModelPackage(
        components={name: Component(load_model(path / file), path / file) for name, file in names.items()}
    )
    package.files = load_files(path)
    return _finish(package, manifest)


def load_files(path: Path) -> dict[str, bytes]:
    """The tokenizer, processor and configuration files of a package: file name to content.

    Args:
        path: An artifact or a directory with ONNX files; a lone file has none.
    """
    files: dict[str, bytes] = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.suffix not in _FILE_SUFFIXES or entry.name in _NOT_PACKAGE_FILES or not entry.is_file():
            continue
        if entry.stat().st_size <= _MAX_FILE_BYTES and path.resolve() in entry.resolve().parents:
            files[entry.name] = entry.read_bytes()
    return files


def sole_graph(path: Path) -> Path | None:
    """The file of a model's only graph; None where there are several, or no model.

    Raises:
        ModelFileError: The manifest cannot be read.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    manifest = read_manifest(path) if (path / MANIFEST_NAME).is_file() else {}
    try:
        names = _component_files(path, manifest)
    except SourceError:
        return None
    file = path / next(iter(names.values()))
    return file if len(names) == 1 and file.is_file() else None


def is_inside(name: str) -> bool:
    """Whether a relative path, as a manifest gives it, stays inside of its directory."""
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact as plain data.

    Raises:
        ModelFileError: It is not JSON, or not an object.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(str(path), got=f"cannot be read: {error}", expected="JSON") from error
    if not isinstance(manifest, dict):
        raise ModelFileError(str(path), got=f"a {type(manifest).__name__}", expected="a JSON object")
    return manifest


def _component_files(path: Path, manifest: dict[str, Any]) -> dict[str, str]:
    listed = manifest.get("components")
    if isinstance(listed, dict) and listed:
        for name, file in listed.items():
            if not isinstance(file, str) or not is_inside(file):
                raise ModelFileError(
                    str(path / MANIFEST_NAME),
                    got=f"component {name!r} at {file!r}",
                    expected="a file inside the artifact",
                )
        return {name: listed[name] for name in sorted(listed, key=_order)}
    found = sorted(p.name for p in path.glob("*.onnx"))
    if not found:
        raise SourceError(
            str(path), got="a directory without .onnx files", expected="an artifact or an ONNX model"
        )
    parts = {name.removesuffix(".onnx"): name for name in found}
    if len(parts) > 1 and parts.keys() <= set(COMPONENT_ORDER) - {MAIN}:
        return {name: parts[name] for name in sorted(parts, key=_order)}
    if len(found) > 1:
        raise SourceError(
            str(path), got=f"{len(found)} ONNX files ({', '.join(found[:4])})", remedy="Name the file itself"
        )
    return {"model": found[0]}


def _order(name: str) -> tuple[int, str]:
    """Components in the order in which they run: files and JSON objects have another."""
    known = name in COMPONENT_ORDER
    return (COMPONENT_ORDER.index(name) if known else len(COMPONENT_ORDER), name)


def _finish(package: ModelPackage, manifest: dict[str, Any]) -> ModelPackage:
    task = manifest.get("task")
    package.task = task if isinstance(task, str) else _guess_task(package)
    source = manifest.get("source")
    package.source = source if isinstance(source, dict) else {}
    steps = manifest.get("steps")
    if isinstance(steps, list):
        package.steps = tuple(
            StepRecord(
                str(step.get("name", "?")),
                step.get("parameters") or {},
                float(step.get("seconds") or 0.0),
                step.get("details") or {},
            )
            for step in steps
            if isinstance(step, dict)
        )
    return package


def _guess_task(package: ModelPackage) -> str | None:
    for component in package.components.values():
        names = {spec.name for spec in component.outputs}
        if "logits" in names and cache_pairs(component.inputs, component.outputs):
            return TEXT_GENERATION
    return None
