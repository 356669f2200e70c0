"""One point of a search: made, compared, scored and timed, from what PyTorch said once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.comparison import tolerance_for
from onnxsmith.errors import CheckFailedError
from onnxsmith.package import ModelPackage, TensorSpec
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.references import checked_placement
from onnxsmith.pipeline.run_steps import RunSteps
from onnxsmith.pipeline.run_tasks import TaskMeasure
from onnxsmith.pipeline.step_keys import step_key
from onnxsmith.pipeline.texts import share_bounds
from onnxsmith.pipeline.tuning_preparing import Part, Prepared, of_seen, task_of
from onnxsmith.pipeline.tuning_space import TuneSpec
from onnxsmith.pipeline.tuning_store import fingerprint
from onnxsmith.pipeline.variant_making import VariantMaker, passes_of
from onnxsmith.runtime.session import Array, Session
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.graph_passes.context import PassContext

__all__ = ["Plan", "TrialBench"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is made of what.

    Attributes:
        specs: Passes.
        prepared: The file with what they are run on; see ``Prepared.load``.
    """

    specs: Sequence[PassSpec]
    prepared: Path

    @property
    def name(self) -> str:
        """Names its files."""
        told = [[name, dict(arguments)] for name, arguments in self.specs]
        return f"point-{fingerprint([told, self.prepared.parent.name])[:16]}"


