"""What each kernel could cost at best, against what it costs: bytes moved and operations, under two roofs.

The roofs are measured, not read from data sheets: a product of large matrices for operations, a product of
a row with a matrix that fits no cache for bytes, on the same provider with the same threads. A kernel
cannot be faster than the slower of the two (Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.own_operators import PACKED_OPERATORS
from onnxsmith.packed_tiles import TILE_ROWS
from onnxsmith.runtime.profiling import NodeProfile, RunProfile, item_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["NodeCost", "Roofs", "describe_profile", "node_cost", "weight_bytes_of_nodes"]

_MATRIX = frozenset(
    {
        "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulBnb4", "MatMulInteger",
        "MatMulIntegerToFloat", "MatMulNBits", "MatMulPacked", "NormMatMulPacked", "QGemm", "QLinearMatMul",
        "TransposeMatMul",
    }
)  # fmt: skip
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "FusedConv", "NhwcFusedConv", "QLinearConv"})
_LOOKUPS = frozenset(
    {"EmbedLayerNormalization", "Gather", "GatherBlockQuantized", "GatherElements", "GatherPacked"}
)
# They give the same memory another shape, or look at nothing but the shape.
_FREE = frozenset({"Flatten", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"})
_INTEGER_WEIGHTS = frozenset({"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"})
# Calls that take less than this are mostly the cost of calling.
_OVERHEAD_US = 10.0
_TOP_NODES = 15


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """What a node has to do in one call.

    Attributes:
        bytes_moved: Inputs, weights and outputs that it must read and write at least once.
        operations: Additions and multiplications.
    """

    bytes_moved: float
    operations: float


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What a provider can do at best on this machine.

    Attributes:
        bytes_per_s: Reading weights that are in no cache.
        operations_per_s: In float32.
    """

    bytes_per_s: float
    operations_per_s: float

    def best_us(self, cost: NodeCost) -> float:
        """The least time of a call, in microseconds."""
        return 1e6 * max(cost.bytes_moved / self.bytes_per_s, cost.operations / self.operations_per_s)

    def limit(self, cost: NodeCost, time_us: float) -> str:
        """What holds a node back: ``memory``, ``compute``, or ``overhead`` where it is neither."""
        if time_us < _OVERHEAD_US and self.best_us(cost) < 0.5 * time_us:
            return "overhead"
        memory = cost.bytes_moved / self.bytes_per_s
        return "memory" if memory >= cost.operations / self.operations_per_s else "compute"


def weight_bytes_of_nodes(model: ir.Model) -> dict[str, int]:
    """Node name to the bytes of its constants, for the nodes of a graph that have a name."""
    found: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.name:
            found[node.name] = sum(
                value.const_value.nbytes
                for value in node.inputs
                if value is not None and value.const_value is not None
            )
    return found


