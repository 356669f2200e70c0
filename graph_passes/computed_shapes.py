"""Shapes that a graph computes: which of their numbers are constants, and which are sizes of values."""

from __future__ import annotations

import onnx_ir as ir

from onnxsmith.graph_passes.matching import constant_integers, int_attribute, is_operator

__all__ = ["Element", "shape_elements"]

Element = int | tuple[ir.Value, int] | None
"""A constant; a value and the axis whose size it is; or unknown."""

_PASSED_ON = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def shape_elements(value: ir.Value | None) -> list[Element] | None:
    """The numbers in a value of integers of at most one axis; None where not even their count is known."""
    if value is None:
        return None
    known = constant_integers(value)
    if known is not None:
        return list(known)
    node = value.producer()
    if node is None:
        return _unknown(value)
    if is_operator(node, "Shape"):
        return _shape(node)
    if is_operator(node, "Concat"):
        parts = [shape_elements(part) for part in node.inputs]
        if any(part is None for part in parts):
            return None
        return [element for part in parts for element in part or []]
    if node.op_type in _PASSED_ON:
        found = shape_elements(node.inputs[0])
        return found if found is not None and len(found) == 1 else _unknown(value)
    given = shape_elements(node.inputs[0]) if node.op_type in ("Gather", "Slice") else None
    if given is not None and is_operator(node, "Gather"):
        index = constant_integers(node.inputs[1])
        if index is not None and all(-len(given) <= i < len(given) for i in index):
            return [given[i] for i in index]
    if given is not None and is_operator(node, "Slice"):
        start, end = (constant_integers(part) for part in node.inputs[1:3])
        steps = constant_integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
        if start is not None and end is not None and steps == [1]:
            return given[start[0] : end[0]]
    return _unknown(value)


def _shape(node: ir.Node) -> list[Element] | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    elements: list[Element] = [(source, axis) for axis in range(source.shape.rank())]
    start = int_attribute(node, "start")
    end = int_attribute(node, "end", len(elements))
    return elements[start:end]


def _unknown(value: ir.Value) -> list[Element] | None:
    if value.shape is None or value.shape.rank() > 1:
        return None
    if value.shape.rank() == 0:
        return [None]
    dim = value.shape[0]
    return [None] * dim if isinstance(dim, int) else None
