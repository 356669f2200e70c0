"""The pass to the kernels of this project: the same weights to the last bit, one node for five, refusals.

Without the kernels ONNX Runtime computes the functions that the pass writes, in float32: what they give is
compared with the nodes of before in float arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from generated_graphs import Array, graph, serialized
from onnxsmith.graph_passes import make_passes, run_passes
from onnxsmith.graph_passes.blocks import dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.contract import Changes
from onnxsmith.graph_passes.finer_activations import FinerActivations
from onnxsmith.graph_passes.minimums import FoldMinimums
from onnxsmith.graph_passes.packed_kernels import UsePackedKernels
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.graph_passes.shapes import InferShapes
from onnxsmith.graph_passes.transcoding import KeepGgufBlocks
from onnxsmith.graph_passes.weight_bits import weight_bits
from onnxsmith.packed_tiles import packed_rows, unpack_tiles, untile_values
from onnxsmith.runtime.weight_audit import audit_weights
from packed_matrices import Matrix
from test_gguf_blocks import raw_rows, values, write

COLUMNS = 128
FORMS: dict[str, dict[str, Any]] = {
    "minimums": {"bits": 4, "minimums": True},
    "half minimums": {"bits": 4, "minimums": True, "half_scales": True},
    "zero points": {"bits": 4},
    "half zero points": {"bits": 4, "half_scales": True},
    "symmetric": {"bits": 4, "symmetric": True},
    "8 bits": {"bits": 8, "symmetric": True, "half_scales": True},
    "8 bits, zero points": {"bits": 8},
    "8 bits, minimums": {"bits": 8, "minimums": True},
}


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(model: ir.Model, feeds: dict[str, Array], *, level: int = 1) -> dict[str, Array]:
    """What ONNX Runtime alone computes; products of blocks in floats, or with level 4 in integers."""
    copied = model.clone()
    for node in copied.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(serialized(copied), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_near(got: dict[str, Array], want: dict[str, Array], rtol: float = 4e-6) -> None:
    assert list(got) == list(want) and want
    for name, expected in want.items():
        assert got[name].shape == expected.shape and got[name].dtype == expected.dtype
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=rtol * scale, err_msg=name)


def packed(model: ir.Model, **options: Any) -> Changes:
    changes = UsePackedKernels(**options)(model).changes
    if changes.count:
        onnx.checker.check_model(ir.to_proto(model))
    return changes


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def arrays(node: ir.Node) -> list[Array | None]:
    """The operands behind the first, as they would be stored."""
    found: list[Array | None] = []
    for value in node.inputs[1:]:
        if value is None:
            found.append(None)
            continue
        assert value.is_initializer() and value.const_value is not None
        array = value.const_value.numpy()
        assert tuple(array.shape) == tuple(value.const_value.shape.numpy())
        assert array.dtype == value.const_value.dtype.numpy()
        found.append(array)
    return [*found, *[None] * (4 - len(found))]


def weight(node: ir.Node) -> Array:
    """What a weight stands for, in float32; packed and multiplied by the tests' own code it is the same."""
    codes, scales, offsets, _ = arrays(node)
    assert codes is not None and scales is not None
    bits, rows, size = (node.attributes[name].as_int() for name in ("bits", "N", "block_size"))
    matrix = Matrix(
        unpack_tiles(codes, bits, rows),
        untile_values(scales, rows),
        None if offsets is None else untile_values(offsets, rows),
        bits,
        size,
    )
    for name, array in matrix.inputs().items():
        np.testing.assert_array_equal(array, {"B": codes, "scales": scales, "offsets": offsets}[name])
    got = np.concatenate([part for _, part in packed_rows(codes, scales, offsets, bits=bits, rows=rows)])
    np.testing.assert_allclose(got, matrix.weight(), rtol=0, atol=1e-6 * np.abs(got).max())
    return got


def rounded(matrix: Array, form: dict[str, Any], size: int) -> Array:
    """A matrix (N, K) as the form holds it."""
    kind = np.float16 if form.get("half_scales") else np.float32
    return dequantize_blocks(
        quantize_blocks(
            matrix, bits=form["bits"], block_size=size, symmetric=form.get("symmetric", False),
            minimums=form.get("minimums", False), search_steps=20, scale_type=kind,
        )
    )  # fmt: skip


