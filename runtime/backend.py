"""Backends: what opens a model and gives a session. One small interface, whoever computes."""

from __future__ import annotations

import abc
import dataclasses
from typing import Generic, TypeVar

from onnxsmith.package import ModelPackage
from onnxsmith.program import TorchProgram
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.providers import choose_provider
from onnxsmith.runtime.session import Session
from onnxsmith.runtime.torch_session import TorchSession
from onnxsmith.runtime.worker_session import WorkerSession

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
    """PyTorch on the CPU.

    Attributes:
        threads: Threads of an operator; torch's default where None.
        compiled: Whether ``torch.compile`` makes kernels of it, at the first run of each kind of shape;
            it needs a C++ compiler.
    """

    threads: int | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        """``torch`` or ``torch.compile``."""
        return "torch.compile" if self.compiled else "torch"

    def open(self, model: TorchProgram, *, name: str = "") -> TorchSession:
        """Opens a program; it is called after its module unless a name is given."""
        session = TorchSession(model, threads=self.threads, compiled=self.compiled)
        session.name = name or session.name
        return session


@dataclasses.dataclass(frozen=True)
class OrtBackend(Backend[ModelPackage]):
    """ONNX Runtime with one execution provider, here or in an environment of its own.

    Attributes:
        provider: See ``choose_provider``: ``cpu``, ``openvino:device_type=CPU``, ``name@/path/to/plugin.so``.
        threads: Threads of an operator (intra-op); all physical cores where None.
        optimize: Whether ONNX Runtime may optimise the graph.
        apart: Whether it runs in a process of its own even where it could run in this one.
        record: Whether sessions note which kernels run; see ``OrtSession.kernels``.

    Raises:
        UnknownNameError: No such provider or option.
        ProviderUnavailableError: It is not installed.
    """

    provider: str = "cpu"
    threads: int | None = None
    optimize: bool = True
    apart: bool = False
    record: bool = False

    def __post_init__(self) -> None:
        """Finds out at once whether the provider is there."""
        choose_provider(self.provider)

    @property
    def name(self) -> str:
        """ONNX Runtime's name of the execution provider."""
        return choose_provider(self.provider).ort_name

    def open(
        self, model: ModelPackage | GraphFile, *, name: str = "model", component: str | None = None
    ) -> OrtSession | WorkerSession:
        """Opens one graph of a package, the only one unless it is named.

        A provider whose package is in another environment, and one from a foreign library, runs in a
        process of its own: a crash there is an error of that session.
        """
        choice = choose_provider(self.provider)
        if choice.apart or self.apart:
            return WorkerSession(
                model, choice, component=component, threads=self.threads, optimize=self.optimize,
                record=self.record, name=name,
            )  # fmt: skip
        return OrtSession(
            model, component=component, provider=choice, threads=self.threads, optimize=self.optimize,
            record=self.record, name=name,
        )  # fmt: skip
