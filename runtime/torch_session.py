"""PyTorch as a backend: the reference of most comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxsmith.context_length import POSITIONS
from onnxsmith.errors import ProviderUnavailableError, require
from onnxsmith.program import TorchProgram
from onnxsmith.runtime.session import Array, Session

__all__ = ["TorchSession"]


class TorchSession(Session):
    """A ``TorchProgram`` on the CPU, run eagerly or through ``torch.compile``."""

    def __init__(self, program: TorchProgram, *, threads: int | None = None, compiled: bool = False) -> None:
        """Opens the program.

        Args:
            program: What to run.
            threads: Threads of an operator; torch's default where None. This is a setting of the process.
            compiled: Whether ``torch.compile`` makes kernels of it.

        Raises:
            MissingDependencyError: torch is not installed.
        """
        self._torch = require("torch", purpose="running a PyTorch model")
        if threads:
            self._torch.set_num_threads(threads)
        if program.prepare:
            program.prepare()
        self._program: TorchProgram | None = program
        self._module: Any = self._torch.compile(program.module) if compiled else program.module
        self.inputs = program.inputs
        self.outputs = program.outputs
        self.provider = "torch.compile" if compiled else "torch"
        self.name = program.name
        self.positions = program.limits.get(POSITIONS)

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
            try:
                results = self._module(**tensors)
            except Exception as error:
                # Whatever inductor, its compiler or its subprocess raises; an eager model's own errors go on.
                if self._module is self._program.module or not _of_the_compiler(error):
                    raise
                raise ProviderUnavailableError(
                    f"{self.name} on torch.compile",
                    got=f"it cannot be compiled: {' '.join(str(error).split())[:300]}",
                    expected="a model and a C++ compiler that torch.compile can use",
                    remedy="Run it eagerly, as plain torch",
                ) from error
        return {name: _to_numpy(results[name]) for name in outputs}

    def close(self) -> None:
        """Lets go of the program, which is the caller's, and of weights that were read for it."""
        if self._program is not None and self._program.release:
            self._program.release()
        self._program = None
        self._module = None


def _of_the_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


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
