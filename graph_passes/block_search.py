"""The grid of each block: which scale, and which zero point or minimum, its weights are rounded with.

All of it works on tables: a block is a column, so that a number of each block lies next to that of the next
one and loops are as long as there are blocks. Tables of temporary numbers belong to the thread and are used
again, because the pages of new ones cost more than the arithmetic; ``np.where`` and ``np.minimum`` with a
scalar, for which numpy has no vector loops, are not used on them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SEARCH_STEPS", "fit_grid", "fit_minimums", "half_quadratic", "round_table", "scratch"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

SEARCH_STEPS = 6
"""Grids tried for each block where nothing else is asked for."""

_SCRATCH = threading.local()
_SMALLEST = np.float32(np.finfo(np.float32).smallest_normal)
_LEAST_HALF = np.float32(np.finfo(np.float16).smallest_subnormal)
_LARGEST_HALF = np.float32(np.finfo(np.float16).max)


def scratch(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """A table of this thread with numbers of the past in it; it stays until the thread asks for it again."""
    size = int(np.prod(shape))
    known: npt.NDArray[Any] | None = getattr(_SCRATCH, name, None)
    if known is None or known.size < size or known.dtype != dtype:
        known = np.empty(size, dtype)
        setattr(_SCRATCH, name, known)
    return known[:size].reshape(shape)


def round_table(table: Floats, scale: Floats, zero: npt.NDArray[Any], bits: int) -> Codes:
    """The nearest codes, in a table of ``scratch``.

    Args:
        table: (block size, n), a block to each column.
        scale: (n,).
        zero: (n,): zero points in uint8, or minimums in float32.
        bits: Of a code.
    """
    rounded = _nearest(table, scale, zero, bits)
    codes: Codes = scratch("bytes", table.shape, np.uint8)
    np.copyto(codes, rounded, casting="unsafe")
    return codes


def _nearest(table: Floats, scale: Floats, zero: npt.NDArray[Any], bits: int) -> Floats:
    codes: Floats = scratch("codes", table.shape)
    if zero.dtype == np.float32:
        np.subtract(table, zero, out=codes)
        codes *= 1 / scale
        np.rint(codes, out=codes)
    else:
        np.multiply(table, 1 / scale, out=codes)
        np.rint(codes, out=codes)
        codes += zero.astype(np.float32)
    return np.clip(codes, 0, np.float32((1 << bits) - 1), out=codes)


def fit_grid(
    table: Floats,
    *,
    bits: int,
    symmetric: bool,
    steps: int,
    scale_type: npt.DTypeLike,
    counts: Floats | None,
) -> tuple[Floats, Codes]:
    """Scales and zero points, (n,) each: see ``quantize_blocks``.

    Args:
        table: (block size, n).
        bits: Of a code.
        symmetric: Whether zero points are fixed to the middle.
        steps: Grids tried besides the full range.
        scale_type: What scales are stored as.
        counts: (block size, n), how much an error counts besides.
    """
    low, high = np.minimum(table.min(0), 0), np.maximum(table.max(0), 0)
    plain_scale, plain_zero = _grid(low, high, bits, symmetric, scale_type)
    if not steps:
        return plain_scale, plain_zero
    weights = _weights(table, counts)
    weighted = np.multiply(weights, table, out=scratch("weighted", table.shape))
    codes = scratch("codes", table.shape)
    levels = np.float32((1 << bits) - 1)
    shifts = _shifts(bits, steps, minimums=False)
    covariance, squares, zeros = scratch("sums", (3, len(shifts), *low.shape))
    for number, shift in enumerate(shifts):
        scale, zero = _grid(low, high, bits, symmetric, scale_type, shift=shift)
        zeros[number] = zero
        np.multiply(table, 1 / scale, out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, -zeros[number], levels - zeros[number], out=codes)
        _dots(weighted, codes, covariance[number])
        codes *= codes
        _dots(weights, codes, squares[number])
    fitted, gain, usable = _slopes(covariance, squares, scale_type)
    found = _best(gain, usable, (fitted, zeros), (plain_scale, plain_zero.astype(np.float32)))
    best_scale, best_zero = found[0], found[1].astype(np.uint8)
    # Once more, with the codes that the fitted grid gives.
    _nearest(table, best_scale, best_zero, bits)
    codes -= found[1]
    slope = _dots(weighted, codes)
    spread = _dots(weights, np.multiply(codes, codes, out=weighted))
    codes *= best_scale
    loss = _squared(codes, table, weights)
    refined, _, usable = _slopes(slope, spread, scale_type)
    refined = _chosen(usable, refined, best_scale)
    better = _loss(table, weights, refined, best_zero, bits) < loss
    best_scale = _chosen(better, refined, best_scale)
    # Sums in float32 do not tell close grids apart for certain.
    kept = loss < _loss(table, weights, plain_scale, plain_zero, bits)
    return _chosen(kept, best_scale, plain_scale), np.where(kept, best_zero, plain_zero)


def fit_minimums(
    table: Floats, *, bits: int, steps: int, scale_type: npt.DTypeLike, counts: Floats | None
) -> tuple[Floats, Floats]:
    """Scales and float minimums, (n,) each, fitted together by least squares to the codes of several grids.

    Args:
        table: (block size, n).
        bits: Of a code.
        steps: Grids tried besides the full range.
        scale_type: What scales and minimums are stored as.
        counts: (block size, n), how much an error counts besides.
    """
    low, high = table.min(0), table.max(0)
    levels = np.float32((1 << bits) - 1)
    plain_scale, plain_low = (
        _usable(_stored(high / levels - low / levels, scale_type)),
        _stored(low, scale_type),
    )
    if not steps:
        return plain_scale, plain_low
    weights = _weights(table, counts)
    total = np.maximum(_sums(weights), _SMALLEST)
    codes = scratch("codes", table.shape)
    mean = np.asarray(_dots(weights, table) / total, np.float32)
    weighted = np.subtract(table, mean, out=scratch("weighted", table.shape))
    weighted *= weights
    # Where a number lies between the lowest and the highest, 0 to 1.
    width = _usable(high - low)
    place = np.subtract(table, low, out=scratch("place", table.shape))
    place *= 1 / width
    shifts = _shifts(bits, steps, minimums=True)
    covariance, middle, squares = scratch("sums", (3, len(shifts), *low.shape))
    for number, shift in enumerate(shifts):
        np.multiply(place, levels + np.float32(shift), out=codes)
        np.rint(codes, out=codes)
        if shift > 0:
            np.clip(codes, 0, levels, out=codes)
        _dots(weighted, codes, covariance[number])
        _dots(weights, codes, middle[number])
        codes *= codes
        _dots(weights, codes, squares[number])
    # Of all grids at a time: numbers of each block are few, and calls on them cost as much as the numbers.
    middle /= total
    squares -= total * np.square(middle)
    scale, minimum, gain, usable = _lines(covariance, middle, squares, total, mean, scale_type)
    best_scale, best_low = _best(gain, usable, (scale, minimum), (plain_scale, plain_low))
    # Once more, with the codes that the fitted grid gives.
    _nearest(table, best_scale, best_low, bits)
    slope, average = _dots(weighted, codes), np.asarray(_dots(weights, codes) / total, np.float32)
    spread = _dots(weights, np.multiply(codes, codes, out=place)) - total * np.square(average)
    codes *= best_scale
    codes += best_low
    loss = _squared(codes, table, weights)
    scale, minimum, _, usable = _lines(slope, average, spread, total, mean, scale_type)
    scale, minimum = _chosen(usable, scale, best_scale), _chosen(usable, minimum, best_low)
    better = _loss(table, weights, scale, minimum, bits) < loss
    best_scale, best_low = _chosen(better, scale, best_scale), _chosen(better, minimum, best_low)
    # Sums in float32 do not tell close grids apart for certain.
    kept = loss < _loss(table, weights, plain_scale, plain_low, bits)
    return _chosen(kept, best_scale, plain_scale), _chosen(kept, best_low, plain_low)


def _slopes(
    covariance: Floats, squares: Floats, scale_type: npt.DTypeLike
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Least squares through zero, of several grids at a time: scale, gain, and whether it can be used.

    What the error falls by follows from sums, so that no error has to be summed itself.
    """
    scale = _stored(covariance / np.maximum(squares, _SMALLEST), scale_type)
    gain = np.asarray(2 * scale * covariance - np.square(scale) * squares, np.float32)
    return scale, gain, (squares > 0) & (np.abs(scale) >= _SMALLEST)


