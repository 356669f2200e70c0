"""Rounding that knows what a weight is multiplied with: GPTQ, and the moments that it needs.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) rounds a weight column by column and moves what
each rounding lost into the columns that follow, so that the *output* changes least. All that it needs of the
data is the second moment of the activations, one K x K matrix for each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.array_threads import in_threads
from onnxsmith.graph_passes.blocks import QuantizedBlocks, block_grid, pack_codes, packed_blocks
from onnxsmith.graph_passes.context import Activations
from onnxsmith.graph_passes.weights import turned

__all__ = ["Factor", "gptq_blocks", "inverse_factor", "second_moments"]

Floats = npt.NDArray[np.float32]

# What the moments of the activations that are collected in one run over the data may take.
_LIMIT_BYTES = 1 << 29
_ROWS = 2048
_COLUMNS = 64
# Below this a triangle is inverted as it is.
_TRIANGLE = 64


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


@dataclasses.dataclass(frozen=True)
class Factor:
    """What GPTQ needs of moments.

    Attributes:
        order: (K,): columns, the most important first.
        upper: (K, K): U of the inverse of the damped moments in this order, inverse = U.T @ U.
        diagonal: (K,): of the moments.
    """

    order: npt.NDArray[np.intp]
    upper: Floats
    diagonal: Floats


def inverse_factor(moments: Floats, *, damping: float = 0.01) -> Factor:
    """Factors moments once for all the weights that an activation is multiplied with.

    ``H = R @ R.T`` with R upper is a Cholesky factor from the last column to the first, and U its inverse:
    a sixth of the arithmetic of inverting H and factoring that, and more exact.

    Args:
        moments: (K, K), of ``second_moments``.
        damping: Added to the diagonal, relative to its mean.
    """
    diagonal = np.diagonal(moments).astype(np.float64)
    order = np.argsort(-diagonal, kind="stable")
    back = order[::-1]
    matrix = moments[np.ix_(back, back)].astype(np.float64)
    mean = float(diagonal.mean()) or 1.0
    # A column that was never used may be anything.
    used = np.where(diagonal[back] == 0, mean, diagonal[back])
    upper = np.eye(len(matrix), dtype=np.float32)
    for factor in (damping, 10 * damping, 100 * damping):
        np.fill_diagonal(matrix, used + factor * mean)
        try:
            lower = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            continue
        upper = np.ascontiguousarray(_inverse_of_lower(lower)[::-1, ::-1], np.float32)
        break
    return Factor(order, upper, diagonal.astype(np.float32))


def _inverse_of_lower(lower: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of a lower triangle, by halves, so that nearly all of it is products of matrices."""
    size = len(lower)
    if size <= _TRIANGLE:
        return np.asarray(np.tril(np.linalg.inv(lower)))
    half = size // 2
    result = np.zeros_like(lower)
    first, last = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -last @ (lower[half:, :half] @ first)
    return result


def gptq_blocks(
    matrix: Floats,
    factor: Factor,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    minimums: bool,
    search_steps: int,
    scale_type: npt.DTypeLike,
    name: str = "the matrix",
) -> QuantizedBlocks:
    """Rounds a matrix (N, K), K a multiple of the block size, for activations with the given moments.

    Scales are found for all blocks first, so columns can be rounded in the order of their importance
    (the ``act_order`` with static groups of the authors' code) though the operator knows no reordering.

    Args:
        matrix: (N, K).
        factor: Of the moments.
        bits: Of a code.
        block_size: Weights to a scale.
        symmetric: Without zero points.
        minimums: With float minimums.
        search_steps: Grids tried for a block.
        scale_type: What scales are stored as.
        name: For messages.
    """
    rows, columns = matrix.shape
    blocks = columns // block_size
    scales, zeros = block_grid(
        matrix, bits=bits, block_size=block_size, symmetric=symmetric, minimums=minimums,
        search_steps=search_steps, scale_type=scale_type, importance=factor.diagonal, name=name,
    )  # fmt: skip
    order, upper = factor.order, factor.upper
    codes = np.empty((rows, columns), np.uint8)

    def work(begin: int) -> None:
        part = slice(begin, begin + _ROWS)
        codes[part] = _rounded(matrix[part], scales[part], zeros[part], order, upper, bits, block_size)

    for _ in in_threads(work, range(0, rows, _ROWS)):
        pass
    packed = pack_codes(codes.reshape(rows, blocks, block_size), bits)
    return packed_blocks(
        packed, scales, zeros, bits=bits, block_size=block_size, columns=columns, symmetric=symmetric
    )


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
    rest = np.ascontiguousarray(turned(matrix)[order])
    minimums = zeros.dtype == np.float32
    scales, zeros = turned(scales), turned(zeros).astype(np.float32)
    inverses = 1 / scales
    codes = np.empty((columns, len(matrix)), np.uint8)
    errors = np.empty((_COLUMNS, len(matrix)), np.float32)
    for begin in range(0, columns, _COLUMNS):
        end = min(begin + _COLUMNS, columns)
        for column in range(begin, end):
            weight, block, done = rest[column], order[column] // block_size, column - begin
            if done:
                # What the columns before in this part lost; that of earlier parts is in the weight already.
                weight = weight - upper[begin:column, column] @ errors[:done]
            scale, zero = scales[block], zeros[block]
            value = weight - zero if minimums else weight * inverses[block]
            if minimums:
                value *= inverses[block]
            np.rint(value, out=value)
            if not minimums:
                value += zero
            np.clip(value, 0, top, out=value)
            np.copyto(codes[order[column]], value, casting="unsafe")
            if minimums:
                value *= scale
                value += zero
            else:
                value -= zero
                value *= scale
            np.subtract(weight, value, out=errors[done])
            errors[done] *= 1 / upper[column, column]
        if end < columns:
            rest[end:] -= upper[begin:end, end:].T @ errors[: end - begin]
    return codes.T
