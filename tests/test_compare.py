"""Two models on the same inputs: what agrees, what differs and is said, and which inputs are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxsmith.comparison import (
    TOLERANCES,
    Tolerance,
)
from onnxsmith.errors import FeedError
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


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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


@pytest.mark.parametrize("tolerance", TOLERANCES.values(), ids=list(TOLERANCES))
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
