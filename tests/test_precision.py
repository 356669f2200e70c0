"""Conversion to float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import assert_same, graph, run, serialized
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.precision import ToFloat16
from onnxsmith.onnx_file import check_model, load_model, save_model

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((64, 32)).astype(np.float32)
X = RANDOM.standard_normal((2, 64)).astype(np.float32)
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
    assert outcome.changes.details == {"float32_bytes_before": W.nbytes, "float32_bytes_after": 0}
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


def test_operators_can_be_kept() -> None:
    model = graph(TEXT, w=W)
    outcome = ToFloat16(keep_operators=("MatMul",))(model)
    assert not outcome.modified
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT


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


def test_refuses_what_does_not_fit_a_protobuf_without_reading_it() -> None:
    def read() -> ir.Tensor:
        raise AssertionError("the weight was read")

    model = graph(TEXT, w=W)
    shape = ir.Shape((1 << 16, 1 << 16))
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        read, dtype=ir.DataType.FLOAT, shape=shape, name="w"
    )
    with pytest.raises(
        PreconditionError, match="pass to_float16: 17179869184 bytes of weights; expected at most 2147483647"
    ):
        ToFloat16()(model)
