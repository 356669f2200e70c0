"""Float32 products by the kernels of this project: those of float64 within what float32 may lose; refusals.

What a graph computes is run three times: by ONNX Runtime before the pass, by the functions that the pass
writes for runtimes without the library, and by the library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from generated_graphs import Array, graph, serialized
from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.contract import Changes
from onnxsmith.graph_passes.float_kernels import UseFloatKernels
from onnxsmith.graph_passes.own_norms import NormsInProducts
from onnxsmith.graph_passes.shapes import InferShapes
from onnxsmith.graph_passes.weight_bits import weight_bits
from onnxsmith.package import ModelPackage
from onnxsmith.packed_tiles import tile_floats, untile_values
from onnxsmith.runtime import OrtSession, cases_for, value_limits
from onnxsmith.runtime.weight_audit import audit_weights
from onnxsmith.source import ModelSource
from packed_matrices import ACTIVATIONS
from test_kernel_presets import own, plain_runtime, saved

COLUMNS = 100
EPSILON = float(np.finfo(np.float32).eps)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(model: ir.Model, **options: Any) -> Changes:
    changes = UseFloatKernels(**options)(model).changes
    if changes.count:
        onnx.checker.check_model(ir.to_proto(model))
    return changes


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def outputs(model: ir.Model, feeds: dict[str, Array], library: Path | None = None) -> dict[str, Array]:
    """What ONNX Runtime computes, with the library or without."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_alike(model: ir.Model, before: dict[str, Array], feeds: dict[str, Array], kernels: Path) -> None:
    """By functions and by kernels; the bits of the two may differ, and do somewhere."""
    by_function, by_kernel = outputs(model, feeds), outputs(model, feeds, kernels)
    for name, want in before.items():
        scale = np.abs(want).max()
        assert scale > 0
        for got in (by_function[name], by_kernel[name]):
            assert got.shape == want.shape and got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * scale, err_msg=name)


