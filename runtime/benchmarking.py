"""Benchmarks: candidates in turn, each in a process of its own, with the uncertainty of every number."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith.errors import BadInputError, CheckFailedError, OnnxsmithError
from onnxsmith.package_io import load_package
from onnxsmith.program import TorchProgram
from onnxsmith.runtime.bench_result import BenchResult, BenchSettings, Spread, with_ratios
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.machine_load import MachineLoad
from onnxsmith.runtime.placement import Placement, Requirement, check_requirements
from onnxsmith.runtime.profiling import RunProfile, placement_of
from onnxsmith.runtime.providers import ProviderChoice, choose_provider
from onnxsmith.runtime.roofline import describe_profile, node_cost, weight_bytes_of_nodes
from onnxsmith.runtime.roofs import RoofBook
from onnxsmith.runtime.rounds import Round, round_of
from onnxsmith.runtime.torch_session import TorchSession
from onnxsmith.runtime.worker_process import WorkerProcess

__all__ = ["BenchResult", "BenchSettings", "Candidate", "Spread", "benchmark"]

_CPU = "CPUExecutionProvider"
_PROFILED_RUNS = 5
_PROFILED_S = 2.0
# A call that takes so long is not made once more for its kernels to be compiled.
_SLOW_S = 5.0
_CUDA_GRAPH_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "cuda": {"enable_cuda_graph": "1"},
    "tensorrt": {"trt_cuda_graph_enable": "1"},
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is measured: a model on disk on a provider, or a PyTorch program.

    Attributes:
        name: For the results.
        path: The model, for ONNX.
        provider: The execution provider, for ONNX; see ``choose_provider``.
        program: The program, for PyTorch in this process.
        loader: For PyTorch in a process of its own: ``module:function``, which gives the program.
        arguments: Of that function; plain data.
        compiled: For PyTorch: whether ``torch.compile`` makes kernels of it.
        component: Which graph of a model of several; the only one where None.
        prompt: For an ONNX decoder, the tokens of the prompt; random ones where empty.
        speculate: For an ONNX decoder, how tokens are guessed; see ``LookupSettings.parse``.
    """

    name: str
    path: Path | None = None
    provider: str = "cpu"
    program: TorchProgram | None = None
    loader: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compiled: bool = False
    component: str | None = None
    prompt: tuple[int, ...] = ()
    speculate: str = "off"

    def __post_init__(self) -> None:
        """Refuses a candidate that is no model, or two."""
        given = [
            what
            for what, value in (("path", self.path), ("program", self.program), ("loader", self.loader))
            if value
        ]
        if len(given) != 1:
            got = " and ".join(f"a {what}" for what in given) or "neither a path nor a program"
            raise BadInputError(f"bench: {self.name}", got=got, expected="one of them")


def benchmark(
    candidates: Sequence[Candidate],
    settings: BenchSettings | Sequence[BenchSettings],
    *,
    profile: bool = False,
    requirements: Sequence[Requirement] = (),
    on_round: Callable[[str, int], None] | None = None,
    on_results: Callable[[list[BenchResult]], None] | None = None,
) -> list[BenchResult]:
    """Measures candidates in turn: one round of each, then the next round.

    All are open at the same time and only one runs, so a machine that gets slower or faster in between
    does so for all of them. A candidate that fails or crashes is an error of that candidate only.

    Args:
        candidates: What to measure; at least one.
        settings: How; several of them are measured one after the other.
        profile: Whether to profile each candidate afterwards, by operators and nodes, against the roofs of
            its provider.
        requirements: Shares that providers must have; a candidate that breaks one gets an error.
        on_round: Called after each round with the candidate's name and the number of the round.
        on_results: Called with the results of each of the settings as soon as they are there. Where the
            run is interrupted, it is called with what was measured so far before the interrupt goes on.

    Raises:
        BadInputError: There is no candidate, or nothing to measure.
    """
    points = [settings] if isinstance(settings, BenchSettings) else list(settings)
    if not candidates:
        raise BadInputError("bench", got="no model", expected="at least one")
    if not points:
        raise BadInputError("bench", got="no settings", expected="at least one")
    results: list[BenchResult] = []
    roofs = RoofBook() if profile else None
    for _, group in itertools.groupby(points, key=_opening):
        shared = list(group)
        with contextlib.ExitStack() as stack:
            runners: list[_Runner] = []
            for candidate in candidates:
                kind = _ProcessRunner if candidate.program is None else _TorchRunner
                runners.append(stack.enter_context(_opened(kind(candidate, shared[0]))))
            for point in shared:
                found = _measure(runners, point, roofs, requirements, on_round, on_results)
                results += found
    return results