def product(form: dict[str, Any], size: int = 32) -> ir.Model:
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[m, s, {COLUMNS}] x) => (float[m, s, 24] y) '
        "{ y = MatMul(x, w) }",
        w=random(COLUMNS, 24),
    )
    QuantizeWeights(**form, block_size=size, search_steps=20)(model)
    return model


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", FORMS)
def test_weights_stay_what_they_are(name: str, size: int) -> None:
    form = FORMS[name]
    model = product(form, size)
    x = {"x": random(2, 3, COLUMNS, seed=1)}
    before = outputs(model, x)
    changes = packed(model)
    assert changes.count == 1 and not changes.skipped
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("onnxsmith", "MatMulPacked")
    assert model.opset_imports["onnxsmith"] == 1
    np.testing.assert_array_equal(weight(node), rounded(random(COLUMNS, 24).T, form, size))
    scales, offsets = arrays(node)[1:3]
    assert scales is not None and scales.dtype == (np.float16 if "half_scales" in form else np.float32)
    if form.get("symmetric"):
        assert offsets is None
    else:
        assert offsets is not None
        assert offsets.dtype == (scales.dtype if form.get("minimums") else np.uint8)
    assert node.outputs[0].name == "y" and node.outputs[0].is_graph_output()
    assert_near(outputs(model, x), before)
    # Control: another scale would be seen.
    value = node.inputs[2]
    assert value is not None
    value.const_value = ir.tensor(scales * scales.dtype.type(1.01), name=value.name)
    assert np.abs(outputs(model, x)["y"] - before["y"]).max() > 1e-3 * np.abs(before["y"]).max()
    assert packed(model).count == 0


@pytest.mark.parametrize("name", FORMS)
def test_an_embedding_shares_the_weight_of_the_head(name: str) -> None:
    form = FORMS[name] | {"embedding_block_size": 16, "block_size": 32}
    text = f"""<ir_version: 9, opset_import: ["": 18]>
    g (int64[b, s] ids, float[b, s, {COLUMNS}] x) => (float[b, s, {COLUMNS}] e, float[b, s, n] y) {{
      e = Gather(table, ids)
      t = Transpose<perm = [1, 0]>(table)
      y = MatMul(x, t)
    }}"""
    model = graph(text, table=random(41, COLUMNS))
    QuantizeWeights(**form, search_steps=20)(model)
    feeds = {"ids": np.array([[0, 40, 7], [16, 15, 3]]), "x": random(2, 3, COLUMNS, seed=1)}
    before = outputs(model, feeds)
    changes = packed(model)
    assert (changes.details["products"], changes.details["lookups"]) == (1, 1)
    nodes = {node.op_type: node for node in model.graph}
    assert set(nodes) == {"GatherPacked", "MatMulPacked"}
    assert list(nodes["GatherPacked"].inputs[1:]) == list(nodes["MatMulPacked"].inputs[1:])
    assert len(model.graph.initializers) == (2 if form.get("symmetric") else 3)
    np.testing.assert_array_equal(weight(nodes["GatherPacked"]), rounded(random(41, COLUMNS), form, 16))
    after = outputs(model, feeds)
    assert_near(after, before)
    np.testing.assert_array_equal(after["e"], weight(nodes["GatherPacked"])[feeds["ids"]])
    (counted,) = weight_bits(model)
    assert (counted["bits"], counted["values"]) == (form["bits"], 41 * COLUMNS)


@pytest.mark.parametrize("adding", ["Add(y0, b)", "Add(b, y0)", "Sum(y0, b)"])
@pytest.mark.parametrize("name", ["minimums", "symmetric"])
def test_a_bias_goes_into_the_product(name: str, adding: str) -> None:
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[m, {COLUMNS}] x) => (float[m, 24] y) '
        f"{{ y0 = MatMul(x, w) y = {adding} }}",
        w=random(COLUMNS, 24), b=random(24, seed=3),
    )  # fmt: skip
    QuantizeWeights(**FORMS[name], block_size=32)(model)
    x = {"x": random(5, COLUMNS, seed=1)}
    before = outputs(model, x)
    packed(model)
    (node,) = model.graph
    np.testing.assert_array_equal(arrays(node)[3], random(24, seed=3))
    assert_near(outputs(model, x), before)