def product(body: str, rows: int, columns: int = COLUMNS, **weights: Array) -> ir.Model:
    given = {"w": random(columns, rows), "b": random(rows, seed=3)} | weights
    text = f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
    g (float[m, s, {columns}] x) => (float[m, s, n] y) {{ {body} }}"""
    return graph(text, **{name: array for name, array in given.items() if name in body})


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (24, 100), (40, 17), (64, 64), (333, 48)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 9), (1, 70), (0, 5)])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_products_are_those_of_float64(
    rows: int, columns: int, shape: tuple[int, int], activation: str, kernels: Path
) -> None:
    bodies = {
        "none": "y = Identity(h)",
        "silu": "y = com.microsoft.QuickGelu<alpha = 1.0>(h)",
        "gelu": "y = Gelu(h)",
        "gelu_tanh": "y = com.microsoft.FastGelu(h)",
    }
    model = product(f"h0 = MatMul(x, w) h = Add(h0, b) {bodies[activation]}", rows, columns)
    assert packed(model).count == 1
    x = random(*shape, columns, seed=1)
    exact = x.astype(np.float64) @ random(columns, rows).astype(np.float64) + random(rows, seed=3)
    wanted = exact if activation == "none" else ACTIVATIONS[activation](exact)
    # Half a unit for each addition, of what is added up; no slope of an activation is over 1.13.
    added = np.abs(x) @ np.abs(random(columns, rows)) + np.abs(random(rows, seed=3))
    most = EPSILON * (columns / 2 + 4) * added
    for library in (None, kernels):
        got = outputs(model, {"x": x}, library)["y"]
        assert got.shape == (*shape, rows)
        assert (np.abs(got - wanted) <= 1.13 * most + 4 * EPSILON * np.abs(wanted)).all()


def test_a_wrong_weight_is_seen(kernels: Path) -> None:
    model = product("y = MatMul(x, w)", 40)
    x = {"x": random(1, 3, COLUMNS, seed=1)}
    before = outputs(model, x)["y"]
    packed(model)
    tiles = model.graph[0].inputs[1]
    assert tiles is not None and tiles.const_value is not None
    array = tiles.const_value.numpy().copy()
    array[1, 5, 3] += 1
    tiles.const_value = ir.tensor(array, name=tiles.name)
    for library in (None, kernels):
        moved = np.abs(outputs(model, x, library)["y"] - before).max(axis=(0, 1)) > 1e-3
        assert np.flatnonzero(moved).tolist() == [19]


@pytest.mark.parametrize("turned", [False, True])
def test_tiles_hold_the_weight(turned: bool) -> None:
    matrix = random(COLUMNS, 37)
    text = "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)" if turned else "y = MatMul(x, w)"
    model = product(text, 37, w=np.ascontiguousarray(matrix.T) if turned else matrix)
    assert packed(model).count == 1
    (node,) = model.graph
    tiles = node.inputs[1]
    assert tiles is not None and tiles.const_value is not None and len(node.inputs) == 2
    array = tiles.const_value.numpy()
    assert array.shape == (3, COLUMNS, 16) and array.dtype == np.float32
    np.testing.assert_array_equal(untile_values(array, 37), matrix.T)
    assert array[1, 7, 2] == matrix[7, 18] and not array[2, :, 5:].any()
    np.testing.assert_array_equal(tile_floats([matrix.T[:20], matrix.T[20:]], 37, COLUMNS), array)
    (counted,) = weight_bits(model)
    assert (counted["bits"], counted["values"]) == (32, 37 * COLUMNS)
    assert audit_weights(node, lambda _: matrix) == ""
    array = array.copy()
    array[1, 7, 2] += 3
    tiles.const_value = ir.tensor(array, name=tiles.name)
    assert "at [18, 7]" in audit_weights(node, lambda _: matrix)
    # A second run finds nothing.
    assert packed(model).count == 0


@pytest.mark.parametrize(
    ("body", "operators", "activation"),
    [
        ("h = MatMul(x, w) y = Add(b, h)", ["MatMulPacked"], "none"),
        ("h = MatMul(x, w) y = Sum(h, b)", ["MatMulPacked"], "none"),
        ("h = com.microsoft.FusedMatMul<alpha = 1.0>(x, w) y = Add(h, b)", ["MatMulPacked"], "none"),
        ("h = MatMul(x, w) s = Sigmoid(h) y = Mul(s, h)", ["MatMulPacked"], "silu"),
        ("h = MatMul(x, w) y = com.microsoft.Gelu(h)", ["MatMulPacked"], "gelu"),
        ('h = MatMul(x, w) y = Gelu<approximate = "tanh">(h)', ["MatMulPacked"], "gelu_tanh"),
        ("h = MatMul(x, w) y = com.microsoft.FastGelu(h, b)", ["MatMulPacked"], "gelu_tanh"),
        ("h = MatMul(x, w) a = Gelu(h) y = Add(a, h)", ["MatMulPacked", "Gelu", "Add"], "none"),
        ("h = MatMul(x, w) s = Sigmoid(h) a = Mul(s, h) y = Add(a, s)",
         ["MatMulPacked", "Sigmoid", "Mul", "Add"], "none"),
        ("h = MatMul(x, w) y = com.microsoft.QuickGelu<alpha = 1.702>(h)",
         ["MatMulPacked", "QuickGelu"], "none"),
        ("h = MatMul(x, w) y = Relu(h)", ["MatMulPacked", "Relu"], "none"),
        ("h = MatMul(x, w) r = MatMul(x, v) y = Sum(h, r, b)",
         ["MatMulPacked", "MatMulPacked", "Sum"], "none"),
    ],
)  # fmt: skip
def test_what_goes_into_a_product(body: str, operators: list[str], activation: str, kernels: Path) -> None:
    model = product(body, 24, v=random(COLUMNS, 24, seed=7))
    x = {"x": random(2, 9, COLUMNS, seed=1)}
    before = outputs(model, x)
    changes = packed(model)
    assert kinds(model) == operators and not changes.skipped
    assert model.graph[0].attributes["activation"].as_string() == activation
    assert ("b" in body) == (len(model.graph[0].inputs) == 5)
    assert changes.details["activations"] == (activation != "none")
    assert_alike(model, before, x, kernels)


@pytest.mark.parametrize(
    ("body", "operators", "reason"),
    [
        ("y = Gemm(x, w, b)", ["MatMulPacked"], ""),
        ("h = Gemm<transB = 1>(x, v) y = Gelu(h)", ["MatMulPacked"], ""),
        ("y = Gemm<alpha = 0.5>(x, w, b)", ["Gemm"], "has factors"),
        ("y = Gemm<transA = 1>(t, w)", ["Gemm"], "turns its first operand"),
        ("y = Gemm(x, w, c)", ["Gemm"], "no constant of 24 numbers"),
    ],
)
def test_gemm(body: str, operators: list[str], reason: str, kernels: Path) -> None:
    given = {"w": random(COLUMNS, 24), "v": random(24, COLUMNS, seed=4), "b": random(24), "c": random(1, 24)}
    model = graph(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[m, {COLUMNS}] x, float[{COLUMNS}, m] t) => (float[m, 24] y) {{ {body} }}""",
        **{name: array for name, array in given.items() if f", {name}" in body},
    )
    x = random(9, COLUMNS, seed=1)
    feeds = {"x": x, "t": np.ascontiguousarray(x.T)}
    before = outputs(model, feeds)
    changes = packed(model)
    assert kinds(model) == operators
    assert [reason in text for text in changes.skipped.values()] == ([True] if reason else [])
    assert_alike(model, before, feeds, kernels)