def _opening(settings: BenchSettings) -> tuple[Any, ...]:
    """What a session is opened with, and a sweep over anything else keeps it open."""
    return (settings.thread_count, settings.affinity, settings.cuda_graph)


def _measure(
    runners: Sequence[_Runner],
    point: BenchSettings,
    roofs: RoofBook | None,
    requirements: Sequence[Requirement],
    on_round: Callable[[str, int], None] | None,
    on_results: Callable[[list[BenchResult]], None] | None,
) -> list[BenchResult]:
    for runner in runners:
        runner.prepare(point)
    load = MachineLoad()
    busy: float | None = None
    interrupt: KeyboardInterrupt | None = None
    try:
        for number in range(point.runs + 1):
            for runner in runners:
                runner.round(count=number > 0)
                if on_round is not None:
                    on_round(runner.candidate.name, number)
        busy = load.other_pct()
        for runner in runners:
            runner.look(roofs)
        _check_placement(runners, requirements)
    except KeyboardInterrupt as error:
        interrupt = error
    results = with_ratios(
        [
            dataclasses.replace(runner.result(), other_load_pct=busy, interrupted=interrupt is not None)
            for runner in runners
        ]
    )
    if interrupt is not None:
        if on_results is not None:
            on_results([result for result in results if result.latency_ms or result.error])
        raise interrupt
    if on_results is not None:
        on_results(results)
    return results


def _check_placement(runners: Sequence[_Runner], requirements: Sequence[Requirement]) -> None:
    """Holds each model against the requirements: one of several graphs as a whole."""
    models: dict[tuple[Any, ...], dict[str | None, _Runner]] = {}
    for number, runner in enumerate(runners):
        one = runner.candidate
        alone = number if one.component is None else None
        models.setdefault((one.path, one.provider, alone), {})[one.component] = runner
    for graphs in models.values():
        known = {part or "": runner.placed for part, runner in graphs.items()}
        placements = {part: placed for part, placed in known.items() if placed is not None}
        whole = Placement.merged(placements) if len(placements) == len(known) else None
        for part, runner in graphs.items():
            if whole is not None and part is not None:
                runner.facts["model_placement"] = whole.to_json()
            runner.check(whole if part is not None else runner.placed, requirements)


class _Runner:
    """One candidate, from opening to result."""

    def __init__(self, candidate: Candidate, settings: BenchSettings) -> None:
        self.candidate = candidate
        self.settings = settings
        self.times: list[Mapping[str, list[float]]] = []
        self.facts: dict[str, Any] = {}
        self.failure: OnnxsmithError | None = None
        self.opening_failure: OnnxsmithError | None = None
        self.placed: Placement | None = None

    def open(self) -> None:
        raise NotImplementedError

    def prepare_inputs(self) -> None:
        raise NotImplementedError

    def measure(self) -> Mapping[str, list[float]]:
        raise NotImplementedError

    def close(self) -> None:
        """Frees what it holds."""

    def look(self, roofs: RoofBook | None) -> None:
        """Finds out where it ran, once it was measured."""

    def check(self, placement: Placement | None, requirements: Sequence[Requirement]) -> None:
        """Holds it against what is required of where it, or the model that it is a part of, ran."""

    def prepare(self, settings: BenchSettings) -> None:
        self.placed = None
        self.settings, self.times, self.failure = settings, [], self.opening_failure
        self._guarded(self.prepare_inputs)

    def round(self, *, count: bool) -> None:
        times = self._guarded(self.measure)
        if times is not None and count:
            self.times.append(times)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        if self.failure is not None:
            return None
        try:
            return action()
        except OnnxsmithError as error:
            self.failure = error
            return None

    def result(self) -> BenchResult:
        settings = self.settings
        common: dict[str, Any] = {
            "name": self.candidate.name,
            "provider": self.facts.get("provider", self.candidate.provider),
            "settings": settings,
            "graph": self.candidate.component,
        }
        for key in (
            "load_s", "placement", "model_placement", "peak_rss_mb", "device_memory_mb", "size_mb", "copies",
            "copied_bytes", "profile", "versions", "own_kernels",
        ):  # fmt: skip
            common[key] = self.facts.get(key)
        if self.failure is not None:
            # The numbers of a candidate that broke a requirement are true, but not what was asked for.
            common |= {"error": str(self.failure), "exit_status": self.failure.exit_status}
        if not self.times or (self.failure is not None and "latency_ms" not in self.facts):
            return BenchResult(**common)
        return BenchResult(**common | _summary(self.times, settings))


