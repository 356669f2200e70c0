"""Attention of queries that may look at nothing, as PyTorch has it: zeros.

``torch.nn.functional.scaled_dot_product_attention`` gives zeros for a query whose mask hides every key, such
as those of a row that is padding throughout. The ONNX form of it divides by a sum of nothing, or takes the
mean of what is hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["zero_what_sees_nothing"]


def zero_what_sees_nothing(exported: torch.export.ExportedProgram) -> None:
    """Writes zeros, after each attention with a mask, where the mask hides all keys. Changes the program.

    Outside of the attention, whose own operators stay as passes know them.
    """
    import torch

    aten = torch.ops.aten
    for module in exported.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        changed = False
        for node in list(module.graph.nodes):
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if mask is None:
                continue
            with module.graph.inserting_after(node):
                # Each is put right behind this place, so the last comes first.
                place = module.graph.call_function(aten.masked_fill.Scalar, (node, mask, 0.0))
            with module.graph.inserting_before(place):
                if mask.meta["val"].dtype == torch.bool:
                    seen = mask
                else:
                    seen = _call(module.graph, aten.ne.Scalar, mask, float("-inf"))
                seen = _call(module.graph, aten.any.dim, seen, -1, True)
                unseen = _call(module.graph, aten.logical_not.default, seen)
            place.args = (node, unseen, 0.0)
            place.meta.update(node.meta)
            node.replace_all_uses_with(place, delete_user_cb=lambda user, own=place: user is not own)
            # The program's signature has the name of what it returns.
            node.name, place.name = place.name, node.name
            changed = True
        if changed:
            module.recompile()


def _call(graph: torch.fx.Graph, target: Any, tensor: torch.fx.Node, *rest: Any) -> torch.fx.Node:
    """A new node with the shape and element type of its result."""
    node = graph.call_function(target, (tensor, *rest))
    value = tensor.meta["val"]
    with value.fake_mode:
        node.meta["val"] = target(value, *rest)
    return node
