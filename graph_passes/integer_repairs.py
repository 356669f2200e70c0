"""Quantized graphs of which a runtime fuses a part only: the rest computes in floats, without the detour."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["RemoveUnfusedQdq", "unfused_nodes"]

_NARROW = frozenset(
    {
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT4,
        ir.DataType.UINT4,
    }
)


def unfused_nodes(model: ir.Model, executed: Mapping[str, str]) -> list[ir.Node]:
    """The DequantizeLinear nodes that ran although something should have fused them.

    Those of weights, and those of activations whose QuantizeLinear ran too: where only one of a pair runs,
    it is the border between floats and a part that did fuse.

    Args:
        model: The graph.
        executed: Node name to operator, of what ran.
    """
    found = []
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or not node.name or executed.get(node.name) != node.op_type:
            continue
        source = node.inputs[0]
        maker = source.producer() if source is not None else None
        if constant_of(source) is not None:
            if source is not None and source.dtype in _NARROW:
                found.append(node)
        elif (
            maker is not None
            and executed.get(maker.name or "") == "QuantizeLinear"
            and _same_grid(maker, node)
        ):
            found.append(node)
    return found


def _same_grid(quantize: ir.Node, dequantize: ir.Node) -> bool:
    return all(
        one is other or _equal(constant_of(one), constant_of(other))
        for one, other in zip(quantize.inputs[1:], dequantize.inputs[1:], strict=False)
    )


def _equal(one: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    return one is not None and other is not None and np.array_equal(one.numpy(), other.numpy())


class RemoveUnfusedQdq(GraphPass):
    """Dequantizes weights once and for all, and drops pairs that round an activation and turn it back.

    For the named nodes, which are those that a runtime was seen to compute as they stand: what reads them
    computes in floats anyway. The model grows by what its weights were smaller.
    """

    name: ClassVar[str] = "remove_unfused_qdq"
    summary: ClassVar[str] = (
        "float weights and activations where QuantizeLinear and DequantizeLinear do not fuse"
    )

    def __init__(self, *, nodes: tuple[str, ...] = ()) -> None:
        """Sets where.

        Args:
            nodes: Patterns of names of DequantizeLinear nodes; `onnxsmith doctor` finds them.
        """
        self.nodes = tuple(nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Replaces what the named nodes give."""
        changes = Changes(details={"weights": 0, "activations": 0})
        for node in list(model.graph):
            named = any(fnmatch.fnmatchcase(node.name or "", pattern) for pattern in self.nodes)
            if node.op_type != "DequantizeLinear" or not named:
                continue
            output, source = node.outputs[0], node.inputs[0]
            if output.is_graph_output():
                changes.skipped[label(node)] = "its result is an output of the graph"
                continue
            maker = source.producer() if source is not None else None
            tensors = [constant_of(value) for value in node.inputs]
            if all(tensor is not None for tensor in tensors):
                made = _folded(model.graph, node, [tensor for tensor in tensors if tensor is not None])
                changes.details["weights"] += 1
            elif maker is not None and maker.op_type == "QuantizeLinear" and maker.inputs[0] is not None:
                made = maker.inputs[0]
                changes.details["activations"] += 1
            else:
                changes.skipped[label(node)] = "what it reads is computed in integers"
                continue
            output.replace_all_uses_with(made)
            changes.count += 1
        if changes.count:
            common.RemoveUnusedNodesPass()(model)
        return changes


def _folded(graph: ir.Graph, node: ir.Node, tensors: list[ir.TensorProtocol]) -> ir.Value:
    output, (codes, scale, *rest) = node.outputs[0], tensors
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    dtype = scale.dtype
    name = f"{output.name}_folded"
    while name in graph.initializers:
        name += "_"

    def compute() -> ir.TensorProtocol:
        zero = rest[0].numpy() if rest else np.zeros((), np.int8)
        array = dequantized(codes.numpy(), scale.numpy(), zero, axis=axis, block_size=block)
        return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)

    shape = ir.Shape(list(codes.shape.numpy()))
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(compute, dtype=dtype, shape=shape, name=name)
    graph.register_initializer(value)
    return value


def dequantized(
    codes: npt.NDArray[Any], scale: npt.NDArray[Any], zero: npt.NDArray[Any], *, axis: int, block_size: int
) -> npt.NDArray[np.float32]:
    """DequantizeLinear of ONNX: one scale, one for each index of an axis, or one for each block of it."""

    def spread(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        array = np.asarray(array, np.float32)
        if array.size == 1:
            return array.reshape(())
        if block_size:
            return np.repeat(array, block_size, axis)[tuple(slice(0, n) for n in codes.shape)]
        return array.reshape([-1 if n == axis % codes.ndim else 1 for n in range(codes.ndim)])

    values: npt.NDArray[np.float32] = (codes.astype(np.float32) - spread(zero)) * spread(scale)
    return values
