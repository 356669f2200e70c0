"""What a benchmark gives: summaries of repeated measurements with their uncertainty."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from onnxsmith.errors import BadInputError

__all__ = ["BenchResult", "BenchSettings", "Ratio", "Spread", "with_ratios"]

# A spread of more than this, or others who used more than this, says that something else used the machine.
_NOISY_PCT = 15.0
_BUSY_PCT = 10.0
_RESAMPLES = 500
_QUANTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# Student's t for 95 %, by degrees of freedom; from five on its expansion is right to 0.2 %.
_STUDENT_T: Mapping[int, float] = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


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
        affinity: Processors that the candidates may use; all that this process may use where empty.
        io_binding: Whether inputs and outputs of a model without a cache are bound once and stay on the
            device; where None, on providers with a memory of their own. Bound tensors are not copied
            between host and device, so the time is that of the device alone.
        cuda_graph: Whether CUDA and TensorRT record a CUDA graph and replay it. Only with fixed shapes.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch: int = 1
    runs: int = 5
    threads: int | None = None
    seed: int = 0
    affinity: tuple[int, ...] = ()
    io_binding: bool | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        """Refuses settings that measure nothing."""
        limits = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "runs": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                got = str(getattr(self, name))
                raise BadInputError(f"bench: {name}", got=got, expected=f"at least {least}")
        if self.threads is not None and self.threads < 1:
            raise BadInputError("bench: threads", got=str(self.threads), expected="at least 1")
        usable = _usable()
        if unusable := sorted(set(self.affinity) - usable):
            raise BadInputError(
                "bench: affinity",
                got=f"processor {unusable[0]}",
                expected=f"some of {', '.join(str(cpu) for cpu in sorted(usable))}",
            )
        if self.cuda_graph and self.io_binding is False:
            raise BadInputError("bench: cuda_graph", got="without IO binding", expected="with it")

    @property
    def thread_count(self) -> int:
        """The threads that are used."""
        return self.threads or len(self.affinity or _usable())


def _usable() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True)
class Spread:
    """A repeated measurement.

    The percentiles are of all values. Their 95 % intervals come from the rounds and not from the values,
    because values of one round are alike: they share what the machine was doing. They are bootstrapped over
    rounds (a cluster bootstrap; Field and Welsh, 2007), and where that is wider, taken from the rounds'
    medians, as if their logarithms were normal: with few rounds a bootstrap, which draws only what was seen,
    is far too narrow. Simulated, they hold the percentile in 94 to 100 of 100 benchmarks of 2 to 20 rounds;
    only that of p99 misses more where single calls hiccup, and no round shows how long they can be.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        mean: Mean.
        low: Smallest of the rounds' medians.
        high: Largest of them.
        runs: Rounds.
        samples: Values.
        ci95: ``p50``, ``p90`` and ``p99`` to the ends of their 95 % intervals; empty for a single round.
        rounds: The median of each round, in their order.
    """

    p50: float
    p90: float
    p99: float
    mean: float
    low: float
    high: float
    runs: int
    samples: int
    ci95: Mapping[str, tuple[float, float]]
    rounds: tuple[float, ...] = ()

    @staticmethod
    def of(values: Sequence[float] | Sequence[Sequence[float]]) -> Spread:
        """Summarises one value for each round, or several; at least one round."""
        rounds = [np.atleast_1d(np.asarray(v, np.float64)) for v in values]
        joined = np.concatenate(rounds)
        quantiles = [100 * q for q in _QUANTILES.values()]
        points = [float(v) for v in np.percentile(joined, quantiles)]
        medians = [float(np.median(r)) for r in rounds]
        ci95: dict[str, tuple[float, float]] = {}
        if len(rounds) > 1:
            random = np.random.default_rng(0)
            drawn = random.integers(0, len(rounds), (_RESAMPLES, len(rounds)))
            found = np.array(
                [np.percentile(np.concatenate([rounds[i] for i in d]), quantiles) for d in drawn]
            )
            ends = np.percentile(found, (2.5, 97.5), axis=0)
            for (name, quantile), point, low, high in zip(_QUANTILES.items(), points, *ends, strict=True):
                reach = _error_of_quantile(quantile) * _half_width(medians)
                wide = (point * math.exp(-reach), point * math.exp(reach))
                ci95[name] = (min(float(low), wide[0]), max(float(high), wide[1]))
        mean = float(np.mean(joined))
        p50, p90, p99 = points
        return Spread(
            p50, p90, p99, mean, min(medians), max(medians), len(rounds), len(joined), ci95, tuple(medians)
        )  # fmt: skip

    @property
    def spread_pct(self) -> float:
        """From the smallest to the largest round, in percent of the median."""
        return 100 * (self.high - self.low) / self.p50 if self.p50 else 0.0


def _half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of logarithms, by Student's t; 0 where it is not known."""
    if len(values) < 2 or min(values) <= 0:
        return 0.0
    return _student_t(len(values) - 1) * float(np.std(np.log(values), ddof=1)) / math.sqrt(len(values))


