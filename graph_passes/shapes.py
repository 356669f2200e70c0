"""Shapes and element types of all values, through operators of ONNX Runtime too; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.folding import node_inference
from onnxsmith.graph_passes.matching import Axes, axes_of, input_of, int_attribute
from onnxsmith.own_operators import OWN_DOMAIN

__all__ = ["InferShapes", "infer_shapes"]

_DEFAULT_DOMAINS = ("", "ai.onnx")
_Result = tuple[ir.DataType | None, Axes | None]


class InferShapes(GraphPass):
    """Infers shapes and element types node by node, and keeps what is known already.

    ``onnx.shape_inference`` knows nothing of what follows an operator that is not ONNX's, and takes no model
    over 2 GB. Here operators of ONNX Runtime have rules of their own, and weights are not read.
    """

    name: ClassVar[str] = "infer_shapes"
    summary: ClassVar[str] = "infer shapes and element types, through operators of ONNX Runtime too"

    def apply(self, model: ir.Model) -> Changes:
        """Infers them in the main graph and its subgraphs."""
        before = _unknown(model)
        learned = infer_shapes(model)
        after = _unknown(model)
        return Changes(learned, {"values": learned, "unknown_before": before, "unknown_after": after})


def infer_shapes(model: ir.Model) -> int:
    """Infers shapes and types; gives the number of values about which something was learned."""
    return _visit(model.graph, node_inference(model))


def _unknown(model: ir.Model) -> int:
    values = [value for node in model.graph.all_nodes() for value in node.outputs if value.name]
    return sum(value.shape is None or value.dtype is None for value in values)


def _visit(graph: ir.Graph, infer: Callable[[ir.Node], None]) -> int:
    learned = 0
    for node in graph:
        before = [(value.dtype, axes_of(value)) for value in node.outputs]
        bodies = list(_subgraphs(node))
        if bodies:
            learned += sum(_visit(body, infer) for body in bodies)
            found = _from_bodies(node, bodies)
        elif (node.domain, node.op_type) in _RULES:
            found = _RULES[node.domain, node.op_type](node)
        else:
            infer(node)
            found = []
        for value, result in zip(node.outputs, found, strict=False):
            _learn(value, result)
        learned += before != [(value.dtype, axes_of(value)) for value in node.outputs]
    return learned


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _from_bodies(node: ir.Node, bodies: Sequence[ir.Graph]) -> list[_Result]:
    """If gives what both branches give; of Loop and Scan only the types are those of their bodies."""
    if node.op_type != "If" or node.domain not in _DEFAULT_DOMAINS:
        kept = bodies[0].outputs[1:] if node.op_type == "Loop" else bodies[0].outputs
        return [(value.dtype, None) for value in kept]
    results: list[_Result] = []
    for one, other in zip(bodies[0].outputs, bodies[-1].outputs, strict=True):
        left, right = axes_of(one), axes_of(other)
        axes = None
        if left is not None and right is not None and len(left) == len(right):
            axes = tuple(a if a == b else None for a, b in zip(left, right, strict=True))
        results.append((one.dtype or other.dtype, axes))
    return results


def _learn(value: ir.Value, result: _Result) -> None:
    kind, axes = result
    if value.dtype is None and kind is not None:
        value.type = ir.TensorType(kind)
    if axes is None:
        return
    known = axes_of(value)
    if known is None:
        value.shape = ir.Shape(axes)
    elif len(known) == len(axes):
        # A size says more than a name, and a name more than nothing.
        pairs = zip(known, axes, strict=True)
        merged = [
            new if old is None or isinstance(new, int) > isinstance(old, int) else old for old, new in pairs
        ]
        if tuple(merged) != known:
            value.shape = ir.Shape(merged)


def _better(old: int | str | None, new: int | str | None) -> int | str | None:
    if old is None or (isinstance(old, str) and isinstance(new, int)):
        return new
    return old


def _type(node: ir.Node, index: int = 0) -> ir.DataType | None:
    value = input_of(node, index)
    return value.dtype if value is not None else None


def _like_first(node: ir.Node) -> list[_Result]:
    return [(_type(node), axes_of(node.inputs[0]))]


def _skip_norm(node: ir.Node) -> list[_Result]:
    whole = (_type(node), axes_of(node.inputs[0]))
    return [whole, (None, None), (None, None), whole]


def _columns(node: ir.Node) -> list[_Result]:
    """MatMulNBits: the last axis becomes N."""
    axes = axes_of(node.inputs[0])
    return [(_type(node), None if not axes else (*axes[:-1], int_attribute(node, "N")))]


def _packed_columns(node: ir.Node) -> list[_Result]:
    """MatMulPacked: the last axis becomes N, or half of it with the gate of an MLP."""
    axes, rows, gate = axes_of(node.inputs[0]), int_attribute(node, "N"), node.attributes.get("activation")
    whole = gate is None or gate.as_string() == "none" or not int_attribute(node, "gated", 1)
    width = rows if whole else rows // 2
    return [(_type(node), None if not axes else (*axes[:-1], width))]


def _norm_packed(node: ir.Node) -> list[_Result]:
    return [*_packed_columns(node), (_type(node), axes_of(node.inputs[0]))]


def _packed_rows(node: ir.Node) -> list[_Result]:
    ids = axes_of(node.inputs[0])
    return [(ir.DataType.FLOAT, None if ids is None else (*ids, int_attribute(node, "K")))]


def _fused_matmul(node: ir.Node) -> list[_Result]:
    left, right = axes_of(node.inputs[0]), axes_of(node.inputs[1])
    flags = ("transA", "transBatchA", "transBatchB")
    if not left or not right or any(int_attribute(node, flag) for flag in flags):
        return [(_type(node), None)]
    if len(right) != 2 and (len(right) != len(left) or len(left) < 2):
        return [(_type(node), None)]
    batch = (
        left[:-2]
        if len(right) == 2
        else [_broadcast(*pair) for pair in zip(left[:-2], right[:-2], strict=True)]
    )
    return [(_type(node), (*batch, *left[-2:-1], right[-2 if int_attribute(node, "transB") else -1]))]


def _broadcast(left: int | str | None, right: int | str | None) -> int | str | None:
    if left == right or right == 1:
        return left
    return right if left == 1 else None


def _gather_blocks(node: ir.Node) -> list[_Result]:
    data, indices = axes_of(node.inputs[0]), axes_of(node.inputs[1])
    kind = _type(node, 2)
    if data is None or indices is None or len(data) != 2 or int_attribute(node, "gather_axis"):
        return [(kind, None)]
    width = data[1]
    if isinstance(width, int) and _type(node) is ir.DataType.UINT8:
        width = width * 8 // int_attribute(node, "bits", 4)
    return [(kind, (*indices, width))]


def _grouped_attention(node: ir.Node) -> list[_Result]:
    kind, query, past = _type(node), axes_of(node.inputs[0]), axes_of(input_of(node, 3))
    heads, kv_heads = int_attribute(node, "num_heads"), int_attribute(node, "kv_num_heads")
    if query is not None and input_of(node, 1) is None:
        # Query, key and value in one.
        width = query[-1]
        parts = heads + 2 * kv_heads
        query = (*query[:-1], width // parts * heads if isinstance(width, int) and parts else None)
    cache: Axes | None = None
    if query is not None:
        size = query[-1] // heads if isinstance(query[-1], int) and heads else None
        cache = (query[0], kv_heads or None, None, past[3] if past and len(past) == 4 else size)
    kept = _type(node, 3) or kind
    return [(kind, query), (kept, cache), (kept, cache)]


def _multi_head_attention(node: ir.Node) -> list[_Result]:
    query, value = axes_of(node.inputs[0]), axes_of(input_of(node, 2))
    if query is not None and len(query) == 3 and input_of(node, 1) is None:
        # Query, key and value in one, which only the own kernel takes with three axes.
        return [(_type(node), (*query[:2], query[2] // 3 if isinstance(query[2], int) else None))]
    if query is None or value is None or len(query) != 3 or len(value) != 3:
        return [(_type(node), None)]
    return [(_type(node), (*query[:2], value[2]))]


def _attention(node: ir.Node) -> list[_Result]:
    rows, weight = axes_of(node.inputs[0]), axes_of(node.inputs[1])
    sizes = node.attributes.get("qkv_hidden_sizes")
    width: int | str | None = None
    if sizes is not None:
        width = sizes.as_ints()[2]
    elif weight is not None and isinstance(weight[-1], int):
        width = weight[-1] // 3
    return [(_type(node), None if rows is None else (*rows[:2], width))]


_CONTRIB = "com.microsoft"
# Operator -> what is known of its results. Those of ONNX Runtime have no schema outside of it.
_RULES: Mapping[tuple[str, str], Callable[[ir.Node], list[_Result]]] = {
    # Registered in ONNX's own domain, and so in no version of ONNX.
    ("", "SimplifiedLayerNormalization"): _like_first,
    **{
        (_CONTRIB, name): _like_first
        for name in ("BiasAdd", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding")
    },
    (_CONTRIB, "SkipLayerNormalization"): _skip_norm,
    (_CONTRIB, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (_CONTRIB, "MatMulNBits"): _columns,
    (_CONTRIB, "FusedMatMul"): _fused_matmul,
    (_CONTRIB, "GatherBlockQuantized"): _gather_blocks,
    (_CONTRIB, "GroupQueryAttention"): _grouped_attention,
    (_CONTRIB, "MultiHeadAttention"): _multi_head_attention,
    (_CONTRIB, "Attention"): _attention,
    (OWN_DOMAIN, "MatMulPacked"): _packed_columns,
    (OWN_DOMAIN, "NormMatMulPacked"): _norm_packed,
    (OWN_DOMAIN, "GroupQueryAttention"): _grouped_attention,
    (OWN_DOMAIN, "MultiHeadAttention"): _multi_head_attention,
    (OWN_DOMAIN, "GatherPacked"): _packed_rows,
}  # fmt: skip
