"""Types of values put right: casts that lead nowhere go, and 16 bit floats become float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.packed_functions import inline_functions
from onnxsmith.graph_passes.precision import complete_types

__all__ = ["HALVES", "CastChain", "RemoveCasts", "ToFloat32", "cast_chains", "computes_in_half"]

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FLOAT = ir.DataType.FLOAT
# Bits of the significand and of the exponent.
_DIGITS: Mapping[ir.DataType, tuple[int, int]] = {
    ir.DataType.DOUBLE: (53, 11),
    ir.DataType.FLOAT: (24, 8),
    ir.DataType.FLOAT16: (11, 5),
    ir.DataType.BFLOAT16: (8, 8),
}
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
_MOVES = frozenset({"Cast", "CastLike"})


@dataclasses.dataclass(frozen=True)
class CastChain:
    """A Cast whose result has the type that a value before it has.

    Attributes:
        last: The Cast.
        source: The value from before.
        loses: Whether a type in between has fewer digits.
    """

    last: ir.Node
    source: ir.Value
    loses: bool


def cast_chains(model: ir.Model) -> Iterator[CastChain]:
    """The casts between floating-point types that could be left out, in the graph's order."""
    for node in model.graph.all_nodes():
        if not _is_cast(node):
            continue
        wanted = ir.DataType(node.attributes["to"].as_int())
        between: list[ir.DataType] = []
        value = node.inputs[0]
        while value is not None:
            if value.dtype == wanted:
                # A Cast to the type that it has is one too.
                yield CastChain(node, value, any(_fewer(kind, wanted) for kind in between))
                break
            maker = value.producer()
            if value.dtype is None or value.dtype not in _DIGITS or maker is None or not _is_cast(maker):
                break
            between.append(value.dtype)
            value = maker.inputs[0]


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.domain in ("", "ai.onnx") and _to(node) in _DIGITS


def _to(node: ir.Node) -> ir.DataType | None:
    attribute = node.attributes.get("to")
    return None if attribute is None or attribute.is_ref() else ir.DataType(attribute.as_int())


def _fewer(one: ir.DataType, other: ir.DataType) -> bool:
    """Whether a type cannot hold every number of another."""
    return any(a < b for a, b in zip(_DIGITS[one], _DIGITS[other], strict=True))


class RemoveCasts(GraphPass):
    """Takes out casts between floating-point types that lead back to the type that a value had before.

    Where a type in between has fewer digits the cast rounded; without it the result is the more exact one.
    Such casts may be there on purpose, as in a model that was trained that way: ``lossy: false`` keeps them.
    """

    name: ClassVar[str] = "remove_casts"
    summary: ClassVar[str] = "take out casts that lead back to the type from before"

    def __init__(self, *, lossy: bool = True) -> None:
        """Sets what goes.

        Args:
            lossy: Also casts through a type with fewer digits, which round.
        """
        self.lossy = lossy

    def apply(self, model: ir.Model) -> Changes:
        """Gives their readers the value from before."""
        changes = Changes(details={"removed": 0, "rounded": 0})
        taken: dict[ir.Value, ir.Value] = {}
        for chain in list(cast_chains(model)):
            name = chain.last.name or "?"
            if chain.loses and not self.lossy:
                changes.skipped[name] = "it rounds, and lossy is false"
            elif not _bypassed(model, chain, taken):
                changes.skipped[name] = "its result is an output of the graph"
            else:
                changes.count += 1
                changes.details["rounded" if chain.loses else "removed"] += 1
        if changes.count:
            common.RemoveUnusedNodesPass()(model)
        return changes


def _bypassed(model: ir.Model, chain: CastChain, taken: dict[ir.Value, ir.Value]) -> bool:
    """Gives the readers of a Cast the value from before, if it is not an output that has no other source.

    Args:
        model: The model.
        chain: The Cast.
        taken: What was bypassed so far, to what took its place; added to.
    """
    old, source = chain.last.outputs[0], chain.source
    while source in taken:
        source = taken[source]
    if old.is_graph_output():
        if source.is_graph_input() or source.is_initializer() or source.is_graph_output():
            return False
        name = old.name
        old.name, source.name = f"{name}_before_cast", name
        source.shape = old.shape if source.shape is None else source.shape
        model.graph.outputs[:] = [source if value is old else value for value in model.graph.outputs]
    old.replace_all_uses_with(source)
    taken[old] = source
    return True


