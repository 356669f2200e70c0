"""What counts as agreement of two tensors, as KL divergence, and as a verdict on several."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxsmith.comparison import (
    TOLERANCES,
    Comparison,
    TensorComparison,
    Tolerance,
    compare_tensors,
    kl_divergence,
    tolerance_for,
)
from onnxsmith.errors import UnknownNameError
from onnxsmith.runtime.session import Array

FLOAT32 = TOLERANCES["float32"]
ALL = pytest.mark.parametrize("tolerance", TOLERANCES.values(), ids=list(TOLERANCES))


def compared(
    reference: Any, candidate: Any, tolerance: Tolerance = FLOAT32, name: str = "y", **options: Any
) -> TensorComparison:
    return compare_tensors(
        np.asarray(reference), np.asarray(candidate), name=name, case="case", tolerance=tolerance, **options
    )


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@ALL
def test_a_tensor_agrees_with_itself(tolerance: Tolerance) -> None:
    x = noise(2, 3, 5)
    result = compared(x, x.copy(), tolerance, name="logits")
    assert (result.passed, result.reason, result.count) == (True, "", 30)
    assert (result.max_abs, result.max_rel, result.kl, result.top1_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert result.cosine == pytest.approx(1.0)
    assert (result.shape, result.dtype) == ((2, 3, 5), "float32")


@ALL
def test_zeros_do_not_agree_with_numbers(tolerance: Tolerance) -> None:
    for x in (noise(4, 8), noise(4, 8) * np.float32(1e-6)):
        assert not compared(x, np.zeros_like(x), tolerance).passed
        assert not compared(np.zeros_like(x), x, tolerance).passed


@ALL
def test_zeros_agree_with_zeros(tolerance: Tolerance) -> None:
    result = compared(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32), tolerance)
    assert (result.passed, result.cosine) == (True, 1.0)


@ALL
def test_unrelated_tensors_do_not_agree(tolerance: Tolerance) -> None:
    assert not compared(noise(4, 64), noise(4, 64, seed=1), tolerance).passed
    assert not compared(noise(4, 64), -noise(4, 64), tolerance).passed


@ALL
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_named(tolerance: Tolerance, value: float) -> None:
    x = noise(4, 8)
    broken = x.copy()
    broken[1, 2] = value
    result = compared(x, broken, tolerance)
    assert not result.passed
    assert result.reason == "1 values are NaN or infinite; expected 0"
    assert not compared(broken, x, tolerance).passed


@ALL
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_same_special_values_in_the_same_places_agree(tolerance: Tolerance, value: float) -> None:
    x = noise(4, 8)
    x[1, 2] = value
    result = compared(x, x.copy(), tolerance)
    assert (result.passed, result.reason, result.max_abs) == (True, "", 0.0)


@ALL
@pytest.mark.parametrize(("one", "other"), [(np.inf, -np.inf), (np.nan, np.inf), (-np.inf, np.nan)])
def test_another_special_value_in_the_same_place_does_not_agree(
    tolerance: Tolerance, one: float, other: float
) -> None:
    x, y = noise(4, 8), noise(4, 8)
    x[1, 2], y[1, 2] = one, other
    result = compared(x, y, tolerance)
    assert not result.passed
    assert result.reason == "1 values are another NaN or infinity than the reference's"


def test_shapes_and_types_must_be_equal() -> None:
    x = noise(2, 3)
    assert compared(x, x.T).reason == "shape is (3, 2); expected (2, 3)"
    assert compared(x, x[None]).reason == "shape is (1, 2, 3); expected (2, 3)"
    assert compared(x, x.astype(np.float16)).reason == "element type is float16; expected float32"
    assert not any(compared(x, other).passed for other in (x.T, x[None], x.astype(np.float16)))


def test_a_difference_says_how_large_and_where() -> None:
    x = np.full((2, 3), 10, np.float32)
    y = x.copy()
    y[1, 2] = 10.5
    result = compared(x, y)
    assert (result.max_abs, result.worst_index, result.scale) == (0.5, (1, 2), 10.0)
    assert result.max_rel == pytest.approx(0.05)
    assert result.reason == (
        "differs by 0.5 at [1, 2]; expected at most 0.00101 (atol 1e-05 + rtol 0.0001 x 10); "
        "cosine is 0.999829; expected at least 0.9999"
    )


def test_the_bound_is_relative_to_the_largest_magnitude_of_the_tensor() -> None:
    tolerance = Tolerance(atol=0.5, rtol=0.25)
    x = [8.0, 0.0]  # the bound is 0.5 + 0.25 * 8 = 2.5 for both elements
    assert compared(x, [10.5, 0.0], tolerance).passed
    assert compared(x, [8.0, -2.5], tolerance).passed
    assert not compared(x, [10.5001, 0.0], tolerance).passed
    assert not compared(x, [8.0, -2.5001], tolerance).passed
    # Of the reference: a candidate that explodes must not widen its own bound.
    assert not compared(x, [800.0, 0.0], tolerance).passed


def test_a_bound_that_is_none_is_not_checked() -> None:
    x, y = noise(2, 8), noise(2, 8, seed=1)
    assert compared(x, y, Tolerance()).passed
    assert not compared(x, y, Tolerance(atol=0.0)).passed
    assert not compared(x, y, Tolerance(rtol=0.0)).passed
    assert compared(x, x, Tolerance(atol=0.0)).passed


def test_every_bound_that_was_broken_is_named() -> None:
    x, y = noise(64, 8), noise(64, 8, seed=1)
    tolerance = Tolerance(atol=0.1, min_cosine=0.9, max_kl=0.01, min_top1_agreement=0.9)
    reason = compared(x, y, tolerance, name="logits").reason
    for part in ("differs by", "cosine is", "KL divergence is", "top-1 agreement is"):
        assert part in reason
    # Only logits are distributions.
    assert "KL" not in compared(x, y, tolerance, name="present.0.key").reason


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
@ALL
def test_integers_are_compared_exactly(tolerance: Tolerance, dtype: type[Any]) -> None:
    x = np.array([0, 1, 1], dtype)
    assert compared(x, x.copy(), tolerance).passed
    result = compared(x, np.array([0, 1, 0], dtype), tolerance)
    assert (result.passed, result.reason) == (False, "integers differ by up to 1 at [2]")


def test_large_integers_that_are_one_float_are_still_two() -> None:
    x = np.array([2**53], np.int64)
    assert not compared(x, x + 1, Tolerance()).passed


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_floats_are_compared_as_floats(dtype: Any) -> None:
    x = noise(4, 8).astype(dtype)
    y = (x.astype(np.float32) * 1.001).astype(dtype)
    assert compared(x, y, TOLERANCES["bfloat16"]).passed
    assert not compared(x, np.zeros_like(x), TOLERANCES["bfloat16"]).passed
    y[0, 0] = np.nan
    assert "NaN" in compared(x, y, TOLERANCES["bfloat16"]).reason


def test_masked_positions_do_not_count() -> None:
    x = noise(2, 3, 4)
    y = x.copy()
    y[1, 0] = np.nan
    mask = np.array([[True, True, True], [False, True, True]])
    result = compared(x, y, mask=mask)
    assert (result.passed, result.count) == (True, 5 * 4)
    y[1, 1, 2] += 1
    result = compared(x, y, mask=mask)
    assert (result.passed, result.worst_index) == (False, (1, 1, 2))


@pytest.mark.parametrize("agree", [True, False])
def test_top_1_counts_positions(agree: bool) -> None:
    x = np.array([[0.0, 1, 2], [5, 4, 3], [0, 9, 0], [1, 0, 0]])
    y = x if agree else x[:, ::-1]
    result = compared(x, y, Tolerance(min_top1_agreement=0.5), name="logits")
    # Turned round, only the row whose largest is in the middle agrees.
    assert result.top1_agreement == (1.0 if agree else 0.25)
    assert result.passed is agree


def test_every_precision_has_a_tolerance_and_an_unknown_one_a_suggestion() -> None:
    assert tolerance_for("int4") is TOLERANCES["int4"]
    with pytest.raises(UnknownNameError, match=r"unknown precision 'flaot16'.*Did you mean 'float16'\?"):
        tolerance_for("flaot16")


LOGITS = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=6),
    elements=st.floats(-50, 50, width=32),
)


@given(LOGITS, st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_kl_is_not_negative_and_has_one_value_per_row(logits: Array, seed: int) -> None:
    other = logits + np.random.default_rng(seed).standard_normal(logits.shape)
    divergence = kl_divergence(logits, other)
    assert divergence.shape == logits.shape[:-1]
    assert (divergence >= 0).all()
    assert np.isfinite(divergence).all()


@given(LOGITS, st.floats(-100, 100))
@settings(max_examples=100, deadline=None)
def test_kl_is_zero_for_logits_that_differ_by_a_shift(logits: Array, shift: float) -> None:
    np.testing.assert_allclose(kl_divergence(logits, logits + shift), 0.0, atol=1e-12)


@given(LOGITS, st.floats(-100, 100), st.floats(-100, 100), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_kl_does_not_change_when_either_side_is_shifted(
    logits: Array, shift: float, other_shift: float, seed: int
) -> None:
    other = logits + np.random.default_rng(seed).standard_normal(logits.shape)
    shifted = kl_divergence(logits + shift, other + other_shift)
    np.testing.assert_allclose(shifted, kl_divergence(logits, other), rtol=1e-9, atol=1e-10)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-3, 3)),
    st.floats(0.01, 3),
)
@settings(max_examples=100, deadline=None)
def test_kl_is_positive_for_other_distributions(logits: Array, change: float) -> None:
    other = logits.copy()
    other[..., 0] += change
    assert (kl_divergence(logits, other) > 1e-9).all()


def test_kl_is_what_the_definition_says_and_not_symmetric() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.7, 0.2, 0.1])
    expected = (p * np.log(p / q)).sum()
    assert kl_divergence(np.log(p), np.log(q)) == pytest.approx(expected)
    assert kl_divergence(np.log(q), np.log(p)) != pytest.approx(expected)


def test_kl_with_tokens_that_are_ruled_out() -> None:
    x = np.array([[1.0, 2.0, -np.inf]])
    assert kl_divergence(x, x) == 0.0
    assert kl_divergence(x, np.array([[1.0, 2.0, -50.0]])) < 1e-9
    # What the reference finds possible and the candidate rules out is infinitely surprising.
    assert kl_divergence(np.array([[1.0, 2.0, 3.0]]), x) == np.inf
    assert compared(x, x, TOLERANCES["int8"], name="logits").passed


def verdict(*tensors: TensorComparison, error: str = "") -> Comparison:
    return Comparison("reference", "candidate", "cpu", FLOAT32, tensors, error)


def test_nothing_compared_is_a_failure() -> None:
    assert (verdict().passed, verdict().reason) == (False, "nothing was compared")
    empty = compared(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32))
    assert (empty.passed, empty.count) == (True, 0)
    reason = "nothing was compared: all tensors are empty or NaN"
    assert (verdict(empty).passed, verdict(empty).reason) == (False, reason)
    assert verdict(empty, compared([1.0], [1.0])).passed


def test_an_error_is_a_failure_whatever_was_compared() -> None:
    result = verdict(compared([1.0], [1.0]), error="it crashed")
    assert (result.passed, result.reason) == (False, "it crashed")


def test_a_verdict_names_the_first_tensor_and_the_worst() -> None:
    good, bad, worse = (compared([1.0], [1.0 + d]) for d in (0, 1, 2))
    result = verdict(good, dataclasses.replace(bad, name="first"), worse, good)
    assert not result.passed
    assert result.reason.startswith("2 of 4 tensors differ; first 'first' in case 'case': differs by 1 ")
    assert result.worst is worse
    assert json.loads(json.dumps(result.to_json()))["reason"] == result.reason


def test_nan_beside_nan_is_no_agreement() -> None:
    nan = np.full((2, 3), np.nan, np.float32)
    alone = compare_tensors(nan, nan, name="y", case="c", tolerance=FLOAT32)
    assert alone.passed and alone.count == 0
    result = Comparison("a", "b", "cpu", FLOAT32, (alone,))
    assert result.reason == "nothing was compared: all tensors are empty or NaN"
    some = nan.copy()
    some[0, 0] = 1
    assert compare_tensors(some, some, name="y", case="c", tolerance=FLOAT32).count == 1
