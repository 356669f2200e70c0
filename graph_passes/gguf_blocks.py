"""The blocks of a GGUF file as integers with scales, and which rows of a matrix they are.

Layouts are those of ggml's ``ggml-quants.c`` and of the ``gguf`` package's ``quants.py``. Nothing here
computes a weight: codes, scales and minimums are moved, so what comes out is what the file says. Where a
block type has scales of scales, their product is exact in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import ModelFileError, require
from onnxsmith.gguf_file import GgufFile, GgufTensor
from onnxsmith.stored_rows import StoredRows

__all__ = ["BLOCK_TYPES", "BlockType", "Codes", "GgufRows", "RowMatch"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Codes = tuple[Bytes, Floats, Floats | None]
"""Codes (blocks, block size), scales (blocks,), and minimums (blocks,) or None where the middle code is 0."""

_CHUNK_ELEMENTS = 1 << 20


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How a GGUF block type is written in an operator's terms.

    Attributes:
        bits: Of the operator.
        block_size: Weights to a scale.
        minimums: Whether a block has a minimum; else the middle code is zero.
        half_scales: Whether scales and minimums are exact in float16.
        decode: From bytes (ggml blocks, bytes) to codes in blocks of ``block_size``.
    """

    bits: int
    block_size: int
    minimums: bool
    half_scales: bool
    decode: Callable[[Bytes], Codes]


def _u8(array: npt.NDArray[Any]) -> Bytes:
    return array.astype(np.uint8, copy=False)


