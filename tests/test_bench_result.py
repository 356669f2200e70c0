"""Intervals of repeated measurements hold what they say, and ratios do not see what slows both sides down."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onnxsmith.runtime import BenchResult, BenchSettings
from onnxsmith.runtime.bench_result import Ratio, Spread, _student_t, with_ratios


def rounds_of(
    random: np.random.Generator, count: int, *, between: float = 0.03, within: float = 0.03
) -> list[list[float]]:
    """Rounds that differ, of values that differ less or more; log-normal around 1."""
    logs = random.normal(0, between, (count, 1)) + random.normal(0, within, (count, 31))
    return [list(row) for row in np.exp(logs)]


@pytest.mark.parametrize(("between", "within"), [(0.03, 0.03), (0.05, 0.01)])
def test_intervals_of_few_rounds_hold_the_percentiles(between: float, within: float) -> None:
    random = np.random.default_rng(0)
    everything = random.normal(0, between, 10**6) + random.normal(0, within, 10**6)
    true = dict(zip(("p50", "p90", "p99"), np.exp(np.percentile(everything, (50, 90, 99))), strict=True))
    held = dict.fromkeys(true, 0)
    for _ in range(60):
        spread = Spread.of(rounds_of(random, 3, between=between, within=within))
        for name, value in true.items():
            low, high = spread.ci95[name]
            held[name] += low <= value <= high
    assert min(held.values()) >= 54, held


def test_intervals_of_a_quiet_machine_are_narrow() -> None:
    spread = Spread.of(rounds_of(np.random.default_rng(0), 10, between=0.002, within=0.005))
    low, high = spread.ci95["p50"]
    assert low < 1 < high
    assert high - low < 0.01
    assert spread.rounds == tuple(spread.rounds)
    assert len(spread.rounds) == 10


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (5, 2.5706), (9, 2.2622), (30, 2.0423)])
def test_students_t(freedom: int, expected: float) -> None:
    assert _student_t(freedom) == pytest.approx(expected, rel=2e-3)


def test_a_ratio_does_not_see_what_slows_both_down() -> None:
    random = np.random.default_rng(0)
    machine = np.exp(random.normal(0, 0.5, 6))
    one = Spread.of(list(machine * 1.2 * np.exp(random.normal(0, 0.01, 6))))
    two = Spread.of(list(machine * np.exp(random.normal(0, 0.01, 6))))
    ratio = Ratio.of(one, two)
    assert ratio is not None
    assert 1 < ratio.low < 1.2 < ratio.high
    assert ratio.high - ratio.low < 0.1
    # Their own intervals say nothing.
    assert one.ci95["p50"][0] < two.ci95["p50"][1]
    assert Ratio.of(one, Spread.of([1.0, 2.0])) is None
    assert Ratio.of(Spread.of([1.0]), Spread.of([2.0])) is None


def test_results_are_compared_with_the_first_of_their_graph() -> None:
    def result(name: str, graph: str | None, *times: float) -> BenchResult:
        latency = Spread.of(list(times)) if times else None
        return BenchResult(name, "cpu", BenchSettings(), latency_ms=latency, graph=graph)

    made = [
        result("failed", "encoder"),
        result("a", "encoder", 1.0, 1.1, 1.2),
        result("b", "decoder", 5.0, 5.0, 5.0),
        result("c", "encoder", 2.0, 2.2, 2.4),
    ]
    found = with_ratios(made)
    assert [one.to_first is None for one in found] == [True, True, True, False]
    assert found[3].to_first is not None
    assert found[3].to_first.value == pytest.approx(2.0)
    assert found[3].to_json()["to_first"] == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0})
    assert dataclasses.replace(found[3], to_first=None) == made[3]


def test_one_slow_call_of_a_round_is_noise() -> None:
    """The median of such a round is that of the others, and its rate is not."""
    latency = Spread.of([[1.0, 1.0, 1.0, 30.0], [1.0] * 4, [1.0] * 4])
    result = BenchResult("x", "cpu", BenchSettings(), latency_ms=latency)
    assert not result.noisy
    rates = Spread.of([4 / 33, 1.0, 1.0])
    assert dataclasses.replace(result, throughput=rates).noise == "spread 88 %"