def _lines(
    covariance: Floats,
    middle: Floats,
    squares: Floats,
    total: Floats,
    mean: Floats,
    scale_type: npt.DTypeLike,
) -> tuple[Floats, Floats, Floats, npt.NDArray[np.bool_]]:
    """Least squares with a minimum: ``_slopes`` of numbers and codes from which their means are taken."""
    least = np.float32(1e-6) * total
    scale = _stored(covariance / np.maximum(squares, least), scale_type)
    minimum = _stored(mean - scale * middle, scale_type)
    # Of what is stored: rounding the slope and the minimum costs what it moves them.
    moved = scale * middle
    moved += minimum - mean
    gain = 2 * scale * covariance - np.square(scale) * squares - total * np.square(moved)
    return scale, minimum, gain, (squares > least) & (np.abs(scale) >= _SMALLEST) & np.isfinite(minimum)


def half_quadratic(
    table: Floats, *, bits: int, minimums: bool, scale_type: npt.DTypeLike, steps: int = 20
) -> tuple[Floats, npt.NDArray[Any]]:
    """Zero points that make the error sparse instead of small: HQQ.

    The solver of Badri and Shaji, 2023 (https://mobiusml.github.io/hqq_blog): the l_p norm of the error,
    p = 0.7, is split from the rounding by a variable of its own, and both are solved in turn. Where the
    operator wants whole zero points, the scale is fitted by least squares after the zero point is rounded.

    Args:
        table: (block size, n).
        bits: Of a code.
        minimums: Whether to give float minimums in place of zero points.
        scale_type: What scales are stored as.
        steps: Of the solver.
    """
    low, high = table.min(0), table.max(0)
    if not minimums:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    levels = np.float32((1 << bits) - 1)
    scale = _usable(_stored(high / levels - low / levels, scale_type))
    zero = -low / scale
    beta, best, best_zero = np.float32(10), np.full(scale.shape, np.inf, np.float32), zero
    for _ in range(steps):
        codes = np.clip(np.rint(table / scale + zero), 0, levels)
        error = table - (codes - zero) * scale
        size = np.abs(error)
        loss = np.asarray(size.mean(0), np.float32)
        best_zero = _chosen(loss < best, zero, best_zero)
        best = np.minimum(loss, best)
        with np.errstate(divide="ignore"):
            shrunk = np.sign(error) * np.maximum(size - np.power(size, np.float32(-0.3)) / beta, 0)
        zero = np.asarray((codes - (table - shrunk) / scale).mean(0), np.float32)
        beta *= np.float32(1.01)
    if minimums:
        return scale, _stored(-best_zero * scale, scale_type)
    whole = np.clip(np.rint(best_zero), 0, levels).astype(np.uint8)
    codes = round_table(table, scale, whole, bits).astype(np.float32) - whole
    squares = _sums(codes * codes)
    fitted = _stored(_sums(codes * table) / np.maximum(squares, _SMALLEST), scale_type)
    return _chosen(np.abs(fitted) >= _SMALLEST, fitted, scale), whole


