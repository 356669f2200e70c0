"""How sure a metric is, and whether two models really differ in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError
from onnxsmith.runtime.metrics import Metric, Outcome

__all__ = ["Difference", "Interval", "compare_outcomes", "measure"]

_LOW, _HIGH = 2.5, 97.5
# Metrics of these run from 0 to 100 points.
_BOUNDED = frozenset({"answers", "labels", "texts"})


@dataclasses.dataclass(frozen=True)
class Interval:
    """A metric with its 95 % bootstrap interval.

    Attributes:
        value: Of all samples.
        low: Lower end.
        high: Upper end.
        n: Samples.
    """

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A metric of one model minus that of another on the same samples.

    Attributes:
        value: The difference.
        low: Lower end of its 95 % interval, by the paired bootstrap (Koehn, 2004,
            https://aclanthology.org/W04-3250).
        high: Upper end.
        p: Probability of a difference as large if it did not matter which model said what, by approximate
            randomization (Yeh, 2000, https://aclanthology.org/C00-2137).
        drop_points: By how many points the model is worse; negative where it is better.
    """

    value: float
    low: float
    high: float
    p: float
    drop_points: float

    @property
    def significant(self) -> bool:
        """Whether the difference is unlikely to be chance: p below 0.05."""
        return self.p < 0.05


def measure(metric: Metric, outcome: Outcome, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Computes a metric with its interval, by drawing samples again with replacement.

    Where all samples are alike, as where each is right, drawing them again shows nothing: the interval then
    reaches as far as what happens so rarely that none of so many samples would show it (see ``_unseen``).

    Raises:
        BadInputError: There are no samples.
    """
    if not len(outcome):
        raise BadInputError("evaluate", got="no samples", expected="at least one")
    value = metric.compute(outcome)
    draws = [metric.compute(outcome.take(index)) for index in _draws(len(outcome), metric, resamples, seed)]
    low, high = _ends(draws, value)
    if low == high and metric.kind in _BOUNDED:
        reach, most = 100 * metric.scale * _unseen(len(outcome)), 100 * metric.scale
        low, high = max(low - reach, min(low, 0.0)), min(high + reach, max(high, most))
    return Interval(value, low, high, len(outcome))


def compare_outcomes(
    metric: Metric, outcome: Outcome, reference: Outcome, *, resamples: int = 1000, seed: int = 0
) -> Difference:
    """Tests whether a model differs from a reference in a metric, sample by sample.

    Raises:
        BadInputError: Not the same samples.
    """
    if list(outcome.references) != list(reference.references):
        raise BadInputError("evaluate", got="other samples than the reference's", expected="the same ones")
    value = metric.compute(outcome) - metric.compute(reference)
    draws = [
        metric.compute(outcome.take(index)) - metric.compute(reference.take(index))
        for index in _draws(len(outcome), metric, resamples, seed)
    ]
    low, high = _ends(draws, value)
    if low == high and metric.kind in _BOUNDED:
        # Two models that say the same of all samples.
        reach = 100 * metric.scale * _unseen(len(outcome))
        low, high = low - reach, high + reach
    random = np.random.default_rng(seed)
    times = max(1, min(resamples, metric.resamples))
    as_large = 0
    for _ in range(times):
        swap = random.random(len(outcome)) < 0.5
        pairs = list(zip(outcome.predictions, reference.predictions, swap, strict=True))
        one, two = (
            dataclasses.replace(outcome, predictions=[b if s != turned else a for a, b, s in pairs])
            for turned in (False, True)
        )
        as_large += abs(metric.compute(one) - metric.compute(two)) >= abs(value) - 1e-12
    sign = -1.0 if metric.higher_is_better else 1.0
    return Difference(value, low, high, (as_large + 1) / (times + 1), sign * value / metric.scale)


def _unseen(count: int) -> float:
    """What has a probability of more than this shows in one of so many samples, in 95 of 100 cases.

    The exact form of the rule of three (Hanley and Lippman-Hand, 1983, https://doi.org/10.1001/jama.249.13.1743).
    """
    return float(1 - 0.05 ** (1 / count))


def _draws(count: int, metric: Metric, resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    for _ in range(max(1, min(resamples, metric.resamples))):
        yield random.integers(0, count, count)


def _ends(draws: list[float], value: float) -> tuple[float, float]:
    finite = [draw for draw in draws if np.isfinite(draw)]
    if not finite:
        return value, value
    low, high = np.percentile(finite, [_LOW, _HIGH])
    return float(low), float(high)
