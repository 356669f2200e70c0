"""What becomes of channels where a value is turned, split, joined or cut: the same as of the value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.channels import ChannelGraph
from onnxsmith.graph_passes.matching import constant_integers, int_attribute
from onnxsmith.graph_passes.shape_groups import reshape_ids
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["LAYOUT_RULES", "axis_size", "constant_axes", "gather", "sequence_at"]

Ids = npt.NDArray[np.int64]


def _transpose(graph: ChannelGraph, node: ir.Node) -> None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    perm = node.attributes.get("perm")
    graph.put(node.outputs[0], np.transpose(ids, None if perm is None else list(perm.as_ints())))


def _reshape(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    found = reshape_ids(ids, node.inputs[0], node.outputs[0])
    if found is None:
        return "Reshape mixes followed axes with others"
    graph.put(node.outputs[0], found)
    return None


def _unsqueeze(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    axes = constant_axes(node, 1)
    assert ids is not None
    if axes is None:
        return "Unsqueeze with axes that are not constant"
    rank = ids.ndim + len(axes)
    graph.put(node.outputs[0], np.expand_dims(ids, tuple(axis % rank for axis in axes)))
    return None


def _squeeze(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    axes = constant_axes(node, 1)
    assert ids is not None
    if axes is None:
        return "Squeeze with axes that are not constant"
    graph.put(node.outputs[0], np.squeeze(ids, tuple(axis % ids.ndim for axis in axes)))
    return None


def constant_axes(node: ir.Node, position: int, name: str = "axes") -> list[int] | None:
    """Axes or sizes that an attribute or a constant gives a node; None where they vary or are absent."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return list(attribute.as_ints())
    value = node.inputs[position] if len(node.inputs) > position else None
    return constant_integers(value)


