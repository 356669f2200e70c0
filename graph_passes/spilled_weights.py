"""Weights that were computed and not yet written wait on disk: a pass needs memory for one of them."""

from __future__ import annotations

import tempfile

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["spilled"]


def spilled(array: npt.NDArray[np.generic], dtype: ir.DataType, name: str | None) -> ir.TensorProtocol:
    """A tensor whose numbers are in a temporary file without a name, which goes when the tensor goes.

    Args:
        array: The numbers.
        dtype: Their type.
        name: Of the tensor.
    """
    contiguous = np.ascontiguousarray(array)
    if not contiguous.size:
        return ir.Tensor(contiguous, dtype=dtype, name=name)
    with tempfile.TemporaryFile() as file:
        file.write(contiguous.tobytes())
        file.flush()
        mapped = np.memmap(file, contiguous.dtype, "r", shape=contiguous.shape)
    return ir.Tensor(mapped, dtype=dtype, name=name)
