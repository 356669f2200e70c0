"""Which weights of a matrix become zero, and how the others make up for it: magnitude, Wanda, SparseGPT.

W is a matrix (N, K) that computes ``x @ W.T``; H is ``x.T @ x``, (K, K).

- magnitude: the smallest ``|W_ij|`` of the whole matrix go (Han et al., 2015,
  https://arxiv.org/abs/1506.02626).
- Wanda: of each row, the smallest ``|W_ij| * ||x_j||_2`` go (Sun et al., 2023,
  https://arxiv.org/abs/2306.11695).
- SparseGPT: columns from left to right; of each block of columns the smallest
  ``W_ij**2 / U_jj**2`` go, with U the upper Cholesky factor of inv(H), and what a weight computed is moved
  into the columns that follow, ``W_i,j: -= W_ij / U_jj * U_j,j:`` (Frantar and Alistarh, 2023,
  https://arxiv.org/abs/2301.00774).

With N:M, at most N of each M weights that follow each other in a row stay (Mishra et al., 2021,
https://arxiv.org/abs/2104.08378).
"""

from __future__ import annotations

import concurrent.futures
import os
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError

__all__ = [
    "NOT_FASTER",
    "check_sparsity",
    "keep_largest",
    "keep_pattern",
    "magnitude_threshold",
    "output_error",
    "prune_magnitude",
    "prune_sparsegpt",
    "prune_wanda",
    "stored_mb",
]

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_COLUMNS = 128
_ROWS = 1024
# Of each matrix, to find a threshold for all of them.
_SAMPLE = 1 << 16
_PATTERN = re.compile(r"(\d+):(\d+)")
NOT_FASTER = (
    "not smaller and not faster: ONNX Runtime stores zeros and multiplies with them like with other numbers, "
    "on the CPU and on all other providers but TensorRT with 2:4 and trt_sparsity_enable. Remove heads, "
    "neurons or layers to save time."
)


def check_sparsity(
    where: str,
    *,
    method: str,
    ratio: float,
    pattern: str,
    scope: str,
    threshold: float | None,
    damping: float,
) -> tuple[int, int] | None:
    """Checks what is wanted to become zero.

    Args:
        where: For messages.
        method: magnitude, wanda or sparsegpt.
        ratio: The share of each matrix that goes.
        pattern: ``unstructured``, or N:M.
        scope: ``layer``, or ``global``: the weights of all matrices are ranked together.
        threshold: A magnitude, in place of the ratio.
        damping: Of sparsegpt.

    Returns:
        N and M; None of what is unstructured.

    Raises:
        BadInputError: A value that makes no sense, or values that do not go together.
    """
    if not 0 <= ratio < 1:
        raise BadInputError(f"{where}: ratio", got=f"{ratio:g}", expected="0 to below 1")
    match = _PATTERN.fullmatch(pattern)
    known = match is not None and 0 < int(match[1]) < int(match[2]) and _COLUMNS % int(match[2]) == 0
    if pattern != "unstructured" and not known:
        raise BadInputError(
            f"{where}: pattern", got=pattern,
            expected="unstructured, or N:M such as 2:4, with N below M and M a power of two up to 128",
        )  # fmt: skip
    if (scope == "global" or threshold is not None) and (method != "magnitude" or match is not None):
        raise BadInputError(
            where, got=f"scope global or a threshold with method {method} and pattern {pattern}",
            expected="method magnitude, unstructured",
        )  # fmt: skip
    if threshold is not None and not threshold >= 0:
        raise BadInputError(f"{where}: threshold", got=f"{threshold:g}", expected="0 or more")
    if not damping > 0:
        raise BadInputError(f"{where}: damping", got=f"{damping:g}", expected="a number above 0")
    return (int(match[1]), int(match[2])) if match is not None else None


def keep_largest(scores: Floats, ratio: float, *, by_row: bool) -> Mask:
    """What stays where the share ``ratio`` with the lowest scores goes.

    Args:
        scores: (N, K).
        ratio: 0 to below 1; rounded down to whole weights.
        by_row: Of each row, and not of the whole.
    """
    flat = scores if by_row else scores.reshape(1, -1)
    count = int(ratio * flat.shape[1])
    kept = np.ones(flat.shape, bool)
    if count:
        lowest = np.argpartition(flat, count - 1, axis=1)[:, :count]
        np.put_along_axis(kept, lowest, False, axis=1)
    return kept.reshape(scores.shape)


