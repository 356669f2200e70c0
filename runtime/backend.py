"""Backends: what opens a model and gives a session. One small interface, whoever computes."""

from __future__ import annotations

import abc
import dataclasses
from typing import Generic, TypeVar

from onnxsmith.package import ModelPackage
from onnxsmith.program import TorchProgram
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.providers import resolve_provider
from onnxsmith.runtime.session import Session
from onnxsmith.runtime.torch_session import TorchSession

__all__ = ["Backend", "OrtBackend", "TorchBackend"]

ModelT = TypeVar("ModelT", contravariant=True)


class Backend(abc.ABC, Generic[ModelT]):
    """Opens models of one kind. Holds settings and no state, so one backend may open many models."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """For messages and reports."""

    @abc.abstractmethod
    def open(self, model: ModelT, *, name: str = "model") -> Session:
        """Opens a model.

        Args:
            model: What to open.
            name: What to call it in messages and reports.
        """


@dataclasses.dataclass(frozen=True)
class TorchBackend(Backend[TorchProgram]):
    """PyTorch, eager, on the CPU.

    Attributes:
        threads: Threads of an operator; torch's default where None.
    """

    threads: int | None = None

    @property
    def name(self) -> str:
        """Always ``torch``."""
        return "torch"

    def open(self, model: TorchProgram, *, name: str = "") -> TorchSession:
        """Opens a program; it is called after its module unless a name is given."""
        session = TorchSession(model, threads=self.threads)
        session.name = name or session.name
        return session


@dataclasses.dataclass(frozen=True)
class OrtBackend(Backend[ModelPackage]):
    """ONNX Runtime with one execution provider.

    Attributes:
        provider: Short name or ONNX Runtime's name of the execution provider.
        threads: Threads of an operator (intra-op); all physical cores where None.
        optimize: Whether ONNX Runtime may optimise the graph.

    Raises:
        UnknownNameError: No such provider.
        ProviderUnavailableError: The installed onnxruntime package does not have it.
    """

    provider: str = "cpu"
    threads: int | None = None
    optimize: bool = True

    def __post_init__(self) -> None:
        """Finds out at once whether the provider is there."""
        resolve_provider(self.provider)

    @property
    def name(self) -> str:
        """ONNX Runtime's name of the execution provider."""
        return resolve_provider(self.provider)

    def open(self, model: ModelPackage, *, name: str = "model") -> OrtSession:
        """Opens the only graph of a package."""
        return OrtSession(
            model, provider=self.provider, threads=self.threads, optimize=self.optimize, name=name
        )
