"""What is right, with its intermediate tensors and weights: a PyTorch model or an ONNX graph."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxsmith.package import ModelPackage
from onnxsmith.runtime.backend import Backend
from onnxsmith.runtime.graph_parts import GraphValues
from onnxsmith.runtime.matching import stem_of
from onnxsmith.runtime.samples import Case
from onnxsmith.runtime.session import Array, Session
from onnxsmith.runtime.tensor_store import TensorStore
from onnxsmith.runtime.tracing_runs import (
    Weighted,
    trace_graph,
    trace_torch,
    weighted_nodes,
    without_wrappers,
)

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram

__all__ = ["GraphReference", "Reference", "TorchReference"]


class Reference(abc.ABC):
    """What is right, with all its intermediate tensors."""

    session: Session

    @abc.abstractmethod
    def trace(self, cases: Sequence[Case], store: TensorStore) -> dict[str, Weighted]:
        """Runs the cases, keeps every tensor, and says what is computed with which weight."""

    def release(self) -> None:  # noqa: B027 - a reference may need it all
        """Frees what is only needed to make inputs; ``trace`` and ``weight`` go on to work."""

    @abc.abstractmethod
    def weight(self, name: str) -> Array | None:
        """The weight that a candidate's weight of this name was made of; None where there is none."""


class TorchReference(Reference):
    """A PyTorch model."""

    def __init__(self, session: Session, program: TorchProgram) -> None:
        """Takes an open session and the program that it runs."""
        self.session, self._program = session, program

    def trace(self, cases: Sequence[Case], store: TensorStore) -> dict[str, Weighted]:
        """Runs it eagerly, operator by operator."""
        return trace_torch(self.session, self._program.module, cases, store)

    def weight(self, name: str) -> Array | None:
        """From the module's state."""
        state = {without_wrappers(key): value for key, value in self._program.module.state_dict().items()}
        stem = stem_of(name, state)
        if stem is None:
            return None
        array: Array = state[stem].detach().float().numpy()
        return array


class GraphReference(Reference):
    """An ONNX model."""

    def __init__(self, session: Session, package: ModelPackage, backend: Backend[ModelPackage]) -> None:
        """Takes an open session, the model that it runs, and what runs pieces of it."""
        self.session, self._backend = session, backend
        self.values = GraphValues(package.main.model)

    def trace(self, cases: Sequence[Case], store: TensorStore) -> dict[str, Weighted]:
        """Runs it piece by piece."""
        trace_graph(self.values, self._backend, cases, store, of=self.session.name)
        return weighted_nodes(self.values)

    def release(self) -> None:
        """Closes the whole graph: its pieces are opened one by one."""
        self.session.close()

    def weight(self, name: str) -> Array | None:
        """From the graph's initializers."""
        initializers = self.values.model.graph.initializers
        stem = stem_of(name, initializers)
        tensor = initializers[stem].const_value if stem is not None else None
        if tensor is None or not tensor.dtype.is_floating_point():
            return None
        return np.asarray(tensor.numpy())
