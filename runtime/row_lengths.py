"""Padding for graphs whose attention takes lengths of rows and not a mask: see ``package.reads_lengths``.

Such attention takes the first tokens of a row for the row's, and what a call adds to the cache goes behind
them. So a prompt may be padded on the right. Where padding is anywhere else, rows run without it, those of
one length together, and their results are put back to where the tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import FeedError
from onnxsmith.package import CachePair

__all__ = ["fits_lengths", "run_without_padding"]

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
_IDS, _MASK, _LOGITS = "input_ids", "attention_mask", "logits"


def fits_lengths(mask: Mask, new: int) -> bool:
    """Whether lengths say all that a mask says.

    Args:
        mask: (batch, total length), false for padding.
        new: How many of the positions are new in this call; the others are in the cache.
    """
    if mask.shape[1] > new:
        return bool(mask.all())
    return bool(mask[:, :1].all() and (mask[:, 1:] <= mask[:, :-1]).all())


def run_without_padding(
    run: Callable[[dict[str, Array], list[str]], dict[str, Array]],
    feeds: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    cache: Sequence[CachePair],
    name: str,
) -> dict[str, Array]:
    """Runs a decoder on rows without their padding, those of one length together.

    Args:
        run: Runs the graph.
        feeds: With a mask of (batch, total length) that lengths cannot say.
        outputs: Names of the wanted outputs.
        cache: The graph's cache.
        name: Of the model, for messages.

    Returns:
        The outputs as for the whole batch, with zeros at padding.

    Raises:
        FeedError: An input or output of which it is not known where its positions are, a row without new
            tokens, or padding between tokens: a window of attention would count it.
    """
    mask = feeds[_MASK].astype(bool)
    new = feeds[_IDS].shape[1]
    past = mask.shape[1] - new
    if not mask[:, past:].any(axis=1).all():
        raise FeedError(f"{name}: input {_MASK!r}", got="a row without new tokens", expected="at least one")
    spans = np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1
    if (spans.sum(axis=1) > 1).any():
        raise FeedError(
            f"{name}: input {_MASK!r}",
            got="padding between tokens of a row",
            expected="padding on one side, because attention takes lengths of rows in this graph",
        )
    lengths = list(zip(mask[:, :past].sum(axis=1), mask[:, past:].sum(axis=1), strict=True))
    pasts = {pair.past.name for pair in cache}
    presents = {pair.present.name for pair in cache}
    results: dict[str, Array] = {}
    for kind in sorted(set(lengths)):
        rows = np.array([row for row, one in enumerate(lengths) if one == kind])
        places = np.array([np.flatnonzero(mask[row]) for row in rows])
        old, added = places[:, : kind[0]], places[:, kind[0] :]
        part: dict[str, Array] = {}
        for key, array in feeds.items():
            if key in pasts:
                part[key] = _taken(array, rows, old, axis=2)
            elif key == _MASK:
                part[key] = np.ones(places.shape, array.dtype)
            elif array.shape[:2] == (len(mask), new):
                part[key] = _taken(array, rows, added - past, axis=1)
            elif array.ndim == 0 or array.shape[0] != len(mask):
                part[key] = array
            else:
                raise _unknown(name, f"input {key!r}", array)
        for key, array in run(part, list(outputs)).items():
            if key in presents:
                axis, there, size = 2, places, mask.shape[1]
            elif array.shape[:2] == added.shape:
                axis, there, size = 1, added - past, new
            else:
                raise _unknown(name, f"output {key!r}", array)
            shape = [len(mask), *array.shape[1:]]
            shape[axis] = size
            whole = results.setdefault(key, np.zeros(shape, array.dtype))
            for number, row in enumerate(rows):
                # With the axis of positions in front, where an index of places goes.
                np.moveaxis(whole[row], axis - 1, 0)[there[number]] = np.moveaxis(array[number], axis - 1, 0)
    return results


def _taken(array: Array, rows: Array, places: Array, *, axis: int) -> Array:
    """Of some rows, the places of each on an axis."""
    picked = [np.take(array[row], places[number], axis=axis - 1) for number, row in enumerate(rows)]
    return np.ascontiguousarray(np.stack(picked))


def _unknown(name: str, what: str, array: Array) -> FeedError:
    return FeedError(
        f"{name}: {what}",
        got=f"shape {array.shape} with padding elsewhere than on the right, and no known axis of positions",
        expected="no padding, because attention takes lengths of rows in this graph",
        remedy="Run the rows one by one, or pad prompts on the right",
    )
