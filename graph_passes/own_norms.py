"""Norms before products of the own kernels, computed by the kernel that rounds their result anyway."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import int_attribute, is_operator, label
from onnxsmith.graph_passes.packed_functions import settle
from onnxsmith.own_operators import OWN_DOMAIN, RESIDUAL_INPUT

__all__ = ["NormsInProducts"]

_NORM, _CONTRIB = "SkipSimplifiedLayerNormalization", "com.microsoft"
# Outputs of the norm: itself, mean, inverse deviation, and the sum that it is the norm of.
_SUM = 3
_VECTOR = 16


class NormsInProducts(GraphPass):
    """Moves each RMS norm with a residual into the product that reads it: two operators less for a layer.

    The product must be a MatMulPacked (see use_packed_kernels) and the only reader of the norm.
    """

    name: ClassVar[str] = "norms_in_products"
    summary: ClassVar[str] = "RMS norms inside the products of onnxsmith's kernels"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Moves the norms, and says why others stay."""
        changes = Changes()
        for product in model.graph.all_nodes():
            if not is_operator(product, "MatMulPacked", OWN_DOMAIN) or product.inputs[0] is None:
                continue
            norm = product.inputs[0].producer()
            if norm is None or not is_operator(norm, _NORM, _CONTRIB):
                continue
            reason = _refusal(norm, product)
            if reason:
                changes.skipped[label(norm)] = reason
                continue
            _move(norm, product)
            changes.count += 1
        if changes.count:
            model.graph.sort()
            settle(model)
            changes.details = {"norms": changes.count}
        return changes


def _refusal(norm: ir.Node, product: ir.Node) -> str:
    normed = norm.outputs[0]
    if normed.is_graph_output() or len(normed.uses()) != 1:
        return "more than one product reads it"
    if norm.graph is not product.graph:
        return "it is outside of the branch with its product"
    if len(norm.inputs) > 3 and norm.inputs[3] is not None:
        return "it adds a bias"
    if any(output.uses() or output.is_graph_output() for output in norm.outputs[1:_SUM]):
        return "its mean or deviation is read"
    if normed.dtype is not ir.DataType.FLOAT:
        return "the kernel computes in float32"
    if len(product.inputs) > RESIDUAL_INPUT:
        return "its product adds a residual"
    if int_attribute(product, "K") % _VECTOR:
        return f"its rows have {int_attribute(product, 'K')} columns; expected a multiple of {_VECTOR}"
    return ""


def _move(norm: ir.Node, product: ir.Node) -> None:
    assert product.graph is not None
    attributes = {**product.attributes, "epsilon": norm.attributes["epsilon"]}
    made = ir.Node(
        OWN_DOMAIN,
        "NormMatMulPacked",
        [*norm.inputs[:3], *product.inputs[1:]],
        attributes.values(),
        num_outputs=2,
        name=product.name,
    )
    # Others read the sum, perhaps before the product: the graph is sorted when all are moved.
    product.graph.insert_before(product, made)
    olds = [product.outputs[0], *norm.outputs[_SUM : _SUM + 1]]
    for old, new in zip(olds, made.outputs, strict=False):
        new.type, new.shape = old.type, old.shape
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=old.is_graph_output())
        old.name, new.name = f"{name}_before", name
    if len(olds) == 1:
        made.outputs[1].name = f"{product.outputs[0].name}_sum"
        made.outputs[1].type, made.outputs[1].shape = norm.outputs[0].type, norm.outputs[0].shape
    product.graph.remove(product, safe=True)
