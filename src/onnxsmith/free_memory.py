"""How much memory a process may still take: of the machine, and of the containers around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory"]

# What version 1 says where there is no limit.
_NO_LIMIT = 1 << 60


def available_memory(*, root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping, and without being killed for it.

    The least of what the kernel says is available and of what each control group around this process
    leaves. Pages of files that a group holds and could drop count as free, as the kernel counts them.

    Args:
        root: Where ``proc`` and ``sys`` are; for tests.
    """
    import psutil

    return min([int(psutil.virtual_memory().available), *_groups(root)])


def _groups(root: Path) -> Iterator[int]:
    """What each control group with a limit leaves."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, place = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
        # Inside of a container the path is often that of the host, and its own group stands at the top.
        inside = mount / place.lstrip("/")
        for directory in dict.fromkeys(
            (mount, *(p for p in (inside, *inside.parents) if p.is_relative_to(mount)))
        ):
            left = _left(directory, *names)
            if left is not None:
                yield left


def _left(directory: Path, limit_name: str, usage_name: str, inactive_name: str) -> int | None:
    try:
        limit = int((directory / limit_name).read_text())
        used = int((directory / usage_name).read_text())
    except (OSError, ValueError):
        # No such group, or "max".
        return None
    if limit >= _NO_LIMIT:
        return None
    inactive = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (directory / "memory.stat").read_text().splitlines():
            if line.split()[0] == inactive_name:
                inactive = int(line.split()[1])
    return max(limit - used + inactive, 0)
