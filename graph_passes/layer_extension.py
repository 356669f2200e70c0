"""The graph of all layers from that of a few, after passes: see ``repeated_layers``."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from onnxsmith.graph_passes.repeated_layers import NotAlikeError, ShortStack, attribute_form

__all__ = ["extended"]

_NUMBERS = re.compile(r"(\d+)")
# The first layers and what all layers read; and the last layer with what follows it. Units have numbers.
_BEFORE, _BEHIND = -1, 2


def extended(stack: ShortStack) -> ir.Model | None:
    """The model with all layers, from a short one after passes; None where these did not change them alike.

    Args:
        stack: It is used up.
    """
    try:
        _Extension(stack).make()
    except NotAlikeError:
        return None
    return stack.model


class _Extension:
    """Puts the layers back. Units 0 and 1 are there; the others are numbered on."""

    def __init__(self, stack: ShortStack) -> None:
        self.stack = stack
        self.graph = stack.model.graph
        self.whole = stack.whole.graph
        self.units = stack.units
        # Unit, kind and place of what a unit has for itself.
        self.places: dict[ir.Value, tuple[int, str, int]] = {}
        self.level: dict[ir.Value, int] = {}
        self.nodes: tuple[list[ir.Node], list[ir.Node]] = ([], [])
        # What a unit reads of the one before: number of the node and of the input, to place of what it reads.
        self.handed: dict[tuple[int, int], int] = {}
        self.inputs = {value.name or "": value for value in self.graph.inputs}
        self.names: set[str | None] = set()

    def make(self) -> None:
        self.restore_weights()
        self.find_units()
        self.compare()
        self.copy()
        self.restore_order()

    def restore_weights(self) -> None:
        """The weights themselves in the place of other numbers, none of which may be anywhere else."""
        tensors = {id(other): name for name, (_, other) in self.stack.hidden.items()}
        found = set()
        for name, value in self.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or id(tensor) not in tensors:
                continue
            if tensors[id(tensor)] != name or name in found:
                raise NotAlikeError("a weight has another name")
            found.add(name)
        for name in self.stack.hidden:
            if name in self.graph.initializers and name not in found:
                raise NotAlikeError("a weight was changed")
        for name in found:
            self.graph.initializers[name].const_value = self.stack.hidden[name][0]

    def find_units(self) -> None:
        """Nodes of the two units: what follows from their weights and inputs and from nothing behind."""
        if self.stack.model.functions or any(True for _ in self.graph.subgraphs()):
            raise NotAlikeError("there are nodes with graphs of their own")
        inputs = {value.name: value for value in self.graph.inputs}
        weights = self.graph.initializers
        for number, unit in enumerate(self.units[:2]):
            for place, name in enumerate(unit.weights):
                if name in weights:
                    self.places[weights[name]] = (number, "weight", place)
                    if name in self.stack.hidden:
                        self.level[weights[name]] = number
            for place, name in enumerate(unit.inputs):
                self.places[inputs[name]] = (number, "input", place)
                self.level[inputs[name]] = number
        for value in (*weights.values(), *self.graph.inputs):
            if value.name in self.stack.last:
                self.level[value] = _BEHIND
        for node in self.graph:
            level = max((self.level.get(value, _BEFORE) for value in node.inputs if value), default=_BEFORE)
            for place, value in enumerate(node.outputs):
                self.level[value] = level
                if level in (0, 1):
                    self.places[value] = (level, "made", _place(len(self.nodes[level]), place))
            if level in (0, 1):
                self.nodes[level].append(node)

    def compare(self) -> None:
        """Requires the two units to be the same, each in its place."""
        if len(self.nodes[0]) != len(self.nodes[1]) or not self.nodes[0]:
            raise NotAlikeError("two units have become different")
        for number, (first, second) in enumerate(zip(*self.nodes, strict=True)):
            if _form(first) != _form(second):
                raise NotAlikeError(f"{first.name} and {second.name} are different")
            for place, (one, other) in enumerate(zip(first.inputs, second.inputs, strict=True)):
                if one is other:
                    if one is not None and self.level.get(one, _BEFORE) != _BEFORE:
                        raise NotAlikeError(f"{first.name} and {second.name} read the same of one unit")
                    continue
                if one is None or other is None:
                    raise NotAlikeError(f"{first.name} and {second.name} read different things")
                mine, yours = self.places.get(one), self.places.get(other)
                if mine is not None and yours is not None and (0, *mine[1:], 1) == (*mine, yours[0]):
                    same = mine[1:] == yours[1:]
                else:
                    same = mine is None and self.level.get(one, _BEFORE) == _BEFORE and yours is not None
                    same = same and yours is not None and yours[:2] == (0, "made")
                if not same:
                    raise NotAlikeError(f"{first.name} and {second.name} read different things")
                if mine is None and yours is not None:
                    self.handed[number, place] = yours[2]
            for one, other in zip(first.outputs, second.outputs, strict=True):
                if one.is_graph_output() != other.is_graph_output():
                    raise NotAlikeError("an output comes from one unit only")
                if one.is_graph_output() and self.output_number(one, 0) != self.output_number(other, 1):
                    raise NotAlikeError("an output is another one")

    def output_number(self, value: ir.Value, unit: int) -> int:
        """Which of a unit's outputs a value is."""
        names = self.units[unit].outputs
        if value.name not in names:
            raise NotAlikeError(f"{value.name} is an output that no unit had")
        return names.index(value.name)

    def readers_behind(self) -> list[tuple[ir.Node, int, int]]:
        """What is read of the second unit behind it: node, place of its input, place of what it reads."""
        found = []
        order = {node: number for number, node in enumerate(self.graph)}
        end = order[self.nodes[1][-1]]
        for node in self.graph:
            if self.level.get(node.outputs[0], _BEFORE) != _BEHIND:
                continue
            for place, value in enumerate(node.inputs):
                where = self.places.get(value) if value is not None else None
                if value is None or where is None or self.level.get(value, _BEFORE) == _BEFORE:
                    continue
                if where[:2] != (1, "made") or order[node] < end:
                    raise NotAlikeError(f"{node.name} reads what is inside of a unit")
                found.append((node, place, where[2]))
        return found

    def copy(self) -> None:
        """Adds the other units, as copies of the second."""
        readers = self.readers_behind()
        names = {value.name for value in self.level} | set(self.graph.initializers)
        self.names = names | {node.name for node in self.graph}
        previous = {
            _place(n, i): v for n, node in enumerate(self.nodes[1]) for i, v in enumerate(node.outputs)
        }
        anchor = self.nodes[1][-1]
        for unit in range(2, len(self.units)):
            nodes, previous = self.copied(unit, previous)
            self.graph.insert_after(anchor, nodes)
            anchor = nodes[-1]
        for node, place, where in readers:
            node.replace_input_with(place, previous[where])

    def copied(
        self, unit: int, previous: Mapping[int, ir.Value]
    ) -> tuple[list[ir.Node], dict[int, ir.Value]]:
        """The nodes of a unit, and what they make by its place."""
        made: dict[int, ir.Value] = {}
        nodes = []
        for number, (first, second) in enumerate(zip(*self.nodes, strict=True)):
            inputs: list[ir.Value | None] = []
            for place, value in enumerate(second.inputs):
                where = self.places.get(value) if value is not None else None
                if (number, place) in self.handed:
                    inputs.append(previous[self.handed[number, place]])
                elif value is None or where is None or where[0] != 1:
                    inputs.append(value)
                elif where[1] == "made":
                    inputs.append(made[where[2]])
                else:
                    inputs.append(self.own(unit, where[1], where[2]))
            outputs = []
            for place, (one, other) in enumerate(zip(first.outputs, second.outputs, strict=True)):
                new = ir.Value(
                    name=self.output_name(unit, one, other), shape=other.shape, type=copy.copy(other.type)
                )
                new.metadata_props.update(self.metadata(unit, one.metadata_props, other.metadata_props))
                made[_place(number, place)] = new
                outputs.append(new)
            node = ir.Node(
                second.domain, second.op_type, inputs, list(second.attributes.values()),
                overload=second.overload, version=second.version, outputs=outputs,
                name=self.unique(self.renamed(unit, first.name, second.name)),
                doc_string=second.doc_string,
            )  # fmt: skip
            node.metadata_props.update(self.metadata(unit, first.metadata_props, second.metadata_props))
            nodes.append(node)
        return nodes, made

    def own(self, unit: int, kind: str, place: int) -> ir.Value:
        """A weight or an input of a unit, as the whole model has it."""
        if kind == "input":
            return self.input(self.units[unit].inputs[place])
        name = self.units[unit].weights[place]
        if name not in self.graph.initializers:
            known = self.whole.initializers[name]
            value = ir.Value(name=name, shape=known.shape, type=known.type, const_value=known.const_value)
            value.metadata_props.update(known.metadata_props)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def input(self, name: str) -> ir.Value:
        """An input of the whole model, under its name."""
        if name not in self.inputs:
            known = next(value for value in self.whole.inputs if value.name == name)
            self.inputs[name] = ir.Value(name=name, shape=known.shape, type=known.type)
            self.inputs[name].metadata_props.update(known.metadata_props)
        return self.inputs[name]

    def output_name(self, unit: int, first: ir.Value, second: ir.Value) -> str:
        if second.is_graph_output():
            return self.units[unit].outputs[self.output_number(second, 1)]
        return self.unique(self.renamed(unit, first.name, second.name)) or ""

    def unique(self, name: str | None) -> str | None:
        """A name that is free; none stays none."""
        if not name:
            return name
        wanted, number = name, 0
        while wanted in self.names:
            number += 1
            wanted = f"{name}_{number}"
        self.names.add(wanted)
        return wanted

    def renamed(self, unit: int, first: str | None, second: str | None) -> str | None:
        """A name of the second unit as it is in another: the numbers of layers are those of its own."""
        if not first or not second:
            return second
        parts, others = _NUMBERS.split(first), _NUMBERS.split(second)
        if len(parts) != len(others):
            return f"{second}_unit_{unit}"
        found = []
        for place, (one, other) in enumerate(zip(parts, others, strict=True)):
            if one == other:
                found.append(one)
            elif place % 2 and int(other) - int(one) == self.stack.period:
                found.append(str(int(one) + unit * self.stack.period))
            else:
                return f"{second}_unit_{unit}"
        return "".join(found)

    def metadata(self, unit: int, first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
        return {key: self.renamed(unit, first.get(key), text) or text for key, text in second.items()}

    def restore_order(self) -> None:
        """Inputs, outputs and weights in the order of the whole model."""
        made = {value.name: value for node in self.graph for value in node.outputs}
        present = {value.name: value for value in (*self.graph.inputs, *self.graph.outputs)}
        for values, known in (
            (self.graph.inputs, self.whole.inputs),
            (self.graph.outputs, self.whole.outputs),
        ):
            every = []
            for value in known:
                name = value.name or ""
                own = self.input(name) if values is self.graph.inputs else present.get(name, made.get(name))
                if own is None:
                    raise NotAlikeError(f"{name} is no output any more")
                every.append(own)
            if len(every) < len(values):
                raise NotAlikeError("there are inputs or outputs that the model did not have")
            values[:] = every
        order = {name: number for number, name in enumerate(self.whole.initializers)}
        weights = sorted(
            self.graph.initializers.values(), key=lambda value: order.get(value.name or "", len(order))
        )
        self.graph.initializers.clear()
        for value in weights:
            self.graph.register_initializer(value)


def _place(node: int, output: int) -> int:
    """One number for an output of a node of a unit."""
    return node << 16 | output


def _form(node: ir.Node) -> Any:
    attributes = tuple((name, attribute_form(one)) for name, one in sorted(node.attributes.items()))
    outputs = tuple((value.dtype, bool(value.name), _axes(value)) for value in node.outputs)
    return node.op_identifier(), node.version, len(node.inputs), attributes, outputs


def _axes(value: ir.Value) -> Any:
    """Sizes; those that depend on data have another name in each layer."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else _NUMBERS.sub("", dim.value or "") for dim in value.shape)
