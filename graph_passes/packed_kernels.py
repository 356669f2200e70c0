"""Products with weights in blocks, computed by the kernels of this project.

The kernels (docs/kernels.md) read codes, scales, zero points and float minimums in the order in which they
lie in the file, add a bias and compute the gate of an MLP. So what ``block_operators`` writes for ONNX
Runtime as five nodes is one here, with the weights that the blocks stand for, bit by bit.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.packed_functions import function_refusal
from onnxsmith.graph_passes.packed_products import find_uses, skip_reason
from onnxsmith.graph_passes.packed_writer import write_uses

__all__ = ["UsePackedKernels"]


class UsePackedKernels(GraphPass):
    """Has the kernels of this project compute what MatMulNBits and GatherBlockQuantized do.

    Weights stay what they are to the last bit; activations are rounded to 8 bits in blocks of 16 columns,
    where MatMulNBits rounds them in blocks as long as the weight's. That halves what rounding them costs, for
    a fifth of a prompt's time and none of a token's; blocks of 32 are for models without a cache. Query, key
    and value become one product where their formats agree, and so do gate and up of an MLP, with the
    activation between them. The graph is for the kernels, which are compiled where it runs; without them,
    functions in the model compute it in float32.
    """

    name: ClassVar[str] = "use_packed_kernels"
    summary: ClassVar[str] = (
        "weights in blocks in the layout of this project's own kernels, which compute them"
    )

    def __init__(
        self, *, skip_nodes: tuple[str, ...] = (), activation_block: Literal[0, 16, 32, 64, 128] = 0
    ) -> None:
        """Sets what stays.

        Args:
            activation_block: How many columns of an activation are rounded with one scale, at most: blocks
                of the weight may be shorter. 0 is 16 for models with a KV cache, and 32 for others, whose
                products have many rows at a time. 64 and 128 are faster for many rows, and less exact.
            skip_nodes: Patterns of node or weight names that stay with ONNX Runtime's operators.
        """
        self.skip_nodes = tuple(skip_nodes)
        self.activation_block = activation_block

    def apply(self, model: ir.Model) -> Changes:
        """Changes the graph and its branches; weights are put in tiles when they are written."""
        reason = function_refusal(model)
        if reason:
            return Changes(skipped={"graph": reason})
        uses = find_uses(
            model, refuse=lambda node, weight: skip_reason(self.skip_nodes, node.name or "", weight)
        )
        if not uses.found:
            return Changes(skipped=uses.refused)
        columns = self.activation_block or (16 if _has_cache(model) else 32)
        changes = write_uses(model, uses, {"activation_block": columns})
        arithmetic = f"int8, activations rounded to 8 bits in blocks of {columns}"
        changes.details = {**changes.details, "arithmetic": arithmetic}
        return changes


def _has_cache(model: ir.Model) -> bool:
    return any((value.name or "").startswith("past_key_values") for value in model.graph.inputs)
