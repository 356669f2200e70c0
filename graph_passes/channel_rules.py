"""What each operator does to channels: the rules by which ``channels`` follows features through a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.channel_attention import ATTENTION_RULES
from onnxsmith.graph_passes.channel_layout import LAYOUT_RULES, constant_axes, gather, sequence_at
from onnxsmith.graph_passes.channels import ChannelGraph, constant_source, spread_over
from onnxsmith.graph_passes.matching import int_attribute
from onnxsmith.graph_passes.weights import constant_of
from onnxsmith.own_operators import PACKED_OPERATORS

__all__ = ["WITH_CONSTANTS", "follow_channels"]

Ids = npt.NDArray[np.int64]
Rule = Callable[[ChannelGraph, ir.Node], "str | None"]

_UNARY = frozenset(
    [
        "Abs",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "FastGelu",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "QuickGelu",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
        "BiasGelu",
        "CastLike",
        "IsNaN",
    ]
)
_BINARY = frozenset(
    [
        "Add",
        "And",
        "BitShift",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Mean",
        "Min",
        "Mod",
        "Mul",
        "Or",
        "PRelu",
        "Pow",
        "Sub",
        "Sum",
        "Where",
        "Xor",
    ]
)
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool", "Resize"})
_NORMS = frozenset(
    [
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "LpNormalization",
    ]
)
# Those that may have a constant with one number for each channel beside the value.
WITH_CONSTANTS = _BINARY | _NORMS | {"BiasGelu", "FastGelu", "Gemm"}


def follow_channels(model: ir.Model) -> ChannelGraph:
    """Follows the channels of all weights through the main graph."""
    graph = ChannelGraph()
    caches = {value.name for value in model.graph.inputs if _is_cache(value)}
    for value in model.graph.inputs:
        if value.name in caches:
            _cache(graph, value)
    for node in model.graph:
        _follow(graph, node)
    for value in model.graph.outputs:
        if not (value.name or "").startswith("present") or not caches:
            graph.block(graph.of(value), f"it is the output {value.name!r} of the graph")
    return graph


def _is_cache(value: ir.Value) -> bool:
    return (value.name or "").startswith("past_key_values.") and value.shape is not None


def _cache(graph: ChannelGraph, value: ir.Value) -> None:
    """A cache of (batch, heads, length, head size): the heads are followed."""
    assert value.shape is not None
    dims = list(value.shape)
    if len(dims) == 4 and isinstance(dims[1], int) and isinstance(dims[3], int):
        heads = np.repeat(graph.fresh(dims[1])[None, :, None, None], dims[3], axis=3)
        graph.put(value, heads)


def _follow(graph: ChannelGraph, node: ir.Node) -> None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    given = [graph.of(value) for value in node.inputs]
    weighted = _WEIGHTED.get(node.op_type)
    inner = [attr for attr in node.attributes.values() if attr.type == ir.AttributeType.GRAPH]
    for attribute in inner:
        for part in attribute.as_graph().all_nodes():
            for value in part.inputs:
                graph.block(graph.of(value), f"{node.op_type} reads it in a subgraph")
    if weighted is None and all(ids is None for ids in given):
        return
    rule = weighted or _RULES.get(node.op_type)
    if domain not in ("", "com.microsoft") or rule is None:
        problem: str | None = f"nothing is known of {node.op_type}"
    else:
        problem = rule(graph, node)
    if problem:
        for ids in given:
            graph.block(ids, f"{problem} ({node.name or node.op_type})")


def _unary(graph: ChannelGraph, node: ir.Node) -> None:
    graph.put(node.outputs[0], graph.of(node.inputs[0]))


def _binary(graph: ChannelGraph, node: ir.Node) -> str | None:
    values = [value for value in node.inputs if value is not None]
    followed = [(value, ids) for value in values if (ids := graph.of(value)) is not None]
    known = {id(value): ids.ndim for value, ids in followed}
    ranks = [known.get(id(value), _rank(value)) for value in values]
    if any(rank is None for rank in ranks):
        ranks = [ids.ndim for _, ids in followed]
        if any(graph.of(v) is None and constant_of(v) is None for v in values):
            return f"{node.op_type} with a value of unknown rank"
    rank = max(r for r in ranks if r is not None)
    result = _aligned(followed[0][1], rank)
    for _, ids in followed[1:]:
        other = _aligned(ids, rank)
        graph.unite(result, other)
        result = np.maximum(*np.broadcast_arrays(result, other))
    for value in values:
        # What no weight makes cannot shrink, so what it meets along an axis stays or goes as a whole.
        if graph.of(value) is None and constant_of(value) is None:
            assert value.shape is not None
            offset = rank - value.shape.rank()
            wide = [offset + i for i, dim in enumerate(value.shape) if dim != 1]
            if node.op_type in ("Add", "Sum") and spread_over(value) is not None:
                wide = [axis for axis in wide if axis != rank - 1]
            for axis in (axis for axis in wide if result.shape[axis] > 1):
                graph.unite_along(result, [axis])
    graph.put(node.outputs[0], result)
    return None


def _shape_only(_graph: ChannelGraph, _node: ir.Node) -> None:
    """Shape and Size follow what the value becomes."""


def _softmax(graph: ChannelGraph, node: ir.Node) -> None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    axis = int_attribute(node, "axis", -1)
    if ids.shape[axis] > 1:
        graph.unite_along(ids, [axis % ids.ndim])
    graph.attended(ids)
    graph.put(node.outputs[0], ids)


def _norm(graph: ChannelGraph, node: ir.Node) -> None:
    skips = 2 if node.op_type.startswith("Skip") else 1
    found = [ids for ids in map(graph.of, node.inputs[:skips]) if ids is not None]
    result = found[0]
    for ids in found[1:]:
        graph.unite(result, ids)
    axis = int_attribute(node, "axis", -1) % result.ndim
    for ids in found:
        graph.unite_along(ids, range(axis, ids.ndim))
    # The others are means and deviations; the fourth is the sum with the skip.
    for output in (*node.outputs[:1], *node.outputs[3:4]):
        graph.put(output, result)


def _reduce(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    axes = constant_axes(node, 1)
    if axes is None:
        has_axes = len(node.inputs) > 1 and node.inputs[1] is not None
        if has_axes:
            return f"{node.op_type} over axes that are not constant"
        axes = list(range(ids.ndim))
    over = [axis % ids.ndim for axis in axes]
    reduced = graph.unite_along(ids, over)
    if not int_attribute(node, "keepdims", 1):
        reduced = np.squeeze(reduced, tuple(over))
    graph.put(node.outputs[0], reduced)
    return None


def _matmul(graph: ChannelGraph, node: ir.Node) -> str | None:
    left, right = graph.of(node.inputs[0]), graph.of(node.inputs[1])
    if any(int_attribute(node, name) for name in ("transBatchA", "transBatchB", "transA")):
        return "FusedMatMul with turned axes"
    turned_b = node.op_type == "FusedMatMul" and bool(int_attribute(node, "transB"))
    found = constant_source(node.inputs[1])
    if found is not None and _is_matrix(found[0], int(found[1] ^ turned_b)):
        source, turned = found
        k_axis = int(turned ^ turned_b)
        columns = graph.side(node, 1, source, k_axis, is_input=True)
        rows = graph.side(node, 1, source, 1 - k_axis, is_input=False)
        rank = left.ndim if left is not None else _rank(node.inputs[0])
        if rank is None:
            graph.block(rows, "the rank of what it is multiplied with is not known")
            return "MatMul of a value of unknown rank"
        _read(graph, columns, left, axis=-1, where=node)
        graph.put(node.outputs[0], rows.reshape((1,) * (rank - 1) + (-1,)))
        return None
    if left is None and right is None:
        return None
    ranks = _rank(node.inputs[0]), _rank(node.inputs[1])
    rank = max(ranks[0] or 0, ranks[1] or 0)
    if min(ranks[0] or 0, ranks[1] or 0) < 2:
        return "MatMul of values of unknown rank"
    a = _aligned(left, rank)
    b = _aligned(right, rank)
    if turned_b:
        b = np.swapaxes(b, -1, -2)
    # Over k everything meets; what is left of each side is one number for each of its rows or columns.
    k = max(a.shape[-1], b.shape[-2])
    a, b = np.broadcast_to(a, (*a.shape[:-1], k)), np.broadcast_to(b, (*b.shape[:-2], k, b.shape[-1]))
    if left is not None:
        a = graph.unite_along(a, [rank - 1])
    if right is not None:
        b = graph.unite_along(b, [rank - 2])
    a, b = a[..., :1], b[..., :1, :]
    graph.unite(a, b)
    graph.put(node.outputs[0], np.maximum(*np.broadcast_arrays(a, b)))
    return None


def _is_matrix(source: ir.Value, k_axis: int) -> bool:
    """Whether a constant is a weight; one row, such as the frequencies of rotary embedding, is a table."""
    return source.shape is not None and source.shape.rank() == 2 and source.shape[k_axis] != 1


def _aligned(ids: Ids | None, rank: int) -> Ids:
    return np.full((1,) * rank, -1) if ids is None else ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else value.shape.rank()


def _read(graph: ChannelGraph, columns: Ids, given: Ids | None, *, axis: int, where: ir.Node) -> None:
    """A weight reads channels; where the value has none, its columns cannot go."""
    if given is None or given.shape[axis] != len(columns):
        graph.block(columns, f"what {where.name or where.op_type} reads is not made by a weight")
        if given is not None:
            graph.block(given, "its weight has another width")
        return
    moved = np.moveaxis(given, axis, -1)
    graph.block(columns[(moved < 0).any(tuple(range(moved.ndim - 1)))], "part of it is not made by a weight")
    graph.unite(moved, columns)


def _gemm(graph: ChannelGraph, node: ir.Node) -> str | None:
    found = constant_source(node.inputs[1])
    if found is None or int_attribute(node, "transA"):
        return "Gemm without a constant weight"
    source, turned = found
    k_axis = int(turned ^ bool(int_attribute(node, "transB")))
    columns = graph.side(node, 1, source, k_axis, is_input=True)
    rows = graph.side(node, 1, source, 1 - k_axis, is_input=False)
    _read(graph, columns, graph.of(node.inputs[0]), axis=-1, where=node)
    graph.put(node.outputs[0], rows.reshape(1, -1))
    return None


def _conv(graph: ChannelGraph, node: ir.Node) -> str | None:
    found = constant_source(node.inputs[1])
    rank = _rank(node.inputs[1])
    if found is None or found[1] or rank is None:
        return "Conv without a constant weight"
    source, group = found[0], int_attribute(node, "group", 1)
    assert source.shape is not None
    outs, ins = (int(size) for size in source.shape.numpy()[:2])
    rows = graph.side(node, 1, source, 0, is_input=False)
    given = graph.of(node.inputs[0])
    graph.put(node.outputs[0], rows.reshape((1, -1) + (1,) * (rank - 2)))
    if group == 1:
        _read(graph, graph.side(node, 1, source, 1, is_input=True), given, axis=1, where=node)
    elif ins == 1 and outs == group and given is not None and given.shape[1] == outs:
        graph.unite(given.reshape(-1), rows)
    else:
        graph.block(rows, f"Conv in {group} groups")
        return f"Conv in {group} groups"
    return None


def _embedding(graph: ChannelGraph, node: ir.Node) -> str | None:
    found = constant_source(node.inputs[0])
    index = node.inputs[1]
    if found is None or found[1] or constant_of(node.inputs[1]) is not None:
        return gather(graph, node) if graph.of(node.inputs[0]) is not None else None
    source = found[0]
    if source.shape is None or source.shape.rank() != 2 or source.dtype is None:
        return None
    if int_attribute(node, "axis") or not source.dtype.is_floating_point():
        return None
    rank = None if index is None else _rank(index)
    rows = graph.side(node, 0, source, 1, is_input=False)
    if rank is None:
        graph.block(rows, "an embedding of indices of unknown rank")
        return None
    graph.put(node.outputs[0], rows.reshape((1,) * rank + (-1,)))
    return None


def _batch_norm(graph: ChannelGraph, node: ir.Node) -> None:
    graph.put(node.outputs[0], graph.of(node.inputs[0]))


def _quantized(graph: ChannelGraph, node: ir.Node) -> str:
    return f"{node.op_type} has a quantized weight; prune before quantization"


def _packed(graph: ChannelGraph, node: ir.Node) -> str:
    return f"{node.op_type} has its weight in tiles; prune before the pass that makes it"


_WEIGHTED: Mapping[str, Rule] = MappingProxyType(
    {
        "Conv": _conv,
        "FusedMatMul": _matmul,
        "Gather": _embedding,
        "Gemm": _gemm,
        "MatMul": _matmul,
        "SequenceAt": sequence_at,
        "Attention": ATTENTION_RULES["Attention"],
    }
)
_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(_UNARY, _unary),
        **dict.fromkeys(_BINARY, _binary),
        **dict.fromkeys(_POOLS, _unary),
        **dict.fromkeys(_NORMS, _norm),
        **{
            f"Reduce{kind}": _reduce
            for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
        },
        "BatchNormalization": _batch_norm,
        "LogSoftmax": _softmax,
        "MatMulNBits": _quantized,
        **dict.fromkeys(PACKED_OPERATORS, _packed),
        "Shape": _shape_only,
        "Size": _shape_only,
        "Softmax": _softmax,
        **LAYOUT_RULES,
        **ATTENTION_RULES,
    }
)