def _shifts(bits: int, steps: int, *, minimums: bool) -> list[float]:
    """By how many codes more than there are the grids cover the range: fewer ones mean coarser steps.

    Of normally distributed weights, of heavier tails and of those of language models, six of these and the
    step that follows lose less than nine from -1 to 1; grids of 2 bits have few codes to give away.
    """
    if bits == 2:
        first, last = (-0.75, 0.5) if minimums else (-0.5, 1.0)
    else:
        first, last = (-1.75, 0.5) if bits == 4 else (-2.25, 0.25)
    return [first + (last - first) * number / max(steps - 1, 1) for number in range(steps)]


def _grid(
    low: Floats, high: Floats, bits: int, symmetric: bool, scale_type: npt.DTypeLike, *, shift: float = 0.0
) -> tuple[Floats, Codes]:
    """Scale and zero point as if there were ``shift`` more codes than there are to cover the range."""
    levels = (1 << bits) - 1
    if symmetric:
        # The side with one code more takes the larger magnitude, hence the sign of the scale.
        exact = _chosen(-low >= high, -low, -high) / np.float32((1 << (bits - 1)) + shift)
    else:
        # Not of the difference, which may overflow.
        exact = high / np.float32(levels + shift) - low / np.float32(levels + shift)
    scale = _usable(_stored(exact, scale_type))
    if symmetric:
        return scale, np.full(scale.shape, 1 << (bits - 1), np.uint8)
    zero: Codes = np.clip(np.rint(-low / scale), 0, levels).astype(np.uint8)
    return scale, zero


