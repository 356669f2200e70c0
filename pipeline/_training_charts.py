"""Loss curves of the report, as positions in the units of a view box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxsmith.pipeline._report_charts import Axis
from onnxsmith.pipeline._report_numbers import finite

__all__ = ["loss_curves", "training_table"]

_WIDTH, _HEIGHT = 440, 240


def loss_curves(training: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A chart for each step that trained: its loss, and that on held-out examples.

    Args:
        training: As in a report; None where nothing was trained.
    """
    steps = training["steps"] if training is not None else []
    found = [_curve(number, step) for number, step in enumerate(steps, 1) if step.get("curve")]
    return [chart for chart in found if chart is not None]


def training_table(training: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What each step did, in words: from what to what."""
    rows = []
    for number, step in enumerate(training["steps"] if training is not None else [], 1):
        said = []
        if "parameters_after" in step:
            before, after = step["parameters_before"] / 1e6, step["parameters_after"] / 1e6
            said.append(f"{before:.2f} to {after:.2f} M parameters")
        if "vocabulary" in step:
            rows_of = step["vocabulary"]
            said.append(f"{rows_of['rows_before']:,} to {rows_of['rows_left']:,} rows of the embedding")
        if "weights" in step:
            zeros = step["weights"]
            said.append(
                f"{zeros['zeros']:.0%} of the weights of {zeros['matrices']} matrices are zero "
                f"({zeros['pattern']}, by {zeros['method']}): {zeros['speed']}"
            )
        if step.get("objective", {}).get("teacher"):
            said.append(f"taught by {step['objective']['teacher']}")
        if "updates" in step:
            said.append(f"{step['updates']} updates on {step['examples']} examples")
            if step["ended"] != "finished":
                said.append(f"ended by {step['ended']}")
            if step["skipped"]:
                said.append(f"{step['skipped']} updates left out by loss scaling")
            kept: Mapping[str, float] = next(
                (e for e in step["evaluations"] if e["update"] == step["kept"]), {}
            )
            said += [
                f"{name} {value:.3f} to {kept[name]:.3f} on {step['held_out']} held-out examples"
                for name, value in step["before"].items()
                if name in kept
            ]
        folds = step.get("cross_validation")
        if folds:
            said += [
                f"cross-validated {name} {value:.3f} ± {folds['spread'][name]:.3f}"
                for name, value in folds["mean"].items()
            ]
        rows.append({"number": number, "data": step, "said": "; ".join(said)})
    return rows


def _curve(number: int, step: Mapping[str, Any]) -> dict[str, Any] | None:
    trained = _points(step["curve"])
    held = _points(step["evaluations"])
    values = [loss for _, loss in (*trained, *held)]
    if len(trained) < 2:
        return None
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 8
    margin = max((high - low) * 0.08, abs(high) * 0.01, 1e-12)
    if logarithmic:
        y_axis = Axis(low / 1.2, high * 1.2, _HEIGHT - 40, 12, logarithmic=True)
    else:
        y_axis = Axis(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin, _HEIGHT - 40, 12)
    x_axis = Axis(0.0, max(update for update, _ in (*trained, *held)), 52, _WIDTH - 12)

    def line(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x_axis.at(x)},{y_axis.at(y)}" for x, y in points)

    return {
        "title": f"{number}. {step['name']}", "width": _WIDTH, "height": _HEIGHT,
        "left": x_axis.start, "right": x_axis.end, "bottom": y_axis.start, "top": y_axis.end,
        "x_ticks": x_axis.ticks(), "y_ticks": y_axis.ticks(), "logarithmic": logarithmic,
        "trained": line(trained), "held": line(held),
        "marks": [(x_axis.at(x), y_axis.at(y)) for x, y in held],
        "kept": next(((x_axis.at(x), y_axis.at(y)) for x, y in held if x == step["kept"]), None),
    }  # fmt: skip


def _points(entries: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    found = [(finite(entry["update"]), finite(entry.get("loss"))) for entry in entries]
    return [(update, loss) for update, loss in found if update is not None and loss is not None]
