"""Rotation inside attention, flat operands and packed projections: exact, and refused where they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import Array, assert_same, graph, run, serialized
from onnxsmith.graph_passes import load_pass, operator_counts
from onnxsmith.graph_passes.attention import FlattenAttention, RotaryInAttention
from onnxsmith.graph_passes.projections import PackProjections
from onnxsmith.graph_passes.weights import PACKED_FROM
from onnxsmith.onnx_file import check_model, load_model, save_model

HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 16, 24
HEAD = '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> '
# What torch's exporter and onnxscript's fusions make of a layer: views, swapped axes, rotation of four axes.
LAYER = """
    qp = MatMul(x, q_proj_weight) kp = MatMul(x, k_proj_weight) vp = MatMul(x, v_proj_weight)
    q4 = Reshape(qp, view) k4 = Reshape(kp, view) v4 = Reshape(vp, view)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 1, 3]>(k4)
    last = ReduceMax<keepdims = 0>(position_ids) end = Add(last, one) steps = Range(zero, end, one)
    column = Reshape(steps, as_column) wide = Cast<to = 1>(column) angles = MatMul(wide, frequencies)
    cos = Cos(angles) sin = Sin(angles)
    qr = com.microsoft.RotaryEmbedding<num_heads = 4>(qt, position_ids, cos, sin)
    kr = com.microsoft.RotaryEmbedding<num_heads = 2>(kt, position_ids, cos, sin)
    qb = Transpose<perm = [0, 2, 1, 3]>(qr) kb = Transpose<perm = [0, 2, 1, 3]>(kr)
    qf = Reshape(qb, flat) kf = Reshape(kb, flat) vf = Reshape(v4, flat)
    attended, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = 4, kv_num_heads = 2, scale = 0.25>
        (qf, kf, vf, past_key, past_value, last_index, total, , , , bias)
    a4 = Reshape(attended, view) a3 = Reshape(a4, flat) y = MatMul(a3, o_proj_weight)
