"""Dynamic and static quantization to 8 bit integers, and the ranges that the static one needs."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import Array, graph, run, serialized
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import GraphPass, PreconditionError
from onnxsmith.graph_passes.dynamic import QuantizeDynamic
from onnxsmith.graph_passes.integer_operators import integer_weight
from onnxsmith.graph_passes.observers import METHODS, Channels, Observer
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.graph_passes.static import QuantizeStatic
from sample_activations import activations_on

TEXT = """<ir_version: 9, opset_import: ["": 18]>
g (float[b, s, 32] x) => (float[b, s, 16] y, float[b, s, 8] z) {
  [first] a = MatMul(x, w1)
  p = Add(a, b1)
  h = Relu(p)
  [second] c = MatMul(h, w2)
  y = Add(b2, c)
  [third] z = MatMul(h, w3)
}"""


def weights(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes = {"w1": (32, 24), "b1": (24,), "w2": (24, 16), "b2": (16,), "w3": (24, 8)}
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    # One input channel is large: what smoothing is for.
    made["w1"][5] *= 0.05
    return made


def inputs(count: int, seed: int = 1) -> list[Array]:
    random = np.random.default_rng(seed)
    made = [random.standard_normal((2, 9, 32)).astype(np.float32) for _ in range(count)]
    for x in made:
        x[..., 5] *= 30
    return made


activations = activations_on([{"x": x} for x in inputs(20)])


def error_of(one: GraphPass, model: ir.Model | None = None) -> tuple[ir.Model, dict[str, Any], float]:
    model = model or graph(TEXT, **weights())
    x = inputs(1, seed=9)[0]
    expected = run(graph(TEXT, **weights()), {"x": x})
    in_context(model, PassContext(activations=activations, calibration={"data": "made up"}))
    outcome = one(model)
    got = run(model, {"x": x})
    assert list(got) == list(expected)
    errors = [float(np.square(got[n] - v).mean() / np.square(v).mean()) for n, v in expected.items()]
    assert all(got[n].shape == v.shape for n, v in expected.items())
    return model, outcome.changes.details, max(errors)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_dynamic(per_channel: bool, symmetric: bool, reduce_range: bool) -> None:
    one = QuantizeDynamic(per_channel=per_channel, symmetric=symmetric, reduce_range=reduce_range)
    model, details, error = error_of(one)
    # The large channel takes most of the codes of x.
    assert 0 < error < 0.04
    operators = [node.op_type for node in model.graph]
    # h is quantized once for both that read it.
    assert (operators.count("DynamicQuantizeLinear"), operators.count("MatMulInteger")) == (2, 3)
    assert "MatMul" not in operators
    assert details["layers"]["first"]["bits"] == (7 if reduce_range else 8)
    scales = model.graph.initializers["w1_scale"].const_value
    assert scales is not None and tuple(scales.shape.numpy()) == ((24,) if per_channel else ())


def test_dynamic_embeddings_and_gemm() -> None:
    random = np.random.default_rng(3)
    table, weight = random.standard_normal((9, 32)), random.standard_normal((6, 32))
    bias = random.standard_normal(6).astype(np.float32)
    parts = {"table": table.astype(np.float32), "w": weight.astype(np.float32), "bias": bias}
    text = """<ir_version: 9, opset_import: ["": 18]> g (int64[s] ids) => (float[s, 6] y) {
      e = Gather(table, ids)
      y = Gemm<transB = 1>(e, w, bias)
    }"""
    model, ids = graph(text, **parts), np.array([8, 0, 4])
    expected = run(model, {"ids": ids})["y"]
    details = QuantizeDynamic()(model).changes.details
    assert set(details["layers"]) == {"Gemm of 'y'", "table"}
    got = run(model, {"ids": ids})["y"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.03 * np.abs(expected).max())
    assert "GatherBlockQuantized" in {node.op_type for node in model.graph}
    # Control.
    parts["bias"] = bias + 1
    assert np.abs(run(graph(text, **parts), {"ids": ids})["y"] - got).max() > 0.5


@pytest.mark.parametrize("form", ["integer", "qdq", "qoperator"])
@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("smoothing", ["auto", "none"])
def test_static(form: Any, kind: Any, smoothing: Any) -> None:
    if form != "qdq" and kind.endswith("16"):
        with pytest.raises(BadInputError, match=f"{form} with {kind}; expected uint8 or int8, or qdq"):
            QuantizeStatic(form=form, activations=kind)
        return
    model, details, error = error_of(QuantizeStatic(form=form, activations=kind, smoothing=smoothing))
    bound = 4e-3 if smoothing == "auto" else 2e-3 if kind.endswith("16") else 0.06
    assert 0 < error < bound
    expected = {"integer": "MatMulIntegerToFloat", "qdq": "MatMul", "qoperator": "QLinearMatMul"}[form]
    assert [node.op_type for node in model.graph].count(expected) == 3
    assert {"x", "h"} <= {name.removesuffix("_scaled") for name in details["ranges"]}
    assert details["calibration"] == {"data": "made up"}


def test_static_on_other_data_than_it_saw_fails_the_bound() -> None:
    one = QuantizeStatic(ranges={"*": (-0.5, 0.5)}, smoothing="none")
    assert error_of(one)[2] > 0.1


def test_smoothing_helps_and_its_strength_can_be_set() -> None:
    plain = error_of(QuantizeStatic(smoothing="none", calibration="minmax"))[2]
    model, details, smooth = error_of(QuantizeStatic(calibration="minmax"))
    assert smooth < 0.5 * plain
    assert details["layers"]["first"]["smoothing"] > 0
    assert details["layers"]["first"]["scaling"] == "multiplied"
    assert list(details["factors"]) == ["x"]
    assert "Mul" in {node.op_type for node in model.graph}
    _, details, _ = error_of(QuantizeStatic(strengths={"first": 0.0}, smoothing="none"))
    assert details["layers"]["first"]["smoothing"] == 0.0
    _, details, error = error_of(QuantizeStatic(strengths={"first": 0.5}, smoothing="none"))
    assert details["layers"]["first"]["smoothing"] == 0.5
    assert error < plain


@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_bias_correction_takes_the_shift_of_the_mean_away(form: Any) -> None:
    def shift(corrected: bool) -> float:
        model = graph(TEXT, **weights())
        in_context(model, PassContext(activations=activations))
        QuantizeStatic(
            form=form, bias_correction=corrected, smoothing="none", per_channel=False, reduce_range=True,
            activations="uint8", skip_nodes=("first",),
        )(model)  # fmt: skip
        reference = graph(TEXT, **weights())
        differences = [run(model, {"x": x})["y"] - run(reference, {"x": x})["y"] for x in inputs(20)]
        return float(np.abs(np.mean(differences, axis=(0, 1, 2))).mean())

    assert shift(True) < 0.5 * shift(False)


def test_a_table_gives_the_same_model_without_data(tmp_path: Path) -> None:
    first, details, _ = error_of(QuantizeStatic(bias_correction=False))
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"ranges": details["ranges"], "factors": details["factors"]}))
    again = graph(TEXT, **weights())
    QuantizeStatic(table=str(path))(again)
    x = inputs(1, seed=9)[0]
    for name, value in run(first, {"x": x}).items():
        np.testing.assert_allclose(run(again, {"x": x})[name], value, rtol=0, atol=1e-5 * np.abs(value).max())
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"steps": [{"name": "quantize_static", "details": details}]}))
    QuantizeStatic(table=str(manifest))(graph(TEXT, **weights()))
    path.write_text("{}")
    with pytest.raises(BadInputError, match=r"table .*table\.json: cannot be read: KeyError"):
        QuantizeStatic(table=str(path))(graph(TEXT, **weights()))
    path.write_text('{"ranges": {"x": {"low": -1, "high": 1}}}')
    with pytest.raises(BadInputError, match="no range for 'h'; expected a table of this model"):
        QuantizeStatic(table=str(path))(graph(TEXT, **weights()))


MASKED = """<ir_version: 9, opset_import: ["": 18]>
g (float[b, s, 32] x, float[b, s, 32] mask) => (float[b, s, 16] y) {
  m = Add(x, mask)
  [head] y = MatMul(m, w)
}"""


def test_masks_stay_out_of_a_range() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    mask = np.zeros((1, 9, 32), np.float32)
    mask[..., 20:] = np.finfo(np.float32).min

    def masked(model: ir.Model, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        for x in inputs(3):
            yield dict.fromkeys(names, x + mask)

    model = graph(MASKED, w=weight)
    in_context(model, PassContext(activations=masked))
    details = QuantizeStatic(smoothing="none", bias_correction=False)(model).changes.details
    entry = details["layers"]["head"]
    assert entry["masked_values_left_out"] == 3 * 2 * 9 * 12
    assert -200 < entry["range"][0] < 0 < entry["range"][1] < 200


def test_what_is_left_out_is_said() -> None:
    text = """<ir_version: 9, opset_import: ["": 18]>
    g (float[1, 3, 8, 8] i, float[m, 32] x) => (float[1, 4, 8, 8] o, float[m, 8] y, float[m, 8] z) {
      [conv] o = Conv<kernel_shape = [1, 1]>(i, k)
      [kept] y = MatMul(x, w)
      [scaled] z = Gemm<alpha = 2.0>(x, w)
    }"""
    random = np.random.default_rng(0)
    model = graph(
        text, k=random.standard_normal((4, 3, 1, 1)).astype(np.float32),
        w=random.standard_normal((32, 8)).astype(np.float32),
    )  # fmt: skip
    before = serialized(model)
    with pytest.raises(PreconditionError, match=r"nothing to quantize \(.*skip_nodes has 'kept'") as caught:
        QuantizeDynamic(skip_nodes=("kept",))(model)
    assert "conv: Conv stays in float here" in str(caught.value)
    assert "scaled: Gemm with alpha" in str(caught.value)
    assert serialized(model) == before
    with pytest.raises(PreconditionError, match=r"no calibration data and no table.*--calibration-data"):
        QuantizeStatic()(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 20}, "percentile: 20; expected above 50, up to 100"),
        ({"ranges": {"x": (1.0, 2.0)}}, "ranges of 'x': 1.0 to 2.0; expected a range with 0 inside"),
        ({"strengths": {"x": 2.0}}, "strengths of 'x': 2.0; expected 0 to 1"),
    ],
)
def test_parameters_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        QuantizeStatic(**options)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_of_streamed_data(method: str) -> None:
    random = np.random.default_rng(0)
    observer = Observer()
    parts = [random.standard_normal(4000) * (1 + i % 3) for i in range(50)]
    parts[17][0], parts[30][0] = 400.0, -90.0
    for part in parts:
        observer.update(part)
    found = observer.range(method, percentile=99.9)
    everything = np.concatenate(parts)
    if method == "minmax":
        assert (found.low, found.high) == (np.float32(everything.min()), np.float32(everything.max()))
    elif method == "percentile":
        # A bin is 2 * 512 / 2048 wide.
        wanted = np.percentile(everything, [0.05, 99.95])
        np.testing.assert_allclose([found.low, found.high], wanted, atol=1.0)
    else:
        assert -100 < found.low < -3 and 3 < found.high < 400


def test_mse_and_entropy_cut_a_single_outlier_off_when_there_are_few_codes() -> None:
    observer = Observer()
    observer.update(np.concatenate([np.random.default_rng(0).standard_normal(100_000), [12.0]]))
    for method in ("mse", "entropy"):
        found = observer.range(method, levels=16)
        assert 1.5 < found.high < 8, method


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [-3.0], [np.finfo(np.float32).min]], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_ranges_of_odd_data(values: list[float], method: str) -> None:
    observer = Observer()
    observer.update(np.array(values))
    found = observer.range(method)
    assert found.low <= 0 <= found.high
    assert found.masked == (values == [np.finfo(np.float32).min])
    assert found.high == (5.0 if values == [5.0, 5.0] else 0.0)


def test_an_observer_does_not_grow() -> None:
    observer, channels = Observer(), Channels(64)
    block = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    for scale in range(1, 5):
        observer.update(block * scale)
        channels.update(block * scale)
    tracemalloc.start()
    try:
        for scale in range(1, 60):
            observer.update(block * scale)
            channels.update(block * scale)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 40_000
    assert peak < 12 * block.nbytes
    np.testing.assert_allclose(channels.largest, np.abs(block).max(0) * 59)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_weights(per_channel: bool, symmetric: bool) -> None:
    columns = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    columns[:, 3] *= 50
    made = integer_weight(columns, per_channel=per_channel, symmetric=symmetric, reduce_range=False)
    scale = np.broadcast_to(made.scales, (12,))
    difference = np.abs(made.dequantized() - columns)
    assert made.codes.dtype == (np.int8 if symmetric else np.uint8)
    # Narrower grids clip a little.
    assert np.quantile(difference / scale, 0.9) <= 0.501
    assert (difference[:, 0].max() < 0.02) == per_channel


ATTENTION = """<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>
g (float[b, s, 32] x, float[b, 1, s, s] bias, int32[b, s] mask) => (float[b, s, 32] y, float[b, s, 32] z) {
  [first] y = com.microsoft.Attention<num_heads = 4, qkv_hidden_sizes = [32, 32, 32]>(x, w, c, , , bias)
  [second] z = com.microsoft.Attention<num_heads = 4, scale = 0.2>(x, w, c, mask)
}"""


def attention(seed: int = 0) -> ir.Model:
    random = np.random.default_rng(seed)
    parts = {"w": random.standard_normal((32, 96)) * 0.3, "c": random.standard_normal(96)}
    return graph(ATTENTION, **{name: value.astype(np.float32) for name, value in parts.items()})


@pytest.mark.parametrize(
    "one",
    [QuantizeDynamic(), QuantizeWeights(bits=8, accuracy_level=1), QuantizeWeights(bits=4, accuracy_level=1)],
    ids=["dynamic", "8 bits", "4 bits"],
)
def test_the_projection_inside_attention_is_quantized(one: GraphPass) -> None:
    random = np.random.default_rng(1)
    feeds: dict[str, Array] = {
        "x": random.standard_normal((2, 5, 32)).astype(np.float32),
        "bias": np.where(random.random((2, 1, 5, 5)) < 0.3, -1e4, 0).astype(np.float32),
        "mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
    }
    model = attention()
    expected = run(model, feeds)
    one(model)
    kinds = [node.op_type for node in model.graph]
    assert "Attention" not in kinds
    # Integer products have the biases, so that nothing is split and no operand has to be read.
    heads = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
    inside = [len(node.inputs) > 3 and node.inputs[3] is not None for node in heads]
    assert inside == [kinds.count("Split") > 0] * 2 == [not isinstance(one, QuantizeDynamic)] * 2
    assert not any(
        v.dtype == ir.DataType.FLOAT and v.const_value.nbytes > 32 * 96 for v in initializers(model)
    )
    got = run(model, feeds)
    bound = 0.2 if one.arguments().get("bits") == 4 else 0.03
    # Positions that a mask hides are padding, and compute something else in either.
    shown = feeds["mask"].astype(bool)
    for name in ("y", "z"):
        scale = np.abs(expected[name]).max()
        assert np.abs(got[name] - expected[name])[shown].max() < bound * scale
    assert np.abs(run(attention(5), feeds)["y"] - got["y"]).max() > 0.5 * np.abs(expected["y"]).max()


BIASES = """<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>
g (float[b, s, 32] x) => (float[b, s, 32] y) {
  [first] a = MatMul(x, w1)
  h = com.microsoft.BiasGelu(a, b1)
  [second] c = MatMul(h, w2)
  d = Sum(b2, c, x)
  [third] e = MatMul(d, w3)
  f = com.microsoft.FastGelu(e, b1)
  [last] y = MatMul(f, w2)
}"""


def with_biases(**others: Array) -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {"w1": (32, 48), "b1": (48,), "w2": (48, 32), "b2": (32,), "w3": (32, 48)}
    made = {name: (random.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in shapes.items()}
    return graph(BIASES, **(made | others))


@pytest.mark.parametrize("form", ["dynamic", "integer", "qdq"])
def test_biases_of_later_operators_are_added_by_the_products(form: Any) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 9, 32)).astype(np.float32)}
    model, other = with_biases(), with_biases(b1=np.ones(48, np.float32))
    expected = run(model, feeds)["y"]

    in_context(model, PassContext(activations=activations_on([feeds])))
    (QuantizeDynamic() if form == "dynamic" else QuantizeStatic(form=form))(model)
    kinds = [node.op_type for node in model.graph]
    assert "BiasGelu" not in kinds and {"Gelu", "FastGelu", "Sum"} < set(kinds)
    assert all(len(node.inputs) == 1 for node in model.graph if node.op_type == "FastGelu")
    assert all(len(node.inputs) == 2 for node in model.graph if node.op_type == "Sum")
    got = run(model, feeds)["y"]
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
    # Control: the biases matter that much.
    assert np.abs(run(other, feeds)["y"] - expected).max() > 0.2 * np.abs(expected).max()


def test_a_bias_stays_where_its_product_is_needed_without_it() -> None:
    model = with_biases()
    product = model.graph.node("first").outputs[0]
    product.shape = ir.Shape(["b", "s", 48])
    model.graph.outputs.append(product)
    QuantizeDynamic()(model)
    assert "BiasGelu" in {node.op_type for node in model.graph}


def test_products_that_stay_in_float_keep_their_biases_where_they_are() -> None:
    model = with_biases()
    QuantizeDynamic(skip_nodes=("first", "third"))(model)
    kinds = [node.op_type for node in model.graph]
    assert "BiasGelu" in kinds and [len(n.inputs) for n in model.graph if n.op_type == "FastGelu"] == [2]


def initializers(model: ir.Model) -> list[Any]:
    return list(model.graph.initializers.values())


def test_attention_that_cannot_be_opened_is_listed() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>
    g (float[b, s, 32] x, float[32, 96] w) => (float[b, s, 32] y, float[b, s, 8] z) {
      [whole] y = com.microsoft.Attention<num_heads = 4>(x, w)
      z = MatMul(x, m)
    }"""
    model = graph(text, m=np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32))
    skipped = QuantizeDynamic()(model).changes.skipped
    assert skipped == {"whole": "Attention without a constant weight"}