def _expand(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids, out = graph.of(node.inputs[0]), node.outputs[0].shape
    assert ids is not None
    if out is None:
        return "Expand to a shape that is not known"
    aligned = ids.reshape((1,) * (out.rank() - ids.ndim) + ids.shape)
    graph.put(node.outputs[0], aligned)
    return None


def _concat(graph: ChannelGraph, node: ir.Node) -> str | None:
    found = [graph.of(value) for value in node.inputs]
    rank = next(ids.ndim for ids in found if ids is not None)
    axis = int_attribute(node, "axis") % rank
    others = [ids for ids in found if ids is not None and ids.shape[axis] == 1]
    if len(others) == len(found):
        sizes = [axis_size(value, axis) for value in node.inputs]
        if not all(size == 1 for size in sizes):
            # Along an axis that is not followed, such as the length of a cache.
            for other in others[1:]:
                graph.unite(others[0], other)
            graph.put(node.outputs[0], np.maximum.reduce(np.broadcast_arrays(*others)))
            return None
    parts = []
    shape = np.broadcast_shapes(*(_without(ids, axis) for ids in found if ids is not None))
    for value, ids in zip(node.inputs, found, strict=True):
        size = axis_size(value, axis)
        if size is None:
            return "Concat with a part whose size is not known"
        part = np.full((*shape[:axis], size, *shape[axis + 1 :]), -1) if ids is None else ids
        target = (*shape[:axis], size, *shape[axis + 1 :])
        parts.append(np.broadcast_to(part, target))
    graph.put(node.outputs[0], np.concatenate(parts, axis))
    return None


def _without(ids: Ids, axis: int) -> tuple[int, ...]:
    return (*ids.shape[:axis], 1, *ids.shape[axis + 1 :])


def axis_size(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis, None where it is not known."""
    if value is None or value.shape is None:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def _split(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    axis = int_attribute(node, "axis") % ids.ndim
    if ids.shape[axis] == 1 and axis_size(node.inputs[0], axis) != 1:
        for output in node.outputs:
            graph.put(output, ids)
        return None
    sizes = constant_axes(node, 1, "split")
    if sizes is None:
        part = -(-ids.shape[axis] // len(node.outputs))
        sizes = [min(part, ids.shape[axis] - part * i) for i in range(len(node.outputs))]
    pieces = np.split(ids, np.cumsum(sizes)[:-1].tolist(), axis)
    for output, piece in zip(node.outputs, pieces, strict=True):
        graph.put(output, piece)
    return None


def _split_to_sequence(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    axis = int_attribute(node, "axis") % ids.ndim
    size = constant_integers(node.inputs[1]) if len(node.inputs) > 1 else None
    readers = [user for user, _ in node.outputs[0].uses()]
    if size is None or not int_attribute(node, "keepdims", 1) or ids.shape[axis] == 1:
        return "SplitToSequence into parts that are not known"
    if any(reader.op_type != "SequenceAt" for reader in readers):
        return "a sequence that is read as a whole"
    ends = np.arange(size[0], ids.shape[axis], size[0]) if len(size) == 1 else np.cumsum(size)[:-1]
    graph.parts[node.outputs[0]] = np.split(ids, ends.tolist(), axis)
    return None


def sequence_at(graph: ChannelGraph, node: ir.Node) -> None:
    """One part of what SplitToSequence made."""
    parts = graph.parts.get(node.inputs[0]) if node.inputs[0] is not None else None
    if parts is None:
        return
    index = constant_integers(node.inputs[1])
    if index is None or not -len(parts) <= index[0] < len(parts):
        for part in parts:
            graph.block(part, "a part of a sequence that is not known")
        return
    graph.put(node.outputs[0], parts[index[0]])


def _slice(graph: ChannelGraph, node: ir.Node) -> str | None:
    ids = graph.of(node.inputs[0])
    assert ids is not None
    values = [*node.inputs, None, None, None][1:5]
    given = [value for value in values if value is not None]
    axes = constant_integers(values[2]) if values[2] is not None else None
    if axes is None and values[2] is None:
        axes = list(range(ids.ndim))
    if axes is None:
        return "Slice along axes that are not constant"
    followed = [axis % ids.ndim for axis in axes if ids.shape[axis % ids.ndim] > 1]
    if not followed:
        graph.put(node.outputs[0], ids)
        return None
    numbers = [constant_integers(value) for value in given]
    if any(part is None for part in numbers):
        return "Slice of channels from or to where is not constant"
    starts, ends = numbers[0], numbers[1]
    steps = constant_integers(values[3]) if values[3] is not None else [1] * len(axes)
    assert starts is not None and ends is not None and steps is not None
    if any(step != 1 for axis, step in zip(axes, steps, strict=True) if axis % ids.ndim in followed):
        return "Slice of channels with steps"
    index: list[Any] = [slice(None)] * ids.ndim
    for axis, start, end in zip(axes, starts, ends, strict=True):
        if axis % ids.ndim in followed:
            index[axis % ids.ndim] = slice(start, end)
    graph.put(node.outputs[0], ids[tuple(index)])
    return None


def gather(graph: ChannelGraph, node: ir.Node) -> str | None:
    """Gather from a value whose channels are followed."""
    ids, axis = graph.of(node.inputs[0]), int_attribute(node, "axis")
    if ids is None:
        return "channels choose rows of a Gather"
    axis %= ids.ndim
    index = node.inputs[1]
    rank = None if index is None or index.shape is None else index.shape.rank()
    if rank is None:
        return "Gather with indices of unknown rank"
    if ids.shape[axis] == 1 and axis_size(node.inputs[0], axis) != 1:
        shape = (*ids.shape[:axis], *[1] * rank, *ids.shape[axis + 1 :])
        graph.put(node.outputs[0], ids.reshape(shape))
        return None
    numbers = constant_of(index)
    if numbers is None:
        return "Gather of channels by indices that are not constant"
    graph.put(node.outputs[0], np.take(ids, numbers.numpy(), axis))
    return None


LAYOUT_RULES: Mapping[str, Callable[[ChannelGraph, ir.Node], str | None]] = MappingProxyType(
    {
        "Concat": _concat,
        "Expand": _expand,
        "Flatten": _reshape,
        "Reshape": _reshape,
        "Slice": _slice,
        "Split": _split,
        "SplitToSequence": _split_to_sequence,
        "Squeeze": _squeeze,
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
    }
)
