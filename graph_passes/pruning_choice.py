"""Which units go: the lowest scores of each layer, of all layers together, or below a threshold."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Scope", "excluded", "lowest_units"]

Scope = Literal["layer", "global"]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def excluded(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether a pattern fits any of the names."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def lowest_units(
    scores: Sequence[Floats], ratio: float, *, scope: Scope, threshold: float | None = None
) -> list[Mask]:
    """The units that go, layer by layer. The best of a layer always stays.

    Args:
        scores: One array for each layer.
        ratio: The share that goes.
        scope: ``layer`` takes the share of each layer. ``global`` ranks all together; each layer's scores are
            divided by their root mean square first, because layers differ in scale.
        threshold: Besides, what is below this part of its layer's mean goes.
    """
    if scope == "layer":
        gone = [_lowest(part, min(round(ratio * len(part)), len(part) - 1)) for part in scores]
    else:
        scaled = []
        for part in scores:
            size = float(np.sqrt(np.mean(np.square(part)))) or 1.0
            scaled.append(np.where(np.arange(len(part)) == np.argmax(part), np.inf, part / size))
        flat = np.concatenate(scaled)
        count = min(round(ratio * len(flat)), len(flat) - len(scores))
        gone = np.split(_lowest(flat, count), np.cumsum([len(part) for part in scores])[:-1])
    if threshold is not None:
        for part, mask in zip(scores, gone, strict=True):
            mask |= part < threshold * part.mean()
            mask[int(np.argmax(part))] = False
    return gone


def _lowest(values: Floats, count: int) -> Mask:
    gone = np.zeros(len(values), bool)
    gone[np.argsort(values, kind="stable")[:count]] = True
    return gone
