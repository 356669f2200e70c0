"""The report of a run: everything that was decided and measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from onnxsmith.pipeline.artifact import to_plain
from onnxsmith.pipeline.records import fixed_time

__all__ = ["Budget", "Report", "StepTiming", "VariantReport", "write_report"]


@dataclasses.dataclass
class StepTiming:
    """One step of a run.

    Attributes:
        name: What was done.
        seconds: Wall time.
        peak_rss_mb: The peak of this process so far.
        note: What came of it.
    """

    name: str
    seconds: float
    peak_rss_mb: float
    note: str = ""


@dataclasses.dataclass
class Budget:
    """A limit and whether it was kept.

    Attributes:
        name: The key in the recipe.
        limit: The highest allowed value.
        value: What was measured; None where that failed.
        passed: Whether it was kept.
    """

    name: str
    limit: float
    value: float | None
    passed: bool


@dataclasses.dataclass
class VariantReport:
    """One variant: what was done to it and what came of it. Sizes in MB are 10**6 bytes.

    ``warnings`` are what a quantized variant has to own up to; ``notes`` too, but never make it fail.
    ``from_cache`` has which of ``made``, ``checked`` and ``timed`` an earlier run had done.
    """

    name: str
    precision: str = ""
    provider: str = ""
    chosen: bool = False
    error: str | None = None
    size_mb: float | None = None
    placement: dict[str, Any] | None = None
    placement_by_graph: dict[str, Any] = dataclasses.field(default_factory=dict)
    passes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    comparison: dict[str, Any] | None = None
    perplexity: dict[str, Any] | None = None
    perplexity_increase_pct: float | None = None
    kl_to_reference: float | None = None
    top1_agreement: float | None = None
    task_metrics: dict[str, Any] | None = None
    bench: dict[str, Any] | None = None
    operators: dict[str, dict[str, int]] = dataclasses.field(
        default_factory=lambda: {"before": {}, "after": {}}
    )
    budgets: list[Budget] = dataclasses.field(default_factory=list)
    suspicions: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    warnings_fail: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    weights: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    layer_errors: dict[str, Any] | None = None
    from_cache: list[str] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether it was made, agrees with torch as its precision allows, and keeps its budgets.

        Where a budget was set, a quantized variant must not be slower than its source or far off either.
        """
        agrees = self.comparison is not None and bool(self.comparison["passed"])
        honest = not (self.warnings and self.warnings_fail)
        return self.error is None and agrees and honest and all(budget.passed for budget in self.budgets)

    @property
    def reason(self) -> str:
        """Why it did not pass."""
        if self.error is not None:
            return self.error
        reasons = [
            f"{b.name} is {_number(b.value)}; expected at most {b.limit:g}"
            for b in self.budgets
            if not b.passed
        ]
        if self.comparison is not None and not self.comparison["passed"]:
            reasons.insert(0, self.comparison["reason"])
        return "; ".join([*reasons, *(self.warnings if self.warnings_fail else [])])


@dataclasses.dataclass
class Report:
    """Everything that a run decided and measured. JSON first; the HTML page is drawn from it."""

    name: str
    command: str
    created: str
    onnxsmith: str
    source: dict[str, Any]
    environment: dict[str, Any]
    recipe: dict[str, Any]
    steps: list[StepTiming] = dataclasses.field(default_factory=list)
    reference: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] | None = None
    original: dict[str, Any] | None = None
    variants: list[VariantReport] = dataclasses.field(default_factory=list)
    chosen: str | None = None
    verdict: str = ""
    generation: dict[str, Any] | None = None
    artifact: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    forecast: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether a variant was chosen and packed."""
        return self.chosen is not None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = dataclasses.asdict(self)
        plain |= {"schema_version": 1, "passed": self.passed}
        for variant, entry in zip(self.variants, plain["variants"], strict=True):
            entry["passed"] = variant.passed
            entry["reason"] = variant.reason
        result: dict[str, Any] = to_plain(plain)
        return result


def write_report(report: Report, directory: Path) -> None:
    """Writes ``report.json`` and ``report.html``, without times of steps if ``SOURCE_DATE_EPOCH`` is set."""
    from onnxsmith.pipeline.report_html import render_html

    plain = report.to_json()
    if fixed_time() is not None:
        plain["steps"] = []
        for variant in plain["variants"]:
            variant["passes"] = [entry | {"seconds": None} for entry in variant["passes"]]
            variant["from_cache"] = []
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    (directory / "report.html").write_text(render_html(plain), encoding="utf-8")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
