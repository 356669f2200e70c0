"""How much of the machine other programs use while something is measured."""

from __future__ import annotations

import contextlib
import time

__all__ = ["MachineLoad"]


class MachineLoad:
    """Watches from its creation on: all processors' time, without that of this process and its children."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._own = _busy_s(), _own_s()

    def other_pct(self) -> float | None:
        """The share of all processors that others used since then, in percent; None if too short to say."""
        import psutil

        wall = time.monotonic() - self._began
        # The kernel counts in hundredths of a second.
        if wall < 0.2:
            return None
        others = (_busy_s() - self._busy) - (_own_s() - self._own)
        return max(0.0, 100 * others / (wall * (psutil.cpu_count() or 1)))


def _busy_s() -> float:
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # guest is contained in user.
    inside = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - inside)


def _own_s() -> float:
    import psutil

    process = psutil.Process()
    own = process.cpu_times()
    total = own.user + own.system + getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system
    return float(total)
