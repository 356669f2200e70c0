"""How long work says where it is, without knowing who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["Progress", "Step"]


class Step:
    """One step of a run, while it is going on."""

    def __init__(self, name: str) -> None:
        """Starts with an empty note."""
        self.name = name
        self.note = ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Says that a part of the step is done."""
        if note is not None:
            self.note = note


class Progress:
    """Listens to steps and says nothing; subclasses show them."""

    @contextlib.contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Opens a step.

        Args:
            name: What is being done.
            total: Number of parts, if known.
        """
        yield Step(name)
