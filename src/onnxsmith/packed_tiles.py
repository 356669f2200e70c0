"""Matrices in blocks as the kernels of this project read them: tiles of 16 rows, one byte after the other.

A matrix (N, K) of codes q of 4 or 8 bits has a scale for each ``block_size`` columns of a row, and nothing
else, a zero point (uint8) or a minimum (float) beside it. Rows are filled up with zeros to a multiple of 16:

- 8 bits: uint8 (N/16, K/4, 64), byte (t, g, 4 c + i) is q[16 t + c, 4 g + i];
- 4 bits: uint8 (N/16, K/8, 64), byte (t, g, 4 c + i) is q[16 t + c, 8 g + i] | q[16 t + c, 8 g + 4 + i] << 4;
- scales, zero points and minimums: (N/16, K/block_size, 16), element (t, j, c) is that of block j of row
  16 t + c.

A matrix of floats is float32 (N/16, K, 16), element (t, k, c) is that of row 16 t + c and column k.

See docs/kernels.md for the operators that compute with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "TILE_ROWS",
    "pack_tiles",
    "packed_rows",
    "tile_count",
    "tile_floats",
    "tile_values",
    "unpack_tiles",
    "untile_values",
]

TILE_ROWS = 16
# What is turned at a time stays in the processor's cache.
_CHUNK_BYTES = 1 << 19

Bytes = npt.NDArray[np.uint8]


def tile_count(rows: int) -> int:
    """Tiles of a matrix of so many rows."""
    return -(-rows // TILE_ROWS)


def pack_tiles(codes: Bytes, bits: int) -> Bytes:
    """Codes in tiles.

    Args:
        codes: (N, K * bits / 8): as MatMulNBits has them, of 4 bits two to a byte, the first one low. K is a
            multiple of 8.
        bits: 4 or 8.

    Returns:
        (ceil(N / 16), K * bits / 32, 64).
    """
    rows, width = codes.shape
    words, tiles = width // 4, tile_count(rows)
    packed = np.zeros((tiles, words, TILE_ROWS), np.uint32)
    step = max(1, _CHUNK_BYTES // (TILE_ROWS * width))
    for begin in range(0, tiles, step):
        part = np.ascontiguousarray(codes[begin * TILE_ROWS : (begin + step) * TILE_ROWS]).view("<u4")
        if bits == 4:
            part = _shuffled(part)
        whole = len(part) // TILE_ROWS
        into = packed[begin : begin + step]
        into[:whole] = part[: whole * TILE_ROWS].reshape(whole, TILE_ROWS, words).transpose(0, 2, 1)
        if whole < len(into):
            into[whole, :, : len(part) % TILE_ROWS] = part[whole * TILE_ROWS :].T
    return packed.astype("<u4", copy=False).view(np.uint8).reshape(tiles, words, 4 * TILE_ROWS)


def unpack_tiles(packed: Bytes, bits: int, rows: int) -> Bytes:
    """What ``pack_tiles`` packed, one code to a byte: (N, K)."""
    tiles, words = packed.shape[:2]
    parts = packed.reshape(tiles, words, TILE_ROWS, 4).transpose(0, 2, 1, 3)
    if bits == 8:
        return np.ascontiguousarray(parts).reshape(tiles * TILE_ROWS, words * 4)[:rows]
    codes = np.empty((tiles, TILE_ROWS, words, 2, 4), np.uint8)
    codes[..., 0, :], codes[..., 1, :] = parts & 15, parts >> 4
    return codes.reshape(tiles * TILE_ROWS, words * 8)[:rows]


def tile_values(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A number for each block, (N, blocks), in tiles: (ceil(N / 16), blocks, 16)."""
    rows, blocks = values.shape
    padded = np.zeros((tile_count(rows) * TILE_ROWS, blocks), values.dtype)
    padded[:rows] = values
    return np.ascontiguousarray(padded.reshape(-1, TILE_ROWS, blocks).transpose(0, 2, 1))


def untile_values(tiled: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """What ``tile_values`` put in tiles: (N, blocks)."""
    tiles, blocks, _ = tiled.shape
    return np.ascontiguousarray(tiled.transpose(0, 2, 1)).reshape(tiles * TILE_ROWS, blocks)[:rows]


def tile_floats(parts: Iterable[npt.NDArray[np.float32]], rows: int, columns: int) -> npt.NDArray[np.float32]:
    """A matrix in tiles: (ceil(N / 16), K, 16).

    Args:
        parts: Some rows each, (*, K), one after the other.
        rows: N.
        columns: K.
    """
    padded = np.zeros((tile_count(rows) * TILE_ROWS, columns), np.float32)
    begin = 0
    for part in parts:
        padded[begin : begin + len(part)] = part
        begin += len(part)
    return np.ascontiguousarray(padded.reshape(-1, TILE_ROWS, columns).transpose(0, 2, 1))


def packed_rows(
    packed: Bytes,
    scales: npt.NDArray[Any],
    offsets: npt.NDArray[Any] | None,
    *,
    bits: int,
    rows: int,
    tiles_at_once: int = 128,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """The weights themselves, some rows at a time: the number of the first row, and (rows, K) in float32.

    Args:
        packed: Codes in tiles.
        scales: In tiles, float16 or float32.
        offsets: In tiles: zero points where they are integers, minimums where they are floats; None where
            the middle code is zero.
        bits: 4 or 8.
        rows: N.
        tiles_at_once: How many tiles of rows.
    """
    blocks = scales.shape[1]
    for begin in range(0, len(packed), tiles_at_once):
        part = slice(begin, begin + tiles_at_once)
        count = min(rows - begin * TILE_ROWS, tiles_at_once * TILE_ROWS)
        codes = unpack_tiles(packed[part], bits, count).reshape(count, blocks, -1).astype(np.float32)
        scale = untile_values(scales[part], count).astype(np.float32)[..., None]
        if offsets is None:
            weights = (codes - np.float32(1 << (bits - 1))) * scale
        else:
            offset = untile_values(offsets[part], count).astype(np.float32)[..., None]
            weights = (codes - offset) * scale if offsets.dtype == np.uint8 else codes * scale + offset
        yield begin * TILE_ROWS, weights.reshape(count, -1)


def _shuffled(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Eight codes of 4 bits in a word, from 0 1 2 3 4 5 6 7 to 0 4 1 5 2 6 3 7, the lowest first.

    A perfect shuffle: bytes first, then halves of bytes (Warren, Hacker's Delight, section 7-2).
    """
    swapped = (words ^ (words >> np.uint32(8))) & np.uint32(0x0000FF00)
    words = words ^ swapped ^ (swapped << np.uint32(8))
    swapped = (words ^ (words >> np.uint32(4))) & np.uint32(0x00F000F0)
    shuffled: npt.NDArray[np.uint32] = words ^ swapped ^ (swapped << np.uint32(4))
    return shuffled
