"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnxsmith.errors import DestinationError, ResourceError
from onnxsmith.package_io import MANIFEST_NAME

__all__ = ["check_destination", "require_space", "staged_directory"]

_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-(?P<pid>\d+)-.+")


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuses a destination that cannot or must not be written, before any work is done.

    Raises:
        DestinationError: It exists and ``force`` is off, it is not an artifact of ours, or the place
            cannot be written.
    """
    if destination.is_symlink():
        raise DestinationError(str(destination), got="a link", expected="a path that does not exist")
    if destination.exists():
        if not destination.is_dir():
            raise DestinationError(
                str(destination), got="a file", expected="a directory or a path that does not exist"
            )
        ours = (destination / MANIFEST_NAME).is_file()
        empty = not any(destination.iterdir())
        if not ours and not empty:
            raise DestinationError(
                str(destination),
                got="a directory with other things in it",
                expected="an artifact, an empty directory, or a path that does not exist",
                remedy="Nothing but an artifact is ever replaced, not even with --force",
            )
        if ours and not force:
            raise DestinationError(
                str(destination),
                got="an artifact is already there",
                expected="a path that does not exist",
                remedy="Replace it with --force, or choose another -o",
            )
    parent = destination.resolve().parent
    existing = parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise DestinationError(str(destination), got=f"{existing} is a file", expected="a directory")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # The only honest test of permission is to write: modes do not tell of read-only mounts or of root.
        with tempfile.TemporaryDirectory(prefix=".onnxsmith-", dir=parent):
            pass
    except OSError as error:
        raise _destination_error(error, destination) from error


def require_space(directory: Path, needed_bytes: int, *, purpose: str) -> None:
    """Raises ResourceError where a directory's disk has less space than needed."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise ResourceError(
            purpose,
            got=f"{free / 1e6:.0f} MB free on the disk of {directory}",
            expected=f"about {needed_bytes / 1e6:.0f} MB",
            remedy="Free some space, or choose another -o",
        )


@contextlib.contextmanager
def staged_directory(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh directory beside the destination, renamed into place if the block ends well.

    If the block raises, or the process is interrupted, the destination is as it was and the fresh
    directory is gone. What a killed process left behind is removed by the next one.

    Args:
        destination: Where the result is to be.
        force: Whether an artifact that is there may be replaced.

    Raises:
        DestinationError: See ``check_destination``.
        ResourceError: The disk is full.
    """
    check_destination(destination, force=force)
    destination = destination.resolve()
    parent = destination.parent
    _remove_debris(parent, destination.name)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-{os.getpid()}-", dir=parent))
    except OSError as error:
        raise _destination_error(error, destination) from error
    try:
        yield staging
        # mkdtemp makes directories for one's own eyes only; an artifact is like any other directory.
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        _sync(staging)
        _replace(staging, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise _destination_error(error, destination) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, destination: Path) -> None:
    if not destination.exists():
        staging.rename(destination)
        return
    # The old artifact steps aside, and comes back if the new one cannot take its place.
    aside = Path(
        tempfile.mkdtemp(prefix=f".{destination.name}.partial-{os.getpid()}-", dir=destination.parent)
    )
    try:
        destination.rename(aside / "old")
        try:
            staging.rename(destination)
        except BaseException:
            (aside / "old").rename(destination)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Makes sure that the content is on the disk before the name is."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _remove_debris(parent: Path, name: str) -> None:
    import psutil

    for entry in parent.iterdir():
        match = _PARTIAL.fullmatch(entry.name)
        if match is None or match["name"] != name or psutil.pid_exists(int(match["pid"])):
            continue
        saved = entry / "old"
        # Killed between the two renames: the old artifact is here and nowhere else.
        if saved.is_dir() and not (parent / name).exists():
            saved.rename(parent / name)
        shutil.rmtree(entry, ignore_errors=True)


def _destination_error(error: OSError, destination: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            str(destination),
            got=f"the disk does not take it: {error.strerror}",
            expected="enough space",
            remedy="Free some space, or choose another -o",
        )
    return DestinationError(
        str(destination),
        got=f"cannot be written: {error.strerror or error}",
        expected="a directory that you may write",
        remedy="Choose another -o",
    )
