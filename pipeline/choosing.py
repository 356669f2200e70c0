"""Choosing among variants: budgets are held against what was measured, and the best that keeps them wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsmith.pipeline.honesty import add_warnings
from onnxsmith.pipeline.recipe import Budgets, Recipe
from onnxsmith.pipeline.report import Budget, VariantReport
from onnxsmith.pipeline.run_tasks import budget_values

__all__ = ["choose", "hold_budgets"]

_LEAST = (("size_mb", "smallest"), ("latency_ms", "fastest"), ("perplexity", "most accurate"))


def hold_budgets(entry: VariantReport, budgets: Budgets) -> None:
    """Adds to a variant's report which budgets it keeps; what was not measured is not kept."""
    values = budget_values(entry)
    entry.budgets = [
        Budget(name, limit, value := values.get(name), value is not None and value <= limit)
        for name, limit in budgets.limits().items()
    ]


def choose(
    variants: Sequence[VariantReport], recipe: Recipe, *, source: Mapping[str, Any] | None = None
) -> tuple[VariantReport | None, str]:
    """The best variant that passes, by what the recipe chooses by, and the verdict in words.

    Args:
        variants: Checked and measured; their budgets are held here.
        recipe: The budgets, and what to choose by.
        source: The benchmark of the float model; see ``add_warnings``.

    Returns:
        The variant, which is marked as chosen, or None where none passes.
    """
    for entry in variants:
        hold_budgets(entry, recipe.budgets)
    add_warnings(variants, source=source, strict=bool(recipe.budgets.limits()))
    passed = [v for v in variants if v.passed]
    if not passed:
        return None, "no variant passes: " + "; ".join(f"{v.name}: {v.reason}" for v in variants)

    def measured(variant: VariantReport) -> float:
        value = budget_values(variant).get(recipe.choose)
        return math.inf if value is None else value

    chosen = min(passed, key=measured)
    chosen.chosen = True
    failed = [v.name for v in variants if not v.passed]
    kept = "keeps every budget" if recipe.budgets.limits() else "agrees with torch"
    verdict = f"{chosen.name} chosen: the {dict(_LEAST)[recipe.choose]} variant that {kept}" + (
        f" ({', '.join(failed)} {'does' if len(failed) == 1 else 'do'} not)" if failed else ""
    )
    return chosen, verdict