def test_a_bias_in_a_longer_sum_goes_into_one_product() -> None:
    """As where a residual is added, too; of two products the first gets it."""
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[m, {COLUMNS}] x, float[m, 24] r) => '
        "(float[m, 24] y, float[m, 24] z) "
        "{ p = MatMul(x, w) y = Sum(r, p, b) q = MatMul(x, v) s = MatMul(x, u) z = Sum(q, b, s) }",
        w=random(COLUMNS, 24), v=random(COLUMNS, 24, seed=1), u=random(COLUMNS, 24, seed=2),
        b=random(24, seed=3),
    )  # fmt: skip
    QuantizeWeights(bits=4, block_size=32, minimums=True)(model)
    feeds = {"x": random(5, COLUMNS, seed=1), "r": random(5, 24, seed=8)}
    before = outputs(model, feeds)
    packed(model)
    assert sorted(kinds(model)) == ["MatMulPacked"] * 3 + ["Sum"] * 2
    assert [len(node.inputs) for node in model.graph if node.op_type == "Sum"] == [2, 2]
    biases = [arrays(node)[3] is not None for node in model.graph if node.op_type == "MatMulPacked"]
    assert sorted(biases) == [False, True, True]
    assert_near(outputs(model, feeds), before)


def test_blocks_of_activations_are_smaller_where_there_is_a_cache(tiny_package: Any) -> None:
    model = product({"bits": 4})
    assert packed(model).details["arithmetic"].endswith("blocks of 32")
    assert model.graph[0].attributes["activation_block"].as_int() == 32
    model = product({"bits": 4})
    for columns in (16, 64, 128):
        model = product({"bits": 4})
        packed(model, activation_block=columns)
        assert model.graph[0].attributes["activation_block"].as_int() == columns
    specs = [("quantize_weights", {"bits": 4}), ("use_packed_kernels", {})]
    decoder = run_passes(tiny_package, make_passes(specs))
    assert decoder.steps[-1].details["arithmetic"].endswith("blocks of 16")


GATES = {
    "silu": "a = com.microsoft.QuickGelu<alpha = 1.0>(g) y0 = Mul(a, u)",
    "silu ": "s = Sigmoid(g) a = Mul(g, s) y0 = Mul(u, a)",
    "gelu": "a = com.microsoft.Gelu(g) y0 = Mul(a, u)",
    "gelu_tanh": "a = com.microsoft.FastGelu(g) y0 = Mul(u, a)",
    "gelu_tanh ": "a = com.microsoft.FastGelu(g, b) y0 = Mul(u, a)",
    "gelu_tanh  ": 'a = Gelu<approximate = "tanh">(g) y0 = Mul(u, a)',
    "gelu ": "a = Gelu(g) y0 = Mul(u, a)",
}


