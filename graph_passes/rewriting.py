"""The loop of passes that rewrite what they find node by node, and say of near misses why they stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.contract import Changes
from onnxsmith.graph_passes.matching import label

__all__ = ["NoMatchError", "rewrite_each"]


class NoMatchError(Exception):
    """A near miss, with the reason."""


def rewrite_each(
    model: ir.Model, rewrite: Callable[[ir.Graph, ir.Node], str | None], *, domain: str = ""
) -> tuple[Changes, dict[str, int]]:
    """Rewrites at each node of the main graph, and removes what is unused then.

    Args:
        model: It is changed.
        rewrite: Gives the name of what it made at a node, None where there is nothing to make, and raises
            ``NoMatchError`` at a near miss.
        domain: Of what is made, which the model imports from then on.

    Returns:
        How many were made and what was skipped, and how many by name.
    """
    changes, made = Changes(), Counter[str]()
    for node in list(model.graph):
        try:
            name = rewrite(model.graph, node)
        except NoMatchError as reason:
            changes.skipped[label(node)] = str(reason)
            continue
        if name is not None:
            made[name] += 1
    changes.count = made.total()
    if changes.count:
        if domain:
            model.opset_imports.setdefault(domain, 1)
        common.RemoveUnusedNodesPass()(model)
    return changes, dict(made)