def test_gate_and_up_become_one_product(kernels: Path) -> None:
    body = """h = MatMul(x, w) g = Add(h, b) u = MatMul(x, v) a = com.microsoft.QuickGelu<alpha = 1.0>(g)
    y = Mul(a, u)"""
    model = product(body, 48, v=random(COLUMNS, 48, seed=7))
    x = {"x": random(2, 9, COLUMNS, seed=1)}
    before = outputs(model, x)
    changes = packed(model)
    assert kinds(model) == ["MatMulPacked"] and changes.details["gates"] == 1
    assert model.graph[0].attributes["N"].as_int() == 96
    assert_alike(model, before, x, kernels)


@pytest.mark.parametrize(
    ("body", "weights", "options", "reason"),
    [
        ("h = MatMul(x, w) y = Neg(h)", {}, {"skip_nodes": ("w",)}, "skip_nodes has 'w'"),
        ("y = MatMul(x, w)", {"w": random(COLUMNS, 15)}, {}, "15 x 100 is too small for tiles of 16"),
        ("y = com.microsoft.FusedMatMul<alpha = 2.0>(x, w)", {}, {}, "scales by 2"),
        ("h = MatMul(x, w) t = Identity(w) s = ReduceSum(t) y = Add(h, s)", {}, {}, "would be stored twice"),
        ("y = MatMul(x, w)", {"w": random(2, COLUMNS, 24)}, {}, "the weight has 3 axes"),
    ],
)
def test_what_stays(body: str, weights: dict[str, Array], options: dict[str, Any], reason: str) -> None:
    model = product(body, 24, **weights)
    before = serialized(model)
    changes = packed(model, **options)
    assert changes.count == 0 and serialized(model) == before
    (text,) = changes.skipped.values()
    assert reason in text


def test_a_head_that_is_the_embedding_too_stays_one_weight() -> None:
    text = """<ir_version: 9, opset_import: ["": 18]>
    g (int64[b, s] ids) => (float[b, s, n] y, float[b, s, 24] z) {
      e = Gather(table, ids)
      t = Transpose<perm = [1, 0]>(table)
      y = MatMul(e, t)
      z = MatMul(e, w)
    }"""
    model = graph(text, table=random(41, COLUMNS), w=random(COLUMNS, 24))
    changes = packed(model)
    assert changes.count == 1 and kinds(model).count("MatMulPacked") == 1
    (reason,) = changes.skipped.values()
    assert "reads its weight too, which would be stored twice" in reason
    assert len(model.graph.initializers) == 2