def gate(body: str, rows: int = 48, **weights: Array) -> ir.Model:
    given = {"wg": random(COLUMNS, rows), "wu": random(COLUMNS, rows, seed=2), "b": random(rows, seed=5)}
    text = f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
    f (float[m, s, {COLUMNS}] x) => (float[m, s, {rows}] y) {{
      g = MatMul(x, wg)
      u = MatMul(x, wu)
      {body}
      y = Identity(y0)
    }}"""
    return graph(text, **{name: array for name, array in (given | weights).items() if name in text})


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("activation", GATES)
def test_gate_and_up_become_one_product(activation: str, name: str) -> None:
    model = gate(GATES[activation])
    QuantizeWeights(**FORMS[name], block_size=32, search_steps=20)(model)
    x = {"x": random(2, 3, COLUMNS, seed=1)}
    before = outputs(model, x)
    changes = packed(model)
    assert changes.details["gates"] == 1 and not changes.skipped
    assert kinds(model) == ["MatMulPacked", "Identity"]
    node = model.graph[0]
    assert node.attributes["activation"].as_string() == activation.strip()
    assert node.attributes["N"].as_int() == 96
    both = np.concatenate([random(COLUMNS, 48).T, random(COLUMNS, 48, seed=2).T])
    np.testing.assert_array_equal(weight(node), rounded(both, FORMS[name], 32))
    bias = arrays(node)[3]
    if activation == "gelu_tanh ":
        assert bias is not None
        np.testing.assert_array_equal(bias, np.concatenate([random(48, seed=5), np.zeros(48, np.float32)]))
    else:
        assert bias is None
    assert_near(outputs(model, x), before, rtol=2e-5)


def test_biases_of_gate_and_up() -> None:
    body = "gb = Add(g, b) ub = Add(u, c) a = com.microsoft.QuickGelu<alpha = 1.0>(gb) y0 = Mul(a, ub)"
    model = gate(body, c=random(48, seed=6))
    QuantizeWeights(bits=8, block_size=32, symmetric=True)(model)
    x = {"x": random(2, 3, COLUMNS, seed=1)}
    before = outputs(model, x)
    packed(model)
    assert kinds(model) == ["MatMulPacked", "Identity"]
    assert_near(outputs(model, x), before, rtol=2e-5)


@pytest.mark.parametrize(
    ("body", "rows", "reason"),
    [
        ("a = com.microsoft.QuickGelu<alpha = 1.0>(g) y0 = Mul(a, u)", 40, "multiple of 16"),
        ("a = com.microsoft.QuickGelu<alpha = 1.0>(g) y1 = Mul(a, u) y0 = Add(y1, g)", 48, "read elsewhere"),
        ("a = com.microsoft.QuickGelu<alpha = 1.0>(g) y1 = Mul(a, u) y0 = Add(y1, u)", 48, "read elsewhere"),
        ("a = com.microsoft.QuickGelu<alpha = 1.702>(g) y0 = Mul(a, u)", 48, ""),
        ("a = Relu(g) y0 = Mul(a, u)", 48, ""),
        ("y0 = Mul(g, u)", 48, ""),
    ],
)
def test_what_is_no_gate_stays_two_products(body: str, rows: int, reason: str) -> None:
    model = gate(body, rows)
    QuantizeWeights(bits=4, block_size=32, minimums=True)(model)
    x = {"x": random(2, 3, COLUMNS, seed=1)}
    before = outputs(model, x)
    changes = packed(model)
    assert changes.details["gates"] == 0 and kinds(model).count("MatMulPacked") == 2
    assert [reason in text for text in changes.skipped.values()] == ([True] if reason else [])
    assert_near(outputs(model, x), before, rtol=2e-5)


def test_gates_of_two_formats_stay_apart() -> None:
    model = gate(GATES["silu"])
    QuantizeWeights(bits=4, block_size=32, overrides={"wu": {"bits": 8}})(model)
    changes = packed(model)
    assert list(changes.skipped.values()) == [
        "its weights have different formats: 4 bits in blocks of 32, zero points; "
        "8 bits in blocks of 32, zero points"
    ]


def attention(form: dict[str, Any], *, overrides: Any = None, biased: bool = True) -> ir.Model:
    """Query, key and value of 4 and 2 heads of 16 numbers, each with its bias or one without."""
    body = "qb = Add(q, bq) vb = Add(v, bv)" if biased else "qb = Identity(q) vb = Identity(v)"
    if not biased:
        body = ""
    names = ("qb", "k", "vb") if biased else ("q", "k", "v")
    text = f"""<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>
    f (float[1, s, {COLUMNS}] x, int32[1, 1] last, int32[1] total, float[1, 2, p, 16] pk,
      float[1, 2, p, 16] pv) => (float[1, s, 64] y, float[1, 2, t, 16] nk, float[1, 2, t, 16] nv) {{
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      {body}
      y, nk, nv = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>({", ".join(names)},
        pk, pv, last, total)
    }}"""
    given = {
        "wq": random(COLUMNS, 64), "wk": random(COLUMNS, 32, seed=1), "wv": random(COLUMNS, 32, seed=2),
        "bq": random(64, seed=3), "bv": random(32, seed=4),
    }  # fmt: skip
    model = graph(text, **{name: array for name, array in given.items() if f" {name})" in text})
    QuantizeWeights(**form, block_size=32, search_steps=20, overrides=overrides)(model)
    return model


ATTENDED = {
    "x": random(1, 5, COLUMNS, seed=9),
    "last": np.array([[4]], np.int32),
    "total": np.array([5], np.int32),
    "pk": np.zeros((1, 2, 0, 16), np.float32),
    "pv": np.zeros((1, 2, 0, 16), np.float32),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ["half minimums", "zero points", "8 bits"])
def test_query_key_and_value_become_one_product(name: str, biased: bool) -> None:
    model = attention(FORMS[name], biased=biased)
    before = outputs(model, ATTENDED)
    changes = packed(model)
    assert changes.details["joined"] == 1 and not changes.skipped
    assert kinds(model) == ["MatMulPacked", "GroupQueryAttention"]
    assert model.graph[1].inputs[1] is None and model.graph[1].inputs[2] is None
    assert_near(outputs(model, ATTENDED), before, rtol=1e-5)


def test_operands_of_two_formats_keep_their_own() -> None:
    """As in files with 4 bits for queries and keys, and more for values."""
    model = attention(FORMS["minimums"], overrides={"wv": {"bits": 8, "minimums": False, "symmetric": True}})
    before = outputs(model, ATTENDED)
    changes = packed(model)
    assert changes.details["joined"] == 0 and kinds(model).count("MatMulPacked") == 3
    assert len(changes.skipped) == 1
    assert next(iter(changes.skipped.values())).startswith("its weights have different formats")
    assert_near(outputs(model, ATTENDED), before, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        (
            {"accuracy_level": 1},
            None,
            "its accuracy_level is 1: activations are not rounded there; expected 4",
        ),
        ({"bits": 2}, None, "codes of 2 bits; expected 4 or 8"),
        (
            {"minimums": True},
            FoldMinimums(),
            "it is for block sums behind its input, as fold_minimums has them",
        ),
        (
            {"minimums": True, "block_size": 64},
            FinerActivations(after="any", block_size=32),
            "what is added to its blocks is of blocks of another size",
        ),
    ],
)
def test_it_refuses_and_says_why(form: dict[str, Any], change: Any, reason: str) -> None:
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[m, 2, {COLUMNS}] x) => (float[m, 2, 24] y) '
        "{ y = MatMul(x, w) }",
        w=random(COLUMNS, 24),
    )
    QuantizeWeights(**{"bits": 4, "block_size": 32} | form)(model)
    if change is not None:
        change(model)
    before = serialized(model)
    changes = packed(model)
    assert changes.count == 0 and serialized(model) == before
    assert any(text.startswith(reason) for text in changes.skipped.values()), changes.skipped


def test_rows_that_blocks_of_activations_do_not_divide() -> None:
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g (float[m, 48] x) => (float[m, 24] y) { y = MatMul(x, w) }',
        w=random(48, 24),
    )
    QuantizeWeights(bits=4, block_size=16)(model)
    assert list(packed(model).skipped.values()) == ["rows of 48; expected a multiple of 32"]


def test_a_weight_goes_over_with_all_that_reads_it() -> None:
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[m, {COLUMNS}] x) => '
        "(float[m, 24] y, float[m, 24] z) "
        "{ y = MatMul(x, w) h = Neg(x) z = MatMul(h, w) }",
        w=random(COLUMNS, 24),
    )
    QuantizeWeights(bits=4, block_size=32)(model)
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(nodes) == 2
    changes = packed(model.clone(), skip_nodes=(nodes[0].name or "",))
    assert changes.count == 0 and len(changes.skipped) == 2
    assert "reads its weight too, and stays: skip_nodes has" in changes.skipped[nodes[1].name or ""]
    assert packed(model).count == 2
    assert len(model.graph.initializers) == 3


def test_zero_points_that_finer_activations_set_are_of_no_account() -> None:
    model = product({"bits": 4, "minimums": True})
    FinerActivations(block_size=32)(model)
    assert any(node.op_type == "MatMulNBits" and len(node.inputs) > 3 for node in model.graph)
    assert packed(model).count == 1
    np.testing.assert_array_equal(
        weight(model.graph[0]), rounded(random(COLUMNS, 24).T, {"bits": 4, "minimums": True}, 32)
    )


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]
)
def test_blocks_of_a_gguf_file(kind: str, tmp_path: Path) -> None:
    table, query = raw_rows(kind, 20), raw_rows(kind, 18, seed=5)
    path = write(tmp_path / "m.gguf", embd=(kind, table), q=(kind, query))
    model = graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (int64[b, s] ids, float[b, s, 256] x) => (float[b, s, 256] e, float[b, s, n] head,
          float[b, s, 18] q) {
          e = Gather(table, ids)
          t = Transpose<perm = [1, 0]>(table)
          head = MatMul(x, t)
          q = MatMul(x, wq)
        }""",
        table=values(kind, table), wq=np.ascontiguousarray(values(kind, query).T),
    )  # fmt: skip
    feeds = {"ids": np.array([[9, 0, 19]]), "x": random(1, 3, 256)}
    before = outputs(model, feeds)
    KeepGgufBlocks(gguf=str(path))(model)
    changes = packed(model)
    assert changes.count == 3 and not changes.skipped
    found = {node.outputs[0].name: node for node in model.graph}
    np.testing.assert_array_equal(weight(found["head"]), values(kind, table))
    np.testing.assert_array_equal(weight(found["e"]), values(kind, table))
    np.testing.assert_array_equal(weight(found["q"]), values(kind, query))
    assert_near(outputs(model, feeds), before)


