"""Residual sums behind products of the own kernels, computed where the product's numbers lie."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import axes_of, is_operator, label, same_axes
from onnxsmith.graph_passes.packed_functions import settle
from onnxsmith.own_operators import OWN_DOMAIN, RESIDUAL_INPUT

__all__ = ["SumsInProducts"]


class SumsInProducts(GraphPass):
    """Moves sums with a residual into the product in front of them: a node less to read and write.

    The product must be a MatMulPacked (see use_packed_kernels and use_float_kernels) that only the sum reads,
    and what is added to it of the same shape.
    """

    name: ClassVar[str] = "sums_in_products"
    summary: ClassVar[str] = "residual sums inside the products of onnxsmith's kernels"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Moves the sums, and says why others stay."""
        changes = Changes()
        for node in list(model.graph.all_nodes()):
            if not (is_operator(node, "Add") or is_operator(node, "Sum")):
                continue
            products = [value for value in node.inputs if value is not None and _product_of(value)]
            if not products:
                continue
            moved = 0
            while (found := _fitting(node)) is not None:
                moved += 1
                if _move(node, *found):
                    break
            changes.count += moved
            if not moved:
                changes.skipped[label(node)] = _reason(node, products)
        if changes.count:
            model.graph.sort()
            settle(model)
            changes.details = {"sums": changes.count}
        return changes


def _product_of(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and is_operator(node, "MatMulPacked", OWN_DOMAIN) else None


def _fitting(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """An operand of a sum whose product can add another operand, and that; or None.

    Operands that are products come last, so that a product can take what another one took something into.
    """
    operands = [value for value in node.inputs if value is not None]
    for value in operands:
        product = _product_of(value)
        if product is None or product.graph is not node.graph or len(product.inputs) > RESIDUAL_INPUT:
            continue
        if len(value.uses()) != 1 or value.is_graph_output():
            continue
        others = [one for one in operands if one is not value and _is_alike(one, value)]
        if others:
            return value, min(others, key=lambda one: _product_of(one) is not None)
    return None


def _is_alike(other: ir.Value, value: ir.Value) -> bool:
    return other.dtype is ir.DataType.FLOAT and same_axes(axes_of(other), axes_of(value))


def _reason(node: ir.Node, products: list[ir.Value]) -> str:
    others = [one for one in node.inputs if one is not None]
    if not any(_is_alike(one, value) for value in products for one in others if one is not value):
        return "what it adds to a product is not known to have its shape"
    made = [product for value in products if (product := _product_of(value)) is not None]
    if all(product.graph is not node.graph for product in made):
        return "the product is in another graph"
    if all(len(product.inputs) > RESIDUAL_INPUT for product in made):
        return "the product adds something already"
    return "something else reads the product"


def _move(node: ir.Node, value: ir.Value, addend: ir.Value) -> bool:
    """Gives an operand's product another operand; whether nothing is left of the sum."""
    product = _product_of(value)
    assert product is not None and node.graph is not None
    product.resize_inputs(RESIDUAL_INPUT + 1)
    product.replace_input_with(RESIDUAL_INPUT, addend)
    kept = list(node.inputs)
    # Only once, where it is added twice.
    del kept[next(index for index, one in enumerate(kept) if one is addend)]
    if len(kept) > 1:
        node.resize_inputs(len(kept))
        for index, one in enumerate(kept):
            if node.inputs[index] is not one:
                node.replace_input_with(index, one)
        return False
    result, name = node.outputs[0], node.outputs[0].name
    value.type, value.shape = result.type or value.type, result.shape or value.shape
    result.replace_all_uses_with(value, replace_graph_outputs=result.is_graph_output())
    result.name, value.name = value.name, name
    node.graph.remove(node, safe=True)
    return True