@pytest.mark.parametrize(("columns", "moved"), [(64, True), (40, False)])
def test_norms_go_into_products(columns: int, moved: bool, kernels: Path) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
    g (float[m, s, {columns}] x, float[m, s, {columns}] r) => (float[m, s, 24] y, float[m, s, n] total) {{
      normed, d1, d2, total = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.00001>(x, r, scale)
      y = MatMul(normed, w)
    }}"""
    model = graph(text, scale=random(columns, seed=5), w=random(columns, 24))
    feeds = {"x": random(2, 9, columns, seed=1), "r": random(2, 9, columns, seed=2)}
    before = outputs(model, feeds)
    InferShapes()(model)
    packed(model)
    changes = NormsInProducts()(model).changes
    assert changes.count == moved
    assert moved or "40 columns; expected a multiple of 16" in next(iter(changes.skipped.values()))
    assert_alike(model, before, feeds, kernels)


def assert_agrees(exact: ModelPackage, made: ModelPackage, directory: Path, output: str) -> None:
    """Three runtimes of one model: ONNX Runtime's operators, the functions, the kernels."""
    with OrtSession(exact, threads=1) as reference, OrtSession(made, threads=1) as candidate:
        cases = list(cases_for(reference, limits=value_limits(exact), samples=4, seed=0))
        expected = [reference.run(case.feeds)[output] for case in cases]
        by_kernels = [candidate.run(case.feeds)[output] for case in cases]
    functions = [one[output] for one in plain_runtime(made, cases, directory)]
    for case, want, *found in zip(cases, expected, by_kernels, functions, strict=True):
        kept = slice(None) if case.tokens is None else case.tokens[:, -want.shape[1] :]
        for got in found:
            atol = 2e-5 * np.abs(want[kept]).max()
            np.testing.assert_allclose(got[kept], want[kept], rtol=0, atol=atol, err_msg=case.name)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", "gemma", "llama"])
def test_decoders(name: str, tmp_path: Path, tiny_llama_dir: Path, kernels: Path) -> None:
    loaded = load_torch(ModelSource.parse(str(saved(name, tmp_path / "model", tiny_llama_dir))))
    exported = export(loaded, torch_program(loaded))
    exact = run_passes(exported, make_passes(PRESETS["cpu-fp32"]))
    made = run_passes(exported, make_passes(PRESETS["cpu-fp32-kernels"]))
    assert made.precision == "float32"
    # Attention with biases in its scores is exported as standard operators.
    assert name == "opt" or own(made).count("GroupQueryAttention") == 2
    (step,) = (step for step in made.steps if step.name == "use_float_kernels")
    if name in ("qwen2", "llama"):
        assert (step.details["gates"], step.details["joined"]) == (2, 2)
        assert "NormMatMulPacked" in own(made)
    assert step.details["activations"] == (2 if name == "gpt2" else 0)
    assert_agrees(exact, made, tmp_path / "made", "logits")


def test_an_encoder(save_tiny_bert: Callable[..., None], tmp_path: Path, kernels: Path) -> None:
    save_tiny_bert(tmp_path / "model", positions=64)
    loaded = load_torch(ModelSource.parse(str(tmp_path / "model")))
    exported = export(loaded, torch_program(loaded))
    exact = run_passes(exported, make_passes(PRESETS["cpu-fp32"]))
    made = run_passes(exported, make_passes(PRESETS["cpu-fp32-kernels"]))
    (step,) = (step for step in made.steps if step.name == "use_float_kernels")
    assert step.details["products"] == 9 and step.details["activations"] == 2
    assert_agrees(exact, made, tmp_path / "made", "last_hidden_state")


@pytest.mark.parametrize("activation", ["y = Identity(h)", "y = Gelu(h)"])
def test_a_row_has_the_same_bits_alone_and_among_others(activation: str, kernels: Path) -> None:
    model = product(f"h = MatMul(x, w) {activation}", 333)
    packed(model)
    x = random(1, 75, COLUMNS, seed=1)
    whole = outputs(model, {"x": x}, kernels)["y"]
    for begin, end in [(0, 1), (7, 9), (64, 65), (3, 70)]:
        part = outputs(model, {"x": x[:, begin:end]}, kernels)["y"]
        np.testing.assert_array_equal(part, whole[:, begin:end])
