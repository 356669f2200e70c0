"""The stack of layers of a graph: where all that the model knows of its input is in one value."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxsmith.graph_passes.matching import axes_of, is_operator, same_axes
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["Layer", "find_layer_stack"]

_WEIGHTED = frozenset({"Conv", "Gather", "Gemm", "MatMul"})
_ATTENTION = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention", "Softmax"})


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        entry: The hidden state that goes in.
        exit: The hidden state that comes out.
        nodes: What is computed between them from the hidden state.
    """

    entry: ir.Value
    exit: ir.Value
    nodes: tuple[ir.Node, ...]


def find_layer_stack(model: ir.Model) -> list[Layer] | str:
    """Finds layers that can be left out: each gives what it could have been given.

    A hidden state is a value through which everything goes that depends on an embedding (or on the first
    weight): at its place in the graph no other such value is still to be read. A layer reaches from the
    hidden state before its attention to the one before the next attention. The last one ends where its
    operators are those of the one before.

    Returns:
        The layers in order, or why there are none.
    """
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    place = {node: number for number, node in enumerate(nodes)}
    data = _depends_on_data(nodes)
    cuts = list(_cuts(model, nodes, data, place))
    attending = [
        place[node] for node in nodes if node.op_type in _ATTENTION and any(v in data for v in node.outputs)
    ]
    if len(attending) < 2:
        return f"{len(attending)} attention operators; expected at least two layers"
    positions = [place[producer] for cut in cuts if (producer := cut.producer()) is not None]
    borders: list[int] = []
    for one in attending:
        before = [number for number, position in enumerate(positions) if position < one]
        if not before:
            return "no value before the first attention that everything goes through"
        borders.append(before[-1])
    if len(set(borders)) != len(borders):
        return "between two attention operators no value that everything goes through; run it before fusion"
    borders.append(_last_border(nodes, positions, borders, data))
    if borders[-1] < 0:
        return "the last layer is not like the one before it"
    layers = []
    for first, last in itertools.pairwise(borders):
        entry, out = cuts[first], cuts[last]
        if entry.dtype != out.dtype or not same_axes(axes_of(entry), axes_of(out)):
            return f"{entry.name!r} and {out.name!r} before and after a layer differ in shape or type"
        inside = nodes[positions[first] + 1 : positions[last] + 1]
        layers.append(Layer(entry, out, tuple(n for n in inside if any(v in data for v in n.outputs))))
    return layers


def _depends_on_data(nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """Values that a weight made: masks, positions and lengths are not among them."""
    found: set[ir.Value] = set()
    for node in nodes:
        known = any(value in found for value in node.inputs if value is not None)
        position = 0 if is_operator(node, "Gather") else 1
        by_weight = node.op_type in _WEIGHTED and _is_table(node.inputs[position])
        if by_weight or (known and not is_operator(node, "Shape")):
            found.update(node.outputs)
    return found


def _is_table(value: ir.Value | None) -> bool:
    tensor = constant_of(value)
    return (
        tensor is not None
        and tensor.dtype.is_floating_point()
        and len(tensor.shape) >= 2
        and min(tensor.shape.numpy()[:2]) > 1
    )


def _cuts(
    model: ir.Model, nodes: Sequence[ir.Node], data: set[ir.Value], place: Mapping[ir.Node, int]
) -> Iterator[ir.Value]:
    """Values after whose node nothing else that depends on data is still to be read, in order."""
    # A cache is for the next call; it says nothing of this one.
    outputs = {value for value in model.graph.outputs if not (value.name or "").startswith("present.")}
    ends: dict[ir.Value, int] = {}
    for value in data:
        users = [place[user] for user, _ in value.uses() if user in place]
        ends[value] = len(nodes) if value in outputs else max(users, default=-1)
    live: set[ir.Value] = set()
    for number, node in enumerate(nodes):
        live.update(value for value in node.outputs if value in data and ends[value] > number)
        live = {value for value in live if ends[value] > number}
        if len(live) == 1:
            (only,) = live
            if only.producer() is node:
                yield only


def _last_border(
    nodes: Sequence[ir.Node], positions: Sequence[int], borders: Sequence[int], data: set[ir.Value]
) -> int:
    """Where the last layer ends: after the operators that the layer before it has. -1 where nowhere."""

    def operators(first: int, last: int) -> list[str]:
        part = nodes[positions[first] + 1 : positions[last] + 1]
        return [node.op_type for node in part if any(value in data for value in node.outputs)]

    end = borders[-1] + borders[-1] - borders[-2]
    if end >= len(positions):
        return -1
    return end if operators(borders[-1], end) == operators(borders[-2], borders[-1]) else -1
