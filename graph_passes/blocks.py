"""Matrices in blocks of 2, 4 or 8 bits, packed as MatMulNBits and GatherBlockQuantized read them.

The formats are those of the operators' definitions
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.array_threads import in_threads, thread_count
from onnxsmith.graph_passes.block_search import fit_grid, fit_minimums, half_quadratic, round_table, scratch

__all__ = [
    "BlocksOnce",
    "QuantizedBlocks",
    "block_grid",
    "dequantize_blocks",
    "pack_codes",
    "packed_blocks",
    "quantize_blocks",
    "unpack_codes",
]

# How much of a matrix one thread works on at a time, in elements: temporary arrays stay in the cache, and
# calls are long enough that threads seldom wait for each other between them.
_CHUNK_ELEMENTS = 1 << 18


@dataclasses.dataclass(frozen=True)
class QuantizedBlocks:
    """A matrix of shape (N, K) in blocks along K.

    Attributes:
        codes: uint8, (N, blocks, block_size * bits / 8); several codes to a byte, the first one low.
        scales: float32, (N, blocks).
        zero_points: uint8, (N, ceil(blocks * bits / 8)), packed as the codes are; None if symmetric, where
            the zero point is 2 ** (bits - 1), or where there are minimums.
        bits: 2, 4 or 8.
        block_size: Weights to a block.
        columns: K; the last block is filled up with zeros.
        minimums: float32, (N, blocks): what code 0 stands for, in place of a zero point.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    bits: int
    block_size: int
    columns: int
    minimums: npt.NDArray[np.float32] | None = None

    def rows(self, begin: int, end: int) -> QuantizedBlocks:
        """Some rows of it; nothing is copied."""
        zeros, low = self.zero_points, self.minimums
        return dataclasses.replace(
            self,
            codes=self.codes[begin:end],
            scales=self.scales[begin:end],
            zero_points=None if zeros is None else zeros[begin:end],
            minimums=None if low is None else low[begin:end],
        )


class BlocksOnce:
    """Makes the blocks of a weight once for all the tensors that hold them, then forgets them."""

    def __init__(self, compute: Callable[[], QuantizedBlocks], parts: int) -> None:
        """Makes nothing yet; ``compute`` does, and after ``parts`` calls of ``get`` it is forgotten."""
        self._compute = compute
        self._parts = parts
        self._left = parts
        self._result: QuantizedBlocks | None = None

    def get(self) -> QuantizedBlocks:
        """The blocks, made where they are not known."""
        result = self._result or self._compute()
        self._left -= 1
        if self._left:
            self._result = result
        else:
            self._result, self._left = None, self._parts
        return result


