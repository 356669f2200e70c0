"""Weights that become zero: which ones, by each method, and how little the output changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from generated_graphs import Array, graph, run
from onnxsmith.errors import BadInputError, PassError
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.sparsity import PruneWeights
from onnxsmith.sparse_rounding import keep_largest, keep_pattern, prune_sparsegpt, prune_wanda

pytest.importorskip("onnxruntime")

RANDOM = np.random.default_rng(11)


def correlated(rows: int, width: int) -> Array:
    """Activations as models have them: directions of very different size."""
    mixing = RANDOM.standard_normal((width, width)) * np.exp(RANDOM.standard_normal(width))
    return (RANDOM.standard_normal((rows, width)) @ mixing).astype(np.float32)


def error(matrix: Array, made: Array, x: Array) -> float:
    return float(np.square(x @ (made - matrix).T).sum() / np.square(x @ matrix.T).sum())


def test_sparsegpt_is_the_authors_algorithm_and_beats_wanda_and_magnitude() -> None:
    x, matrix = correlated(600, 160), RANDOM.standard_normal((48, 160)).astype(np.float32)
    moments = x.T @ x
    for ratio, pattern in ((0.5, None), (0.5, (2, 4)), (0.5, (4, 8))):
        made = prune_sparsegpt(matrix, moments, ratio, pattern)
        np.testing.assert_allclose(made, _reference(matrix, moments, ratio, pattern), rtol=2e-3, atol=2e-4)
        norms = np.sqrt(np.diagonal(moments))
        by_wanda = prune_wanda(matrix, norms, ratio, pattern)
        size = np.abs(matrix)
        kept = keep_pattern(size, *pattern) if pattern else keep_largest(size, ratio, by_row=False)
        by_size = np.where(kept, matrix, 0)
        errors = [error(matrix, m, x) for m in (made, by_wanda, by_size)]
        assert errors[0] < 0.7 * errors[1] < 0.7 * errors[2], errors
        assert (made == 0).mean() == pytest.approx(0.5, abs=0.01)


def _reference(matrix: Array, moments: Array, ratio: float, pattern: tuple[int, int] | None) -> Array:
    """SparseGPT's algorithm 1 as it is printed, weight by weight, in float64."""
    w, h = matrix.astype(np.float64), moments.astype(np.float64)
    h += 0.01 * np.diagonal(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.ones(w.shape, bool)
    for j in range(w.shape[1]):
        if pattern is None and j % 128 == 0:
            score = (w[:, j : j + 128] / np.diagonal(upper)[j : j + 128]) ** 2
            order = np.argsort(score, axis=None)[: int(ratio * score.size)]
            part = np.ones(score.size, bool)
            part[order] = False
            mask[:, j : j + 128] = part.reshape(score.shape)
        if pattern is not None and j % pattern[1] == 0:
            score = (w[:, j : j + pattern[1]] / np.diagonal(upper)[j : j + pattern[1]]) ** 2
            order = np.argsort(score, axis=1)[:, : pattern[1] - pattern[0]]
            np.put_along_axis(mask[:, j : j + pattern[1]], order, False, axis=1)
        loss = np.where(mask[:, j], 0, w[:, j]) / upper[j, j]
        w[:, j:] -= loss[:, None] * upper[j, j:]
        w[~mask[:, j], j] = 0
    return w


def test_wanda_takes_the_smallest_products_of_each_row() -> None:
    matrix = np.array([[1.0, 2.0, 3.0, 4.0], [8.0, -1.0, 0.5, 2.0]], np.float32)
    norms = np.array([10.0, 1.0, 1.0, 0.1], np.float32)
    np.testing.assert_array_equal(prune_wanda(matrix, norms, 0.5, None), [[1, 0, 3, 0], [8, -1, 0, 0]])
    np.testing.assert_array_equal(prune_wanda(matrix, norms, 0.5, (1, 2)), [[1, 0, 3, 0], [8, 0, 0.5, 0]])


def test_columns_that_never_see_anything_go_first_and_do_no_harm() -> None:
    x, matrix = correlated(300, 32), RANDOM.standard_normal((8, 32)).astype(np.float32)
    x[:, ::2] = 0
    made = prune_sparsegpt(matrix, x.T @ x, 0.5, None)
    assert error(matrix, made, x) < 1e-10
    assert not made[:, ::2].any()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 6),
    pattern=st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 4)]),
)
def test_a_pattern_holds_everywhere(rows: int, groups: int, pattern: tuple[int, int]) -> None:
    width = groups * pattern[1]
    random = np.random.default_rng(rows * 100 + groups)
    matrix = random.standard_normal((rows, width)).astype(np.float32)
    x = random.standard_normal((width + 4, width)).astype(np.float32)
    for made in (
        prune_sparsegpt(matrix, x.T @ x, 0.5, pattern),
        prune_wanda(matrix, np.sqrt(np.square(x).sum(0)), 0.5, pattern),
    ):
        counts = (made.reshape(rows, groups, pattern[1]) != 0).sum(2)
        assert (counts <= pattern[0]).all()


