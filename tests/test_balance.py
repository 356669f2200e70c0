"""Columns of activations and weights of one spread: exact without rounding, and less lost with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from generated_graphs import Array, graph, run
from onnxsmith.graph_passes import PRESETS
from onnxsmith.graph_passes.balance import balance_columns
from onnxsmith.graph_passes.block_operators import find_weights
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.quantization import QuantizeWeights
from sample_activations import activations_on

# The embedding is the head, too; the first norm has readers besides a product, the second has none.
TEXT = """<ir_version: 9, opset_import: ["": 18]>
g (int64[1, s] ids) => (float[1, s, n] y, float[1, s, k] r) {
  e = Gather(table, ids)
  h = LayerNormalization<axis = -1>(e, gain, shift)
  a = MatMul(h, w1)
  r = Relu(h)
  f = LayerNormalization<axis = -1>(a, gain2, shift2)
  b = MatMul(f, w2)
  c = MatMul(f, w3)
  d = Mul(b, c)
  l = LayerNormalization<axis = -1>(d, gain3, shift3)
  t = Transpose<perm = [1, 0]>(table)
  y = MatMul(l, t)
}"""


def weights() -> dict[str, Array]:
    random = np.random.default_rng(3)

    def gain() -> Array:
        # What language models have: few columns far larger than those beside them.
        made = random.uniform(0.5, 1.5, 64)
        made[random.permutation(64)[:6]] *= 30
        return made.astype(np.float32)

    def matrix(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    return {
        "table": matrix(128, 64), "w1": matrix(64, 64), "w2": matrix(64, 64), "w3": matrix(64, 64),
        "gain": gain(), "gain2": gain(), "gain3": gain(),
        "shift": matrix(64), "shift2": matrix(64), "shift3": matrix(64),
    }  # fmt: skip


def samples() -> list[Array]:
    random = np.random.default_rng(4)
    return [random.integers(0, 128, (1, 48)) for _ in range(10)]


activations = activations_on([{"ids": ids} for ids in samples()[:-1]])


def test_scaling_alone_changes_nothing() -> None:
    model = graph(TEXT, **weights())
    fresh = {"ids": samples()[-1]}
    expected = run(model, fresh)
    found, _ = find_weights(model, embeddings=True, skip_nodes=())
    assert balance_columns(model, found, activations, block_size=32).keys() == {"w2", "w3", "table"}
    # It did something: columns of the weights are others now; the norm before w1 is read besides.
    changed = {weight.name: weight.rows() for weight in found}
    given = weights()
    np.testing.assert_array_equal(changed["w1"], given["w1"].T)
    assert np.abs(changed["w2"] / given["w2"].T - 1).max() > 1
    got = run(model, fresh)
    for name, want in expected.items():
        np.testing.assert_allclose(got[name], want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_a_weight_that_is_read_elsewhere_stays_as_it_is() -> None:
    model = graph(TEXT, **weights())
    fresh = {"ids": samples()[-1]}
    expected = run(model, fresh)
    found, _ = find_weights(model, embeddings=False, skip_nodes=())
    assert [weight.name for weight in found] == ["w1", "w2", "w3", "table"]
    assert balance_columns(model, found, activations, block_size=32) == {"w2": 0.5, "w3": 0.5}
    got = run(model, fresh)
    np.testing.assert_allclose(got["y"], expected["y"], rtol=0, atol=2e-5 * np.abs(expected["y"]).max())


@pytest.mark.parametrize("options", [{"method": "awq"}, {"balance": True, "bits": 8}], ids=str)
def test_an_embedding_that_stays_in_float_is_not_scaled(options: dict[str, Any]) -> None:
    model = graph(TEXT, **weights())
    fresh = {"ids": samples()[-1]}
    expected = run(model, fresh)["r"]
    in_context(model, PassContext(activations=activations))
    QuantizeWeights(embeddings=False, **options)(model)
    np.testing.assert_array_equal(run(model, fresh)["r"], expected)


def test_columns_are_as_large_in_both() -> None:
    model = graph(TEXT, **weights())
    found, _ = find_weights(model, embeddings=False, skip_nodes=())
    balance_columns(model, found, activations, block_size=32)
    w2, w3 = (weight.rows() for weight in found if weight.name in ("w2", "w3"))
    columns = np.sqrt(np.square(np.concatenate([w2, w3])).mean(0))
    batches = [batch["f"].reshape(-1, 64) for batch in activations(model, ["f"])]
    inputs = np.sqrt(np.square(np.concatenate(batches)).mean(0))
    ratio = inputs / columns
    # All of the data beside the samples that were looked at.
    np.testing.assert_allclose(ratio / ratio.mean(), 1, atol=0.1)


def lost(**options: Any) -> tuple[float, dict[str, Any]]:
    model = graph(TEXT, **weights())
    fresh = {"ids": samples()[-1]}
    expected = run(model, fresh)["y"]
    in_context(model, PassContext(activations=activations, calibration={"data": "made up"}))
    details = QuantizeWeights(bits=8, symmetric=True, **options)(model).changes.details
    got = run(model, fresh)["y"]
    return float(np.square(got - expected).mean() / np.square(expected).mean()), details


def test_int8_arithmetic_loses_less() -> None:
    # The head alone stays in float at first.
    plain, balanced = (lost(skip_nodes=("w1", "table"), balance=balance)[0] for balance in (False, True))
    assert 0 < balanced < 0.4 * plain
    plain, _ = lost(skip_nodes=("w1",))
    balanced, details = lost(skip_nodes=("w1",), balance=True)
    assert 0 < balanced < 0.8 * plain
    exponents = {name: entry["balanced"] for name, entry in details["layers"].items()}
    assert exponents["w2"] == exponents["w3"] == 0.5
    # Rows that are looked up would lose what the product gains.
    assert 0 <= exponents["table"] < 0.5
    assert details["calibration"] == {"data": "made up"}


def test_without_a_norm_nothing_is_scaled() -> None:
    text = """<ir_version: 9, opset_import: ["": 18]>
g (float[1, s, 64] x) => (float[1, s, 64] y) {
  h = Relu(x)
  y = MatMul(h, w1)
}"""
    model = graph(text, w1=weights()["w1"])
    in_context(model, PassContext(activations=activations))
    details = QuantizeWeights(bits=8, symmetric=True, balance=True)(model).changes.details
    assert not details["layers"]["w1"]["balanced"]


def test_it_needs_data_and_says_so() -> None:
    name, options = next(spec for spec in PRESETS["cpu-int8-calibrated"] if spec[0] == "quantize_weights")
    assert name == "quantize_weights"
    with pytest.raises(PreconditionError, match=r"balance without calibration data.*--calibration-data"):
        QuantizeWeights(**options)(graph(TEXT, **weights()))
