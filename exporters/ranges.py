"""The sizes that a traced program holds for.

torch.export follows one branch where a module compares a size with a number, and writes down for which sizes
that branch is the right one. torch.onnx drops this: beyond them the graph would go on with the wrong branch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from onnxsmith.exporters.axes import resized

if TYPE_CHECKING:
    import torch

    from onnxsmith.program import TorchProgram

__all__ = ["runs_with", "traced_sizes"]

# Beyond this many elements in an input nothing is tried.
_MOST_ELEMENTS = 10**7


def traced_sizes(
    program: TorchProgram, exported: torch.export.ExportedProgram
) -> dict[str, tuple[int, int | None]]:
    """Name of a dynamic axis to the smallest and, where there is one, the largest size that was traced.

    torch takes a size for at least 2; with 1 the program may be right all the same.
    """
    ranges = {str(symbol): found for symbol, found in exported.range_constraints.items()}
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    sizes: dict[str, tuple[int, int | None]] = {}
    for spec, name in zip(program.inputs, exported.graph_signature.user_inputs, strict=True):
        value = nodes[str(name)].meta.get("val")
        for axis, size in zip(spec.shape or (), getattr(value, "shape", ()), strict=False):
            found = ranges.get(str(size))
            if not isinstance(axis, str) or found is None:
                continue
            low, high = sizes.get(axis, (1, None))
            lower, upper = (
                int(text) if (text := str(x)).isdecimal() else None for x in (found.lower, found.upper)
            )
            bounds = [x for x in (high, upper) if x is not None]
            sizes[axis] = (max(low, lower or 1), min(bounds, default=None))
    return sizes


def runs_with(program: TorchProgram, axis: str, size: int) -> bool:
    """Whether the PyTorch module itself runs with this size of an axis."""
    import torch

    tensors = dict(program.examples)
    for spec in program.inputs:
        for place, name in enumerate(spec.shape or ()):
            if name == axis:
                tensor = tensors[spec.name]
                if tensor.numel() // max(tensor.shape[place], 1) * size > _MOST_ELEMENTS:
                    return False
                tensors[spec.name] = resized(tensor, place, size)
    with contextlib.suppress(Exception), torch.no_grad():
        program.module(**tensors)
        return True
    return False
