"""Charts of what is gained against what is lost: points, the front that nothing beats, and limits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsmith.pipeline._report_charts import Axis, label_place
from onnxsmith.pipeline._report_numbers import number

__all__ = ["PlotPoint", "front_of", "pareto_chart", "quantity_label", "tuning_charts"]

_WIDTH, _HEIGHT = 440, 300
_LABELS: Mapping[str, str] = {
    "size_mb": "size, MB",
    "latency_ms": "latency, ms",
    "peak_rss_mb": "peak memory, MB",
    "perplexity_increase_pct": "perplexity increase, %",
    "perplexity": "perplexity",
    "kl_to_reference": "KL divergence, nats",
    "output_error": "1 − lowest cosine of an output",
}


@dataclasses.dataclass(frozen=True)
class PlotPoint:
    """What is drawn.

    Attributes:
        name: In its label or its tooltip.
        kind: ``reference``, ``variant``, ``chosen``, ``failed`` or ``stopped``.
        x: Less is better.
        y: Less is better.
        low: Lower end of the interval of ``y``.
        high: Upper end.
        labelled: Whether its name stands beside it.
    """

    name: str
    kind: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    labelled: bool = True


def quantity_label(name: str) -> str:
    """What a measure is called on an axis."""
    if name in _LABELS:
        return _LABELS[name]
    for suffix, unit in (("_drop_points", "points lost"), ("_drop_pct", "% lost")):
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix).replace('_', ' ')}, {unit}"
    return name.replace("_", " ")


def front_of(points: Sequence[PlotPoint]) -> list[PlotPoint]:
    """The points that no other one beats in both directions, from left to right."""
    found: list[PlotPoint] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return found


def pareto_chart(
    points: Sequence[PlotPoint], *, x: str, y: str, limit_x: float | None = None, limit_y: float | None = None
) -> dict[str, Any] | None:
    """Points with their front, as positions; None below two points.

    What is far above everything that matters stands at the upper edge, with an arrow: one point that is
    broken must not press all others into one line.

    Args:
        points: What to draw.
        x: The measure to the right.
        y: The measure upwards.
        limit_x: A budget of ``x``.
        limit_y: A budget of ``y``.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if len(points) < 2:
        return None
    values = sorted(p.y for p in points)
    middle = values[len(values) // 2]
    spread = max(middle - values[0], abs(limit_y) if limit_y else 0.0, 1e-12)
    top = min(values[-1], max(values[0] + 4 * spread, (limit_y or 0.0) * 2))
    if limit_y is not None and top < limit_y <= 2 * top:
        top = limit_y
    low = min(values[0], 0.0)
    # Intervals are shown whole, unless they would press the points together.
    shown = max(top - low, 1e-12)
    top = max(top, min(max((p.high for p in points if p.high is not None), default=top), top + shown / 2))
    low = min(low, max(min((p.low for p in points if p.low is not None), default=low), low - shown / 2))
    margin = max((top - low) * 0.08, abs(top) * 0.01, 1e-9)
    right = max(*(p.x for p in points), limit_x or 0.0) * 1.08
    x_axis = Axis(0.0, right or 1.0, 52, _WIDTH - 12)
    y_axis = Axis(low - (margin if low < 0 else 0.0), top + margin, _HEIGHT - 40, 14)

    def up(value: float) -> float:
        return y_axis.at(min(max(value, y_axis.low), y_axis.high))

    good = [p for p in points if p.kind in ("variant", "chosen", "reference")]
    front = front_of([p for p in good if p.kind != "reference"] or good)
    taken = [(x_axis.at(p.x) - 6, up(p.y) - 6, x_axis.at(p.x) + 6, up(p.y) + 6) for p in points]
    for one, next_one in itertools.pairwise(front):
        left, right = x_axis.at(one.x), x_axis.at(next_one.x)
        taken.append((left + 8, up(one.y) - 1, right, up(one.y) + 1))
        taken.append((right - 1, up(one.y), right + 1, up(next_one.y) - 8))
    if limit_x is not None:
        taken.append((x_axis.at(limit_x) - 1, y_axis.end, x_axis.at(limit_x) + 1, y_axis.start))
    drawn = []
    for point in sorted(points, key=lambda p: p.kind == "chosen"):
        place_x, place_y = x_axis.at(point.x), up(point.y)
        item: dict[str, Any] = {
            "name": point.name,
            "kind": point.kind,
            "x": place_x,
            "y": place_y,
            "above": point.y > y_axis.high,
            "tip": f"{point.name}: {quantity_label(x)} {number(point.x)}; "
            f"{quantity_label(y)} {number(point.y)}",
            "label": None,
            "top": None if point.high is None else up(point.high),
            "bottom": None if point.low is None else up(point.low),
        }
        if point.labelled:
            text = point.name if len(point.name) <= 22 else f"{point.name[:21]}…"
            left, height, anchor = label_place(place_x, place_y, len(text) * 7.2, _WIDTH, _HEIGHT - 40, taken)
            item["label"] = {"text": text, "x": left, "y": height, "anchor": anchor}
        drawn.append(item)
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": x_axis.start, "right": x_axis.end,
        "bottom": y_axis.start, "top": y_axis.end, "x_label": quantity_label(x), "y_label": quantity_label(y),
        "x_ticks": x_axis.ticks(), "y_ticks": y_axis.ticks(), "points": drawn,
        "front": _steps(front, x_axis, up),
        "intervals": any(p.low is not None and p.high is not None for p in points),
        "limit_x": None if limit_x is None else x_axis.at(limit_x),
        "limit_y": None if limit_y is None or limit_y > y_axis.high else up(limit_y),
    }  # fmt: skip


def _steps(front: Sequence[PlotPoint], x_axis: Axis, up: Any) -> str:
    """The front as a path of steps: between two points nothing is known to be better than both."""
    if len(front) < 2:
        return ""
    parts = [f"M{x_axis.at(front[0].x)} {up(front[0].y)}"]
    parts += [f"H{x_axis.at(point.x)}V{up(point.y)}" for point in front[1:]]
    return "".join(parts)


def tuning_charts(tuning: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Charts of what a search made small: size and time against loss, or against each other."""
    axes = list(tuning["axes"])
    costs = [name for name in axes if name in ("size_mb", "latency_ms", "peak_rss_mb")]
    losses = [name for name in axes if name not in costs]
    pairs = [(cost, loss) for cost in costs for loss in losses[:1]] or [tuple(axes[:2])]
    charts = []
    for pair in pairs:
        if len(pair) < 2:
            continue
        x, y = pair
        points = [
            PlotPoint(
                trial["name"],
                _kind_of(trial),
                trial["values"][x],
                trial["values"][y],
                *_ends(trial, y),
                labelled=trial["chosen"],
            )
            for trial in tuning["trials"]
            if x in trial["values"] and y in trial["values"]
        ]
        limits = tuning["limits"]
        chart = pareto_chart(points, x=x, y=y, limit_x=limits.get(x), limit_y=limits.get(y))
        if chart is not None:
            charts.append(chart)
    return charts


def _kind_of(trial: Mapping[str, Any]) -> str:
    if trial["chosen"]:
        return "chosen"
    if trial["state"] != "complete":
        return "stopped"
    return "variant" if trial["feasible"] else "failed"


def _ends(trial: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    error = trial["errors"].get(name)
    if not error:
        return None, None
    return trial["values"][name] - error, trial["values"][name] + error
