"""Which numbers of a graph can only be removed together: every feature that a weight makes is followed.

Each column of a weight, each row of one and each head of a cache is a *channel* with a number. Every value of
the graph gets an array of such numbers, of its own rank, with one element along axes where nothing is
followed (batch, positions): which channel each of its elements belongs to, or -1. Reshaping, turning,
splitting or joining a value does the same to its array. What is added or multiplied element by element unites
two channels; a norm, a softmax or a product over an axis unites all channels along it. At the end the
channels that were united are one unit: a neuron with its gate; a head with its query, key, value and cache; a
residual stream with everything that is added to it. A unit that something reads which nobody knows, or that
leaves the graph, is blocked, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.weights import constant_of

__all__ = ["ChannelGraph", "Side", "constant_source", "spread_over"]

Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One axis of a weight, as a node uses it.

    Attributes:
        node: The node.
        position: Which of its inputs the weight is.
        source: The initializer, behind a Transpose too.
        axis: Of the initializer.
        is_input: Whether the node sums over this axis (it reads channels) or makes channels along it.
        ids: The channel of each position.
    """

    node: ir.Node
    position: int
    source: ir.Value
    axis: int
    is_input: bool
    ids: Ids


class ChannelGraph:
    """Channels, what was found to unite them, and what blocks them."""

    def __init__(self) -> None:
        self.ids: dict[ir.Value, Ids] = {}
        # Of sequences of values.
        self.parts: dict[ir.Value, list[Ids]] = {}
        self.sides: list[Side] = []
        self._axes: dict[tuple[ir.Value, int], Ids] = {}
        self._count = 0
        self._edges: list[tuple[Ids, Ids]] = []
        self._blocked: list[tuple[Ids, str]] = []
        self._attended: list[Ids] = []
        self._labels: Ids | None = None

    def fresh(self, count: int) -> Ids:
        """New channels."""
        made = np.arange(self._count, self._count + count)
        self._count += count
        return made

    def of(self, value: ir.Value | None) -> Ids | None:
        """The channels of a value; None where nothing in it is followed."""
        return None if value is None else self.ids.get(value)

    def put(self, value: ir.Value, ids: Ids | None) -> None:
        """Says what a value's channels are."""
        if ids is not None and (ids >= 0).any():
            self.ids[value] = ids

    def axis(self, source: ir.Value, axis: int, size: int) -> Ids:
        """The channels along an axis of a weight: the same for all who read it, so tied weights stay tied."""
        key = (source, axis)
        if key not in self._axes:
            self._axes[key] = self.fresh(size)
        return self._axes[key]

    def side(self, node: ir.Node, position: int, source: ir.Value, axis: int, *, is_input: bool) -> Ids:
        """Notes that a node reads or makes channels along an axis of a weight."""
        assert source.shape is not None
        ids = self.axis(source, axis, int(source.shape.numpy()[axis]))
        self.sides.append(Side(node, position, source, axis, is_input, ids))
        return ids

    def unite(self, one: Ids | None, other: Ids | None) -> None:
        """Unites channels element by element; shapes are broadcast."""
        if one is None or other is None:
            return
        first, second = np.broadcast_arrays(one, other)
        both = (first >= 0) & (second >= 0)
        if both.any():
            pairs = np.unique(np.stack([first[both], second[both]]), axis=1)
            self._edges.append((pairs[0], pairs[1]))

    def unite_along(self, ids: Ids, axes: Sequence[int]) -> Ids:
        """Unites all channels along axes, and gives the array with one element there."""
        moved = np.moveaxis(ids, axes, range(-len(axes), 0))
        flat = moved.reshape(*moved.shape[: ids.ndim - len(axes)], -1)
        first = flat.max(-1, keepdims=True)
        self.unite(flat, first)
        reduced = first.reshape(*moved.shape[: ids.ndim - len(axes)], *[1] * len(axes))
        return np.moveaxis(reduced, range(-len(axes), 0), axes)

    def unite_all(self, *arrays: Ids | None) -> int:
        """Unites everything in arrays; gives one of the channels, or -1."""
        flat = [array[array >= 0].reshape(-1) for array in arrays if array is not None]
        found = np.concatenate(flat) if flat else np.empty(0, np.int64)
        if not found.size:
            return -1
        self._edges.append((found[1:], found[:-1]))
        return int(found[0])

    def block(self, ids: Ids | None, reason: str) -> None:
        """Says that channels cannot be removed."""
        if ids is not None and (ids >= 0).any():
            self._blocked.append((np.unique(ids[ids >= 0]), reason))

    def attended(self, ids: Ids | None) -> None:
        """Says that channels take part in attention."""
        if ids is not None:
            self._attended.append(np.unique(ids[ids >= 0]))

    @property
    def labels(self) -> Ids:
        """The unit of each channel: the smallest number among those that it was united with."""
        if self._labels is None or len(self._labels) != self._count:
            self._labels = _components(self._count, self._edges)
        return self._labels

    def units(self, ids: Ids) -> Ids:
        """The units of an array of channels; -1 stays."""
        return np.where(ids >= 0, self.labels[np.maximum(ids, 0)], -1)

    def blocked(self) -> dict[int, str]:
        """Unit to the reason why it cannot go."""
        found: dict[int, str] = {}
        for ids, reason in self._blocked:
            for unit in np.unique(self.labels[ids]).tolist():
                found.setdefault(unit, reason)
        return found

    def attending(self) -> frozenset[int]:
        """Units that take part in attention."""
        return frozenset(unit for ids in self._attended for unit in np.unique(self.labels[ids]).tolist())


def _components(count: int, edges: Sequence[tuple[Ids, Ids]]) -> Ids:
    """Connected components by hooking to smaller roots and halving paths, all edges at once."""
    labels = np.arange(count)
    if not edges:
        return labels
    left = np.concatenate([one for one, _ in edges])
    right = np.concatenate([other for _, other in edges])
    while True:
        a, b = labels[left], labels[right]
        differ = a != b
        if not differ.any():
            return labels
        low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
        np.minimum.at(labels, high, low)
        while True:
            halved = labels[labels]
            if np.array_equal(halved, labels):
                break
            labels = halved
        left, right = left[differ], right[differ]


def constant_source(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The initializer that a matrix comes from, and whether a Transpose turns it on the way."""
    turned = False
    while value is not None:
        if value.is_initializer() and constant_of(value) is not None:
            return value, turned
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Identity"):
            return None
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            if perm is not None and list(perm.as_ints()) != [1, 0]:
                return None
            turned = not turned
        value = node.inputs[0]
    return None


def spread_over(value: ir.Value | None) -> int | None:
    """Where a value is one number for each position, times a constant vector: the input that is the vector.

    Such a value can lose channels together with what it is added to.
    """
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
        return None
    for position in (0, 1):
        vector, number = node.inputs[position], node.inputs[1 - position]
        tensor = constant_of(vector)
        if tensor is None or len(tensor.shape) != 1 or number is None or constant_of(number) is not None:
            continue
        if number.shape is not None and number.shape.rank() and number.shape[-1] == 1:
            return position
    return None
