"""The artifact: a directory with models, what they need, and a manifest that says where they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from onnxsmith._version import __version__
from onnxsmith.environment import describe_versions
from onnxsmith.errors import ModelFileError, OnnxsmithError, SourceError
from onnxsmith.hashing import file_sha256
from onnxsmith.onnx_file import check_model
from onnxsmith.own_operators import uses_own_operators
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import MANIFEST_NAME, RECORD_NAMES, is_inside, load_package, read_manifest
from onnxsmith.pipeline.records import check_records
from onnxsmith.pipeline.signing import SIGNATURE_NAME, check_signature
from onnxsmith.runtime.kernel_library import SOURCES, kernel_files

__all__ = ["FileEntry", "Finding", "Manifest", "StepEntry", "to_plain", "verify_artifact", "write_manifest"]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Model):
    """One file of an artifact."""

    bytes: int
    sha256: str


class StepEntry(_Model):
    """One thing that was done to the model."""

    name: str
    parameters: dict[str, Any]
    details: dict[str, Any]


class Manifest(_Model):
    """What an artifact is, where it comes from, and what was measured of it."""

    schema_version: Literal[1]
    onnxsmith: str
    task: str | None
    precision: str
    components: dict[str, str]
    source: dict[str, Any]
    steps: list[StepEntry]
    environment: dict[str, Any]
    measurements: dict[str, Any]
    recipe: dict[str, Any] | None
    files: dict[str, FileEntry]
    records: list[str]
    """Files that are of one run alone; ``records.json`` has their hashes."""
    content_sha256: str
    """Of everything else in the manifest, as JSON with sorted keys and without spaces."""


def write_manifest(
    package: ModelPackage,
    directory: Path,
    *,
    measurements: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    records: Collection[str] = (),
    hashes: Mapping[Path, str] | None = None,
) -> Manifest:
    """Writes ``manifest.json`` for everything that stands in a directory. Comes last.

    Before that, the sources of onnxsmith's own operators are put there where a graph has some, so that it can
    be run where no onnxsmith is.

    Args:
        package: What was saved there.
        directory: The artifact.
        measurements: What was measured of it.
        recipe: What it was made by.
        records: Names of ``RECORD_NAMES`` that are there or will be.
        hashes: The SHA-256 of files that it is known of, because they were just written; others are read.
    """
    if any(uses_own_operators(component.model) for component in package.components.values()):
        (directory / SOURCES.name).mkdir(exist_ok=True)
        for name, content in kernel_files().items():
            (directory / name).write_bytes(content)
    components = {}
    for name, component in package.components.items():
        assert component.path is not None, "the package was not saved"
        components[name] = component.path.relative_to(directory).as_posix()
    manifest = Manifest(
        content_sha256="",
        schema_version=1,
        onnxsmith=__version__,
        task=package.task,
        precision=package.precision,
        components=components,
        source=to_plain(dict(package.source)),
        steps=[
            StepEntry(name=s.name, parameters=to_plain(dict(s.parameters)), details=to_plain(dict(s.details)))
            for s in package.steps
        ],
        environment=describe_versions(),
        measurements=_rounded(to_plain(measurements or {})),
        recipe=to_plain(recipe),
        files=file_entries(directory, hashes),
        records=sorted(records),
    )
    manifest = manifest.model_copy(update={"content_sha256": _content_sha256(manifest)})
    text = json.dumps(manifest.model_dump(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return manifest


def file_entries(directory: Path, hashes: Mapping[Path, str] | None = None) -> dict[str, FileEntry]:
    """Size and hash of each file in a directory but the manifest and what is of one run alone, by name.

    ``hashes`` has those that are known already.
    """
    known = hashes or {}
    entries = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in {MANIFEST_NAME, SIGNATURE_NAME, *RECORD_NAMES}:
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=known.get(path) or file_sha256(path))
    return entries


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong with an artifact.

    Attributes:
        where: The file or key.
        problem: What is wrong with it.
    """

    where: str
    problem: str


