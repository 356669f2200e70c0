"""Attention with its projection inside, opened so that the projection can be quantized."""

from __future__ import annotations

import onnx_ir as ir

from onnxsmith.graph_passes.integer_operators import GraphWriter
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["open_attention"]

_DOMAIN = "com.microsoft"
# Of Attention, and MultiHeadAttention has them too.
_ATTRIBUTES = ("num_heads", "mask_filter_value", "scale", "unidirectional")


def open_attention(model: ir.Model) -> dict[str, str]:
    """Writes each Attention as MatMul, Split and MultiHeadAttention, which compute the same.

    ONNX Runtime's Attention multiplies with a packed weight of its own, in float. As a MatMul that weight can
    be quantized.

    Returns:
        For each Attention that stays, why.
    """
    kept: dict[str, str] = {}
    writer = GraphWriter(model)
    # Before opset 18, three outputs of equal size were what Split did by itself.
    split = {"axis": -1} | ({"num_outputs": 3} if model.opset_imports.get("", 0) >= 18 else {})
    for node in list(model.graph):
        if (node.domain, node.op_type) != (_DOMAIN, "Attention"):
            continue
        reason = _reason(node)
        if reason:
            kept[node.name or f"Attention of {node.outputs[0].name!r}"] = reason
            continue
        inputs = [*node.inputs, *[None] * 6]
        x, weight, bias, mask, _, attention_bias = inputs[:6]
        dtype = node.outputs[0].dtype or ir.DataType.FLOAT
        name = node.name or node.outputs[0].name or "attention"
        (packed,) = writer.add(node, "MatMul", [x, weight], f"{name}_projection", (dtype,))
        rank = x.shape if x is not None else None
        if rank is not None and weight is not None and weight.shape is not None:
            packed.shape = ir.Shape([*list(rank)[:-1], weight.shape[1]])
        parts = writer.add(node, "Split", [packed], f"{name}_split", (dtype,) * 3, attributes=split)
        attributes = {key: node.attributes[key].value for key in _ATTRIBUTES if key in node.attributes}
        (result,) = writer.add(
            node, "MultiHeadAttention", [*parts, bias, mask, attention_bias], f"{name}_heads", (dtype,),
            attributes=attributes, domain=_DOMAIN,
        )  # fmt: skip
        writer.replace(node, result)
    return kept


def _reason(node: ir.Node) -> str:
    inputs = [*node.inputs, *[None] * 7]
    weight, mask = constant_of(inputs[1]), inputs[3]
    if weight is None or len(weight.shape) != 2:
        return "Attention without a constant weight"
    if inputs[4] is not None or inputs[6] is not None or len(node.outputs) > 1:
        return "Attention with a cache"
    sizes = node.attributes.get("qkv_hidden_sizes")
    if sizes is not None and len(set(sizes.as_ints())) != 1:
        return "Attention whose query, key and value differ in width"
    rotary = node.attributes.get("do_rotary")
    if rotary is not None and rotary.as_int():
        return "Attention with a rotary embedding inside"
    if mask is not None and (mask.shape is None or mask.shape.rank() != 2):
        return "Attention whose mask is not known to have two axes"
    return ""
