"""A model that is open in another process, perhaps in another environment."""

from __future__ import annotations

from collections.abc import Mapping

from onnxsmith.context_length import POSITIONS
from onnxsmith.package import ModelPackage
from onnxsmith.runtime.decoding import Decoder, Mask, Tokens
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.placement import Placement
from onnxsmith.runtime.profiling import RunProfile
from onnxsmith.runtime.providers import ProviderChoice
from onnxsmith.runtime.session import Array, Session
from onnxsmith.runtime.worker_process import WorkerProcess

__all__ = ["WorkerDecoder", "WorkerSession"]


class WorkerSession(Session):
    """One graph, open on one execution provider in a worker. Tensors go through shared memory.

    Attributes:
        load_s: Seconds that opening took.
        own_kernels: See ``OrtSession``.
        versions: Of the packages in the worker's environment.
    """

    def __init__(
        self,
        package: ModelPackage | GraphFile,
        choice: ProviderChoice,
        *,
        component: str | None = None,
        threads: int | None = None,
        optimize: bool = True,
        record: bool = False,
        name: str = "model",
    ) -> None:
        """Starts a worker and opens a graph in it; see ``OrtSession``.

        Raises:
            OnnxsmithError: See ``OrtSession``.
            WorkerError: The process died.
        """
        self.name = name
        self.provider = choice.ort_name
        self._graph = (
            package
            if isinstance(package, GraphFile)
            else GraphFile.of(package, component=component, name=name)
        )
        self.inputs, self.outputs = self._graph.inputs, self._graph.outputs
        self.cache_scales = self._graph.cache_scales
        self.most_alike = self._graph.most_alike
        self.rows_interact = self._graph.rows_interact
        self.positions = self._graph.limits.get(POSITIONS)
        self.reads_lengths = self._graph.reads_lengths
        self._worker: WorkerProcess | None = None
        try:
            self._worker = WorkerProcess(choice.environment, where=f"{name} on {choice.ort_name}")
            answer = self._worker.open(
                self._graph, choice, threads=threads, optimize=optimize, record=record, name=name
            )
        except BaseException:
            self.close()
            raise
        self.provider = answer["provider"]
        self.own_kernels: str = answer["own_kernels"]
        self.load_s: float = answer["load_s"]
        self.versions: Mapping[str, str] = answer["versions"]

    @property
    def worker(self) -> WorkerProcess:
        """The process that the graph is open in."""
        assert self._worker is not None, "the session is closed"
        return self._worker

    def placement(self, *, measured: bool = False) -> Placement:
        """Which provider got which nodes; see ``OrtSession.placement``."""
        answer = self.worker.ask({"do": "placement", "measured": measured})
        return Placement.from_json(answer["placement"], answer["copies"], answer["copied_bytes"])

    def check_placement(self, *, measured: bool = False) -> Placement:
        """The placement, if the wanted provider really got nodes; see ``placement``.

        Raises:
            CheckFailedError: Every node fell back to another provider.
        """
        placement = self.placement(measured=measured)
        placement.require_use(self.provider, name=self.name)
        return placement

    def profile(self, *, runs: int = 5) -> RunProfile:
        """Runs the graph under ONNX Runtime's profiler, on made-up inputs."""
        return RunProfile.from_json(self.worker.ask({"do": "profile", "runs": runs}))

    def kernels(self) -> dict[str, str]:
        """Nodes that ran, with their operators; see ``OrtSession.kernels``."""
        found: dict[str, str] = self.worker.ask({"do": "kernels"})["kernels"]
        return found

    def decoder(self, *, capacity: int = 0) -> WorkerDecoder:
        """A decoder whose cache stays in the worker; see ``open_decoder``."""
        return WorkerDecoder(self, capacity)

    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        results = self.worker.ask_tensors({"do": "run", "outputs": outputs}, feeds)
        return {name: results[name] for name in outputs}

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._graph.close()


class WorkerDecoder(Decoder):
    """A decoder whose cache never leaves the worker."""

    def __init__(self, session: WorkerSession, capacity: int = 0) -> None:
        """Opens the decoder there; see ``open_decoder``."""
        super().__init__(session)
        self._worker = session.worker
        self._worker.ask({"do": "decoder", "capacity": capacity})

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()
        self._worker.ask({"do": "reset"})

    def _rewind(self, length: int) -> None:
        self._worker.ask({"do": "rewind", "length": length})

    def _step(self, token_ids: Tokens, mask: Mask | None) -> Array:
        feeds: dict[str, Array] = {"tokens": token_ids}
        if mask is not None:
            # The other side remembers the mask of what is in the cache.
            feeds["mask"] = mask[:, mask.shape[1] - token_ids.shape[1] :]
        logits: Array = self._worker.ask_tensors({"do": "step"}, feeds)["logits"]
        return logits
