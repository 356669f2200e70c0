"""Blocks of 4 and 8 bits against ONNX Runtime's own kernels, and the pass that puts them into a graph."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from generated_graphs import Array, graph, run, serialized
from onnxsmith.errors import BadInputError, OnnxsmithError
from onnxsmith.graph_passes.contract import Outcome, PreconditionError
from onnxsmith.graph_passes.quantization import QuantizeWeights, dequantize_blocks, quantize_blocks
from onnxsmith.onnx_file import check_model, load_model, save_model

RANDOM = np.random.default_rng(0)
# What the pass searches by default.
STEPS = QuantizeWeights().search_steps
FORMATS = list(itertools.product((4, 8), (False, True)))


HEAD = '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>'


def matrix(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def matmul(weight: Array, kind: str = "float", opset: int = 18) -> ir.Model:
    return graph(
        f'<ir_version: 9, opset_import: ["": {opset}]> g ({kind}[m, k] x) => ({kind}[m, n] y) '
        "{ [head] y = MatMul(x, w) }",
        w=weight,
    )


TIED = """<ir_version: 9, opset_import: ["": 18]>
g (int64[s] ids, float[m, k] x) => (float[s, k] e, float[m, n] y) {
  [embed] e = Gather(table, ids)
  t = Transpose<perm = [1, 0]>(table)
  [head] y = MatMul(x, t)
}"""


def counts(outcome: Outcome) -> dict[str, Any]:
    left_out = ("layers", "arithmetic")
    return {name: value for name, value in outcome.changes.details.items() if name not in left_out}


def round_trip(weights: Array, **options: Any) -> Array:
    return dequantize_blocks(quantize_blocks(weights, **options))


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, block_size: int) -> None:
    weights = matrix(3, 2 * block_size)
    blocks = quantize_blocks(weights, bits=bits, block_size=block_size, symmetric=symmetric)
    error = np.abs(weights - dequantize_blocks(blocks)).reshape(3, 2, block_size)
    step = np.abs(blocks.scales)[..., None]
    # The side with one code less loses up to another half step at its end, where it is clipped.
    inside = np.abs(weights.reshape(error.shape)) < step * ((1 << (bits - 1)) - 1) if symmetric else True
    assert np.all((error <= step / 2 * 1.0001) | ~np.asarray(inside))
    assert error.max() > 0


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize(
    ("values", "exact"),
    [
        (np.zeros((2, 32)), True),
        (np.full((2, 32), 0.75), True),
        (np.full((2, 32), -0.75), True),
        (np.full((2, 32), 3e38), True),
        (np.linspace(-3.4e38, 3.4e38, 64).reshape(2, 32), False),
        (np.full((2, 32), 1e-42), False),
        (-np.abs(np.linspace(1, 2, 64)).reshape(2, 32), False),
    ],
    ids=["zeros", "constant", "negative constant", "huge", "whole range", "denormal", "negative only"],
)
def test_extreme_blocks(values: Array, exact: bool, bits: int, symmetric: bool) -> None:
    weights = values.astype(np.float32)
    blocks = quantize_blocks(weights, bits=bits, block_size=32, symmetric=symmetric, search_steps=4)
    result = dequantize_blocks(blocks)
    assert np.isfinite(result).all()
    assert np.isfinite(blocks.scales).all()
    largest = np.abs(weights).max()
    tolerance = 1e-6 if exact else 1.01 / (1 << (bits - 1))
    assert np.abs(result / max(largest, 1e-30) - weights / max(largest, 1e-30)).max() <= tolerance


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_weights_on_the_grid_are_exact(bits: int, symmetric: bool) -> None:
    top = 1 << bits
    codes = RANDOM.integers(0, top, (4, 64))
    codes[:, [0, 32]], codes[:, [1, 33]] = 0, top - 1
    weights = ((codes - top // 2) * 0.125).astype(np.float32)
    result = round_trip(weights, bits=bits, block_size=32, symmetric=symmetric)
    np.testing.assert_array_equal(result, weights)


@pytest.mark.parametrize("bits", [4, 8])
def test_last_block_is_filled_up(bits: int) -> None:
    weights = matrix(2, 50)
    blocks = quantize_blocks(weights, bits=bits, block_size=32, symmetric=False)
    assert blocks.codes.shape == (2, 2, 32 * bits // 8)
    assert dequantize_blocks(blocks).shape == (2, 50)
    assert np.abs(dequantize_blocks(blocks) - weights).max() <= blocks.scales.max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(value: float) -> None:
    weights = matrix(4, 32)
    weights[2, 5] = value
    with pytest.raises(BadInputError, match=r"weight 'the matrix': 1 of .* NaN or infinite; expected finite"):
        quantize_blocks(weights, bits=4, block_size=32, symmetric=False)


def weighted_error(weights: Array, **options: Any) -> Array:
    """The squared error of each block that the search is about, in float64: see quantize_blocks."""
    blocks = weights.reshape(len(weights), -1, options["block_size"]).astype(np.float64)
    importance = np.abs(blocks) + np.sqrt(np.square(blocks).mean(-1, keepdims=True))
    difference = round_trip(weights, **options).reshape(blocks.shape) - blocks
    return np.asarray((importance * difference**2).sum(-1))


@settings(max_examples=60, deadline=None)
@given(
    weights=hnp.arrays(np.float32, (2, 32), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    steps=st.integers(1, 12),
)
def test_search_never_increases_the_error(weights: Array, bits: int, symmetric: bool, steps: int) -> None:
    options: dict[str, Any] = {"bits": bits, "block_size": 16, "symmetric": symmetric}
    plain = weighted_error(weights, **options)
    searched = weighted_error(weights, **options, search_steps=steps)
    # The search sums in float32: cubes that overflow or vanish there tell it nothing.
    scale = np.abs(weights).reshape(2, 2, 16).max(-1).astype(np.float64)
    measurable = (scale < 1e11) & (scale > 1e-9)
    noise = 1e-6 * scale**3
    assert np.all((searched <= plain * (1 + 1e-4) + noise) | ~measurable)
    assert np.isfinite(round_trip(weights, **options, search_steps=steps)).all()


def test_rounding_to_float16_is_that_of_numpy() -> None:
    from onnxsmith.graph_passes.block_search import _stored

    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[~np.isnan(halves)]
    # Numbers, what lies in the middle between two, and what lies beside that.
    with np.errstate(over="ignore"):
        above = np.nextafter(halves.astype(np.float16), np.float16(np.inf)).astype(np.float32)
    middle = (halves + above) / 2
    middle = middle[np.isfinite(middle)]
    random = np.exp2(RANDOM.uniform(-40, 40, 100_000)).astype(np.float32)
    values = np.concatenate(
        [
            halves,
            middle,
            np.nextafter(middle, np.float32(0)),
            np.nextafter(middle, np.float32(np.inf)),
            random,
        ]
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(_stored(values, np.float16), expected)
    assert np.isnan(_stored(np.full(3, np.nan, np.float32), np.float16)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_finds_something(symmetric: bool) -> None:
    weights = matrix(16, 64)
    options: dict[str, Any] = {"bits": 4, "block_size": 32, "symmetric": symmetric}
    searched = weighted_error(weights, **options, search_steps=STEPS)
    assert searched.sum() < 0.97 * weighted_error(weights, **options).sum()


@pytest.mark.parametrize(
    ("options", "at_most"),
    [
        ({"bits": 4, "symmetric": False, "minimums": True}, 0.829),
        ({"bits": 4, "symmetric": False}, 0.891),
        ({"bits": 4, "symmetric": True}, 0.9204),
        ({"bits": 8, "symmetric": True}, 0.882),
        ({"bits": 2, "symmetric": False, "minimums": True}, 0.703),
    ],
    ids=str,
)
def test_the_search_loses_as_little_as_nine_even_steps_did(options: dict[str, Any], at_most: float) -> None:
    weights = np.random.default_rng(1).standard_t(5, (400, 512)).astype(np.float32)
    options = {**options, "block_size": 32}
    searched = weighted_error(weights, **options, search_steps=STEPS).sum()
    assert searched <= at_most * weighted_error(weights, **options).sum()


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_matmul_nbits_computes_with_the_dequantized_weight(
    bits: int, symmetric: bool, block_size: int, blocks: int
) -> None:
    weight = matrix(blocks * block_size, 5)
    model = matmul(weight)
    options: dict[str, Any] = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
    outcome = QuantizeWeights(**options, accuracy_level=0)(model)
    assert counts(outcome) == {"bits": bits, "matmuls": 1, "embeddings": 0, "tied": 0}
    assert outcome.changes.details["arithmetic"] == "float, as the activations"
    x = matrix(3, blocks * block_size)
    got = run(model, {"x": x})["y"]
    reference = round_trip(np.ascontiguousarray(weight.T), **options, search_steps=STEPS)
    np.testing.assert_allclose(got, x @ reference.T, rtol=1e-4, atol=1e-4)
    # Control: what was rounded is not what was given.
    assert np.abs(got - x @ weight).max() > 1e-3


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_gather_block_quantized_looks_up_the_dequantized_rows(
    bits: int, symmetric: bool, blocks: int, block_size: int
) -> None:
    table = matrix(7, blocks * block_size)
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g (int64[s] ids) => (float[s, k] e) { e = Gather(w, ids) }',
        w=table,
    )
    options: dict[str, Any] = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
    assert QuantizeWeights(**options)(model).changes.details["embeddings"] == 1
    ids = np.array([6, 0, 3, 3])
    reference = round_trip(table, **options, search_steps=STEPS)
    np.testing.assert_allclose(run(model, {"ids": ids})["e"], reference[ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_int8_arithmetic_is_close(bits: int, symmetric: bool) -> None:
    weight = matrix(64, 8)
    model = matmul(weight)
    QuantizeWeights(bits=bits, symmetric=symmetric, accuracy_level=4)(model)  # type: ignore[arg-type]
    x = matrix(3, 64)
    reference = (
        x
        @ round_trip(
            np.ascontiguousarray(weight.T), bits=bits, block_size=32, symmetric=symmetric, search_steps=STEPS
        ).T
    )
    got = run(model, {"x": x})["y"]
    assert np.abs(got - reference).max() < 0.03 * np.abs(reference).max()


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_float16_scales_are_the_ones_that_codes_were_chosen_for(bits: int, symmetric: bool) -> None:
    weight = matrix(64, 6).astype(np.float16)
    model = matmul(weight, "float16")
    options: dict[str, Any] = {"bits": bits, "block_size": 32, "symmetric": symmetric}
    QuantizeWeights(**options, accuracy_level=0)(model)
    assert model.graph.initializers["w_scales"].dtype == ir.DataType.FLOAT16
    rows = np.ascontiguousarray(weight.T, dtype=np.float32)
    blocks = quantize_blocks(rows, **options, search_steps=STEPS, scale_type=np.float16)
    np.testing.assert_array_equal(blocks.scales, blocks.scales.astype(np.float16))
    x = matrix(3, 64).astype(np.float16)
    got = run(model, {"x": x})["y"]
    reference = x.astype(np.float32) @ dequantize_blocks(blocks).T
    np.testing.assert_allclose(got, reference, rtol=0, atol=0.01 * np.abs(reference).max())


@pytest.mark.parametrize("symmetric", [True, False])
def test_tied_weight_is_stored_once(symmetric: bool, tmp_path: Path) -> None:
    table = matrix(64, 128)
    model = graph(TIED, table=table)
    outcome = QuantizeWeights(bits=4, symmetric=symmetric, accuracy_level=0)(model)
    assert counts(outcome) == {"bits": 4, "matmuls": 1, "embeddings": 1, "tied": 1}
    path = tmp_path / "tied.onnx"
    size = save_model(model, path)
    check_model(path)
    # Half a byte to a weight, and scale and zero point to each block of 32.
    assert size < 64 * 128 * 0.5 + 64 * 4 * (4 + 0.5) + 2000
    reference = round_trip(table, bits=4, block_size=32, symmetric=symmetric, search_steps=STEPS)
    x, ids = matrix(3, 128), np.array([5, 63])
    got = run(load_model(path), {"x": x, "ids": ids})
    np.testing.assert_allclose(got["e"], reference[ids], rtol=1e-6)
    np.testing.assert_allclose(got["y"], x @ reference.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "is_transposed"),
    [
        ("y = com.microsoft.FusedMatMul<transB = 1>(x, w)", True),
        ("y = com.microsoft.FusedMatMul(x, w)", False),
        ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", True),
        ("t = Transpose(w) y = MatMul(x, t)", True),
        ("z = MatMul(x, w) y = Identity(z)", False),
    ],
)
def test_the_ways_in_which_a_weight_lies(body: str, is_transposed: bool, tmp_path: Path) -> None:
    rows = matrix(6, 32)
    model = graph(
        '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> '
        f"g (float[m, k] x) => (float[m, n] y) {{ {body} }}",
        w=rows if is_transposed else np.ascontiguousarray(rows.T),
    )
    assert QuantizeWeights(accuracy_level=0)(model).changes.details["matmuls"] == 1
    assert {node.op_type for node in model.graph} <= {"MatMulNBits", "Identity"}
    save_model(model, tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")
    x = matrix(3, 32)
    reference = round_trip(rows, bits=4, block_size=32, symmetric=False, search_steps=STEPS)
    np.testing.assert_allclose(run(model, {"x": x})["y"], x @ reference.T, rtol=1e-4, atol=1e-4)


def test_weight_of_two_matmuls_is_stored_once() -> None:
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g (float[m, k] x, float[p, k] z) '
        "=> (float[m, n] y, float[p, n] v) "
        "{ y = MatMul(x, w) v = MatMul(z, w) }",
        w=matrix(32, 4),
    )
    assert counts(QuantizeWeights()(model)) == {"bits": 4, "matmuls": 2, "embeddings": 0, "tied": 1}
    assert sorted(model.graph.initializers) == ["w_q4", "w_scales", "w_zero_points"]


def test_weight_read_both_ways_round_and_names_that_are_taken() -> None:
    weight = matrix(32, 32)
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g (float[m, k] x, float[1] w_q8) '
        "=> (float[m, n] y, float[m, n] v, float[1] s) "
        "{ t = Transpose<perm = [1, 0]>(w) y = MatMul(x, w) v = MatMul(x, t) s = Add(w_q8, w_q8) }",
        w=weight,
    )
    assert QuantizeWeights(accuracy_level=0, bits=8)(model).changes.details["matmuls"] == 2
    x = matrix(2, 32)
    got = run(model, {"x": x, "w_q8": np.ones(1, np.float32)})
    np.testing.assert_allclose(got["y"], x @ weight, atol=0.2)
    np.testing.assert_allclose(got["v"], x @ weight.T, atol=0.2)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_gemm_is_quantized_as_matmul_and_add(transposed: int, biased: bool) -> None:
    weight, bias = matrix(32, 48), matrix(1, 48)[0]
    weights = {"w": weight.T.copy() if transposed else weight, **({"b": bias} if biased else {})}
    body = (
        f"g (float[m, k] x) => (float[m, n] y) "
        f"{{ [head] y = Gemm<transB={transposed}>(x, w{', b' * biased}) }}"
    )
    x = matrix(3, 32)
    want = run(graph(f"{HEAD} {body}", **weights), {"x": x})["y"]
    model = graph(f"{HEAD} {body}", **weights)
    changes = QuantizeWeights(bits=8, accuracy_level=0)(model).changes
    assert changes.details["matmuls"] == 1 and not changes.skipped
    assert {node.op_type for node in model.graph} == {"MatMulNBits", *(["Add"] if biased else [])}
    assert 1e-6 < np.abs(run(model, {"x": x})["y"] - want).max() < 0.2
    kept = graph(f"{HEAD} {body}", **weights)
    with pytest.raises(PreconditionError, match="skip_nodes has 'head'"):
        QuantizeWeights(skip_nodes=("head",))(kept)
    assert [node.op_type for node in kept.graph] == ["Gemm"]


def test_what_has_no_form_in_blocks_is_listed() -> None:
    model = graph(
        f"{HEAD} g (float[b, 32, 4, 4] x, float[s, b, 32] t, float[m, 32] u) => (float[b, 8, 4, 4] y, "
        "float[s, 1, b, 16] z, float[m, 8] v, float[m, 8] w) { [conv] y = Conv(x, cw) "
        "[lstm] z, zh, zc = LSTM<hidden_size=16>(t, lw, lr) [head] v = MatMul(u, mw) "
        "[scaled] w = Gemm<alpha=2.0>(u, mw) }",
        cw=matrix(8, 32).reshape(8, 32, 1, 1), lw=matrix(64, 32).reshape(1, 64, 32),
        lr=matrix(64, 16).reshape(1, 64, 16), mw=matrix(32, 8),
    )  # fmt: skip
    assert QuantizeWeights()(model).changes.skipped == {
        "conv": "ONNX Runtime has no Conv with weights in blocks",
        "lstm": "ONNX Runtime has no LSTM with weights in blocks",
        "scaled": "Gemm with alpha 2",
    }


REFUSED = {
    "default of an input": (
        f"g (float[m, k] x, float[32, 4] w = {{{', '.join(['1.0'] * 128)}}}) => (float[m, n] y) "
        "{ y = MatMul(x, w) }",
        {},
        "no MatMul or Gather with a constant float matrix",
    ),
    "no weight": (
        "g (float[m, k] x, float[k, n] w) => (float[m, n] y) { y = MatMul(x, w) }",
        {},
        "no MatMul or Gather",
    ),
    "an output too": (
        "g (float[m, k] x) => (float[m, n] y, float[32, 4] w) { [head] y = MatMul(x, w) }",
        {"w": matrix(32, 4)},
        r"\(head: the weight is an output of the graph\)",
    ),
    "three axes": (
        "g (float[b, m, k] x) => (float[b, m, n] y) { [head] y = MatMul(x, w) }",
        {"w": matrix(2, 32, 4)},
        "head: the weight has 3 axes; expected 2",
    ),
    "no multiple": (
        "g (float[m, k] x) => (float[m, n] y) { y = MatMul(x, w) }",
        {"w": matrix(33, 4)},
        "MatMul of 'y': rows of 33 are no multiple of block_size 32",
    ),
    "a vector on the left": (
        "g (float[k] x) => (float[n] y) { y = MatMul(x, w) }",
        {"w": matrix(32, 4)},
        "the left side has 1 axes; expected at least 2",
    ),
    "scaled": (
        "g (float[m, k] x) => (float[m, n] y) { y = com.microsoft.FusedMatMul<alpha = 2.0>(x, w) }",
        {"w": matrix(32, 4)},
        "FusedMatMul scales by 2",
    ),
    "in a branch": (
        "g (bool c, float[m, k] x) => (float[m, n] y) { y = If(c) <"
        "then_branch = a () => (p) { [inner] p = MatMul(x, w) }, "
        "else_branch = b () => (q) { [other] q = MatMul(x, w) }> }",
        {"w": matrix(32, 4)},
        "inner: it is in a subgraph or function; only the main graph is quantized; other: it is in",
    ),
    "double": (
        "g (double[m, k] x) => (double[m, n] y) { y = MatMul(x, w) }",
        {"w": matrix(32, 4).astype(np.float64)},
        "the weight is DOUBLE; expected FLOAT or FLOAT16",
    ),
    "an empty matrix": (
        "g (float[m, k] x) => (float[m, n] y) { y = MatMul(x, w) }",
        {"w": np.zeros((32, 0), np.float32)},
        "the weight is empty",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_says_why(name: str) -> None:
    text, weights, message = REFUSED[name]
    model = graph('<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> ' + text, **weights)
    before = serialized(model)
    with pytest.raises(PreconditionError, match=message):
        QuantizeWeights()(model)
    assert serialized(model) == before


def test_constant_node_is_refused_with_a_remedy() -> None:
    model = matmul(matrix(32, 4))
    value = model.graph.initializers.pop("w")
    node = ir.node("Constant", [], {"value": value.const_value})
    node.outputs[0].name = "c"
    model.graph.insert_before(model.graph[0], node)
    value.replace_all_uses_with(node.outputs[0])
    with pytest.raises(PreconditionError, match=r"the weight is a Constant node.*run cleanup first"):
        QuantizeWeights()(model)


def test_skip_nodes_keeps_weights_and_the_rest_is_reported() -> None:
    model = graph(TIED, table=matrix(64, 32))
    outcome = QuantizeWeights(skip_nodes=("he*",))(model)
    assert outcome.changes.skipped == {"head": "skip_nodes has 'he*'"}
    assert outcome.changes.details["matmuls"] == 0
    model = graph(TIED, table=matrix(64, 32))
    with pytest.raises(
        PreconditionError, match=r"every candidate was skipped \(head: skip_nodes has 'table'; embed: "
    ):
        QuantizeWeights(skip_nodes=("table",))(model)


def test_embeddings_can_be_kept() -> None:
    model = graph(TIED, table=matrix(64, 32))
    assert QuantizeWeights(embeddings=False)(model).changes.details["embeddings"] == 0
    assert "table" in model.graph.initializers


def test_a_second_run_refuses_and_changes_nothing() -> None:
    model = matmul(matrix(32, 4))
    QuantizeWeights()(model)
    before = serialized(model)
    with pytest.raises(PreconditionError, match="may be quantized already"):
        QuantizeWeights()(model)
    assert serialized(model) == before


def lazy(shape: tuple[int, int], reads: list[str], name: str = "w") -> ir.LazyTensor:
    def read() -> ir.Tensor:
        reads.append(name)
        return ir.Tensor(np.ones(shape, np.float32), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)


def test_weights_are_read_once_and_only_when_written(tmp_path: Path) -> None:
    model, reads = matmul(matrix(64, 8)), []
    model.graph.initializers["w"].const_value = lazy((64, 8), reads)
    QuantizeWeights()(model)
    assert reads == []
    for _ in range(2):
        save_model(model, tmp_path / "m.onnx")
    # Of each save, one reading for codes, scales and zero points together.
    assert reads == ["w"] * 2 or reads == ["w"]


def test_nan_in_a_weight_is_an_error_when_it_is_written(tmp_path: Path) -> None:
    weight = matrix(64, 8)
    weight[3, 3] = np.nan
    model = matmul(weight)
    QuantizeWeights()(model)
    with pytest.raises(OnnxsmithError, match=r"weight 'w': 1 of .*NaN or infinite"):
        save_model(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_peak_memory_is_bounded_by_the_matrix(tmp_path: Path) -> None:
    size = 4096 * 2048 * 4
    model = matmul(np.ones((1, 1), np.float32))
    weight = np.ones((4096, 2048), np.float32)
    model.graph.initializers["w"].const_value = ir.Tensor(weight, name="w")
    model.graph.initializers["w"].shape = ir.Shape((4096, 2048))
    QuantizeWeights(search_steps=0)(model)
    tracemalloc.start()
    try:
        save_model(model, tmp_path / "m.onnx", inline_limit_bytes=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One copy the other way round, an eighth for the result, and what the threads work on.
    assert peak < 2 * size
    assert (tmp_path / "m.onnx.data").stat().st_size < size / 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "quantize_weights: bits: 5; expected one of 2, 4, 8"),
        ({"block_size": 33}, "quantize_weights: block_size: 33; expected one of 16, 32, 64, 128, 256"),
        ({"accuracy_level": 9}, "quantize_weights: accuracy_level: 9; expected one of 0, 1, 2, 3, 4"),
        ({"search_steps": 101}, "quantize_weights: search_steps: 101; expected 0 to 100"),
    ],
)
def test_parameters_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        QuantizeWeights(**arguments)


@pytest.mark.parametrize("half_scales", [True, False])
def test_rows_of_one_number_are_as_exact_as_others(half_scales: bool) -> None:
    """As of padding tokens: the codes' product is no large number that the minimum's takes back."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 48)).astype(np.float32)
    weight[:, 3] = 0
    weight[32:, 5] = 0.25
    model = graph(
        '<ir_version: 9, opset_import: ["": 20]> g (float[n, 64] x) => (float[n, 48] y) { y = MatMul(x, w) }',
        w=weight,
    )
    options: dict[str, Any] = {"bits": 4, "block_size": 32, "minimums": True, "half_scales": half_scales}
    QuantizeWeights(**options)(model)
    x = (random.standard_normal((9, 64)) + 1).astype(np.float32)
    got = run(model, {"x": x})["y"]
    assert np.abs(got[:, 3]).max() < 1e-4
    half = np.zeros((64, 48), np.float32)
    half[32:, 5] = 0.25
    first = run(model, {"x": np.concatenate([np.zeros((9, 32), np.float32), x[:, 32:]], axis=1)})["y"]
    np.testing.assert_allclose(first[:, 5], (x @ half)[:, 5], atol=1e-3)
