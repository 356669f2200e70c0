"""Ranges of activations from streamed data: what is kept does not grow with the number of samples.

The methods are those of Wu et al., 2020 (https://arxiv.org/abs/2004.09602) and of Nagel et al., 2021
(https://arxiv.org/abs/2106.08295).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["METHODS", "Channels", "Observer", "Range"]

METHODS = ("minmax", "moving_average", "percentile", "entropy", "mse")

_BINS = 2048
# Magnitudes from here on are masks: what is added to a score so that its exponential is zero.
_MASK = 1e30


@dataclasses.dataclass(frozen=True)
class Range:
    """What the codes of an activation have to cover.

    Attributes:
        low: Lower end, at most 0.
        high: Upper end, at least 0.
        masked: Values that were left out because they are masks.
    """

    low: float
    high: float
    masked: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a calibration table."""
        return dataclasses.asdict(self)


class Observer:
    """Watches one activation.

    A histogram of 2048 bins is spread over twice its range whenever a value falls outside, so it never has
    to look back.
    """

    def __init__(self, *, momentum: float = 0.9) -> None:
        """Begins with nothing.

        Args:
            momentum: Of the moving average.
        """
        self._momentum = momentum
        self._low, self._high = np.inf, -np.inf
        self._mean: tuple[float, float] | None = None
        self._edge = 0.0
        self._counts = np.zeros(_BINS, np.int64)
        self._masked = 0

    def update(self, values: npt.NDArray[Any]) -> None:
        """Takes one batch."""
        flat = np.asarray(values, np.float32).ravel()
        low, high = float(flat.min(initial=np.inf)), float(flat.max(initial=-np.inf))
        if low <= -_MASK or high >= _MASK or low != low:
            kept = flat[np.abs(flat) < _MASK]
            self._masked += flat.size - kept.size
            flat = kept
            low, high = float(flat.min(initial=np.inf)), float(flat.max(initial=-np.inf))
        if not flat.size:
            return
        self._low, self._high = min(self._low, low), max(self._high, high)
        before, m = self._mean, self._momentum
        self._mean = (
            (low, high) if before is None else (m * before[0] + (1 - m) * low, m * before[1] + (1 - m) * high)
        )
        self._grow(max(abs(low), abs(high)))
        if self._edge:
            scaled = (flat + np.float32(self._edge)) * np.float32(_BINS / (2 * self._edge))
            index = np.clip(scaled.astype(np.int32), 0, _BINS - 1)
            self._counts += np.bincount(index, minlength=_BINS)

    def _grow(self, largest: float) -> None:
        if not largest or largest <= self._edge:
            return
        if not self._edge:
            self._edge = largest
            return
        while self._edge < largest:
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.zeros(_BINS, np.int64)
            self._counts[_BINS // 4 : _BINS // 4 + _BINS // 2] = merged
            self._edge *= 2

    def range(self, method: str, *, percentile: float = 99.99, levels: int = 256) -> Range:
        """The range by one of ``METHODS``.

        Args:
            method: ``minmax``, ``moving_average`` of the ends of the batches, ``percentile``, ``entropy``
                (least KL divergence between the histogram and what the codes can say of it), or ``mse``
                (least squared error).
            percentile: Of the values that are inside.
            levels: Number of codes.
        """
        if self._high < self._low:
            return Range(0.0, 0.0, self._masked)
        low, high = min(self._low, 0.0), max(self._high, 0.0)
        if method == "moving_average" and self._mean is not None:
            low, high = min(self._mean[0], 0.0), max(self._mean[1], 0.0)
        elif method != "minmax" and self._edge:
            low, high = self._clipped(method, low, high, percentile, levels)
        return Range(low, high, self._masked)

    def _clipped(
        self, method: str, low: float, high: float, percentile: float, levels: int
    ) -> tuple[float, float]:
        edges = np.linspace(-self._edge, self._edge, _BINS + 1)
        if method == "percentile":
            share = np.cumsum(self._counts) / self._counts.sum()
            outside = (1 - percentile / 100) / 2
            first = int(np.searchsorted(share, outside, side="right"))
            last = int(np.searchsorted(share, 1 - outside))
            return min(max(edges[first], low), 0.0), max(min(edges[last + 1], high), 0.0)
        best, smallest = (low, high), np.inf
        for part in np.linspace(0.3, 1.0, 71):
            loss = _LOSSES[method](self._counts, edges, part * low, part * high, levels)
            if loss < smallest:
                smallest, best = loss, (part * low, part * high)
        return best


def _squared(counts: npt.NDArray[np.int64], edges: Any, low: float, high: float, levels: int) -> float:
    middles = (edges[1:] + edges[:-1]) / 2
    step = (high - low) / (levels - 1) or 1.0
    outside = middles - np.clip(middles, low, high)
    # Inside, the error is spread evenly over a step; a bin is too wide to see more of it.
    error = np.where(outside == 0, step * step / 12, np.square(outside))
    return float((counts * error).sum())


def _divergence(counts: npt.NDArray[np.int64], edges: Any, low: float, high: float, levels: int) -> float:
    middles = (edges[1:] + edges[:-1]) / 2
    inside = (middles >= low) & (middles <= high)
    if not inside.any():
        return np.inf
    clipped = counts[inside].astype(np.float64)
    clipped[0] += counts[middles < low].sum()
    clipped[-1] += counts[middles > high].sum()
    code = np.minimum(((middles[inside] - low) / ((high - low) or 1.0) * levels).astype(int), levels - 1)
    raw = counts[inside].astype(np.float64)
    full = raw > 0
    total = np.bincount(code, raw, levels)
    used = np.bincount(code, full.astype(np.float64), levels)
    spread = np.where(full, (total / np.maximum(used, 1))[code], 0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1.0)
    both = (p > 0) & (q > 0)
    # What has a probability and no code left costs as much as if it had a hundred-thousandth.
    missing = (p > 0) & (q == 0)
    return float((p[both] * np.log(p[both] / q[both])).sum() + (p[missing] * np.log(p[missing] / 1e-5)).sum())


_LOSSES: Mapping[str, Any] = {"mse": _squared, "entropy": _divergence}


class Channels:
    """Sums over the last axis of an activation: largest magnitude, mean and mean square of each channel."""

    def __init__(self, width: int) -> None:
        """Begins with nothing.

        Args:
            width: Size of the last axis.
        """
        self.largest = np.zeros(width, np.float32)
        self._sum = np.zeros(width, np.float64)
        self._squares = np.zeros(width, np.float64)
        self._count = 0

    def update(self, values: npt.NDArray[Any]) -> None:
        """Takes one batch."""
        rows = np.asarray(values, np.float32).reshape(-1, len(self.largest))
        np.maximum(self.largest, np.abs(rows).max(0, initial=0), out=self.largest)
        self._sum += rows.sum(0)
        self._squares += np.einsum("rk,rk->k", rows, rows)
        self._count += len(rows)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of each channel."""
        return self._sum / max(self._count, 1)

    @property
    def mean_square(self) -> npt.NDArray[np.float64]:
        """Mean square of each channel."""
        return self._squares / max(self._count, 1)
