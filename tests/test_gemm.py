"""Gemm between two Reshapes, as GPT-2's Conv1D is exported: MatMul and Add, with the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from generated_graphs import Array, assert_same, graph, run, serialized
from onnxsmith.graph_passes import load_pass, operator_counts
from onnxsmith.graph_passes.gemm import GemmToMatMul

HEAD = '<ir_version: 9, opset_import: ["": 18]> '
RANDOM = np.random.default_rng(0)
WEIGHTS: dict[str, Array] = {
    "w": RANDOM.standard_normal((24, 10)).astype(np.float32),
    "b": RANDOM.standard_normal(10).astype(np.float32),
    "flat": np.array([-1, 24]), "zero": np.array([0]), "one": np.array([1]), "ten": np.array([10]),
    "minus": np.array([-1]), "whole": np.array([0, -1, 2, 5]), "back": np.array([2, 3, 10]),
}  # fmt: skip
# As torch writes it, with sizes that the graph computes.
BODY = (
    "rows = Reshape(x, flat) [dense] g = Gemm(rows, w, b) size = Shape(x) batch = Gather(size, zero) "
    "tokens = Gather(size, one) shape = Concat<axis = 0>(batch, tokens, ten) y = Reshape(g, shape)"
)
SIGNATURE = "g (float[batch, tokens, 24] x) => (float[batch, tokens, 10] y)"


def dense(body: str = BODY, signature: str = SIGNATURE, **weights: Array) -> ir.Model:
    model = graph(HEAD + f"{signature} {{ {body} }}", **(WEIGHTS | weights))
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    common.ShapeInferencePass()(model)
    return model


def x(*shape: int) -> dict[str, Array]:
    return {"x": RANDOM.standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        (BODY, {}),
        (BODY.replace("Gemm(", "Gemm<transB = 1>("), {"w": np.ascontiguousarray(WEIGHTS["w"].T)}),
        (BODY.replace("Gemm(rows, w, b)", "Gemm<beta = 2.0>(rows, w)"), {}),
        (BODY, {"b": WEIGHTS["b"][:1]}),
        (BODY, {"b": WEIGHTS["b"][None]}),
        (BODY, {"b": WEIGHTS["b"][0]}),
        # Viewed as heads at once: the Reshape stays, on all axes.
        (BODY.replace("tokens, ten)", "tokens, two, five)"), {"two": np.array([2]), "five": np.array([5])}),
    ],
)
def test_it_computes_the_same(body: str, weights: dict[str, Array]) -> None:
    signature = SIGNATURE.replace("10] y", "2, 5] y") if "five" in body else SIGNATURE
    # Behind the Reshape comes something, so that it can go.
    body = body.replace("y = Reshape", "r = Reshape") + " y = Relu(r)"
    model = dense(body, signature, **weights)
    cases = [x(1, 4, 24), x(3, 1, 24), x(2, 5, 24), x(0, 2, 24)]
    before = [run(model, case) for case in cases]
    outcome = GemmToMatMul()(model)
    assert outcome.changes.count == 1, outcome.changes.skipped
    counts = operator_counts(model)
    assert counts["MatMul"] == 1
    assert not {"Gemm", "Transpose"} & counts.keys()
    assert counts.get("Reshape", 0) == ("five" in body)
    for case, want in zip(cases, before, strict=True):
        assert_same(want, run(model, case), rtol=1e-5)
    content = serialized(model)
    assert not GemmToMatMul()(model).modified
    assert serialized(model) == content
    # Control: the bias matters.
    if "b" in model.graph.initializers:
        value = model.graph.initializers["b"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() + 1, name="b")
        with pytest.raises(AssertionError):
            assert_same(before[0], run(model, cases[0]), rtol=1e-3)


def test_heads_become_rows_first() -> None:
    """What attention leaves, viewed as rows at once: (batch, tokens, heads, size)."""
    body = "t = Transpose<perm = [0, 2, 1, 3]>(x) " + BODY.replace("Reshape(x", "Reshape(t").replace(
        "Shape(x)", "Shape(t)"
    )
    model = dense(body, "g (float[batch, 3, tokens, 8] x) => (float[batch, tokens, 10] y)")
    cases = [x(1, 3, 4, 8), x(2, 3, 1, 8)]
    before = [run(model, case) for case in cases]
    assert GemmToMatMul()(model).changes.count == 1
    assert operator_counts(model)["MatMul"] == 1
    for case, want in zip(cases, before, strict=True):
        assert_same(want, run(model, case), rtol=1e-5)


def test_a_weight_that_is_shared_is_turned_in_the_graph() -> None:
    turned = np.ascontiguousarray(WEIGHTS["w"].T)
    body = (
        BODY.replace("Gemm(", "Gemm<transB = 1>(").replace("y =", "r =")
        + " e = Gather(w, zero) y = Add(r, c)"
    )
    body += " z = Identity(e)"
    model = dense(
        body, "g (float[batch, tokens, 24] x) => (float[batch, tokens, 10] y, float[1, 24] z)",
        w=turned, c=np.ones(10, np.float32),
    )  # fmt: skip
    before = run(model, case := x(2, 3, 24))
    assert GemmToMatMul()(model).modified
    assert operator_counts(model)["Transpose"] == 1
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), turned)  # type: ignore[union-attr]
    assert_same(before, run(model, case), rtol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "weights", "reason"),
    [
        ("Gemm(", "Gemm<alpha = 2.0>(", {}, "it has alpha 2"),
        ("Gemm(", "Gemm<beta = 2.0>(", {}, "it has beta 2"),
        ("Gemm(rows", "Gemm<transA = 1>(rows", {"w": np.ones((6, 10), np.float32)}, "it turns its first"),
        ("", "", {"b": np.ones((6, 10), np.float32)}, "same for all rows"),
        ("y = Reshape(g, shape)", "h = Relu(g) y = Reshape(h, shape)", {}, "not read by Reshape alone"),
        ("y = Reshape(g, shape)", "y = Reshape(g, copied)", {"copied": np.array([0, 10])}, "copies an axis"),
        ("", "", {"flat": np.array([-1, 12]), "w": np.ones((12, 10), np.float32)}, "no axes before those"),
    ],
)  # fmt: skip
def test_near_misses_stay_with_a_reason(old: str, new: str, weights: dict[str, Array], reason: str) -> None:
    assert old in BODY
    output = "float[rows, 10] y" if "copied" in weights else "float[b2, t2, 10] y"
    body = BODY.replace(old, new) if old else BODY
    model = dense(body, f"g (float[batch, tokens, 24] x) => ({output})", **weights)
    content = serialized(model)
    outcome = GemmToMatMul()(model)
    assert not outcome.modified
    assert reason in outcome.changes.skipped["dense"]
    assert serialized(model) == content


def test_quantization_reaches_it() -> None:
    """Blocks of few bits replace MatMul: a Gemm would keep its float32 weight."""
    w = RANDOM.standard_normal((32, 64)).astype(np.float32)
    changed = {"w": w, "b": np.zeros(64, np.float32), "ten": np.array([64]), "flat": np.array([-1, 32])}
    model = dense(BODY, "g (float[batch, tokens, 32] x) => (float[batch, tokens, 64] y)", **changed)
    GemmToMatMul()(model)
    assert load_pass("quantize_weights").create({"bits": 8, "block_size": 16})(model).modified
    assert "com.microsoft.MatMulNBits" in operator_counts(model)