def node_cost(node: NodeProfile, weights: Mapping[str, int]) -> NodeCost:
    """What a node has to do, from its shapes, and from the graph where shapes do not say it.

    Kernels that keep weights in a form of their own do not show them in the profile. Their size is that in
    the graph if the node is still called as there, else what the shapes demand.

    Args:
        node: From the profile.
        weights: From ``weight_bytes_of_nodes``.
    """
    written = sum(_bytes(*out) for out in node.outputs)
    if node.op_type in _FREE:
        return NodeCost(0.0, 0.0)
    if node.op_type in _LOOKUPS:
        # Rows, not the table that they are taken from.
        return NodeCost(2.0 * written, 0.0)
    moved = float(node.bytes_touched)
    given = sum(_bytes(*one) for one in node.inputs) + written
    moved = max(moved, given)
    if not node.outputs:
        return NodeCost(moved, 0.0)
    kind, out = node.outputs[0]
    count = math.prod(out)
    operations = float(count)
    shapes = [shape for _, shape in node.inputs]
    if node.op_type in _MATRIX and shapes and out and shapes[0]:
        rows = count // out[-1] if out[-1] else 0
        inner = math.prod(shapes[0]) // rows if rows else 0
        operations = 2.0 * count * inner
        # Tiles have so many numbers, and stand behind the activations, and before what is added.
        sizes = (TILE_ROWS * inner, TILE_ROWS * inner // 2)
        behind = shapes[1:] if node.op_type == "MatMulPacked" else shapes[::-1]
        tiles = next((one for one in behind if len(one) == 3 and one[1] * one[2] in sizes), None)
        if node.op_type in PACKED_OPERATORS and tiles is not None:
            # Two rows of the weight for one number of the result where it has the gate of an MLP.
            operations = 2.0 * rows * inner * TILE_ROWS * tiles[0]
        if len(shapes) < 2 or node.op_type == "MatMulNBits":
            item = 1.0 if node.op_type in _INTEGER_WEIGHTS else item_bytes(kind)
            item = 0.5 if node.op_type in ("MatMulNBits", "MatMulBnb4") else item
            activations = _bytes(*node.inputs[0]) + written
            moved = max(moved, activations + (weights.get(node.name) or inner * out[-1] * item))
    elif node.op_type in _CONVOLUTIONS and len(out) > 1 and out[1]:
        elements: float = math.prod(shapes[1]) if len(shapes) > 1 and len(shapes[1]) > 2 else 0
        elements = elements or weights.get(node.name, 0) / item_bytes(kind)
        operations = 2.0 * count * elements / out[1]
        moved = max(moved, _bytes(*node.inputs[0]) + written + weights.get(node.name, 0))
    elif node.op_type == "GroupQueryAttention" and len(node.outputs) > 1 and len(node.outputs[1][1]) == 4:
        operations = 4.0 * count * node.outputs[1][1][2]
    elif node.op_type == "MultiHeadAttention" and shapes and shapes[0][-1:] == (3 * out[-1],):
        # Query, key and value in one.
        operations = 4.0 * count * shapes[0][-2]
    elif node.op_type == "MultiHeadAttention" and len(shapes) > 1 and len(shapes[1]) >= 3:
        operations = 4.0 * count * shapes[1][-2]
    elif node.op_type == "Attention" and len(shapes) > 0 and len(shapes[0]) == 3:
        batch, length, hidden = shapes[0]
        operations = 2.0 * batch * length * hidden * 3 * out[-1] + 4.0 * count * length
        moved = max(moved, _bytes(*node.inputs[0]) + written + weights.get(node.name, 0))
    elif node.op_type in ("LSTM", "GRU", "RNN") and shapes and len(out) == 4:
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op_type]
        operations = 2.0 * count * gates * (shapes[0][-1] + out[-1])
        moved = max(moved, _bytes(*node.inputs[0]) + written + weights.get(node.name, 0))
    return NodeCost(moved, operations)


