"""What shape a Reshape makes, also where the graph computes it."""

from __future__ import annotations

import onnx_ir as ir

from onnxsmith.graph_passes.matching import axes_of, constant_integers, int_attribute, is_operator, label
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["copies_axes", "rows_refusal", "same_rows_as", "shape_entries"]


def shape_entries(value: ir.Value | None) -> list[int | tuple[ir.Value, int]] | None:
    """Each entry of a shape: a number, or a value and the axis of it that the entry is the size of."""
    numbers = constant_integers(value)
    if numbers is not None:
        return list(numbers)
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if is_operator(node, "Concat"):
        parts = [shape_entries(one) for one in node.inputs]
        if any(part is None for part in parts):
            return None
        return [entry for part in parts if part is not None for entry in part]
    if node.op_type in ("Unsqueeze", "Squeeze", "Identity", "Reshape") and node.domain in ("", "ai.onnx"):
        inner = shape_entries(node.inputs[0])
        return inner if inner is not None and len(inner) == 1 else None
    if is_operator(node, "Shape") and node.inputs[0] is not None:
        axes = axes_of(node.inputs[0])
        if axes is None:
            return None
        start, end = int_attribute(node, "start"), int_attribute(node, "end", len(axes))
        return [(node.inputs[0], axis) for axis in range(len(axes))[start:end]]
    if is_operator(node, "Gather"):
        shape, index = shape_entries(node.inputs[0]), constant_integers(node.inputs[1])
        if shape is None or index is None or len(index) != 1 or not -len(shape) <= index[0] < len(shape):
            return None
        return [shape[index[0]]]
    return None


def same_rows_as(value: ir.Value) -> ir.Value:
    """The value whose rows a projection still has."""
    while True:
        node = value.producer()
        if node is None or node.op_type not in ("Add", "MatMul"):
            return value
        varying = [one for one in node.inputs if one is not None and constant_of(one) is None]
        if len(varying) != 1 or (node.op_type == "MatMul" and varying[0] is not node.inputs[0]):
            return value
        value = varying[0]


def rows_refusal(node: ir.Node, like: ir.Value, tail: list[int]) -> str:
    """Why a Reshape may not keep batch and sequence of ``like`` and end in ``tail``, whatever the sizes are.

    Returns:
        The reason, or an empty string where it surely does.
    """
    known, wanted = axes_of(node.outputs[0]), axes_of(like)
    entries = shape_entries(node.inputs[1])
    if entries is None or len(entries) != 2 + len(tail):
        return f"the shape that {label(node)} makes is not known"
    if known is not None and (
        len(known) != len(entries)
        or any(axis not in (None, size) for axis, size in zip(known[2:], tail, strict=True))
    ):
        return f"{label(node)} makes another shape"
    inferred = 0
    for index, entry in enumerate(entries):
        if entry == -1:
            inferred += 1
        elif index >= 2:
            if entry != tail[index - 2]:
                return f"{label(node)} makes another shape"
        elif entry == (node.inputs[0], index) or (entry == 0 and not int_attribute(node, "allowzero")):
            # Batch is where it was; sequence is too only if the input has it there.
            source = axes_of(node.inputs[0])
            if source is None or len(source) < 3:
                return f"{label(node)} copies an axis of an unknown shape"
        elif isinstance(entry, tuple):
            value, axis = entry
            names = axes_of(value)
            same = (
                names is not None
                and wanted is not None
                and names[axis] is not None
                and names[axis] == wanted[axis]
            )
            if axis != index or not (same_rows_as(value) is same_rows_as(like) or same):
                return f"{label(node)} takes axis {index} from something else"
        elif wanted is None or wanted[index] != entry:
            return f"{label(node)} fixes axis {index} at {entry}"
    if inferred > 1:
        return f"{label(node)} leaves two axes open"
    return ""


def copies_axes(node: ir.Node, *, first: int = 0) -> bool:
    """Whether a Reshape may copy an axis of its input, by a 0 at this place of its shape or a later one.

    A shape that the graph computes has a 0 only where an axis has that size.
    """
    entries = constant_integers(node.inputs[1])
    return entries is not None and 0 in entries[first:] and not int_attribute(node, "allowzero")