def _half(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Low halves, then high halves, as the 32 weight types have them."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _fifth_bits(data: Bytes) -> Bytes:
    return np.unpackbits(np.ascontiguousarray(data), axis=-1, bitorder="little")


def _q4_0(b: Bytes) -> Codes:
    return _nibbles(b[:, 2:]), _half(b[:, :2])[:, 0], None


def _q4_1(b: Bytes) -> Codes:
    return _nibbles(b[:, 4:]), _half(b[:, :2])[:, 0], _half(b[:, 2:4])[:, 0]


def _q5_0(b: Bytes) -> Codes:
    # 0 to 31 around 16, in the middle of 8 bits.
    codes = _nibbles(b[:, 6:]) | (_fifth_bits(b[:, 2:6]) << 4)
    return _u8(codes + 112), _half(b[:, :2])[:, 0], None


def _q5_1(b: Bytes) -> Codes:
    codes = _nibbles(b[:, 8:]) | (_fifth_bits(b[:, 4:8]) << 4)
    return _u8(codes), _half(b[:, :2])[:, 0], _half(b[:, 2:4])[:, 0]


def _q8_0(b: Bytes) -> Codes:
    return b[:, 2:] ^ np.uint8(128), _half(b[:, :2])[:, 0], None


def _two_bits(data: Bytes) -> Bytes:
    """Four codes to a byte in groups of 32 bytes, as the super-blocks have them."""
    parts = data.reshape(len(data), -1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return _u8(parts & 3).reshape(len(data), -1)


def _q2_k(b: Bytes) -> Codes:
    scales, quants, d, low = b[:, :16], b[:, 16:80], _half(b[:, 80:82]), _half(b[:, 82:84])
    scale, minimum = d * (scales & 15).astype(np.float32), low * (scales >> 4).astype(np.float32)
    return _two_bits(quants).reshape(-1, 16), scale.reshape(-1), -minimum.reshape(-1)


def _q3_k(b: Bytes) -> Codes:
    high, quants, packed, d = b[:, :32], b[:, 32:96], b[:, 96:108], _half(b[:, 108:110])
    low4 = packed[:, None, :8] >> np.array([0, 4], np.uint8).reshape(1, 2, 1)
    high2 = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    scales = (low4.reshape(-1, 16) & 15) | ((high2.reshape(-1, 16) & 3) << 4)
    scale = d * (scales.astype(np.float32) - 32)
    bits = (high[:, None, :] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)).reshape(len(b), -1) & 1
    # 0 to 7 around 4, in the middle of 4 bits.
    codes = _two_bits(quants) + (bits << 2) + 4
    return codes.reshape(-1, 16).astype(np.uint8), scale.reshape(-1), None


def _scales_and_minimums(packed: Bytes) -> tuple[Bytes, Bytes]:
    d, m, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([d & 63, (both & 15) | ((d >> 2) & 48)], axis=-1)
    return scales, np.concatenate([m & 63, (both >> 4) | ((m >> 2) & 48)], axis=-1)


def _four_bits(data: Bytes) -> Bytes:
    parts = data.reshape(len(data), -1, 1, 32) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    return _u8(parts & 15).reshape(len(data), -1, 32)


def _q4_k(b: Bytes) -> Codes:
    d, low = _half(b[:, :2]), _half(b[:, 2:4])
    scales, minimums = _scales_and_minimums(b[:, 4:16])
    scale, minimum = d * scales.astype(np.float32), low * minimums.astype(np.float32)
    return _four_bits(b[:, 16:]).reshape(-1, 32), scale.reshape(-1), -minimum.reshape(-1)


def _q5_k(b: Bytes) -> Codes:
    d, low = _half(b[:, :2]), _half(b[:, 2:4])
    scales, minimums = _scales_and_minimums(b[:, 4:16])
    scale, minimum = d * scales.astype(np.float32), low * minimums.astype(np.float32)
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    codes = _four_bits(b[:, 48:]) | (high << 4)
    return _u8(codes).reshape(-1, 32), scale.reshape(-1), -minimum.reshape(-1)


def _q6_k(b: Bytes) -> Codes:
    low = b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = (low & 15).reshape(-1, 8, 32) | ((high & 3).reshape(-1, 8, 32) << 4)
    scale = _half(b[:, 208:210]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    # 0 to 63 around 32, in the middle of 8 bits.
    return _u8(codes + 96).reshape(-1, 16), scale.reshape(-1), None


_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
# Twice the values of float4 e2m1.
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)


def _iq4_nl(b: Bytes) -> Codes:
    return (_IQ4_NL[_nibbles(b[:, 2:])] + 128).astype(np.uint8), _half(b[:, :2])[:, 0], None


def _mxfp4(b: Bytes) -> Codes:
    exponent = b[:, 0].astype(np.uint32)
    tiny = np.uint32(0x00200000) << np.minimum(exponent, 1)
    bits = np.where(exponent < 2, tiny, (np.maximum(exponent, 1) - 1) << np.uint32(23)).astype(np.uint32)
    return (_E2M1[_nibbles(b[:, 1:])] + 128).astype(np.uint8), bits.view(np.float32), None


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(4, 32, False, True, _q4_0),
    "Q4_1": BlockType(4, 32, True, True, _q4_1),
    "Q5_0": BlockType(8, 32, False, True, _q5_0),
    "Q5_1": BlockType(8, 32, True, True, _q5_1),
    "Q8_0": BlockType(8, 32, False, True, _q8_0),
    # MatMulNBits has no fast kernel for two bits in blocks of 16.
    "Q2_K": BlockType(4, 16, True, False, _q2_k),
    "Q3_K": BlockType(4, 16, False, False, _q3_k),
    "Q4_K": BlockType(4, 32, True, False, _q4_k),
    "Q5_K": BlockType(8, 32, True, False, _q5_k),
    "Q6_K": BlockType(8, 16, False, False, _q6_k),
    # Sixteen values that are whole numbers, though not in equal steps.
    "IQ4_NL": BlockType(8, 32, False, True, _iq4_nl),
    "MXFP4": BlockType(8, 32, False, False, _mxfp4),
}


@dataclasses.dataclass(frozen=True)
class RowMatch:
    """Which rows of which tensors a matrix is made of.

    Attributes:
        tensors: The tensors.
        tensor: (N,): for each row, a number in ``tensors``.
        row: (N,): and its row there.
    """

    tensors: tuple[GgufTensor, ...]
    tensor: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]