def keep_pattern(scores: Floats, keep: int, group: int) -> Mask:
    """What stays where ``keep`` of each ``group`` columns stay: those with the highest scores."""
    rows, columns = scores.shape
    parts = scores.reshape(rows, columns // group, group)
    lowest = np.argpartition(parts, group - keep - 1, axis=2)[..., : group - keep]
    kept = np.ones(parts.shape, bool)
    np.put_along_axis(kept, lowest, False, axis=2)
    return kept.reshape(rows, columns)


def magnitude_threshold(matrices: Iterable[Floats], ratio: float) -> float:
    """The magnitude below which the ratio of the weights of all matrices lies, from samples of large ones."""
    parts: list[Floats] = []
    sizes: list[int] = []
    for matrix in matrices:
        flat = np.abs(matrix.reshape(-1))
        parts.append(flat[:: max(1, len(flat) // _SAMPLE)])
        sizes.append(len(flat))
    values = np.concatenate(parts)
    shares = np.concatenate([np.full(len(p), s / len(p)) for p, s in zip(parts, sizes, strict=True)])
    order = np.argsort(values)
    reached = np.cumsum(shares[order])
    index = min(int(np.searchsorted(reached, ratio * sum(sizes))), len(values) - 1)
    return float(values[order][index])


def output_error(matrix: Floats, changed: Floats, moments: Floats) -> float:
    """The mean squared error of ``x @ w.T``, relative to its mean square; moments are those of x."""
    error = square = 0.0
    for begin in range(0, len(matrix), _ROWS):
        part = matrix[begin : begin + _ROWS]
        difference = changed[begin : begin + _ROWS] - part
        error += float(np.vdot(difference @ moments, difference))
        square += float(np.vdot(part @ moments, part))
    return error / square if square > 0 else 0.0


def stored_mb(weights: int, zeros: float, stored_bytes: int) -> dict[str, float]:
    """What matrices take as they are stored, and as a bit for each weight and the weights that stay.

    Args:
        weights: How many.
        zeros: The share that is zero.
        stored_bytes: What they take.
    """
    return {"mb": stored_bytes / 1e6, "mb_if_packed": (stored_bytes * (1 - zeros) + weights / 8) / 1e6}


def prune_magnitude(
    matrix: Floats, ratio: float, pattern: tuple[int, int] | None, *, threshold: float | None = None
) -> Floats:
    """The matrix without its smallest weights, or without those below a threshold."""
    size = np.abs(matrix)
    if threshold is not None:
        return np.where(size < threshold, np.float32(0), matrix)
    kept = keep_pattern(size, *pattern) if pattern else keep_largest(size, ratio, by_row=False)
    return np.where(kept, matrix, np.float32(0))


def prune_wanda(matrix: Floats, norms: Floats, ratio: float, pattern: tuple[int, int] | None) -> Floats:
    """The matrix without the weights that add least to a row's output.

    Args:
        matrix: (N, K).
        norms: (K,): ``||x_j||_2`` of each column's input, up to a common factor.
        ratio: Of each row.
        pattern: N of M that stay, in place of a ratio.
    """
    scores = np.abs(matrix) * norms
    kept = keep_pattern(scores, *pattern) if pattern else keep_largest(scores, ratio, by_row=True)
    return np.where(kept, matrix, np.float32(0))


def prune_sparsegpt(
    matrix: Floats,
    moments: Floats,
    ratio: float,
    pattern: tuple[int, int] | None,
    *,
    damping: float = 0.01,
) -> Floats:
    """The matrix without some weights, the others changed so that its output changes least.

    Args:
        matrix: (N, K).
        moments: (K, K), ``x.T @ x`` up to a factor.
        ratio: Of each block of 128 columns, as the authors do.
        pattern: N of M that stay, in place of a ratio.
        damping: Added to the diagonal, relative to its mean. What is fitted to few rows of data does not
            hold for others: with 2,048 rows and 1,536 columns of a language model the error on held-out
            rows was a quarter larger with 0.01 than with 0.1.
    """
    upper, dead = _inverse_factor(moments, damping)
    result = np.where(dead, np.float32(0), matrix)
    diagonal = np.diagonal(upper)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, result.shape[1], _COLUMNS):
            end = min(begin + _COLUMNS, result.shape[1])
            kept = np.ones((len(result), end - begin), bool)
            if pattern is None:
                scores: Floats = np.square(result[:, begin:end] / diagonal[begin:end])
                kept = keep_largest(scores, ratio, by_row=False)

            def work(first: int, begin: int = begin, end: int = end, kept: Mask = kept) -> None:
                rows = slice(first, first + _ROWS)
                _sweep(result[rows], kept[rows], upper, begin, end, pattern)

            for _ in pool.map(work, range(0, len(result), _ROWS)):
                pass
    return result


def _inverse_factor(moments: Floats, damping: float) -> tuple[Floats, Mask]:
    """The upper factor U of inv(H) = U.T @ U, and which columns never see anything but zero."""
    matrix = moments.astype(np.float64)
    diagonal = np.diagonal(matrix).copy()
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    np.fill_diagonal(matrix, np.where(dead, mean, diagonal))
    factor = damping
    while True:
        try:
            lower = np.linalg.cholesky(np.linalg.inv(matrix + np.eye(len(matrix)) * (factor * mean)))
        except np.linalg.LinAlgError:
            factor *= 10
            continue
        return np.ascontiguousarray(lower.T, np.float32), dead


def _sweep(
    rows: Floats, kept: Mask, upper: Floats, begin: int, end: int, pattern: tuple[int, int] | None
) -> None:
    """Takes the columns of a block one after the other, and moves what they did into those that follow."""
    block, factor = rows[:, begin:end].copy(), upper[begin:end, begin:end]
    errors = np.zeros_like(block)
    for column in range(end - begin):
        if pattern is not None and column % pattern[1] == 0:
            part = slice(column, column + pattern[1])
            kept[:, part] = keep_pattern((block[:, part] / np.diagonal(factor)[part]) ** 2, *pattern)
        stays = np.where(kept[:, column], block[:, column], np.float32(0))
        error = (block[:, column] - stays) / factor[column, column]
        block[:, column] = stays
        block[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
        errors[:, column] = error
    rows[:, begin:end] = block
    if end < rows.shape[1]:
        rows[:, end:] -= errors @ upper[begin:end, end:]
