"""A PyTorch model behind a flat signature of named tensors: what is exported, and what is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from onnxsmith.package import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["AxisSizes", "TorchProgram"]


class AxisSizes(NamedTuple):
    """The sizes of a dynamic axis that a model runs with.

    Attributes:
        low: The smallest.
        high: The largest; None where none was found.
        step: What all of them are multiples of, such as the stride of a U-Net.
    """

    low: int = 1
    high: int | None = None
    step: int = 1

    def nearest(self, size: int) -> int:
        """The size that is wanted, or the next larger one, or the largest."""
        up = -(-max(size, self.low) // self.step) * self.step
        return up if self.high is None else min(up, self.high // self.step * self.step)


@dataclasses.dataclass
class TorchProgram:
    """A PyTorch module with named tensors in and out, as an ONNX graph has them.

    Attributes:
        module: Its ``forward`` takes the inputs as keyword arguments and returns a dict of tensors by
            output name, in the order of ``outputs``. In eval mode.
        inputs: The inputs, dynamic axes named.
        outputs: The outputs, dynamic axes named.
        examples: One tensor per input, usable for tracing.
        task: The Hugging Face task name, or None.
        limits: For integer inputs, one above the highest value that is valid, such as the vocabulary size.
        name: For messages and reports.
        prepare: What has to be called before the module is run: reads weights that are still in their files.
        release: What may be called as often as ``prepare`` was, when the module is run no more: its weights
            take no memory then.
        axis_limits: Name of a dynamic axis to the sizes that run.
        natural_sizes: Name of a dynamic axis that was found by trying, to its size in the example inputs. A
            tracer that cannot keep such an axis dynamic may fix it to this size; other dynamic axes must
            stay dynamic.
        details: What was decided on the way, for the manifest.
    """

    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    examples: dict[str, torch.Tensor]
    task: str | None = None
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    name: str = "torch"
    axis_limits: dict[str, AxisSizes] = dataclasses.field(default_factory=dict)
    natural_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    release: Callable[[], None] | None = None
