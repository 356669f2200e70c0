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

import numpy as np
import numpy.typing as npt

__all__ = ["keep_largest", "keep_pattern", "prune_magnitude", "prune_sparsegpt", "prune_wanda"]

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_COLUMNS = 128
_ROWS = 1024


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


def prune_magnitude(matrix: Floats, ratio: float, pattern: tuple[int, int] | None) -> Floats:
    """The matrix without its smallest weights."""
    size = np.abs(matrix)
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
        damping: Added to the diagonal, relative to its mean.
    """
    upper, dead = _inverse_factor(moments, damping)
    result = np.where(dead, np.float32(0), matrix)

    def work(begin: int) -> None:
        _sweep(result[begin : begin + _ROWS], upper, ratio, pattern)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
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


def _sweep(rows: Floats, upper: Floats, ratio: float, pattern: tuple[int, int] | None) -> None:
    columns = rows.shape[1]
    diagonal = np.diagonal(upper)
    for begin in range(0, columns, _COLUMNS):
        end = min(begin + _COLUMNS, columns)
        block, factor = rows[:, begin:end].copy(), upper[begin:end, begin:end]
        errors = np.zeros_like(block)
        kept = np.ones(block.shape, bool)
        if pattern is None:
            kept = keep_largest((block / diagonal[begin:end]) ** 2, ratio, by_row=False)
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
        if end < columns:
            rows[:, end:] -= errors @ upper[begin:end, end:]
