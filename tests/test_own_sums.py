"""Residual sums inside products of the own kernels: the operator against numpy, the pass, its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import Array, graph
from onnxsmith.graph_passes.float_kernels import UseFloatKernels
from onnxsmith.graph_passes.own_norms import NormsInProducts
from onnxsmith.graph_passes.own_sums import SumsInProducts
from onnxsmith.graph_passes.packed_kernels import UsePackedKernels
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.graph_passes.shapes import InferShapes
from onnxsmith.graph_passes.signature import LogitsToKeep
from onnxsmith.own_operators import OWN_DOMAIN
from test_float_products import kinds, outputs

WIDTH = 64
BITS = (4, 8, 32)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def products(body: str, bits: int = 32, *, inputs: str = "", out: str = f"m, s, {WIDTH}") -> ir.Model:
    """A graph whose products are those of the own kernels."""
    weights = {f"w{number}": random(WIDTH, WIDTH, seed=number) / 8 for number in range(1, 4)}
    weights |= {f"b{number}": random(WIDTH, seed=10 + number) for number in range(1, 4)}
    weights |= {"wide": random(WIDTH, 2 * WIDTH, seed=20) / 8}
    shape = f"float[m, s, {WIDTH}]"
    text = f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
    g ({shape} x, {shape} r{inputs}) => (float[{out}] y) {{ {body} }}"""
    model = graph(text, **{name: array for name, array in weights.items() if name in body})
    InferShapes()(model)
    if bits == 32:
        UseFloatKernels()(model)
    else:
        QuantizeWeights(bits=bits, block_size=32)(model)
        UsePackedKernels()(model)
    InferShapes()(model)
    return model


def feeds(*leading: int) -> dict[str, Array]:
    return {"x": random(*leading, WIDTH, seed=1), "r": random(*leading, WIDTH, seed=2) * 3}


FORMS = {
    "product": "h = MatMul(x, w1) y = Add(h, r)",
    "from the left": "h = MatMul(x, w1) y = Add(r, h)",
    "bias": "h0 = MatMul(x, w1) h = Add(h0, b1) y = Add(h, r)",
    "activation": "h0 = MatMul(x, w1) h1 = Add(h0, b1) h = Gelu(h1) y = Add(h, r)",
    "gate": """
        g = MatMul(x, w1) u = MatMul(x, w2) s = Sigmoid(g) a = Mul(g, s) h = Mul(a, u) y = Add(h, r)""",
    "sum of two": "h0 = MatMul(x, w1) y = Sum(h0, b1, r)",
    "later residual": "h = MatMul(x, w1) late = Tanh(r) y = Add(h, late)",
}


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 40), (2, 130), (0, 4)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS)
def test_a_sum_in_a_product_is_the_sum_behind_it(
    form: str, bits: int, shape: tuple[int, int], kernels: Path
) -> None:
    apart = products(FORMS[form], bits)
    model = apart.clone()
    outcome = SumsInProducts()(model)
    assert (outcome.changes.count, outcome.changes.skipped) == (1, {})
    assert not {"Add", "Sum"} & set(kinds(model))
    (node,) = (node for node in model.graph if node.domain == OWN_DOMAIN)
    assert len(node.inputs) == 6
    given = feeds(*shape)
    for library in (None, kernels):
        got, want = outputs(model, given, library)["y"], outputs(apart, given, library)["y"]
        assert got.shape == want.shape == (*shape, WIDTH)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    # What it gives is not what it gives without.
    without = outputs(model, given | {"r": 0 * given["r"]}, kernels)["y"]
    assert not shape[0] or np.abs(without - got).max() > 0.5


@pytest.mark.parametrize("bits", BITS)
def test_a_row_has_the_same_bits_alone_and_among_others(bits: int, kernels: Path) -> None:
    model = products(FORMS["activation"], bits)
    SumsInProducts()(model)
    given = feeds(1, 137)
    whole = outputs(model, given, kernels)["y"]
    for begin, end in [(0, 1), (7, 9), (64, 65), (3, 70)]:
        part = outputs(model, {name: array[:, begin:end] for name, array in given.items()}, kernels)["y"]
        np.testing.assert_array_equal(part, whole[:, begin:end])


