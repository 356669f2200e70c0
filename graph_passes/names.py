"""Names in a graph: ONNX Runtime refuses two nodes of one name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common as common

__all__ = ["doubled_names", "left_out_stay_so", "value_names", "with_unique_names"]


def value_names(model: ir.Model) -> set[str]:
    """The names of all values of a graph and its branches; a new one has to be none of them."""
    return {
        value.name or ""
        for graph in model.graphs()
        for value in (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
    }


def with_unique_names(model: ir.Model) -> int:
    """Gives nodes that share a name names of their own, and says how many there were."""
    doubled = doubled_names(model)
    if doubled:
        with left_out_stay_so(model):
            common.NameFixPass()(model)
    return doubled


@contextlib.contextmanager
def left_out_stay_so(model: ir.Model) -> Iterator[None]:
    """While open, passes may give names to what has none; outputs that are left out lose them again.

    ONNX Runtime computes each optional output that has a name.
    """
    left_out = [
        value
        for graph in (*model.graphs(), *model.functions.values())
        for node in graph
        for value in node.outputs
        if value.name == "" and not value.uses() and not value.is_graph_output()
    ]
    yield
    for value in left_out:
        if not value.uses() and not value.is_graph_output():
            value.name = ""


def doubled_names(model: ir.Model) -> int:
    """How many nodes need a new name: ONNX Runtime refuses two of one name in one graph."""
    doubled = 0
    for graph in model.graphs():
        names = [node.name for node in graph if node.name]
        doubled += len(names) - len(set(names))
    return doubled
