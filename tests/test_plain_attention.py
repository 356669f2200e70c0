"""Attention written out in ONNX operators: fused where it surely is that, refused with a reason where not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from generated_graphs import Array, assert_same, graph, run, serialized
from onnxsmith.graph_passes import load_pass, operator_counts
from onnxsmith.graph_passes.plain_attention import FuseAttention

HEAD = '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> '
RANDOM = np.random.default_rng(0)
# As TorchScript's exporter writes it: shapes are computed, the scale is on both sides of the product.
BODY = """
  shape = Shape(x) b = Gather(shape, zero) s = Gather(shape, one)
  view = Concat<axis = 0>(b, minus, four, eight) flat = Concat<axis = 0>(b, s, width)
  qm = MatMul(x, wq) qa = Add(bq, qm) q4 = Reshape(qa, view) q = Transpose<perm = [0, 2, 1, 3]>(q4)
  km = MatMul(x, wk) ka = Add(bk, km) k4 = Reshape(ka, view) k = Transpose<perm = [0, 2, 3, 1]>(k4)
  vm = MatMul(x, wv) va = Add(bv, vm) v4 = Reshape(va, view) v = Transpose<perm = [0, 2, 1, 3]>(v4)
  last = Shape(q) size = Slice(last, minus, end) wide = Cast<to = 1>(size) root = Sqrt(wide)
  part = Div(unit, root) factor = Sqrt(part)
  qs = Mul(q, factor) ks = Mul(k, factor)
  scores = MatMul(qs, ks) masked = Add(scores, mask) p = Softmax<axis = -1>(masked)
  o = MatMul(p, v) ot = Transpose<perm = [0, 2, 1, 3]>(o) f = Reshape(ot, flat) y = MatMul(f, wo)
