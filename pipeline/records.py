"""What an artifact keeps that is of one run alone: times, and the report that shows them.

Everything else in an artifact follows from its inputs and the versions of the libraries, to the byte. So
these files stand apart: the manifest has their names and not their hashes, and ``records.json`` has the
hashes, of them and of the manifest that they go with.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from onnxsmith.errors import BadInputError, ModelFileError
from onnxsmith.hashing import file_sha256
from onnxsmith.package_io import MANIFEST_NAME, RECORD_NAMES, RECORDS_NAME

__all__ = ["check_records", "created_at", "fixed_time", "write_records"]

_EPOCH = "SOURCE_DATE_EPOCH"


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class _File(_Model):
    bytes: int
    sha256: str


class _Records(_Model):
    schema_version: Literal[1]
    created: str
    manifest_sha256: str
    files: dict[str, _File]
    content_sha256: str


def fixed_time() -> int | None:
    """The time that ``SOURCE_DATE_EPOCH`` sets, in seconds since 1970; None where it is not set.

    Where it is, the report leaves out when and how long: see https://reproducible-builds.org/specs/source-date-epoch.

    Raises:
        BadInputError: It is no such number.
    """
    text = os.environ.get(_EPOCH)
    if not text:
        return None
    # Years of four digits: ten digits of seconds, and some.
    if not text.isascii() or not text.isdecimal() or int(text) > 253_402_300_799:
        raise BadInputError(_EPOCH, got=repr(text), expected="seconds since 1970-01-01")
    return int(text)


def created_at() -> str:
    """Now, or what ``SOURCE_DATE_EPOCH`` sets, in UTC."""
    fixed = fixed_time()
    now = datetime.datetime.now(datetime.UTC)
    when = now if fixed is None else datetime.datetime.fromtimestamp(fixed, datetime.UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def write_records(directory: Path, created: str) -> None:
    """Writes ``records.json`` for the report that stands in an artifact, after the manifest.

    Args:
        directory: The artifact.
        created: When the run began, in UTC.
    """
    files = {
        name: _File(bytes=(directory / name).stat().st_size, sha256=file_sha256(directory / name))
        for name in sorted(RECORD_NAMES - {RECORDS_NAME})
        if (directory / name).is_file()
    }
    records = _Records(
        schema_version=1,
        created=created,
        manifest_sha256=file_sha256(directory / MANIFEST_NAME),
        files=files,
        content_sha256="",
    )
    plain = records.model_dump()
    plain["content_sha256"] = _content_sha256(plain)
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (directory / RECORDS_NAME).write_text(text, encoding="utf-8")


def check_records(directory: Path, names: Collection[str]) -> dict[str, str]:
    """What is wrong with the records of an artifact: file to problem.

    Args:
        directory: The artifact.
        names: What the manifest says is there; each a name of ``RECORD_NAMES``.

    Raises:
        ModelFileError: ``records.json`` is no such thing.
    """
    path = directory / RECORDS_NAME
    if not names:
        return {}
    missing = {name: "it is missing" for name in sorted(names) if not (directory / name).is_file()}
    links = {name: "it is a link; expected a file" for name in names if (directory / name).is_symlink()}
    if missing or links:
        return missing | links
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        records = _Records.model_validate(plain)
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelFileError(
            str(path), got=f"cannot be read: {said}", expected="records of schema version 1"
        ) from error
    problems = {}
    if records.content_sha256 != _content_sha256(plain):
        problems[RECORDS_NAME] = "it was edited (content_sha256 differs)"
    elif records.manifest_sha256 != file_sha256(directory / MANIFEST_NAME):
        problems[RECORDS_NAME] = "it is of another manifest"
    for name in sorted({*names, *records.files} - {RECORDS_NAME}):
        entry = records.files.get(name)
        if entry is None or name not in names:
            problems[name] = f"it is not in both {MANIFEST_NAME} and {RECORDS_NAME}"
        elif (directory / name).stat().st_size != entry.bytes:
            problems[name] = f"it has {(directory / name).stat().st_size} bytes; expected {entry.bytes}"
        elif file_sha256(directory / name) != entry.sha256:
            problems[name] = "its content was changed (SHA-256 differs)"
    return problems


def _content_sha256(plain: Mapping[str, Any]) -> str:
    content = {key: value for key, value in plain.items() if key != "content_sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
