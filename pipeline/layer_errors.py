"""How far each tensor of a variant is from PyTorch's, from the first layer to the last, for the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.package import reads_lengths
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.bisecting import decisive_cases

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxsmith.program import TorchProgram
    from onnxsmith.runtime import OrtBackend, Session

__all__ = ["layer_errors"]


def layer_errors(
    program: TorchProgram, session: Session, directory: Path, backend: OrtBackend, *, seed: int = 0
) -> dict[str, Any]:
    """Compares every tensor that both sides have.

    Args:
        program: PyTorch's model.
        session: The same, open.
        directory: The variant.
        backend: What runs it.
        seed: Of the made-up inputs.

    Returns:
        ``tensors``, each with ``depth``, ``name``, ``operator``, ``error`` (relative to the tensor's
        magnitude), ``introduced`` (the part that its own node makes from right inputs) and ``mark``;
        ``verdict``, what stands out; and ``cases``.

    Raises:
        OnnxsmithError: A side cannot be run in pieces.
    """
    from onnxsmith.runtime import TorchReference, find_divergence
    from onnxsmith.runtime.torch_session import TorchSession

    assert isinstance(session, TorchSession)
    reference = TorchReference(session, program)
    package = load_package(directory)
    lengths = reads_lengths(package.main.model)
    cases = decisive_cases(reference, program.limits, 1, seed, left_padding=not lengths)
    found = find_divergence(reference, package, backend, cases, name=directory.name)
    first = found.first.name if found.first is not None else None
    worst = found.suspects[0].tensor if found.suspects else None
    tensors: list[Mapping[str, Any]] = [
        {
            "depth": trace.depth,
            "name": trace.name,
            "operator": trace.operator,
            "error": _finite(trace.error.size),
            "introduced": _finite(trace.own),
            "mark": "first" if trace.name == first else "worst" if trace.name == worst else "",
        }
        for trace in found.tensors
    ]
    return {"tensors": tensors, "verdict": found.verdict, "cases": list(found.cases)}


def _finite(value: float) -> float | None:
    """JSON has no infinity: what is not finite is None."""
    return value if math.isfinite(value) else None
