"""What is slow because of types of values: see ``findings``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxsmith.finding import Finding
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.type_repairs import HALVES, cast_chains, computes_in_half

if TYPE_CHECKING:
    from onnxsmith.graph_passes.findings import Target

__all__ = ["half_on_cpu", "stray_casts"]

_FEW = 5


def half_on_cpu(model: ir.Model, target: Target) -> Iterator[Finding]:
    """16 bit floats on a processor: its kernels compute in float32, behind casts of every operand."""
    if not target.is_cpu:
        return
    found = [node for node in model.graph.all_nodes() if computes_in_half(node)]
    if not found:
        return
    types = sorted({v.dtype.name.lower() for n in found for v in n.outputs if v.dtype in HALVES and v.dtype})
    yield Finding(
        "half_on_cpu",
        "slow",
        f"{len(found)} nodes compute in {' and '.join(types)}",
        "the CPU provider has few kernels for it: ONNX Runtime casts every operand to float32 and back",
        "convert to float32 for this provider; inputs and outputs keep their types",
        tuple(label(node) for node in found[:_FEW]),
        len(found),
        (("to_float32", {}),),
    )


def stray_casts(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Casts that come back to the type that a value had before, and casts to the type that it has."""
    chains = list(cast_chains(model))
    if not chains:
        return
    narrow = sum(chain.loses for chain in chains)
    yield Finding(
        "stray_casts",
        "slow",
        f"{len(chains)} casts that lead back to the type from before"
        + (f", {narrow} of them through fewer digits" if narrow else ""),
        "each copies its tensor" + (", and rounds it for nothing" if narrow else ""),
        "take them out",
        tuple(label(chain.last) for chain in chains[:_FEW]),
        len(chains),
        (("remove_casts", {}),),
    )
