"""Conversion to float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from generated_graphs import Case, assert_same, cases, graph, run, serialized
from onnxsmith.graph_passes import operator_counts
from onnxsmith.graph_passes.precision import ToBfloat16, ToFloat16, precision_map
from onnxsmith.onnx_file import check_model, load_model, save_model

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((64, 32)).astype(np.float32)
X = RANDOM.standard_normal((2, 64)).astype(np.float32)
HEAD = '<ir_version: 9, opset_import: ["": 18]> '
TEXT = """<ir_version: 9, opset_import: ["": 18]> g (float[m, k] x) => (float[m, n] y) {
  h = MatMul(x, w)
  y = Tanh(h)
}"""


@pytest.mark.parametrize("keep_io_types", [True, False])
def test_converts_and_stays_close(keep_io_types: bool, tmp_path: Path) -> None:
    model = graph(TEXT, w=W)
    before = run(model, {"x": X})
    outcome = ToFloat16(keep_io_types=keep_io_types)(model)
    assert outcome.modified
    details = outcome.changes.details
    assert (details["float32_bytes_before"], details["float32_bytes_after"]) == (W.nbytes, 0)
    assert details["casts"] == 2 * keep_io_types
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    dtype = np.float32 if keep_io_types else np.float16
    after = run(model, {"x": X.astype(dtype)})
    assert after["y"].dtype == dtype
    assert_same(before, {"y": after["y"].astype(np.float32)}, atol=4e-3)
    # Control: it is not float32 any more.
    assert not np.array_equal(before["y"], after["y"])
    save_model(model, tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")


def test_a_second_run_changes_nothing() -> None:
    model = graph(TEXT, w=W)
    ToFloat16()(model)
    content = serialized(model)
    assert not ToFloat16()(model).modified
    assert serialized(model) == content


def test_many_outputs_are_cast_in_their_order() -> None:
    names = [f"y{number}" for number in range(12)]
    outputs = ", ".join(f"float[m, n] {name}" for name in names)
    body = f"{', '.join(names)} = Split<axis = -1, num_outputs = 12>(h)"
    model = graph(f"{HEAD} g (float[m, k] x) => ({outputs}) {{ h = MatMul(x, w) {body} }}", w=W[:, :24])
    ToFloat16()(model)
    cast = [node.outputs[0].name for node in model.graph if node.op_type == "Cast"]
    # Sorting the graph turns it around.
    assert [name for name in cast if name in names] == names[::-1]


def test_weights_in_a_file_of_their_own_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = graph(TEXT, w=W)
    before = run(model, {"x": X})
    save_model(model, path, inline_limit_bytes=0)
    loaded = load_model(path)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    ToFloat16()(loaded)
    np.testing.assert_array_equal(loaded.graph.initializers["w"].const_value.numpy(), W.astype(np.float16))
    assert_same(before, run(loaded, {"x": X}), atol=4e-3)


def test_large_and_infinite_weights_make_no_nan() -> None:
    weight = W.copy()
    weight[0, :4] = 1e6, -1e6, 1e-12, -np.inf
    model = graph(TEXT, w=weight)
    ToFloat16()(model)
    assert np.isfinite(run(model, {"x": np.abs(X) * 1e-3 + 1e-3})["y"]).all()


def test_operators_and_nodes_can_be_kept() -> None:
    model = graph(TEXT, w=W)
    outcome = ToFloat16(keep_operators=("MatMul", "Tanh"))(model)
    assert not outcome.modified
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    next(node for node in model.graph if node.op_type == "MatMul").name = "layer.3.proj"
    outcome = ToFloat16(keep_nodes=("layer.*.proj",))(model)
    assert outcome.changes.skipped == {"layer.3.proj": "keep_nodes names it"}
    assert precision_map(model) == {"layer.3.proj": "keep_nodes names it"}
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    assert operator_counts(model) == {"Cast": 2, "MatMul": 1, "Tanh": 1}


SENSITIVE_TEXT = (
    HEAD
    + """ g (float[2, 64] x) => (float[2, 64] y, float[2, 1] z) <float two = {2.0}> {
  r = Relu(x)
  s = Softmax(r)
  t = Identity(s)
  p = Pow(t, two)
  z = ReduceMean<keepdims = 1>(p, axes)
  u = Mul(s, r)
  v = Sigmoid(u)
  y = Mul(v, r)
}"""
)


def test_what_is_sensitive_stays_and_casts_are_shared() -> None:
    model = graph(SENSITIVE_TEXT, axes=np.array([1]))
    before = run(model, {"x": X})
    outcome = ToFloat16()(model)
    kept = {name.partition(" ")[0] for name in outcome.changes.skipped}
    assert kept == {"Softmax", "Identity", "Pow", "ReduceMean"}
    assert outcome.changes.skipped["Identity of 't'"] == "moves numbers between nodes that stay"
    # Into and out of float16 once for each value that is needed in both.
    assert operator_counts(model)["Cast"] == 4
    assert outcome.changes.details["casts"] == 4
    assert_same(before, run(model, {"x": X}), rtol=2e-3)
    everything = graph(SENSITIVE_TEXT, axes=np.array([1]))
    assert ToFloat16(convert_sensitive=True)(everything).changes.skipped == {}
    assert operator_counts(everything)["Cast"] == 3  # the input and the two outputs
    assert_same(before, run(everything, {"x": X}), rtol=2e-2)


def test_bfloat16_keeps_what_the_operator_set_lacks() -> None:
    text = (
        HEAD + "g (float[1, 2, 8, 8] x) => (float[1, 4, 6, 6] y) { c = Conv(x, w) r = Relu(c) y = Tanh(r) }"
    )
    weight = RANDOM.standard_normal((4, 2, 3, 3)).astype(np.float32)
    model = graph(text, w=weight)
    outcome = ToBfloat16()(model)
    assert outcome.changes.skipped == {"Conv of 'c'": "Conv of opset 18 does not take bfloat16"}
    assert (
        next(node for node in model.graph if node.op_type == "Tanh").inputs[0].dtype == ir.DataType.BFLOAT16
    )
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    later = graph(text.replace('"": 18', '"": 22').replace("ir_version: 9", "ir_version: 10"), w=weight)
    assert not ToBfloat16()(later).changes.skipped
    assert later.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
    onnx.checker.check_model(ir.to_proto(later), full_check=True)


def test_inputs_that_are_float32_by_definition_stay() -> None:
    model = graph(
        HEAD + "g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) { r = Relu(x) y = Resize(r, , scales) }",
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    x = {"x": np.ones((1, 1, 2, 2), np.float32)}
    before = run(model, x)
    ToFloat16()(model)
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    assert_same(before, run(model, x))


def test_an_epsilon_does_not_become_zero() -> None:
    model = graph(
        HEAD + "g (float[2, 64] x) => (float[2, 64] y) <float e = {1e-12}> { a = Add(x, e) y = Div(x, a) }"
    )
    ToFloat16(convert_sensitive=True)(model)
    assert np.isfinite(run(model, {"x": np.zeros((2, 64), np.float32)})["y"]).all()


def test_subgraphs_and_functions_survive() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "local": 1]>
    g (bool c, float[2, 64] x) => (float[2, 32] y) {
      p = MatMul(x, w)
      z = local.shift(p)
      y = If(c) <then_branch = a () => (float[2, 32] q) { q = Add(z, z) },
                 else_branch = b () => (float[2, 32] r) { r = Neg(z) }>
    }
    <domain: "local", opset_import: ["": 18]> shift (i) => (o) {
      k = Constant<value = float {0.5}>()
      o = Add(i, k)
    }"""
    model = graph(text, w=W)
    feeds = [{"c": np.array(c), "x": X} for c in (True, False)]
    before = [run(model, feed) for feed in feeds]
    assert ToFloat16()(model).modified
    for feed, want in zip(feeds, before, strict=True):
        assert_same(want, run(model, feed), rtol=1e-2)