def _summary(times: Sequence[Mapping[str, list[float]]], settings: BenchSettings) -> dict[str, Any]:
    if "latency" in times[0]:
        latency = [t["latency"] for t in times]
        return {
            "latency_ms": Spread.of([[1e3 * s for s in calls] for calls in latency]),
            "throughput": Spread.of([settings.batch * len(calls) / sum(calls) for calls in latency]),
        }
    first, tokens = [t["first_token"][0] for t in times], [t["token"] for t in times]
    steps, prompt = settings.new_tokens - 1, times[0]["prompt_tokens"][0]
    calls = [t["token_calls"][0] for t in times if "token_calls" in t]
    return {
        "tokens_per_call": Spread.of([steps / count for count in calls]) if calls else None,
        "latency_ms": Spread.of([[1e3 * s for s in one] for one in tokens]),
        "first_token_ms": Spread.of([1e3 * s for s in first]),
        "throughput": Spread.of(
            [settings.batch * settings.new_tokens / (a + sum(b)) for a, b in zip(first, tokens, strict=True)]
        ),
        "prefill_tokens_per_s": Spread.of([settings.batch * prompt / s for s in first]),
        "decode_tokens_per_s": Spread.of([settings.batch * steps / sum(one) for one in tokens]),
    }


@contextlib.contextmanager
def _opened(runner: _Runner) -> Iterator[_Runner]:
    try:
        try:
            runner.open()
        except OnnxsmithError as error:
            runner.opening_failure = error
        yield runner
    finally:
        runner.close()


class _TorchRunner(_Runner):
    """A program of this process."""

    _session: TorchSession
    _round: Round

    def open(self) -> None:
        program = self.candidate.program
        assert program is not None
        self.facts = {"provider": "torch.compile" if self.candidate.compiled else "torch"}
        with self._reported():
            self._session = TorchSession(
                program, threads=self.settings.thread_count, compiled=self.candidate.compiled
            )

    def prepare_inputs(self) -> None:
        program = self.candidate.program
        assert program is not None
        with self._reported():
            self._round = round_of(self._session, dataclasses.asdict(self.settings), program.limits)

    def measure(self) -> Mapping[str, list[float]]:
        with self._reported():
            return self._round.run()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """PyTorch fails by errors of all kinds; none of them may cost the other candidates their results."""
        try:
            yield
        except OnnxsmithError:
            raise
        except Exception as error:
            raise CheckFailedError(
                f"bench: {self.candidate.name} on torch", got=f"it fails: {type(error).__name__}: {error}"
            ) from error


