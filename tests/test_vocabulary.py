"""Rows of embeddings that data never uses: left out without a change for tokens of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from generated_graphs import Array, assert_same, graph, run
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.vocabulary import PruneVocabulary

pytest.importorskip("onnxruntime")

TABLE = np.random.default_rng(2).standard_normal((50, 6)).astype(np.float32)
DATA = ([[3, 7, 7, 49]], [[0, 12, 3, 8]])


def model_of(body: str, output: str = "float[b, s, 4] y", **more: Array) -> ir.Model:
    weights = {"table": TABLE, **more}
    return graph(
        f'<ir_version: 9, opset_import: ["": 20]> g (int64[b, s] input_ids) => ({output}) {{ {body} }}',
        **weights,
    )


def embedding() -> ir.Model:
    head = np.random.default_rng(3).standard_normal((6, 4)).astype(np.float32)
    model = model_of("e = Gather(table, input_ids) y = MatMul(e, head)", head=head)

    def activations(source: ir.Model, names: Any) -> Iterator[Mapping[str, Array]]:
        for ids in DATA:
            yield {"input_ids": np.array(ids)} | run(source, {"input_ids": np.array(ids)})

    in_context(model, PassContext(activations=activations))
    return model


def test_tokens_of_the_data_are_as_before_and_others_get_the_mean() -> None:
    model = embedding()
    whole = model.clone()
    changes = PruneVocabulary(keep=(21,))(model).changes
    assert changes.details["table"] == {"rows_before": 50, "rows_left": 8}
    assert model.graph.initializers["table"].const_value.shape == (8, 6)  # type: ignore[union-attr]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for ids in (*DATA, [[21, 8, -1, 0]]):
        feeds = {"input_ids": np.array(ids)}
        assert_same(run(whole, feeds), run(model, feeds))
    unseen = run(model, {"input_ids": np.array([[1, 2]])})["y"]
    gone = np.delete(TABLE, [0, 3, 7, 8, 12, 21, 49], axis=0).mean(0)
    head = whole.graph.initializers["head"].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(unseen, np.broadcast_to(gone @ head, unseen.shape), rtol=1e-5, atol=1e-6)
    # The control: these had rows of their own.
    assert not np.allclose(run(whole, {"input_ids": np.array([[1, 2]])})["y"], unseen)
    assert not PruneVocabulary()(model).modified


def test_what_cannot_shrink_is_told() -> None:
    tied = model_of(
        "e = Gather(table, input_ids) t = Transpose<perm = [1, 0]>(table) y = MatMul(e, t)",
        "float[b, s, 50] y",
    )
    with pytest.raises(PreconditionError, match="the output head, whose logits need every row"):
        PruneVocabulary()(tied)
    model = embedding()
    with pytest.raises(PreconditionError, match="no embedding of 'tokens' whose rows can go"):
        PruneVocabulary(input="tokens")(model)
    in_context(model, None)
    with pytest.raises(PreconditionError, match="no calibration data; expected data whose tokens stay"):
        PruneVocabulary()(model)
