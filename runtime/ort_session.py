"""ONNX Runtime as a backend, in this process."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith.context_length import POSITIONS
from onnxsmith.errors import ModelFileError, ProviderUnavailableError, require
from onnxsmith.package import ModelPackage
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.kernel_library import register_kernels
from onnxsmith.runtime.placement import Placement
from onnxsmith.runtime.profiling import RunProfile, placement_of, read_profile
from onnxsmith.runtime.providers import ProviderChoice, choose_provider
from onnxsmith.runtime.session import Array, Feeds, Session

__all__ = ["BoundRun", "OrtSession", "Placement"]

_CPU = "CPUExecutionProvider"
# ONNX Runtime reads these from the configuration of the session and not from the provider's options.
_CONFIGURED = frozenset({"WebGpuExecutionProvider"})
_REPLAYS = frozenset({"enable_cuda_graph", "trt_cuda_graph_enable"})
# How providers say that they lack a device or dislike an option, rather than the model.
_NO_START = re.compile(
    r"option|adapter|driver|\bdevice (?:not|is not)|no device|libraries? (?:not|cannot)|failed to load|"
    r"CUDA failure|hipError",
    re.IGNORECASE,
)


class OrtSession(Session):
    """One graph, open on one execution provider.

    Attributes:
        device: ONNX Runtime's name of the memory that ``ort_value`` puts tensors into.
        limits: For integer inputs, one above the highest valid value.
        shares_cache: Whether past and present of the KV cache may be one buffer; see ``cache_is_shareable``.
        own_kernels: What runs onnxsmith's own operators: an instruction set, or ``functions``; empty where
            the graph has none.
    """

    def __init__(
        self,
        package: ModelPackage | GraphFile,
        *,
        component: str | None = None,
        provider: str | ProviderChoice = "cpu",
        provider_options: Mapping[str, str] | None = None,
        threads: int | None = None,
        optimize: bool = True,
        record: bool = False,
        name: str = "model",
    ) -> None:
        """Opens a graph.

        Args:
            package: What to open. A graph that is not on disk is written to a temporary directory.
            component: Which graph; the only one where None.
            provider: See ``choose_provider``. Its package must be installed in this environment; for one
                that is elsewhere see ``OrtBackend``.
            provider_options: Passed to the provider, besides those of ``provider``.
            threads: Threads of an operator (intra-op); all physical cores where None.
            optimize: Whether ONNX Runtime may optimise the graph.
            record: Whether it notes which kernels run; see ``kernels``.
            name: For messages and reports.

        Raises:
            MissingDependencyError: No onnxruntime package is installed.
            ProviderUnavailableError: The provider is not in the installed package, or refused to start.
            ModelFileError: ONNX Runtime refuses the graph.
            KernelsUnavailableError: The graph has onnxsmith's own operators, and their library cannot be had.
            UnknownNameError: No such provider or component.
        """
        self._ort: Any = require("onnxruntime", purpose="running an ONNX model")
        choice = provider if isinstance(provider, ProviderChoice) else choose_provider(provider)
        if choice.environment is not None:
            raise ProviderUnavailableError(
                f"execution provider {choice.name}",
                got=f"it is installed in {choice.environment.directory}, and not in this environment",
                expected="one of this environment",
                remedy="Open it with OrtBackend, which runs it in a process of its own",
            )
        self.choice = choice
        self.provider = choice.ort_name
        self.device = choice.device
        self.name = name
        self._options = {**choice.options, **(provider_options or {})}
        self._threads = threads
        if threads and choice.thread_option:
            self._options = {choice.thread_option: str(threads), **self._options}
        self._optimize = optimize
        self._graph = (
            package
            if isinstance(package, GraphFile)
            else GraphFile.of(package, component=component, name=name)
        )
        self._session: Any = None
        self.own_kernels = ""
        self._record = Path(tempfile.mkdtemp(prefix="onnxsmith-kernels-")) if record else None
        try:
            self._session = self._open(profile=self._record / "profile" if self._record else None)
        except BaseException:
            self.close()
            raise
        self.inputs = self._graph.inputs
        self.outputs = self._graph.outputs
        self.limits = self._graph.limits
        self.shares_cache = self._graph.shares_cache
        self.cache_scales = self._graph.cache_scales
        self.most_alike = self._graph.most_alike
        self.rows_interact = self._graph.rows_interact
        self.positions = self.limits.get(POSITIONS)
        self.reads_lengths = self._graph.reads_lengths

    @property
    def ort_session(self) -> Any:
        """The ``onnxruntime.InferenceSession``, for what this interface does not cover."""
        assert self._session is not None, "the session is closed"
        return self._session

    def ort_value(self, array: Array) -> Any:
        """The array as an ``onnxruntime.OrtValue`` in the memory of the provider's device."""
        return self._ort.OrtValue.ortvalue_from_numpy(
            np.asarray(array, order="C"), self.device, self._device_id
        )

    def run_values(
        self,
        feeds: Mapping[str, Any],
        outputs: list[str],
        *,
        host: Collection[str] = (),
        bind: bool | None = None,
    ) -> list[Any]:
        """Runs the model on ``onnxruntime.OrtValue`` objects, without a check and without a copy.

        Args:
            feeds: Input name to value.
            outputs: Names of the wanted outputs.
            host: Outputs that are to be in the host's memory; the others stay on the provider's device.
            bind: Whether to go through an IO binding. Needed for outputs on a device, and the default there.

        Raises:
            ModelFileError: ONNX Runtime fails.
        """
        with self._running():
            if not (self.device != "cpu" if bind is None else bind):
                values: list[Any] = self.ort_session.run_with_ort_values(outputs, feeds)
                return values
            binding = self.ort_session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                on_host = name in host
                binding.bind_output(
                    name, "cpu" if on_host else self.device, 0 if on_host else self._device_id
                )
            self.ort_session.run_with_iobinding(binding)
            bound: list[Any] = binding.get_outputs()
        return bound

    def run_bound(self, binding: Any) -> None:
        """Runs the model on an ``onnxruntime.IOBinding`` of ``ort_session``, without a check or a copy.

        Raises:
            ModelFileError: ONNX Runtime fails.
        """
        with self._running():
            self.ort_session.run_with_iobinding(binding)

    def bind(self, feeds: Feeds) -> BoundRun:
        """Puts inputs and outputs into the memory of the device, once for many runs of these shapes."""
        return BoundRun(self, self._check(feeds))

    def placement(self, *, measured: bool = False, feeds: Feeds | None = None) -> Placement:
        """Which provider got which nodes.

        Where the assignment does not name the wanted provider, as with WebGPU in ONNX Runtime 1.27, a
        profiled run says it.

        Args:
            measured: Whether to profile some runs in any case, for shares of time and bytes.
            feeds: For such a run; made-up inputs where None.
        """
        assigned = self.assigned()
        if measured:
            return placement_of(assigned, self.profile(feeds, runs=3), asynchronous=self._asynchronous)
        if self.provider in assigned or (self.provider == _CPU and assigned):
            return placement_of(assigned, None, asynchronous=None)
        return placement_of(assigned, self.profile(feeds, runs=1), asynchronous=self._asynchronous)

    def check_placement(self, *, measured: bool = False) -> Placement:
        """The placement, if the wanted provider really got nodes; see ``placement``.

        Raises:
            CheckFailedError: Every node fell back to another provider.
        """
        placement = self.placement(measured=measured)
        placement.require_use(self.provider, name=self.name)
        return placement

    def profile(self, feeds: Feeds | None = None, *, runs: int = 5, warm: bool = True) -> RunProfile:
        """Runs the graph under ONNX Runtime's profiler, in a session of its own.

        Args:
            feeds: Inputs; made-up ones where None.
            runs: How many runs are counted.
            warm: Whether there is one before them that is not, in which kernels are chosen and compiled.

        Raises:
            ModelFileError: ONNX Runtime fails.
        """
        checked = self._made_up() if feeds is None else self._check(feeds)
        names = [spec.name for spec in self.outputs]
        with tempfile.TemporaryDirectory(prefix="onnxsmith-profile-") as directory:
            session = self._open(profile=Path(directory) / "profile")
            with self._running():
                for _ in range(runs + warm):
                    session.run(names, checked)
                path = Path(session.end_profiling())
            # The device's own kernels are written when the session goes.
            del session
            return read_profile(path, skip_runs=int(warm))

    def kernels(self) -> dict[str, str]:
        """Nodes that ran until now, after ONNX Runtime's fusions, with their operators.

        The operator of what a provider compiled is ``compiled by PROVIDER``. Recording ends here; without it
        nothing is known, and the result is empty.
        """
        if self._record is None:
            return {}
        path = Path(self.ort_session.end_profiling())
        nodes = read_profile(path, skip_runs=0).nodes if path.is_file() else []
        return {
            node.name: f"compiled by {node.provider}" if node.name.startswith(node.provider) else node.op_type
            for node in nodes
        }

    def _made_up(self) -> dict[str, Array]:
        from onnxsmith.runtime.samples import cases_for

        case = next(cases_for(self, limits=self.limits, samples=1, sizes=(1, 8)))
        return self._check(case.feeds)

    @property
    def _asynchronous(self) -> str | None:
        return self.provider if self.choice.asynchronous else None

    @property
    def _device_id(self) -> int:
        return int(self._options.get("device_id", 0)) if self.device != "cpu" else 0

    def assigned(self) -> dict[str, Counter[str]]:
        """Provider name to operator counts, from the assignment; some providers are missing there."""
        operators: dict[str, Counter[str]] = {}
        for assignment in self.ort_session.get_provider_graph_assignment_info():
            for node in assignment.get_nodes():
                operators.setdefault(assignment.ep_name, Counter())[node.op_type] += 1
        return operators

    def assigned_names(self) -> dict[str, list[str]]:
        """Provider name to the names of its nodes, inside of what it compiled too, from the assignment."""
        names: dict[str, list[str]] = {}
        for assignment in self.ort_session.get_provider_graph_assignment_info():
            names.setdefault(assignment.ep_name, []).extend(node.name for node in assignment.get_nodes())
        return names

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
        self._graph.close()
        if self._record is not None:
            shutil.rmtree(self._record, ignore_errors=True)

    def _open(self, *, profile: Path | None = None) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        # Severity 3 is errors: ONNX Runtime warns on standard error about things nobody can act on.
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if self._threads:
            options.intra_op_num_threads = self._threads
        if not self._optimize:
            levels = ort.GraphOptimizationLevel
            folds = self._graph.needs_folding
            options.graph_optimization_level = levels.ORT_ENABLE_BASIC if folds else levels.ORT_DISABLE_ALL
        if self._graph.own_operators:
            self.own_kernels = register_kernels(options, replaceable=self._graph.brings_operators)
        try:
            if self.choice.library:
                self._add_plugin(options)
                wanted: list[Any] | None = None
            else:
                if self.provider in _CONFIGURED:
                    for key, value in self._options.items():
                        options.add_session_config_entry(f"ep.{self.provider.lower()}.{key}", value)
                # CUDA graphs are replayed on the memory that was bound when they were recorded, and show no
                # nodes: a profiled run binds nothing and wants them.
                replays = _REPLAYS if profile is not None else ()
                wanted = [(self.provider, {key: v for key, v in self._options.items() if key not in replays})]
                if self.provider != _CPU:
                    wanted.append(_CPU)
            # Without its fallback ONNX Runtime would say why a provider does not start, and not go on
            # with the CPU; but some providers are dropped by its C++ side, which only logs.
            session = ort.InferenceSession(
                str(self._graph.path), options, providers=wanted, enable_fallback=0
            )
        except self._ort_errors() as error:
            if self.provider != _CPU and _NO_START.search(str(error)):
                raise ProviderUnavailableError(
                    f"execution provider {self.provider}",
                    got=f"it does not start: {_first_line(error)}",
                    expected="its device, its drivers, and options that it knows",
                ) from error
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
                remedy="Its libraries or its device are missing; ONNX Runtime's log says which",
            )
        return session

    def _add_plugin(self, options: Any) -> None:
        from onnxsmith.runtime.plugins import plugin_devices

        devices = plugin_devices(self.choice.ort_name, self.choice.library)
        self.provider = devices[0].ep_name
        options.add_provider_for_devices(devices, dict(self._options))

    def _ort_errors(self) -> tuple[type[Exception], ...]:
        state = self._ort.capi.onnxruntime_pybind11_state
        kinds = (
            "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "NoSuchFile",
            "RuntimeException", "EPFail", "ModelLoaded", "NoModel",
        )  # fmt: skip
        return (*(getattr(state, kind) for kind in kinds if hasattr(state, kind)), ValueError, RuntimeError)


class BoundRun:
    """Inputs and outputs that stay where they are from run to run, as CUDA graphs need it."""

    def __init__(self, session: OrtSession, feeds: Mapping[str, Array]) -> None:
        """Runs once, to learn the shapes of the outputs, and binds them for good."""
        self._session = session
        self._values = {name: session.ort_value(array) for name, array in feeds.items()}
        self._names = [spec.name for spec in session.outputs]
        self._outputs = session.run_values(self._values, self._names, bind=True)
        self._binding = session.ort_session.io_binding()
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in zip(self._names, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Runs the model and waits until the device is done."""
        self._session.run_bound(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last run, copied to the host."""
        return {name: value.numpy() for name, value in zip(self._names, self._outputs, strict=True)}


def _first_line(error: BaseException) -> str:
    # Without the place in ONNX Runtime's sources and the signature of the function there.
    text = re.sub(r"/\S+\.(?:cc|h):\d+ .*? was false\. ", "", " ".join(str(error).split()))
    return text[:400]