def _student_t(freedom: int) -> float:
    """Student's t for 95 % (Abramowitz and Stegun, 26.7.5)."""
    if freedom in _STUDENT_T:
        return _STUDENT_T[freedom]
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _error_of_quantile(quantile: float) -> float:
    """How many times the standard error of a mean that of a quantile of normal values is."""
    normal = NormalDist()
    return math.sqrt(quantile * (1 - quantile)) / normal.pdf(normal.inv_cdf(quantile))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A time relative to that of another candidate, round by round: what slows both down does not count.

    Attributes:
        value: Geometric mean of the rounds' ratios; below 1 where it is faster.
        low: Lower end of the 95 % interval, by Student's t of their logarithms.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of(spread: Spread, other: Spread) -> Ratio | None:
        """Of two that were measured in turn, in two rounds or more; None where they were not."""
        if len(spread.rounds) != len(other.rounds) or len(spread.rounds) < 2:
            return None
        if min(*spread.rounds, *other.rounds) <= 0:
            return None
        ratios = [one / two for one, two in zip(spread.rounds, other.rounds, strict=True)]
        mean, half = float(np.mean(np.log(ratios))), _half_width(ratios)
        return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What one candidate did.

    Attributes:
        name: The candidate.
        provider: Where it really ran.
        load_s: Seconds to open the model; None for a PyTorch program that was open already.
        latency_ms: One call; for a decoder one decoded token.
        first_token_ms: The whole prompt; None without a cache.
        to_first: ``latency_ms`` relative to that of the first candidate that was measured in turn with it;
            None for that one itself.
        throughput: Rows a second; for a decoder new tokens a second over the whole round.
        prefill_tokens_per_s: None without a cache.
        decode_tokens_per_s: None without a cache.
        tokens_per_call: What a call of the model gave; None where tokens are not guessed.
        peak_rss_mb: Of the candidate's own process; None for a PyTorch program that shares this one.
        device_memory_mb: Memory of NVIDIA GPUs that its process holds; None where there is none.
        size_mb: Of the model's files; None for PyTorch.
        placement: Provider to nodes, share of nodes, and where it was profiled share of time and of bytes;
            None for PyTorch.
        graph: Which graph of a model of several was measured; None for a model of one.
        model_placement: ``placement`` of all graphs of the model, taken together: nodes, and time and bytes
            of one run of each. None for a model of one graph.
        copies: Nodes that only copy between devices; None where nothing was profiled.
        copied_bytes: What they copy in one call.
        profile: Operators and nodes by time; None where it was not asked for.
        versions: Of the packages in its environment.
        own_kernels: What ran onnxsmith's own operators: an instruction set, or ``functions`` of standard
            operators; empty where the graph has none, None where it was not opened.
        other_load_pct: Share of the machine's processors that other programs used meanwhile, in percent.
        settings: What was measured.
        interrupted: Whether fewer rounds were measured than were asked for.
        error: Why there is no result, or an empty string.
        exit_status: The exit status that the error asks for.
    """

    name: str
    provider: str
    settings: BenchSettings
    load_s: float | None = None
    latency_ms: Spread | None = None
    first_token_ms: Spread | None = None
    to_first: Ratio | None = None
    throughput: Spread | None = None
    prefill_tokens_per_s: Spread | None = None
    decode_tokens_per_s: Spread | None = None
    tokens_per_call: Spread | None = None
    peak_rss_mb: float | None = None
    device_memory_mb: float | None = None
    size_mb: float | None = None
    placement: Mapping[str, Any] | None = None
    graph: str | None = None
    model_placement: Mapping[str, Any] | None = None
    copies: int | None = None
    copied_bytes: int | None = None
    profile: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    own_kernels: str | None = None
    other_load_pct: float | None = None
    interrupted: bool = False
    error: str = ""
    exit_status: int = 0

    @property
    def spread_pct(self) -> float | None:
        """The widest spread of what was measured, in percent of its median."""
        measured = (self.latency_ms, self.first_token_ms, self.throughput)
        spreads = [spread.spread_pct for spread in measured if spread is not None]
        return max(spreads, default=None)

    @property
    def noise(self) -> str:
        """What says that the machine was busy, or an empty string."""
        found = []
        if self.spread_pct is not None and self.spread_pct > _NOISY_PCT:
            found.append(f"spread {self.spread_pct:.0f} %")
        if self.latency_ms is not None and (self.other_load_pct or 0.0) > _BUSY_PCT:
            found.append(f"other programs used {self.other_load_pct:.0f} % of the processors")
        return ", ".join(found)

    @property
    def noisy(self) -> bool:
        """Whether the machine was busy."""
        return bool(self.noise)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = dataclasses.asdict(self)
        plain["settings"]["threads"] = self.settings.thread_count
        return plain | {"spread_pct": self.spread_pct, "noisy": self.noisy, "noise": self.noise}


def with_ratios(results: Sequence[BenchResult]) -> list[BenchResult]:
    """The results of candidates that were measured in turn, each with its ratio to the first of its graph."""
    first: dict[str | None, Spread] = {}
    found = []
    for result in results:
        latency = result.latency_ms
        if latency is not None and result.graph in first:
            result = dataclasses.replace(result, to_first=Ratio.of(latency, first[result.graph]))
        elif latency is not None:
            first[result.graph] = latency
        found.append(result)
    return found
