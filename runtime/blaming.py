"""Which nodes make the error that tensors have."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from onnxsmith.comparison import Tolerance
from onnxsmith.own_operators import rounds_weights
from onnxsmith.runtime.divergence import ROUNDING, Blame, TensorTrace
from onnxsmith.runtime.graph_parts import GraphValues
from onnxsmith.runtime.matching import Match
from onnxsmith.runtime.session import Array
from onnxsmith.runtime.tensor_errors import TensorError
from onnxsmith.runtime.weight_audit import audit_weights

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["blame_nodes"]

# Operators whose weights are rounded: their results are not exact, and need not be.
_ROUGH = frozenset({"GatherBlockQuantized", "MatMulNBits"})
# A node that is so far off on right inputs may have been given a scale that another one takes back.
_FAR = 0.2
# A node stands out where it makes so many times the error that is usual for its kind.
_STANDS_OUT = 4.0


def blame_nodes(
    traces: Sequence[TensorTrace],
    matches: Mapping[str, Match],
    bad: set[str],
    *,
    values: GraphValues,
    weight: Callable[[str], Array | None],
    scaled: Mapping[str, float],
    tolerance: Tolerance,
) -> list[Blame]:
    """Ranks nodes by the error that they make, the worst first: one entry for each.

    Args:
        traces: Tensors that both sides have. One whose node did not run on right inputs is ranked by how
            much larger its error is than those of what it was computed from.
        matches: What they were found to be.
        bad: Values that are not finite on right inputs.
        values: Of the candidate.
        weight: The reference's weight by the name of the candidate's.
        scaled: Tensors that are a multiple of the reference's, and how many times it.
        tolerance: Of the comparison.
    """
    errors = {trace.name: trace.error.size for trace in traces}
    segments = {trace.name: values.segment(trace.name, matches) for trace in traces}
    inherited = {
        name: max((errors[n] for one in segment for n in values.inputs_of(one) if n in errors), default=0.0)
        for name, segment in segments.items()
    }
    made = {trace.name: _made(trace, inherited[trace.name]) for trace in traces}
    worst: dict[str, TensorTrace] = {}
    for trace in traces:
        kept = worst.get(trace.node)
        if kept is None or made[trace.name].size > made[kept.name].size:
            worst[trace.node] = trace
    # What a segment does is what its least exact node does.
    rough = {
        trace.name: next((n for n in segments[trace.name] if _is_rough(n)), values.producers[trace.name])
        for trace in worst.values()
    }
    kinds: dict[str, list[float]] = {}
    for trace in worst.values():
        kinds.setdefault(_kind(rough[trace.name]), []).append(made[trace.name].size)
    blamed = []
    for trace in worst.values():
        node, segment = rough[trace.name], segments[trace.name]
        siblings = [e for e in kinds[_kind(node)] if math.isfinite(e)]
        typical = statistics.median(siblings) if len(siblings) > 2 else 0.0
        found = [(one, audit_weights(one, weight)) for one in segment]
        wrong = next(((one, text) for one, text in found if text), None)
        culprit = wrong[0] if wrong else _culprit(segment, node, bad)
        detail = wrong[1] if wrong else ""
        introduced = made[trace.name]
        if not wrong and introduced.size > _FAR and not introduced.bad:
            for one in segment:
                for factor in (scaled[v.name] for v in one.outputs if v.name and v.name in scaled):
                    culprit, detail = one, f"its result is {factor:.3g} times the reference's"
        stands_out = introduced.size > max(_STANDS_OUT * max(typical, ROUNDING), _usual(node, tolerance))
        blamed.append(
            Blame(
                node=culprit.name or trace.name,
                operator=culprit.op_type,
                tensor=trace.name,
                reference=trace.reference,
                nodes=tuple(one.name or "?" for one in segment),
                introduced=introduced,
                inherited=inherited[trace.name],
                error=trace.error,
                typical=typical,
                stands_out=stands_out or wrong is not None,
                detail=detail,
                estimated=trace.introduced is None,
            )
        )
    blamed.sort(key=lambda b: (not b.stands_out, -b.introduced.size, errors[b.tensor]))
    # A node may be to blame for several tensors that follow it.
    return list({blame.node: blame for blame in reversed(blamed)}.values())[::-1]


def _made(trace: TensorTrace, inherited: float) -> TensorError:
    """The error that a tensor's node makes, or what its error grows by where it never ran on right inputs."""
    if trace.introduced is not None:
        return trace.introduced
    error = trace.error
    if math.isinf(inherited):
        return TensorError(count=error.count, undefined=error.undefined)
    grown = max(max(error.channel, error.relative) - inherited, 0.0)
    return TensorError(
        min(error.relative, grown), grown, error.worst_channel, error.max_abs, error.scale, error.bad,
        error.count, error.undefined,
    )  # fmt: skip


def _is_rough(node: ir.Node) -> bool:
    return node.op_type in _ROUGH or rounds_weights(node)


def _usual(node: ir.Node, tolerance: Tolerance) -> float:
    """Error that needs no explanation, by what a node computes with."""
    if _is_rough(node):
        bits = node.attributes.get("bits")
        return 0.3 if bits is None or bits.as_int() <= 4 else 0.03
    return 10 * ROUNDING if tolerance.rtol is None else tolerance.rtol


def _kind(node: ir.Node) -> str:
    bits = node.attributes.get("bits")
    return f"{node.op_type}/{bits.as_int() if bits is not None else ''}"


def _culprit(segment: Sequence[ir.Node], producer: ir.Node, bad: set[str]) -> ir.Node:
    """The node of a segment that first gives what is not finite; else the one that gives the result."""
    for node in segment:
        if any(value.name in bad for value in node.outputs):
            return node
    return producer
