"""Results of steps on disk, addressed by everything that decided them.

An entry is a directory: files, and ``.entry`` with what the step found and a hash of every file. It is
made in a directory of its own and renamed into place, so it is there whole or not at all, whoever is killed
when. What does not fit its hashes when it is opened is removed and made again. An entry that is open is
locked, so that nobody evicts it; the system drops the lock with the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from onnxsmith.hashing import file_sha256
from onnxsmith.pipeline.artifact import to_plain
from onnxsmith.pipeline.locks import share_lock, take_lock
from onnxsmith.pipeline.step_keys import StepKey

__all__ = ["CacheEntry", "OpenStep", "StepCache"]

# Not a name that a package may have.
_ENTRY = ".entry"
_SCHEMA = 1
# A process that made a directory has locked it long before this.
_GRACE_S = 60.0
# How often another process may make and another one evict an entry, while this one wants to put it there.
_TRIES = 20


@dataclasses.dataclass(frozen=True)
class OpenStep:
    """The result of a step.

    Attributes:
        directory: Its files; nobody may change them.
        facts: What the step found, as plain data.
        hit: Whether it was found and not made.
    """

    directory: Path
    facts: Mapping[str, Any]
    hit: bool


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """An entry, for those who look at the cache.

    Attributes:
        kind: Which step it is of.
        key: Its address, in hex.
        directory: Where it is.
        bytes: What its files take.
        used: When it was last opened, in seconds since 1970.
        summary: What it was made from, in a few words.
    """

    kind: str
    key: str
    directory: Path
    bytes: int
    used: float
    summary: str


class StepCache:
    """A directory with results of steps. Close it, or what was opened stays locked."""

    def __init__(self, root: Path, *, max_bytes: int | None = None) -> None:
        """Names the directory; it is made when something is stored.

        Args:
            root: Where.
            max_bytes: What entries may take together; the least recently used ones go first.
        """
        self.root, self.max_bytes = root, max_bytes
        self._steps, self._scratch = root / "steps", root / "tmp"
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Lets go of what is open."""
        self._stack.close()

    def has(self, key: StepKey) -> bool:
        """Whether there is an entry; it may still turn out to be damaged."""
        return (self._place(key) / _ENTRY).is_file()

    def open(self, key: StepKey) -> OpenStep | None:
        """The result of a step if it is there and whole; it is locked until the cache is closed."""
        place = self._place(key)
        try:
            descriptor = os.open(place, os.O_RDONLY)
        except OSError:
            return None
        # One that somebody is evicting is as good as gone.
        if not share_lock(descriptor) or not _is_at(place, descriptor):
            os.close(descriptor)
            return None
        facts = self._checked(place, key)
        if facts is None:
            os.close(descriptor)
            self._discard(place, damaged=True)
            return None
        self._stack.callback(os.close, descriptor)
        with contextlib.suppress(OSError):
            os.utime(place / _ENTRY)
        return OpenStep(place, facts, hit=True)

    def result(
        self, key: StepKey, make: Callable[[Path], Mapping[str, Any]], *, renew: bool = False
    ) -> OpenStep:
        """The result of a step: found, or else made and stored.

        Args:
            key: Its address.
            make: Fills an empty directory, which has another name afterwards, and returns facts: plain data.
            renew: Whether to make it even where it is found, and to store it in its place.

        Raises:
            OSError: It cannot be stored.
        """
        found = None if renew else self.open(key)
        if found is not None:
            return found
        with self._claim() as claim:
            files = claim / "files"
            files.mkdir()
            began = time.perf_counter()
            facts = to_plain(dict(make(files)))
            entry = {
                "schema_version": _SCHEMA,
                "kind": key.kind,
                "key": key.digest,
                "made_from": to_plain(dict(key.made_from)),
                "facts": facts,
                "seconds": time.perf_counter() - began,
                "files": {
                    path.relative_to(files).as_posix(): {
                        "bytes": path.stat().st_size,
                        "sha256": file_sha256(path),
                    }
                    for path in sorted(files.rglob("*"))
                    if path.is_file()
                },
            }
            # In the order that facts have: what is drawn from them must not depend on where they were.
            text = json.dumps(entry | {"sha256": _entry_sha256(entry)}, allow_nan=False)
            (files / _ENTRY).write_text(text, encoding="utf-8")
            place = self._place(key)
            place.parent.mkdir(parents=True, exist_ok=True)
            if renew:
                self._discard(place, damaged=True)
            stored = self._put(files, key, facts)
        self.prune(self.max_bytes)
        return stored

    def _put(self, files: Path, key: StepKey, facts: Mapping[str, Any]) -> OpenStep:
        """Renames a finished entry into place, open; where another process was faster, theirs is the same."""
        place = self._place(key)
        # The lock is the directory's and goes with it: nobody evicts it before it is open.
        descriptor = os.open(files, os.O_RDONLY)
        share_lock(descriptor)
        for number in range(_TRIES):
            try:
                files.rename(place)
                self._stack.callback(os.close, descriptor)
                return OpenStep(place, facts, hit=False)
            except OSError:
                theirs = self.open(key)
            if theirs is not None:
                os.close(descriptor)
                return dataclasses.replace(theirs, hit=False)
            # Someone is just taking theirs away, for which a busy machine may need a while.
            time.sleep(0.001 * 2 ** min(number, 8))
        os.close(descriptor)
        raise OSError(f"{place} cannot be written")

    def entries(self) -> list[CacheEntry]:
        """All entries, the most recently used first."""
        found = []
        for place in self._steps.glob("??/*") if self._steps.is_dir() else ():
            try:
                entry = json.loads((place / _ENTRY).read_text(encoding="utf-8"))
                used = (place / _ENTRY).stat().st_mtime
                size = (place / _ENTRY).stat().st_size + sum(f["bytes"] for f in entry["files"].values())
                summary = str(entry["made_from"].get("summary", ""))
                found.append(CacheEntry(entry["kind"], place.name, place, size, used, summary))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
                found.append(CacheEntry("damaged", place.name, place, size, 0.0, ""))
        return sorted(found, key=lambda entry: -entry.used)

    def prune(self, max_bytes: int | None, *, unused_s: float | None = None) -> list[CacheEntry]:
        """Removes what is damaged, what killed processes left, and the least recently used entries.

        What is open stays.

        Args:
            max_bytes: What may stay together; no limit where None.
            unused_s: Remove what was not used for so long, too.

        Returns:
            What was removed.
        """
        self._sweep()
        if max_bytes is None and unused_s is None:
            return []
        entries, removed = self.entries(), []
        total = sum(entry.bytes for entry in entries)
        for entry in reversed(entries):
            too_old = unused_s is not None and entry.used < time.time() - unused_s
            too_much = max_bytes is not None and total > max_bytes
            if (too_old or too_much or entry.kind == "damaged") and self._discard(entry.directory):
                total -= entry.bytes
                removed.append(entry)
        return removed

    def _place(self, key: StepKey) -> Path:
        return self._steps / key.digest[:2] / key.digest

    def _checked(self, place: Path, key: StepKey) -> Mapping[str, Any] | None:
        """The facts of an entry if every byte of it is as it was written."""
        try:
            entry = json.loads((place / _ENTRY).read_text(encoding="utf-8"))
            sound = entry.pop("sha256") == _entry_sha256(entry) and entry["key"] == key.digest
            if not sound or entry["schema_version"] != _SCHEMA:
                return None
            for name, file in entry["files"].items():
                path = place / name
                if path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
                    return None
            facts: Mapping[str, Any] = entry["facts"]
            return facts
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _discard(self, place: Path, *, damaged: bool = False) -> bool:
        """Removes an entry, unless somebody has it open; a damaged one is of no use to them either."""
        try:
            descriptor = os.open(place, os.O_RDONLY)
        except OSError:
            return False
        try:
            if not (take_lock(descriptor) or damaged) or not _is_at(place, descriptor):
                return False
            with self._claim() as claim:
                # Gone under its name at once, whatever happens then.
                place.rename(claim / "gone")
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _claim(self) -> Iterator[Path]:
        """A directory of this process alone, on the disk of the cache, which goes when the block ends."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        claim = Path(tempfile.mkdtemp(dir=self._scratch))
        descriptor = os.open(claim, os.O_RDONLY)
        take_lock(descriptor)
        try:
            yield claim
        finally:
            shutil.rmtree(claim, ignore_errors=True)
            os.close(descriptor)

    def _sweep(self) -> None:
        """Removes what killed processes left half made."""
        for claim in self._scratch.iterdir() if self._scratch.is_dir() else ():
            with contextlib.suppress(OSError):
                if time.time() - claim.stat().st_mtime < _GRACE_S:
                    continue
                descriptor = os.open(claim, os.O_RDONLY)
                try:
                    if take_lock(descriptor):
                        shutil.rmtree(claim, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _is_at(place: Path, descriptor: int) -> bool:
    """Whether an open directory is still the one of that name."""
    try:
        return os.path.samestat(place.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _entry_sha256(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, allow_nan=False).encode()).hexdigest()
