"""Matrices in blocks of 4 or 8 bits, packed as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

The formats are those of the operators' definitions
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError

__all__ = ["QuantizedBlocks", "dequantize_blocks", "quantize_blocks"]

# How much of a matrix one thread works on at a time, in elements: temporary arrays stay in the cache.
_CHUNK_ELEMENTS = 1 << 18
_SMALLEST_SCALE = np.finfo(np.float32).smallest_normal


@dataclasses.dataclass(frozen=True)
class QuantizedBlocks:
    """A matrix of shape (N, K) in blocks along K.

    Attributes:
        codes: uint8, (N, blocks, block_size * bits / 8); two 4 bit codes to a byte, the first one low.
        scales: float32, (N, blocks).
        zero_points: uint8, (N, ceil(blocks * bits / 8)), packed as the codes are; None if symmetric, where
            the zero point is 2 ** (bits - 1).
        bits: 4 or 8.
        block_size: Weights to a block.
        columns: K; the last block is filled up with zeros.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    bits: int
    block_size: int
    columns: int


def quantize_blocks(
    matrix: npt.NDArray[np.float32],
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    search_steps: int = 0,
    scale_type: npt.DTypeLike = np.float32,
    name: str = "the matrix",
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
        bits: 4 or 8.
        block_size: Weights to a block, a power of two from 16.
        symmetric: Whether the zero point is fixed to the middle of the codes.
        search_steps: Grids tried besides the full range; 0 is plain round to nearest.
        scale_type: What scales will be stored as, float32 or float16: codes are chosen for the rounded scale.
        name: The tensor's name, for messages.

    Raises:
        BadInputError: A weight is NaN or infinite.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8)
    step = max(1, _CHUNK_ELEMENTS // max(1, blocks * block_size))

    def work(begin: int) -> None:
        part = matrix[begin : begin + step]
        if blocks * block_size != columns:
            part = np.pad(part, ((0, 0), (0, blocks * block_size - columns)))
        values = part.reshape(-1, blocks, block_size)
        # In each thread anew. Squares of huge weights may overflow: then the search keeps the full range.
        with np.errstate(over="ignore", invalid="ignore"):
            scale, zero = _search(values, bits, symmetric, search_steps, scale_type)
            if not np.isfinite(scale).all():
                _refuse(part, name)
            code = _round(values, scale, zero, bits)
        codes[begin : begin + step] = code if bits == 8 else code[..., 0::2] | (code[..., 1::2] << 4)
        scales[begin : begin + step] = scale
        zeros[begin : begin + step] = zero

    # numpy releases the interpreter lock in these loops, so threads are enough.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(0, rows, step)):
            pass
    return QuantizedBlocks(
        codes, scales, None if symmetric else _pack_zero_points(zeros, bits), bits, block_size, columns
    )


def dequantize_blocks(blocks: QuantizedBlocks) -> npt.NDArray[np.float32]:
    """The matrix (N, K) that the operators compute with."""
    codes = blocks.codes
    if blocks.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    count = blocks.scales.shape[1]
    if blocks.zero_points is None:
        zeros = np.full(blocks.scales.shape, 1 << (blocks.bits - 1), np.uint8)
    elif blocks.bits == 8:
        zeros = blocks.zero_points
    else:
        packed = blocks.zero_points
        zeros = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :count]
    values = (codes.astype(np.float32) - zeros[..., None].astype(np.float32)) * blocks.scales[..., None]
    return values.reshape(len(codes), -1)[:, : blocks.columns]


def _refuse(part: npt.NDArray[np.float32], name: str) -> NoReturn:
    bad = np.count_nonzero(~np.isfinite(part))
    raise BadInputError(
        f"weight {name!r}",
        got=f"{bad} of its first {part.size} values looked at are NaN or infinite",
        expected="finite weights",
        remedy="Repair the checkpoint, or keep this weight in float with skip_nodes",
    )


def _search(
    values: npt.NDArray[np.float32], bits: int, symmetric: bool, steps: int, scale_type: npt.DTypeLike
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    best_scale, best_zero = _grid(low, high, bits, symmetric, scale_type)
    if not steps:
        return best_scale, best_zero
    weights = np.abs(values)
    mean_square = np.einsum("rbk,rbk->rb", values, values) / np.float32(values.shape[-1])
    weights += np.sqrt(mean_square)[..., None]
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
    codes = _round(values, scale, zero, bits).astype(np.float32)
    codes -= zero[..., None]
    return codes


def _round(
    values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], zero: npt.NDArray[np.uint8], bits: int
) -> npt.NDArray[np.uint8]:
    codes = values * (1 / scale)[..., None]
    np.rint(codes, out=codes)
    codes += zero[..., None]
    np.clip(codes, 0, (1 << bits) - 1, out=codes)
    return codes.astype(np.uint8)


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


def _pack_zero_points(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return zeros
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return np.asarray(zeros[:, 0::2] | (zeros[:, 1::2] << 4), np.uint8)
