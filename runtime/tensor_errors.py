"""How far a tensor is from another over several cases, and in which of its channels."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from onnxsmith.runtime.session import Array
from onnxsmith.runtime.tensor_store import is_masked

__all__ = ["ErrorSum", "TensorError"]

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class TensorError:
    """The difference of a tensor from what it should be, over all cases.

    Attributes:
        relative: Euclidean norm of the difference over that of the reference.
        channel: The same of the worst position on the last axis, relative to its own reference or the mean
            of all of them, whichever is larger: one wrong weight is seen here long before ``relative``.
        worst_channel: Which position that is.
        max_abs: Largest absolute difference.
        scale: Largest magnitude of the reference.
        bad: Elements that are NaN or infinite where the reference's are finite.
        count: Elements compared.
        undefined: Elements that are NaN in the reference, with which nothing can be compared.
    """

    relative: float = 0.0
    channel: float = 0.0
    worst_channel: int = 0
    max_abs: float = 0.0
    scale: float = 0.0
    bad: int = 0
    count: int = 0
    undefined: int = 0

    @property
    def comparable(self) -> bool:
        """Whether there was anything to compare with, or nothing to compare at all."""
        return self.count > 0 or not self.undefined

    @property
    def size(self) -> float:
        """One number to rank by: infinite where values are not finite, else the worst channel's."""
        return math.inf if self.bad else max(self.channel, self.relative)


class ErrorSum:
    """Adds up differences case by case; the last axis must be the same in all."""

    def __init__(self) -> None:
        """Starts with nothing."""
        self._difference: Floats = np.zeros(0)
        self._reference: Floats = np.zeros(0)
        self._max_abs = self._scale = 0.0
        self._bad = self._count = self._undefined = 0

    def add(self, reference: Array, candidate: Array) -> None:
        """Takes one case. The shapes are equal. What a mask hides in both does not count."""
        masked = is_masked(reference) & is_masked(candidate)
        expected, got = (np.asarray(array, np.float64) for array in (reference, candidate))
        wrong = ~np.isfinite(got) & np.isfinite(expected)
        self._bad += int(np.count_nonzero(wrong))
        undefined = int(np.count_nonzero(np.isnan(expected)))
        self._undefined += undefined
        usable = np.isfinite(got) & np.isfinite(expected) & ~masked
        difference = np.zeros_like(expected)
        np.subtract(got, expected, out=difference, where=usable)
        expected = np.where(np.isfinite(expected) & ~masked, expected, 0.0)
        self._count += expected.size - undefined
        if not expected.size:
            return
        self._max_abs = max(self._max_abs, float(np.abs(difference).max()))
        self._scale = max(self._scale, float(np.abs(expected).max()))
        channels = expected.shape[-1] if expected.ndim > 1 else 1
        rows = [np.square(a).reshape(-1, channels).sum(axis=0) for a in (difference, expected)]
        if self._difference.shape != rows[0].shape:
            # The last axis is one of positions: there are no channels, only a whole.
            rows = [np.array([row.sum()]) for row in rows]
            if self._difference.size:
                self._difference = np.array([self._difference.sum()])
                self._reference = np.array([self._reference.sum()])
            else:
                rows = [np.square(a).reshape(-1, channels).sum(axis=0) for a in (difference, expected)]
        if self._difference.size:
            self._difference += rows[0]
            self._reference += rows[1]
        else:
            self._difference, self._reference = rows

    def total(self) -> TensorError:
        """The error over all cases so far."""
        if not self._difference.size:
            return TensorError(bad=self._bad, count=self._count, undefined=self._undefined)
        whole = float(self._reference.sum())
        relative = _ratio(float(self._difference.sum()), whole)
        floor = whole / len(self._reference)
        ratios = [_ratio(d, max(r, floor)) for d, r in zip(self._difference, self._reference, strict=True)]
        worst = int(np.argmax(ratios))
        return TensorError(
            relative, float(ratios[worst]), worst, self._max_abs, self._scale, self._bad, self._count,
            self._undefined,
        )  # fmt: skip


def _ratio(difference: float, reference: float) -> float:
    if difference == 0.0:
        return 0.0
    return math.sqrt(difference / reference) if reference > 0 else math.inf
