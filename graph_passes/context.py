"""What a pass may need and cannot make itself: the pipeline supplies it, and it travels with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.contract import PreconditionError

if TYPE_CHECKING:
    from onnxsmith.graph_passes.rounded_ahead import RoundedAhead

__all__ = ["Activations", "PassContext", "Probe", "Timings", "activations_for", "context_of", "in_context"]

_KEY = "onnxsmith.context"

Activations = Callable[[ir.Model, Sequence[str]], Iterator[Mapping[str, npt.NDArray[Any]]]]
"""Runs a model on the calibration data and yields, batch by batch, the named inner values.

No batch is kept: what a consumer needs of one it has to take before it asks for the next.
"""


Feeds = dict[str, npt.NDArray[Any]]
Probe = Callable[[ir.Model, int], AbstractContextManager[Callable[[Feeds], list[npt.NDArray[Any]]]]]
"""Opens a model for so many samples of the calibration data.

What it gives runs all of them, with inputs besides, and returns the first output of each.
"""

Timings = Callable[[ir.Model], Mapping[str, float]]
"""Runs a model, a decoder with one token, and gives the milliseconds of each node by its name."""


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What surrounds a run of passes.

    Attributes:
        gguf: The GGUF file that the weights were read from.
        activations: Runs the model on calibration data.
        probe: Runs the model on some of it again and again.
        timings: Measures the nodes of a model.
        calibration: What that data is, for the manifest.
        ahead: Weights that were rounded while the model was traced.
    """

    gguf: Path | None = None
    activations: Activations | None = None
    probe: Probe | None = None
    timings: Timings | None = None
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ahead: RoundedAhead | None = None


def in_context(model: ir.Model, context: PassContext | None) -> None:
    """Gives a model its context, or takes it away where None."""
    if context is None:
        model.meta.pop(_KEY, None)
    else:
        model.meta[_KEY] = context


def context_of(model: ir.Model) -> PassContext:
    """The context of a model; an empty one where nobody gave it any."""
    found = model.meta.get(_KEY)
    return found if isinstance(found, PassContext) else PassContext()


def activations_for(model: ir.Model, name: str, *, method: str) -> Activations:
    """What runs a model on calibration data, for a pass whose method cannot do without.

    Raises:
        PreconditionError: There is no calibration data.
    """
    activations = context_of(model).activations
    if activations is None:
        raise PreconditionError(
            f"pass {name}",
            got=f"method {method} without calibration data",
            expected="data to run the model on",
            remedy="Give --calibration-data, or the key calibration of the recipe",
        )
    return activations
