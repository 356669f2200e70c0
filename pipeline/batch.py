"""Many recipes in one go: each job in a process of its own, as many at a time as memory allows."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith.environment import usable_cpus
from onnxsmith.errors import BadInputError, OnnxsmithError, ResourceError, UnknownNameError, require
from onnxsmith.free_memory import available_memory
from onnxsmith.pipeline.batch_jobs import Job, expand_jobs, load_batch
from onnxsmith.pipeline.batch_worker import Attempt, run_attempt
from onnxsmith.pipeline.run_steps import user_cache
from onnxsmith.pipeline.staging import destination_error, write_beside
from onnxsmith.progress import Progress

__all__ = ["EXECUTORS", "BatchResult", "JobResult", "run_batch"]

EXECUTORS = ("local", "ray")
_STATE = ".batch"
# What the system and its caches keep of the memory that is free when the batch begins.
_USABLE = 0.9
_CONNECT_S = 10.0


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
        name: The job.
        status: ``done``, ``kept`` (done by an earlier batch), ``failed``, or ``interrupted``: the batch ended
            before the job did.
        reason: Why it failed.
        attempts: How often it was started.
        seconds: Wall time of all attempts.
        artifact: Its artifact; None where it failed.
        log: Everything that it said.
        chosen: The variant that was packed.
        size_mb: Of that variant.
        verdict: What the run decided.
    """

    name: str
    status: str
    reason: str = ""
    attempts: int = 0
    seconds: float = 0.0
    artifact: str | None = None
    log: str | None = None
    chosen: str | None = None
    size_mb: float | None = None
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """What became of a batch, in the order of its jobs."""

    jobs: Sequence[JobResult]

    @property
    def passed(self) -> bool:
        """Whether every job has its artifact."""
        return bool(self.jobs) and all(job.status in ("done", "kept") for job in self.jobs)

    @property
    def interrupted(self) -> bool:
        """Whether the batch ended before its jobs did."""
        return any(job.status == "interrupted" for job in self.jobs)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        jobs = [dataclasses.asdict(job) for job in self.jobs]
        return {"passed": self.passed, "interrupted": self.interrupted, "jobs": jobs}


