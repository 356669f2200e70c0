"""Weights that are stored in integers with a scale, as the numbers that a node computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from onnxsmith.runtime.session import Array

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["IntegerWeight", "integer_weights"]

# Operator to the inputs that are weight, scale and zero point, and the axis of scales of their own.
_OPERANDS: Mapping[str, tuple[int, int, int, int]] = {
    "DynamicQuantizeMatMul": (1, 2, 3, -1),
    "MatMulIntegerToFloat": (1, 3, 5, -1),
    "QGemm": (3, 4, 5, -1),
    "QLinearConv": (3, 4, 5, 0),
    "QLinearMatMul": (3, 4, 5, -1),
}


class IntegerWeight(NamedTuple):
    """One weight.

    Attributes:
        name: Of what is stored.
        values: What it stands for, float32.
        axis: The axis along which scales differ; None where there is one for all.
        bits: Of a stored integer.
    """

    name: str
    values: Array
    axis: int | None
    bits: int


def integer_weights(
    node: ir.Node, computed: Callable[[ir.Value | None], Array | None]
) -> Iterator[IntegerWeight]:
    """The weights of a node of integers, and those that reach a node through DequantizeLinear.

    Args:
        node: Any node.
        computed: Gives the array that a value always is; None where it depends on inputs.
    """
    if node.op_type in _OPERANDS:
        weight, scale, zero, axis = _OPERANDS[node.op_type]
        turned = node.attributes.get("transB")
        axis = 0 if turned is not None and turned.as_int() else axis
        found = _weight(_input(node, weight), _input(node, scale), _input(node, zero), axis, 0, computed)
        if found is not None:
            yield found
        return
    for value in node.inputs:
        source = value.producer() if value is not None else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        axis, block = (
            source.attributes[key].as_int() if key in source.attributes else default
            for key, default in (("axis", 1), ("block_size", 0))
        )
        found = _weight(_input(source, 0), _input(source, 1), _input(source, 2), axis, block, computed)
        if found is not None:
            yield found


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _weight(
    stored: ir.Value | None,
    scale: ir.Value | None,
    zero: ir.Value | None,
    axis: int,
    block: int,
    computed: Callable[[ir.Value | None], Array | None],
) -> IntegerWeight | None:
    if stored is None or not stored.is_initializer() or stored.const_value is None or not stored.name:
        return None
    scales, points = computed(scale), computed(zero)
    if scales is None or (zero is not None and points is None):
        return None
    integers = np.asarray(stored.const_value.numpy())
    values = integers.astype(np.float32)
    own = scales.size > 1
    steps = _spread(scales, values.shape, axis, block)
    offsets = None if points is None else _spread(points, values.shape, axis, block)
    if steps is None or (points is not None and offsets is None):
        return None
    values = (values if offsets is None else values - offsets) * steps
    bits = 4 if stored.dtype is not None and stored.dtype.name in ("INT4", "UINT4") else 8
    return IntegerWeight(stored.name, values, axis % values.ndim if own and values.ndim else None, bits)


def _spread(scales: Array, shape: tuple[int, ...], axis: int, block: int) -> Array | None:
    """Scales in the shape in which they are multiplied; None where they do not fit."""
    scales = scales.astype(np.float32)
    if scales.size == 1:
        return scales.reshape(())
    if block and scales.ndim == len(shape):
        return np.repeat(scales, block, axis=axis).take(range(shape[axis]), axis=axis)
    if scales.ndim != 1 or not shape or scales.size != shape[axis]:
        return None
    sizes = [1] * len(shape)
    sizes[axis] = scales.size
    return scales.reshape(sizes)
