"""What is known of graphs that were checked before: the same bytes need not be read and checked again.

A note is kept in the user's own directory under the hash of the whole graph file, so it is of these very
bytes, whatever the file is called and wherever it came from. External data is looked at each time: a note
says how long each data file has to be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxsmith._version import __version__
from onnxsmith.user_directories import cache_limit, given_home, system_caches

__all__ = ["recall", "remember"]

# Hashing more takes longer than reading the graph does.
_LARGEST_BYTES = 32 * 1024 * 1024
# Some kilobytes each.
_MOST_NOTES = 1000


def recall(path: Path, kind: str) -> dict[str, Any] | None:
    """What was remembered of a graph file.

    Args:
        path: The ``.onnx`` file.
        kind: Of the note, with the version of its form.

    Returns:
        None where nothing is known of these bytes, or a data file is not what it has to be.
    """
    try:
        note = _note(path, kind)
        if note is None:
            return None
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if all(_is_there(path.parent, name, size) for name, size in found["data"].items()):
            facts: dict[str, Any] = found["facts"]
            return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # A note that cannot be read is no note.
        pass
    return None


def remember(path: Path, kind: str, facts: Mapping[str, Any], data: Mapping[str, int]) -> None:
    """Keeps a note of a graph file that was checked.

    Args:
        path: The ``.onnx`` file.
        kind: Of the note, with the version of its form.
        facts: Plain data.
        data: Each external data file, relative to the graph's directory, and the bytes that it has to have.
    """
    # A home that is read only or full is no reason not to work.
    with contextlib.suppress(OSError):
        note = _note(path, kind)
        if note is None:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        notes = sorted(note.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)
        for old in notes[: max(0, len(notes) - _MOST_NOTES + 1)]:
            old.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=note.parent, suffix=".new", delete=False, encoding="utf-8"
        ) as file:
            json.dump({"facts": facts, "data": data}, file)
        os.replace(file.name, note)


def _note(path: Path, kind: str) -> Path | None:
    directory = _directory()
    if directory is None or path.stat().st_size > _LARGEST_BYTES:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return directory / f"{digest}-{kind}-{__version__}.json"


def _directory() -> Path | None:
    """Beside the cache of steps; None where caches are switched off."""
    if cache_limit() == 0:
        return None
    home = given_home()
    return home / "known-graphs" if home else system_caches() / "onnxsmith-known-graphs"


def _is_there(directory: Path, name: str, size: int) -> bool:
    """Whether a data file is a regular file inside the directory, with links resolved, and long enough."""
    root = directory.resolve()
    path = (root / name).resolve()
    status = path.stat()
    return root in path.parents and stat.S_ISREG(status.st_mode) and status.st_size >= size
