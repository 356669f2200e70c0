"""What a change of a model gains, measured: before and after in turn, each in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.finding import Finding

if TYPE_CHECKING:
    from onnxsmith.runtime import BenchResult, BenchSettings
    from onnxsmith.runtime.bench_result import Spread

__all__ = ["Gain", "gain_of", "measure_gains", "thread_finding"]

# A number of threads has to be so much faster before anybody is told to set it.
_WORTH_SETTING = 1.05


@dataclasses.dataclass(frozen=True)
class Gain:
    """One graph before and after.

    Attributes:
        component: Which graph; empty where there is one.
        before_ms: Medians: ``latency``, or for a decoder ``token`` and ``prompt``.
        after_ms: Likewise.
        ratios: Before by after: above 1 it became faster.
        certain: Whether the 95 % intervals of all ratios, round by round, are on the same side of 1, or one
            is and the others hold 1.
        before_mb: Size of the files; None where unknown.
        after_mb: Likewise.
        noise: What says that the machine was busy, or an empty string.
        error: Why there are no numbers, or an empty string.
    """

    component: str
    before_ms: Mapping[str, float]
    after_ms: Mapping[str, float]
    ratios: Mapping[str, float]
    certain: bool
    before_mb: float | None = None
    after_mb: float | None = None
    noise: str = ""
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def measure_gains(before: Path, after: Path, provider: str, settings: BenchSettings) -> list[Gain]:
    """Measures two models in turn, graph by graph.

    Args:
        before: A model.
        after: The same one, changed.
        provider: See ``choose_provider``.
        settings: How.
    """
    from onnxsmith.package_io import load_package
    from onnxsmith.runtime import Candidate, benchmark

    names = list(load_package(before).components)
    gains = []
    for name in names:
        # Two at a time: each holds its weights.
        part = name if len(names) > 1 else None
        own = list(load_package(after).components)
        other = name if name in own else own[0]
        candidates = [
            Candidate("before", before, provider, component=part),
            Candidate("after", after, provider, component=other if len(own) > 1 else None),
        ]
        first, second = benchmark(candidates, settings)
        gains.append(gain_of(first, second, part or ""))
    return gains


def gain_of(before: BenchResult, after: BenchResult, component: str = "") -> Gain:
    """What two results say of each other."""
    pairs = {name: (one, other) for name, one, other in _spreads(before, after)}
    ratios = {name: one.p50 / other.p50 for name, (one, other) in pairs.items() if other.p50}
    sides = {_side(one, other) for one, other in pairs.values()} - {0}
    return Gain(
        component,
        {name: one.p50 for name, (one, _) in pairs.items()},
        {name: other.p50 for name, (_, other) in pairs.items()},
        ratios,
        len(sides) == 1,
        before.size_mb,
        after.size_mb,
        after.noise or before.noise,
        before.error or after.error,
    )


def _spreads(before: BenchResult, after: BenchResult) -> Iterator[tuple[str, Spread, Spread]]:
    decoder = before.first_token_ms is not None
    named = (("token" if decoder else "latency", "latency_ms"), ("prompt", "first_token_ms"))
    for name, field in named:
        one, other = getattr(before, field), getattr(after, field)
        if one is not None and other is not None:
            yield name, one, other


def _side(before: Spread, after: Spread) -> int:
    """1 where after is faster for certain, -1 where it is slower, else 0."""
    from onnxsmith.runtime.bench_result import Ratio

    ratio = Ratio.of(after, before)
    if ratio is not None:
        return 1 if ratio.high < 1 else -1 if ratio.low > 1 else 0
    (low, high), (other_low, other_high) = (
        spread.ci95.get("p50", (spread.low, spread.high)) for spread in (before, after)
    )
    return 1 if other_high < low else -1 if other_low > high else 0


def thread_finding(
    model: Path, provider: str, settings: BenchSettings
) -> tuple[Finding, Sequence[Gain]] | None:
    """Whether another number of threads than all processors is faster, measured in turn with it.

    Args:
        model: The model.
        provider: See ``choose_provider``.
        settings: How; its number of threads is what others are compared with.
    """
    from onnxsmith.pipeline.measuring import bench_models

    default = settings.thread_count
    best: tuple[float, int, list[Gain]] | None = None
    for count in _other_counts(default):
        # There and back, so that what slows the machine down meanwhile slows both down.
        points = [dataclasses.replace(settings, threads=number) for number in (default, count)]
        results = bench_models([model], points, providers=[provider])
        half = len(results) // 2
        gains = [gain_of(one, other) for one, other in zip(results[:half], results[half:], strict=True)]
        ratios = [ratio for gain in gains for ratio in gain.ratios.values()]
        if not ratios or not all(gain.certain for gain in gains):
            continue
        worst = min(ratios)
        if worst > _WORTH_SETTING and (best is None or worst > best[0]):
            best = (worst, count, gains)
    if best is None:
        return None
    _, count, gains = best
    return (
        Finding(
            "threads",
            "slow",
            f"{count} threads are faster than {default}",
            "its operators are too small to be shared, or threads wait for each other and for other programs",
            f"set intra_op_num_threads to {count}: --threads {count}",
        ),
        gains,
    )


def _other_counts(default: int) -> list[int]:
    """Fewer threads, by halves: the number of cores is among them where there are two threads to each."""
    counts = []
    while default > 1:
        default //= 2
        counts.append(default)
    return counts
