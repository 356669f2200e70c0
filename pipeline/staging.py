"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnxsmith.errors import DestinationError, OnnxsmithError, ResourceError
from onnxsmith.package_io import MANIFEST_NAME, RECORD_NAMES, read_manifest
from onnxsmith.pipeline.locks import take_lock
from onnxsmith.pipeline.signing import SIGNATURE_NAME

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: no locks, so nothing that may be alive is ever removed
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "beside",
    "check_destination",
    "check_report_place",
    "destination_error",
    "is_full",
    "require_space",
    "staged_directory",
    "write_beside",
]

_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-\w+")
_REPORT_FILES = frozenset({"report.json", "report.html"})

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.EBUSY, errno.ENOENT, errno.EINVAL,
)  # fmt: skip


def beside(destination: Path, suffix: str) -> Path:
    """A place beside an output, with its name and a suffix. A path may have no name: ``.`` has none.

    Raises:
        DestinationError: It is the root of a file system, which nothing is beside.
    """
    if destination.name in ("", ".."):
        destination = destination.resolve()
    if not destination.name:
        raise DestinationError(str(destination), got="the root", expected="a path that does not exist")
    return destination.with_name(f"{destination.name}{suffix}")


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuses a destination that cannot or must not be written, before any work is done.

    Raises:
        DestinationError: It exists and ``force`` is off, it is not an artifact of ours, or the place
            cannot be written.
        ResourceError: The disk is full.
    """
    try:
        _check_content(destination, force=force)
        existing = destination.resolve().parent
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise DestinationError(str(destination), got=f"{existing} is a file", expected="a directory")
        # The only honest test of permission is to write: modes do not tell of read-only mounts or of root.
        with tempfile.TemporaryDirectory(prefix=".onnxsmith-", dir=existing):
            pass
    except OSError as error:
        raise destination_error(error, destination) from error


def _check_content(destination: Path, *, force: bool) -> None:
    where = str(destination)
    if destination.is_symlink():
        raise DestinationError(where, got="a link", expected="a path that does not exist")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise DestinationError(where, got="a file", expected="a directory or a path that does not exist")
    real = destination.resolve()
    if real in (Path.home(), Path.cwd(), *Path.cwd().parents) or os.path.ismount(real):
        # It is put in place by a rename, which would pull the ground from under the user's feet, and which
        # mount points refuse.
        raise DestinationError(
            where,
            got="a mount point, the current or the home directory, or one above the current",
            expected="a path that does not exist",
            remedy=f"Name a directory inside it, such as {destination / 'artifact'}",
        )
    if not any(destination.iterdir()):
        return
    foreign = _foreign_content(destination)
    if foreign:
        raise DestinationError(
            where,
            got=foreign,
            expected="an artifact, an empty directory, or a path that does not exist",
            remedy="Nothing but an artifact is ever replaced, not even with --force",
        )
    if not force:
        raise DestinationError(
            where,
            got="an artifact is already there",
            expected="a path that does not exist",
            remedy="Replace it with --force, or choose another -o",
        )


def _same_manifest(one: Path, other: Path) -> bool:
    try:
        return (one / MANIFEST_NAME).read_bytes() == (other / MANIFEST_NAME).read_bytes()
    except OSError:
        return False


def _foreign_content(directory: Path) -> str | None:
    """What in a directory was not made by us, in words; None where it is an artifact and nothing else."""
    if not (directory / MANIFEST_NAME).is_file():
        return "a directory with other things in it"
    try:
        manifest = read_manifest(directory)
    except OnnxsmithError:
        return "a directory with a manifest.json that cannot be read"
    files = manifest.get("files")
    if "onnxsmith" not in manifest or not isinstance(files, dict):
        return "a directory with a manifest.json that is not onnxsmith's"
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        ours = name in files or name in {MANIFEST_NAME, SIGNATURE_NAME, *RECORD_NAMES}
        if not ours and (path.is_symlink() or not path.is_dir()):
            return f"an artifact with a file that is not its own, {name}"
    return None


def require_space(directory: Path, needed_bytes: int, *, purpose: str) -> None:
    """Raises ResourceError where a directory's disk has less space than needed.

    The directory need not exist yet.
    """
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise ResourceError(
            purpose,
            got=f"{_megabytes(free)} MB free on the disk of {directory}",
            expected=f"about {_megabytes(needed_bytes)} MB",
            remedy="Free some space, or choose another -o",
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_full(error: OSError | ResourceError) -> bool:
    """Whether it is the disk that was full."""
    cause = error.__cause__ if isinstance(error, ResourceError) else error
    return isinstance(cause, OSError) and cause.errno in _FULL


def _megabytes(size: int) -> str:
    """Whole ones, but for what is so small that nothing would be left of it."""
    return f"{size / 1e6:.0f}" if size >= 10_000_000 else f"{size / 1e6:.2g}"


@contextlib.contextmanager
def staged_directory(destination: Path, *, force: bool = False, same: bool = False) -> Iterator[Path]:
    """A fresh directory beside the destination, renamed into place if the block ends well.

    If the block raises, or the process is interrupted, the destination is as it was and the fresh
    directory is gone. What a killed process left behind is removed by the next one, and an artifact that
    it had put aside comes back. The directory's parent is scratch space: what is made there is on the same
    disk and goes when the block ends.

    Args:
        destination: Where the result is to be.
        force: Whether an artifact that is there may be replaced.
        same: Whether an artifact with the same manifest may be there; it then stays.

    Raises:
        DestinationError: See ``check_destination``; or another process is writing to the destination.
        ResourceError: The disk is full.
    """
    check_destination(destination, force=force or same)
    destination = destination.resolve()
    with _errors_of(destination), _parents_of(destination), _claim(destination) as claim:
        staging = claim / "new"
        staging.mkdir()
        yield staging
        if same and not force and _same_manifest(staging, destination):
            return
        _sync(staging)
        # Hours may have passed.
        _check_content(destination, force=force)
        _replace(staging, destination, claim / "old")


def check_report_place(directory: Path) -> None:
    """Refuses a directory that holds anything but reports, or is none.

    Raises:
        DestinationError: See above.
    """
    try:
        ours = (
            directory.is_dir()
            and not directory.is_symlink()
            and {path.name for path in directory.iterdir()} <= _REPORT_FILES
        )
        if ours or not (directory.exists() or directory.is_symlink()):
            return
    except OSError as error:
        raise destination_error(error, directory) from error
    raise DestinationError(
        str(directory),
        got="something that is not the report of a failed run",
        expected="a path that does not exist: the report goes there if nothing passes",
        remedy="Move it away, or choose another -o",
    )


def write_beside(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, through a file beside it.

    A device, a pipe or a link's target is written to as it is.

    Raises:
        OSError: It cannot be written; no debris is left.
    """
    with contextlib.suppress(FileNotFoundError):
        path = path.resolve(strict=True)
        if not stat.S_ISREG(path.stat().st_mode):
            path.write_text(text, encoding="utf-8")
            return
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _errors_of(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # A missing file of the work itself is none of the destination's business.
        if error.errno in _FULL or (error.errno in _REFUSED and _is_below(error, destination.parent)):
            raise destination_error(error, destination) from error
        raise


def _is_below(error: OSError, directory: Path) -> bool:
    names = (error.filename, error.filename2)
    return any(isinstance(name, str) and Path(name).is_relative_to(directory) for name in names)


@contextlib.contextmanager
def _parents_of(destination: Path) -> Iterator[None]:
    """Makes the directories above the destination, and removes those that it made if nothing came of it."""
    missing = []
    parent = destination.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for directory in missing:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


@contextlib.contextmanager
def _claim(destination: Path) -> Iterator[Path]:
    """A private directory beside the destination that says: someone is at work here.

    The claim is a lock on that directory. The system drops it when the process ends, however that comes
    about; a process number in the name would be reused, and means nothing outside of its container.
    """
    parent, prefix = destination.parent, f".{destination.name}.partial-"
    with _locked(parent):
        for entry in sorted(parent.iterdir()):
            match = _PARTIAL.fullmatch(entry.name)
            if match is None or match["name"] != destination.name or not entry.is_dir():
                continue
            if not _clear(entry, destination):
                raise DestinationError(
                    str(destination),
                    got="another process is writing there",
                    expected="one at a time",
                    remedy=f"Wait for it, or choose another -o; if there is none, remove {entry}",
                )
        claim = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = os.open(claim, os.O_RDONLY)
        take_lock(descriptor)
    try:
        yield claim
    finally:
        _dispose(claim, destination)
        os.close(descriptor)


def _clear(entry: Path, destination: Path) -> bool:
    """Removes what a killed process left; False if the process that made it is alive."""
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        if not take_lock(descriptor):
            return False
        _dispose(entry, destination)
        return True
    finally:
        os.close(descriptor)


def _dispose(claim: Path, destination: Path) -> None:
    saved = claim / "old"
    # Ended between the two renames: the old artifact is here and nowhere else.
    if saved.is_dir() and not destination.exists():
        saved.rename(destination)
    shutil.rmtree(claim, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Waits for the lock of a directory, so that two processes do not look and then act at the same time."""
    if fcntl is None:  # pragma: no cover - Windows
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Some network file systems have no locks; there, two that start in the same instant may collide.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(staging: Path, destination: Path, aside: Path) -> None:
    """Renames the new directory into place; if that fails, the claim's end brings back what stepped aside."""
    if destination.exists():
        destination.rename(aside)
    staging.rename(destination)


def _sync(directory: Path) -> None:
    """Makes sure that the content is on the disk before the name is."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def destination_error(error: OSError, destination: Path) -> OnnxsmithError:
    """What to raise where an output could not be written: a full disk is another matter than permission."""
    if error.errno in _FULL:
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
