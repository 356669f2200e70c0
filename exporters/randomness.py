"""Programs without their random numbers: only those can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram

__all__ = ["without_randomness"]

# What draws, to the value in the middle of what it draws.
_MIDDLES: Mapping[str, float] = {"randn": 0.0, "randn_like": 0.0, "rand": 0.5, "rand_like": 0.5}


def without_randomness(program: TorchProgram) -> TorchProgram:
    """The program with the mean of the distribution in the place of each number that it draws.

    Noise is zero, uniform numbers are one half.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Means(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            result = func(*args, **(kwargs or {}))
            middle = _MIDDLES.get(getattr(func, "__name__", ""))
            return result if middle is None else result.fill_(middle)

    class Quiet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = program.module

        def forward(self, **tensors: Any) -> Any:
            with Means():
                return self.inner(**tensors)

    return dataclasses.replace(program, module=Quiet().eval())