def run_batch(
    jobs_file: Path,
    *,
    output: Path | None = None,
    executor: str = "local",
    workers: int | None = None,
    address: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    on_interrupt: Callable[[], None] | None = None,
) -> BatchResult:
    """Runs a list of recipes. One job that fails never stops the others.

    A job whose artifact was made by an earlier batch from the same recipe, settings, source files and library
    versions is not run again.

    Args:
        jobs_file: See ``BatchSpec``.
        output: The directory of the artifacts; the file's own where None.
        executor: ``local``, processes of this machine, or ``ray``.
        workers: Jobs at a time at the most; by default one for each two processors. Fewer run where memory
            would not suffice for what they are expected to need.
        address: Of a Ray cluster that runs; a Ray of this machine alone where None.
        force: Whether artifacts that no earlier batch made may be replaced.
        progress: Who listens.
        on_interrupt: Called where Ctrl-C ended the batch, once its jobs are ended. What was done until then
            is returned. Where None, the interrupt goes on to the caller.

    Raises:
        RecipeError: The list cannot be read.
        DestinationError: The output cannot be written.
        UnknownNameError: No such executor.
        MissingDependencyError: Ray is asked for and not installed.
        BadInputError: There is no Ray cluster at the address.
    """
    if executor not in EXECUTORS:
        raise UnknownNameError("batch: --executor", name=executor, known=EXECUTORS, kind="executor")
    if workers is not None and workers < 1:
        raise BadInputError("batch: --workers", got=str(workers), expected="at least 1")
    if address is not None and executor != "ray":
        raise BadInputError("batch: --address", got=f"--executor {executor}", expected="--executor ray")
    spec = load_batch(jobs_file)
    # Jobs run in the directories of their recipes.
    target = (output or Path(spec.output)).absolute()
    jobs = expand_jobs(spec, base=jobs_file.absolute().parent, output=target)
    state = target / _STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise destination_error(error, target) from error
    results: dict[str, JobResult] = {}
    with (progress or Progress()).step("batch", len(jobs)) as step:
        waiting = []
        for job in jobs:
            kept = _kept(job, state)
            if kept is None:
                waiting.append(job)
            else:
                results[job.name] = kept
                step.advance(note=f"{job.name}: kept")
        run = _on_ray(address) if executor == "ray" else _locally
        count = workers or max(1, usable_cpus() // 2)
        try:
            for result in run(waiting, state, count, force):
                results[result.name] = result
                step.advance(note=f"{result.name}: {result.status}")
        except KeyboardInterrupt:
            if on_interrupt is None:
                raise
            on_interrupt()
    # A job that ended while the others were being ended has left its note.
    return BatchResult(
        [results.get(job.name) or _kept(job, state) or _interrupted(job, state) for job in jobs]
    )


def run_job(job: Job, state: Path, *, force: bool = False, stop: threading.Event | None = None) -> JobResult:
    """Runs a job, again where it crashed, and notes what came of it.

    Args:
        job: What to run.
        state: Where logs and notes are.
        force: Whether an artifact that no earlier batch made may be replaced.
        stop: Set where the batch is interrupted: nothing is started any more.
    """
    log = state / f"{job.name}.log"
    note = state / f"{job.name}.json"
    log.unlink(missing_ok=True)
    attempts: list[Attempt] = []
    while not attempts or (attempts[-1].worth_another and len(attempts) <= job.retries):
        if stop is not None and stop.is_set():
            break
        # Only what an earlier batch made is replaced.
        again = bool(attempts) and user_cache() is not None
        attempts.append(run_attempt(job, log, replace=force or note.exists(), resume=again))
    last = attempts[-1] if attempts else Attempt(None, 0.0, "the batch was interrupted", None)
    report: Mapping[str, Any] = last.result or {}
    done = last.status == 0
    chosen = next((v for v in report.get("variants", ()) if v.get("chosen")), None)
    result = JobResult(
        name=job.name,
        status="done" if done else "failed",
        reason=last.reason,
        attempts=len(attempts),
        seconds=sum(attempt.seconds for attempt in attempts),
        artifact=str(job.destination) if done else None,
        log=str(log),
        chosen=report.get("chosen"),
        size_mb=chosen.get("size_mb") if chosen else None,
        verdict=str(report.get("verdict", "")),
    )
    if done:
        content = {"fingerprint": job.fingerprint, "result": dataclasses.asdict(result)}
        write_beside(note, json.dumps(content, indent=2) + "\n")
    return result


def _kept(job: Job, state: Path) -> JobResult | None:
    """The result of an earlier batch, if its artifact is still there, whole, and of the same job."""
    from onnxsmith.pipeline.artifact import verify_artifact

    try:
        note = json.loads((state / f"{job.name}.json").read_text(encoding="utf-8"))
        if note["fingerprint"] != job.fingerprint or verify_artifact(job.destination):
            return None
        return dataclasses.replace(JobResult(**note["result"]), status="kept")
    except (OSError, ValueError, KeyError, TypeError, OnnxsmithError):
        return None


def _interrupted(job: Job, state: Path) -> JobResult:
    log = state / f"{job.name}.log"
    reason = "the batch was interrupted; the next one runs it"
    return JobResult(job.name, "interrupted", reason=reason, log=str(log) if log.exists() else None)


def _locally(jobs: Sequence[Job], state: Path, workers: int, force: bool) -> Iterator[JobResult]:
    total = int(available_memory() * _USABLE)
    jobs = [dataclasses.replace(job, admitted=0 < job.memory_bytes <= total) for job in jobs]
    room = _Room(total)
    stop = threading.Event()

    def run(job: Job) -> JobResult:
        with room.taken(job.memory_bytes):
            return run_job(job, state, force=force, stop=stop)

    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="batch")
    # The largest first: a large one that comes last would run alone for long.
    order = sorted(jobs, key=lambda job: -job.memory_bytes)
    futures = {pool.submit(run, job): job for job in order}
    try:
        for future in concurrent.futures.as_completed(futures):
            yield _result_of(future.result, futures[future])
    except BaseException:
        stop.set()
        _end_children()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_children() -> None:
    """Interrupts the jobs that run: each cleans up after itself, and the threads that wait for them go on."""
    import psutil

    for child in psutil.Process(os.getpid()).children():
        if "onnxsmith.pipeline" in child.cmdline():
            child.terminate()