def _weights(table: Floats, counts: Floats | None) -> Floats:
    """What an error counts: see ``quantize_blocks``."""
    weights = np.abs(table, out=scratch("weights", table.shape))
    squares = np.multiply(table, table, out=scratch("product", table.shape))
    weights += np.sqrt(_sums(squares) / np.float32(len(table)))
    if counts is not None:
        weights *= counts
    return weights


def _loss(table: Floats, weights: Floats, scale: Floats, zero: npt.NDArray[Any], bits: int) -> Floats:
    difference = _nearest(table, scale, zero, bits)
    if zero.dtype == np.float32:
        difference *= scale
        difference += zero
    else:
        difference -= zero.astype(np.float32)
        difference *= scale
    return _squared(difference, table, weights)


def _squared(found: Floats, table: Floats, weights: Floats) -> Floats:
    """The error of each column; what was found makes room for it."""
    found -= table
    found *= found
    return _dots(found, weights)


def _best(
    gain: Floats, usable: npt.NDArray[np.bool_], found: Sequence[Floats], otherwise: Sequence[Floats]
) -> list[Floats]:
    """Of each column the numbers of the grid, a row, that gains most; without one, what there was."""
    best, most = list(otherwise), np.full(gain.shape[1:], -np.inf, np.float32)
    for number, gained in enumerate(gain):
        better = (gained > most) & usable[number]
        best = [_chosen(better, rows[number], old) for rows, old in zip(found, best, strict=True)]
        most = _chosen(better, gained, most)
    return best


def _dots(left: Floats, right: Floats, out: Floats | None = None) -> Floats:
    """Products of two tables summed over each column: added up as they are made, without a table of them."""
    return np.asarray(np.einsum("ij,ij->j", left, right, out=out), np.float32)


def _sums(table: Floats) -> Floats:
    """Of each column."""
    return np.asarray(np.add.reduce(table, axis=0), np.float32)


def _stored(array: npt.NDArray[Any], scale_type: npt.DTypeLike) -> Floats:
    """Numbers as they are after they were stored.

    numpy rounds to float16 one number at a time. Here it is done in float32: beside one and a half times
    2 ** 13 of its own power of two, or of the smallest normal one, a number keeps float16's bits.
    """
    if np.dtype(scale_type) != np.float16:
        return np.asarray(array.astype(scale_type), np.float32)
    beside = array.view(np.int32) & np.int32(0x7F800000)
    np.maximum(beside, np.int32(113 << 23), out=beside)
    beside += np.int32((13 << 23) | (1 << 22))
    rounded = np.add(array, beside.view(np.float32))
    rounded -= beside.view(np.float32)
    beyond = np.abs(rounded) > _LARGEST_HALF
    if beyond.any():
        rounded[beyond] = np.copysign(np.float32(np.inf), rounded[beyond])
    return np.asarray(rounded, np.float32)


def _usable(scale: Floats) -> Floats:
    """Below the normal numbers the reciprocal overflows; such weights are all alike to any purpose.

    What stands in its place is the least that float16 can say, and not 1: with float minimums the product of
    the codes is taken back by that of the minimum, and what rounding activations costs the first stays.
    """
    return _chosen(np.abs(scale) < _SMALLEST, np.full_like(scale, _LEAST_HALF), scale)


def _chosen(mask: npt.NDArray[np.bool_], yes: npt.NDArray[Any], no: npt.NDArray[Any]) -> Floats:
    """``np.where`` of float32 by bits, which is ten times as fast where the mask is not the same for long."""
    bits = yes.view(np.int32) ^ no.view(np.int32)
    bits &= -mask.astype(np.int32)
    bits ^= no.view(np.int32)
    return bits.view(np.float32)
