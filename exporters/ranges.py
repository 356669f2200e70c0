"""The sizes that a traced program holds for.

torch.export follows one branch where a module compares a size with a number, and writes down for which sizes
that branch is the right one. torch.onnx drops this: beyond them the graph would go on with the wrong branch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from onnxsmith.exporters.axes import resized

if TYPE_CHECKING:
    import torch

    from onnxsmith.program import TorchProgram

__all__ = ["narrowing", "runs_with", "traced_sizes"]

_SYMBOL = re.compile(r"\bs\d+\b")

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


def narrowing(
    program: TorchProgram, exported: torch.export.ExportedProgram, relations: Iterable[Any]
) -> Iterator[tuple[str, str]]:
    """Which axes may not have every size that the module takes, because of equations between sizes.

    An equation counts where a size near to the example's breaks it and the PyTorch module runs with that.

    Yields:
        The name of an axis, and the equation with names in it.
    """
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    names: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for spec, name in zip(program.inputs, exported.graph_signature.user_inputs, strict=True):
        value = nodes[str(name)].meta.get("val")
        shape = program.examples[spec.name].shape
        for axis, symbol, size in zip(spec.shape or (), getattr(value, "shape", ()), shape, strict=False):
            if isinstance(axis, str) and not isinstance(symbol, int):
                names[str(symbol)], sizes[str(symbol)] = axis, int(size)
    for relation in relations:
        symbols = sorted(relation.free_symbols, key=str)
        # An inequality holds for nearly all sizes, and an equation for nearly none.
        if type(relation).__name__ not in ("Equality", "Eq") or any(str(s) not in names for s in symbols):
            continue
        for symbol in symbols:
            for size in range(sizes[str(symbol)] + 1, sizes[str(symbol)] + 4):
                found = {other: sizes[str(other)] for other in symbols} | {symbol: size}
                axis = names[str(symbol)]
                if _breaks(relation, found) and runs_with(program, axis, size):
                    told = str(relation.lhs), str(relation.rhs)
                    text = " = ".join(_SYMBOL.sub(lambda m: names.get(m[0], m[0]), part) for part in told)
                    yield axis, text
                    break


def _breaks(relation: Any, sizes: dict[Any, int]) -> bool:
    try:
        return bool(relation.subs(sizes) == False)  # noqa: E712  # SymPy's own value
    except ZeroDivisionError:
        return True


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
