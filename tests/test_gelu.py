"""GELU that is written out: fused whatever the order of its terms, and only where it is one."""

from __future__ import annotations

import numpy as np
import onnx_ir.passes.common as common
import pytest
from hypothesis import HealthCheck, given, settings

from generated_graphs import Case, assert_same, cases, graph, run, serialized
from onnxsmith.graph_passes import operator_counts
from onnxsmith.graph_passes.gelu import FuseGelu

HEAD = (
    '<ir_version: 9, opset_import: ["": 18]> g (float[a, b, 8] v) => (float[a, b, 8] y) '
    "<float half = {0.5}, float one = {1.0}, float[1] c = {0.79788456}, float k = {0.044715}, "
    "float three = {3.0}, float root = {1.41421356}, float two = {2.0}, float[1] other = {0.5}> "
)
TANH = "p = Pow(x, three) kp = Mul(k, p) s = Add(x, kp) cs = Mul(s, c) t = Tanh(cs) "
ERF = "d = Div(x, root) t = Erf(d) "
ENDS = {
    "new": "u = Add(t, one) h = Mul(x, half) z = Mul(h, u)",
    "python": "h = Mul(x, half) u = Add(one, t) z = Mul(u, h)",
    "halved last": "u = Add(one, t) m = Mul(x, u) z = Mul(m, half)",
    "divided": "u = Add(one, t) m = Mul(u, x) z = Div(m, two)",
    "spread": "ht = Mul(half, t) u = Add(ht, half) z = Mul(x, u)",
    "sum": "h = Mul(x, half) ht = Mul(h, t) z = Add(h, ht)",
}
RANDOM = np.random.default_rng(0)
BIAS = RANDOM.standard_normal(8).astype(np.float32)
CASES = [{"v": RANDOM.standard_normal(shape).astype(np.float32) * 3} for shape in ((1, 3, 8), (2, 1, 8))]


def check(body: str, *, operator: str, inputs: int) -> None:
    model = graph(f"{HEAD} {{ {body} y = Neg(z) }}", b=BIAS)
    if not model.graph.initializers["b"].uses():
        del model.graph.initializers["b"]
    common.ShapeInferencePass()(model)
    before = [run(model, case) for case in CASES]
    outcome = FuseGelu()(model)
    assert outcome.changes.details == {"made": {operator: 1}}, outcome.changes.skipped
    [node] = [node for node in model.graph if node.op_type == operator]
    assert len(node.inputs) == inputs
    assert not {"Tanh", "Erf", "Mul", "Pow"} & operator_counts(model).keys()
    for case, want in zip(CASES, before, strict=True):
        assert_same(want, run(model, case), rtol=1e-6, atol=1e-6)
    content = serialized(model)
    assert not FuseGelu()(model).modified
    assert serialized(model) == content
    # Control: the two forms differ, and the bounds tell them apart.
    node.op_type = {"Gelu": "QuickGelu", "FastGelu": "Gelu"}[operator]
    node.resize_inputs(1)
    with pytest.raises(AssertionError):
        assert_same(before[0], run(model, CASES[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operator", ["FastGelu", "Gelu"])
def test_it_is_fused_in_any_order(end: str, operator: str) -> None:
    start = {"FastGelu": TANH, "Gelu": ERF}[operator]
    check(
        f"x = Relu(v) n = Neg(x) {start} {ENDS[end]}".replace("n = Neg(x) ", ""), operator=operator, inputs=1
    )


def test_the_other_way_to_write_a_cube() -> None:
    """gelu_fast of transformers."""
    inner = "xc = Mul(x, c) kx = Mul(k, x) kxx = Mul(kx, x) i = Add(one, kxx) ci = Mul(xc, i) t = Tanh(ci) "
    check(f"x = Abs(v) {inner} {ENDS['new']}", operator="FastGelu", inputs=1)


def test_a_bias_goes_into_it() -> None:
    check(f"x = Add(v, b) {TANH} {ENDS['new']}", operator="FastGelu", inputs=2)
    # Gelu has no such input; BiasGelu of ONNX Runtime is made of both by fuse_transformer.
    check(f"x = Add(v, b) {ERF} {ENDS['new']}", operator="Gelu", inputs=1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{TANH} u = Add(t, two) h = Mul(x, half) z = Mul(h, u)", "does not become x / 2"),
        (f"{ERF} u = Add(t, one) h = Mul(v, half) z = Mul(h, u)", "does not become x / 2"),
        (f"{TANH} u = Sub(t, one) h = Mul(x, half) z = Mul(h, u)", "does not become x / 2"),
        (f"{TANH.replace('Pow(x, three)', 'Pow(x, two)')} {ENDS['new']}", ""),
        (f"{TANH.replace('Mul(s, c)', 'Mul(s, other)')} {ENDS['new']}", ""),
        (f"{ERF.replace('root', 'two')} {ENDS['new']}", ""),
    ],
)
def test_near_misses_stay(body: str, reason: str) -> None:
    model = graph(f"{HEAD} {{ x = Relu(v) {body} y = Neg(z) }}")
    common.ShapeInferencePass()(model)
    content = serialized(model)
    outcome = FuseGelu()(model)
    assert not outcome.modified
    assert serialized(model) == content
    assert [reason in said for said in outcome.changes.skipped.values()] == [True] * bool(reason)


def test_what_else_is_read_of_it_stays() -> None:
    model = graph(f"{HEAD} {{ x = Add(v, b) {TANH} {ENDS['new']} w = Mul(h, cs) y = Add(z, w) }}", b=BIAS)
    common.ShapeInferencePass()(model)
    before = run(model, CASES[0])
    assert FuseGelu()(model).modified
    assert "Tanh" not in operator_counts(model)
    assert_same(before, run(model, CASES[0]), rtol=1e-6, atol=1e-6)


@given(case=cases())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_graph_computes_the_same(case: Case) -> None:
    before = case.expected()
    FuseGelu()(case.model)
    assert_same(before, run(case.model, case.feeds))
