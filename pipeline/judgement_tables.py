"""Tables of bisect and evaluate for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxsmith.pipeline.console import print_table

if TYPE_CHECKING:
    from onnxsmith.pipeline.evaluation import Evaluation
    from onnxsmith.runtime import Divergence
    from onnxsmith.runtime.tensor_errors import TensorError

__all__ = ["show_divergence", "show_evaluations"]

_ROWS = 8


def show_divergence(result: Divergence) -> None:
    """Where it begins, and the nodes by the error that they make."""
    provider = result.provider.removesuffix("ExecutionProvider")
    sys.stdout.write(
        f"{result.candidate} on {provider} against {result.reference}: {len(result.tensors)} tensors found "
        f"in both, {len(result.unmatched)} only in the candidate, {len(result.cases)} cases\n\n"
    )
    first = result.first
    if first is not None:
        sys.stdout.write(
            f"first divergence  {first.name} ({first.operator}), {first.reference} of the reference\n"
        )
        sys.stdout.write(f"                  {first.reason}\n\n")
    rows = [
        (
            blame.node,
            blame.operator,
            ("~" if blame.estimated else "") + _error(blame.introduced),
            f"{blame.factor:.1f}x" if blame.typical and math.isfinite(blame.factor) else "",
            _size(blame.inherited),
            _error(blame.error),
            "!" if blame.stands_out else "",
        )
        for blame in result.blamed[:_ROWS]
    ]
    headers = ("node", "operator", "makes", "of usual", "inherits", "together", "stands out")
    print_table("error relative to the reference's tensor", headers, rows, text=("operator",))
    for blame in result.suspects[:3]:
        if blame.detail:
            sys.stdout.write(f"\n{blame.node}: {blame.detail}\n")
    for name, reason in list(result.outputs.items())[:3]:
        sys.stdout.write(f"\noutput {name} differs: {reason}\n")
    if result.kernels:
        changed = ", ".join(f"{name} {one} -> {two}" for name, (one, two) in result.kernels.items())
        sys.stdout.write(
            "\nOther kernels ran to read intermediate tensors, in the untouched model -> in pieces: "
            f"{changed}\n"
        )
    if result.changed_by_tapping:
        sys.stdout.write(
            f"\nReading intermediate tensors changed an output by {result.tapping_change:.2g}: in the "
            "untouched model other kernels or fusions run\n"
        )
        if result.optimizer_change is not None:
            change = f"{result.optimizer_change:.2g}"
            sys.stdout.write(f"Without ONNX Runtime's own optimisation an output changes by {change}\n")
    made = result.reproduction
    if made is not None:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in list(made.shapes.items())[:4])
        size = f"{len(made.nodes)} nodes, {made.bytes / 1e3:.1f} kB, {shapes}"
        sys.stdout.write(f"\nreproduction      {made.directory}: {size}\n")
    sys.stdout.write(f"\n{result.verdict}\n")


def show_evaluations(results: Sequence[Evaluation]) -> None:
    """Each metric with its interval, and its difference to the reference with a test."""
    rows = []
    for result in results:
        for name, interval in result.metrics.items():
            difference = result.differences.get(name)
            rows.append(
                (
                    result.name,
                    result.provider.removesuffix("ExecutionProvider"),
                    name,
                    f"{interval.value:.4f}",
                    f"{interval.low:.4f} to {interval.high:.4f}",
                    "" if difference is None else f"{difference.value:+.4f}",
                    "" if difference is None else f"{difference.low:+.4f} to {difference.high:+.4f}",
                    "" if difference is None else f"{difference.p:.3f}",
                    "" if difference is None else "yes" if difference.significant else "no",
                )
            )
    headers = ("model", "provider", "metric", "value", "95 %", "difference", "of 95 %", "p", "significant")
    print_table("", headers, rows, spare=("of 95 %",), text=("provider", "metric"))
    counts = sorted({interval.n for result in results for interval in result.metrics.values()})
    sys.stdout.write(f"{', '.join(map(str, counts))} samples; intervals and tests by resampling them\n")


def _error(error: TensorError) -> str:
    return _size(error.size) if error.comparable else "not known"


def _size(value: float) -> str:
    return "inf or NaN" if math.isinf(value) else f"{value:.2g}"
