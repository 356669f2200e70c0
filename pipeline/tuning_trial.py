"""One trial of a search: cheap checks first, known results from the store, an early end where it is clear."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onnxsmith.errors import LackingError, OnnxsmithError, WorkerError
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.report import VariantReport
from onnxsmith.pipeline.run_tasks import budget_values
from onnxsmith.pipeline.tuning_bench import Plan
from onnxsmith.pipeline.tuning_preparing import Part, parts_of
from onnxsmith.pipeline.tuning_space import Point
from onnxsmith.pipeline.tuning_store import MeasurementStore, fingerprint
from onnxsmith.pipeline.variant_making import passes_of

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec

__all__ = ["Lane", "Trial", "TrialRunner", "is_accuracy", "objectives_of", "optimistic_values"]

# Sizes and times say nothing about how good a model is.
_NOT_ACCURACY = frozenset({"size_mb", "latency_ms", "latency_vs_original", "peak_rss_mb"})


def is_accuracy(name: str) -> bool:
    """Whether a measure depends on data, so that it may be another one on other data."""
    return name not in _NOT_ACCURACY


class Lane(Protocol):
    """Something that measures, in this process or another; see ``TrialBench``."""

    def ask(self, do: str, *arguments: Any) -> Any:
        """Calls a method of the bench.

        Raises:
            OnnxsmithError: It failed.
        """


@dataclasses.dataclass
class Trial:
    """A point and what is known of it.

    Attributes:
        number: In the order in which they began.
        point: What it is.
        state: ``complete``, ``stopped`` (early, for ``reason``), or ``failed``.
        reason: Why it was stopped or failed.
        values: By the names of budgets: means over the folds.
        errors: Standard errors of these means, where there are folds.
        precision: Of its weights.
        broken: Budget to by how much it is broken, relative to the limit; what was not measured is not there.
        measured: Measurements made.
        reused: Measurements that were known.
    """

    number: int
    point: Point
    state: str = "running"
    reason: str = ""
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    precision: str = ""
    broken: dict[str, float] = dataclasses.field(default_factory=dict)
    measured: int = 0
    reused: int = 0

    @property
    def name(self) -> str:
        """What to call it."""
        return self.point.name or f"point {self.number}"

    @property
    def feasible(self) -> bool:
        """Whether it was measured to the end and keeps every budget."""
        return self.state == "complete" and not self.broken


class TrialRunner:
    """Runs trials of one recipe. Several threads may call it, each with a lane of its own."""

    def __init__(
        self,
        recipe: Recipe,
        store: MeasurementStore,
        *,
        content: Mapping[str, Any],
        environment: Mapping[str, Any],
        shared: Callable[[], contextlib.AbstractContextManager[None]],
        alone: Callable[[], contextlib.AbstractContextManager[None]],
        best: Callable[[], float | None],
        trained: Callable[[Mapping[str, Any]], Mapping[str, Any] | None],
        prepare: Callable[[Mapping[str, Any]], Path],
    ) -> None:
        """Takes what all trials have in common.

        Args:
            recipe: With a key ``tune``.
            store: What was measured before.
            content: Hashes of the source and of the data.
            environment: See ``measuring_environment``.
            shared: A context in which others may work too.
            alone: A context in which nobody else works: times are measured there.
            best: The size of the smallest point that keeps the budgets, where size is the only objective.
            trained: What decides what a model learns that is trained with some values; None where nothing is.
            prepare: Trains a model with some values and exports it; see ``Plan.prepared``.
        """
        assert recipe.tune is not None
        self._recipe, self._store, self._tune = recipe, store, recipe.tune
        self._content, self._environment = content, environment
        self._shared, self._alone, self._best = shared, alone, best
        self._trained, self._prepare = trained, prepare
        self.limits = {
            name: limit * (self._tune.margin if is_accuracy(name) and limit > 0 else 1.0)
            for name, limit in recipe.budgets.limits().items()
        }

    def run(self, trial: Trial, lane: Lane) -> None:
        """Measures a trial until it is complete or cannot be chosen any more.

        Raises:
            LackingError: No other point would do better.
        """
        specs = [(p.name, p.arguments()) for p in passes_of(trial.point.passes)]
        # Nothing is trained where all that is asked was measured before.
        plan = functools.cache(lambda: Plan(specs, self._prepare(trial.point.training)))
        try:
            self._run(trial, lane, specs, plan)
        except LackingError:
            raise
        except OnnxsmithError as error:
            trial.state, trial.reason = "failed", str(error)
        finally:
            with contextlib.suppress(OnnxsmithError):
                if trial.measured:
                    lane.ask("forget", plan())

    def _run(self, trial: Trial, lane: Lane, specs: Sequence[PassSpec], plan: Callable[[], Plan]) -> None:
        recipe, tune = self._recipe, self._tune
        provider = trial.point.provider or recipe.provider
        key: dict[str, Any] = {
            "source": self._content["source"], "export": recipe.export.model_dump(), "passes": specs,
            "task": recipe.task, "versions": self._environment["versions"],
        }  # fmt: skip
        if (training := self._trained(trial.point.training)) is not None:
            key["training"] = training
        parts = parts_of(tune)
        folded = tune.folds > 1 and recipe.calibration is not None
        fold = parts[0].fold if folded else None
        calibration = self._content["calibration"]
        # Whether data are looked at is known once it was made.
        facts = self._known(
            trial, lane, "make", {**key, "calibration": calibration, "fold": self._fold(fold)}, plan, fold
        )
        trial.values["size_mb"], trial.precision = facts["size_mb"], facts["precision"]
        if self._ends(trial, trial.values):
            return
        made = {**key, "provider": provider, "seed": recipe.seed}
        if facts["used_data"]:
            made |= {"calibration": calibration, "fold": self._fold(fold)}
        samples = recipe.evaluation.comparison.model_dump()
        compared = self._known(
            trial, lane, "compare", {**made, "comparison": samples, "require": recipe.require_provider},
            plan, fold, provider,
        )  # fmt: skip
        if not compared["passed"]:
            trial.state, trial.reason = "stopped", f"comparison with torch: {compared['reason']}"
            trial.broken["comparison"] = 1.0
            return
        scored = recipe.evaluation.perplexity is not None or recipe.evaluation.task is not None
        own_data = folded and facts["used_data"]
        if scored and self._score(trial, lane, plan, parts, made, own_data, provider):
            return
        if recipe.evaluation.benchmark is not None:
            self._time(trial, lane, plan, fold, made, provider)
            if self._ends(trial, trial.values):
                return
        trial.state = "complete"
        trial.broken = self._broken(trial.values, complete=True)

    def _score(
        self,
        trial: Trial,
        lane: Lane,
        plan: Callable[[], Plan],
        parts: Sequence[Part],
        made: Mapping[str, Any],
        folded: bool,
        provider: str,
    ) -> bool:
        """Scores the parts of the data, and says whether the trial ended."""
        evaluation, tune = self._recipe.evaluation, self._tune
        counted: list[dict[str, float]] = []
        hopes: list[dict[str, float]] = []
        for part in parts:
            fold = (
                part.fold
                if folded
                else parts[0].fold
                if self._recipe.calibration and tune.folds > 1
                else None
            )
            key = {
                **made,
                "perplexity": evaluation.perplexity.model_dump() if evaluation.perplexity else None,
                "task_data": evaluation.task.model_dump() if evaluation.task else None,
                "data": self._content["data"], "share": part.share, "held_out": tune.held_out,
                **({"fold": self._fold(fold)} if folded else {}),
            }  # fmt: skip
            found = self._known(trial, lane, "score", key, plan, fold, provider, part)
            values = _values_of(found)
            hopes.append(optimistic_values(found))
            if not part.provisional:
                counted.append(values)
            hope = _means(hopes)
            if tune.prune and part is not parts[-1] and (broken := self._broken(hope)):
                trial.values |= _means(counted) or values
                self._stop(trial, broken, hope, f" on {part.name}, at best")
                return True
        trial.values |= _means(counted)
        if len(counted) > 1:
            for name in counted[0]:
                of_folds = [one[name] for one in counted if name in one]
                if len(of_folds) > 1:
                    trial.errors[name] = statistics.stdev(of_folds) / math.sqrt(len(of_folds))
        return self._ends(trial, trial.values)

    def _time(
        self,
        trial: Trial,
        lane: Lane,
        plan: Callable[[], Plan],
        fold: int | None,
        made: Mapping[str, Any],
        provider: str,
    ) -> None:
        benchmark, threads = self._recipe.evaluation.benchmark, trial.point.threads
        assert benchmark is not None
        key = {**made, "benchmark": benchmark.model_dump(), "threads": threads,
               "machine": self._environment["machine"]}  # fmt: skip
        found = self._known(trial, lane, "time", key, plan, fold, provider, threads)
        entry = VariantReport(trial.name, bench=found)
        for name in ("latency_ms", "latency_vs_original", "peak_rss_mb"):
            value = budget_values(entry).get(name)
            if value is not None:
                trial.values[name] = value

    def _known(
        self,
        trial: Trial,
        lane: Lane,
        do: str,
        key: Mapping[str, Any],
        plan: Callable[[], Plan],
        *arguments: Any,
    ) -> Any:
        """A measurement: from the store, or made now and kept there."""
        name = f"{do}-{fingerprint({'do': do, **key})[:40]}"
        found = self._store.get(name)
        if found is None:
            with (self._alone if do == "time" else self._shared)():
                try:
                    found = lane.ask(do, plan(), *arguments)
                except (LackingError, WorkerError):
                    raise
                except OnnxsmithError as error:
                    # What failed once fails again: that is a result too.
                    found = {"error": {"where": error.where, "got": error.got}}
            self._store.put(name, found)
            trial.measured += 1
        else:
            trial.reused += 1
        if "error" in found and isinstance(found["error"], dict):
            raise OnnxsmithError(found["error"]["where"], got=found["error"]["got"])
        return found

    def _fold(self, fold: int | None) -> list[int] | None:
        return None if fold is None else [fold, self._tune.folds]

    def _ends(self, trial: Trial, values: Mapping[str, float]) -> bool:
        """Stops a trial that breaks a budget, or that cannot be better than the best one."""
        if not self._tune.prune:
            return False
        broken = self._broken(values)
        if broken:
            self._stop(trial, broken, values, "")
            return True
        best = self._best()
        # Sizes are exact, so a point that is no smaller can be left at once.
        if best is not None and len(values) == 1 and values["size_mb"] >= best:
            trial.state = "stopped"
            trial.reason = (
                f"size_mb is {values['size_mb']:.4g}, and a point that keeps the budgets has {best:.4g}"
            )
            return True
        return False

    def _stop(
        self, trial: Trial, broken: Mapping[str, float], values: Mapping[str, float], when: str
    ) -> None:
        trial.state, trial.broken = "stopped", dict(broken)
        trial.reason = "; ".join(
            f"{name} is {values[name]:.4g}{when}; expected at most {self.limits[name]:.4g}" for name in broken
        )

    def _broken(self, values: Mapping[str, float], *, complete: bool = False) -> dict[str, float]:
        found = {}
        for name, limit in self.limits.items():
            if name in values:
                if not values[name] <= limit:
                    excess = values[name] - limit
                    found[name] = excess / abs(limit) if limit and math.isfinite(excess) else max(excess, 1.0)
            elif complete:
                found[name] = 1.0
        return found


def objectives_of(recipe: Recipe) -> tuple[str, ...]:
    """What a search makes as small as possible."""
    assert recipe.tune is not None
    return recipe.tune.objectives or (recipe.choose,)


def optimistic_values(found: Mapping[str, Any]) -> dict[str, float]:
    """The best that a point may be on more data, by the intervals of what it is on some."""
    values: dict[str, float] = {}
    scored = found["perplexity"]
    if scored is not None:
        values["perplexity"] = scored["low"]
        if scored["increase_low_pct"] is not None:
            values["perplexity_increase_pct"] = scored["increase_low_pct"]
    for name, metric in (found["task_metrics"] or {}).items():
        difference = metric["difference"]
        if not difference["value"]:
            continue
        # How many points one unit of the difference is, with its sign.
        scale = difference["drop_points"] / difference["value"]
        best = min(scale * difference["low"], scale * difference["high"])
        values[f"{name}_drop_points"] = best
        reference = metric["value"] - difference["value"]
        if reference:
            values[f"{name}_drop_pct"] = 100 * best / abs(scale * reference)
    for name in ("f1_macro", "f1"):
        if f"{name}_drop_points" in values:
            values.setdefault("f1_drop_points", values[f"{name}_drop_points"])
    return values


def _values_of(found: Mapping[str, Any]) -> dict[str, float]:
    scored = found["perplexity"] or {}
    entry = VariantReport(
        "",
        perplexity=found["perplexity"],
        perplexity_increase_pct=scored.get("increase_pct"),
        kl_to_reference=scored.get("kl_to_reference"),
        task_metrics=found["task_metrics"],
    )
    return {name: value for name, value in budget_values(entry).items() if value is not None}


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in (values[0] if values else ()) if all(name in one for one in values)]
    return {name: statistics.fmean(one[name] for one in values) for name in names}
