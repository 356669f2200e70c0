"""Weights in blocks as a graph holds them, read for the kernels of this project and written in tiles.

Nothing is rounded: codes are moved; scales and minimums keep their type where it is float16, and are float32
else. See ``onnxsmith.packed_tiles`` for the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.block_nodes import BlockTarget, lazy
from onnxsmith.graph_passes.block_products import Reading, deferred, is_computed_constant
from onnxsmith.graph_passes.blocks import unpack_codes
from onnxsmith.graph_passes.matching import axes_of, int_attribute
from onnxsmith.graph_passes.weights import common_name, constant_of
from onnxsmith.packed_tiles import TILE_ROWS, pack_tiles, tile_count, tile_values

__all__ = [
    "BLOCK_SIZES",
    "COLUMNS",
    "BlockWeight",
    "TiledWeight",
    "read_weight",
    "stored_codes",
]

BLOCK_SIZES = (16, 32, 64, 128, 256)
COLUMNS = 32
"""K is a multiple of it: activations are rounded in blocks of so many."""

_FLOAT, _HALF, _BYTES = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8
_Read = Callable[[Reading], npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """A number for each block, (N, blocks): how it is read, and the type that holds it exactly."""

    read: _Read
    kind: ir.DataType

    def widened(self, kind: ir.DataType) -> _Numbers:
        return dataclasses.replace(self, kind=kind)


@dataclasses.dataclass(frozen=True)
class BlockWeight:
    """A matrix (N, K) in blocks along K, of which nothing is read yet.

    Attributes:
        name: Of what holds the codes.
        rows: N.
        columns: K.
        bits: 4 or 8.
        block_size: Columns to a scale.
        codes: Reads them, (N, K * bits / 8), packed as MatMulNBits has them.
        scales: Of each block.
        offsets: Zero points where they are integers, minimums where they are floats, else None.
        identity: Equal for two that are one weight.
    """

    name: str
    rows: int
    columns: int
    bits: int
    block_size: int
    codes: _Read
    scales: _Numbers
    offsets: _Numbers | None
    identity: tuple[ir.Value | None, ...]

    @property
    def form(self) -> tuple[Any, ...]:
        """Equal for weights that can be put into one."""
        offsets = None if self.offsets is None else self.offsets.kind is _BYTES
        return self.columns, self.bits, self.block_size, offsets

    @property
    def attributes(self) -> dict[str, int]:
        """Of a node that reads it."""
        return {"K": self.columns, "N": self.rows, "bits": self.bits, "block_size": self.block_size}

    def joined(self, parts: Sequence[BlockWeight]) -> BlockWeight:
        """One weight with the rows of several of one form, in order; this is the first."""
        reads = [part.codes for part in parts]
        offsets = [part.offsets for part in parts if part.offsets is not None]
        return dataclasses.replace(
            self,
            name=common_name([part.name for part in parts]),
            rows=sum(part.rows for part in parts),
            codes=lambda reading: np.concatenate([read(reading) for read in reads]),
            scales=_joined([part.scales for part in parts]),
            offsets=_joined(offsets) if offsets else None,
            identity=tuple(value for part in parts for value in part.identity),
        )

    def store(self, into: BlockTarget) -> TiledWeight:
        """Adds it to a graph in tiles; they are computed when they are written, one after the other."""
        name, tiles, blocks = self.name, tile_count(self.rows), self.columns // self.block_size
        words = self.columns * self.bits // 32

        def codes() -> npt.NDArray[Any]:
            reading = Reading()
            packed = pack_tiles(self.codes(reading), self.bits)
            reading.drop_pages()
            return packed

        def numbers(suffix: str, of: _Numbers) -> ir.Value:
            def compute() -> npt.NDArray[Any]:
                reading = Reading()
                values = of.read(reading).reshape(self.rows, blocks).astype(of.kind.numpy())
                reading.drop_pages()
                return tile_values(values)

            return lazy(into, f"{name}_{suffix}", of.kind, (tiles, blocks, TILE_ROWS), compute)

        return TiledWeight(
            lazy(into, f"{name}_tiles", _BYTES, (tiles, words, 4 * TILE_ROWS), codes),
            numbers("tile_scales", self.scales),
            None if self.offsets is None else numbers("tile_offsets", self.offsets),
        )

    def __str__(self) -> str:
        kind = "symmetric" if self.offsets is None else "zero points" if self.form[3] else "minimums"
        return f"{self.bits} bits in blocks of {self.block_size}, {kind}"


@dataclasses.dataclass(frozen=True)
class TiledWeight:
    """The initializers of a weight in tiles.

    Attributes:
        codes: (N/16, K * bits / 32, 64); of floats, the weight itself, (N/16, K, 16).
        scales: (N/16, blocks, 16); None of floats.
        offsets: As scales, or None.
    """

    codes: ir.Value
    scales: ir.Value | None
    offsets: ir.Value | None


def _joined(parts: Sequence[_Numbers]) -> _Numbers:
    kinds = {part.kind for part in parts}
    reads = [part.read for part in parts]
    return _Numbers(
        lambda reading: np.concatenate([read(reading) for read in reads]),
        kinds.pop() if len(kinds) == 1 else _FLOAT,
    )


def stored_codes(value: ir.Value | None) -> ir.Value | None:
    """The initializer that holds codes, of which a value may be a Reshape."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    if value is None or not value.is_initializer() or constant_of(value) is None:
        return None
    return value


