"""Locks on open files and directories; the system drops them when a process ends, however it does."""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: no locks, so nothing that may be alive is ever removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["share_lock", "take_lock"]


def take_lock(descriptor: int) -> bool:
    """Takes the lock for oneself, without waiting; False where someone else has it, or nobody can tell."""
    if fcntl is None:  # pragma: no cover - Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # Taken; or a file system without locks.
        return False
    return True


def share_lock(descriptor: int) -> bool:
    """Takes the lock together with others who share it, without waiting; False where someone has it alone."""
    if fcntl is None:  # pragma: no cover - Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: whoever evicts cannot take one either.
        return True
    return True
