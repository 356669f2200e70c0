"""Tensors are compared in pieces: the result is that of the whole, in little memory."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsmith import comparison
from onnxsmith.comparison import TOLERANCES, compare_tensors, kl_divergence

FLOAT32 = TOLERANCES["float32"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    dtype=st.sampled_from([np.float32, np.float16, np.int64]),
    name=st.sampled_from(["logits", "y"]),
    piece=st.integers(1, 20),
    masked=st.booleans(),
    spoiled=st.sampled_from([None, np.nan, -np.inf]),
)
def test_pieces_find_what_the_whole_shows(
    seed: int, shape: list[int], dtype: Any, name: str, piece: int, masked: bool, spoiled: float | None
) -> None:
    random = np.random.default_rng(seed)
    ours = (random.normal(size=shape) * 5).astype(dtype)
    theirs = (ours + random.normal(size=shape)).astype(dtype)
    if spoiled is not None and dtype is not np.int64:
        place = random.integers(ours.size)
        ours.flat[place] = spoiled
        if random.random() < 0.7:
            theirs.flat[place] = spoiled
    mask = random.random(shape[:-1]) < 0.6 if masked else None

    def compared(elements: int) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comparison, "_PIECE_ELEMENTS", elements)
            return dataclasses.asdict(
                compare_tensors(ours, theirs, name=name, case="c", tolerance=FLOAT32, mask=mask)
            )

    whole, pieces = compared(10**9), compared(piece)
    for key, value in whole.items():
        if isinstance(value, float):
            assert pieces[key] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), key
        else:
            assert pieces[key] == value, key


def test_what_is_found_is_what_numpy_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_PIECE_ELEMENTS", 8)
    random = np.random.default_rng(0)
    ours = random.normal(size=(3, 7, 5)).astype(np.float32)
    theirs = ours + random.normal(size=ours.shape).astype(np.float32)
    mask = random.random((3, 7)) < 0.5
    found = compare_tensors(ours, theirs, name="logits", case="c", tolerance=FLOAT32, mask=mask)
    left, right = ours[mask].astype(float), theirs[mask].astype(float)
    apart = np.where(mask[..., None], np.abs(ours.astype(float) - theirs), -1.0)
    assert found.worst_index == np.unravel_index(apart.argmax(), apart.shape)
    assert (found.max_abs, found.scale) == (apart.max(), np.abs(left).max())
    assert found.max_rel == pytest.approx(
        max(d / abs(x) for d, x in zip(np.abs(left - right).flat, left.flat, strict=True)
            if abs(x) > found.scale * 1e-3)
    )  # fmt: skip
    assert found.cosine == pytest.approx((left * right).sum() / math.sqrt((left**2).sum() * (right**2).sum()))
    assert found.kl == pytest.approx(kl_divergence(left, right).mean())
    assert found.top1_agreement == (left.argmax(-1) == right.argmax(-1)).mean()


def test_integers_of_no_axes_can_differ() -> None:
    found = compare_tensors(np.array(3), np.array(5), name="count", case="c", tolerance=FLOAT32)
    assert (found.max_abs, found.worst_index, found.passed) == (2.0, (), False)


def test_logits_are_compared_in_little_memory() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 60, 49152)).astype(np.float32)
    other, mask = logits + np.float32(1e-6), np.ones((1, 60), bool)
    tracemalloc.start()
    try:
        assert compare_tensors(logits, other, name="logits", case="c", tolerance=FLOAT32, mask=mask).passed
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # All at once, it was 77 bytes for each.
    assert peak < 12 * logits.size
