"""Rows of an embedding that the data never uses are left out, and a table says where each id's row is."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["compact_rows"]


def compact_rows(
    table: npt.NDArray[np.generic], used: Iterable[int]
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int32]] | None:
    """The rows that stay, and the row of each id.

    An id whose row went gets the mean of all that went, which is the last row.

    Args:
        table: (ids, width).
        used: Ids whose rows stay; a negative one counts from the end, as in ONNX's Gather.

    Returns:
        Rows and row of each id; None where at most one row could go.
    """
    kept = np.zeros(len(table), bool)
    kept[[number for number in used if -len(table) <= number < len(table)]] = True
    if kept.sum() >= len(table) - 1:
        return None
    mean = table[~kept].astype(np.float64).mean(0, keepdims=True).astype(table.dtype)
    places = np.where(kept, np.cumsum(kept) - 1, kept.sum()).astype(np.int32)
    return np.concatenate([table[kept], mean]), places
