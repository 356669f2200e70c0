"""Weights of operators that have no form in blocks: turned into ones that have, or named with the reason."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxsmith.graph_passes.matching import int_attribute, is_operator, label
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["open_gemm", "other_weights"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_SMALLEST_BLOCK = 16
# Operator to the number of the input that is its weight.
_OTHERS: Mapping[str, int] = {"Conv": 1, "ConvTranspose": 1, "LSTM": 1, "GRU": 1, "RNN": 1, "Gemm": 1}


def open_gemm(model: ir.Model) -> int:
    """Writes each Gemm with a constant weight that blocks can hold as MatMul and Add, which is the same.

    Args:
        model: Changed in place, the main graph only.

    Returns:
        How many.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        if not is_operator(node, "Gemm") or _gemm_refusal(node):
            continue
        left, weight = node.inputs[0], node.inputs[1]
        assert left is not None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        result = node.outputs[0]
        name, kind, shape = label(node), result.type or left.type, result.shape
        if int_attribute(node, "transB"):
            turn = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}_turned")
            graph.insert_before(node, turn)
            turn.outputs[0].name, weight = f"{name}_turned", turn.outputs[0]
        # Under its own name, which patterns of users may have.
        product = ir.node("MatMul", [left, weight], name=name)
        graph.insert_before(node, product)
        made = product.outputs[0]
        made.name, made.type, made.shape = f"{name}_product", kind, shape
        if bias is not None:
            total = ir.node("Add", [made, bias], name=f"{name}_bias")
            graph.insert_before(node, total)
            made = total.outputs[0]
            made.name, made.type, made.shape = f"{name}_sum", kind, shape
        wanted = result.name
        result.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        made.name = wanted
        count += 1
    return count


def _gemm_refusal(node: ir.Node) -> str:
    weight = node.inputs[1]
    tensor = constant_of(weight)
    if tensor is None or weight is None or not weight.is_initializer():
        return "Gemm with a weight that is no initializer"
    if tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
        return f"Gemm with a weight of {tensor.dtype.name}; expected FLOAT or FLOAT16"
    inner = tensor.shape.numpy()[1 if int_attribute(node, "transB") else 0]
    if inner % _SMALLEST_BLOCK:
        return f"Gemm with rows of {inner}, which are no multiple of {_SMALLEST_BLOCK}"
    if int_attribute(node, "transA"):
        return "Gemm that turns its first operand"
    for key in ("alpha", "beta"):
        attribute = node.attributes.get(key)
        if attribute is not None and attribute.as_float() != 1.0:
            return f"Gemm with {key} {attribute.as_float():g}"
    return ""


def other_weights(model: ir.Model) -> dict[str, str]:
    """Nodes with constant float weights that no operator computes with in blocks, and why they stay."""
    found: dict[str, str] = {}
    for node in model.graph.all_nodes():
        place = _OTHERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if place is None or len(node.inputs) <= place:
            continue
        tensor = constant_of(node.inputs[place])
        if tensor is None or tensor.dtype not in _FLOATS:
            continue
        if node.op_type == "Gemm":
            found[label(node)] = _gemm_refusal(node) or "it is in a subgraph or function"
        else:
            found[label(node)] = f"ONNX Runtime has no {node.op_type} with weights in blocks"
    return found
