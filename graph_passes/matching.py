"""Questions that rewrites ask about nodes and values."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.weights import constant_of

__all__ = [
    "Axes",
    "axes_of",
    "constant_integers",
    "input_of",
    "insert_after",
    "int_attribute",
    "is_operator",
    "label",
    "leads_only_to",
    "reads_dequantized",
    "same_axes",
    "small_constant",
]

Axes = tuple[int | str | None, ...]
"""One entry per axis: a size, the name of a dynamic axis, or None where nothing is known."""


def is_operator(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    """Whether a node is this operator; the empty domain is ONNX's own."""
    if node is None or node.op_type != op_type:
        return False
    return node.domain == domain or (not domain and node.domain == "ai.onnx")


def label(node: ir.Node) -> str:
    """How messages name a node."""
    return node.name or f"{node.op_type} of {node.outputs[0].name!r}"


def leads_only_to(node: ir.Node, ends: Container[ir.Node], *, depth: int = 6) -> bool:
    """Whether what a node makes is read for the results of some nodes and nothing else, in so many steps."""
    if node in ends:
        return True
    if not depth or any(value.is_graph_output() for value in node.outputs):
        return False
    users = [use.node for value in node.outputs for use in value.uses()]
    return bool(users) and all(leads_only_to(user, ends, depth=depth - 1) for user in users)


def reads_dequantized(node: ir.Node) -> bool:
    """Whether an operand comes from DequantizeLinear: with such a node runtimes compute in integers."""
    for value in node.inputs:
        maker = value.producer() if value is not None else None
        while (
            maker is not None and maker.op_type in ("Identity", "Transpose") and maker.inputs[0] is not None
        ):
            maker = maker.inputs[0].producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            return True
    return False


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is left out."""
    return node.inputs[index] if len(node.inputs) > index else None


def int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def axes_of(value: ir.Value | None) -> Axes | None:
    """The axes of a value, or None where even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def same_axes(left: Axes | None, right: Axes | None) -> bool:
    """Whether two shapes are surely the same: equal sizes, equal names, nothing unknown."""
    if left is None or right is None or len(left) != len(right):
        return False
    return all(one is not None and one == other for one, other in zip(left, right, strict=True))


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """The content of a small constant of integers, flat, or None."""
    tensor = constant_of(value)
    if tensor is None or tensor.size > 64 or not tensor.dtype.is_integer():
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]


def small_constant(near: ir.Value, array: npt.NDArray[Any]) -> ir.Value:
    """An initializer of the graph that a value belongs to, shared by all who ask for the same."""
    graph = near.graph
    assert isinstance(graph, ir.Graph)
    text = "_".join(str(number) for number in array.reshape(-1).tolist())
    name = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{text}".replace("-", "m")
    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(list(array.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def insert_after(
    value: ir.Value,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    *,
    domain: str = "",
) -> ir.Value:
    """Adds a node right after the one that makes ``value``, and returns its output, of the same type."""
    node = ir.node(op_type, inputs, attributes, domain=domain)
    producer = value.producer()
    assert producer is not None and producer.graph is not None
    producer.graph.insert_after(producer, node)
    made = node.outputs[0]
    made.type = value.type
    return made
