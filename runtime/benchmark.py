"""Benchmarks: candidates in turn, each in a process of its own, medians with their spread."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith.errors import BadInputError, CheckFailedError, LackingError, OnnxsmithError
from onnxsmith.program import TorchProgram
from onnxsmith.runtime.rounds import LlmRound, PlainRound, Round
from onnxsmith.runtime.torch_session import TorchSession

__all__ = ["BenchResult", "BenchSettings", "Candidate", "Spread", "benchmark"]

# A spread of more than this says that something else used the machine.
_NOISY_PCT = 15.0


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        prompt_tokens: Length of the prompt, or of the sequence of a model without a cache.
        new_tokens: Tokens generated after it, the first one included.
        batch: Rows.
        runs: Rounds counted, after one that is not.
        threads: Intra-op threads; the number of usable processors where None.
        seed: Of the inputs.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch: int = 1
    runs: int = 5
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses settings that measure nothing."""
        limits = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "runs": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                got = str(getattr(self, name))
                raise BadInputError(f"bench: {name}", got=got, expected=f"at least {least}")
        if self.threads is not None and self.threads < 1:
            raise BadInputError("bench: threads", got=str(self.threads), expected="at least 1")

    @property
    def thread_count(self) -> int:
        """The threads that are used."""
        return self.threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is measured: a model on disk on a provider, or a PyTorch program in this process.

    Attributes:
        name: For the results.
        path: The model, for ONNX.
        provider: The execution provider, for ONNX.
        program: The program, for PyTorch.
    """

    name: str
    path: Path | None = None
    provider: str = "cpu"
    program: TorchProgram | None = None

    def __post_init__(self) -> None:
        """Refuses a candidate that is no model, or two."""
        if (self.path is None) == (self.program is None):
            got = "neither a path nor a program" if self.path is None else "a path and a program"
            raise BadInputError(f"bench: {self.name}", got=got, expected="one of them")


@dataclasses.dataclass(frozen=True)
class Spread:
    """A repeated measurement.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        mean: Mean.
        low: Smallest.
        high: Largest.
        runs: How often.
    """

    p50: float
    p90: float
    p99: float
    mean: float
    low: float
    high: float
    runs: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarises values; at least one."""
        p50, p90, p99 = (float(v) for v in np.percentile(values, [50, 90, 99]))
        return Spread(p50, p90, p99, float(np.mean(values)), min(values), max(values), len(values))

    @property
    def spread_pct(self) -> float:
        """From the smallest to the largest, in percent of the median."""
        return 100 * (self.high - self.low) / self.p50 if self.p50 else 0.0


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What one candidate did.

    Attributes:
        name: The candidate.
        provider: Where it really ran.
        load_s: Seconds to open the model; None for PyTorch, which was open already.
        latency_ms: One call; for a decoder one decoded token.
        first_token_ms: The whole prompt; None without a cache.
        throughput: Rows a second; for a decoder new tokens a second over the whole round.
        prefill_tokens_per_s: None without a cache.
        decode_tokens_per_s: None without a cache.
        peak_rss_mb: Of the candidate's own process; None for PyTorch, which shares this one.
        size_mb: Of the model's files; None for PyTorch.
        placement: Provider to nodes and share; None for PyTorch.
        settings: What was measured.
        error: Why there is no result, or an empty string.
        exit_status: The exit status that the error asks for.
    """

    name: str
    provider: str
    settings: BenchSettings
    load_s: float | None = None
    latency_ms: Spread | None = None
    first_token_ms: Spread | None = None
    throughput: Spread | None = None
    prefill_tokens_per_s: Spread | None = None
    decode_tokens_per_s: Spread | None = None
    peak_rss_mb: float | None = None
    size_mb: float | None = None
    placement: Mapping[str, Any] | None = None
    error: str = ""
    exit_status: int = 0

    @property
    def spread_pct(self) -> float | None:
        """The widest spread of what was measured, in percent of its median."""
        spreads = [s.spread_pct for s in (self.latency_ms, self.first_token_ms) if s is not None]
        return max(spreads, default=None)

    @property
    def noisy(self) -> bool:
        """Whether the spread says that the machine was busy."""
        return self.spread_pct is not None and self.spread_pct > _NOISY_PCT

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = dataclasses.asdict(self)
        plain["settings"]["threads"] = self.settings.thread_count
        return plain | {"spread_pct": self.spread_pct, "noisy": self.noisy}


def benchmark(
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    *,
    on_round: Callable[[str, int], None] | None = None,
) -> list[BenchResult]:
    """Measures candidates in turn: one round of each, then the next round.

    All are open at the same time and only one runs, so a machine that gets slower or faster in between
    does so for all of them. A candidate that fails or crashes is an error of that candidate only.

    Args:
        candidates: What to measure; at least one.
        settings: How.
        on_round: Called after each round with the candidate's name and the number of the round.

    Raises:
        BadInputError: There is no candidate.
    """
    if not candidates:
        raise BadInputError("bench", got="no model", expected="at least one")
    with contextlib.ExitStack() as stack:
        runners: list[_Runner] = []
        for candidate in candidates:
            kind = _TorchRunner if candidate.program is not None else _ProcessRunner
            runners.append(stack.enter_context(_opened(kind(candidate, settings))))
        for number in range(settings.runs + 1):
            for runner in runners:
                runner.round(count=number > 0)
                if on_round is not None:
                    on_round(runner.candidate.name, number)
        return [runner.result() for runner in runners]


class _Runner:
    def __init__(self, candidate: Candidate, settings: BenchSettings) -> None:
        self.candidate = candidate
        self.settings = settings
        self.times: list[Mapping[str, float]] = []
        self.error: OnnxsmithError | None = None
        self.facts: dict[str, Any] = {}

    def open(self) -> None:
        raise NotImplementedError

    def measure(self) -> Mapping[str, float]:
        raise NotImplementedError

    def close(self) -> None:
        """Frees what ``open`` took."""

    def round(self, *, count: bool) -> None:
        if self.error is not None:
            return
        try:
            times = self.measure()
        except OnnxsmithError as error:
            self.error = error
            return
        if count:
            self.times.append(times)

    def result(self) -> BenchResult:
        settings = self.settings
        path = self.candidate.path
        common: dict[str, Any] = {
            "name": self.candidate.name,
            "provider": self.facts.get("provider", self.candidate.provider),
            "settings": settings,
            "load_s": self.facts.get("load_s"),
            "peak_rss_mb": self.facts.get("peak_rss_mb"),
            "placement": self.facts.get("placement"),
        }
        if self.error is not None:
            return BenchResult(**common, error=str(self.error), exit_status=self.error.exit_status)
        common["size_mb"] = None if path is None else _size_mb(path)
        if "latency" in self.times[0]:
            latency = [t["latency"] for t in self.times]
            return BenchResult(
                **common,
                latency_ms=Spread.of([1e3 * t for t in latency]),
                throughput=Spread.of([settings.batch / t for t in latency]),
            )
        first, decode = [t["first_token"] for t in self.times], [t["decode"] for t in self.times]
        steps = settings.new_tokens - 1
        return BenchResult(
            **common,
            latency_ms=Spread.of([1e3 * t / steps for t in decode]),
            first_token_ms=Spread.of([1e3 * t for t in first]),
            throughput=Spread.of(
                [settings.batch * settings.new_tokens / (a + b) for a, b in zip(first, decode, strict=True)]
            ),
            prefill_tokens_per_s=Spread.of([settings.batch * settings.prompt_tokens / t for t in first]),
            decode_tokens_per_s=Spread.of([settings.batch * steps / t for t in decode]),
        )


@contextlib.contextmanager
def _opened(runner: _Runner) -> Iterator[_Runner]:
    try:
        try:
            runner.open()
        except OnnxsmithError as error:
            runner.error = error
        yield runner
    finally:
        runner.close()


class _TorchRunner(_Runner):
    def open(self) -> None:
        program = self.candidate.program
        assert program is not None
        with self._reported():
            self._session = TorchSession(program, threads=self.settings.thread_count)
            kind: type[Round] = LlmRound if self._session.cache else PlainRound
            self._round = kind.prepare(self._session, None, dataclasses.asdict(self.settings), program.limits)
        self.facts = {"provider": "torch"}

    def measure(self) -> Mapping[str, float]:
        with self._reported():
            return self._round.run()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """PyTorch fails by errors of all kinds; none of them may cost the other candidates their results."""
        try:
            yield
        except OnnxsmithError:
            raise
        except Exception as error:
            raise CheckFailedError(
                f"bench: {self.candidate.name} on torch", got=f"it fails: {type(error).__name__}: {error}"
            ) from error


class _ProcessRunner(_Runner):
    _process: subprocess.Popen[str] | None = None

    def open(self) -> None:
        self._process = subprocess.Popen(
            # -P: the folder that the user stands in must not provide modules.
            [sys.executable, "-P", "-m", "onnxsmith.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._stderr: list[str] = []
        # Drained by a thread, or a worker that logs much would wait for its pipe forever.
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)
        self._drain.start()
        settings = dataclasses.asdict(self.settings)
        self.facts = self._ask(
            {
                "do": "open",
                "path": str(self.candidate.path),
                "provider": self.candidate.provider,
                "threads": self.settings.thread_count,
                "name": self.candidate.name,
                "settings": settings,
            }
        )

    def measure(self) -> Mapping[str, float]:
        answer = self._ask({"do": "round"})
        self.facts["peak_rss_mb"] = answer["peak_rss_mb"]
        times: Mapping[str, float] = answer["times"]
        return times

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._drain.join(timeout=5)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read_stderr(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr = [*self._stderr[-20:], line.rstrip()]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        # Half a line is what a worker that died while it wrote leaves.
        if not line.endswith("\n"):
            status = process.wait(timeout=30)
            self._drain.join(timeout=5)
            last = f" ({self._stderr[-1]})" if self._stderr else ""
            ended = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
            raise CheckFailedError(
                f"bench: {self.candidate.name} on {self.candidate.provider}",
                got=f"its process {ended}{last}",
                expected="a measurement",
                remedy="SIGKILL usually says that the system ran out of memory" if status == -9 else None,
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = {2: BadInputError, 3: LackingError}.get(answer["exit_status"], CheckFailedError)
            raise _Relayed.of(kind, answer["error"])
        return answer


class _Relayed:
    """An error that a worker reported, with the worker's own message."""

    @staticmethod
    def of(kind: type[OnnxsmithError], message: str) -> OnnxsmithError:
        where, _, rest = message.partition(": ")
        return kind(where, got=rest or message)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _size_mb(path: Path) -> float:
    """Size of a model in MB (10**6 bytes): for a directory the graphs and weights in it."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.iterdir() if ".onnx" in p.suffixes) / 1e6
    import onnx_ir

    from onnxsmith.onnx_file import load_model

    model = load_model(path)
    locations = {
        value.const_value.path
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, onnx_ir.ExternalTensor)
    }
    return (path.stat().st_size + sum(os.stat(location).st_size for location in locations)) / 1e6