"""
WEIGHTS: dict[str, Array] = {
    **{f"w{name}": (RANDOM.standard_normal((24, 32)) / 3).astype(np.float32) for name in "qkv"},
    **{f"b{name}": RANDOM.standard_normal(32).astype(np.float32) for name in "qkv"},
    "wo": RANDOM.standard_normal((32, 5)).astype(np.float32),
    "unit": np.ones(1, np.float32), "zero": np.array([0]), "one": np.array([1]), "minus": np.array([-1]),
    "four": np.array([4]), "eight": np.array([8]), "width": np.array([32]),
    "end": np.array([np.iinfo(np.int64).max]), "wider": np.array([5], np.float32),
}  # fmt: skip


def attention(*changes: tuple[str, str], mask: str = "float[batch, 1, 1, tokens] mask") -> ir.Model:
    body = BODY
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    model = graph(
        HEAD + f"g (float[batch, tokens, 24] x, {mask}) => (float[batch, tokens, 5] y) {{ {body} }}",
        **WEIGHTS,
    )
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    common.ShapeInferencePass()(model)
    return model


def feeds(batch: int, tokens: int, rows: int = 1) -> dict[str, Array]:
    mask = np.zeros((batch, 1, rows, tokens), np.float32)
    mask[-1, ..., tokens // 2 :] = np.finfo(np.float32).min
    return {"x": RANDOM.standard_normal((batch, tokens, 24)).astype(np.float32), "mask": mask}


OWN_SHAPE = (
    "own = Shape(ot) ob = Gather(own, zero) os = Gather(own, one) "
    "seen = Concat<axis = 0>(ob, os, width) f = Reshape(ot, seen)"
)
CASES = [feeds(1, 4), feeds(3, 7), feeds(2, 1), feeds(2, 2)]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ((("masked = Add(scores, mask)", "masked = Add(mask, scores)")),),
        ((("masked = Add(scores, mask)", "scaled = Div(scores, root) masked = Add(scaled, mask)")),
         ("qs = Mul(q, factor) ks = Mul(k, factor)", "qs = Identity(q) ks = Identity(k)")),
        ((("k = Transpose<perm = [0, 2, 3, 1]>(k4)",
           "kt = Transpose<perm = [0, 2, 1, 3]>(k4) k = Transpose<perm = [0, 1, 3, 2]>(kt)")),),
        # The shape that the result is viewed as is computed from the result.
        ((("f = Reshape(ot, flat)", OWN_SHAPE)),),
        # What fuse_transformer made of the product and its scale, or of the keys' transposition.
        ((("scores = MatMul(qs, ks)", "scores = com.microsoft.FusedMatMul<alpha = 0.5>(qs, ks)")),),
        ((("scores = MatMul(qs, ks)", "scores = com.microsoft.FusedMatMul<transB = 1, alpha = 2.0>(qs, ks)")),
         ("k = Transpose<perm = [0, 2, 3, 1]>(k4)", "k = Transpose<perm = [0, 2, 1, 3]>(k4)")),
    ],
)  # fmt: skip
def test_it_fuses_to_the_same_numbers(changes: tuple[tuple[str, str], ...]) -> None:
    model = attention(*changes)
    for name in ("cleanup", "infer_shapes"):
        load_pass(name).create({})(model)
    before = [run(model, case) for case in CASES]
    outcome = FuseAttention()(model)
    assert outcome.changes.details == {"made": {"Attention": 1}}, outcome.changes.skipped
    counts = operator_counts(model)
    assert counts["com.microsoft.Attention"] == 1
    assert counts["MatMul"] == 1
    assert not {"Softmax", "Transpose", "Reshape", "com.microsoft.FusedMatMul"} & counts.keys()
    for case, want in zip(CASES, before, strict=True):
        assert_same(want, run(model, case), rtol=1e-5)
    content = serialized(model)
    assert not FuseAttention()(model).modified
    assert serialized(model) == content
    # Control: the mask matters.
    with pytest.raises(AssertionError):
        assert_same(before[1], run(model, CASES[1] | {"mask": CASES[1]["mask"] * 0}), rtol=1e-2)


def test_without_biases_or_with_other_keys_it_is_multi_head_attention() -> None:
    """Cross attention: keys and values are projections of something else, of another length."""
    model = attention(
        ("km = MatMul(x, wk)", "shape2 = Shape(z) b2 = Gather(shape2, zero) km = MatMul(z, wk)"),
        ("vm = MatMul(x, wv)", "view2 = Concat<axis = 0>(b2, minus, four, eight) vm = MatMul(z, wv)"),
        ("k4 = Reshape(ka, view)", "k4 = Reshape(ka, view)"),
        ("masked = Add(scores, mask) p = Softmax<axis = -1>(masked)", "p = Softmax<axis = -1>(scores)"),
        ("v4 = Reshape(va, view)", "v4 = Reshape(va, view2)"),
        mask="float[batch, others, 24] z",
    )
    # The keys' view takes its batch from x, which is the same by name.
    z = RANDOM.standard_normal((3, 9, 24)).astype(np.float32)
    case = {"x": CASES[1]["x"], "z": z}
    before = run(model, case)
    outcome = FuseAttention()(model)
    assert outcome.changes.details == {"made": {"MultiHeadAttention": 1}}, outcome.changes.skipped
    assert_same(before, run(model, case), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ((("v = Transpose<perm = [0, 2, 1, 3]>(v4)", "v = Transpose<perm = [0, 2, 1, 3]>(k4)"),), ""),
        ((("Softmax<axis = -1>", "Softmax<axis = 2>"),), "not over the last of four axes"),
        ((("qs = Mul(q, factor)", "qs = Mul(q, mask)"),), "not one constant"),
        ((("y = MatMul(f, wo)", "g1 = ReduceMax<keepdims = 0>(p) f1 = Add(f, g1) y = MatMul(f1, wo)"),),
         "is not read by one MatMul alone"),
        ((("ot = Transpose<perm = [0, 2, 1, 3]>(o)", "ot = Abs(o)"),), "not read by one Transpose alone"),
        ((("flat = Concat<axis = 0>(b, s, width)", "flat = Concat<axis = 0>(s, b, width)"),),
         "takes axis 0 from something else"),
        ((("view = Concat<axis = 0>(b, minus,", "view = Concat<axis = 0>(s, minus,"),),
         "takes axis 0 from something else"),
        ((("o = MatMul(p, v)", "d = Relu(p) o = MatMul(d, v)"),), "is not read by one MatMul alone"),
    ],
)  # fmt: skip
def test_near_misses_are_left_alone_with_a_reason(changes: tuple[tuple[str, str], ...], reason: str) -> None:
    model = attention(*changes)
    content = serialized(model)
    outcome = FuseAttention()(model)
    if not reason:
        # Values that are the keys: unusual, and exact all the same.
        assert outcome.modified
        for case, want in zip(CASES, [run(attention(*changes), one) for one in CASES], strict=True):
            assert_same(want, run(model, case), rtol=1e-5)
        return
    assert not outcome.modified
    [said] = outcome.changes.skipped.values()
    assert reason in said
    assert serialized(model) == content


def test_a_result_whose_shape_is_read_elsewhere_stays() -> None:
    model = attention(
        ("f = Reshape(ot, flat) y = MatMul(f, wo)",
         f"{OWN_SHAPE} fo = MatMul(f, wo) count = Size(own) sf = Cast<to = 1>(count) y = Mul(fo, sf)"),
    )  # fmt: skip
    [reason] = FuseAttention()(model).changes.skipped.values()
    assert reason == "'ot' is not read by one Reshape alone"


def test_projections_of_dequantized_values_stay_products() -> None:
    """A runtime computes them in integers; packed into Attention they would be computed in float."""
    q = ("zero_x = Constant<value = uint8 {128}>() scale_x = Constant<value = float {0.02}>() "
         "xq = QuantizeLinear(x, scale_x, zero_x) xd = DequantizeLinear(xq, scale_x, zero_x) ")  # fmt: skip
    changes = [(f"{name}m = MatMul(x, w{name})", f"{name}m = MatMul(xd, w{name})") for name in "qkv"]
    model = attention((changes[0][0], q + changes[0][1]), *changes[1:])
    load_pass("cleanup").create({})(model)
    before = run(model, CASES[1])
    outcome = FuseAttention()(model)
    assert outcome.changes.details == {"made": {"MultiHeadAttention": 1}}, outcome.changes.skipped
    assert operator_counts(model)["MatMul"] == 4
    assert_same(before, run(model, CASES[1]), rtol=1e-5)
