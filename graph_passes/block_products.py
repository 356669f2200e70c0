"""How products with weights in blocks stand in a graph: offsets beside them, constants in several nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.matching import int_attribute
from onnxsmith.graph_passes.weights import constant_of
from onnxsmith.onnx_file import drop_pages

__all__ = [
    "FOLDED",
    "Reading",
    "deferred",
    "is_computed_constant",
    "offsets_product",
    "product_with_offsets",
    "sums_blocks",
]

_DOMAIN = "com.microsoft"
FOLDED = frozenset({"Add", "Cast", "Gather", "Mul", "Reshape"})
"""What quantization writes between a stored constant and the node that reads it."""


def product_with_offsets(node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The whole product with a weight, and the offset of each block where the weight has them."""
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return product, None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    shift = other.producer() if other is not None else None
    if shift is None or (shift.domain, shift.op_type) != (_DOMAIN, "FusedMatMul"):
        return product, None
    sums, offsets = shift.inputs[0], shift.inputs[1]
    summed = sums.producer() if sums is not None else None
    split = summed.inputs[0].producer() if summed is not None and summed.inputs[0] is not None else None
    turned = shift.attributes.get("transB")
    alpha = shift.attributes.get("alpha")
    fits = (
        summed is not None and summed.op_type == "ReduceSum"
        and split is not None and split.op_type == "Reshape"
        and split.inputs[0] is x and turned is not None and turned.as_int() == 1
        and (alpha is None or alpha.as_float() == 1.0) and is_computed_constant(offsets)
    )  # fmt: skip
    return (add.outputs[0], offsets) if fits else (product, None)


def offsets_product(result: ir.Value, offsets: ir.Value | None) -> ir.Node | None:
    """The node that multiplies block sums with the offsets, of what ``product_with_offsets`` gives."""
    add = result.producer()
    makers = (value.producer() for value in (add.inputs if add is not None else ()) if value is not None)
    return next(
        (one for one in makers if one is not None and one.op_type == "FusedMatMul" and offsets in one.inputs),
        None,
    )


def sums_blocks(node: ir.Node) -> bool:
    """Whether a product makes the sums that ``fold_minimums`` appends to what it sums."""
    return any(
        use.node.op_type == "Concat" and use.node.inputs[0] is node.inputs[0]
        for use in node.outputs[0].uses()
    )


def is_computed_constant(value: ir.Value | None) -> bool:
    """Whether a value follows from constants through what ``deferred`` computes."""
    if value is None:
        return False
    if constant_of(value) is not None:
        return True
    node = value.producer()
    return node is not None and node.op_type in FOLDED and all(map(is_computed_constant, node.inputs))


class Reading:
    """Stored constants, each read once, for one computation: some are made anew whenever they are read."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._known: dict[int, tuple[ir.TensorProtocol, npt.NDArray[Any]]] = {}

    def of(self, tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
        """What a tensor holds."""
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, tensor.numpy()
        return self._known[id(tensor)][1]

    def drop_pages(self) -> None:
        """Gives back the memory of what is mapped from files."""
        for tensor, _ in self._known.values():
            drop_pages(tensor)


def deferred(value: ir.Value | None) -> Callable[[Reading], npt.NDArray[Any]]:
    """How to compute a value for which ``is_computed_constant`` holds, also when its nodes are gone."""
    assert value is not None
    tensor = constant_of(value)
    if tensor is not None:
        return lambda reading: reading.of(tensor)
    node = value.producer()
    assert node is not None
    operands = [deferred(one) for one in node.inputs]
    if node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int()).numpy()
        return lambda reading: operands[0](reading).astype(dtype)
    if node.op_type == "Reshape":
        return lambda reading: operands[0](reading).reshape(operands[1](reading))
    if node.op_type == "Gather":
        axis = int_attribute(node, "axis")
        return lambda reading: np.take(operands[0](reading), operands[1](reading), axis=axis)
    combine: Callable[..., npt.NDArray[Any]] = np.multiply if node.op_type == "Mul" else np.add
    return lambda reading: combine(operands[0](reading), operands[1](reading))
