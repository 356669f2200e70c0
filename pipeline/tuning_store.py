"""What a search has measured, kept by what decides the result: nothing is measured twice."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith._version import __version__
from onnxsmith.environment import describe_environment
from onnxsmith.errors import DestinationError
from onnxsmith.pipeline.staging import write_beside
from onnxsmith.source import ModelSource

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["MeasurementStore", "alone_in", "fingerprint", "measuring_environment", "source_sha256"]

_CHUNK = 1 << 20


class MeasurementStore:
    """A directory with one small JSON file for each measurement."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory where it is missing."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was measured, or None; a file that is damaged was never measured."""
        try:
            found = json.loads((self._directory / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps a measurement: whole, or not at all."""
        text = json.dumps(value, indent=1, allow_nan=True)
        write_beside(self._directory / f"{key}.json", text + "\n")

    def __len__(self) -> int:
        """The number of measurements."""
        return len(list(self._directory.glob("*.json")))


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keeps a second search out of a directory.

    Raises:
        DestinationError: There is one already.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DestinationError(
                    str(directory), got="another search is at work there", expected="one at a time",
                    remedy="Wait for it, or give another --store",
                ) from error  # fmt: skip
        yield
    finally:
        os.close(descriptor)


def fingerprint(parts: Mapping[str, Any] | Sequence[Any]) -> str:
    """A hash of plain data."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def source_sha256(source: ModelSource) -> str:
    """A hash of the files that a model is read from; of a factory, of the module that it stands in."""
    digest = hashlib.sha256(source.text.encode() if source.path is None else b"")
    if source.path is not None:
        root = source.path
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    else:
        files = _module_files(source.target)
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK):
                digest.update(block)
    return digest.hexdigest()


def _module_files(target: str) -> list[Path]:
    name = target.partition(":")[0]
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return [Path(spec.origin)] if spec is not None and spec.origin and Path(spec.origin).is_file() else []


def measuring_environment() -> dict[str, Any]:
    """What decides a measurement besides the model: versions; and for times the machine."""
    known = describe_environment()
    return {
        "versions": {**known["versions"], "onnxsmith": __version__, "python": known["python"]},
        "machine": {key: known[key] for key in ("cpu", "logical_cpus", "platform")},
    }
