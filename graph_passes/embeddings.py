"""Embedding tables: what the graph does to each of their rows can be done to the table once."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import int_attribute, is_operator
from onnxsmith.graph_passes.rewriting import NoMatchError, rewrite_each
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["FoldEmbeddingScale"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class FoldEmbeddingScale(GraphPass):
    """Multiplies an embedding table with the constant that each of its rows is multiplied with.

    Marian, BART and Gemma scale their embeddings by the root of the width. The product is the same to the
    bit. It is computed when the table is written. A table that the output head shares stays as it is.
    """

    name: ClassVar[str] = "fold_embedding_scale"
    summary: ClassVar[str] = "embeddings that are scaled by a constant are stored scaled"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Folds in the main graph, and says which tables stay and why."""
        changes, _ = rewrite_each(model, _rewrite)
        if changes.count:
            changes.details = {"folded": changes.count}
        return changes


def _rewrite(graph: ir.Graph, node: ir.Node) -> str | None:
    found = _scale(node) if is_operator(node, "Gather") else None
    if found is None:
        return None
    _fold(graph, node, *found)
    return "folded"


def _scale(gather: ir.Node) -> tuple[ir.Node, ir.TensorProtocol] | None:
    """The Mul that scales rows of a table by one number, and the number."""
    table = constant_of(gather.inputs[0])
    if table is None or len(table.shape) != 2 or table.dtype not in _FLOATS or int_attribute(gather, "axis"):
        return None
    for user in gather.outputs[0].consumers():
        if not is_operator(user, "Mul"):
            continue
        for value in user.inputs:
            tensor = constant_of(value)
            if tensor is not None and tensor.size == 1 and len(tensor.shape) <= 1:
                return user, tensor
    return None


def _fold(graph: ir.Graph, gather: ir.Node, product: ir.Node, scale: ir.TensorProtocol) -> None:
    table, rows = gather.inputs[0], gather.outputs[0]
    assert table is not None and table.const_value is not None
    if not table.is_initializer():
        raise NoMatchError("the table is a Constant node; expected an initializer (run cleanup first)")
    if len(table.uses()) != 1 or table.is_graph_output():
        raise NoMatchError(f"the table {table.name!r} is used elsewhere too")
    if len(rows.uses()) != 1 or rows.is_graph_output():
        raise NoMatchError("the rows are also used without the scale")
    if product.graph is not graph:
        raise NoMatchError("the rows are scaled in a subgraph")
    tensor = table.const_value
    name = table.name

    def compute() -> ir.TensorProtocol:
        scaled = tensor.numpy() * scale.numpy().reshape(())
        return ir.Tensor(np.asarray(scaled, tensor.dtype.numpy()), dtype=tensor.dtype, name=name)

    # Not in the place of the old tensor: other models may share it, and it is renamed with its value.
    graph.initializers.pop(name or "")
    table.const_value = None
    table.name = f"{name}_unscaled"
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
    value.const_value = ir.LazyTensor(compute, dtype=tensor.dtype, shape=shape, name=name)
    graph.register_initializer(value)
    gather.replace_input_with(0, value)
    output = product.outputs[0]
    # The name of what has this value now, so that tensors of the two graphs can be compared.
    rows.name, output.name = output.name, f"{output.name}_scaled"
    rows.type, rows.shape = output.type or rows.type, output.shape or rows.shape
    output.replace_all_uses_with(rows, replace_graph_outputs=True)
