"""Weights as a graph holds them: which tensor a MatMul multiplies with, and which way round it lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass

__all__ = ["MatMulWeight", "TransposeWeights", "constant_of", "find_matmul_weights", "is_transpose"]


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value always has, from an initializer or a Constant node; None if it varies.

    An initializer that is also a graph input is a default that a caller may replace, so it varies.
    """
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return None


def is_transpose(node: ir.Node | None) -> bool:
    """Whether a node swaps the two axes of a matrix."""
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return False
    permutation = node.attributes.get("perm")
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    rank = shape.rank() if shape is not None else None
    if permutation is None:
        return rank == 2
    return list(permutation.as_ints()) == [1, 0]


@dataclasses.dataclass(frozen=True)
class MatMulWeight:
    """A matrix multiplication with a constant right side.

    Attributes:
        node: The MatMul (or FusedMatMul of ONNX Runtime).
        activation: Its left side, of shape (..., K).
        source: The initializer that holds the weight.
        is_transposed: True if the initializer lies as (N, K), False if as (K, N).
        in_features: K.
        out_features: N.
    """

    node: ir.Node
    activation: ir.Value
    source: ir.Value
    is_transposed: bool
    in_features: int
    out_features: int

    def rows(self) -> npt.NDArray[np.float32]:
        """The weight as (N, K), float32."""
        assert self.source.const_value is not None
        array = self.source.const_value.numpy()
        return np.ascontiguousarray(array if self.is_transposed else array.T, dtype=np.float32)


def find_matmul_weights(model: ir.Model) -> Iterator[MatMulWeight | tuple[ir.Node, str]]:
    """Finds the matrix multiplications of the main graph that have a constant float matrix on the right.

    Yields:
        The weight; or the node and the reason why a MatMul with a constant has none that can be used.
    """
    for node in model.graph:
        if (node.domain, node.op_type) not in {("", "MatMul"), ("com.microsoft", "FusedMatMul")}:
            continue
        left, right = node.inputs
        if left is None or right is None:
            continue
        swapped = False
        producer = right.producer()
        if is_transpose(producer):
            assert producer is not None
            swapped, right = True, producer.inputs[0]
        tensor = constant_of(right)
        if tensor is None or right is None:
            continue
        if not right.is_initializer():
            yield node, "the weight is a Constant node; expected an initializer (run cleanup first)"
            continue
        if node.op_type == "FusedMatMul":
            reason = _fused_reason(node)
            if reason:
                yield node, reason
                continue
            swapped ^= bool(_int(node, "transB"))
        if len(tensor.shape) != 2:
            yield node, f"the weight has {len(tensor.shape)} axes; expected 2"
        elif tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            yield node, f"the weight is {tensor.dtype.name}; expected FLOAT or FLOAT16"
        else:
            rows, columns = tensor.shape.numpy()
            n, k = (rows, columns) if swapped else (columns, rows)
            yield MatMulWeight(node, left, right, swapped, in_features=k, out_features=n)


def _fused_reason(node: ir.Node) -> str:
    alpha = node.attributes.get("alpha")
    if alpha is not None and alpha.as_float() != 1.0:
        return f"FusedMatMul scales by {alpha.as_float():g}"
    for name in ("transA", "transBatchA", "transBatchB"):
        if _int(node, name):
            return f"FusedMatMul has {name}"
    return ""


def _int(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


class TransposeWeights(GraphPass):
    """Stores a weight the way round that it is used, and drops the Transpose.

    Only where the Transpose is the weight's single consumer: a weight that is shared, such as an
    embedding tied to the output head, stays one initializer. The new tensor is computed when it is
    written, so no weight is copied in memory.
    """

    name: ClassVar[str] = "transpose_weights"
    summary: ClassVar[str] = "store weights the way round that MatMul reads them; tied weights stay tied"

    def apply(self, model: ir.Model) -> Changes:
        """Replaces each Transpose of a weight by a weight that is computed when it is written."""
        graph = model.graph
        skipped: dict[str, str] = {}
        count = 0
        for node in list(graph):
            if not is_transpose(node):
                continue
            source = node.inputs[0]
            if source is None or constant_of(source) is None or not source.is_initializer():
                continue
            if len(source.uses()) != 1 or source.is_graph_output():
                skipped[source.name or "?"] = f"used in {len(source.uses())} places, so it stays shared"
                continue
            output = node.outputs[0]
            if output.is_graph_output():
                skipped[source.name or "?"] = "its transpose is an output of the graph"
                continue
            tensor = source.const_value
            assert tensor is not None
            shape = ir.Shape(tensor.shape.numpy()[::-1])
            name = source.name
            graph.initializers.pop(name or "")
            # Before it is renamed, because that would rename the tensor, which other models may share.
            source.const_value = None
            source.name = f"{name}_untransposed"
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
            value.const_value = _transposed(tensor, shape, name)
            graph.register_initializer(value)
            output.replace_all_uses_with(value)
            graph.remove(node, safe=True)
            count += 1
        return Changes(count, {"transposed": count}, skipped)


def _transposed(tensor: ir.TensorProtocol, shape: ir.Shape, name: str | None) -> ir.LazyTensor:
    def compute() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=shape, name=name)