def quantize_blocks(
    matrix: npt.NDArray[np.float32],
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    minimums: bool = False,
    search_steps: int = 0,
    importance: npt.NDArray[np.float32] | None = None,
    scale_type: npt.DTypeLike = np.float32,
    name: str = "the matrix",
    method: str = "rtn",
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
        bits: 2, 4 or 8.
        block_size: Weights to a block, a power of two from 16.
        symmetric: Whether the zero point is fixed to the middle of the codes.
        minimums: Whether a block has a float minimum in place of a zero point.
        search_steps: Grids tried besides the full range; 0 is plain round to nearest.
        importance: (K,): how much an error in a column counts besides, such as the mean square of what the
            column is multiplied with.
        scale_type: What scales will be stored as, float32 or float16: codes are chosen for the rounded scale.
        name: The tensor's name, for messages.
        method: ``rtn``, or ``hqq`` for zero points from half-quadratic splitting.

    Raises:
        BadInputError: A weight is NaN or infinite.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales, zeros = block_grid(
        matrix, bits=bits, block_size=block_size, symmetric=symmetric, minimums=minimums,
        search_steps=search_steps, importance=importance, scale_type=scale_type, name=name, method=method,
        codes=codes,
    )  # fmt: skip
    return packed_blocks(
        codes, scales, zeros, bits=bits, block_size=block_size, columns=columns, symmetric=symmetric
    )


def block_grid(
    matrix: npt.NDArray[np.float32],
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    minimums: bool,
    search_steps: int,
    importance: npt.NDArray[np.float32] | None = None,
    scale_type: npt.DTypeLike = np.float32,
    name: str = "the matrix",
    method: str = "rtn",
    codes: npt.NDArray[np.uint8] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Scales (N, blocks), and zero points or, in float32, minimums: see ``quantize_blocks``.

    Packed codes are written to ``codes``, (N, blocks, block_size * bits / 8), where it is given.

    Raises:
        BadInputError: A weight is NaN or infinite.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.float32 if minimums else np.uint8)
    counts = _relative(importance, blocks, block_size)

    def work(part: slice, table: npt.NDArray[np.float32]) -> None:
        repeated = None if counts is None else np.tile(counts, table.shape[1] // blocks)
        if method == "hqq":
            scale, zero = half_quadratic(table, bits=bits, minimums=minimums, scale_type=scale_type)
        elif minimums:
            scale, zero = fit_minimums(
                table, bits=bits, steps=search_steps, scale_type=scale_type, counts=repeated
            )
        else:
            scale, zero = fit_grid(
                table, bits=bits, symmetric=symmetric, steps=search_steps, scale_type=scale_type,
                counts=repeated,
            )  # fmt: skip
        if not np.isfinite(scale).all():
            _refuse(table, name)
        scales[part], zeros[part] = scale.reshape(-1, blocks), zero.reshape(-1, blocks)
        if codes is not None:
            packed = _packed_table(round_table(table, scale, zero, bits), bits)
            codes[part].reshape(-1, packed.shape[0])[:] = packed.T

    _over_rows(matrix, block_size, work)
    return scales, zeros


def _relative(
    importance: npt.NDArray[np.float32] | None, blocks: int, block_size: int
) -> npt.NDArray[np.float32] | None:
    """How much a column counts, (block size, blocks): never zero, for what a sample did not use is in use."""
    if importance is None:
        return None
    counts = importance / max(float(importance.mean()), 1e-30) + np.float32(1e-2)
    counts = np.pad(counts, (0, blocks * block_size - len(counts)))
    return np.ascontiguousarray(counts.reshape(blocks, block_size).T, np.float32)


def _over_rows(
    matrix: npt.NDArray[np.float32],
    block_size: int,
    work: Callable[[slice, npt.NDArray[np.float32]], None],
) -> None:
    """Calls ``work`` with the blocks of some rows at a time as the columns of a table, in threads."""
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    threads = thread_count()
    # As many parts for each thread, so that none waits for another at the end of a small matrix.
    parts = threads * -(-rows * blocks * block_size // (threads * _CHUNK_ELEMENTS))
    step = max(1, -(-rows // max(parts, 1)))
    padding = blocks * block_size - columns

    def one(begin: int) -> None:
        part = matrix[begin : begin + step]
        if padding:
            part = np.pad(part, ((0, 0), (0, padding)))
        # In each thread anew. Squares of huge weights may overflow: then the search keeps the full range.
        with np.errstate(over="ignore", invalid="ignore"):
            blocked = part.reshape(-1, block_size).T
            table = scratch("table", blocked.shape)
            np.copyto(table, blocked)
            work(slice(begin, begin + step), table)

    for _ in in_threads(one, range(0, rows, step)):
        pass


def packed_blocks(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[Any],
    *,
    bits: int,
    block_size: int,
    columns: int,
    symmetric: bool,
) -> QuantizedBlocks:
    """Blocks from packed codes and a zero point to each block: uint8, or float32 for a minimum."""
    minimums = zeros if zeros.dtype == np.float32 else None
    packed = None if symmetric or minimums is not None else pack_zero_points(zeros, bits)
    return QuantizedBlocks(codes, scales, packed, bits, block_size, columns, minimums)


def dequantize_blocks(blocks: QuantizedBlocks) -> npt.NDArray[np.float32]:
    """The matrix (N, K) that the operators compute with."""
    codes = unpack_codes(blocks.codes, blocks.bits).astype(np.float32)
    count = blocks.scales.shape[1]
    if blocks.minimums is not None:
        values: npt.NDArray[np.float32] = codes * blocks.scales[..., None] + blocks.minimums[..., None]
        return values.reshape(len(codes), -1)[:, : blocks.columns]
    if blocks.zero_points is None:
        zeros = np.full(blocks.scales.shape, 1 << (blocks.bits - 1), np.uint8)
    else:
        zeros = unpack_codes(blocks.zero_points[:, None], blocks.bits).reshape(len(codes), -1)[:, :count]
    values = (codes - zeros[..., None].astype(np.float32)) * blocks.scales[..., None]
    return values.reshape(len(codes), -1)[:, : blocks.columns]


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs the last axis, the first code lowest."""
    per_byte = 8 // bits
    packed: npt.NDArray[np.uint8] = codes[..., 0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << np.uint8(place * bits)
    return packed


def _packed_table(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """``pack_codes`` along the first axis."""
    per_byte = 8 // bits
    packed: npt.NDArray[np.uint8] = codes[0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes[place::per_byte] << np.uint8(place * bits)
    return packed


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """What ``pack_codes`` packed."""
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for place in range(per_byte):
        codes[..., place::per_byte] = (packed >> np.uint8(place * bits)) & np.uint8((1 << bits) - 1)
    return codes


def _refuse(part: npt.NDArray[np.float32], name: str) -> NoReturn:
    bad = np.count_nonzero(~np.isfinite(part))
    raise BadInputError(
        f"weight {name!r}",
        got=f"{bad} of its first {part.size} values looked at are NaN or infinite",
        expected="finite weights",
        remedy="Repair the checkpoint, or keep this weight in float with skip_nodes",
    )


def pack_zero_points(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs a zero point to each block, (N, blocks), as the operators read them."""
    rest = -zeros.shape[1] % (8 // bits)
    return pack_codes(np.pad(zeros, ((0, 0), (0, rest))) if rest else zeros, bits)
