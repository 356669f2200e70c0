"""Shapes and types that are inferred are those that ONNX Runtime computes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from generated_graphs import Array, Case, cases, graph, run, serialized
from onnxsmith.graph_passes.shapes import InferShapes

HEAD = '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> '
RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def forget(model: ir.Model) -> None:
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None


def require_right(model: ir.Model, feeds: dict[str, Array], sizes: dict[str, int]) -> int:
    """Every inferred type and axis is what comes out; gives the number of axes that were compared."""
    values = [v for node in model.graph for v in node.outputs if v.name and isinstance(v.type, ir.TensorType)]
    tapped = model.clone()
    known = {v.name: v for node in tapped.graph for v in node.outputs}
    tapped.graph.outputs[:] = [known[value.name] for value in values]
    got = run(tapped, feeds)
    compared = 0
    for value in values:
        array = got[value.name or ""]
        assert value.dtype == ir.DataType.from_numpy(array.dtype), value.name
        if value.shape is None:
            continue
        assert len(value.shape) == array.ndim, value.name
        for axis, size in zip(value.shape, array.shape, strict=True):
            expected = axis if isinstance(axis, int) else sizes.get(str(axis.value))
            if expected is not None:
                assert size == expected, value
                compared += 1
    return compared


# What is computed, and how many axes of it are known at least.
BODIES: dict[str, tuple[str, int]] = {
    "norms and gates": (
        """n, , , t = com.microsoft.SkipLayerNormalization(x, x, gamma) g = com.microsoft.BiasGelu(n, gamma)
        q = com.microsoft.QuickGelu(t) f = com.microsoft.FusedMatMul<transB = 1>(g, wide)
        m = MatMul(q, turned) s = SimplifiedLayerNormalization<axis = -1>(f, gains) y = Add(s, m)""",
        21,
    ),
    "blocks": (
        """b = com.microsoft.MatMulNBits<K = 16, N = 5, bits = 4, block_size = 16>(x, codes, scales)
        i = Constant<value = int64[2] {0, 3}>()
        e = com.microsoft.GatherBlockQuantized<bits=4, block_size=16, quantize_axis=1>(rows, i, scales)
        r = Transpose(e) c = MatMul(b, few) d = MatMul(c, r)
        k = Constant<value = float {1.0}>() y = Add(b, k)""",
        13,
    ),
    "attention": (
        """a = com.microsoft.Attention<num_heads = 2>(x, packed, bias)
        m = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, a) y = Add(a, m)""",
        7,
    ),
    "branches": (
        """c = Constant<value = bool {1}>()
        v = If(c) <then_branch = p () => (h) { h = com.microsoft.Gelu(x) },
                   else_branch = o () => (l) { l = Neg(x) }>
        y = Relu(v)""",
        4,
    ),
}
WEIGHTS: dict[str, Array] = {
    "gamma": numbers(16),
    "gains": numbers(5),
    "wide": numbers(5, 16),
    "turned": numbers(16, 5),
    "codes": RANDOM.integers(0, 255, (5, 1, 8), dtype=np.uint8),
    "rows": RANDOM.integers(0, 255, (5, 8), dtype=np.uint8),
    "scales": numbers(5, 1),
    "few": numbers(5, 16),
    "packed": numbers(16, 48),
    "bias": numbers(48),
}


@pytest.mark.parametrize("name", BODIES)
def test_operators_of_onnx_runtime_do_not_end_it(name: str) -> None:
    body, axes = BODIES[name]
    used = {key: array for key, array in WEIGHTS.items() if re.search(rf"\b{key}[,)]", body)}
    model = graph(f"{HEAD}g (float[batch, length, 16] x) => (float[a, b, c] y) {{ {body} }}", **used)
    forget(model)
    outcome = InferShapes()(model)
    assert outcome.changes.details["unknown_after"] == 0
    assert outcome.changes.details["unknown_before"] > 0
    feeds = {"x": numbers(2, 3, 16)}
    assert require_right(model, feeds, {"batch": 2, "length": 3}) >= axes
    content = serialized(model)
    assert not InferShapes()(model).modified
    assert serialized(model) == content
    # Control: a wrong size is noticed.
    value = model.graph[0].outputs[0]
    assert value.shape is not None
    value.shape = ir.Shape([7, *list(value.shape)[1:]])
    with pytest.raises(AssertionError):
        require_right(model, feeds, {})


def test_no_large_weight_is_read(tmp_path: Path) -> None:
    shape = ir.Shape((1 << 19, 1 << 19))
    tensor = ir.ExternalTensor(
        "missing.data", 0, 1 << 40, ir.DataType.FLOAT, shape=shape, name="w", base_dir=tmp_path
    )
    body = "h = MatMul(x, w) y = com.microsoft.Gelu(h)"
    text = f"{HEAD}g (float[m, 524288] x) => (float[m, n] y) {{ {body} }}"
    model = graph(text, w=np.ones((1, 1), np.float32))
    model.graph.initializers["w"].const_value = tensor
    model.graph.initializers["w"].shape = shape
    InferShapes()(model)
    assert str(model.graph[0].outputs[0].shape) == "[m,524288]"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_graph(case: Case) -> None:
    case.expected()
    InferShapes()(case.model)
    sizes: dict[str, int] = {}
    for value in case.model.graph.inputs:
        assert value.shape is not None
        for axis, size in zip(value.shape, case.feeds[value.name or ""].shape, strict=True):
            if not isinstance(axis, int) and axis.value:
                sizes[axis.value] = size
    require_right(case.model, case.feeds, sizes)
