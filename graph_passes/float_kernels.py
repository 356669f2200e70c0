"""Products in float32, computed by the kernels of this project."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.float_products import find_float_products, find_projections
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.packed_functions import function_refusal
from onnxsmith.graph_passes.packed_products import skip_reason
from onnxsmith.graph_passes.packed_writer import write_uses

__all__ = ["UseFloatKernels"]


class UseFloatKernels(GraphPass):
    """Has the kernels of this project multiply with matrices in float32.

    The weights lie in the order in which the kernels read them, so nothing is packed while a model is loaded.
    A bias and an activation behind a product are computed while its result is in the cache; query, key and
    value become one product, and so do gate and up of an MLP. A row's result is bitwise the same whatever
    other rows are computed with it. ONNX Runtime's Attention is opened, so that its projection is such a
    product too. The graph is for the kernels, which are compiled where it runs; without them, functions in
    the model compute it.
    """

    name: ClassVar[str] = "use_float_kernels"
    summary: ClassVar[str] = (
        "float32 matrices in the layout of this project's own kernels, with activations in the products"
    )

    def __init__(self, *, skip_nodes: tuple[str, ...] = ()) -> None:
        """Sets what stays.

        Args:
            skip_nodes: Patterns of node or weight names that stay with ONNX Runtime's MatMul.
        """
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Changes the main graph; weights are put in tiles when they are written."""
        reason = function_refusal(model)
        if reason:
            return Changes(skipped={"graph": reason})

        def refuse(node: ir.Node, weight: str) -> str:
            return skip_reason(self.skip_nodes, node.name or "", weight)

        kept = open_attention(model, among=find_projections(model, refuse=refuse))
        uses = find_float_products(model, refuse=refuse)
        uses.refused |= kept
        if not uses.found:
            return Changes(skipped=uses.refused)
        changes = write_uses(model, uses, {})
        changes.details = {**changes.details, "arithmetic": "float32"}
        return changes