class _Room:
    """Memory that jobs take and give back. One job always runs, however large."""

    def __init__(self, total_bytes: int) -> None:
        self._free = self._total = total_bytes
        self._changed = threading.Condition()
        self._running = 0

    def taken(self, needed_bytes: int) -> _Taken:
        return _Taken(self, min(needed_bytes, self._total))

    def take(self, needed_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= needed_bytes or self._running == 0)
            self._free -= needed_bytes
            self._running += 1

    def give(self, needed_bytes: int) -> None:
        with self._changed:
            self._free += needed_bytes
            self._running -= 1
            self._changed.notify_all()


@dataclasses.dataclass(frozen=True)
class _Taken:
    room: _Room
    needed_bytes: int

    def __enter__(self) -> None:
        self.room.take(self.needed_bytes)

    def __exit__(self, *_: object) -> None:
        self.room.give(self.needed_bytes)


def _result_of(wait: Callable[[], JobResult], job: Job) -> JobResult:
    try:
        return wait()
    except OSError as error:
        return JobResult(job.name, "failed", reason=f"it cannot be started: {error}")


def _on_ray(address: str | None) -> Callable[[Sequence[Job], Path, int, bool], Iterator[JobResult]]:
    if address is not None:
        _check_address(address)
    ray = require("ray", purpose="batch --executor ray")

    def run(jobs: Sequence[Job], state: Path, workers: int, force: bool) -> Iterator[JobResult]:
        if not jobs:
            return
        began = not ray.is_initialized()
        if began:
            # "local" begins a new one, also where another runs on this machine, or RAY_ADDRESS names one.
            options: dict[str, Any] = (
                {"address": address} if address else {"address": "local", "num_cpus": workers}
            )
            try:
                ray.init(log_to_driver=False, include_dashboard=False if not address else None, **options)
            except Exception as error:
                # Ray's own kinds of error, and a plain Exception where a node is slow to start.
                said = str(error).partition("\n")[0]
                raise (_no_cluster(address, said) if address else _no_ray(said)) from error
        try:
            room = int(ray.cluster_resources().get("memory", 0))
            pending = {}
            admitted = [dataclasses.replace(job, admitted=0 < job.memory_bytes <= room) for job in jobs]
            for job in sorted(admitted, key=lambda job: -job.memory_bytes):
                # Ray starts again what a lost worker had; a job that crashed is started again by run_job.
                task = ray.remote(run_job).options(
                    num_cpus=1, memory=min(job.memory_bytes, room), max_retries=job.retries
                )
                pending[task.remote(job, state, force=force)] = job
            while pending:
                ready, _ = ray.wait(list(pending))
                for reference in ready:
                    yield _ray_result(ray, reference, pending.pop(reference))
        finally:
            if began:
                ray.shutdown()

    return run


def _check_address(address: str) -> None:
    """Refuses at once what nobody listens at: Ray itself goes on trying for minutes.

    Raises:
        BadInputError: Nobody does, or it is no address.
    """
    if address in ("auto", "local"):
        return
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise BadInputError(
            f"batch: --address {address}", got="no host with a port", expected="HOST:PORT, or auto"
        )
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def _no_cluster(address: str, got: str) -> BadInputError:
    return BadInputError(
        f"batch: --address {address}",
        got=got,
        expected="a Ray cluster that runs there and takes this user's token, if it wants one",
        remedy="Start one with `ray start --head`, or leave --address out",
    )


def _no_ray(got: str) -> ResourceError:
    return ResourceError(
        "batch: --executor ray",
        got=f"Ray does not start: {got}",
        expected="a Ray that starts on this machine",
        remedy="Try again when the machine does less, or give Ray longer with "
        "RAY_raylet_start_wait_time_s=120; --executor local needs no Ray",
    )


def _ray_result(ray: Any, reference: Any, job: Job) -> JobResult:
    try:
        result: JobResult = ray.get(reference)
        return result
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        return JobResult(
            job.name, "failed", reason=f"its worker was lost: {reason}", attempts=job.retries + 1
        )
