"""Norms with a residual sum, split for CPUs; weights that a graph concatenates are stored joined."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import assert_same, graph, run, serialized
from onnxsmith.graph_passes import operator_counts
from onnxsmith.graph_passes.norms import SplitSkipLayerNorm
from onnxsmith.graph_passes.weights import join_concatenated_weights

HEAD = '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> '
RANDOM = np.random.default_rng(0)
FEEDS = {name: RANDOM.standard_normal((2, 3, 8)).astype(np.float32) for name in ("x", "skip")}
WEIGHTS = {name: RANDOM.standard_normal(8).astype(np.float32) for name in ("gamma", "beta", "bias")}


def skip_norm(inputs: str, outputs: str = "y", attributes: str = "", opset: int = 20) -> ir.Model:
    tail = "z = Relu(s) " if ", s" in outputs else "z = Relu(y) "
    model = graph(
        HEAD.replace('"": 20', f'"": {opset}')
        + "g (float[a, b, 8] x, float[a, b, 8] skip) => (float[a, b, 8] y, float[a, b, 8] z) "
        f"{{ {outputs} = com.microsoft.SkipLayerNormalization{attributes}({inputs}) {tail}}}",
        **WEIGHTS,
    )
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return model


@pytest.mark.parametrize("inputs", ["x, skip, gamma", "x, skip, gamma, beta", "x, skip, gamma, beta, bias"])
@pytest.mark.parametrize("outputs", ["y", "y, , , s"])
@pytest.mark.parametrize("attributes", ["", "<epsilon = 0.01>"])
def test_it_splits_to_the_same_numbers(inputs: str, outputs: str, attributes: str) -> None:
    model = skip_norm(inputs, outputs, attributes)
    before = run(model, FEEDS)
    assert SplitSkipLayerNorm()(model).changes.details == {"split": 1}
    assert operator_counts(model) == {"Sum": 1, "LayerNormalization": 1, "Relu": 1}
    assert_same(before, run(model, FEEDS), rtol=1e-6)
    content = serialized(model)
    assert not SplitSkipLayerNorm()(model).modified
    assert serialized(model) == content
    # Control: a weight of the norm matters.
    model.graph.initializers["gamma"].const_value = ir.tensor(2 * WEIGHTS["gamma"], name="gamma")
    with pytest.raises(AssertionError):
        assert_same(before, run(model, FEEDS), rtol=1e-3)


def test_it_stays_where_its_mean_is_used_or_the_operator_set_is_old() -> None:
    model = skip_norm("x, skip, gamma", "y, mean")
    node = next(iter(model.graph))
    reader = ir.node("Relu", [node.outputs[1]])
    model.graph.append(reader)
    outcome = SplitSkipLayerNorm()(model)
    assert not outcome.modified
    assert list(outcome.changes.skipped.values()) == ["its mean or deviation is used"]
    outcome = SplitSkipLayerNorm()(skip_norm("x, skip, gamma", opset=16))
    assert not outcome.modified
    assert outcome.changes.skipped == {"opset": "opset 16 has no LayerNormalization; 17 has (convert_opset)"}


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concatenated_weights_are_joined_when_they_are_written(axis: int) -> None:
    parts = {name: RANDOM.standard_normal((8, 8)).astype(np.float32) for name in ("a.q.w", "a.k.w")}
    model = graph(
        HEAD + f"g (float[n, m] x) => (float[n, k] y) {{ w = Concat<axis = {axis}>(q, k) y = MatMul(x, w) }}",
        q=parts["a.q.w"],
        k=parts["a.k.w"],
    )
    x = RANDOM.standard_normal((3, 16 if axis == 0 else 8)).astype(np.float32)
    before = run(model, {"x": x})
    assert join_concatenated_weights(model, min_elements=1000) == 0
    assert join_concatenated_weights(model, min_elements=100) == 1
    assert operator_counts(model) == {"MatMul": 1}
    [weight] = model.graph.initializers.values()
    assert isinstance(weight.const_value, ir.LazyTensor)
    assert_same(before, run(model, {"x": x}))
