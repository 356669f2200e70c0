"""Operators that are neither ONNX's nor ONNX Runtime's: onnxsmith has a library of them (docs/kernels.md)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OWN_DOMAIN", "uses_own_operators"]

OWN_DOMAIN = "onnxsmith"


def uses_own_operators(model: ir.Model) -> bool:
    """Whether a graph, its subgraphs or its functions have such operators: who runs it needs the library."""
    nodes = itertools.chain(
        model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values())
    )
    return any(node.domain == OWN_DOMAIN for node in nodes)