def computes_in_half(node: ir.Node) -> bool:
    """Whether a node's result is in 16 bit floats; a Cast is not, which is how small weights are read."""
    return node.op_type not in _MOVES and any(value.dtype in HALVES for value in node.outputs)


class ToFloat32(GraphPass):
    """Converts 16 bit floats to float32, for providers that compute them behind casts.

    Weights are converted when they are written, one at a time. A weight that nothing but a Cast reads is only
    stored that way, and stays. Loops and branches are converted too.
    """

    name: ClassVar[str] = "to_float32"
    summary: ClassVar[str] = "convert float16 and bfloat16 weights and computation to float32"

    def __init__(self, *, keep_io_types: bool = True) -> None:
        """Sets the signature.

        Args:
            keep_io_types: Keep the types of inputs and outputs, behind casts.
        """
        self.keep_io_types = keep_io_types

    def apply(self, model: ir.Model) -> Changes:
        """Converts every graph of the model."""
        inline_functions(model)
        complete_types(model, self.name)
        if not any(computes_in_half(node) for node in model.graph.all_nodes()):
            return Changes()
        changes = Changes(details={"nodes": 0, "weights": 0, "casts_removed": 0})
        borders = {
            value: value.dtype for value in (*model.graph.inputs, *model.graph.outputs) if _is_half(value)
        }
        for graph in model.graphs():
            for value in list(graph.initializers.values()):
                changes.details["weights"] += _widened(value)
            for node in graph:
                changes.details["nodes"] += computes_in_half(node)
                _retype(node)
            for given in graph.inputs:
                if _is_half(given):
                    given.type = ir.TensorType(_FLOAT)
        if self.keep_io_types:
            for value, kind in borders.items():
                _keep_type(model.graph, value, kind)
        # What were casts to float32 are casts to the type that a value has now.
        taken: dict[ir.Value, ir.Value] = {}
        for chain in list(cast_chains(model)):
            if not chain.loses and _bypassed(model, chain, taken):
                changes.details["casts_removed"] += 1
        common.RemoveUnusedNodesPass()(model)
        changes.count = changes.details["nodes"]
        return changes


def _is_half(value: ir.Value) -> bool:
    return value.dtype in HALVES


def _widened(value: ir.Value) -> int:
    tensor = value.const_value
    if tensor is None or not _is_half(value):
        return 0
    users = [use.node for use in value.uses()]
    if users and all(user.op_type == "Cast" for user in users) and not value.is_graph_input():
        return 0
    name = value.name
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32), dtype=_FLOAT, name=name),
        dtype=_FLOAT,
        shape=ir.Shape(list(tensor.shape.numpy())),
        name=name,
    )
    value.type = ir.TensorType(_FLOAT)
    return 1


def _retype(node: ir.Node) -> None:
    for value in node.outputs:
        if _is_half(value):
            value.type = ir.TensorType(_FLOAT)
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if name in _TYPE_ATTRIBUTES and attribute.type is ir.AttributeType.INT:
            if ir.DataType(attribute.as_int()) in HALVES:
                node.attributes[name] = ir.AttrInt64(name, _FLOAT.value)
        elif attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
            tensor = attribute.as_tensor()
            wide = ir.Tensor(tensor.numpy().astype(np.float32), dtype=_FLOAT, name=tensor.name)
            node.attributes[name] = ir.AttrTensor(name, wide)


def _keep_type(graph: ir.Graph, value: ir.Value, kind: ir.DataType | None) -> None:
    """Gives an input or output its type back, with a Cast between it and the graph."""
    assert kind is not None
    if value in graph.inputs:
        value.type = ir.TensorType(kind)
        uses = list(value.uses())
        wide = _cast(f"{value.name}_float32", value, _FLOAT)
        graph.insert_before(graph[0], wide)
        for node, index in uses:
            node.replace_input_with(index, wide.outputs[0])
        return
    name = value.name
    value.name = f"{name}_float32"
    narrow = _cast(name or "output", value, kind)
    graph.append(narrow)
    graph.outputs[:] = [narrow.outputs[0] if one is value else one for one in graph.outputs]


def _cast(name: str, value: ir.Value, kind: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": kind.value}, name=f"{name}_cast")
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].type = ir.TensorType(kind)
    return node
