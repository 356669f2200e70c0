"""What is slow or wrong in graphs on 8 bit integers: see ``findings``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.finding import Finding
from onnxsmith.graph_passes.integer_repairs import unfused_nodes
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.weights import constant_of

if TYPE_CHECKING:
    from onnxsmith.graph_passes.findings import Target

__all__ = ["per_tensor", "saturating_integers", "unfused_qdq"]

_FEW = 5
# Operator -> where its weight, its scale and its zero point are.
_WEIGHTS: Mapping[str, tuple[int, int]] = {
    "DequantizeLinear": (0, 1),
    "DynamicQuantizeMatMul": (1, 2),
    "MatMulIntegerToFloat": (1, 3),
    "QGemm": (3, 4),
    "QLinearConv": (3, 4),
    "QLinearMatMul": (3, 4),
}
# A row that uses less than this of the range of the codes has lost more than two of its eight bits.
_USED = 0.25
_ROWS = 0.05
# Kernels that add pairs of products in 16 bits, without VNNI.
_PAIRED = frozenset(
    {
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)


def unfused_qdq(model: ir.Model, target: Target) -> Iterator[Finding]:
    """QuantizeLinear and DequantizeLinear that ran as such: what is between them computed in floats."""
    if target.executed is None:
        return
    found = unfused_nodes(model, target.executed)
    if not found:
        return
    weights = [node for node in found if constant_of(node.inputs[0]) is not None]
    parts = []
    if weights:
        parts.append(f"{len(weights)} weights are dequantized in each run")
    if len(found) > len(weights):
        parts.append(f"{len(found) - len(weights)} activations are rounded and turned back")
    yield Finding(
        "unfused_qdq",
        "slow",
        " and ".join(parts),
        f"{target.provider} found no integer kernel for what reads them, which then computes in floats",
        "dequantize these weights once and leave the other pairs out, or quantize the float model again with "
        "quantize_static, which writes what fuses",
        tuple(label(node) for node in found[:_FEW]),
        len(found),
        (("remove_unfused_qdq", {"nodes": tuple(node.name or "" for node in found)}),),
    )


def per_tensor(model: ir.Model, target: Target) -> Iterator[Finding]:
    """8 bit weights with one scale for all rows, though they differ so much that some lost their digits."""
    worst: list[tuple[float, str]] = []
    for node in model.graph.all_nodes():
        codes = _shared_scale(node)
        if codes is None:
            continue
        used = _range_used(node, codes)
        if float((used < _USED).mean()) > _ROWS:
            worst.append((float(used.min()), label(node)))
    if not worst:
        return
    worst.sort()
    yield Finding(
        "per_tensor",
        "wrong",
        f"{len(worst)} weights share one scale between rows that differ, down to {worst[0][0]:.1%} of it",
        "such a row is left with a few of the 256 steps, and what was rounded away is lost",
        "quantize the float model again with a scale for each row, the default of quantize_dynamic and "
        "quantize_static",
        tuple(name for _, name in worst[:_FEW]),
        len(worst),
    )


def _shared_scale(node: ir.Node) -> npt.NDArray[Any] | None:
    """The codes of a weight less their zero point, where one scale is for all of them; else None."""
    places = _WEIGHTS.get(node.op_type)
    if places is None or len(node.inputs) <= max(places):
        return None
    codes, scale = (constant_of(node.inputs[place]) for place in places)
    if codes is None or scale is None or scale.size != 1 or len(codes.shape) < 2:
        return None
    if codes.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) or codes.size < 1024:
        return None
    array = codes.numpy().astype(np.int16)
    place = places[1] + 1
    zero = constant_of(node.inputs[place]) if len(node.inputs) > place else None
    return array - (int(zero.numpy().reshape(-1)[0]) if zero is not None and zero.size else 0)


def _range_used(node: ir.Node, codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The share of the range that the largest code of each output channel takes."""
    first = node.op_type == "QLinearConv" or (codes.ndim > 2) or _is_transposed(node)
    axes = tuple(range(1, codes.ndim)) if first else tuple(range(codes.ndim - 1))
    used: npt.NDArray[np.float64] = np.abs(codes).max(axes) / max(int(np.abs(codes).max()), 1)
    return used


def _is_transposed(node: ir.Node) -> bool:
    """Whether a Gemm or a Gather reads what a DequantizeLinear gives by its rows."""
    readers = [node] if node.op_type != "DequantizeLinear" else [u.node for u in node.outputs[0].uses()]
    for reader in readers:
        attribute = reader.attributes.get("transB")
        if reader.op_type == "Gather" or (attribute is not None and attribute.as_int()):
            return True
    return False


def saturating_integers(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Integer products on an x86 processor without VNNI: sums of two products do not fit into 16 bits."""
    if not target.is_cpu or "avx2" not in target.features or any("vnni" in f for f in target.features):
        return
    found = [node for node in model.graph.all_nodes() if _may_saturate(node)]
    if not found:
        return
    yield Finding(
        "saturating_integers",
        "wrong",
        f"{len(found)} integer products use all 8 bits of their weights, and this processor has no VNNI",
        "its kernels add two products in 16 bits and cut off what does not fit, without an error",
        "quantize the float model again with reduce_range: true, which keeps weights to 7 bits",
        tuple(label(node) for node in found[:_FEW]),
        len(found),
    )


def _may_saturate(node: ir.Node) -> bool:
    if node.op_type not in _PAIRED:
        return False
    place = _WEIGHTS.get(node.op_type, (1, 2))[0]
    codes = constant_of(node.inputs[place]) if len(node.inputs) > place else None
    if codes is None or codes.dtype != ir.DataType.INT8:
        return False
    array = codes.numpy()
    return int(array.max(initial=0)) > 64 or int(array.min(initial=0)) < -64
