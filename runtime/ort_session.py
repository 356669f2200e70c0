"""ONNX Runtime as a backend."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith.errors import (
    CheckFailedError,
    ModelFileError,
    ProviderUnavailableError,
    UnknownNameError,
    require,
)
from onnxsmith.onnx_file import save_model
from onnxsmith.package import Component, ModelPackage, cache_is_shareable
from onnxsmith.runtime.providers import resolve_provider
from onnxsmith.runtime.session import Array, Session

__all__ = ["OrtSession", "Placement"]

_CPU = "CPUExecutionProvider"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which provider got which nodes, from ONNX Runtime's own assignment.

    Attributes:
        nodes: Provider name to number of nodes, after ONNX Runtime's graph optimisation.
        operators: Provider name to operator counts.
    """

    nodes: dict[str, int]
    operators: dict[str, dict[str, int]]

    def share(self, provider: str) -> float:
        """The share of nodes that a provider got, 0 to 1."""
        total = sum(self.nodes.values())
        return self.nodes.get(provider, 0) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Provider name to nodes, share and operators."""
        return {
            name: {"nodes": count, "share": self.share(name), "operators": self.operators[name]}
            for name, count in self.nodes.items()
        }


class OrtSession(Session):
    """One graph of a package, open on one execution provider.

    Attributes:
        shares_cache: Whether past and present of the KV cache may be one buffer; see ``cache_is_shareable``.
    """

    def __init__(
        self,
        package: ModelPackage,
        *,
        component: str | None = None,
        provider: str = "cpu",
        provider_options: dict[str, str] | None = None,
        threads: int | None = None,
        optimize: bool = True,
        name: str = "model",
    ) -> None:
        """Opens a graph.

        Args:
            package: What to open. A graph that is not on disk is written to a temporary directory.
            component: Which graph; the only one where None.
            provider: Short name or ONNX Runtime's name of the execution provider.
            provider_options: Passed to the provider.
            threads: Threads of an operator (intra-op); all physical cores where None.
            optimize: Whether ONNX Runtime may optimise the graph.
            name: For messages and reports.

        Raises:
            MissingDependencyError: No onnxruntime package is installed.
            ProviderUnavailableError: The provider is not in the installed package, or refused to start.
            ModelFileError: ONNX Runtime refuses the graph.
            UnknownNameError: No such provider or component.
        """
        if component is not None and component not in package.components:
            raise UnknownNameError(name, name=component, known=package.components, kind="component")
        self._ort: Any = require("onnxruntime", purpose="running an ONNX model")
        self.provider = resolve_provider(provider)
        self.name = name
        chosen = package.components[component] if component else package.main
        self._temporary: Path | None = None
        path = chosen.path or self._write(chosen)
        self._session: Any = None
        try:
            self._session = self._open(path, provider_options, threads, optimize)
        except BaseException:
            self.close()
            raise
        self.inputs = chosen.inputs
        self.outputs = chosen.outputs
        self.shares_cache = cache_is_shareable(chosen.model)

    @property
    def ort_session(self) -> Any:
        """The ``onnxruntime.InferenceSession``, for what this interface does not cover."""
        assert self._session is not None, "the session is closed"
        return self._session

    def ort_value(self, array: Array) -> Any:
        """The array as an ``onnxruntime.OrtValue`` on the host."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))

    def run_values(self, feeds: Mapping[str, Any], outputs: list[str]) -> list[Any]:
        """Runs the model on ``onnxruntime.OrtValue`` objects, without a check and without a copy.

        Raises:
            ModelFileError: ONNX Runtime fails.
        """
        with self._running():
            values: list[Any] = self.ort_session.run_with_ort_values(outputs, feeds)
        return values

    def run_bound(self, binding: Any) -> None:
        """Runs the model on an ``onnxruntime.IOBinding`` of ``ort_session``, without a check or a copy.

        Raises:
            ModelFileError: ONNX Runtime fails.
        """
        with self._running():
            self.ort_session.run_with_iobinding(binding)

    def placement(self) -> Placement:
        """Which provider got which nodes."""
        nodes: Counter[str] = Counter()
        operators: dict[str, Counter[str]] = {}
        for assignment in self.ort_session.get_provider_graph_assignment_info():
            for node in assignment.get_nodes():
                nodes[assignment.ep_name] += 1
                operators.setdefault(assignment.ep_name, Counter())[node.op_type] += 1
        return Placement(dict(nodes), {name: dict(count.most_common()) for name, count in operators.items()})

    def check_placement(self) -> Placement:
        """The placement, if the wanted provider really got nodes.

        Raises:
            CheckFailedError: Every node fell back to another provider.
        """
        placement = self.placement()
        if placement.nodes and not placement.nodes.get(self.provider):
            raise CheckFailedError(
                f"{self.name} on {self.provider}",
                got=f"every node ran on {', '.join(placement.nodes)}",
                expected=f"nodes on {self.provider}",
                remedy="The provider takes none of these operators or types; see its documentation",
            )
        return placement

    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        with self._running():
            results = self.ort_session.run(outputs, feeds)
        return dict(zip(outputs, results, strict=True))

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        except self._ort_errors() as error:
            raise ModelFileError(
                self.name,
                got=f"ONNX Runtime fails in {self.provider}: {_first_line(error)}",
                remedy="Inputs of these shapes or values do not fit the graph, or the graph is wrong",
            ) from error

    def close(self) -> None:
        """Frees the graph, and its file where this session wrote one."""
        self._session = None
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def _write(self, component: Component) -> Path:
        self._temporary = Path(tempfile.mkdtemp(prefix="onnxsmith-session-"))
        path = self._temporary / "model.onnx"
        try:
            save_model(component.model, path)
        except BaseException:
            self.close()
            raise
        return path

    def _open(
        self, path: Path, provider_options: dict[str, str] | None, threads: int | None, optimize: bool
    ) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        # Severity 3 is errors: ONNX Runtime warns on standard error about things nobody can act on.
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if threads:
            options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        wanted: list[Any] = [(self.provider, provider_options or {})]
        if self.provider != _CPU:
            wanted.append(_CPU)
        try:
            session = ort.InferenceSession(str(path), options, providers=wanted)
        except self._ort_errors() as error:
            raise ModelFileError(
                self.name,
                got=f"ONNX Runtime {ort.__version__} refuses the model on {self.provider}: "
                f"{_first_line(error)}",
                expected="a model that it can load",
            ) from error
        if self.provider not in session.get_providers():
            # ONNX Runtime logs the reason, drops the provider and goes on with the CPU.
            raise ProviderUnavailableError(
                f"execution provider {self.provider}",
                got=f"ONNX Runtime fell back to {', '.join(session.get_providers())}",
                expected="the provider to start",
                remedy="Its libraries or its device are missing; ONNX Runtime's log above says which",
            )
        return session

    def _ort_errors(self) -> tuple[type[Exception], ...]:
        state = self._ort.capi.onnxruntime_pybind11_state
        kinds = (
            "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "NoSuchFile",
            "RuntimeException", "EPFail", "ModelLoaded", "NoModel",
        )  # fmt: skip
        return (*(getattr(state, kind) for kind in kinds if hasattr(state, kind)), ValueError, RuntimeError)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:400]
