"""Rounding that knows what a weight is multiplied with: GPTQ, and the moments that it needs.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) rounds a weight column by column and moves what
each rounding lost into the columns that follow, so that the *output* changes least. All that it needs of the
data is the second moment of the activations, one K x K matrix for each of them.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.blocks import QuantizedBlocks, block_grid, pack_codes, packed_blocks
from onnxsmith.graph_passes.context import Activations

__all__ = ["gptq_blocks", "second_moments"]

Floats = npt.NDArray[np.float32]

# What the moments of the activations that are collected in one run over the data may take.
_LIMIT_BYTES = 1 << 29
_ROWS = 1024
_COLUMNS = 64


def second_moments(
    model: ir.Model,
    widths: Mapping[str, int],
    activations: Activations,
    *,
    limit_bytes: int = _LIMIT_BYTES,
) -> Iterator[tuple[str, Floats]]:
    """Yields x.T @ x / rows of named activations, (K, K), in order.

    Of the data, one batch is held at a time; of the moments, as many as ``limit_bytes`` allows. The data is
    run again for each such group, up to the last activation of the group only.

    Args:
        model: The model that computes them.
        widths: Name to K.
        activations: Runs the model.
        limit_bytes: See above.
    """
    for names in _groups(widths, limit_bytes):
        sums = {name: np.zeros((widths[name], widths[name]), np.float32) for name in names}
        counts = dict.fromkeys(names, 0)
        for batch in activations(model, names):
            for name in names:
                x = np.asarray(batch[name], np.float32).reshape(-1, widths[name])
                sums[name] += x.T @ x
                counts[name] += len(x)
        for name in names:
            yield name, sums.pop(name) / np.float32(max(counts[name], 1))


def _groups(widths: Mapping[str, int], limit_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    used = 0
    for name, width in widths.items():
        size = 4 * width * width
        if group and used + size > limit_bytes:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def gptq_blocks(
    matrix: Floats,
    moments: Floats,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    minimums: bool,
    search_steps: int,
    scale_type: npt.DTypeLike,
    damping: float = 0.01,
    name: str = "the matrix",
) -> QuantizedBlocks:
    """Rounds a matrix (N, K), K a multiple of the block size, for activations with the given moments.

    Scales are found for all blocks first, so columns can be rounded in the order of their importance
    (the ``act_order`` with static groups of the authors' code) though the operator knows no reordering.

    Args:
        matrix: (N, K).
        moments: (K, K), of ``second_moments``.
        bits: Of a code.
        block_size: Weights to a scale.
        symmetric: Without zero points.
        minimums: With float minimums.
        search_steps: Grids tried for a block.
        scale_type: What scales are stored as.
        damping: Added to the diagonal, relative to its mean.
        name: For messages.
    """
    rows, columns = matrix.shape
    blocks = columns // block_size
    diagonal = np.diagonal(moments).astype(np.float64)
    scales, zeros = block_grid(
        matrix, bits=bits, block_size=block_size, symmetric=symmetric, minimums=minimums,
        search_steps=search_steps, scale_type=scale_type, importance=diagonal.astype(np.float32), name=name,
    )  # fmt: skip
    order = np.argsort(-diagonal, kind="stable")
    upper = _inverse_factor(moments, order, damping)
    codes = np.empty((rows, columns), np.uint8)

    def work(begin: int) -> None:
        part = slice(begin, begin + _ROWS)
        codes[part] = _rounded(matrix[part], scales[part], zeros[part], order, upper, bits, block_size)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(0, rows, _ROWS)):
            pass
    packed = pack_codes(codes.reshape(rows, blocks, block_size), bits)
    return packed_blocks(
        packed, scales, zeros, bits=bits, block_size=block_size, columns=columns, symmetric=symmetric
    )


def _inverse_factor(moments: Floats, order: npt.NDArray[np.intp], damping: float) -> Floats:
    """The upper factor U of the inverse of the damped moments, inverse = U.T @ U, in the given order."""
    matrix = moments[np.ix_(order, order)].astype(np.float64)
    diagonal = np.diagonal(matrix).copy()
    mean = float(diagonal.mean()) or 1.0
    # A column that was never used may be anything.
    np.fill_diagonal(matrix, np.where(diagonal == 0, mean, diagonal))
    for factor in (damping, 10 * damping, 100 * damping):
        damped = matrix + np.eye(len(matrix)) * (factor * mean)
        try:
            lower = np.linalg.cholesky(np.linalg.inv(damped))
        except np.linalg.LinAlgError:
            continue
        return np.ascontiguousarray(lower.T, np.float32)
    return np.eye(len(matrix), dtype=np.float32)


def _rounded(
    matrix: Floats,
    scales: Floats,
    zeros: npt.NDArray[Any],
    order: npt.NDArray[np.intp],
    upper: Floats,
    bits: int,
    block_size: int,
) -> npt.NDArray[np.uint8]:
    columns, top = matrix.shape[1], np.float32((1 << bits) - 1)
    # Columns as rows: what is worked on lies in one piece.
    rest = np.ascontiguousarray(matrix.T[order])
    scales, zeros = np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T)
    is_minimum = zeros.dtype == np.float32
    codes = np.empty((columns, len(matrix)), np.uint8)
    for begin in range(0, columns, _COLUMNS):
        end = min(begin + _COLUMNS, columns)
        errors = np.empty((end - begin, len(matrix)), np.float32)
        for column in range(begin, end):
            weight, block = rest[column], order[column] // block_size
            scale, zero = scales[block], zeros[block].astype(np.float32)
            if is_minimum:
                code = np.clip(np.rint((weight - zero) / scale), 0, top)
                value = code * scale + zero
            else:
                code = np.clip(np.rint(weight / scale) + zero, 0, top)
                value = (code - zero) * scale
            codes[order[column]] = code.astype(np.uint8)
            error = (weight - value) / upper[column, column]
            errors[column - begin] = error
            if column + 1 < end:
                rest[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        if end < columns:
            rest[end:] -= upper[begin:end, end:].T @ errors
    return codes.T
