"""What ONNX Runtime's and ONNX's attention operators do to channels: a head is one unit, with its group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.channels import ChannelGraph, constant_source
from onnxsmith.graph_passes.matching import int_attribute

__all__ = ["ATTENTION_RULES", "rotary_heads"]

Ids = npt.NDArray[np.int64]


def _group_query(graph: ChannelGraph, node: ir.Node) -> str | None:
    heads, kv_heads = int_attribute(node, "num_heads"), int_attribute(node, "kv_num_heads")
    inputs = [*node.inputs, *[None] * 16]
    query, key, value = (graph.of(v) for v in inputs[:3])
    if query is None or not heads or not kv_heads or heads % kv_heads:
        return "GroupQueryAttention whose heads are not known"
    if inputs[1] is None:
        size = query.shape[-1] // (heads + 2 * kv_heads)
        query, key, value = np.split(query, [heads * size, (heads + kv_heads) * size], -1)
    if key is None or value is None or query.shape[-1] % heads:
        return "GroupQueryAttention whose key or value is not made by a weight"
    size = query.shape[-1] // heads
    if key.shape[-1] != kv_heads * size or value.shape[-1] != kv_heads * size:
        return "GroupQueryAttention whose widths do not fit its heads"
    parts = [ids.reshape(kv_heads, -1) for ids in (query, key, value)]
    caches = [graph.of(v) for v in inputs[3:5]]
    if any(ids is None and v is not None for ids, v in zip(caches, inputs[3:5], strict=True)):
        return "GroupQueryAttention with a cache that is not an input past_key_values of the graph"
    parts += [ids.reshape(kv_heads, -1) for ids in caches if ids is not None]
    problem = _of_heads(graph, node, (10, *range(5, 10), 11))
    if problem:
        return problem
    roots = _unite_heads(graph, parts)
    graph.put(node.outputs[0], np.repeat(roots, heads // kv_heads * size).reshape(1, 1, -1))
    for output in node.outputs[1:3]:
        graph.put(output, np.repeat(roots[None, :, None, None], size, axis=3))
    return None


def _of_heads(graph: ChannelGraph, node: ir.Node, positions: Sequence[int]) -> str | None:
    """Why an operand that is added to the scores (the first position) or another one keeps the heads."""
    for number, position in enumerate(positions):
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is None:
            continue
        if graph.of(value) is not None:
            return f"{node.op_type} with channels in input {position}"
        dims = None if value.shape is None else list(value.shape)
        if number == 0 and (dims is None or (len(dims) == 4 and dims[1] != 1)):
            return f"{node.op_type} with a bias of its own for each head"
    return None


def _unite_heads(graph: ChannelGraph, parts: list[Ids]) -> Ids:
    """Unites each head's (first axis) channels in all parts; gives one channel for each."""
    roots = [graph.unite_all(*(part[head] for part in parts)) for head in range(len(parts[0]))]
    found = np.array(roots)
    graph.attended(found)
    return found


def _multi_head(graph: ChannelGraph, node: ir.Node) -> str | None:
    heads = int_attribute(node, "num_heads")
    inputs = [*node.inputs, *[None] * 10]
    found = [graph.of(v) for v in inputs[:3]]
    if not heads or any(ids is None or ids.ndim not in (3, 4) for ids in found):
        return "MultiHeadAttention whose query, key and value are not all made by weights"
    if any(v is not None for v in inputs[8:10]):
        return "MultiHeadAttention with a shared buffer"
    problem = _of_heads(graph, node, (5, 3, 4))
    if problem:
        return problem
    caches = [graph.of(v) for v in inputs[6:8]]
    if any(ids is None and v is not None for ids, v in zip(caches, inputs[6:8], strict=True)):
        return "MultiHeadAttention with a cache that is not an input past_key_values of the graph"
    # (batch, positions, heads * size) or (batch, heads, positions, size).
    parts = [
        ids.reshape(heads, -1) if ids.ndim == 3 else ids.swapaxes(0, 1).reshape(heads, -1)
        for ids in (*found, *caches)
        if ids is not None
    ]
    roots = _unite_heads(graph, parts)
    graph.put(node.outputs[0], np.repeat(roots, parts[2].shape[1]).reshape(1, 1, -1))
    for output, part in zip(node.outputs[1:3], parts[1:3], strict=False):
        graph.put(output, np.repeat(roots[None, :, None, None], part.shape[1], axis=3))
    return None


def _attention(graph: ChannelGraph, node: ir.Node) -> str | None:
    return _packed(graph, node) if node.domain == "com.microsoft" else _onnx_attention(graph, node)


