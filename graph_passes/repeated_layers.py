"""Passes on a few layers of a deep model, and the graph of all layers from what became of these.

Layers that are alike are changed alike, so a pass need not see all of them. Of a stack of layers the first
ones, two units of those that repeat, and the last one stay; passes run on that short model; and the units
that were left out are put back as copies of the second unit, with their own weights and caches. A unit is as
many layers as it takes until they repeat: one in most models, six where every sixth attends to all tokens.

That layers are changed alike is not believed but seen: the two units, of which one follows the first layers
and one comes before the last, must have become the same graph. Their weights meanwhile hold other numbers,
each its own, so that nothing of what a weight holds can be in the graph that is copied, and must all be there
at the end, as they were. Otherwise there is no result, and the passes run on the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.layer_stack import Layer, find_layer_stack

__all__ = ["NotAlikeError", "ShortStack", "Slots", "attribute_form", "shorten"]

# With fewer left out, what is saved is less than what looking for layers costs.
_LEAST_LEFT_OUT = 4
_LONGEST_UNIT = 8
# A constant of at most this many elements is compared by its content.
_SMALL_ELEMENTS = 8192


class NotAlikeError(Exception):
    """The layers cannot be told apart or were not changed alike; never leaves what shortens and extends."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """Names of the values that a unit has for itself, in the order in which it reads or makes them."""

    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass
class ShortStack:
    """A model with some of its layers.

    Attributes:
        model: It; to be changed by passes.
        layers: How many layers the whole model has.
        kept: How many of them this one has.
        whole: The whole model.
        units: What each unit that repeats has for itself; the first two of them are here.
        period: Layers to a unit.
        last: Names of what the last layer has for itself.
        hidden: By name, the weights of the two units, and what is in their places meanwhile.
    """

    model: ir.Model
    layers: int
    kept: int
    whole: ir.Model
    units: list[Slots]
    period: int
    last: frozenset[str]
    hidden: Mapping[str, tuple[ir.TensorProtocol, ir.TensorProtocol]]


def shorten(model: ir.Model) -> ShortStack | None:
    """Leaves layers out of a copy of a model; None where it has no stack of layers, or too few of them."""
    layers = find_layer_stack(model)
    if isinstance(layers, str) or model.functions or len(layers) < _LEAST_LEFT_OUT + 4:
        return None
    try:
        return _shortened(model, layers)
    except NotAlikeError:
        return None


def _shortened(model: ir.Model, layers: Sequence[Layer]) -> ShortStack:
    described = [_describe(layer) for layer in layers[1:-1]]
    forms = [form for form, _ in described]
    longest = min(_LONGEST_UNIT, (len(forms) - _LEAST_LEFT_OUT) // 2)
    for period in range(1, longest + 1):
        # What does not fill a unit stays with the first layers.
        start = len(forms) % period
        if all(forms[i] == forms[i + period] for i in range(start, len(forms) - period)):
            break
    else:
        raise NotAlikeError("layers are different")
    units = [
        _joined([slots for _, slots in described[at : at + period]])
        for at in range(start, len(forms), period)
    ]
    first = 1 + start
    end = first + 2 * period
    if len(layers) - 1 - end < _LEAST_LEFT_OUT:
        raise NotAlikeError("too few layers")
    whole = model.graph
    short = model.clone()
    short.meta.update(model.meta)
    nodes = dict(zip(whole, short.graph, strict=True))
    kept_exit = _counterpart(layers[end - 1].exit, nodes)
    _counterpart(layers[-2].exit, nodes).replace_all_uses_with(kept_exit)
    left_out = [nodes[node] for layer in layers[end:-1] for node in layer.nodes]
    gone = {name for unit in units[2:] for name in (*unit.weights, *unit.inputs, *unit.outputs)}
    for value in [value for value in short.graph.outputs if value.name in gone]:
        short.graph.outputs.remove(value)
    try:
        for node in reversed(left_out):
            short.graph.remove(node, safe=True)
    except ValueError as error:
        raise NotAlikeError("something reads what is inside of a layer") from error
    for value in [value for value in short.graph.inputs if value.name in gone]:
        if value.uses():
            raise NotAlikeError("an input of a layer is read elsewhere")
        short.graph.inputs.remove(value)
    for name in [name for name, value in short.graph.initializers.items() if name in gone]:
        if short.graph.initializers[name].uses():
            raise NotAlikeError("a weight of a layer is read elsewhere")
        del short.graph.initializers[name]
    hidden = _hide(short.graph, whole, units)
    kept = len(layers) - (len(units) - 2) * period
    _, own = _describe(layers[-1])
    last = frozenset((*own.weights, *own.inputs))
    return ShortStack(short, len(layers), kept, model, units, period, last, hidden)


def _counterpart(value: ir.Value, nodes: Mapping[ir.Node, ir.Node]) -> ir.Value:
    producer = value.producer()
    if producer is None:
        raise NotAlikeError("a layer gives back what nothing has made")
    return nodes[producer].outputs[value.index() or 0]


def _describe(layer: Layer) -> tuple[Any, Slots]:
    """A layer without names, and the names of what it has for itself."""
    inside = set(layer.nodes)
    numbers: dict[ir.Value, Any] = {layer.entry: "entry"}
    weights: list[str] = []
    inputs: list[str] = []
    outputs: list[str] = []

    def operand(value: ir.Value | None) -> Any:
        if value is None or value in numbers:
            return None if value is None else numbers[value]
        own = all(user in inside for user, _ in value.uses()) and not value.is_graph_output()
        if value.is_initializer() and not value.is_graph_input() and own:
            tensor = value.const_value
            assert tensor is not None
            numbers[value] = ("weight", len(weights), tensor.dtype, tuple(tensor.shape.numpy()))
            weights.append(value.name or "")
        elif value.is_graph_input() and own:
            numbers[value] = ("input", len(inputs), value.dtype)
            inputs.append(value.name or "")
        else:
            numbers[value] = ("outside", id(value))
        return numbers[value]

    form: list[Any] = []
    for node in layer.nodes:
        read = tuple(map(operand, node.inputs))
        attributes = tuple((name, attribute_form(one)) for name, one in sorted(node.attributes.items()))
        made = []
        for value in node.outputs:
            numbers[value] = len(numbers)
            if value.is_graph_output():
                outputs.append(value.name or "")
            made.append((value.dtype, value.is_graph_output(), bool(value.name)))
        form.append((node.op_identifier(), node.version, read, attributes, tuple(made)))
    return (tuple(form), numbers.get(layer.exit)), Slots(tuple(weights), tuple(inputs), tuple(outputs))


def attribute_form(attribute: ir.Attr) -> Any:
    """What is equal where two attributes are.

    Raises:
        NotAlikeError: It is a graph, or one of a function's call.
    """
    if attribute.is_ref() or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise NotAlikeError("a layer has a node with a graph of its own")
    if attribute.type is ir.AttributeType.TENSOR:
        return _content(attribute.as_tensor())
    return repr(attribute.value)


def _content(tensor: ir.TensorProtocol) -> Any:
    if tensor.size > _SMALL_ELEMENTS:
        return id(tensor)
    return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()


def _joined(slots: Sequence[Slots]) -> Slots:
    return Slots(
        *(
            tuple(name for one in slots for name in getattr(one, part))
            for part in ("weights", "inputs", "outputs")
        )
    )


def _hide(
    short: ir.Graph, whole: ir.Graph, units: Sequence[Slots]
) -> dict[str, tuple[ir.TensorProtocol, ir.TensorProtocol]]:
    """Puts other numbers in the place of weights of the two units; gives the weights and these, by name.

    Weights that are small and the same in all units stay: what passes make of them is right in all.
    """
    hidden: dict[str, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}
    for place in range(len(units[0].weights)):
        tensors = [whole.initializers[unit.weights[place]].const_value for unit in units]
        known = [tensor for tensor in tensors if tensor is not None]
        if known[0].size <= _SMALL_ELEMENTS and len({_content(tensor) for tensor in known}) == 1:
            continue
        if not known[0].dtype.is_floating_point():
            raise NotAlikeError("layers have different whole numbers")
        for unit in units[:2]:
            name = unit.weights[place]
            value = short.initializers[name]
            assert value.const_value is not None
            other = _other_numbers(value.const_value, name, len(hidden))
            hidden[name] = value.const_value, other
            value.const_value = other
    return hidden


def _other_numbers(tensor: ir.TensorProtocol, name: str, seed: int) -> ir.TensorProtocol:
    shape = tuple(tensor.shape.numpy())

    def compute() -> ir.TensorProtocol:
        numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return ir.tensor(numbers.astype(tensor.dtype.numpy()), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(list(shape)), name=name)