@pytest.mark.parametrize(
    ("body", "left"),
    [
        # Attention and MLP beside one another: three operands, two products.
        ("a = MatMul(x, w1) b = MatMul(x, w2) y = Sum(a, b, r)", []),
        ("a = MatMul(x, w1) b = MatMul(x, w2) y = Add(a, b)", []),
        ("a = MatMul(x, w1) b = MatMul(a, w2) c = Add(b, r) d = MatMul(c, w3) y = Add(d, c)", []),
        ("a = MatMul(x, w1) y = Sum(a, r, r)", ["Sum"]),
        ("a = MatMul(x, w1) t = Tanh(x) y = Sum(r, a, t)", ["Tanh", "Sum"]),
    ],
)
def test_sums_of_more(body: str, left: list[str], kernels: Path) -> None:
    model = products(body)
    given = feeds(2, 5)
    before = outputs(model, given, kernels)["y"]
    assert SumsInProducts()(model).changes.count > 0
    assert [kind for kind in kinds(model) if kind != "MatMulPacked"] == left
    for library in (None, kernels):
        np.testing.assert_allclose(outputs(model, given, library)["y"], before, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("h = MatMul(x, w1) y = Add(h, one)", f", float[1, 1, {WIDTH}] one", "shape"),
        ("h = MatMul(x, w1) y = Add(h, other)", f", float[m, t, {WIDTH}] other", "shape"),
        ("h = MatMul(x, w1) y = Add(h, other)", f", float[n, m, s, {WIDTH}] other", "shape"),
        ("h = MatMul(x, w1) s = Add(h, r) t = Tanh(h) y = Mul(s, t)", "", "something else reads"),
        ("h = MatMul(x, w1) y = Add(h, h)", "", "shape"),
    ],
)
def test_what_does_not_fit_stays(body: str, inputs: str, reason: str) -> None:
    model = products(body, inputs=inputs, out="a, b, c, d" if "[n" in inputs else "a, b, c")
    outcome = SumsInProducts()(model)
    assert not outcome.modified
    (said,) = outcome.changes.skipped.values()
    assert reason in said


def test_a_product_takes_one_sum() -> None:
    model = products("h = MatMul(x, w1) a = Add(h, r) y = Add(a, x)")
    changes = SumsInProducts()(model).changes
    assert changes.count == 1
    assert list(changes.skipped.values()) == ["the product adds something already"]


def test_sums_of_other_types_and_nodes_are_nothing_to_it() -> None:
    model = products("h = MatMul(x, w1) t = Tanh(h) y = Add(t, r)")
    outcome = SumsInProducts()(model)
    assert not outcome.modified and not outcome.changes.skipped


def test_an_output_that_is_a_sum_keeps_its_name_and_a_product_that_is_one_its_sum() -> None:
    model = products("h = MatMul(x, w1) y = Add(h, r)")
    product = next(node for node in model.graph if node.op_type == "MatMulPacked")
    read = model.clone()
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(product.outputs[0])
    assert list(SumsInProducts()(model).changes.skipped.values()) == ["something else reads the product"]
    SumsInProducts()(read)
    assert [value.name for value in read.graph.outputs] == ["y"]


def test_a_product_with_a_residual_takes_no_norm() -> None:
    model = products("h = Add(x, x) k = MatMul(h, w1) y = Add(k, r)")
    SumsInProducts()(model)
    product = next(node for node in model.graph if node.op_type == "MatMulPacked")
    weight = ir.Value(name="n", shape=ir.Shape([WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    weight.const_value = ir.tensor(np.ones(WIDTH, np.float32), name="n")
    model.graph.register_initializer(weight)
    h = product.inputs[0]
    norm = ir.node(
        "SkipSimplifiedLayerNormalization", [h, h, weight], {"epsilon": 1e-5}, domain="com.microsoft",
        num_outputs=1, name="norm",
    )  # fmt: skip
    norm.outputs[0].name, norm.outputs[0].type = "normed", ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(product, norm)
    product.replace_input_with(0, norm.outputs[0])
    outcome = NormsInProducts()(model)
    assert outcome.changes.skipped == {"norm": "its product adds a residual"}


def test_the_last_logits_of_a_head_that_adds_something_are_not_taken() -> None:
    text = f"""<ir_version: 10, opset_import: ["": 20]>
    g (float[batch, sequence, {WIDTH}] x, float[batch, sequence, {WIDTH}] r) =>
        (float[batch, sequence, {WIDTH}] logits) {{ h = MatMul(x, w1) logits = Add(h, r) }}"""
    model = graph(text, w1=random(WIDTH, WIDTH))
    InferShapes()(model)
    UseFloatKernels()(model)
    assert SumsInProducts()(model).modified
    outcome = LogitsToKeep()(model)
    assert not outcome.modified


@pytest.mark.parametrize(
    ("shape", "said"), [((1, 3, 63), "residual"), ((1, 4, 64), "residual"), ((3, 64), "residual")]
)
@pytest.mark.parametrize("bits", BITS)
def test_a_residual_of_another_shape_is_an_error(
    bits: int, shape: tuple[int, ...], said: str, kernels: Path
) -> None:
    model = products(FORMS["product"], bits)
    SumsInProducts()(model)
    for value in model.graph.inputs:
        value.shape = None
    given: dict[str, Any] = {"x": random(1, 3, WIDTH), "r": random(*shape)}
    with pytest.raises(Exception, match=f"{said}.*(got|expected)"):
        outputs(model, given, kernels)
