"""PyTorch as a backend: the reference of most comparisons."""

from __future__ import annotations

import numpy as np

from onnxsmith.errors import require
from onnxsmith.program import TorchProgram
from onnxsmith.runtime.session import Array, Session

__all__ = ["TorchSession"]


class TorchSession(Session):
    """A ``TorchProgram``, run eagerly on the CPU."""

    def __init__(self, program: TorchProgram, *, threads: int | None = None) -> None:
        """Opens the program.

        Args:
            program: What to run.
            threads: Threads of an operator; torch's default where None. This is a setting of the process.

        Raises:
            MissingDependencyError: torch is not installed.
        """
        self._torch = require("torch", purpose="running a PyTorch model")
        if threads:
            self._torch.set_num_threads(threads)
        self._program: TorchProgram | None = program
        self.inputs = program.inputs
        self.outputs = program.outputs
        self.provider = "torch"
        self.name = program.name

    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        assert self._program is not None, "the session is closed"
        torch = self._torch
        tensors = {
            # Writable, or torch warns; ascontiguousarray would give a scalar an axis.
            spec.name: torch.from_numpy(np.require(feeds[spec.name], requirements=("C", "W")))
            if spec.dtype != "bfloat16"
            else torch.from_numpy(feeds[spec.name].view(np.uint16).copy()).view(torch.bfloat16)
            for spec in self.inputs
        }
        with torch.inference_mode():
            results = self._program.module(**tensors)
        return {name: _to_numpy(results[name]) for name in outputs}

    def close(self) -> None:
        """Lets go of the program, which is the caller's."""
        self._program = None


def _to_numpy(tensor: object) -> Array:
    torch = require("torch", purpose="running a PyTorch model")
    assert isinstance(tensor, torch.Tensor)
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        bits: Array = tensor.contiguous().view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    # numpy() of a view shares memory with the model's own buffers.
    array: Array = tensor.detach().contiguous().numpy()
    return array
