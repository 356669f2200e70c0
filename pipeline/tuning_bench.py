"""One point of a search: made, compared, scored and timed, from what PyTorch said once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsmith.comparison import tolerance_for
from onnxsmith.errors import BadInputError, CheckFailedError
from onnxsmith.package import TEXT_GENERATION, TensorSpec
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.references import checked_placement, open_programs
from onnxsmith.pipeline.run_steps import RunSteps
from onnxsmith.pipeline.run_tasks import TaskMeasure
from onnxsmith.pipeline.staging import require_space
from onnxsmith.pipeline.step_keys import step_key
from onnxsmith.pipeline.texts import load_text, share_bounds
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.pipeline.tuning_space import TuneSpec
from onnxsmith.pipeline.variant_making import VariantMaker, passes_of
from onnxsmith.progress import Progress
from onnxsmith.runtime.session import Array, Session
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.graph_passes.context import PassContext
    from onnxsmith.runtime.components import Expected
    from onnxsmith.runtime.metrics import Outcome

__all__ = ["Part", "Prepared", "TrialBench", "parts_of", "prepare"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the data that a search may see.

    Attributes:
        name: What to call it.
        share: From and to, of all evaluation data.
        fold: The part of the calibration data that is left out; None for none.
        provisional: Whether it is only a first look: its numbers do not count.
    """

    name: str
    share: tuple[float, float]
    fold: int | None = None
    provisional: bool = False


def parts_of(spec: TuneSpec) -> list[Part]:
    """The parts that a point is scored on, one after the other, until it is clear that it will not do."""
    seen = round(1 - spec.held_out, 12)
    if spec.folds == 1:
        look = [Part("first look", (0.0, seen / 4), provisional=True)] if spec.prune else []
        return [*look, Part("all", (0.0, seen))]
    return [
        Part(f"fold {i + 1}", (seen * i / spec.folds, seen * (i + 1) / spec.folds), fold=i)
        for i in range(spec.folds)
    ]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What every point is made from and judged by; it goes to other processes.

    Attributes:
        exported: The directory of the exported model.
        origin: Its task and source.
        signatures: Component to name, inputs and outputs of the reference.
        expected: What PyTorch gave for inputs of several shapes.
        tokens: The text, without what is held out; None where none is scored.
        logits: The file of PyTorch's predictions of it.
        outcomes: Part to task and to what PyTorch said of its rows.
        reference: PyTorch's own numbers, for the report.
    """

    exported: Path
    origin: Mapping[str, Any]
    signatures: Mapping[str, tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]
    expected: Expected
    tokens: npt.NDArray[np.int64] | None
    logits: Path | None
    outcomes: Mapping[str, tuple[str, Outcome]]
    reference: Mapping[str, Any]


class _Recorded(Session):
    """A reference whose answers are known: it has a signature, and need not run again."""

    def __init__(self, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.name, self.inputs, self.outputs, self.provider = name, inputs, outputs, "torch"

    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        raise CheckFailedError(self.name, got="asked for more than it was asked at first")


def prepare(
    recipe: Recipe, source: ModelSource, work: Path, *, base: Path | None, progress: Progress
) -> Prepared:
    """Exports the model, and asks PyTorch what every point will be asked.

    Args:
        recipe: With a key ``tune``.
        source: The model.
        work: An empty directory.
        base: The directory that relative paths of the recipe start from.
        progress: Who listens.

    Raises:
        OnnxsmithError: The model cannot be exported, or there are not enough data to hold some out.
    """
    from onnxsmith.exporters import export, load_torch, torch_programs
    from onnxsmith.runtime import perplexity

    assert recipe.tune is not None
    spec, parts = recipe.evaluation.perplexity, parts_of(recipe.tune)
    tasks = {part.name: _task_of(recipe, part, base) for part in parts if recipe.evaluation.task}
    text = load_text(spec.data, base=base) if spec else ""
    with progress.step("load") as step:
        loaded = load_torch(source, task=recipe.task, dtype=recipe.export.dtype, lazy=True)
        step.note = f"{loaded.provenance['architecture']}, {loaded.provenance['parameters'] / 1e6:.1f} M"
    size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    require_space(work, size * (2 + recipe.tune.workers), purpose=f"points of {recipe.name}")
    if loaded.task != TEXT_GENERATION and spec is not None:
        raise BadInputError(
            f"recipe {recipe.name}: evaluation.perplexity",
            got=f"a model for {loaded.task or 'no known task'}", expected="a decoder",
        )  # fmt: skip
    with progress.step("export"):
        programs = torch_programs(loaded)
        exported = export(loaded, programs, attention=recipe.export.attention, opset=recipe.export.opset)
        directory = work / "exported"
        directory.mkdir()
        save_package(exported, directory)
    name, program = next(iter(programs.items()))
    tokens, logits, outcomes = None, None, {}
    found: dict[str, Any] = {"name": f"torch {recipe.export.dtype}", "size_mb": size / 1e6}
    with open_programs(programs) as reference, progress.step("reference") as step:
        expected = reference.expected(samples=recipe.evaluation.comparison.samples, seed=recipe.seed)
        if spec is not None:
            ids = PackageTokenizer(exported).encode(text[: spec.max_tokens * 16])[: spec.max_tokens]
            begin, end = share_bounds(len(ids), spec.share, spec.window)
            seen = share_bounds(end - begin, (0.0, 1 - recipe.tune.held_out), spec.window)
            tokens = np.array(ids[begin:end], np.int64)[slice(*seen)]
            for part in parts:
                share_bounds(len(tokens), _of_seen(part, recipe.tune), spec.window)
            windows = -(-len(tokens) // spec.window)
            shape = (len(tokens) - windows, int(program.outputs[0].shape[-1]))  # type: ignore[index,arg-type]
            require_space(work, shape[0] * shape[1] * 4, purpose="the reference's predictions")
            logits = work / "logits.npy"
            kept = np.lib.format.open_memmap(logits, mode="w+", dtype=np.float32, shape=shape)
            scored = perplexity(reference.sessions[name], tokens, window=spec.window, keep_logits=kept)
            kept.flush()
            found["perplexity"] = dataclasses.asdict(scored)
            step.note = f"perplexity {scored.value:.3f} on {scored.tokens} tokens"
        for which, task in tasks.items():
            found["task_metrics"] = task.reference(program.task, reference.sessions[name], exported.files)
            outcomes[which] = task.expected
        signatures = {
            key: (session.name, session.inputs, session.outputs)
            for key, session in reference.sessions.items()
        }
    origin = {"task": exported.task, "source": dict(exported.source)}
    return Prepared(directory, origin, signatures, expected, tokens, logits, outcomes, found)


def _of_seen(part: Part, spec: TuneSpec) -> tuple[float, float]:
    """A part's share of what the search may see."""
    seen = 1 - spec.held_out
    return part.share[0] / seen, min(part.share[1] / seen, 1.0)


