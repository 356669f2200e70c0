"""Which rows of which file a matrix is made of, noted beside a tensor that is read when it is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["StoredMatrix", "StoredRows", "known_rows", "note_rows"]

_KEY = "onnxsmith.stored_rows"


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Rows of one tensor of a file, with nothing changed in them but the element type.

    Attributes:
        file: The file.
        tensor: The tensor's name there.
        order: (N,): for each row of the matrix, which row of the tensor it is.
    """

    file: Path
    tensor: str
    order: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """A matrix of floating-point numbers that lies in a file as it is.

    Attributes:
        file: The file.
        name: Its name there.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        shape: (N, K).
        offset: Where its first byte is.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, int]
    offset: int


def note_rows(tensor: ir.TensorProtocol, parts: Sequence[StoredRows]) -> None:
    """Says that a matrix (N, K) has these rows, one part below the other."""
    tensor.meta[_KEY] = tuple(parts)


def known_rows(tensor: ir.TensorProtocol) -> tuple[StoredRows, ...]:
    """What ``note_rows`` said of a tensor; nothing where nobody has said anything."""
    found: tuple[StoredRows, ...] = tensor.meta.get(_KEY, ())
    return found