def describe_profile(
    profile: RunProfile,
    roofs: Roofs | None,
    weights: Mapping[str, int],
    *,
    asynchronous: bool,
    compiled: Collection[str] = (),
) -> dict[str, Any]:
    """Operators and nodes by time, each against its roof.

    Args:
        profile: Of some runs.
        roofs: Of the provider; without them nothing is said of limits.
        weights: From ``weight_bytes_of_nodes``.
        asynchronous: Whether kernels return before they are done: then their times are only those of
            handing the work over, and the operators' times are the device's own where it reports them.
        compiled: Operators that are a provider's own names for parts of the graph. What they cost at best
            is not known.

    Returns:
        ``run_ms``; ``operators``, each with ``time_ms`` and ``calls`` of one run, ``share``, ``bytes``,
        ``operations``, and with roofs ``best_ms`` and ``limit``; ``nodes``, the slowest likewise; ``note``.
    """
    runs = max(profile.runs, 1)
    device = bool(profile.kernels) and asynchronous
    operators: dict[str, dict[str, float]] = {}
    nodes = []
    for node in profile.nodes:
        if device:
            own = profile.kernels_of_nodes.get(node.name, 0.0)
            node = dataclasses.replace(node, time_us=own)
        cost = NodeCost(0.0, 0.0) if node.op_type in compiled else node_cost(node, weights)
        calls = node.calls / runs
        entry = operators.setdefault(
            node.op_type, {"time_us": 0.0, "calls": 0.0, "bytes": 0.0, "operations": 0.0, "best_us": 0.0}
        )
        entry["time_us"] += node.time_us / runs
        entry["calls"] += calls
        entry["bytes"] += calls * cost.bytes_moved
        entry["operations"] += calls * cost.operations
        entry["best_us"] += calls * roofs.best_us(cost) if roofs else 0.0
        nodes.append((node, cost))
    if device:
        for op_type in profile.kernels:
            blank = {"time_us": 0.0, "calls": 0.0, "bytes": 0.0, "operations": 0.0, "best_us": 0.0}
            operators.setdefault(op_type, blank)
        for op_type, entry in operators.items():
            entry["time_us"] = profile.kernels.get(op_type, 0.0) / runs
    total = sum(entry["time_us"] for entry in operators.values()) or 1.0
    listed = [
        {
            "op_type": op_type,
            "time_ms": entry["time_us"] / 1e3,
            "share": entry["time_us"] / total,
            "calls": entry["calls"],
            **_against_roofs(entry, None if op_type in compiled else roofs),
        }
        for op_type, entry in sorted(operators.items(), key=lambda item: -item[1]["time_us"])
    ]
    timed = [pair for pair in nodes if pair[0].time_us]
    slowest = sorted(timed, key=lambda pair: -pair[0].time_us)[:_TOP_NODES]
    note = ""
    if asynchronous:
        note = (
            "times are the device's own" if device
            else "this device computes later: times are those of handing the work over"
        )  # fmt: skip
    return {
        "run_ms": profile.run_us / runs / 1e3,
        "roofs": dataclasses.asdict(roofs) if roofs else None,
        "operators": listed,
        "nodes": [
            _described(node, cost, None if node.op_type in compiled else roofs)
            for node, cost in (slowest if device or not asynchronous else ())
        ],
        "note": note,
    }


def _described(node: NodeProfile, cost: NodeCost, roofs: Roofs | None) -> dict[str, Any]:
    time_us = node.time_us / max(node.calls, 1)
    entry = {
        "time_us": time_us,
        "calls": 1.0,
        "bytes": cost.bytes_moved,
        "operations": cost.operations,
        "best_us": roofs.best_us(cost) if roofs else 0.0,
    }
    return {
        "name": node.name,
        "op_type": node.op_type,
        "provider": node.provider,
        "time_ms": time_us / 1e3,
        "inputs": [f"{kind}{list(shape)}" for kind, shape in node.inputs],
        "outputs": [f"{kind}{list(shape)}" for kind, shape in node.outputs],
        **_against_roofs(entry, roofs),
    }


def _against_roofs(entry: Mapping[str, float], roofs: Roofs | None) -> dict[str, Any]:
    seconds = entry["time_us"] / 1e6
    plain: dict[str, Any] = {
        "bytes": entry["bytes"],
        "operations": entry["operations"],
        "gb_per_s": entry["bytes"] / seconds / 1e9 if seconds else None,
        "gflop_per_s": entry["operations"] / seconds / 1e9 if seconds else None,
    }
    if roofs:
        each = max(entry["calls"], 1.0)
        cost = NodeCost(entry["bytes"] / each, entry["operations"] / each)
        plain["best_ms"] = entry["best_us"] / 1e3
        plain["of_roof"] = entry["best_us"] / entry["time_us"] if entry["time_us"] else None
        plain["limit"] = roofs.limit(cost, entry["time_us"] / each)
    return plain


def _bytes(kind: str, shape: Sequence[int]) -> float:
    return item_bytes(kind) * math.prod(shape)
