"""What counts as agreement, on tensors and on models; a comparison that cannot fail is worth nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
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
from onnxsmith.errors import FeedError, UnknownNameError
from onnxsmith.package import ModelPackage, TensorSpec
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import (
    Case,
    OrtSession,
    TorchSession,
    cases_for,
    compare_sessions,
    load_cases,
    reference_outputs,
    value_limits,
)
from onnxsmith.runtime.session import Array, Session

pytest.importorskip("onnxruntime")

Make = Callable[..., ModelPackage]
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


# Tensors


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


# KL divergence

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


# Verdicts


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


# Models


@pytest.fixture(scope="module")
def reference(tiny_program: TorchProgram) -> TorchSession:
    return TorchSession(tiny_program)


@pytest.fixture(scope="module")
def expected(reference: TorchSession, tiny_program: TorchProgram) -> list[tuple[Case, dict[str, Array]]]:
    return reference_outputs(reference, cases_for(reference, limits=tiny_program.limits))


Expected = list[tuple[Case, dict[str, Array]]]


def test_the_export_agrees_with_torch(
    reference: TorchSession, expected: Expected, tiny_package: ModelPackage
) -> None:
    seen: list[str] = []
    with OrtSession(tiny_package, name="export") as candidate:
        result = compare_sessions(
            reference, candidate, expected, tolerance=FLOAT32, on_case=lambda case: seen.append(case.name)
        )
    assert result.passed, result.reason
    assert seen == [case.name for case, _ in expected]
    assert len(result.tensors) == len(expected) * 5
    assert all(t.count for t in result.tensors)
    assert (result.reference, result.candidate, result.provider) == (
        "LlamaForCausalLM",
        "export",
        "CPUExecutionProvider",
    )


def test_torch_agrees_with_itself_exactly(reference: TorchSession, expected: Expected) -> None:
    result = compare_sessions(reference, reference, expected, tolerance=Tolerance(atol=0.0))
    assert result.passed, result.reason


def corrupted(package: ModelPackage, change: Callable[[Array], Array]) -> ModelPackage:
    """The package with another matrix that turns the hidden state into logits."""
    import onnx_ir as ir

    copy = package.derive()
    copy.main.path = None
    (value,) = (v for name, v in copy.main.model.graph.initializers.items() if "lm_head" in name)
    weight = value.const_value
    assert weight is not None
    value.const_value = ir.Tensor(change(weight.numpy().copy()), name=value.name)
    return copy


@ALL
def test_a_corrupted_weight_fails(
    reference: TorchSession, expected: Expected, tiny_package: ModelPackage, tolerance: Tolerance
) -> None:
    with OrtSession(corrupted(tiny_package, lambda w: np.roll(w, 1, axis=0))) as candidate:
        result = compare_sessions(reference, candidate, expected, tolerance=tolerance)
    assert not result.passed
    assert "tensors differ; first 'logits' in case 'prefill batch=1 length=1'" in result.reason


def test_one_changed_number_fails_where_rounding_passes(
    reference: TorchSession, expected: Expected, tiny_package: ModelPackage
) -> None:
    def change(weight: Array) -> Array:
        weight[3, 5] += np.float32(0.05)
        return weight

    with OrtSession(corrupted(tiny_package, change)) as candidate:
        result = compare_sessions(reference, candidate, expected, tolerance=FLOAT32)
    assert not result.passed


def test_padding_is_not_compared_and_tokens_are(
    reference: TorchSession, expected: Expected, tiny_package: ModelPackage
) -> None:
    padded = [(case, outputs) for case, outputs in expected if "left-padding" in case.name]
    assert [case.name for case, _ in padded] == [
        "prefill batch=2 length=9 left-padding=4",
        "decode batch=2 length=1 past=9 left-padding=4",
    ]
    with OrtSession(tiny_package) as candidate:
        for case, outputs in padded:
            assert case.tokens is not None
            length = case.tokens.shape[1]
            for name, value in outputs.items():
                # The first token of the padded row, or in decoding its only one.
                place = (1, min(4, value.shape[1] - 1)) if name == "logits" else (1, 0, 4)
                for changed, passes in (((1, 0) if name == "logits" else (1, 1, 3), True), (place, False)):
                    if name == "logits" and value.shape[1] < length and passes:
                        continue  # in decoding there is no padding among the logits
                    broken = {**outputs, name: value.copy()}
                    broken[name][changed] += 1
                    result = compare_sessions(reference, candidate, [(case, broken)], tolerance=FLOAT32)
                    assert result.passed is passes, (case.name, name, changed, result.reason)
                    if not passes:
                        first = next(t for t in result.tensors if not t.passed)
                        assert first.name == name
                        assert first.shape == value.shape
                        assert first.worst_index[: len(changed)] == changed


class Renamed(Session):
    """A session that shows some of its inputs and outputs under other names, or not at all."""

    def __init__(
        self, inner: Session, *, drop: tuple[str, ...] = (), add: TensorSpec | None = None, prefix: str = ""
    ) -> None:
        self._inner = inner
        self._prefix = prefix
        self.inputs = (*inner.inputs, *([add] if add else []))
        self.outputs = tuple(
            dataclasses.replace(spec, name=prefix + spec.name)
            for spec in inner.outputs
            if spec.name not in drop
        )
        self.provider, self.name = inner.provider, "renamed"

    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        return self._inner.run(feeds, outputs)


def test_an_output_that_the_candidate_lacks_fails(reference: TorchSession, expected: Expected) -> None:
    result = compare_sessions(
        reference, Renamed(reference, drop=("present.1.value",)), expected[:1], tolerance=FLOAT32
    )
    assert not result.passed
    assert "1 of 5 tensors differ; first 'present.1.value'" in result.reason
    assert result.reason.endswith("the candidate lacks it")


def test_no_output_in_common_fails(reference: TorchSession, expected: Expected) -> None:
    result = compare_sessions(reference, Renamed(reference, prefix="x_"), expected, tolerance=FLOAT32)
    assert (result.passed, result.tensors) == (False, ())
    assert result.reason.startswith(
        "no output in common: the candidate has x_logits, x_present.0.key, x_present.0.value, "
        "x_present.1.key, the reference logits"
    )


def test_an_input_that_the_reference_does_not_take_fails(reference: TorchSession, expected: Expected) -> None:
    candidate = Renamed(reference, add=TensorSpec("pixels", "float32", ("batch",)))
    result = compare_sessions(reference, candidate, expected, tolerance=FLOAT32)
    assert not result.passed
    assert result.reason == "the candidate needs the inputs pixels, which the reference does not take"


FREE = "g (float[batch, 6] x) => (float[batch, 6] y) { y = Relu(x) }"


def test_a_candidate_with_a_frozen_batch_fails_and_says_so(onnx_package: Make) -> None:
    frozen = "g (float[1, 6] x) => (float[1, 6] y) { y = Relu(x) }"
    with (
        OrtSession(onnx_package(FREE)) as one,
        OrtSession(onnx_package(frozen, "frozen"), name="frozen") as two,
    ):
        result = compare_sessions(
            one, two, reference_outputs(one, cases_for(one, limits={})), tolerance=FLOAT32
        )
    assert not result.passed
    assert result.reason.startswith("case 'batch=2': frozen: input 'x': 2 on axis 0")


def test_a_candidate_with_a_frozen_batch_inside_fails_and_says_so(onnx_package: Make) -> None:
    frozen = """g (float[batch, 6] x) => (float[batch, 6] y) {
        s = Constant<value_ints=[1, 6]>()
        r = Reshape(x, s)
        y = Relu(r)
    }"""
    with (
        OrtSession(onnx_package(FREE)) as one,
        OrtSession(onnx_package(frozen, "frozen"), name="frozen") as two,
    ):
        result = compare_sessions(
            one, two, reference_outputs(one, cases_for(one, limits={})), tolerance=FLOAT32
        )
    assert not result.passed
    assert result.reason.startswith("case 'batch=2': frozen: ONNX Runtime fails")
    # What ran before is kept.
    assert [t.case for t in result.tensors] == ["batch=1"]


def test_an_input_that_the_candidate_does_not_need_is_left_out(onnx_package: Make) -> None:
    two = "g (float[n] x, float[n] unused) => (float[n] y, float[n] z) { y = Relu(x) z = Neg(unused) }"
    one = "g (float[n] x) => (float[n] y, float[n] z) { y = Relu(x) z = Neg(x) }"
    with OrtSession(onnx_package(two)) as a, OrtSession(onnx_package(one, "one")) as b:
        cases = reference_outputs(a, cases_for(a, limits={}))
        result = compare_sessions(a, b, cases, tolerance=FLOAT32)
    assert {t.name: t.passed for t in result.tensors} == {"y": True, "z": False}


# Inputs


def test_cases_are_the_same_for_the_same_seed(reference: TorchSession) -> None:
    first, again = (list(cases_for(reference, limits={"input_ids": 64}, seed=3)) for _ in range(2))
    other = list(cases_for(reference, limits={"input_ids": 64}, seed=4))
    assert [c.name for c in first] == [c.name for c in again] == [c.name for c in other]
    for one, two in zip(first, again, strict=True):
        assert one.feeds.keys() == two.feeds.keys()
        for name in one.feeds:
            np.testing.assert_array_equal(one.feeds[name], two.feeds[name])
    assert any(
        (a.feeds["input_ids"] != b.feeds["input_ids"]).any() for a, b in zip(first, other, strict=True)
    )


def test_cases_cover_batches_lengths_caches_and_padding(expected: Expected) -> None:
    cases = [case for case, _ in expected]
    shapes = [case.feeds["input_ids"].shape for case in cases]
    past = [case.feeds["past_key_values.0.key"].shape[2] for case in cases]
    assert {1, 2} <= {shape[0] for shape in shapes}
    assert {1, 16, 160} <= {shape[1] for shape in shapes}
    assert {(True, True), (True, False), (False, True), (False, False)} == {
        (length > 0, bool(case.tokens is not None and not case.tokens.all()))
        for length, case in zip(past, cases, strict=True)
    }


def test_ids_stay_below_the_limit_and_reach_it(reference: TorchSession) -> None:
    ids = np.concatenate(
        [c.feeds["input_ids"].ravel() for c in cases_for(reference, limits={"input_ids": 5})]
    )
    assert (ids.min(), ids.max()) == (0, 4)


def test_a_case_of_a_wanted_size(reference: TorchSession) -> None:
    (case,) = cases_for(reference, limits={"input_ids": 64}, sizes=(3, 11))
    assert case.feeds["input_ids"].shape == (3, 11)
    assert [case.name for case in cases_for(reference, limits={}, samples=2)] == [
        "prefill batch=1 length=1",
        "prefill batch=1 length=16",
    ]


def test_a_decoding_case_continues_what_the_reference_computed(expected: Expected) -> None:
    case, outputs = next((c, o) for c, o in expected if c.name == "decode batch=1 length=5 past=12")
    np.testing.assert_array_equal(case.feeds["position_ids"], [[12, 13, 14, 15, 16]])
    assert case.feeds["attention_mask"].shape == (1, 17)
    past = case.feeds["past_key_values.1.value"]
    assert np.abs(past).max() > 0
    np.testing.assert_array_equal(outputs["present.1.value"][:, :, :12], past)


def test_positions_start_at_the_first_token_of_a_padded_row(expected: Expected) -> None:
    case = next(c for c, _ in expected if c.name == "prefill batch=2 length=9 left-padding=4")
    assert case.feeds["attention_mask"][1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert case.feeds["position_ids"][1, 4:].tolist() == [0, 1, 2, 3, 4]


def test_limits_are_found_in_the_graph_and_else_in_the_configuration(
    tiny_package: ModelPackage, onnx_package: Make
) -> None:
    assert value_limits(tiny_package)["input_ids"] == 64
    text = """g (int64[n] ids, int64[n] types) => (float[n, 2] y)
        <float[7, 2] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[3, 2] kinds = {0,0,0,0,0,0}> {
        a = Gather(table, ids)
        wide = Identity(types)
        b = Gather(kinds, wide)
        y = Add(a, b)
    }"""
    assert value_limits(onnx_package(text)) == {"ids": 7, "types": 3}
    package = onnx_package("g (int64[n] input_ids) => (int64[n] y) { y = Neg(input_ids) }")
    assert value_limits(package) == {}
    package.files["config.json"] = b'{"vocab_size": 11}'
    assert value_limits(package) == {"input_ids": 11}


def test_a_case_from_a_file(tmp_path: Path, onnx_package: Make) -> None:
    np.savez(tmp_path / "inputs.npz", x=noise(2, 6))
    with OrtSession(onnx_package(FREE)) as session:
        (case,) = load_cases(tmp_path / "inputs.npz", session.inputs)
        result = compare_sessions(session, session, reference_outputs(session, [case]), tolerance=FLOAT32)
    assert (result.passed, result.tensors[0].count, case.name) == (True, 12, "inputs.npz")


@pytest.mark.parametrize(
    "content", ["missing", "text", "cut", "damaged", "pickle", "empty", "npy", "no rows"]
)
def test_a_file_that_holds_no_case_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "inputs.npz"
    if content == "text":
        path.write_text("not numbers")
    elif content == "cut":
        np.savez(path, x=noise(64, 64))
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "damaged":
        np.savez_compressed(path, x=noise(64, 64))
        path.write_bytes(path.read_bytes()[:2000] + bytes(500) + path.read_bytes()[2500:])
    elif content == "npy":
        np.save(tmp_path / "inputs.npy", noise(3))
        (tmp_path / "inputs.npy").rename(path)
    elif content == "pickle":
        np.savez(path, x=np.array([{"a": 1}], object))
    elif content == "empty":
        np.savez(path)
    elif content == "no rows":
        np.savez(path, x=noise(0))
    said = r"cannot be read: .*; expected an \.npz|no arrays|x: shape \(0,\); expected at least one row"
    with pytest.raises(FeedError, match=rf"inputs\.npz: ({said})"):
        load_cases(path, (TensorSpec("x", "float32", ("n",)),))


def test_nan_beside_nan_is_no_agreement() -> None:
    nan = np.full((2, 3), np.nan, np.float32)
    alone = compare_tensors(nan, nan, name="y", case="c", tolerance=FLOAT32)
    assert alone.passed and alone.count == 0
    result = Comparison("a", "b", "cpu", FLOAT32, (alone,))
    assert result.reason == "nothing was compared: all tensors are empty or NaN"
    some = nan.copy()
    some[0, 0] = 1
    assert compare_tensors(some, some, name="y", case="c", tolerance=FLOAT32).count == 1
