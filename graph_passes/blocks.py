"""Matrices in blocks of 2, 4 or 8 bits, packed as MatMulNBits and GatherBlockQuantized read them.

The formats are those of the operators' definitions
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError

__all__ = [
    "QuantizedBlocks",
    "block_grid",
    "dequantize_blocks",
    "pack_codes",
    "packed_blocks",
    "quantize_blocks",
    "round_blocks",
    "unpack_codes",
]

# How much of a matrix one thread works on at a time, in elements: temporary arrays stay in the cache.
_CHUNK_ELEMENTS = 1 << 18
_SMALLEST_SCALE = np.finfo(np.float32).smallest_normal


@dataclasses.dataclass(frozen=True)
class QuantizedBlocks:
    """A matrix of shape (N, K) in blocks along K.

    Attributes:
        codes: uint8, (N, blocks, block_size * bits / 8); several codes to a byte, the first one low.
        scales: float32, (N, blocks).
        zero_points: uint8, (N, ceil(blocks * bits / 8)), packed as the codes are; None if symmetric, where
            the zero point is 2 ** (bits - 1), or where there are minimums.
        bits: 2, 4 or 8.
        block_size: Weights to a block.
        columns: K; the last block is filled up with zeros.
        minimums: float32, (N, blocks): what code 0 stands for, in place of a zero point.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    bits: int
    block_size: int
    columns: int
    minimums: npt.NDArray[np.float32] | None = None

    def rows(self, begin: int, end: int) -> QuantizedBlocks:
        """Some rows of it; nothing is copied."""
        zeros, low = self.zero_points, self.minimums
        return dataclasses.replace(
            self,
            codes=self.codes[begin:end],
            scales=self.scales[begin:end],
            zero_points=None if zeros is None else zeros[begin:end],
            minimums=None if low is None else low[begin:end],
        )


