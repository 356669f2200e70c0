"""Weights that are stored the way round that they are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from generated_graphs import Case, assert_same, cases, graph, run, serialized
from onnxsmith.graph_passes.weights import MatMulWeight, TransposeWeights, find_matmul_weights
from onnxsmith.onnx_file import check_model, load_model, save_model

HEAD = '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> '
RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((3, 4)).astype(np.float32)
X = RANDOM.standard_normal((2, 4)).astype(np.float32)


def linear(body: str = "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)") -> ir.Model:
    return graph(HEAD + f"g (float[m, k] x) => (float[m, n] y) {{ {body} }}", w=W)


def test_fires_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = linear()
    before = run(model, {"x": X})
    outcome = TransposeWeights()(model)
    assert outcome.modified
    assert outcome.changes.details == {"transposed": 1}
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert list(model.graph.initializers) == ["w"]
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)
    save_model(model, tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")
    assert_same(before, run(load_model(tmp_path / "m.onnx"), {"x": X}), rtol=1e-6)
    content = serialized(model)
    assert not TransposeWeights()(model).modified
    assert serialized(model) == content


def test_control_a_weight_that_is_not_turned_differs() -> None:
    square = RANDOM.standard_normal((4, 4)).astype(np.float32)
    text = HEAD + "g (float[m, k] x) => (float[m, n] y) { t = Transpose(w) y = MatMul(x, t) }"
    model = graph(text, w=square)
    before = run(model, {"x": X})
    TransposeWeights()(model)
    model.graph.initializers["w"].const_value = ir.tensor(square)
    with pytest.raises(AssertionError):
        assert_same(before, run(model, {"x": X}), rtol=1e-3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[m, k] x, int64[s] i) => (float[m, n] y, float[s, k] e) "
            "{ e = Gather(w, i) t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }",
            "used in 2 places, so it stays shared",
        ),
        (
            "g () => (float[4, 3] y) { y = Transpose<perm = [1, 0]>(w) }",
            "its transpose is an output of the graph",
        ),
        (
            "g (float[m, k] x) => (float[m, n] y, float[3, 4] w) { t = Transpose(w) y = MatMul(x, t) }",
            "used in 1 places, so it stays shared",
        ),
    ],
)
def test_refuses_and_says_why(text: str, reason: str) -> None:
    model = graph(HEAD + text, w=W)
    content = serialized(model)
    outcome = TransposeWeights()(model)
    assert not outcome.modified
    assert outcome.changes.skipped == {"w": reason}
    assert serialized(model) == content


@pytest.mark.parametrize(
    "text",
    [
        "g (float[m, k] x, float[3, 4] w) => (float[m, n] y) { t = Transpose(w) y = MatMul(x, t) }",
        "g (float[3, 4] x) => (float[4, 3] y) { y = Transpose<perm = [1, 0]>(x) }",
        "g (float[3, 4] x) => (float[3, 4] y) { t = Transpose<perm = [0, 1]>(w) y = Add(x, t) }",
    ],
    ids=["default of an input", "no weight", "no swap"],
)
def test_leaves_alone_what_is_no_transposed_weight(text: str) -> None:
    model = graph(HEAD + text, **({"w": W} if "w" in text else {}))
    content = serialized(model)
    assert not TransposeWeights()(model).modified
    assert serialized(model) == content


def test_reads_nothing_and_computes_when_written(tmp_path: Path) -> None:
    reads: list[str] = []

    def read() -> ir.Tensor:
        reads.append("w")
        return ir.Tensor(W, name="w")

    model = linear()
    tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape((3, 4)), name="w")
    model.graph.initializers["w"].const_value = tensor
    TransposeWeights()(model)
    assert reads == []
    assert tensor.name == "w"
    save_model(model, tmp_path / "m.onnx")
    assert reads == ["w"]


def test_subgraphs_and_functions_survive() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "local": 1]>
    g (bool c, float[2, 4] x) => (float[2, 3] y, float[2, 4] z) {
      t = Transpose<perm = [1, 0]>(w)
      y = If(c) <then_branch = a () => (float[2, 3] p) { p = MatMul(x, t) },
                 else_branch = b () => (float[2, 3] q) { r = MatMul(x, t) q = Neg(r) }>
      z = local.twice(x)
    }
    <domain: "local", opset_import: ["": 18]> twice (i) => (o) { o = Add(i, i) }"""
    model = graph(text, w=W)
    feeds = [{"c": np.array(c), "x": X} for c in (True, False)]
    before = [run(model, feed) for feed in feeds]
    assert TransposeWeights()(model).modified
    for feed, want in zip(feeds, before, strict=True):
        assert_same(want, run(model, feed), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = MatMul(x, w)", (False, 3, 4)),
        ("t = Transpose(w) y = MatMul(x, t)", (True, 4, 3)),
        ("y = com.microsoft.FusedMatMul<transB = 1>(x, w)", (True, 4, 3)),
        ("t = Transpose(w) y = com.microsoft.FusedMatMul<transB = 1>(x, t)", (False, 3, 4)),
        ("y = com.microsoft.FusedMatMul<transA = 1>(x, w)", "FusedMatMul has transA"),
        ("y = com.microsoft.FusedMatMul<alpha = 0.5>(x, w)", "FusedMatMul scales by 0.5"),
        ("y = MatMul(w, x)", None),
    ],
)
def test_find_matmul_weights(body: str, expected: object) -> None:
    (found,) = [*find_matmul_weights(linear(body))] or [None]
    if isinstance(found, MatMulWeight):
        assert (found.is_transposed, found.in_features, found.out_features) == expected
        assert found.rows().shape == (found.out_features, found.in_features)
    else:
        assert (found and found[1]) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_graph_computes_the_same(case: Case) -> None:
    before = case.expected()
    TransposeWeights()(case.model)
    assert_same(before, run(case.model, case.feeds))
    content = serialized(case.model)
    assert not TransposeWeights()(case.model).modified
    assert serialized(case.model) == content
