"""Attention with its projection inside, opened so that the projection can be quantized."""

from __future__ import annotations

import json
from collections.abc import Container

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.integer_operators import GraphWriter
from onnxsmith.graph_passes.weights import PACKED_FROM, constant_of
from onnxsmith.onnx_file import drop_pages

__all__ = ["open_attention", "why_closed"]

_DOMAIN = "com.microsoft"
# Of Attention, and MultiHeadAttention has them too.
_ATTRIBUTES = ("num_heads", "mask_filter_value", "scale", "unidirectional")


def open_attention(
    model: ir.Model, *, apart: bool = False, among: Container[ir.Node] | None = None
) -> dict[str, str]:
    """Writes each Attention as MatMul and MultiHeadAttention, which compute the same.

    ONNX Runtime's Attention multiplies with a packed weight of its own, in float. As a MatMul that weight can
    be quantized.

    Args:
        model: Changed in place.
        apart: A MatMul for each of query, key and value; else one with a Split. On eight rows of 128 tokens
            of MiniLM with integer weights, the Split took 3 % of the whole.
        among: The nodes to open; all by default.

    Returns:
        For each Attention that stays, why.
    """
    kept: dict[str, str] = {}
    writer = GraphWriter(model)
    for node in list(model.graph):
        if (node.domain, node.op_type) != (_DOMAIN, "Attention") or (among is not None and node not in among):
            continue
        reason = why_closed(node)
        if reason:
            kept[node.name or f"Attention of {node.outputs[0].name!r}"] = reason
            continue
        inputs = [*node.inputs, *[None] * 6]
        _, _, bias, mask, _, attention_bias = inputs[:6]
        parts = (_apart if apart else _in_one)(writer, node)
        attributes = {key: node.attributes[key].value for key in _ATTRIBUTES if key in node.attributes}
        (result,) = writer.add(
            node, "MultiHeadAttention", [*parts, bias, mask, attention_bias], f"{_name(node)}_heads",
            (_type(node),), attributes=attributes, domain=_DOMAIN,
        )  # fmt: skip
        writer.replace(node, result)
    return kept


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or "attention"


def _type(node: ir.Node) -> ir.DataType:
    return node.outputs[0].dtype or ir.DataType.FLOAT


def _shape(x: ir.Value | None, columns: int) -> ir.Shape | None:
    return None if x is None or x.shape is None else ir.Shape([*list(x.shape)[:-1], columns])


def _in_one(writer: GraphWriter, node: ir.Node) -> list[ir.Value]:
    """Query, key and value, without the bias, as a MatMul and a Split."""
    x, weight = node.inputs[:2]
    tensor = constant_of(weight)
    assert tensor is not None
    (packed,) = writer.add(node, "MatMul", [x, weight], f"{_name(node)}_projection", (_type(node),))
    packed.shape = _shape(x, int(tensor.shape.numpy()[1]))
    # Before opset 18, three outputs of equal size were what Split did by itself.
    split = {"axis": -1} | ({"num_outputs": 3} if writer.graph.opset_imports.get("", 0) >= 18 else {})
    parts = writer.add(node, "Split", [packed], f"{_name(node)}_split", (_type(node),) * 3, attributes=split)
    for part in parts:
        part.shape = _shape(x, int(tensor.shape.numpy()[1]) // 3)
    return parts


def _apart(writer: GraphWriter, node: ir.Node) -> list[ir.Value]:
    """Query, key and value, each as a MatMul with its part of the weight."""
    x, weight = node.inputs[:2]
    tensor = constant_of(weight)
    assert weight is not None and tensor is not None
    columns = int(tensor.shape.numpy()[1]) // 3
    origins = json.loads(weight.metadata_props.get(PACKED_FROM, "[]"))
    names = origins if len(origins) == 3 else [f"{weight.name}_{part}" for part in ("query", "key", "value")]
    results = []
    for number, (part, name) in enumerate(zip(("query", "key", "value"), names, strict=True)):
        piece = _columns_of(writer, tensor, slice(number * columns, (number + 1) * columns), name)
        (result,) = writer.add(node, "MatMul", [x, piece], f"{_name(node)}_{part}", (_type(node),))
        result.shape = _shape(x, columns)
        results.append(result)
    return results


def _columns_of(writer: GraphWriter, tensor: ir.TensorProtocol, columns: slice, wanted: str) -> ir.Value:
    """A new initializer with some columns of a weight, read when they are asked for."""
    name = writer.name(wanted)
    shape = ir.Shape([int(tensor.shape.numpy()[0]), columns.stop - columns.start])

    def compute() -> ir.TensorProtocol:
        part = np.ascontiguousarray(tensor.numpy()[:, columns])
        drop_pages(tensor)
        return ir.Tensor(part, dtype=tensor.dtype, name=name)

    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
    value.const_value = ir.LazyTensor(compute, dtype=tensor.dtype, shape=shape, name=name)
    writer.graph.register_initializer(value)
    return value


def why_closed(node: ir.Node) -> str:
    """Why an Attention cannot be written as MatMul and MultiHeadAttention; empty where it can."""
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