def _packed(graph: ChannelGraph, node: ir.Node) -> str | None:
    """ONNX Runtime's Attention, which has the projections' weight inside."""
    heads = int_attribute(node, "num_heads")
    found = constant_source(node.inputs[1])
    inputs = [*node.inputs, *[None] * 8]
    if found is None or found[1] or not heads:
        return "Attention without a constant weight"
    sizes = node.attributes.get("qkv_hidden_sizes")
    if inputs[4] is not None or len(node.outputs) > 1:
        return "Attention with a cache"
    if sizes is not None and len(set(sizes.as_ints())) != 1:
        return "Attention whose query, key and value differ in width"
    problem = _of_heads(graph, node, (5, 2, 3))
    if problem:
        return problem
    rows = graph.side(node, 1, found[0], 1, is_input=False)
    columns = graph.side(node, 1, found[0], 0, is_input=True)
    given = graph.of(node.inputs[0])
    if given is None or given.shape[-1] != len(columns):
        graph.block(columns, "what Attention reads is not made by a weight")
    else:
        graph.unite(given, columns)
    if len(rows) % (3 * heads):
        graph.block(rows, "Attention whose width does not fit its heads")
        return None
    size = len(rows) // (3 * heads)
    roots = _unite_heads(graph, [part.reshape(heads, size) for part in np.split(rows, 3)])
    graph.put(node.outputs[0], np.repeat(roots, size).reshape(1, 1, -1))
    return None


def _onnx_attention(graph: ChannelGraph, node: ir.Node) -> str | None:
    found = [graph.of(v) for v in node.inputs[:3]]
    if any(ids is None for ids in found):
        return "Attention whose query, key or value is not made by a weight"
    query, key, value = (ids for ids in found if ids is not None)
    if query.ndim == 4:
        heads, kv_heads = query.shape[1], key.shape[1]
        parts = [ids.swapaxes(0, 1).reshape(ids.shape[1], -1) for ids in (query, key, value)]
    else:
        heads, kv_heads = int_attribute(node, "q_num_heads"), int_attribute(node, "kv_num_heads")
        parts = []
    if not heads or not kv_heads or heads % kv_heads:
        return "Attention whose heads are not known"
    parts = parts or [ids.reshape(n, -1) for ids, n in ((query, heads), (key, kv_heads), (value, kv_heads))]
    size = parts[2].shape[1]
    parts[0] = parts[0].reshape(kv_heads, -1)
    caches = [(v, graph.of(v)) for v in [*node.inputs, *[None] * 6][4:6]]
    if any(v is not None and ids is None for v, ids in caches):
        return "Attention with a cache that is not an input past_key_values of the graph"
    parts += [ids.reshape(kv_heads, -1) for _, ids in caches if ids is not None]
    problem = _of_heads(graph, node, (3,))
    if problem:
        return problem
    roots = _unite_heads(graph, parts)
    each = np.repeat(roots, heads // kv_heads)
    shape = (1, heads, 1, size) if query.ndim == 4 else (1, 1, heads * size)
    graph.put(node.outputs[0], np.repeat(each, size).reshape(shape))
    for output in node.outputs[1:3]:
        graph.put(output, np.repeat(roots[None, :, None, None], size, axis=3))
    return None


def _rotary(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    if any(graph.of(value) is not None for value in node.inputs[1:]):
        return "RotaryEmbedding with channels in its angles"
    heads = rotary_heads(node, ids)
    if heads is None:
        return "RotaryEmbedding whose heads are not known"
    if ids.ndim == 4:
        graph.unite_along(ids, [3])
    else:
        graph.unite_along(ids.reshape(heads, -1), [1])
    graph.put(node.outputs[0], ids)
    return None


def rotary_heads(node: ir.Node, ids: Ids) -> int | None:
    """How many heads a RotaryEmbedding of three axes sees."""
    if ids.ndim == 4:
        return int(ids.shape[1])
    heads = int_attribute(node, "num_heads")
    if heads:
        return heads
    position = 2 if node.domain == "com.microsoft" else 1
    angles = node.inputs[position]
    dims = None if angles is None or angles.shape is None else list(angles.shape)
    if int_attribute(node, "rotary_embedding_dim") or not dims or not isinstance(dims[-1], int):
        return None
    size = 2 * dims[-1]
    return int(ids.shape[-1]) // size if ids.shape[-1] % size == 0 else None


ATTENTION_RULES: Mapping[str, Callable[[ChannelGraph, ir.Node], str | None]] = MappingProxyType(
    {
        "Attention": _attention,
        "GroupQueryAttention": _group_query,
        "MultiHeadAttention": _multi_head,
        "RotaryEmbedding": _rotary,
    }
)
