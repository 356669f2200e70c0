"""Nested values and flat tensors: what goes into ``forward`` and comes out of it, by stable dotted names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError

if TYPE_CHECKING:
    import torch

__all__ = ["flatten", "rebuild"]

# What a value may hold besides tensors. In an input it is a constant of the exported graph.
_CONSTANTS = (bool, int, float, complex, str, bytes)


def flatten(
    name: str, value: Any, *, where: str, kind: str = "output", top: str = "output"
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a nested value by dotted name: ``hidden_states.0``, and ``output_0`` for a bare number.

    Args:
        name: The name of the value itself; empty for all that ``forward`` returns.
        value: Tensors in tuples, lists, dicts, named tuples or dataclasses.
        where: For messages.
        kind: What it is, for messages.
        top: What a nameless tensor is called, and what numbers of the outermost sequence begin with.

    Raises:
        ExportError: Something that may hold tensors and cannot be looked into.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.layout is not torch.strided:
            odd = "complex" if value.is_complex() else f"in the layout {value.layout}"
            raise ExportError(
                where,
                got=f"{kind} {name or top} is {odd}",
                expected="dense tensors of real numbers, which ONNX Runtime takes and gives",
                remedy=f"{'Return' if kind == 'output' else 'Take'} "
                + ("torch.view_as_real() of it" if value.is_complex() else "a dense tensor"),
            )
        yield name or top, value
        return
    parts = _parts(value)
    if parts is None:
        raise ExportError(
            where,
            got=f"{kind} {name or 'of forward()'} is a {type(value).__name__}",
            expected="tensors in tuples, lists, dicts or dataclasses",
            remedy=f"Wrap the module so that forward() {'returns' if kind == 'output' else 'takes'} tensors",
        )
    for key, part in parts:
        outermost = f"{top}_{key}" if key.isdecimal() else key
        inner = f"{name}.{key}" if name else outermost
        yield from flatten(inner, part, where=where, kind=kind, top=top)


def rebuild(name: str, value: Any, tensors: Mapping[str, Any]) -> Any:
    """The value with the tensors of these names in the places of its own; the inverse of ``flatten``."""
    import torch

    if isinstance(value, torch.Tensor):
        return tensors[name]
    parts = _parts(value)
    if not parts:
        return value
    new = {key: rebuild(f"{name}.{key}", part, tensors) for key, part in parts}
    if isinstance(value, Mapping):
        made: dict[Any, Any] = {key: new[str(key)] for key in value}
        make: Callable[..., Any] = type(value)
        return made if type(value) is dict else make(made)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(**new)
    if isinstance(value, tuple):
        return tuple(new.values())
    if isinstance(value, list):
        return list(new.values())
    return dataclasses.replace(value, **new)


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """What a value consists of; None where that cannot be seen."""
    if value is None or isinstance(value, _CONSTANTS):
        return []
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(index), part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init]
    return None