class _Recorded(Session):
    """A reference whose answers are known: it has a signature, and need not run again."""

    def __init__(self, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.name, self.inputs, self.outputs, self.provider = name, inputs, outputs, "torch"

    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        raise CheckFailedError(self.name, got="asked for more than it was asked at first")


class TrialBench:
    """Makes and measures points, in this process or another. Models stay until they are forgotten."""

    def __init__(self, recipe: Recipe, source: ModelSource, work: Path, *, base: Path | None) -> None:
        """Reads what the recipe names.

        Args:
            recipe: With a key ``tune``.
            source: The model.
            work: Where models are made.
            base: The directory that relative paths of the recipe start from.
        """
        self._recipe, self._source, self._base = recipe, source, base
        self._models = work / "models"
        self._models.mkdir(exist_ok=True)
        self._tasks: dict[tuple[Path, str], TaskMeasure] = {}
        self._known: dict[Path, Prepared] = {}

    def make(self, plan: Plan, fold: int | None) -> dict[str, Any]:
        """Runs passes and writes the model.

        Returns:
            ``size_mb``, ``precision``, ``operators`` and ``used_data``: whether a pass looked at
            calibration data.
        """
        return self._made(plan, fold)[1]

    def compare(self, plan: Plan, fold: int | None, provider: str) -> dict[str, Any]:
        """Compares a point with PyTorch, output by output."""
        from onnxsmith.runtime import OrtBackend, compare_components, open_components, requirements_of

        directory, facts = self._made(plan, fold)
        prepared = self._prepared(plan)
        package = load_package(directory)
        backend = OrtBackend(provider)
        references = {name: _Recorded(*rest) for name, rest in prepared.signatures.items()}
        wanted = requirements_of(self._recipe.require_provider, [provider])
        parts = {part: package.only(part) for part in package.components}
        with open_components(backend, parts, name=directory.name) as sessions:
            placement = checked_placement(sessions, wanted, asked=backend.name).to_json()
            result = compare_components(
                references, sessions, prepared.expected,
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

    def score(self, plan: Plan, fold: int | None, provider: str, part: Part) -> dict[str, Any]:
        """Scores a point on a part of the data: ``perplexity`` and ``task_metrics``, where asked for."""
        from onnxsmith.runtime import OrtBackend, perplexity

        directory, _ = self._made(plan, fold)
        prepared = self._prepared(plan)
        package = load_package(directory)
        found: dict[str, Any] = {"perplexity": None, "task_metrics": None}
        name = next(iter(package.components))
        with OrtBackend(provider).open(package, name=directory.name, component=name) as session:
            spec, whole = self._recipe.evaluation.perplexity, prepared.tokens
            if spec is not None and whole is not None and prepared.logits is not None:
                begin, end = share_bounds(len(whole), of_seen(part, self._tune), spec.window)
                # Each window predicts one token less than it has.
                logits = np.load(prepared.logits, mmap_mode="r")[begin - begin // spec.window :]
                scored = perplexity(session, whole[begin:end], window=spec.window, reference_logits=logits)
                found["perplexity"] = dataclasses.asdict(scored)
                if (original := prepared.original_perplexity.get(part.name)) is not None:
                    found["perplexity"]["increase_pct"] = 100 * (scored.value / original - 1)
                    found["perplexity"]["increase_low_pct"] = 100 * (scored.low / original - 1)
            if self._recipe.evaluation.task is not None:
                task = self._tasks.get((plan.prepared, part.name))
                if task is None:
                    task = task_of(self._recipe, part, self._base)
                    task.recall(*prepared.outcomes[part.name])
                    self._tasks[plan.prepared, part.name] = task
                found["task_metrics"] = task.variant(directory.name, session, package.files)
        return found

    def time(self, plan: Plan, fold: int | None, provider: str, threads: int | None) -> dict[str, Any]:
        """Measures how fast a point is, in a process of its own; in turn with the original, if any."""
        from onnxsmith.runtime import BenchSettings, Candidate, benchmark

        directory, _ = self._made(plan, fold)
        spec = self._recipe.evaluation.benchmark
        assert spec is not None
        chosen = spec.model_dump(exclude={"reference", "profile"}) | ({"threads": threads} if threads else {})
        began = time.time()
        candidates = [Candidate(directory.name, directory, provider)]
        original = self._original(plan, fold)
        if original is not None:
            candidates.append(Candidate("original", original, provider))
        result, *others = benchmark(candidates, BenchSettings(**chosen, seed=self._recipe.seed))
        if result.error:
            raise CheckFailedError(f"benchmark on {provider}", got=result.error)
        found = result.to_json() | {"began": began, "ended": time.time()}
        for other in others:
            if other.latency_ms and result.latency_ms and not other.error:
                found["latency_vs_original"] = result.latency_ms.p50 / other.latency_ms.p50
        return found

    def forget(self, plan: Plan) -> None:
        """Removes the models of a point."""
        for directory in self._models.glob(f"{plan.name}*"):
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def _tune(self) -> TuneSpec:
        assert self._recipe.tune is not None
        return self._recipe.tune

    def _made(self, plan: Plan, fold: int | None) -> tuple[Path, dict[str, Any]]:
        """The directory of a point, made where it is not there yet, and what is known of it."""
        prepared = self._prepared(plan)
        exported = load_package(prepared.exported)
        exported.task, exported.source = prepared.origin["task"], prepared.origin["source"]
        suffix = "" if fold is None else f"-without-{fold + 1}"
        return self._make(exported, self._models / f"{plan.name}{suffix}", plan.specs, fold)

    def _original(self, plan: Plan, fold: int | None) -> Path | None:
        """The original with the same passes, as a run makes it to compare latency with."""
        prepared = self._prepared(plan)
        if prepared.original is None:
            return None
        exported = load_package(prepared.original)
        exported.task = prepared.origin["task"]
        return self._make(exported, self._models / f"{plan.name}-original", plan.specs, fold)[0]

    def _prepared(self, plan: Plan) -> Prepared:
        if plan.prepared not in self._known:
            # Of one training at a time: what was expected of it may be large.
            self._known = {plan.prepared: Prepared.load(plan.prepared)}
            self._tasks.clear()
        return self._known[plan.prepared]

    def _make(
        self, exported: ModelPackage, directory: Path, specs: Sequence[PassSpec], fold: int | None
    ) -> tuple[Path, dict[str, Any]]:
        known = directory.with_suffix(".json")
        if known.exists():
            facts: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
            return directory, facts
        shutil.rmtree(directory, ignore_errors=True)
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
