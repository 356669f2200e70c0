"""Units of a graph that can be removed: heads, neurons and channels of convolutions, and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.channel_rules import follow_channels
from onnxsmith.graph_passes.channels import ChannelGraph, Side

__all__ = [
    "GraphUnits",
    "UnitKind",
    "WeightGroup",
    "find_graph_units",
    "magnitudes",
    "positions",
    "reader_scores",
]

UnitKind = Literal["heads", "neurons", "channels"]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class WeightGroup:
    """Units that are alike: each has as many features as the others of the same weights.

    Attributes:
        name: The weight that reads them first.
        kind: ``channels`` where a convolution makes or reads them, ``heads`` where they take part in
            attention, else ``neurons``.
        units: The number of each in the channel graph, in the order of their first feature.
        sides: The axes of weights that they are part of, each weight's axis once.
    """

    name: str
    kind: UnitKind
    units: tuple[int, ...]
    sides: tuple[Side, ...]

    @property
    def count(self) -> int:
        """How many units."""
        return len(self.units)

    @property
    def readers(self) -> tuple[Side, ...]:
        """Weights that read them."""
        return tuple(side for side in self.sides if side.is_input)


@dataclasses.dataclass(frozen=True)
class GraphUnits:
    """What can be removed from a graph.

    Attributes:
        graph: The channels.
        groups: In the order of the graph.
        skipped: Weight to why its units cannot go.
    """

    graph: ChannelGraph
    groups: tuple[WeightGroup, ...]
    skipped: Mapping[str, str]


def find_graph_units(model: ir.Model) -> GraphUnits:
    """Follows all channels of the main graph and finds the units that can go.

    Args:
        model: Shapes of its values must be known as far as they can be.
    """
    graph = follow_channels(model)
    blocked, attending = graph.blocked(), graph.attending()
    places: dict[int, dict[tuple[ir.Value, int], int]] = {}
    sides: dict[tuple[ir.Value, int], Side] = {}
    order: dict[tuple[ir.Value, int], int] = {}
    for side in graph.sides:
        key = (side.source, side.axis)
        order.setdefault(key, len(order))
        # A weight that is read and that makes channels along one axis, such as a tied head, is both.
        if key not in sides:
            sides[key] = side
            labels, counts = np.unique(graph.units(side.ids), return_counts=True)
            for unit, count in zip(labels.tolist(), counts.tolist(), strict=True):
                places.setdefault(unit, {})[key] = count
    alike: dict[frozenset[tuple[tuple[ir.Value, int], int]], list[int]] = {}
    for unit, found in places.items():
        alike.setdefault(frozenset(found.items()), []).append(unit)
    groups: list[tuple[int, WeightGroup]] = []
    skipped: dict[str, str] = {}
    for signature, units in alike.items():
        keys = sorted((key for key, _ in signature), key=order.__getitem__)
        members = tuple(sides[key] for key in keys)
        if len(units) < 2:
            continue
        readers = [side for side in members if side.is_input]
        name = (readers or members)[0].source.name or "?"
        free = [unit for unit in units if unit not in blocked]
        reasons = dict.fromkeys(blocked[unit] for unit in units if unit in blocked)
        if reasons and len(readers) != len(members):
            skipped[name] = "; ".join(list(reasons)[:2])
        if len(free) < 2 or not readers or len(readers) == len(members):
            continue
        first = graph.units(members[0].ids)
        position = {unit: int(np.argmax(first == unit)) for unit in free}
        ordered = tuple(sorted(free, key=position.__getitem__))
        groups.append((order[keys[0]], WeightGroup(name, _kind(members, free, attending), ordered, members)))
    return GraphUnits(graph, tuple(group for _, group in sorted(groups, key=lambda g: g[0])), skipped)


def _kind(sides: Sequence[Side], units: Sequence[int], attending: frozenset[int]) -> UnitKind:
    if any(side.node.op_type == "Conv" for side in sides):
        return "channels"
    return "heads" if any(unit in attending for unit in units) else "neurons"


def magnitudes(units: GraphUnits, group: WeightGroup, *, power: int) -> Floats:
    """The l1 or l2 norm of all weights of each unit.

    Args:
        units: Of ``find_graph_units``.
        group: One of its groups.
        power: 1 or 2.
    """
    total = np.zeros(group.count)
    for side in group.sides:
        array = np.moveaxis(_array(side), side.axis, 0).reshape(len(side.ids), -1)
        sums = (np.abs(array) if power == 1 else np.square(array)).sum(1, dtype=np.float64)
        total += _by_unit(units, group, side, sums)
    return total if power == 1 else np.sqrt(total)


def reader_scores(units: GraphUnits, group: WeightGroup, mean_squares: Mapping[str, Floats]) -> Floats:
    """``sum over its columns c of ||x_c||_2 * sum_i |W_ic|``, for each unit (Wanda's score, summed).

    Args:
        units: Of ``find_graph_units``.
        group: One of its groups.
        mean_squares: Name of what a weight reads to the mean square of each of its channels.
    """
    total = np.zeros(group.count)
    for side in group.readers:
        given = side.node.inputs[0]
        assert given is not None
        array = np.moveaxis(_array(side), side.axis, 0).reshape(len(side.ids), -1)
        weights = np.abs(array).sum(1, dtype=np.float64)
        total += _by_unit(units, group, side, np.sqrt(mean_squares[given.name or ""]) * weights)
    return total


def _array(side: Side) -> npt.NDArray[np.float32]:
    assert side.source.const_value is not None
    return side.source.const_value.numpy().astype(np.float32, copy=False)


def _by_unit(units: GraphUnits, group: WeightGroup, side: Side, values: Floats) -> Floats:
    """Sums over the positions of an axis that are each unit's."""
    labels = units.graph.units(side.ids)
    number = {unit: index for index, unit in enumerate(group.units)}
    index = np.array([number.get(label, -1) for label in labels.tolist()])
    return np.bincount(index[index >= 0], values[index >= 0], minlength=group.count).astype(np.float64)


def positions(units: GraphUnits, group: WeightGroup, side: Side) -> Iterator[Ids]:
    """The positions along an axis that are each unit's, unit by unit."""
    labels = units.graph.units(side.ids)
    for unit in group.units:
        yield np.flatnonzero(labels == unit)