def read_weight(
    node: ir.Node,
    *,
    codes: ir.Value | None,
    scales: ir.Value | None,
    zeros: ir.Value | None,
    offsets: ir.Value | None,
    rows: int,
    columns: int,
) -> BlockWeight | str:
    """The weight of a node, or why the kernels cannot take it.

    Args:
        node: MatMulNBits or GatherBlockQuantized.
        codes: Its operands.
        scales: Likewise.
        zeros: Likewise, packed zero points, or None.
        offsets: What is added to each weight of a block beside the node, (N, blocks), or None.
        rows: N.
        columns: K.
    """
    bits, size = int_attribute(node, "bits", 4), int_attribute(node, "block_size")
    if bits not in (4, 8):
        return f"codes of {bits} bits; expected 4 or 8"
    if size not in BLOCK_SIZES:
        return f"blocks of {size}; expected one of {', '.join(map(str, BLOCK_SIZES))}"
    if columns % size or columns % COLUMNS:
        return f"rows of {columns}; expected a multiple of {max(size, COLUMNS)}"
    holder = stored_codes(codes)
    if holder is None or holder.dtype is not _BYTES:
        return "its codes are no initializer of bytes"
    if not is_computed_constant(scales) or scales is None:
        return "its scales are not constant"
    if scales.dtype is not _FLOAT:
        got = "not known" if scales.dtype is None else scales.dtype.name
        return f"the type of its scales is {got}; expected FLOAT"
    if zeros is not None and (zeros.dtype is not _BYTES or not is_computed_constant(zeros)):
        return "its zero points are not integers (repack_blocks, and then another rounding, makes them so)"
    blocks = columns // size
    width = columns * bits // 8
    read = deferred(holder)
    found: _Numbers | None = None
    if offsets is not None:
        if axes_of(offsets) != (rows, blocks):
            return "what is added to its blocks is of blocks of another size"
        minimums = _minimums(offsets, scales, zeros, bits)
        if isinstance(minimums, str):
            return minimums
        found = _stored(minimums)
    elif zeros is not None:
        packed = deferred(zeros)
        found = _Numbers(
            lambda reading: unpack_codes(packed(reading).reshape(rows, -1), bits)[:, :blocks], _BYTES
        )
    return BlockWeight(
        name=holder.name or "weight",
        rows=rows,
        columns=columns,
        bits=bits,
        block_size=size,
        codes=lambda reading: read(reading).reshape(rows, width),
        scales=_stored(scales),
        offsets=found,
        # With a minimum the zero point is of no account.
        identity=(holder, scales, None if offsets is not None else zeros, offsets),
    )


def _stored(value: ir.Value) -> _Numbers:
    """Numbers without the Cast that widens them."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        inner = node.inputs[0]
        if inner.dtype is _HALF and is_computed_constant(inner):
            return _Numbers(deferred(inner), _HALF)
    return _Numbers(deferred(value), _FLOAT)


def _minimums(offsets: ir.Value, scales: ir.Value, zeros: ir.Value | None, bits: int) -> ir.Value | str:
    """The minimums in ``minimum + scale * zero point``, which ``block_operators`` adds to a block.

    They are taken from there, because the sum is rounded.
    """
    add = offsets.producer()
    if add is None or add.op_type != "Add":
        return "what is added to its blocks is not known to be a minimum and a scale times a zero point"
    for minimums, other in (add.inputs, add.inputs[::-1]):
        multiply = other.producer() if other is not None else None
        if minimums is None or multiply is None or multiply.op_type != "Mul":
            continue
        factor = next((value for value in multiply.inputs if value is not scales), None)
        if scales in multiply.inputs and factor is not None and _is_zero_point(factor, zeros, bits):
            return minimums
    return "what is added to its blocks is not a minimum and its own scale times its own zero point"


def _is_zero_point(value: ir.Value, zeros: ir.Value | None, bits: int) -> bool:
    if zeros is None:
        tensor = constant_of(value)
        return tensor is not None and tensor.size == 1 and tensor.numpy().item() == 1 << (bits - 1)
    return _follows_from(value, zeros)


def _follows_from(value: ir.Value | None, origin: ir.Value) -> bool:
    if value is origin:
        return True
    node = value.producer() if value is not None else None
    return node is not None and any(_follows_from(one, origin) for one in node.inputs)
