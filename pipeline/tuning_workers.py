"""Who measures: this process, or others that may crash; and who may work beside whom."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from onnxsmith.errors import CheckFailedError, OnnxsmithError, WorkerError
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.tuning_bench import TrialBench
from onnxsmith.source import ModelSource

__all__ = ["LocalLane", "ProcessLane", "Room"]

_STARTS = 2


class Room:
    """Where many may work at a time, or one alone. Who wants to be alone is not overtaken.

    Attributes:
        needed_bytes: What a worker is expected to need: none begins beside others while less is free.
    """

    def __init__(self) -> None:
        """An empty room."""
        self.needed_bytes = 0
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Others may be inside too."""
        with self._changed:
            while self._alone or self._waiting or (self._inside and not self._has_memory()):
                # Memory becomes free without anybody telling.
                self._changed.wait(1.0)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is inside."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._inside and not self._alone)
                self._alone = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def _has_memory(self) -> bool:
        import psutil

        return bool(psutil.virtual_memory().available >= self.needed_bytes)


class LocalLane:
    """Measures in this process."""

    def __init__(self, make: Callable[[], TrialBench]) -> None:
        """Takes what makes the bench when it is needed for the first time."""
        self._make = make
        self._bench: TrialBench | None = None

    def ask(self, do: str, *arguments: Any) -> Any:
        """Calls a method of the bench."""
        if self._bench is None:
            self._bench = self._make()
        return getattr(self._bench, do)(*arguments)

    def stop(self) -> None:
        """Does nothing: who is asked is the one that asks."""

    def close(self) -> None:
        """Forgets the bench."""
        self._bench = None


class ProcessLane:
    """Measures in a process of its own, which is started when it is needed, and again where it died."""

    def __init__(self, arguments: Callable[[], Mapping[str, Any]]) -> None:
        """Takes what gives the arguments of the bench, when it is needed for the first time."""
        self._arguments = arguments
        self._process: Any = None
        self._pipe: Connection | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The process; None where none runs."""
        return self._process.pid if self._process is not None else None

    def ask(self, do: str, *arguments: Any) -> Any:
        """Calls a method of the bench there.

        Raises:
            WorkerError: The process died, twice.
            OnnxsmithError: What the method raised.
        """
        for attempt in range(_STARTS):
            if self._stopped:
                raise WorkerError(f"tune: {do}", got="the search was ended")
            pipe = self._pipe or self._start()
            try:
                pipe.send((do, arguments))
                failed, answer = pipe.recv()
            except (EOFError, OSError) as error:
                code = self._ended()
                if attempt + 1 < _STARTS and not self._stopped:
                    continue
                raise WorkerError(
                    f"tune: {do}", got=f"its process ended with status {code}, twice",
                    remedy="Take fewer --workers if memory is short",
                ) from error  # fmt: skip
            if failed:
                raise answer
            return answer
        raise AssertionError

    def stop(self) -> None:
        """Kills the process, from another thread: whoever waits for it gets an error."""
        self._stopped = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ValueError):
                process.kill()

    def close(self) -> None:
        """Ends the process."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.join(2.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process.close()
            self._process = None

    def _start(self) -> Connection:
        # A fork of a process with threads may hang.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, dict(self._arguments())), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe = ours
        return ours

    def _ended(self) -> int | None:
        self._process.join(5.0)
        code: int | None = self._process.exitcode
        self.close()
        return code


def _work(pipe: Connection, arguments: Mapping[str, Any]) -> None:
    # Ctrl-C goes to all processes of a terminal; the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bench: TrialBench | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            do, rest = pipe.recv()
            try:
                bench = bench or bench_of(**arguments)
                answer: tuple[bool, Any] = (False, getattr(bench, do)(*rest))
            except OnnxsmithError as error:
                answer = (True, error)
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                answer = (True, CheckFailedError(f"tune: {do}", got=f"{type(error).__name__}: {text}"))
            pipe.send(answer)


def bench_of(recipe: Recipe, source: str, work: Path, base: Path | None, directory: Path) -> TrialBench:
    """The bench of a worker.

    Args:
        recipe: With a key ``tune``.
        source: The text of the source.
        work: Where models are made.
        base: The directory that relative paths of the recipe start from.
        directory: The current directory, which factories are imported from.
    """
    os.chdir(directory)
    return TrialBench(recipe, ModelSource.parse(source, base=base), work, base=base)