class _ProcessRunner(_Runner):
    """A model in a process of its own."""

    _worker: WorkerProcess | None = None
    _choice: ProviderChoice | None = None
    _weights: Mapping[str, int] = {}

    def open(self) -> None:
        candidate, settings = self.candidate, self.settings
        if candidate.path is None:
            self._open_torch()
            return
        choice = choose_provider(candidate.provider)
        if settings.cuda_graph:
            if choice.name not in _CUDA_GRAPH_OPTIONS:
                raise BadInputError(
                    f"bench: {candidate.name} on {choice.name}",
                    got="CUDA graphs",
                    expected=f"one of {', '.join(_CUDA_GRAPH_OPTIONS)}",
                )
            choice = dataclasses.replace(
                choice, options={**choice.options, **_CUDA_GRAPH_OPTIONS[choice.name]}
            )
        package = load_package(candidate.path)
        if candidate.component is not None:
            package = package.only(candidate.component)
        self._choice = choice
        self._weights = weight_bytes_of_nodes(package.main.model)
        self.facts = {"provider": choice.ort_name, "size_mb": _size_mb(candidate.path)}
        self._worker = WorkerProcess(choice.environment, where=f"bench: {candidate.name} on {choice.name}")
        with GraphFile.of(package, name=candidate.name) as graph:
            self.facts |= self._worker.open(
                graph,
                choice,
                threads=settings.thread_count,
                name=candidate.name,
                affinity=settings.affinity,
            )

    def _open_torch(self) -> None:
        provider = "torch.compile" if self.candidate.compiled else "torch"
        self.facts = {"provider": provider}
        self._worker = WorkerProcess(where=f"bench: {self.candidate.name} on {provider}")
        self.facts |= self._worker.ask(
            {
                "do": "open program",
                "loader": self.candidate.loader,
                "arguments": dict(self.candidate.arguments),
                "compiled": self.candidate.compiled,
                "threads": self.settings.thread_count,
                "affinity": list(self.settings.affinity),
            }
        )

    def prepare_inputs(self) -> None:
        own = {"prompt": self.candidate.prompt, "speculate": self.candidate.speculate}
        self._ask({"do": "prepare", "settings": dataclasses.asdict(self.settings) | own})

    def measure(self) -> Mapping[str, list[float]]:
        answer = self._ask({"do": "round"})
        for key in ("peak_rss_mb", "device_memory_mb"):
            self.facts[key] = answer[key]
        times: Mapping[str, list[float]] = answer["times"]
        return times

    def look(self, roofs: RoofBook | None) -> None:
        if self._choice is None or self.failure is not None:
            return

        def look() -> None:
            found = self._placement(profile=roofs is not None, roofs=roofs)
            self.facts |= {
                "placement": found.to_json(), "copies": found.copies, "copied_bytes": found.copied_bytes
            }  # fmt: skip
            found.require_use(self.facts["provider"], name=self.candidate.name)
            self.placed = found

        self._guarded(look)

    def check(self, placement: Placement | None, requirements: Sequence[Requirement]) -> None:
        choice = self._choice
        if choice is None or self.failure is not None:
            return
        # From here on the numbers stand beside the error.
        self.facts["latency_ms"] = True
        name = str(self.candidate.path) if placement and placement.graphs else self.candidate.name
        self._guarded(
            lambda: check_requirements(
                placement, requirements, name=name, provider=self.facts["provider"], asked=choice.ort_name
            )
        )

    def _placement(self, *, profile: bool, roofs: RoofBook | None) -> Placement:
        choice = self._choice
        assert choice is not None
        operators = self._ask({"do": "assigned"})["operators"]
        if choice.ort_name == _CPU and list(operators) == [_CPU] and not profile:
            return dataclasses.replace(placement_of(operators, None, asynchronous=None), copies=0)
        once = max(sum(sum(part) for part in self.times[-1].values()), 1e-6) if self.times else 1e-6
        runs = max(1, min(_PROFILED_RUNS, int(_PROFILED_S / once)))
        taken = RunProfile.from_json(self._ask({"do": "profile", "runs": runs, "warm": once < _SLOW_S}))
        names: Mapping[str, list[str]] = self._ask({"do": "names"})["names"]
        compiled = {
            node.op_type
            for node in taken.nodes
            if node.provider in names and node.op_type not in operators[node.provider]
        }
        if profile:
            self.facts["profile"] = describe_profile(
                taken,
                roofs.of(choice, self.settings.thread_count) if roofs else None,
                self._weights,
                asynchronous=choice.asynchronous,
                compiled=compiled,
            )
        moved = {node.name: int(node_cost(node, self._weights).bytes_moved) for node in taken.nodes}
        for node in taken.nodes:
            if node.op_type in compiled:
                # It reads at least the weights of what it was compiled from.
                parts = sum(n.provider == node.provider and n.op_type in compiled for n in taken.nodes)
                inside = sum(self._weights.get(name, 0) for name in names[node.provider])
                moved[node.name] = node.bytes_touched + inside // parts
        return placement_of(
            operators,
            taken,
            asynchronous=choice.ort_name if choice.asynchronous else None,
            bytes_of=moved,
        )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._worker is not None
        return self._worker.ask(request)


def _size_mb(path: Path) -> float:
    """Size of a model in MB (10**6 bytes): for a directory the graphs and weights in it."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.iterdir() if ".onnx" in p.suffixes) / 1e6
    import onnx_ir

    from onnxsmith.onnx_file import load_model

    model = load_model(path)
    locations = {
        value.const_value.path
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, onnx_ir.ExternalTensor)
    }
    return (path.stat().st_size + sum(os.stat(location).st_size for location in locations)) / 1e6