def test_converts_any_size_without_reading_it() -> None:
    def read() -> ir.Tensor:
        raise AssertionError("the weight was read")

    model = graph(TEXT, w=W)
    shape = ir.Shape((1 << 16, 1 << 16))
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        read, dtype=ir.DataType.FLOAT, shape=shape, name="w"
    )
    assert ToFloat16()(model).changes.details["float32_bytes_before"] == 4 << 32
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16


def test_a_value_without_a_type_is_refused() -> None:
    model = graph(
        HEAD.replace("18]", '18, "other": 1]')
        + "g (float[2] x) => (float[2] y) { h = other.F(x) y = Relu(h) }"
    )
    model.graph.opset_imports["other"] = 1
    outcome = ToFloat16()(model)
    assert outcome.changes.skipped == {"F of 'h'": "the domain 'other' is not known"}


@given(cases())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_generated_graphs_stay_valid_and_keep_their_signature(case: Case) -> None:
    model = case.model.clone()
    before = case.expected()
    for kind in (ToFloat16, ToBfloat16):
        changed = model.clone()
        kind()(changed)
        onnx.checker.check_model(ir.to_proto(changed))
        if kind is ToBfloat16:
            continue  # the CPU provider has few kernels for it
        after = run(changed, case.feeds)
        assert [(n, a.dtype, a.shape) for n, a in after.items()] == [
            (n, a.dtype, a.shape) for n, a in before.items()
        ]
        content = serialized(changed)
        assert not kind()(changed).modified
        assert serialized(changed) == content
