"""Precision by measurement: what overflows stays, what adds error stays, and the rest is converted."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import graph, run, serialized
from onnxsmith.errors import BadInputError, PassError
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import Outcome
from onnxsmith.graph_passes.mixed_precision import MixedPrecision
from onnxsmith.graph_passes.precision import precision_map
from sample_activations import activations_on

HEAD = '<ir_version: 9, opset_import: ["": 18]> '
RANDOM = np.random.default_rng(0)
WEIGHTS = {f"w{i}": (RANDOM.standard_normal((16, 16)) / 4).astype(np.float32) for i in range(6)}
# A chain of six layers; in the middle a square that leaves float16's range, and comes back.
CHAIN = """g (float[n, 16] x) => (float[n, 16] y) <float big = {300.0}, float small = {1e-5}> {
  h0 = MatMul(x, w0) t0 = Tanh(h0)
  h1 = MatMul(t0, w1) t1 = Tanh(h1)
  large = Mul(t1, big) square = Mul(large, large) back = Mul(square, small)
  h2 = MatMul(back, w2) t2 = Tanh(h2)
  h3 = MatMul(t2, w3) y = Tanh(h3)
}"""
DATA = [RANDOM.standard_normal((4, 16)).astype(np.float32) for _ in range(3)]


activations = activations_on([{"x": x} for x in DATA])


def measured(text: str, **options: object) -> tuple[ir.Model, ir.Model, Outcome]:
    model = graph(HEAD + text, **{name: w for name, w in WEIGHTS.items() if name in text})
    before = model.clone()
    in_context(model, PassContext(activations=activations))
    outcome = MixedPrecision.create(options)(model)
    in_context(model, None)
    return before, model, outcome


def error(before: ir.Model, after: ir.Model) -> float:
    pairs = [(run(before, {"x": x})["y"], run(after, {"x": x})["y"]) for x in DATA]
    noise = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(noise / sum(float(np.square(a).sum()) for a, _ in pairs)))


def test_what_leaves_the_range_stays_and_the_rest_is_converted() -> None:
    before, model, outcome = measured(CHAIN, max_error=0.01)
    kept = precision_map(model)
    assert {"Mul of 'square'", "Mul of 'back'"} <= kept.keys()
    assert "a value reaches" in kept["Mul of 'square'"]
    assert "float16 ends at 6.55e+04" in kept["Mul of 'square'"]
    assert not any(name.startswith("MatMul of 'h0'") for name in kept)
    assert model.graph.initializers["w0"].dtype == ir.DataType.FLOAT16
    # What the pass measured is what one gets.
    assert outcome.changes.details["error"] == pytest.approx(error(before, model), rel=1e-3)
    assert 0 < error(before, model) <= 0.01
    assert outcome.changes.details["kept_for_range"] == len(kept)


def test_a_tighter_tolerance_keeps_more_with_few_measurements() -> None:
    loose_before, loose, _ = measured(CHAIN, max_error=0.01)
    reached = error(loose_before, loose)
    before, tight, outcome = measured(CHAIN, max_error=reached / 20)
    assert error(before, tight) <= reached / 20
    assert len(precision_map(tight)) > len(precision_map(loose))
    rounds = outcome.changes.details["rounds"]
    assert 1 < len(rounds) <= 6
    assert [one["kept"] for one in rounds] == sorted(one["kept"] for one in rounds)
    assert any("adds a relative error of" in reason for reason in precision_map(tight).values())


def test_a_tolerance_that_is_not_met_changes_nothing() -> None:
    model = graph(HEAD + CHAIN, **{name: w for name, w in WEIGHTS.items() if name in CHAIN})
    in_context(model, PassContext(activations=activations))
    content = serialized(model)
    with pytest.raises(PassError, match=r"relative error of \S+ with \d+ nodes in float32; expected at most"):
        MixedPrecision(max_error=1e-7, rounds=1)(model)
    assert serialized(model) == content


def test_inputs_may_be_narrow_too() -> None:
    _, model, _ = measured(
        "g (float[n, 16] x) => (float[n, 16] y) { y = MatMul(x, w0) }", keep_io_types=False
    )
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT16
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16


def test_without_data_it_refuses() -> None:
    model = graph(HEAD + CHAIN, **{name: w for name, w in WEIGHTS.items() if name in CHAIN})
    with pytest.raises(PassError, match=r"no calibration data; expected data to measure on\. Give some"):
        MixedPrecision()(model)


@pytest.mark.parametrize("options", [{"max_error": 0}, {"headroom": 0.5}, {"rounds": 0}])
def test_numbers_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(BadInputError, match=f"mixed_precision: {next(iter(options))}"):
        MixedPrecision.create(options)