"""
SHAPES = {
    **{key: ["batch", "sequence", 64] for key in ("qp", "qf", "attended", "a3")},
    **{key: ["batch", "sequence", 32] for key in ("kp", "vp", "kf", "vf")},
    **{key: ["batch", "sequence", 4, 16] for key in ("q4", "qb", "a4")},
    **{key: ["batch", "sequence", 2, 16] for key in ("k4", "v4", "kb")},
    **{key: ["batch", 4, "sequence", 16] for key in ("qt", "qr")},
    **{key: ["batch", 2, "sequence", 16] for key in ("kt", "kr")},
    **{key: ["longest", 8] for key in ("cos", "sin", "angles")},
}


def layer(body: str = LAYER, shapes: dict[str, list[Any]] | None = None) -> ir.Model:
    random = np.random.default_rng(0)

    def weight(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    model = graph(
        HEAD + "g (float[batch, sequence, 24] x, int64[batch, sequence] position_ids, "
        "float[batch, 2, past, 16] past_key, float[batch, 2, past, 16] past_value, "
        "int32[batch] last_index, int32 total, float[batch, 1, sequence, all] bias) "
        "=> (float[batch, sequence, 8] y, float[batch, 2, all, 16] present_key, "
        f"float[batch, 2, all, 16] present_value) {{ {body} }}",
        **{
            "q_proj_weight": weight(WIDTH, HEADS * SIZE),
            "k_proj_weight": weight(WIDTH, KV_HEADS * SIZE),
            "v_proj_weight": weight(WIDTH, KV_HEADS * SIZE),
            "o_proj_weight": weight(HEADS * SIZE, 8),
            "q_bias": weight(HEADS * SIZE),
            "frequencies": (1 / 100 ** (np.arange(8) / 8)).astype(np.float32)[None],
            "view": np.array([0, 0, -1, SIZE]),
            "flat": np.array([0, 0, -1]),
            "as_column": np.array([-1, 1]),
            "zero": np.array(0),
            "one": np.array(1),
        },
    )
    for node in model.graph:
        for value in node.outputs:
            wanted = (shapes or SHAPES).get(value.name or "")
            if wanted is not None:
                value.shape, value.type = ir.Shape(wanted), ir.TensorType(ir.DataType.FLOAT)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return model


def feeds(batch: int, tokens: int, past: int, positions: Array, hidden: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(batch + tokens + past)
    bias = np.zeros((batch, 1, tokens, past + tokens), np.float32)
    bias[-1, ..., :hidden] = -1e4
    return {
        "x": random.standard_normal((batch, tokens, WIDTH)).astype(np.float32),
        "position_ids": positions,
        "past_key": random.standard_normal((batch, 2, past, SIZE)).astype(np.float32),
        "past_value": random.standard_normal((batch, 2, past, SIZE)).astype(np.float32),
        "last_index": np.full(batch, past + tokens - 1, np.int32),
        "total": np.array(past + tokens, np.int32),
        "bias": bias,
    }


PROMPT = feeds(2, 5, 0, np.tile(np.arange(5), (2, 1)))
PADDED_PROMPT = feeds(2, 5, 0, np.array([[0, 1, 2, 3, 4], [1, 1, 0, 1, 2]]), hidden=2)
STEP = feeds(2, 1, 6, np.array([[6], [3]]), hidden=3)
CHUNK = feeds(1, 3, 6, np.array([[6, 7, 8]]))
CASES = (PROMPT, PADDED_PROMPT, STEP, CHUNK)


def results(model: ir.Model) -> list[dict[str, Array]]:
    return [run(model, one) for one in CASES]


def flattened() -> ir.Model:
    model = layer()
    assert FlattenAttention()(model).modified
    return model


def test_all_three_are_exact_and_idempotent(tmp_path: Path) -> None:
    model = layer()
    before = results(model)
    for one in (FlattenAttention(), RotaryInAttention(), PackProjections()):
        outcome = one(model)
        assert outcome.modified
        assert not outcome.changes.skipped
        content = serialized(model)
        assert not one(model).modified
        assert serialized(model) == content
        for want, got in zip(before, results(model), strict=True):
            assert_same(want, got, rtol=1e-6)
    counts = operator_counts(model)
    assert counts["MatMul"] == 3  # packed, angles, output
    assert counts["Reshape"] == 1  # the column of positions
    assert not {"Transpose", "com.microsoft.RotaryEmbedding"} & counts.keys()
    packed = model.graph.initializers["qkv_proj_weight"]
    assert isinstance(packed.const_value, ir.LazyTensor)
    assert packed.metadata_props[PACKED_FROM] == '["q_proj_weight", "k_proj_weight", "v_proj_weight"]'
    save_model(model, tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")
    again = load_model(tmp_path / "m.onnx")
    for want, got in zip(before, results(again), strict=True):
        assert_same(want, got, rtol=1e-6)
    # Control: with the angles of other positions the result is another.
    with pytest.raises(AssertionError):
        other = PROMPT | {"position_ids": PROMPT["position_ids"][:, ::-1].copy()}
        assert_same(before[0], run(again, other), rtol=1e-2)


def test_without_query_lengths_a_padded_prompt_is_wrong_as_documented() -> None:
    model = flattened()
    before = results(model)
    RotaryInAttention(padded_batches=False)(model)
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert len(attention.inputs) == 11
    after = results(model)
    for index in (0, 2, 3):
        assert_same(before[index], after[index], rtol=1e-6)
    with pytest.raises(AssertionError):
        assert_same(before[1], after[1], rtol=1e-2)


def replaced(*changes: tuple[str, str]) -> str:
    body = LAYER
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    return body


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ((("(kt, position_ids, cos, sin)", "(kt, position_ids, sin, cos)"),), "by different angles"),
        (
            (("kb = Transpose<perm = [0, 2, 1, 3]>(kr)", "kb = Transpose<perm = [0, 2, 1, 3]>(kt)"),),
            "only one",
        ),
        (
            (("sin = Sin(angles)", "double = Sin(angles) sin = Relu(double)"),),
            "computed in a way that no rule knows",
        ),
        ((("num_heads = 2>(kt", "num_heads = 2, interleaved = 1>(kt"),), "different interleaved"),
        ((("steps = Range(zero", "steps = Range(one"),), "computed in a way that no rule knows"),
    ],
)
def test_rotation_stays_outside_where_it_does_not_fit(
    changes: tuple[tuple[str, str], ...], reason: str
) -> None:
    model = layer(replaced(*changes))
    FlattenAttention()(model)
    content = serialized(model)
    outcome = RotaryInAttention()(model)
    assert not outcome.modified
    assert serialized(model) == content
    [said] = outcome.changes.skipped.values()
    assert reason in said


def test_rotation_stays_outside_for_heads_that_the_kernel_refuses() -> None:
    model = flattened()
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", 8)
    [said] = RotaryInAttention()(model).changes.skipped.values()
    assert said == "heads of size 8; with do_rotary the operator wants a multiple of 16"


def test_operands_that_are_not_flat_keep_their_rotation_outside() -> None:
    [said] = RotaryInAttention()(layer()).changes.skipped.values()
    assert said == "its operands are not flat (run flatten_attention first)"


def test_unknown_shapes_are_left_alone() -> None:
    model = layer(shapes={"qp": ["batch", "sequence", 64]})
    outcome = FlattenAttention()(model)
    assert not outcome.modified
    assert set(outcome.changes.skipped.values()) == {"the shape of its operand is not known"}


def test_a_reshape_to_another_shape_stays() -> None:
    """Three axes before and after, of other sizes: only a comparison of every axis tells."""
    model = graph(
        HEAD + "g (float[a, b, 6] x) => (float[a, b, 6] y, float[b, a, 6] z) { p = Reshape(x, four) "
        "q = Reshape(p, three) y = Relu(q) r = Reshape(p, swapped) z = Relu(r) }",
        four=np.array([2, 3, 2, 3]),
        three=np.array([2, 3, 6]),
        swapped=np.array([3, 2, 6]),
    )
    for node in model.graph:
        wanted = {"p": ["a", "b", 2, 3], "q": ["a", "b", 6], "r": ["b", "a", 6]}
        value = node.outputs[0]
        if value.name in wanted:
            value.shape, value.type = ir.Shape(wanted[value.name]), ir.TensorType(ir.DataType.FLOAT)
    x = {"x": np.arange(36, dtype=np.float32).reshape(2, 3, 6)}
    before = run(model, x)
    outcome = FlattenAttention()(model)
    assert outcome.changes.details == {"layout_nodes_before": 3, "layout_nodes_after": 2}
    assert_same(before, run(model, x))


def test_norms_of_heads_cost_one_reshape() -> None:
    body = replaced(
        ("qt = Transpose<perm = [0, 2, 1, 3]>(q4)", "qn = Tanh(q4) qt = Transpose<perm = [0, 2, 1, 3]>(qn)")
    )
    model = layer(body, SHAPES | {"qn": SHAPES["q4"]})
    before = results(model)
    FlattenAttention()(model)
    assert not RotaryInAttention()(model).changes.skipped
    for want, got in zip(before, results(model), strict=True):
        assert_same(want, got, rtol=1e-6)
    assert operator_counts(model)["Reshape"] == 3
    [said] = PackProjections()(model).changes.skipped.values()
    assert said == "an operand comes from Reshape, not from a MatMul with a constant weight"


def bias_of(name: str) -> str:
    return replaced(
        (
            f"{name}p = MatMul(x, {name}_proj_weight)",
            f"{name}m = MatMul(x, {name}_proj_weight) {name}p = Add({name}m, q_bias)",
        )
    )


def test_packing_takes_biases_along() -> None:
    biased = replaced(("qp = MatMul(x, q_proj_weight)", "qm = MatMul(x, q_proj_weight) qp = Add(qm, q_bias)"))
    model = layer(biased, SHAPES | {"qm": SHAPES["qp"]})
    before = results(model)
    for one in (FlattenAttention(), RotaryInAttention(), PackProjections()):
        assert one(model).modified
    for want, got in zip(before, results(model), strict=True):
        assert_same(want, got, rtol=1e-6)
    bias = model.graph.initializers["qkv_proj_weight.bias"].const_value
    assert bias is not None
    assert np.count_nonzero(bias.numpy()) == HEADS * SIZE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda model: model.graph.outputs.append(value_of(model, "kp")),
            "a projection is an output of the graph",
        ),
        (lambda model: share(model, "kp"), "a projection is used elsewhere"),
        (lambda model: share(model, "k_proj_weight"), "the weight 'k_proj_weight' is used elsewhere"),
    ],
)
def test_packing_refuses(change: Callable[[ir.Model], object], reason: str) -> None:
    model = flattened()
    RotaryInAttention()(model)
    change(model)
    outcome = PackProjections()(model)
    assert not outcome.modified
    assert list(outcome.changes.skipped.values()) == [reason]


def value_of(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def share(model: ir.Model, name: str) -> None:
    value = model.graph.initializers.get(name) or value_of(model, name)
    node = ir.node("Relu", [value])
    node.outputs[0].name, node.outputs[0].type = "extra", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([None] * 2)
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def test_gate_and_up_are_packed_on_request() -> None:
    random = np.random.default_rng(0)
    model = graph(
        HEAD + "g (float[batch, 6] x) => (float[batch, 8] y) { gate = MatMul(x, gate_proj_weight) "
        "s = Sigmoid(gate) up = MatMul(x, up_proj_weight) y = Mul(s, up) }",
        **{f"{n}_proj_weight": random.standard_normal((6, 8)).astype(np.float32) for n in ("gate", "up")},
    )
    x = {"x": random.standard_normal((3, 6)).astype(np.float32)}
    before = run(model, x)
    assert not PackProjections()(model).modified
    outcome = PackProjections(gate_up=True)(model)
    assert outcome.changes.details == {"packed": 1, "matmuls_removed": 1}
    assert operator_counts(model) == {"MatMul": 1, "Split": 1, "Sigmoid": 1, "Mul": 1}
    assert_same(before, run(model, x), rtol=1e-6)
    assert not PackProjections(gate_up=True)(model).modified


@pytest.fixture(scope="module")
def exported() -> ir.Model:
    """A decoder whose heads are wide enough for the kernel, through torch's exporter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from onnxsmith.exporters import LoadedModel, export, torch_program
    from onnxsmith.source import ModelSource, SourceKind

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    loaded = LoadedModel(module, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})
    return export(loaded, torch_program(loaded), attention="fused").main.model


