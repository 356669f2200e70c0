"""Tiles of packed weights: every code where the layout says, and back again."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from onnxsmith.graph_passes.blocks import pack_codes
from onnxsmith.packed_tiles import pack_tiles, packed_rows, tile_values, unpack_tiles, untile_values
from packed_matrices import Matrix, pack_blocks
from packed_matrices import pack_codes as tiled_codes


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 70),
    words=st.integers(1, 9),
    seed=st.integers(0, 1 << 16),
)
def test_round_trip(bits: int, rows: int, words: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, 8 * words)).astype(np.uint8)
    packed = pack_tiles(pack_codes(codes, bits), bits)
    assert packed.shape == (-(-rows // 16), 8 * words * bits // 32, 64)
    np.testing.assert_array_equal(unpack_tiles(packed, bits, rows), codes)
    np.testing.assert_array_equal(packed, tiled_codes(codes, bits))
    # Rows that fill a tile up are zeros.
    assert not unpack_tiles(packed, bits, 16 * len(packed))[rows:].any()
    values = random.standard_normal((rows, words)).astype(np.float16)
    tiled = tile_values(values)
    assert tiled.shape == (len(packed), words, 16)
    np.testing.assert_array_equal(untile_values(tiled, rows), values)
    np.testing.assert_array_equal(tiled, pack_blocks(values))
    assert tiled[(rows - 1) // 16, words - 1, (rows - 1) % 16] == values[rows - 1, words - 1]


def test_several_chunks() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (333, 4096)).astype(np.uint8)
    for bits in (4, 8):
        whole = pack_tiles(codes, bits)
        for tile in (0, 7, 20):
            part = pack_tiles(codes[16 * tile : 16 * tile + 16], bits)
            np.testing.assert_array_equal(whole[tile], part[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "zero points", "minimums", "half minimums"])
def test_weights(bits: int, kind: str) -> None:
    random = np.random.default_rng(1)
    rows, blocks, size = 37, 3, 32
    codes = random.integers(0, 1 << bits, (rows, blocks * size)).astype(np.uint8)
    half = kind == "half minimums"
    scales = random.standard_normal((rows, blocks)).astype(np.float16 if half else np.float32)
    offsets = {
        "symmetric": None,
        "zero points": random.integers(0, 1 << bits, (rows, blocks)).astype(np.uint8),
    }.get(kind, random.standard_normal((rows, blocks)).astype(scales.dtype))
    packed = pack_tiles(pack_codes(codes, bits), bits)
    tiled = tile_values(scales), None if offsets is None else tile_values(offsets)
    parts = list(packed_rows(packed, *tiled, bits=bits, rows=rows, tiles_at_once=2))
    assert [begin for begin, _ in parts] == [0, 32]
    got = np.concatenate([part for _, part in parts])
    assert got.shape == (rows, blocks * size)
    wanted = Matrix(codes, scales, offsets, bits, size).weight()
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
