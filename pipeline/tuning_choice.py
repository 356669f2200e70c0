"""What a search found: the point that is taken and why, the Pareto front, and what stands in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.tuning_trial import Trial, is_accuracy, objectives_of

__all__ = ["axes_of", "choose_trial", "pareto_front", "plain_tuning"]

_ACCURACY = ("perplexity_increase_pct", "perplexity", "kl_to_reference")


def choose_trial(
    recipe: Recipe, trials: Sequence[Trial], limits: Mapping[str, float]
) -> tuple[Trial | None, str]:
    """The point with the least of the objectives of those that keep every budget, and why it is this one.

    Where there are several objectives, the recipe's ``choose`` decides between the points of the front, then
    the objectives in order. Of equal points the one that loses least is taken.

    Args:
        recipe: With a key ``tune``.
        trials: All of them.
        limits: The budgets as the search kept them.
    """
    objectives = objectives_of(recipe)
    feasible = [trial for trial in trials if trial.feasible]
    kept = " and ".join(f"{name} ≤ {limit:.4g}" for name, limit in limits.items())
    if not feasible:
        return None, _why_none(trials, limits)
    order = ([recipe.choose] if len(objectives) > 1 else []) + [*objectives, *_losses(recipe, trials)]

    def rank(trial: Trial) -> tuple[Any, ...]:
        return (*(trial.values.get(name, math.inf) for name in order), len(trial.point.passes), trial.number)

    ranked = sorted(feasible, key=rank)
    chosen, first = ranked[0], order[0]
    among = f"of {len(feasible)} points that keep {kept}" if kept else f"of {len(feasible)} points"
    if len(feasible) == 1:
        among = f"the only point that keeps {kept}" if kept else "the only point"
        why = f"{chosen.name}: {among}, with {first} {chosen.values[first]:.4g}"
    else:
        second = ranked[1]
        why = (
            f"{chosen.name}: the least {first} {among}: {chosen.values[first]:.4g}; "
            f"the next is {second.name} with {second.values[first]:.4g}"
        )
    return chosen, why


def _why_none(trials: Sequence[Trial], limits: Mapping[str, float]) -> str:
    """Why no point will do: for each budget, the nearest that any point came."""
    reasons = []
    for name, limit in limits.items():
        values = [(trial.values[name], trial) for trial in trials if name in trial.values]
        if not values:
            reasons.append(f"{name} was measured of no point (limit {limit:.4g})")
            continue
        value, trial = min(values, key=lambda one: one[0])
        if value > limit:
            reasons.append(f"{name} is at least {value:.4g} ({trial.name}); expected at most {limit:.4g}")
    alone = "" if reasons else ": each budget is kept by some point, but all of them by none"
    failed = [trial for trial in trials if trial.state == "failed" or "comparison" in trial.broken]
    if failed and len(failed) == len(trials):
        reasons.append(f"every point failed, {failed[0].name} for this: {failed[0].reason}")
    count = f"none of {len(trials)} points keeps the budgets"
    return f"{count}{alone}" + (f": {'; '.join(reasons)}" if reasons else "")


def _losses(recipe: Recipe, trials: Sequence[Trial]) -> list[str]:
    """Measures of accuracy, the budgets' first."""
    names = [name for name in recipe.budgets.limits() if is_accuracy(name)]
    known = {name for trial in trials for name in trial.values}
    names += [name for name in _ACCURACY if name in known]
    names += sorted(name for name in known if name.endswith("_drop_points"))
    return list(dict.fromkeys(name for name in names if name in known))


def axes_of(recipe: Recipe, trials: Sequence[Trial]) -> tuple[str, ...]:
    """What the Pareto front is about: the objectives, size, a loss, and latency where it was measured."""
    known = {name for trial in trials for name in trial.values}
    wanted = [*objectives_of(recipe), "size_mb", *_losses(recipe, trials)[:1], "latency_ms"]
    return tuple(dict.fromkeys(name for name in wanted if name in known))


def pareto_front(trials: Sequence[Trial], axes: Sequence[str]) -> list[Trial]:
    """The points that no other point beats: as good in everything and better in something."""
    whole = [t for t in trials if t.state == "complete" and all(name in t.values for name in axes)]

    def beats(one: Trial, other: Trial) -> bool:
        pairs = [(one.values[name], other.values[name]) for name in axes]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [trial for trial in whole if not any(beats(other, trial) for other in whole)]


def plain_tuning(
    recipe: Recipe,
    trials: Sequence[Trial],
    *,
    sampler: str,
    limits: Mapping[str, float],
    chosen: Trial | None,
    why: str,
    reference: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All of a search as plain data, for the report and for scripts."""
    assert recipe.tune is not None
    axes = axes_of(recipe, trials)
    front = {id(trial) for trial in pareto_front(trials, axes)}
    spec = recipe.tune
    return {
        "objectives": list(objectives_of(recipe)),
        "budgets": dict(recipe.budgets.limits()),
        "limits": dict(limits),
        "sampler": sampler,
        "seed": recipe.seed,
        "held_out": spec.held_out,
        "folds": spec.folds,
        "margin": spec.margin,
        "axes": list(axes),
        "chosen": None if chosen is None else chosen.name,
        "why": why,
        "measured": sum(trial.measured for trial in trials),
        "reused": sum(trial.reused for trial in trials),
        "reference": dict(reference) if reference else None,
        "trials": [
            {
                "name": trial.name,
                "parameters": dict(trial.point.parameters),
                "passes": [{"name": name, "parameters": dict(given)} for name, given in trial.point.passes],
                "threads": trial.point.threads,
                "provider": trial.point.provider,
                "precision": trial.precision,
                "state": trial.state,
                "reason": trial.reason,
                "values": dict(trial.values),
                "errors": dict(trial.errors),
                "feasible": trial.feasible,
                "front": id(trial) in front,
                "chosen": trial is chosen,
            }
            for trial in trials
        ],
    }  # fmt: skip