def quantize_blocks(
    matrix: npt.NDArray[np.float32],
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    minimums: bool = False,
    search_steps: int = 0,
    importance: npt.NDArray[np.float32] | None = None,
    scale_type: npt.DTypeLike = np.float32,
    name: str = "the matrix",
    method: str = "rtn",
) -> QuantizedBlocks:
    """Rounds a matrix to blocks of ``bits`` bits along its last axis.

    Round to nearest on the full range of a block, or, with ``search_steps``, on the best of several
    slightly wider and narrower grids. For each the scale is fitted to the rounded codes by least squares,
    and the one with the smallest squared error is taken, an element of magnitude ``|w|`` counting
    ``|w| + rms(w)``: a plain squared error would shrink the large weights of every block the same way,
    which adds up over a row where rounding cancels out. This is the search of llama.cpp's
    ``make_qkx2_quants``, with integer zero points.

    Args:
        matrix: (N, K), float32.
        bits: 2, 4 or 8.
        block_size: Weights to a block, a power of two from 16.
        symmetric: Whether the zero point is fixed to the middle of the codes.
        minimums: Whether a block has a float minimum in place of a zero point.
        search_steps: Grids tried besides the full range; 0 is plain round to nearest.
        importance: (K,): how much an error in a column counts besides, such as the mean square of what the
            column is multiplied with.
        scale_type: What scales will be stored as, float32 or float16: codes are chosen for the rounded scale.
        name: The tensor's name, for messages.
        method: ``rtn``, or ``hqq`` for zero points from half-quadratic splitting.

    Raises:
        BadInputError: A weight is NaN or infinite.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    scales, zeros = block_grid(
        matrix, bits=bits, block_size=block_size, symmetric=symmetric, minimums=minimums,
        search_steps=search_steps, importance=importance, scale_type=scale_type, name=name, method=method,
    )  # fmt: skip
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)

    def work(part: slice, values: npt.NDArray[np.float32]) -> None:
        codes[part] = pack_codes(round_blocks(values, scales[part], zeros[part], bits), bits)

    _over_rows(matrix, block_size, work)
    return packed_blocks(
        codes, scales, zeros, bits=bits, block_size=block_size, columns=columns, symmetric=symmetric
    )


def block_grid(
    matrix: npt.NDArray[np.float32],
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    minimums: bool,
    search_steps: int,
    importance: npt.NDArray[np.float32] | None = None,
    scale_type: npt.DTypeLike = np.float32,
    name: str = "the matrix",
    method: str = "rtn",
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Scales (N, blocks), and zero points or, in float32, minimums: see ``quantize_blocks``.

    Raises:
        BadInputError: A weight is NaN or infinite.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.float32 if minimums else np.uint8)
    counts = None
    if importance is not None:
        # Relative, and never zero: a column that the sample did not use is not worth nothing.
        counts = importance / max(float(importance.mean()), 1e-30) + np.float32(1e-2)
        counts = np.pad(counts, (0, blocks * block_size - columns))
        counts = counts.reshape(1, blocks, block_size).astype(np.float32)

    def work(part: slice, values: npt.NDArray[np.float32]) -> None:
        if method == "hqq":
            scale, zero = half_quadratic(values, bits, minimums, scale_type)
        else:
            search = fit_minimums if minimums else _search
            scale, zero = search(values, bits, symmetric, search_steps, scale_type, counts)
        if not np.isfinite(scale).all():
            _refuse(values, name)
        scales[part], zeros[part] = scale, zero

    _over_rows(matrix, block_size, work)
    return scales, zeros


def _over_rows(
    matrix: npt.NDArray[np.float32],
    block_size: int,
    work: Callable[[slice, npt.NDArray[np.float32]], None],
) -> None:
    """Calls ``work`` with some rows in blocks at a time, in threads."""
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    step = max(1, _CHUNK_ELEMENTS // max(1, blocks * block_size))
    padding = blocks * block_size - columns

    def one(begin: int) -> None:
        part = matrix[begin : begin + step]
        if padding:
            part = np.pad(part, ((0, 0), (0, padding)))
        # In each thread anew. Squares of huge weights may overflow: then the search keeps the full range.
        with np.errstate(over="ignore", invalid="ignore"):
            work(slice(begin, begin + step), part.reshape(-1, blocks, block_size))

    # numpy releases the interpreter lock in these loops, so threads are enough.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(one, range(0, rows, step)):
            pass


def packed_blocks(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[Any],
    *,
    bits: int,
    block_size: int,
    columns: int,
    symmetric: bool,
) -> QuantizedBlocks:
    """Blocks from packed codes and a zero point to each block: uint8, or float32 for a minimum."""
    minimums = zeros if zeros.dtype == np.float32 else None
    packed = None if symmetric or minimums is not None else pack_zero_points(zeros, bits)
    return QuantizedBlocks(codes, scales, packed, bits, block_size, columns, minimums)


def dequantize_blocks(blocks: QuantizedBlocks) -> npt.NDArray[np.float32]:
    """The matrix (N, K) that the operators compute with."""
    codes = unpack_codes(blocks.codes, blocks.bits).astype(np.float32)
    count = blocks.scales.shape[1]
    if blocks.minimums is not None:
        values: npt.NDArray[np.float32] = codes * blocks.scales[..., None] + blocks.minimums[..., None]
        return values.reshape(len(codes), -1)[:, : blocks.columns]
    if blocks.zero_points is None:
        zeros = np.full(blocks.scales.shape, 1 << (blocks.bits - 1), np.uint8)
    else:
        zeros = unpack_codes(blocks.zero_points[:, None], blocks.bits).reshape(len(codes), -1)[:, :count]
    values = (codes - zeros[..., None].astype(np.float32)) * blocks.scales[..., None]
    return values.reshape(len(codes), -1)[:, : blocks.columns]


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs the last axis, the first code lowest."""
    per_byte = 8 // bits
    packed: npt.NDArray[np.uint8] = codes[..., 0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << np.uint8(place * bits)
    return packed


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """What ``pack_codes`` packed."""
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for place in range(per_byte):
        codes[..., place::per_byte] = (packed >> np.uint8(place * bits)) & np.uint8((1 << bits) - 1)
    return codes


def _refuse(part: npt.NDArray[np.float32], name: str) -> NoReturn:
    bad = np.count_nonzero(~np.isfinite(part))
    raise BadInputError(
        f"weight {name!r}",
        got=f"{bad} of its first {part.size} values looked at are NaN or infinite",
        expected="finite weights",
        remedy="Repair the checkpoint, or keep this weight in float with skip_nodes",
    )


def _search(
    values: npt.NDArray[np.float32],
    bits: int,
    symmetric: bool,
    steps: int,
    scale_type: npt.DTypeLike,
    counts: npt.NDArray[np.float32] | None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    best_scale, best_zero = _grid(low, high, bits, symmetric, scale_type)
    if not steps:
        return best_scale, best_zero
    weights = _weights(values, counts)
    best_error = _error(values, weights, _centred(values, best_scale, best_zero, bits), best_scale)
    for shift in np.linspace(-1, 1, steps):
        scale, zero = _grid(low, high, bits, symmetric, scale_type, shift=float(shift))
        codes = _centred(values, scale, zero, bits)
        weighted = weights * codes
        squares = np.einsum("rbk,rbk->rb", weighted, codes)
        fitted = np.einsum("rbk,rbk->rb", weighted, values) / np.where(squares == 0, np.float32(1), squares)
        scale = np.where(squares == 0, scale, fitted).astype(scale_type).astype(np.float32)
        error = _error(values, weights, codes, scale)
        better = (error < best_error) & (np.abs(scale) >= _SMALLEST_SCALE)
        best_scale = np.where(better, scale, best_scale)
        best_zero = np.where(better, zero, best_zero)
        best_error = np.where(better, error, best_error)
    return best_scale, best_zero


def half_quadratic(
    values: npt.NDArray[np.float32],
    bits: int,
    minimums: bool,
    scale_type: npt.DTypeLike,
    *,
    steps: int = 20,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Zero points that make the error sparse instead of small: HQQ.

    The solver of Badri and Shaji, 2023 (https://mobiusml.github.io/hqq_blog): the l_p norm of the error,
    p = 0.7, is split from the rounding by a variable of its own, and both are solved in turn. Where the
    operator wants whole zero points, the scale is fitted by least squares after the zero point is rounded.
    """
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    if minimums:
        low, high = values.min(-1), values.max(-1)
    levels = np.float32((1 << bits) - 1)
    scale = (high / levels - low / levels).astype(scale_type).astype(np.float32)
    scale[np.abs(scale) < _SMALLEST_SCALE] = 1
    zero = -low / scale
    beta, best, best_zero = np.float32(10), np.full(scale.shape, np.inf, np.float32), zero
    for _ in range(steps):
        codes = np.clip(np.rint(values / scale[..., None] + zero[..., None]), 0, levels)
        error = values - (codes - zero[..., None]) * scale[..., None]
        size = np.abs(error)
        loss = size.mean(-1)
        best_zero = np.where(loss < best, zero, best_zero)
        best = np.minimum(loss, best)
        with np.errstate(divide="ignore"):
            shrunk = np.sign(error) * np.maximum(size - np.power(size, np.float32(-0.3)) / beta, 0)
        zero = (codes - (values - shrunk) / scale[..., None]).mean(-1)
        beta *= np.float32(1.01)
    if minimums:
        minimum: npt.NDArray[np.float32] = (-best_zero * scale).astype(scale_type).astype(np.float32)
        return scale, minimum
    whole = np.clip(np.rint(best_zero), 0, levels).astype(np.uint8)
    codes = _centred(values, scale, whole, bits)
    squares = np.einsum("rbk,rbk->rb", codes, codes)
    fitted = np.einsum("rbk,rbk->rb", codes, values) / np.where(squares == 0, np.float32(1), squares)
    fitted = fitted.astype(scale_type).astype(np.float32)
    return np.where(np.abs(fitted) >= _SMALLEST_SCALE, fitted, scale), whole


def _grid(
    low: npt.NDArray[np.float32],
    high: npt.NDArray[np.float32],
    bits: int,
    symmetric: bool,
    scale_type: npt.DTypeLike,
    *,
    shift: float = 0.0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Scale and zero point as if there were ``shift`` more codes than there are to cover the range."""
    levels = (1 << bits) - 1
    if symmetric:
        # The side with one code more takes the larger magnitude, hence the sign of the scale.
        exact = np.where(-low >= high, -low, -high) / np.float32((1 << (bits - 1)) + shift)
    else:
        # Not of the difference, which may overflow.
        exact = high / np.float32(levels + shift) - low / np.float32(levels + shift)
    scale: npt.NDArray[np.float32] = exact.astype(scale_type).astype(np.float32)
    # Below the normal numbers the reciprocal overflows; such weights are zeros to any purpose.
    scale[np.abs(scale) < _SMALLEST_SCALE] = 1
    if symmetric:
        return scale, np.full(scale.shape, 1 << (bits - 1), np.uint8)
    zero: npt.NDArray[np.uint8] = np.clip(np.rint(-low / scale), 0, levels).astype(np.uint8)
    return scale, zero


def _centred(
    values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], zero: npt.NDArray[np.uint8], bits: int
) -> npt.NDArray[np.float32]:
    """The codes minus the zero point: what the scale is multiplied with."""
    codes = round_blocks(values, scale, zero, bits).astype(np.float32)
    codes -= zero[..., None]
    return codes


def round_blocks(
    values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], zero: npt.NDArray[Any], bits: int
) -> npt.NDArray[np.uint8]:
    """The nearest codes, (rows, blocks, block), for scales and integer zero points or float minimums."""
    if zero.dtype == np.float32:
        codes = values - zero[..., None]
        codes *= (1 / scale)[..., None]
        np.rint(codes, out=codes)
    else:
        codes = values * (1 / scale)[..., None]
        np.rint(codes, out=codes)
        codes += zero[..., None]
    np.clip(codes, 0, (1 << bits) - 1, out=codes)
    result: npt.NDArray[np.uint8] = codes.astype(np.uint8)
    return result


def _weights(
    values: npt.NDArray[np.float32], counts: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """What an error counts: see ``quantize_blocks``."""
    weights = np.abs(values)
    mean_square = np.einsum("rbk,rbk->rb", values, values) / np.float32(values.shape[-1])
    weights += np.sqrt(mean_square)[..., None]
    if counts is not None:
        weights *= counts
    return weights


def fit_minimums(
    values: npt.NDArray[np.float32],
    bits: int,
    symmetric: bool,
    steps: int,
    scale_type: npt.DTypeLike,
    counts: npt.NDArray[np.float32] | None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scales and float minimums, fitted together by least squares to the codes of several grids."""
    del symmetric
    shape = values.shape[:2]
    # Blocks side by side: one number of each lies next to the other, so that loops are long.
    table = np.ascontiguousarray(values.reshape(-1, values.shape[-1]).T)
    low, high = table.min(0), table.max(0)
    levels = np.float32((1 << bits) - 1)

    def stored(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = array.astype(scale_type).astype(np.float32)
        return result

    def usable(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.where(np.abs(scale) < _SMALLEST_SCALE, np.float32(1), scale)

    plain_scale, plain_low = usable(stored(high / levels - low / levels)), stored(low)
    if not steps:
        return plain_scale.reshape(shape), plain_low.reshape(shape)
    weights = np.ascontiguousarray(_weights(values, counts).reshape(-1, values.shape[-1]).T)
    total = weights.sum(0)
    total = np.where(total == 0, np.float32(1), total)
    mean = np.einsum("kn,kn->n", weights, table) / total
    # Where a number lies between the lowest and the highest, 0 to 1.
    width = usable(high - low)
    place = (table - low) / width
    codes, product = np.empty_like(table), np.empty_like(table)
    weighted = weights * (table - mean)
    best_gain = np.full(low.shape, -np.inf, np.float32)
    best_scale, best_low = plain_scale, plain_low
    for shift in np.linspace(-1, 1, steps):
        np.multiply(place, levels + np.float32(shift), out=codes)
        np.rint(codes, out=codes)
        np.minimum(codes, levels, out=codes)
        np.multiply(weights, codes, out=product)
        middle = product.sum(0) / total
        # Least squares: what the error falls by follows from sums, so that no error has to be summed itself.
        covariance = np.einsum("kn,kn->n", weighted, codes)
        squares = np.einsum("kn,kn->n", product, codes) - total * np.square(middle)
        usual = squares > np.float32(1e-6) * total
        slope = covariance / np.where(usual, squares, np.float32(1))
        scale = stored(np.where(usual, slope, width / levels))
        minimum = stored(mean - scale * middle)
        # Of what is stored: rounding the slope and the minimum costs what it moves them.
        moved = scale * middle + minimum - mean
        gain = 2 * scale * covariance - np.square(scale) * squares - total * np.square(moved)
        better = (gain > best_gain) & usual & (np.abs(scale) >= _SMALLEST_SCALE) & np.isfinite(minimum)
        best_scale = np.where(better, scale, best_scale)
        best_low = np.where(better, minimum, best_low)
        best_gain = np.where(better, gain, best_gain)

    def loss(scale: npt.NDArray[np.float32], minimum: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        made = np.clip(np.rint((table - minimum) * (1 / scale)), 0, levels)
        made *= scale
        made += minimum - table
        made *= made
        return np.asarray(np.einsum("kn,kn->n", weights, made), np.float32)

    # Sums in float32 do not tell close grids apart for certain, and codes are those of the fitted grid.
    kept = loss(best_scale, best_low) < loss(plain_scale, plain_low)
    best_scale = np.where(kept, best_scale, plain_scale)
    return best_scale.reshape(shape), np.where(kept, best_low, plain_low).reshape(shape)


def _error(
    values: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32],
    codes: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    difference = codes * scale[..., None]
    difference -= values
    difference *= difference
    result: npt.NDArray[np.float32] = np.einsum("rbk,rbk->rb", weights, difference)
    return result


def pack_zero_points(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs a zero point to each block, (N, blocks), as the operators read them."""
    rest = -zeros.shape[1] % (8 // bits)
    return pack_codes(np.pad(zeros, ((0, 0), (0, rest))) if rest else zeros, bits)
