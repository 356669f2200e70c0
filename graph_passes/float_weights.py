"""Weights in float32, written in tiles for the kernels of this project: numbers are moved, not rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.block_nodes import BlockTarget, lazy
from onnxsmith.graph_passes.packed_weights import TiledWeight
from onnxsmith.graph_passes.weights import common_name, matrix_rows, rows_tensor
from onnxsmith.onnx_file import drop_pages
from onnxsmith.own_operators import FLOAT_BITS
from onnxsmith.packed_tiles import TILE_ROWS, tile_count, tile_floats

__all__ = ["FloatWeight"]


@dataclasses.dataclass(frozen=True)
class FloatWeight:
    """A matrix (N, K) in float32, of which nothing is read yet.

    Attributes:
        name: Of the initializer.
        rows: N.
        columns: K.
        parts: The tensors that hold it, rows after rows, and whether each lies as (N, K).
        identity: Equal for two that are one weight.
    """

    name: str
    rows: int
    columns: int
    parts: tuple[tuple[ir.TensorProtocol, bool], ...]
    identity: tuple[ir.Value | None, ...]

    @property
    def form(self) -> tuple[Any, ...]:
        """Equal for weights that can be put into one."""
        return self.columns, FLOAT_BITS

    @property
    def attributes(self) -> dict[str, int]:
        """Of a node that reads it."""
        return {"K": self.columns, "N": self.rows, "bits": FLOAT_BITS}

    def joined(self, parts: Sequence[FloatWeight]) -> FloatWeight:
        """One weight with the rows of several, in order; this is the first."""
        return FloatWeight(
            common_name([part.name for part in parts]),
            sum(part.rows for part in parts),
            self.columns,
            tuple(tensor for part in parts for tensor in part.parts),
            tuple(value for part in parts for value in part.identity),
        )

    def store(self, into: BlockTarget) -> TiledWeight:
        """Adds it to a graph in tiles, which are computed when they are written."""
        shape = (tile_count(self.rows), self.columns, TILE_ROWS)

        def tiles() -> npt.NDArray[np.float32]:
            return tile_floats(self._pieces(), self.rows, self.columns)

        return TiledWeight(lazy(into, f"{self.name}_tiles", ir.DataType.FLOAT, shape, tiles), None, None)

    def _pieces(self) -> Iterator[npt.NDArray[np.float32]]:
        for tensor, is_transposed in self.parts:
            yield matrix_rows(tensor, is_transposed)
            drop_pages(rows_tensor(tensor, is_transposed) or tensor)

    def __str__(self) -> str:
        return "float32"
