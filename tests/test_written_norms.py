"""LayerNorm and RMSNorm that are written out: fused in each form, and refused with the reason."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from hypothesis import HealthCheck, given, settings

from generated_graphs import Case, assert_same, cases, graph, run, serialized
from onnxsmith.graph_passes import operator_counts
from onnxsmith.graph_passes.written_norms import FuseNorms

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": RANDOM.standard_normal(8).astype(np.float32),
    "b": RANDOM.standard_normal(8).astype(np.float32),
    "one": np.array(1, np.float32),
    "e": np.array(1e-3, np.float32),
    "two": np.array(2, np.float32),
    "three": np.array(3, np.float32),
    "w2": RANDOM.standard_normal((3, 8)).astype(np.float32),
    "b2": RANDOM.standard_normal((3, 8)).astype(np.float32),
    "w3": RANDOM.standard_normal((3, 1)).astype(np.float32),
}
CENTRED = "m = {mean}(x) d = Sub(x, m) "
SQUARES = {"Pow": "s = Pow({d}, two) ", "Mul": "s = Mul({d}, {d}) "}
VARIANCE = "v = {mean}(s) p = Add(v, e) r = Sqrt(p) "
DIVIDED = {
    "Div": "n = Div({d}, r) ",
    "Reciprocal": "i = Reciprocal(r) n = Mul({d}, i) ",
    "one over": "i = Div(one, r) n = Mul(i, {d}) ",
}
LAST = "ReduceMean<keepdims = 1, axes = [-1]>"
FEEDS = [{"x": RANDOM.standard_normal(shape).astype(np.float32) + 1} for shape in ((2, 3, 8), (1, 3, 8))]


def norm(body: str, *, opset: int = 17) -> ir.Model:
    model = graph(
        f'<ir_version: 8, opset_import: ["": {opset}]> '
        f"g (float[a, 3, 8] x) => (float[a, 3, 8] y) {{ {body} }}",
        **WEIGHTS,
    )
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    common.ShapeInferencePass()(model)
    return model


def check(model: ir.Model, operator: str) -> None:
    before = [run(model, case) for case in FEEDS]
    assert FuseNorms()(model).changes.details == {"made": {operator: 1}}
    assert {"Sqrt", "ReduceMean", "Div"}.isdisjoint(operator_counts(model))
    for case, want in zip(FEEDS, before, strict=True):
        assert_same(want, run(model, case), rtol=1e-6, atol=1e-6)
    content = serialized(model)
    assert not FuseNorms()(model).modified
    assert serialized(model) == content
    [node] = [node for node in model.graph if node.op_type == operator]
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    with pytest.raises(AssertionError):
        assert_same(before[0], run(model, FEEDS[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divided", DIVIDED)
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("end", ["y = Mul(n, w)", "h = Mul(w, n) y = Add(h, b)", "h = Mul(n, w) y = Neg(h)"])
def test_layer_norm_in_each_form(square: str, divided: str, end: str) -> None:
    body = CENTRED + SQUARES[square] + VARIANCE + DIVIDED[divided] + end
    check(norm(body.format(mean=LAST, d="d")), "LayerNormalization")


@pytest.mark.parametrize("divided", DIVIDED)
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("opset", [13, 17])
def test_rms_norm_in_each_form(square: str, divided: str, opset: int) -> None:
    body = SQUARES[square] + VARIANCE + DIVIDED[divided] + "y = Mul(n, w)"
    check(norm(body.format(mean=LAST, d="x"), opset=opset), "SimplifiedLayerNormalization")


def test_over_two_axes() -> None:
    body = CENTRED + SQUARES["Pow"] + VARIANCE + DIVIDED["Div"] + "h = Mul(n, w2) y = Add(h, b2)"
    model = norm(body.format(mean="ReduceMean<keepdims = 1, axes = [1, 2]>", d="d"))
    check(model, "LayerNormalization")


LAYER_NORM = CENTRED + SQUARES["Pow"] + VARIANCE + DIVIDED["Div"] + "h = Mul(n, w) y = Add(h, b)"
REFUSED = {
    "another axis": (
        LAYER_NORM.format(mean="ReduceMean<keepdims = 1, axes = [1]>", d="d"),
        r"over axes \[1\] of 3",
    ),
    "no weight": (
        (CENTRED + SQUARES["Pow"] + VARIANCE + "y = Div(d, r)").format(mean=LAST, d="d"),
        "the weight is not applied by one Mul alone",
    ),
    "another operand": (
        (CENTRED + SQUARES["Pow"] + VARIANCE + "n = Div(x, r) y = Mul(n, w)").format(mean=LAST, d="d"),
        "divides another value than the one that was averaged",
    ),
    "a weight of each row": (
        (CENTRED + SQUARES["Pow"] + VARIANCE + "n = Div(d, r) y = Mul(n, w3)").format(mean=LAST, d="d"),
        r"the weight has shape \(3, 1\); expected \(8,\)",
    ),
    "the root multiplies": (
        (CENTRED + SQUARES["Pow"] + VARIANCE + "n = Mul(d, r) y = Mul(n, w)").format(mean=LAST, d="d"),
        "read by Mul; expected Div or Reciprocal",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_stay_with_the_reason(name: str) -> None:
    body, reason = REFUSED[name]
    model = norm(body)
    content = serialized(model)
    outcome = FuseNorms()(model)
    assert not outcome.modified and serialized(model) == content
    [said] = outcome.changes.skipped.values()
    assert re.search(reason, said), said


def test_other_types_and_older_operator_sets_stay_with_the_reason() -> None:
    body = LAYER_NORM.format(mean=LAST, d="d")
    [said] = FuseNorms()(norm(body, opset=14)).changes.skipped.values()
    assert "opset 14 has no LayerNormalization; 17 has (convert_opset)" in said
    halves = norm(body)
    for value in (*halves.graph.inputs, *(o for node in halves.graph for o in node.outputs)):
        value.dtype = ir.DataType.FLOAT16
    [said] = FuseNorms()(halves).changes.skipped.values()
    assert said == "it is fused in float32; the element type is FLOAT16"


def test_a_cube_is_no_near_miss() -> None:
    body = LAYER_NORM.replace("two", "three").format(mean=LAST, d="d")
    outcome = FuseNorms()(norm(body))
    assert not outcome.modified and not outcome.changes.skipped


@given(case=cases())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_graph_computes_the_same(case: Case) -> None:
    before = run(case.model, case.feeds)
    FuseNorms()(case.model)
    assert_same(before, run(case.model, case.feeds), rtol=1e-5, atol=1e-6)