def test_shapes_go_through() -> None:
    model = gate(GATES["silu"])
    QuantizeWeights(bits=4, block_size=32)(model)
    packed(model)
    value = model.graph[0].outputs[0]
    value.shape = None
    InferShapes()(model)
    value = model.graph[0].outputs[0]
    assert value.shape is not None and [str(axis) for axis in value.shape] == ["m", "s", "48"]


def test_cleaning_leaves_the_nodes_and_lowering_takes_the_functions_along(tiny_package: Any) -> None:
    specs = [
        ("quantize_weights", {"bits": 4, "block_size": 16, "minimums": True}),
        ("use_packed_kernels", {}),
        ("fuse_transformer", {}),
        ("cleanup", {}),
        ("to_float32", {}),
        ("convert_opset", {"version": 21}),
        ("strip_metadata", {}),
        ("lower_opset", {}),
        ("lower_ir_version", {}),
        ("infer_shapes", {}),
    ]
    package = run_passes(tiny_package, make_passes(specs))
    model = package.main.model
    assert package.precision == "int4"
    nodes = [node for node in model.graph if node.domain == "onnxsmith"]
    assert nodes and not any(node.op_type == "MatMulNBits" for node in model.graph.all_nodes())
    assert {node.op_identifier() for node in nodes} == set(model.functions)
    assert model.ir_version >= 10
    for function in model.functions.values():
        assert function.opset_imports[""] == model.opset_imports[""]
    (step,) = (step for step in package.steps if step.name == "use_packed_kernels")
    assert step.details["needs"].startswith("the kernels of onnxsmith")


@pytest.mark.parametrize("name", ["half minimums", "zero points", "8 bits"])
def test_a_wrong_scale_is_found(name: str) -> None:
    text = f"""<ir_version: 9, opset_import: ["": 18]>
    g (int64[b] ids, float[b, {COLUMNS}] x) => (float[b, {COLUMNS}] e, float[b, 24] y) {{
      e = Gather(table, ids)
      y = MatMul(x, w)
    }}"""
    weights = {"table": random(41, COLUMNS), "w": random(COLUMNS, 24)}
    model = graph(text, **weights)
    QuantizeWeights(**FORMS[name], block_size=32, search_steps=20)(model)
    packed(model)

    def reference(weight: str) -> Array | None:
        return weights["table"] if weight.startswith("table") else weights["w"]

    for node in model.graph:
        assert audit_weights(node, reference) == ""
        scales, value = arrays(node)[1], node.inputs[2]
        assert scales is not None and value is not None
        scales[1, 2, 5] *= 3
        value.const_value = ir.tensor(scales, name=value.name)
        found = audit_weights(node, reference)
        assert "(block 2 of row 21)" in found, found