def _task_of(recipe: Recipe, part: Part, base: Path | None) -> TaskMeasure:
    spec = recipe.evaluation.task
    assert spec is not None
    # A part of the part that the recipe itself takes.
    begin, width = spec.share[0], spec.share[1] - spec.share[0]
    share = (begin + part.share[0] * width, begin + part.share[1] * width)
    evaluation = recipe.evaluation.model_copy(update={"task": spec.model_copy(update={"share": share})})
    return TaskMeasure(recipe.model_copy(update={"evaluation": evaluation}), base)


class TrialBench:
    """Makes and measures points, in this process or another. Models stay until they are forgotten."""

    def __init__(
        self, recipe: Recipe, source: ModelSource, prepared: Prepared, work: Path, *, base: Path | None
    ) -> None:
        """Reads what the recipe names.

        Args:
            recipe: With a key ``tune``.
            source: The model.
            prepared: What PyTorch said.
            work: Where models are made.
            base: The directory that relative paths of the recipe start from.
        """
        self._recipe, self._source, self._prepared, self._base = recipe, source, prepared, base
        self._models = work / "models"
        self._models.mkdir(exist_ok=True)
        self._tasks: dict[str, TaskMeasure] = {}

    def make(self, specs: Sequence[PassSpec], fold: int | None) -> dict[str, Any]:
        """Runs passes and writes the model.

        Returns:
            ``size_mb``, ``precision``, ``operators`` and ``used_data``: whether a pass looked at
            calibration data.
        """
        return self._made(specs, fold)[1]

    def compare(self, specs: Sequence[PassSpec], fold: int | None, provider: str) -> dict[str, Any]:
        """Compares a point with PyTorch, output by output."""
        from onnxsmith.runtime import OrtBackend, compare_components, open_components, requirements_of

        directory, facts = self._made(specs, fold)
        package = load_package(directory)
        backend = OrtBackend(provider)
        references = {name: _Recorded(*rest) for name, rest in self._prepared.signatures.items()}
        wanted = requirements_of(self._recipe.require_provider, [provider])
        parts = {part: package.only(part) for part in package.components}
        with open_components(backend, parts, name=directory.name) as sessions:
            placement = checked_placement(sessions, wanted, asked=backend.name).to_json()
            result = compare_components(
                references, sessions, self._prepared.expected,
                tolerance=tolerance_for(facts["precision"]), name=directory.name,
            )  # fmt: skip
        worst = result.worst
        return {
            "passed": result.passed,
            "reason": result.reason,
            "tensors": len(result.tensors),
            "worst": None if worst is None else dataclasses.asdict(worst),
            "placement": placement,
        }

    def score(self, specs: Sequence[PassSpec], fold: int | None, provider: str, part: Part) -> dict[str, Any]:
        """Scores a point on a part of the data: ``perplexity`` and ``task_metrics``, where asked for."""
        from onnxsmith.runtime import OrtBackend, perplexity

        directory, _ = self._made(specs, fold)
        package = load_package(directory)
        found: dict[str, Any] = {"perplexity": None, "task_metrics": None}
        name = next(iter(package.components))
        with OrtBackend(provider).open(package, name=directory.name, component=name) as session:
            spec, whole = self._recipe.evaluation.perplexity, self._prepared.tokens
            if spec is not None and whole is not None and self._prepared.logits is not None:
                begin, end = share_bounds(len(whole), _of_seen(part, self._tune), spec.window)
                # Each window predicts one token less than it has.
                logits = np.load(self._prepared.logits, mmap_mode="r")[begin - begin // spec.window :]
                scored = perplexity(session, whole[begin:end], window=spec.window, reference_logits=logits)
                found["perplexity"] = dataclasses.asdict(scored)
            if self._recipe.evaluation.task is not None:
                task = self._tasks.get(part.name)
                if task is None:
                    task = self._tasks[part.name] = _task_of(self._recipe, part, self._base)
                    task.recall(*self._prepared.outcomes[part.name])
                found["task_metrics"] = task.variant(directory.name, session, package.files)
        return found

    def time(
        self, specs: Sequence[PassSpec], fold: int | None, provider: str, threads: int | None
    ) -> dict[str, Any]:
        """Measures how fast a point is, in a process of its own."""
        from onnxsmith.runtime import BenchSettings, Candidate, benchmark

        directory, _ = self._made(specs, fold)
        spec = self._recipe.evaluation.benchmark
        assert spec is not None
        chosen = spec.model_dump(exclude={"reference", "profile"}) | ({"threads": threads} if threads else {})
        began = time.time()
        (result,) = benchmark(
            [Candidate(directory.name, directory, provider)],
            BenchSettings(**chosen, seed=self._recipe.seed),
        )
        if result.error:
            raise CheckFailedError(f"benchmark on {provider}", got=result.error)
        return result.to_json() | {"began": began, "ended": time.time()}

    def forget(self, specs: Sequence[PassSpec]) -> None:
        """Removes the models of a point."""
        for directory in self._models.glob(f"{_name_of(specs)}*"):
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def _tune(self) -> TuneSpec:
        assert self._recipe.tune is not None
        return self._recipe.tune

    def _made(self, specs: Sequence[PassSpec], fold: int | None) -> tuple[Path, dict[str, Any]]:
        """The directory of a point, made where it is not there yet, and what is known of it."""
        suffix = "" if fold is None else f"-without-{fold + 1}"
        directory = self._models / f"{_name_of(specs)}{suffix}"
        known = directory.with_suffix(".json")
        if known.exists():
            facts: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
            return directory, facts
        shutil.rmtree(directory, ignore_errors=True)
        exported = load_package(self._prepared.exported)
        exported.task, exported.source = self._prepared.origin["task"], self._prepared.origin["source"]
        data = CalibrationData.of(self._recipe.calibration, base=self._base)
        if data is not None and fold is not None:
            data = dataclasses.replace(data, fold=(fold, self._tune.folds))
        used: list[str] = []
        context = _watched(context_for(self._source, exported, data), used)
        # The search has a store of its own.
        with tempfile.TemporaryDirectory(prefix=".making-", dir=self._models) as scratch:
            steps = RunSteps(None, Path(scratch))
            maker = VariantMaker(exported, step_key("export"), steps, context=context, provider="")
            made = maker.make(directory.name, passes_of(specs))
            if made.report.error is not None:
                raise CheckFailedError("passes", got=made.report.error)
            directory.mkdir()
            for path in made.files():
                shutil.move(path, directory / path.name)
            steps.close()
        facts = {
            "size_mb": made.report.size_mb,
            "precision": made.report.precision,
            "operators": sum(made.report.operators["after"].values()),
            "used_data": bool(used),
        }
        known.write_text(json.dumps(facts), encoding="utf-8")
        return directory, facts


def _name_of(specs: Sequence[PassSpec]) -> str:
    from onnxsmith.pipeline.tuning_store import fingerprint

    return f"point-{fingerprint([[name, dict(arguments)] for name, arguments in specs])[:16]}"


def _watched(context: PassContext, used: list[str]) -> PassContext:
    """A context that notes when a pass looks at data."""

    def noting(kind: str, function: Callable[..., Any] | None) -> Any:
        if function is None:
            return None

        def noted(*args: Any, **kwargs: Any) -> Any:
            used.append(kind)
            return function(*args, **kwargs)

        return noted

    return dataclasses.replace(
        context,
        activations=noting("activations", context.activations),
        probe=noting("probe", context.probe),
    )
