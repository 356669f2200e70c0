"""Another dropout than the model's own, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["dropout_of"]


@contextlib.contextmanager
def dropout_of(model: torch.nn.Module, probability: float | None) -> Iterator[None]:
    """All dropout of a model has one probability; its own where None."""
    import torch

    before: list[tuple[Any, str, float]] = []
    try:
        for module in model.modules() if probability is not None else ():
            names = ["p"] if isinstance(module, torch.nn.Dropout) else []
            # Some attentions keep it as a number.
            names += [n for n in ("attention_dropout", "dropout_prob") if _is_number(module, n)]
            for name in names:
                before.append((module, name, getattr(module, name)))
                setattr(module, name, probability)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _is_number(module: Any, name: str) -> bool:
    return isinstance(module.__dict__.get(name), float)