def verify_artifact(directory: Path, *, key: Path | None = None) -> list[Finding]:
    """Checks an artifact: every byte against the manifest, and the manifest against the graphs.

    A signature that is there must be of this manifest, whoever made it.

    Args:
        directory: The artifact.
        key: The Ed25519 public key, in PEM, that must have signed it.

    Returns:
        What is wrong; an empty list means that nothing is.

    Raises:
        SourceError: This is not an artifact.
        ModelFileError: Its manifest or signature cannot be read.
        BadInputError: The key cannot be read.
    """
    if not directory.is_dir() or not (directory / MANIFEST_NAME).is_file():
        raise SourceError(
            str(directory),
            got="no manifest.json" if directory.is_dir() else "no such directory",
            expected="an artifact made by onnxsmith",
        )
    try:
        manifest = Manifest.model_validate(read_manifest(directory))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise ModelFileError(
            f"{directory / MANIFEST_NAME}: {at}", got=first["msg"], expected="a manifest of schema version 1"
        ) from error
    findings = _file_findings(directory, manifest)
    _, problem = check_signature(directory, key)
    if problem:
        findings.append(Finding(SIGNATURE_NAME, problem))
    if manifest.content_sha256 != _content_sha256(manifest):
        findings.append(Finding(MANIFEST_NAME, "it was edited (content_sha256 differs)"))
    if not manifest.components:
        findings.append(Finding("components", "the manifest names no graph"))
    for name, file in manifest.components.items():
        if not is_inside(file):
            findings.append(Finding(f"components.{name}", f"{file!r} is not inside the artifact"))
            continue
        if file not in manifest.files:
            findings.append(Finding(f"components.{name}", f"{file} is not among the files of the manifest"))
            continue
        try:
            check_model(directory / file)
        except OnnxsmithError as error:
            findings.append(Finding(file, str(error)))
    if not findings:
        findings += _graph_findings(directory, manifest)
    return findings


def _file_findings(directory: Path, manifest: Manifest) -> list[Finding]:
    findings = []
    for name, entry in manifest.files.items():
        try:
            problem = _file_problem(directory, name, entry)
        except (OSError, ValueError) as error:
            problem = f"it cannot be read: {error}"
        if problem:
            findings.append(Finding(name, problem))
    present = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    } - {MANIFEST_NAME, SIGNATURE_NAME}
    # A manifest exempts nothing but what is known to be of one run alone.
    records = RECORD_NAMES & set(manifest.records)
    findings += [Finding(name, problem) for name, problem in check_records(directory, records).items()]
    findings += [
        Finding(name, "it is not in the manifest")
        for name in sorted(present - manifest.files.keys() - records)
    ]
    return findings


def _file_problem(directory: Path, name: str, entry: FileEntry) -> str | None:
    path = directory / name
    if not is_inside(name):
        return "the manifest names a path outside the artifact"
    # The artifact itself may be a link, such as one to the current version.
    inside = [part for part in (path, *path.parents) if part != directory and part.is_relative_to(directory)]
    if any(part.is_symlink() for part in inside):
        return "it is a link; expected a file"
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != entry.bytes:
        return f"it has {path.stat().st_size} bytes; expected {entry.bytes}"
    return None if file_sha256(path) == entry.sha256 else "its content was changed (SHA-256 differs)"


def _graph_findings(directory: Path, manifest: Manifest) -> list[Finding]:
    """What the manifest says of the graphs and the graphs do not bear out."""
    found = load_package(directory).precision
    if found != manifest.precision:
        return [Finding("precision", f"the manifest says {manifest.precision}, the graph is {found}")]
    return []


def to_plain(value: Any) -> Any:
    """Plain JSON data: no NaN, infinity, tuples or numpy scalars."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        # A path or argument that is not UTF-8 holds halves of surrogate pairs, which no file takes.
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int | float | bool) or value is None:
        return value
    return str(value)


def _rounded(value: Any) -> Any:
    """Numbers with six significant digits: what follows differs from one kind of processor to the next."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _content_sha256(manifest: Manifest) -> str:
    content = manifest.model_dump(exclude={"content_sha256"})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
