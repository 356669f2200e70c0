"""``x * sigmoid(alpha * x)`` in one node: the SiLU of decoders, the QuickGelu of CLIP."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import is_operator, label
from onnxsmith.graph_passes.rewriting import NoMatchError, rewrite_each
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["FuseSilu"]

_DOMAIN = "com.microsoft"
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class FuseSilu(GraphPass):
    """Fuses ``x * sigmoid(alpha * x)`` into QuickGelu of ONNX Runtime, which with alpha 1 is SiLU.

    The gate of SwiGLU, ``silu(gate) * up``, becomes QuickGelu and Mul: ONNX Runtime has no kernel for CPUs
    that also takes the second product.
    """

    name: ClassVar[str] = "fuse_silu"
    summary: ClassVar[str] = "fuse x * sigmoid(alpha * x), as in SwiGLU, into QuickGelu of ONNX Runtime"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Fuses in the main graph, and says at which Sigmoid nothing was fused and why."""
        changes, made = rewrite_each(model, _fuse, domain=_DOMAIN)
        if changes.count:
            changes.details = {"made": made}
        return changes


def _fuse(graph: ir.Graph, sigmoid: ir.Node) -> str | None:
    if not is_operator(sigmoid, "Sigmoid"):
        return None
    gate = sigmoid.outputs[0]
    users = gate.consumers()
    if gate.is_graph_output() or len(users) != 1 or not is_operator(users[0], "Mul"):
        raise NoMatchError("its result is not read by one Mul alone")
    product = users[0]
    if product.graph is not graph:
        raise NoMatchError("its result is read in a subgraph")
    factors = [value for value in product.inputs if value is not gate]
    source = sigmoid.inputs[0]
    if len(factors) != 1 or factors[0] is None or source is None:
        raise NoMatchError("its result is multiplied with itself")
    x, alpha = factors[0], 1.0
    if x is not source:
        scaled, alpha = _scaled(source)
        if scaled is not x:
            raise NoMatchError("it multiplies another value than the one that it is of")
    kind = x.dtype or product.outputs[0].dtype
    if kind not in _FLOATS:
        got = "not known" if kind is None else kind.name
        raise NoMatchError(f"QuickGelu has no kernel for its element type, which is {got}")
    fused = ir.node("QuickGelu", [x], {"alpha": alpha}, domain=_DOMAIN, name=f"{label(product)}_silu")
    graph.insert_before(product, fused)
    made, output = fused.outputs[0], product.outputs[0]
    made.type, made.shape = output.type or x.type, output.shape
    # The name stays, so that tensors of the two graphs can be compared.
    made.name, output.name = output.name, f"{output.name}_unfused"
    output.replace_all_uses_with(made, replace_graph_outputs=True)
    return fused.op_type


def _scaled(value: ir.Value) -> tuple[ir.Value | None, float]:
    """What a value is a constant multiple of, and the factor; None where it is none."""
    node = value.producer()
    if node is None or not is_operator(node, "Mul"):
        return None, 1.0
    for one, other in (node.inputs, node.inputs[::-1]):
        tensor = constant_of(other)
        if tensor is not None and tensor.size == 1 and len(tensor.shape) == 0:
            return one, float(tensor.numpy().item())
    return None, 1.0
