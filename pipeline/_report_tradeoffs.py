"""What each variant of a run costs against what it loses: size and time over the loss that was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxsmith.pipeline._report_charts import kind_of
from onnxsmith.pipeline._report_numbers import finite, part
from onnxsmith.pipeline._report_pareto import PlotPoint, pareto_chart

__all__ = ["tradeoffs"]

_Loss = tuple[float, float | None, float | None]


def tradeoffs(reference: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Charts of size and of latency over the loss, with the front of what nothing else beats.

    The loss is the first of these that two or more variants have: the increase of perplexity, the points of
    a metric on labelled data, the distance of outputs from the reference's direction.

    Args:
        reference: As a report has it; it loses nothing.
        variants: As a report has them.
    """
    found = _losses(variants)
    if found is None:
        return []
    name, losses = found
    limits: dict[str, float] = {}
    for variant in variants:
        limits |= {budget["name"]: budget["limit"] for budget in variant["budgets"]}
    # The size of a model's weights in PyTorch is known; how they lie in memory there is not.
    costs: Sequence[tuple[str, Any, Callable[[Mapping[str, Any]], Any]]] = (
        ("size_mb", reference["size_mb"], lambda variant: variant["size_mb"]),
        (
            "latency_ms",
            reference.get("latency_ms"),
            lambda variant: part(part(variant["bench"], "latency_ms"), "p50"),
        ),
    )
    charts = []
    for cost, of_reference, of_variant in costs:
        points = [
            PlotPoint(variant["name"], kind_of(variant), float(of_variant(variant)), *loss)
            for variant, loss in zip(variants, losses, strict=True)
            if loss is not None and (finite(of_variant(variant)) or 0.0) > 0
        ]
        if len(points) < 2:
            continue
        if (finite(of_reference) or 0.0) > 0:
            points.insert(0, PlotPoint(str(reference["name"]), "reference", float(of_reference), 0.0))
        chart = pareto_chart(points, x=cost, y=name, limit_x=limits.get(cost), limit_y=limits.get(name))
        if chart is not None:
            charts.append(chart)
    return charts


def _losses(variants: Sequence[Mapping[str, Any]]) -> tuple[str, list[_Loss | None]] | None:
    """What was lost, and how much of it by each variant; None where fewer than two say."""
    names = list(dict.fromkeys(n for variant in variants for n in variant["task_metrics"] or {}))
    candidates: list[tuple[str, list[_Loss | None]]] = [
        ("perplexity_increase_pct", [_increase(variant) for variant in variants]),
        *((f"{name}_drop_points", [_drop(variant, name) for variant in variants]) for name in names),
        ("output_error", [_distance(variant) for variant in variants]),
    ]
    for name, losses in candidates:
        if sum(loss is not None for loss in losses) >= 2:
            return name, losses
    return None


def _increase(variant: Mapping[str, Any]) -> _Loss | None:
    value = finite(variant["perplexity_increase_pct"])
    if value is None:
        return None
    scored = variant["perplexity"] or {}
    low, high = finite(scored.get("increase_low_pct")), finite(scored.get("increase_high_pct"))
    # Against the original of a training the increase is another than the one that the interval is of.
    if low is None or high is None or not low <= value <= high:
        low = high = None
    return value, low, high


def _drop(variant: Mapping[str, Any], name: str) -> _Loss | None:
    """Points lost, with the interval of the difference turned so that more is worse."""
    difference = ((variant["task_metrics"] or {}).get(name) or {}).get("difference")
    lost = finite((difference or {}).get("drop_points"))
    if difference is None or lost is None:
        return None
    value, ends = finite(difference["value"]), [finite(difference["low"]), finite(difference["high"])]
    if not value or ends[0] is None or ends[1] is None:
        return lost, None, None
    scale = lost / value
    low, high = sorted((ends[0] * scale, ends[1] * scale))
    return lost, low, high


def _distance(variant: Mapping[str, Any]) -> _Loss | None:
    """One less the lowest cosine similarity of an output."""
    tensors = (variant["comparison"] or {}).get("tensors") or []
    cosines = [found for tensor in tensors if (found := finite(tensor["cosine"])) is not None]
    return (max(1 - min(cosines), 0.0), None, None) if cosines else None
