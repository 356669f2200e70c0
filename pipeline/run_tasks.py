"""Task metrics in a run: torch first, then every variant on the same rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.datasets import load_dataset
from onnxsmith.pipeline.evaluation import judge
from onnxsmith.pipeline.task_runs import TASK_RUNS, RunSettings, run_task

if TYPE_CHECKING:
    from onnxsmith.pipeline.recipe import Recipe
    from onnxsmith.pipeline.report import VariantReport
    from onnxsmith.runtime import Session
    from onnxsmith.runtime.metrics import Outcome

__all__ = ["TaskMeasure", "budget_values"]

# What `f1_drop_points` is of, for labels and for answers.
_F1 = ("f1_macro", "f1")


class TaskMeasure:
    """The data and settings of ``evaluation.task``, and what torch said."""

    def __init__(self, recipe: Recipe, base: Path | None) -> None:
        """Reads the data, so that what is wrong with them is found before the first minute of work.

        Raises:
            BadInputError: They cannot be read.
        """
        spec = recipe.evaluation.task
        assert spec is not None
        self._data = load_dataset(
            spec.data, columns=spec.columns, split=spec.split, limit=spec.limit, base=base
        )
        if spec.share != (0.0, 1.0):
            self._data = self._data.take(_share_of(len(self._data), spec.share))
        self._metrics, self._seed = spec.metrics, recipe.seed
        self._settings = RunSettings(
            batch=spec.batch,
            max_length=spec.max_length,
            max_new_tokens=spec.max_new_tokens,
            train_share=spec.train_share,
            seed=recipe.seed,
        )
        self._task = ""
        self._expected: Outcome | None = None
        self._original: Outcome | None = None

    def original(self, task: str | None, session: Session, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Measures the model before it was made smaller: from now on, differences are to it.

        Raises:
            BadInputError: Nobody knows how to evaluate this task.
        """
        self._original = self._run(task, session, files)
        return self._judged("original", session.provider, self._original, None)

    def identity(self) -> dict[str, Any]:
        """What decides what is measured: the data and the settings."""
        digest = hashlib.sha256()
        for row in self._data.rows:
            digest.update(json.dumps(row, sort_keys=True, default=_digest).encode() + b"\n")
        settings = dataclasses.asdict(self._settings) | {"metrics": self._metrics, "on_rows": None}
        return {"rows": digest.hexdigest(), "labels": self._data.label_names, "settings": settings}

    def reference(self, task: str | None, session: Session, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Measures torch; name of a metric to value and interval.

        Raises:
            BadInputError: Nobody knows how to evaluate this task.
        """
        self._expected = self._run(task, session, files)
        return self._judged("torch", session.provider, self._expected, self._original)

    def variant(self, name: str, session: Session, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Measures a variant; with the difference of each metric to the original, or to torch without one."""
        outcome = self._run(self._task, session, files)
        return self._judged(name, session.provider, outcome, self._original or self._expected)

    def _run(self, task: str | None, session: Session, files: Mapping[str, bytes]) -> Outcome:
        if task is None or task not in TASK_RUNS:
            raise BadInputError(
                "evaluation.task", got=f"a model for {task or 'no known task'}",
                expected=f"one for {', '.join(TASK_RUNS)}", remedy="Leave evaluation.task out of the recipe",
            )  # fmt: skip
        self._task = task
        return run_task(task, session, files, self._data, self._settings)

    @property
    def expected(self) -> tuple[str, Outcome]:
        """The task, and what torch said; see ``recall``."""
        assert self._expected is not None, "torch was not measured"
        return self._task, self._expected

    @property
    def original_outcome(self) -> Outcome | None:
        """What the model before it was made smaller said; None where there is none."""
        return self._original

    def recall(self, task: str, expected: Outcome, original: Outcome | None = None) -> None:
        """Takes what torch said of these rows in another process, and what the original said."""
        self._task, self._expected = task, expected
        self._original = original or self._original

    def _judged(self, name: str, provider: str, outcome: Outcome, against: Outcome | None) -> dict[str, Any]:
        result = judge(
            name,
            provider,
            self._task,
            self._data,
            outcome,
            self._metrics,
            against,
            "original" if self._original is not None else "torch",
            1000,
            self._seed,
        ).to_json()
        return {
            metric: values | ({"difference": result["differences"][metric]} if against else {})
            for metric, values in result["metrics"].items()
        }


def _digest(value: Any) -> str:
    """What JSON does not know, such as pictures and sounds."""
    content = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    return repr(value) if content is None else f"{type(value)} {hashlib.sha256(content).hexdigest()}"


def budget_values(entry: VariantReport) -> Mapping[str, float | None]:
    """What budgets are held against."""
    bench = entry.bench or {}
    return {
        "size_mb": entry.size_mb,
        "perplexity": entry.perplexity["value"] if entry.perplexity else None,
        "perplexity_increase_pct": entry.perplexity_increase_pct,
        "kl_to_reference": entry.kl_to_reference,
        "latency_ms": bench["latency_ms"]["p50"] if bench.get("latency_ms") else None,
        "latency_vs_original": bench.get("latency_vs_original"),
        "peak_rss_mb": bench.get("peak_rss_mb"),
    } | _drops(entry.task_metrics)


def _share_of(count: int, share: tuple[float, float]) -> list[int]:
    """The rows of a share, in the order of the data. Which rows those are depends on their number alone."""
    order = np.random.default_rng(0).permutation(count)
    begin, end = (round(edge * count) for edge in share)
    if begin == end:
        raise BadInputError(
            "evaluation.task", got=f"{count} rows, and none from {share[0]:.0%} to {share[1]:.0%}",
            expected="at least one in each part", remedy="Give more rows, or take fewer folds",
        )  # fmt: skip
    return sorted(int(row) for row in order[begin:end])


def _drops(metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    """By how many points each metric is worse than torch's, as budgets call it."""
    found: dict[str, float | None] = {
        f"{name}_drop_points": values["difference"]["drop_points"]
        for name, values in (metrics or {}).items()
        if "difference" in values
    }
    for name, values in (metrics or {}).items():
        if "difference" in values:
            difference = values["difference"]
            reference = values["value"] - difference["value"]
            lost = math.copysign(difference["value"], difference["drop_points"])
            found[f"{name}_drop_pct"] = 100 * lost / abs(reference) if reference else None
    for name in _F1:
        if f"{name}_drop_points" in found:
            found.setdefault("f1_drop_points", found[f"{name}_drop_points"])
    return found
