"""Algorithms that look at activations: GPTQ, AWQ and HQQ, on graphs whose activations have outliers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import Array, graph, run
from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.graph_passes.blocks import dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import Outcome, PreconditionError
from onnxsmith.graph_passes.gptq import gptq_blocks, inverse_factor, second_moments
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.sparse_rounding import output_error
from sample_activations import activations_on

RANDOM = np.random.default_rng(7)
TEXT = """<ir_version: 9, opset_import: ["": 18]>
g (float[1, s, 64] x) => (float[1, s, 64] y) {
  h = LayerNormalization<axis = -1>(x, gain, shift)
  a = MatMul(h, w1)
  b = MatMul(h, w2)
  c = Relu(a)
  d = Mul(c, b)
  y = MatMul(d, w3)
}"""


def weights() -> dict[str, Array]:
    gain = np.ones(64, np.float32)
    gain[[3, 40]] = 25
    return {
        "gain": gain,
        "shift": np.zeros(64, np.float32),
        "w1": RANDOM.standard_normal((64, 96)).astype(np.float32),
        "w2": RANDOM.standard_normal((64, 96)).astype(np.float32),
        "w3": RANDOM.standard_normal((96, 64)).astype(np.float32),
    }


def batches(count: int = 6) -> list[Array]:
    # Correlated, as activations are: that is what GPTQ lives on.
    mix = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    random = np.random.default_rng(2)
    return [
        (random.standard_normal((1, 32, 16)).astype(np.float32) @ mix)
        + random.standard_normal((1, 32, 64)).astype(np.float32) * np.float32(0.3)
        for _ in range(count)
    ]


activations = activations_on([{"x": x} for x in batches()])


def quantized(**options: Any) -> tuple[Outcome, float]:
    """The outcome, and the error of the outputs on data that the pass did not see."""
    given = weights()
    model = graph(TEXT, **given)
    fresh = batches(8)[-1]
    expected = run(model, {"x": fresh})["y"]
    in_context(model, PassContext(activations=activations, calibration={"data": "made up"}))
    outcome = QuantizeWeights(bits=4, accuracy_level=1, **options)(model)
    got = run(model, {"x": fresh})["y"]
    return outcome, float(np.square(got - expected).mean() / np.square(expected).mean())


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    global RANDOM
    RANDOM = np.random.default_rng(7)


@pytest.mark.parametrize("form", [{}, {"symmetric": True}, {"minimums": True}], ids=str)
def test_gptq_loses_less_than_rounding_to_nearest(form: dict[str, bool]) -> None:
    _, nearest = quantized(**form)
    outcome, error = quantized(method="gptq", **form)
    assert 0 < error < 0.6 * nearest
    layers = outcome.changes.details["layers"]
    assert {entry["method"] for entry in layers.values()} == {"gptq"}
    assert all(0 < entry["output_error"] < 0.05 for entry in layers.values())
    assert outcome.changes.details["calibration"] == {"data": "made up"}


def test_awq_loses_less_than_rounding_to_nearest_and_folds_into_the_norm() -> None:
    _, nearest = quantized()
    outcome, error = quantized(method="awq")
    assert 0 < error < 0.8 * nearest
    layers = outcome.changes.details["layers"]
    assert layers["w1"]["exponent"] == layers["w2"]["exponent"] > 0
    assert layers["w1"]["scaling"] == "folded"
    assert layers["w3"]["scaling"] in ("multiplied", "none needed")


def test_scaling_alone_changes_nothing() -> None:
    from onnxsmith.graph_passes.awq import divide_activation, scale_weight
    from onnxsmith.graph_passes.block_operators import find_weights

    model = graph(TEXT, **weights())
    x = batches(1)[0]
    expected = run(model, {"x": x})["y"]
    found, _ = find_weights(model, embeddings=False, skip_nodes=())
    factors = {
        64: RANDOM.uniform(0.3, 3, 64).astype(np.float32),
        96: RANDOM.uniform(0.3, 3, 96).astype(np.float32),
    }
    for pair, how in ((found[:2], "folded"), (found[2:], "multiplied")):
        scale = factors[pair[0].shape[1]]
        nodes = [user.node for w in pair for user in w.users if not isinstance(user, ir.Node)]
        assert divide_activation(model, pair[0].activations[0], nodes, scale) == how
        for weight in pair:
            scale_weight(model, weight, scale)
    np.testing.assert_allclose(
        run(model, {"x": x})["y"], expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )
    # Control: without the other half it is something else.
    scale_weight(model, found[2], factors[96])
    assert np.abs(run(model, {"x": x})["y"] - expected).max() > 0.1 * np.abs(expected).max()


def test_gptq_of_one_weight_is_better_in_the_output_and_worse_in_the_weight() -> None:
    matrix = RANDOM.standard_normal((48, 64)).astype(np.float32)
    x = np.concatenate(batches())[:, :, :].reshape(-1, 64)
    moments = x.T @ x / len(x)
    options: dict[str, Any] = {"bits": 4, "block_size": 32, "symmetric": False, "minimums": False}
    plain = dequantize_blocks(quantize_blocks(matrix, **options, search_steps=9))
    blocks = gptq_blocks(matrix, inverse_factor(moments), **options, search_steps=9, scale_type=np.float32)
    better = dequantize_blocks(blocks)
    assert output_error(matrix, better, moments) < 0.5 * output_error(matrix, plain, moments)
    assert np.square(better - matrix).sum() > np.square(plain - matrix).sum()
    measured = np.square(x @ (better - matrix).T).mean() / np.square(x @ matrix.T).mean()
    assert output_error(matrix, better, moments) == pytest.approx(measured, rel=1e-3)


def test_unused_and_repeated_columns_do_no_harm() -> None:
    matrix = RANDOM.standard_normal((8, 32)).astype(np.float32)
    x = RANDOM.standard_normal((100, 32)).astype(np.float32)
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    blocks = gptq_blocks(
        matrix, inverse_factor(x.T @ x / 100, damping=0.0), bits=4, block_size=32, symmetric=False,
        minimums=False, search_steps=0, scale_type=np.float32,
    )  # fmt: skip
    assert np.isfinite(dequantize_blocks(blocks)).all()


def test_the_factor_is_that_of_the_inverse() -> None:
    x = np.random.default_rng(2).standard_normal((400, 150)).astype(np.float32)
    moments = x.T @ x / 400
    factor = inverse_factor(moments, damping=0.1)
    damped = moments.astype(np.float64) + 0.1 * np.diagonal(moments).mean() * np.eye(150)
    want = np.linalg.inv(damped[np.ix_(factor.order, factor.order)])
    upper = factor.upper.astype(np.float64)
    assert np.all(np.tril(upper, -1) == 0)
    np.testing.assert_allclose(upper.T @ upper, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_moments_are_bounded_in_memory_by_running_again() -> None:
    model = graph(TEXT, **weights())
    runs: list[list[str]] = []

    def counted(model: ir.Model, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        runs.append(list(names))
        return activations(model, names)

    widths = {"h": 64, "d": 96}
    at_once = dict(second_moments(model, widths, counted))
    one_by_one = dict(second_moments(model, widths, counted, limit_bytes=1))
    assert runs == [["h", "d"], ["h"], ["d"]]
    for name in widths:
        np.testing.assert_array_equal(at_once[name], one_by_one[name])
    h = np.concatenate([batch["h"].reshape(-1, 64) for batch in activations(model, ["h"])])
    np.testing.assert_allclose(at_once["h"], h.T @ h / len(h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("minimums", [False, True])
def test_hqq_makes_the_typical_error_smaller(minimums: bool) -> None:
    matrix = RANDOM.standard_t(2, (64, 128)).astype(np.float32)
    options: dict[str, Any] = {"bits": 4, "block_size": 64, "symmetric": False, "minimums": minimums}
    plain = np.abs(dequantize_blocks(quantize_blocks(matrix, **options)) - matrix)
    sparse = np.abs(dequantize_blocks(quantize_blocks(matrix, **options, method="hqq")) - matrix)
    assert np.sqrt(sparse).mean() < np.sqrt(plain).mean()
    assert quantized(method="hqq", minimums=minimums)[1] < 0.05


def test_minimums_lose_less_than_zero_points() -> None:
    assert quantized(minimums=True)[1] < 0.95 * quantized()[1]
    small = quantized(minimums=True, half_scales=True)
    assert small[1] < 0.95 * quantized()[1]


@pytest.mark.parametrize("options", [{"symmetric": True}, {"minimums": True}, {}], ids=str)
def test_two_bits(options: dict[str, bool]) -> None:
    model = graph(TEXT, **weights())
    QuantizeWeights(bits=2, accuracy_level=1, **options)(model)
    matrices = weights_of(options)
    x = batches(1)[0]
    got = run(model, {"x": x})["y"]
    reference = graph(TEXT, **matrices)
    want = run(reference, {"x": x})["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def weights_of(options: dict[str, bool]) -> dict[str, Array]:
    global RANDOM
    RANDOM = np.random.default_rng(7)
    made = weights()
    settings: dict[str, Any] = {"bits": 2, "block_size": 32, "search_steps": QuantizeWeights().search_steps}
    settings |= {"symmetric": options.get("symmetric", False), "minimums": options.get("minimums", False)}
    for name in ("w1", "w2", "w3"):
        rows = np.ascontiguousarray(made[name].T)
        made[name] = np.ascontiguousarray(dequantize_blocks(quantize_blocks(rows, **settings)).T)
    return made


def test_overrides_by_pattern() -> None:
    outcome, _ = quantized(overrides={"w3": {"bits": 8, "symmetric": True}, "w*": {"minimums": True}})
    layers = outcome.changes.details["layers"]
    assert (layers["w3"]["bits"], layers["w3"]["zero_points"]) == (8, "none")
    assert (layers["w1"]["bits"], layers["w1"]["zero_points"]) == (4, "float minimum")


def test_a_block_that_fits() -> None:
    outcome, _ = quantized(block_size=64)
    layers = outcome.changes.details["layers"]
    assert {name: layers[name]["block_size"] for name in ("w1", "w3")} == {"w1": 64, "w3": 32}


TIED = """<ir_version: 9, opset_import: ["": 18]>
g (int64[1, s] ids) => (float[1, s, n] y, float[1, s, k] e) {
  e = Gather(table, ids)
  h = Mul(e, wide)
  a = MatMul(h, w)
  t = Transpose<perm = [1, 0]>(table)
  y = MatMul(a, t)
}"""


def tied() -> dict[str, Array]:
    random = np.random.default_rng(11)
    wide = np.ones(64, np.float32)
    wide[[3, 40]] = 20
    return {
        "table": random.standard_normal((96, 64)).astype(np.float32),
        "wide": wide,
        # Channels of very different size, as the last hidden states of a language model are.
        "w": (random.standard_normal((64, 64)) * np.geomspace(0.02, 4, 64)[random.permutation(64)]).astype(
            np.float32
        ),
    }


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_embedding_that_is_a_head_too_keeps_both_uses(method: str) -> None:
    random = np.random.default_rng(5)
    samples = [random.integers(0, 96, (1, 40)) for _ in range(8)]

    def errors(method: str) -> tuple[float, float, dict[str, Any]]:
        model = graph(TIED, **tied())
        want = run(model, {"ids": samples[-1]})
        in_context(model, PassContext(activations=activations_on([{"ids": ids} for ids in samples[:-1]])))
        outcome = QuantizeWeights(method=method, accuracy_level=1, skip_nodes=("w",))(model)  # type: ignore[arg-type]
        got = run(model, {"ids": samples[-1]})
        assert list(got) == ["y", "e"]
        lost = [float(np.square(got[n] - want[n]).sum() / np.square(want[n]).sum()) for n in ("y", "e")]
        assert sum(v.dtype == ir.DataType.UINT8 and v.const_value.size > 1000  # type: ignore[union-attr]
                   for v in model.graph.initializers.values()) == 1  # fmt: skip
        return lost[0], lost[1], outcome.changes.details["layers"]["table"]

    nearest_head, nearest_rows, _ = errors("rtn")
    head, rows, entry = errors(method)
    assert entry["method"] == method and entry["output_error"] > 0
    if method == "gptq":
        assert head < 0.8 * nearest_head
    # What the head gains the embedding does not lose many times over.
    assert head < 1.1 * nearest_head and rows < 1.5 * nearest_rows


def test_an_embedding_of_finer_blocks() -> None:
    def entries(**options: Any) -> dict[str, Any]:
        model = graph(TIED, **tied())
        layers: dict[str, Any] = QuantizeWeights(**options)(model).changes.details["layers"]
        return layers

    finer = entries(embedding_block_size=16)
    assert finer["table"]["block_size"] == 16 and finer["w"]["block_size"] == 32
    changed = entries(embedding_block_size=16, overrides={"tab*": {"block_size": 32}})
    assert changed["table"]["block_size"] == 32


def test_methods_that_need_data_say_so() -> None:
    with pytest.raises(PreconditionError, match=r"method gptq without calibration data.*--calibration-data"):
        QuantizeWeights(method="gptq")(graph(TEXT, **weights()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"symmetric": True, "minimums": True},
            BadInputError,
            "symmetric and minimums; expected one of them",
        ),
        ({"overrides": {"w*": {"bit": 4}}}, UnknownNameError, "overrides of 'w.*unknown key 'bit'"),
        (
            {"overrides": {"w*": {"bits": 3}}},
            BadInputError,
            r"overrides of 'w\*': bits: 3; expected one of 2",
        ),
        ({"method": "magic"}, BadInputError, "method: 'magic'; expected one of rtn, hqq, gptq, awq"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizeWeights(**options)


def test_computed_scales_are_right_without_optimisation_too() -> None:
    from onnxsmith.package import Component, ModelPackage
    from onnxsmith.runtime import OrtSession

    model = graph(TEXT, **weights())
    x = batches(1)[0]
    expected = run(model, {"x": x})["y"]
    QuantizeWeights(bits=8, half_scales=True, accuracy_level=4)(model)
    # Control: with ONNX Runtime's optimisation off altogether, the int8 kernel sees no scales.
    assert np.abs(run(model, {"x": x})["y"] - expected).max() > 0.5 * np.abs(expected).max()
    for optimize in (True, False):
        with OrtSession(ModelPackage({"model": Component(model)}), optimize=optimize) as session:
            got = session.run({"x": x})["y"]
        assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
