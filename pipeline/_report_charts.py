"""The report's charts as positions in the units of a view box; the page draws them with its own colours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxsmith.pipeline._report_numbers import as_given, finite, number, part

__all__ = ["Axis", "bars", "error_by_depth", "kind_of", "label_place", "timeline"]


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


def _measured(name: str, kind: str, value: Any, interval: Any = None) -> list[_Measured]:
    """The measurement as a list: empty if there is none, or it is nothing that a chart can place."""
    measured = finite(value)
    if measured is None or measured <= 0:
        return []
    low, high = finite(part(interval, "low")), finite(part(interval, "high"))
    low = measured if low is None or low <= 0 else min(low, measured)
    high = measured if high is None else max(high, measured)
    return [_Measured(name, kind, measured, low, high)]


def kind_of(variant: Mapping[str, Any]) -> str:
    """How a variant is drawn: ``failed``, ``chosen`` or ``variant``."""
    if not variant["passed"]:
        return "failed"
    return "chosen" if variant["chosen"] else "variant"


def _decode_speeds(reference: Mapping[str, Any], variants: Iterable[Mapping[str, Any]]) -> list[_Measured]:
    found = _measured(reference["name"], "reference", reference["decode_tokens_per_s"])
    for variant in variants:
        speed = part(variant["bench"], "decode_tokens_per_s")
        found += _measured(variant["name"], kind_of(variant), part(speed, "p50"), speed)
    return found


def _call_speeds(reference: Mapping[str, Any], variants: Iterable[Mapping[str, Any]]) -> list[_Measured]:
    """Calls in a second of models that do not decode: a thousand by the milliseconds of one."""

    def inverse(value: Any) -> float | None:
        time = finite(value)
        return 1000 / time if time and time > 1e-9 else None

    found = _measured(reference["name"], "reference", inverse(reference.get("latency_ms")))
    for variant in variants:
        latency = part(variant["bench"], "latency_ms")
        slow, fast = (inverse((latency or {}).get(key)) for key in ("high", "low"))
        interval = None if slow is None or fast is None else {"low": slow, "high": fast}
        found += _measured(variant["name"], kind_of(variant), inverse(part(latency, "p50")), interval)
    return found


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
    """Speeds of decoding, or else of calls, as bars with their ranges; None if none was measured."""
    title, unit, items = "Decode speed", "tokens/s", _decode_speeds(reference, variants)
    if not any(m.kind != "reference" for m in items):
        title, unit, items = "Speed", "calls/s", _call_speeds(reference, variants)
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
    return {
        "title": title, "unit": unit, "width": width, "height": len(items) * row, "left": left, "bars": drawn
    }  # fmt: skip


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