def _model() -> ir.Model:
    def weight(*shape: int) -> Array:
        return RANDOM.standard_normal(shape).astype(np.float32)

    return graph(
        '<ir_version: 9, opset_import: ["": 20]> g (float[b, 32] x) => (float[b, 24] y) '
        "{ h = MatMul(x, first) r = Relu(h) t = Transpose<perm = [1, 0]>(second) y = MatMul(r, t) }",
        first=weight(32, 40) * np.float32(0.1),
        second=weight(24, 40),
    )


def _calibrated(model: ir.Model, x: Array) -> None:
    def activations(source: ir.Model, names: Any) -> Iterator[Mapping[str, Array]]:
        copy = source.clone()
        values = {v.name: v for node in copy.graph for v in node.outputs} | {
            v.name: v for v in copy.graph.inputs
        }
        copy.graph.outputs.extend(values[name] for name in names if values[name].producer() is not None)
        for rows in np.split(x, 4):
            yield {"x": rows} | run(copy, {"x": rows})

    in_context(model, PassContext(activations=activations))


def _weights(model: ir.Model) -> tuple[Array, Array]:
    first, second = (model.graph.initializers[name].const_value for name in ("first", "second"))
    assert first is not None and second is not None
    return first.numpy(), second.numpy()


def test_the_pass_prunes_the_model_and_says_that_it_is_not_faster() -> None:
    x = correlated(400, 32)
    errors, model = {}, _model()
    for method in ("magnitude", "wanda", "sparsegpt"):
        fresh = model.clone()
        _calibrated(fresh, x)
        before = run(fresh, {"x": x})["y"]
        changes = PruneWeights(method=method)(fresh).changes  # type: ignore[arg-type]
        got = run(fresh, {"x": x})["y"]
        errors[method] = float(np.square(got - before).sum() / np.square(before).sum())
        assert changes.details["zeros"] == pytest.approx(0.5, abs=0.01)
        assert changes.details["mb_if_packed"] == pytest.approx(
            changes.details["mb"] * (0.5 + 1 / 32), rel=0.02
        )
        assert "not faster: ONNX Runtime stores zeros" in changes.details["speed"]
        assert all((w == 0).mean() == pytest.approx(0.5, abs=0.01) for w in _weights(fresh))
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_budgets_over_all_matrices_and_thresholds() -> None:
    model = _model()
    changes = PruneWeights(scope="global", ratio=0.5)(model).changes
    first, second = _weights(model)
    # The first matrix has weights a tenth as large, so most of the budget is taken there.
    assert changes.details["zeros"] == pytest.approx(0.5, abs=0.01)
    assert (first == 0).mean() > 0.75
    assert np.abs(first[first != 0]).min() >= np.abs(second[second == 0]).max()
    model = _model()
    whole = _weights(model)[1]
    PruneWeights(threshold=0.5)(model)
    np.testing.assert_array_equal(_weights(model)[1] == 0, np.abs(whole) < 0.5)


def test_what_cannot_be_pruned_is_told() -> None:
    with pytest.raises(PreconditionError, match="method sparsegpt without calibration data"):
        PruneWeights(method="sparsegpt")(_model())
    with pytest.raises(PassError, match="no MatMul with a constant float matrix to prune"):
        PruneWeights(skip_nodes=("*",))(_model())
    with pytest.raises(PassError, match="rows of 40 are no multiple of 16"):
        PruneWeights(pattern="8:16", skip_nodes=("first",))(_model())
    tied = graph(
        '<ir_version: 9, opset_import: ["": 20]> g (int64[b] i) => (float[b, 9] y) '
        "{ e = Gather(table, i) t = Transpose<perm = [1, 0]>(table) y = MatMul(e, t) }",
        table=RANDOM.standard_normal((9, 8)).astype(np.float32),
    )
    with pytest.raises(PassError, match="an embedding, and the head that shares it"):
        PruneWeights()(tied)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, "ratio: 1; expected 0 to below 1"),
        ({"pattern": "4:2"}, "pattern: 4:2; expected unstructured, or N:M"),
        ({"pattern": "2:5"}, "M a power of two"),
        ({"scope": "global", "method": "wanda"}, "expected method magnitude, unstructured"),
        ({"threshold": -0.1}, "threshold: -0.1; expected 0 or more"),
        ({"damping": 0.0}, "damping: 0; expected a number above 0"),
    ],
)
def test_values_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        PruneWeights(**arguments)
