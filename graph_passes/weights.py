"""Weights as a graph holds them: which tensor a MatMul multiplies with, and which way round it lies."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.onnx_file import drop_pages
from onnxsmith.stored_rows import known_rows, note_rows

__all__ = [
    "PACKED_FROM",
    "MatMulWeight",
    "TransposeWeights",
    "common_name",
    "constant_of",
    "find_matmul_weights",
    "is_transpose",
    "join_concatenated_weights",
    "joined_weights",
    "lazy_initializer",
    "matrix_rows",
    "rows_tensor",
    "turned",
    "turned_weight",
]

_CACHE_LINE_BYTES = 64
# Where a tensor that was turned keeps what it was turned from.
_TURNED_FROM = "onnxsmith.turned_from"

PACKED_FROM = "onnxsmith.packed_from"
"""Metadata of a joined weight: a JSON list with the names of the weights in it, in order."""


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


def lazy_initializer(
    graph: ir.Graph,
    name: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    compute: Callable[[], npt.NDArray[Any]],
) -> ir.Value:
    """A new initializer, under a name that is free, that is computed when it is read."""
    sizes = ir.Shape(list(shape))
    value = ir.Value(name=name, shape=sizes, type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(compute(), dtype=dtype, name=name), dtype=dtype, shape=sizes, name=name
    )
    graph.register_initializer(value)
    return value


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
        return np.asarray(matrix_rows(self.source.const_value, self.is_transposed), dtype=np.float32)


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
            output.replace_all_uses_with(turned_weight(graph, source))
            graph.remove(node, safe=True)
            count += 1
        return Changes(count, {"transposed": count}, skipped)


def turned_weight(graph: ir.Graph, source: ir.Value) -> ir.Value:
    """A matrix the other way round, under the name and in the place of one that nobody will read any more.

    It is computed when it is written.
    """
    tensor, name = source.const_value, source.name
    assert tensor is not None
    shape = ir.Shape(tensor.shape.numpy()[::-1])
    graph.initializers.pop(name or "")
    # Before it is renamed, because that would rename the tensor, which other models may share.
    source.const_value = None
    source.name = f"{name}_untransposed"
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
    value.const_value = _transposed(tensor, shape, name)
    graph.register_initializer(value)
    return value


def _transposed(tensor: ir.TensorProtocol, shape: ir.Shape, name: str | None) -> ir.LazyTensor:
    def compute() -> ir.TensorProtocol:
        array = turned(tensor.numpy())
        drop_pages(tensor)
        return ir.Tensor(array, dtype=tensor.dtype, name=name)

    made = ir.LazyTensor(compute, dtype=tensor.dtype, shape=shape, name=name)
    made.meta[_TURNED_FROM] = tensor
    return made


def rows_tensor(tensor: ir.TensorProtocol, is_transposed: bool) -> ir.TensorProtocol | None:
    """The tensor that has a weight as (N, K): it itself, or what it was turned from; None where that is lost.

    Args:
        tensor: The weight.
        is_transposed: True if it lies as (N, K), False if as (K, N).
    """
    found: ir.TensorProtocol | None = tensor if is_transposed else tensor.meta.get(_TURNED_FROM)
    return found


def matrix_rows(tensor: ir.TensorProtocol, is_transposed: bool) -> npt.NDArray[Any]:
    """A weight as (N, K), in its own element type; what was turned is not turned back but read as it was."""
    straight = rows_tensor(tensor, is_transposed)
    return np.ascontiguousarray(turned(tensor.numpy()) if straight is None else straight.numpy())


def turned(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A transposed copy. numpy's own writes one element to each cache line, and is five times slower."""
    rows = max(1, _CACHE_LINE_BYTES // matrix.itemsize)
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, matrix.shape[0], rows):
        result[:, start : start + rows] = matrix[start : start + rows].T
    return result


def joined_weights(graph: ir.Graph, sources: Sequence[ir.Value], *, axis: int) -> ir.Value:
    """A new initializer that holds others one after the other, put together when it is written."""
    tensors = [source.const_value for source in sources]
    kept = [tensor for tensor in tensors if tensor is not None]
    assert len(kept) == len(sources)
    shape = [int(size) for size in kept[0].shape.numpy()]
    shape[axis] = sum(int(tensor.shape.numpy()[axis]) for tensor in kept)
    name = common_name([source.name or "" for source in sources])
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kept[0].dtype))
    value.const_value = _joined(kept, shape, name, axis=axis)
    value.metadata_props[PACKED_FROM] = json.dumps([source.name for source in sources])
    graph.register_initializer(value)
    return value


def _joined(
    tensors: Sequence[ir.TensorProtocol], shape: Sequence[int], name: str, *, axis: int
) -> ir.LazyTensor:
    def compute() -> ir.TensorProtocol:
        joined = np.concatenate([tensor.numpy() for tensor in tensors], axis=axis)
        for tensor in tensors:
            drop_pages(tensor)
        return ir.Tensor(joined, dtype=tensors[0].dtype, name=name)

    made = ir.LazyTensor(compute, dtype=tensors[0].dtype, shape=ir.Shape(list(shape)), name=name)
    if len(shape) != 2:
        return made
    if axis == 0:
        parts = [known_rows(tensor) for tensor in tensors]
        if all(parts):
            note_rows(made, [one for part in parts for one in part])
        return made
    straight = [found for tensor in tensors if (found := rows_tensor(tensor, False)) is not None]
    if len(straight) == len(tensors):
        made.meta[_TURNED_FROM] = _joined(straight, shape[::-1], name, axis=0)
    return made


def common_name(names: Sequence[str]) -> str:
    """A name for what is joined of several.

    ``a.q_proj.weight``, ``a.k_proj.weight`` and ``a.v_proj.weight`` make ``a.qkv_proj.weight``.
    """
    prefix = _common_start(names)
    suffix = _common_start([name[::-1] for name in names])[::-1]
    middles = [name[len(prefix) : len(name) - len(suffix)] for name in names]
    if not all(middles) or sum(map(len, middles)) > 40:
        return f"{names[0]}_packed"
    return f"{prefix}{'_'.join(middles) if max(map(len, middles)) > 1 else ''.join(middles)}{suffix}"


def _common_start(names: Sequence[str]) -> str:
    pairs = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in pairs)


def join_concatenated_weights(model: ir.Model, *, min_elements: int) -> int:
    """Replaces each Concat of large weights, which a runtime would compute at each start, by one weight.

    Args:
        model: The model.
        min_elements: Smaller constants are left to constant folding.

    Returns:
        How many.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "Concat" or node.domain not in ("", "ai.onnx") or not node.inputs:
            continue
        sources = [value for value in node.inputs if value is not None]
        tensors = [value.const_value for value in sources if value.is_initializer()]
        if len(tensors) != len(node.inputs) or node.outputs[0].is_graph_output():
            continue
        if any(constant_of(value) is None or len(value.uses()) != 1 for value in sources):
            continue
        if sum(tensor.size for tensor in tensors if tensor is not None) < min_elements:
            continue
        axis = node.attributes["axis"].as_int() % len(sources[0].shape or (1,))
        node.outputs[0].replace_all_uses_with(joined_weights(graph, sources, axis=axis))
        graph.remove(node, safe=True)
        count += 1
    if count:
        common.RemoveUnusedNodesPass()(model)
    return count