def test_a_real_export_becomes_what_one_would_write_by_hand(exported: ir.Model) -> None:
    model = exported.clone()
    random = np.random.default_rng(0)
    given: dict[str, Array] = {
        "input_ids": random.integers(0, 64, (2, 4)),
        "attention_mask": np.array([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "position_ids": np.array([[0, 1, 2, 3], [1, 1, 0, 1]]),
    }
    for value in model.graph.inputs:
        if (value.name or "").startswith("past"):
            given[value.name or ""] = np.zeros((2, 2, 0, 16), np.float32)
    before = run(model, given)
    for name in ("transpose_weights", "cleanup", "fuse_transformer"):
        load_pass(name).create({})(model)
    for name in ("fuse_silu", "flatten_attention", "rotary_in_attention", "pack_projections"):
        outcome = load_pass(name).create({})(model)
        assert outcome.modified
        assert not outcome.changes.skipped
    assert_same(before, run(model, given), rtol=1e-5)
    counts = operator_counts(model)
    assert counts["com.microsoft.GroupQueryAttention"] == 2
    assert counts["com.microsoft.QuickGelu"] == 2
    # Of each layer: packed projections, output, gate, up, down; angles and head once.
    assert counts["MatMul"] == 2 * 5 + 2
    assert "Transpose" not in counts
    assert counts["Reshape"] == 1
