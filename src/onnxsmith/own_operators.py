"""Operators that are neither ONNX's nor ONNX Runtime's: onnxsmith has a library of them (docs/kernels.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "FLOAT_BITS",
    "OWN_DOMAIN",
    "PACKED_OPERATORS",
    "RESIDUAL_INPUT",
    "WEIGHT_INPUT",
    "brings_own_operators",
    "own_nodes",
    "rounds_weights",
    "uses_own_operators",
]

OWN_DOMAIN = "onnxsmith"
WEIGHT_INPUT: Mapping[str, int] = MappingProxyType(
    {"GatherPacked": 1, "MatMulPacked": 1, "NormMatMulPacked": 3}
)
"""Operators with a matrix in tiles, to the first of its three inputs: codes, scales and offsets."""
PACKED_OPERATORS = frozenset(WEIGHT_INPUT)
RESIDUAL_INPUT = 5
"""Of MatMulPacked: what is added behind its activation."""
FLOAT_BITS = 32
"""The attribute ``bits`` of operators whose matrix is in float32, without scales and offsets."""


def rounds_weights(node: ir.Node) -> bool:
    """Whether a node is such an operator, with a matrix that is not in float32."""
    bits = node.attributes.get("bits")
    return node.op_type in PACKED_OPERATORS and (bits is None or bits.as_int() != FLOAT_BITS)


def own_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes with such operators: of the graph, its subgraphs and its functions."""
    nodes = itertools.chain(
        model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values())
    )
    return (node for node in nodes if node.domain == OWN_DOMAIN)


def uses_own_operators(model: ir.Model) -> bool:
    """Whether a graph has such operators: who runs it fast needs the library."""
    return any(True for _ in own_nodes(model))


def brings_own_operators(model: ir.Model) -> bool:
    """Whether a graph has a function for each of its nodes with such operators.

    ONNX Runtime takes these where nobody has registered the library. They compute the same with standard
    operators, slowly.
    """
    return all(node.op_identifier() in model.functions for node in own_nodes(model))
