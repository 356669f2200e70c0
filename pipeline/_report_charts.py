"""The report's charts as positions in the units of a view box; the page draws them with its own colours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxsmith.pipeline._report_numbers import as_given, finite, number, part

__all__ = ["Axis", "bars", "error_by_depth", "label_place", "scatter", "timeline"]


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values to positions, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The position of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels of some four to six round values."""
        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(exponents) <= 3 else (1,)
            values = [s * 10.0**e for e in exponents[:: max(1, len(exponents) // 5)] for s in steps]
        else:
            rough = (self.high - self.low) / 4
            base = 10.0 ** math.floor(math.log10(rough))
            step = min((s * base for s in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
            first = math.ceil(self.low / step - 1e-9)
            values = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(self.at(v), as_given(v)) for v in values if self.low * 0.999999 <= v <= self.high * 1.000001]


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One thing to draw: a value, its interval, and what it stands for."""

    name: str
    kind: str
    value: float
    low: float
    high: float
    size: float | None = None


@dataclasses.dataclass(frozen=True)
class _Point:
    """A point of the scatter chart and where its label goes."""

    name: str
    kind: str
    x: float
    y: float
    top: float
    bottom: float
    label_x: float
    label_y: float
    anchor: str
    text: str


def _measured(name: str, kind: str, value: Any, interval: Any = None, size: Any = None) -> list[_Measured]:
    """The measurement as a list: empty if there is none, or it is nothing that a chart can place."""
    measured = finite(value)
    if measured is None or measured <= 0:
        return []
    low, high = finite(part(interval, "low")), finite(part(interval, "high"))
    low = measured if low is None or low <= 0 else min(low, measured)
    high = measured if high is None else max(high, measured)
    return [_Measured(name, kind, measured, low, high, finite(size))]


def _kind(variant: Mapping[str, Any]) -> str:
    if not variant["passed"]:
        return "failed"
    return "chosen" if variant["chosen"] else "variant"


def _perplexities(reference: Mapping[str, Any], variants: Iterable[Mapping[str, Any]]) -> list[_Measured]:
    found = []
    for kind, item in (("reference", reference), *((_kind(v), v) for v in variants)):
        perplexity = item["perplexity"]
        found += _measured(item["name"], kind, part(perplexity, "value"), perplexity, item["size_mb"])
    return [m for m in found if m.size is not None and m.size > 0]


def _decode_speeds(reference: Mapping[str, Any], variants: Iterable[Mapping[str, Any]]) -> list[_Measured]:
    speed = reference["decode_tokens_per_s"]
    found = _measured(reference["name"], "reference", speed, size=reference["size_mb"])
    for variant in variants:
        speed = part(variant["bench"], "decode_tokens_per_s")
        found += _measured(variant["name"], _kind(variant), part(speed, "p50"), speed, variant["size_mb"])
    return found


def scatter(reference: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Perplexity over size, or decode speed where that was not measured; None below two points."""
    quantity, unit, better = "Perplexity", "", "lower left is better"
    items = _perplexities(reference, variants)
    if len(items) < 2:
        quantity, unit, better = "Decode speed", "tokens/s", "upper left is better"
        items = [m for m in _decode_speeds(reference, variants) if m.size is not None and m.size > 0]
    if len(items) < 2:
        return None
    width, height = 440, 300
    x_axis = Axis(0.0, max(m.size or 0.0 for m in items) * 1.08, 44, width - 12)
    low, high = min(m.low for m in items), max(m.high for m in items)
    if high / low > 8:
        y_axis = Axis(low / 1.3, high * 1.3, height - 40, 12, logarithmic=True)
    else:
        margin = max((high - low) * 0.12, high * 0.01)
        y_axis = Axis(max(low - margin, 0.0), high + margin, height - 40, 12)
    places = [(x_axis.at(m.size or 0.0), y_axis.at(m.value)) for m in items]
    taken = [(x - 7.0, y - 7.0, x + 7.0, y + 7.0) for x, y in places]
    points = []
    for item, (x, y) in zip(items, places, strict=True):
        text = item.name if len(item.name) <= 22 else f"{item.name[:21]}…"
        text = f"✕ {text}" if item.kind == "failed" else text
        label_x, label_y, anchor = label_place(x, y, len(text) * 7.2, width, height - 40, taken)
        top, bottom = y_axis.at(item.high), y_axis.at(item.low)
        points.append(_Point(item.name, item.kind, x, y, top, bottom, label_x, label_y, anchor, text))
    return {
        "quantity": quantity,
        "unit": unit,
        "better": better,
        "width": width,
        "height": height,
        "left": x_axis.start,
        "right": x_axis.end,
        "bottom": y_axis.start,
        "top": y_axis.end,
        "x_ticks": x_axis.ticks(),
        "y_ticks": y_axis.ticks(),
        "points": points,
        "intervals": any(m.low < m.high for m in items),
        "logarithmic": y_axis.logarithmic,
    }


def label_place(
    x: float,
    y: float,
    length: float,
    width: float,
    bottom: float,
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, str]:
    """The first place around a point where its label covers no other label or point; marks it taken."""
    candidates = [
        (x + 11, y + 4, "start"),
        (x - 11, y + 4, "end"),
        *((x + 9, y + step, "start") for step in (-10, 18, -24, 32, -38, 46)),
        *((x - 9, y + step, "end") for step in (-10, 18, -24, 32, -38, 46)),
    ]
    boxes = []
    for label_x, label_y, anchor in candidates:
        left = label_x if anchor == "start" else label_x - length
        box = (left, label_y - 11, left + length, label_y + 3)
        inside = box[0] >= 40 and box[2] <= width and box[1] >= 0 and box[3] <= bottom
        overlap = sum(
            max(0.0, min(box[2], o[2]) - max(box[0], o[0])) * max(0.0, min(box[3], o[3]) - max(box[1], o[1]))
            for o in taken
        )
        boxes.append((not inside, overlap, box, (label_x, label_y, anchor)))
    _, _, box, place = min(boxes, key=lambda b: b[:2])
    taken.append(box)
    return round(place[0], 1), round(place[1], 1), place[2]


def bars(reference: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Decode speeds as horizontal bars with their ranges; None if none was measured."""
    items = _decode_speeds(reference, variants)
    if not any(m.kind != "reference" for m in items):
        return None
    width, row, left = 440, 46, 1.0
    # The label of a bar stands right of its whisker; the longest must fit.
    axis = Axis(0.0, max(m.high for m in items), left, width - 58)
    drawn = [
        {
            "name": m.name,
            "kind": m.kind,
            "text": number(m.value),
            "y": index * row,
            "width": round(axis.at(m.value) - left, 1),
            "low": axis.at(m.low),
            "high": axis.at(m.high),
            "whisker": m.high > m.low,
        }
        for index, m in enumerate(items)
    ]
    return {"width": width, "height": len(items) * row, "left": left, "bars": drawn}


def timeline(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps with where each stands on a bar of 100 percent."""
    seconds = [max(finite(step["seconds"]) or 0.0, 0.0) for step in steps]
    total = sum(seconds) or 1.0
    start, found = 0.0, []
    for step, duration in zip(steps, seconds, strict=True):
        share = 100 * duration / total
        # A label only where it fits on a phone too, where one percent is 3.6 pixels and a letter is 8.
        label = step["name"] if share * 3.6 > len(step["name"]) * 8 else ""
        found.append({"data": step, "start": round(start, 3), "share": round(share, 3), "label": label})
        start += share
    return found


def error_by_depth(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The error of each tensor, and the one that its node makes, over depth; None where all are exact.

    Args:
        tensors: Each with ``depth``, ``name``, ``operator``, ``error``, ``introduced`` and ``mark``, which is
            ``first`` or ``worst`` for tensors to point at. Infinite errors stand at the top.
    """
    errors = [e for t in tensors for e in (t["error"], t["introduced"]) if math.isfinite(e) and e > 0]
    if not errors and all(t["error"] == 0 for t in tensors):
        return None
    width, height = 1060, 320
    high = max(errors, default=1.0) * 2
    # What is exact, or nearly, stands on the axis.
    low = max(min(errors, default=1e-3) / 2, high * 1e-9)
    y_axis = Axis(low, high, height - 30, 16, logarithmic=True)
    x_axis = Axis(0.0, max((t["depth"] for t in tensors), default=0) or 1.0, 52, width - 12)

    def at(value: float) -> float:
        return 8.0 if not math.isfinite(value) else y_axis.at(max(value, low))

    points, marks = [], []
    for tensor in tensors:
        x = x_axis.at(tensor["depth"])
        for kind, key in (("together", "error"), ("own", "introduced")):
            said = "not finite" if not math.isfinite(tensor[key]) else number(tensor[key], 2)
            text = f"{tensor['name']} ({tensor['operator']}): {said}"
            points.append({"kind": kind, "x": x, "y": at(tensor[key]), "text": text})
        if tensor["mark"]:
            right = x < width * 0.7
            y = at(tensor["introduced" if tensor["mark"] == "worst" else "error"])
            label = f"{tensor['name']} ({tensor['operator']})"
            place = {"label_x": x + 11 if right else x - 11, "label_y": y + 4, "anchor": "start"}
            marks.append({"x": x, "y": y, "text": label, **place} | ({} if right else {"anchor": "end"}))
    return {
        "width": width, "height": height, "left": 52, "right": width - 12, "bottom": height - 30,
        "y_ticks": y_axis.ticks(), "points": points, "marks": marks,
    }  # fmt: skip