class GgufRows:
    """Finds rows of a GGUF file by what they hold, or where the exporter has noted them.

    Loaders reorder the rows of a file (llama's query and key weights for the rotary embedding) and passes
    put matrices together (packed queries, keys and values). Names would have to be followed through all of
    that, for each architecture. A row's content says by itself where it came from, and proves it: only what
    is equal to the last bit is found.
    """

    def __init__(self, file: GgufFile) -> None:
        """Reads nothing yet.

        Args:
            file: The header of the file.
        """
        self.file = file
        self._gguf: Any = require("gguf", purpose=f"reading {file.path.name}")
        self._data = np.memmap(file.path, np.uint8, mode="r")
        self._index: dict[tuple[int, str], tuple[Any, Any, Any, tuple[GgufTensor, ...]]] = {}

    def find(self, matrix: npt.NDArray[Any]) -> RowMatch | None:
        """Looks up every row of a matrix (N, K); None where a row is not in the file."""
        columns = matrix.shape[1]
        hashes, tensor, row, tensors = self._rows_of(columns, matrix.dtype)
        if not len(hashes):
            return None
        wanted = np.concatenate([_hash(part) for part in _chunks(matrix)])
        at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        if not np.array_equal(hashes[at], wanted):
            return None
        used, number = np.unique(tensor[at], return_inverse=True)
        return RowMatch(tuple(tensors[i] for i in used), number.reshape(-1), row[at])

    def place(self, parts: Sequence[StoredRows]) -> RowMatch | None:
        """The rows that are noted beside a matrix; None where they are not of this file."""
        here = {tensor.name: number for number, tensor in enumerate(self.file.tensors)}
        if not parts or any(part.file != self.file.path or part.tensor not in here for part in parts):
            return None
        used = sorted({here[part.tensor] for part in parts})
        tensors = tuple(self.file.tensors[number] for number in used)
        if len({tensor.shape[1:] for tensor in tensors}) > 1 or any(len(t.shape) != 2 for t in tensors):
            return None
        numbers = [np.full(len(part.order), used.index(here[part.tensor])) for part in parts]
        return RowMatch(tensors, np.concatenate(numbers), np.concatenate([part.order for part in parts]))

    def decode(self, tensor: GgufTensor, rows: npt.NDArray[np.int64]) -> Codes:
        """Codes (rows, K), scales (rows, blocks) and minimums of some rows of a tensor."""
        kind = BLOCK_TYPES[tensor.type]
        raw = self._raw(tensor)[rows]
        ggml_bytes = self._gguf.constants.GGML_QUANT_SIZES[self._type(tensor)][1]
        codes, scales, minimums = kind.decode(raw.reshape(-1, ggml_bytes))
        count, blocks = len(rows), tensor.shape[-1] // kind.block_size
        return (
            codes.reshape(count, -1),
            scales.reshape(count, blocks),
            None if minimums is None else minimums.reshape(count, blocks),
        )

    def _type(self, tensor: GgufTensor) -> Any:
        return self._gguf.GGMLQuantizationType[tensor.type]

    def _raw(self, tensor: GgufTensor) -> Bytes:
        return self._data[tensor.offset : tensor.offset + tensor.nbytes].reshape(tensor.shape[0], -1)

    def _rows_of(self, columns: int, dtype: np.dtype[Any]) -> tuple[Any, Any, Any, Sequence[GgufTensor]]:
        key = (columns, str(dtype))
        if key not in self._index:
            tensors = tuple(
                t for t in self.file.tensors if len(t.shape) == 2 and t.shape[1] == columns and t.shape[0]
            )
            hashes, numbers, rows = [], [], []
            for number, tensor in enumerate(tensors):
                for begin, values in self._dequantized(tensor):
                    hashes.append(_hash(values.astype(dtype, copy=False)))
                    numbers.append(np.full(len(values), number))
                    rows.append(np.arange(begin, begin + len(values)))
            empty = np.zeros(0, np.int64)
            joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
            order = np.argsort(joined, kind="stable")
            self._index[key] = (
                joined[order],
                np.concatenate([*numbers, empty])[order].astype(np.int64),
                np.concatenate([*rows, empty])[order].astype(np.int64),
                tensors,
            )
        return self._index[key]

    def _dequantized(self, tensor: GgufTensor) -> Iterator[tuple[int, Floats]]:
        """The weights as the ``gguf`` package computes them, some rows at a time."""
        raw = self._raw(tensor)
        step = max(1, _CHUNK_ELEMENTS // tensor.shape[1])
        for begin in range(0, len(raw), step):
            try:
                values = self._gguf.quants.dequantize(raw[begin : begin + step], self._type(tensor))
            except NotImplementedError:
                return
            except (ValueError, TypeError) as error:
                raise ModelFileError(
                    f"{self.file.path}: tensor {tensor.name!r}", got=f"cannot be decoded: {error}"
                ) from error
            yield begin, np.asarray(values).reshape(-1, tensor.shape[1])


def _chunks(matrix: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    for begin in range(0, len(matrix), step):
        yield matrix[begin : begin + step]


def _hash(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A number for the content of each row: a random linear combination modulo 2**64."""
    # -0.0 is 0.0 to every product.
    words = np.ascontiguousarray(rows + rows.dtype.type(0))
    kind = np.uint16 if words.dtype.itemsize == 2 else np.uint32
    random = np.random.default_rng(0x5EED)
    factors = random.integers(0, 1 << 63, rows.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    sums: npt.NDArray[np.uint64] = np.einsum("rk,k->r", words.view(kind).astype(np.uint64), factors)
    return sums
