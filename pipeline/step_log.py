"""The steps of a run: shown while they go on, and kept with their times for the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from onnxsmith.environment import peak_rss_mb
from onnxsmith.pipeline.report import StepTiming
from onnxsmith.progress import Progress, Step

__all__ = ["StepLog"]


class StepLog(Progress):
    """Hands steps on to who listens, and remembers how long they took.

    Attributes:
        steps: Those that ended well, in order.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        """Starts with no steps.

        Args:
            progress: Who listens.
        """
        self.steps: list[StepTiming] = []
        self._progress = progress or Progress()

    @contextlib.contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Opens a step; see ``Progress``."""
        began = time.perf_counter()
        with self._progress.step(name, total) as step:
            yield step
        self.steps.append(StepTiming(name, time.perf_counter() - began, peak_rss_mb(), step.note))
