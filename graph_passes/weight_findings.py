"""How weights are stored, where that costs time and memory: see ``findings``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxsmith.finding import Finding

if TYPE_CHECKING:
    from onnxsmith.graph_passes.findings import Target

__all__ = ["inline_weights"]

_FEW = 5
# Larger weights are written beside the graph, where they can be mapped.
_LARGE_BYTES = 64 * 1024 * 1024


def inline_weights(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Large weights inside the ``.onnx`` file, which no runtime can map: they are parsed and copied."""
    del target
    inside = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    ]
    sizes = {value.name or "?": value.const_value.nbytes for value in inside if value.const_value is not None}
    total = sum(sizes.values())
    if total <= _LARGE_BYTES:
        return
    names = sorted(sizes, key=lambda name: -sizes[name])
    yield Finding(
        "inline_weights",
        "large",
        f"{total / 1e6:.0f} MB of weights are inside the .onnx file",
        "they are parsed and copied each time the model is loaded, and not mapped, which takes about half as "
        "much memory again and several times as long; more than 2 GB cannot be stored so",
        "onnxsmith optimize MODEL -o OUT --preset clean writes them beside it; so does --fix, where it has "
        "another remedy to apply",
        tuple(names[:_FEW]),
        len(names),
    )
