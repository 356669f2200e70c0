"""What a report says of the inside of a variant: bits of weights, errors of tensors, where the time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsmith.pipeline._report_charts import error_by_depth
from onnxsmith.pipeline._report_numbers import megabytes

__all__ = ["bits_table", "error_chart", "precision_strip", "profile_rows", "task_table"]

_WIDTH, _ROW = 1060.0, 26
_OPERATORS, _NODES = 12, 12


def precision_strip(weights: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The weights in their order as a strip: as wide as they have values, as high as they have bits."""
    total = sum(weight["values"] for weight in weights)
    if not total:
        return None
    height = 64.0
    x, drawn = 0.0, []
    for weight in weights:
        width = weight["values"] / total * _WIDTH
        # 2, 4, 8, 16 and 32 bits are steps of the same height.
        level = max(math.log2(max(weight["bits"], 1)), 0.5) / 5
        drawn.append(
            {
                "x": round(x, 2),
                "width": round(max(width, 0.4), 2),
                "y": round(height * (1 - min(level, 1.0)), 1),
                "height": round(height * min(level, 1.0), 1),
                "tone": _tone(weight["bits"]),
                "tip": f"{weight['name']} ({weight['operator']}): {weight['bits']} bits, "
                f"{weight['values']:,} values, {megabytes(weight['bytes'] / 1e6)}",
            }
        )
        x += width
    return {"width": _WIDTH, "height": height, "weights": drawn}


def _tone(bits: int) -> str:
    return "b2" if bits <= 2 else "b4" if bits <= 4 else "b8" if bits <= 8 else "b16" if bits <= 16 else "b32"


def bits_table(weights: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each number of bits: how many weights, values and bytes, and the tone in which they are drawn."""
    rows = []
    for bits in sorted({weight["bits"] for weight in weights}):
        some = [weight for weight in weights if weight["bits"] == bits]
        rows.append(
            {
                "bits": bits,
                "tone": _tone(bits),
                "weights": len(some),
                "values": sum(weight["values"] for weight in some),
                "bytes": sum(weight["bytes"] for weight in some),
            }
        )
    return rows


def error_chart(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The error of each tensor by its depth, and the part that its own node makes."""
    if found is None:
        return None
    tensors = [
        {**tensor, **{k: math.inf if tensor[k] is None else tensor[k] for k in ("error", "introduced")}}
        for tensor in found["tensors"]
    ]
    return error_by_depth(tensors) if tensors else None


def profile_rows(bench: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The operators and nodes that take the most time; None where nothing was profiled."""
    profile = (bench or {}).get("profile")
    if not profile:
        return None
    return {
        "operators": [_timed(entry, entry["op_type"]) for entry in profile["operators"][:_OPERATORS]],
        "nodes": [_timed(entry, entry["name"]) for entry in profile["nodes"][:_NODES]],
        "run_ms": profile["run_ms"],
        "note": profile["note"],
    }


def _timed(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "op_type": entry["op_type"],
        "time_ms": entry["time_ms"],
        "share": entry.get("share"),
        "calls": entry.get("calls"),
        "best_ms": entry.get("best_ms"),
        "limit": entry.get("limit"),
    }


def task_table(reference: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Metrics on labelled data: the reference first, and each variant with its difference to it."""
    names = list(reference.get("task_metrics") or {})
    for variant in variants:
        names += [name for name in variant["task_metrics"] or {} if name not in names]
    if not names:
        return None
    rows = [
        {
            "name": item["name"],
            "kind": kind,
            "cells": [(item.get("task_metrics") or {}).get(name) for name in names],
        }
        for kind, item in (("reference", reference), *(("variant", v) for v in variants))
    ]
    return {"names": names, "rows": rows}
