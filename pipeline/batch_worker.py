"""One job of a batch, in a process of its own: its memory is its own, and its crash is nobody else's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxsmith.pipeline.batch_jobs import Job

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["END_WITH_STDIN", "Attempt", "run_attempt"]

# Tells a child to end when the other end of its standard input is closed.
END_WITH_STDIN = "ONNXSMITH_END_WITH_STDIN"

_GRACE_S = 20.0


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How one start of a job ended.

    Attributes:
        status: Its exit status; negative for a signal, None where its time was up.
        seconds: Wall time.
        reason: Why it did not do its work; empty where it did.
        result: The report of the run; None where there is none.
    """

    status: int | None
    seconds: float
    reason: str
    result: dict[str, Any] | None

    @property
    def worth_another(self) -> bool:
        """Whether another start may end differently: a crash or a limit of time may, a verdict does not."""
        return self.status is None or self.status < 0


def run_attempt(job: Job, log: Path, *, replace: bool, resume: bool = False) -> Attempt:
    """Runs a job once, its output going to a log.

    Args:
        job: What to run.
        log: A file that is appended to.
        replace: Whether an artifact that is there may be replaced.
        resume: Whether to go on where an attempt before this one was ended.
    """
    result = log.with_suffix(".result.json")
    command = [sys.executable, "-m", "onnxsmith.pipeline", "run", str(job.recipe), "-o", str(job.destination)]
    for setting in job.settings:
        command += ["--set", setting]
    command += ["--json", str(result)] + ["--force"] * replace + ["--resume"] * resume
    # What is free changes while others run; that there is enough was seen to.
    command += ["--ignore-forecast"] * job.admitted
    began = time.perf_counter()
    with _lock(log.with_suffix(".lock")) as lock, log.open("ab") as stream:
        result.unlink(missing_ok=True)
        stream.write(f"$ {' '.join(command)}\n".encode())
        stream.flush()
        # Factories are imported from the directory of their recipe, as the examples are.
        with _child(command, stream, job.recipe.parent, lock) as child:
            try:
                status: int | None = child.wait(job.timeout_s)
            except subprocess.TimeoutExpired:
                status = None
    seconds = time.perf_counter() - began
    report = _read(result)
    result.unlink(missing_ok=True)
    return Attempt(status, seconds, "" if status == 0 else _reason(job, status, report, log), report)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Waits until nobody is at this job any more, and gives the lock, which a child inherits.

    Where a worker was killed, the process that it had started needs a moment to clean up and end.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _child(command: list[str], stream: Any, directory: Path, lock: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with this block or with this process, politely first."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=stream,
        stderr=stream,
        cwd=directory,
        env={**os.environ, END_WITH_STDIN: "1"},
        start_new_session=True,
        pass_fds=(lock,),
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            # It cleans up after itself: nothing half-written stays.
            os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if child.stdin is not None:
            child.stdin.close()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("report")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def _reason(job: Job, status: int | None, report: dict[str, Any] | None, log: Path) -> str:
    if status is None:
        return f"it took more than {job.timeout_s:g} s"
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if -status == signal.SIGKILL else ""
        return f"its process was ended by {name}{hint}"
    if report is not None and report.get("verdict"):
        return str(report["verdict"])
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("onnxsmith: ") for line in lines if line.startswith("onnxsmith: ")]
    return said[-1] if said else f"exit status {status}"
