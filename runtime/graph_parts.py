"""Parts of a graph as models of their own: from values that are given to values that are wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.package import Component, ModelPackage
from onnxsmith.runtime.samples import numpy_dtype

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GIVEN_SUFFIX", "GivenValue", "GraphValues", "build_part"]

# Operators that apply a function to what they compute with a weight.
_WITH_ACTIVATION = frozenset({"BiasGelu", "FastGelu", "FusedConv", "FusedGemm"})

# A value that is both given to a part and computed by it keeps its name as an output.
GIVEN_SUFFIX = ".given"


@dataclasses.dataclass(frozen=True)
class GivenValue:
    """A value that a part takes as an input.

    Attributes:
        dtype: A numpy name such as ``float32``.
        rank: Number of axes.
    """

    dtype: str
    rank: int


class GraphValues:
    """The floating-point values of a graph in the order in which they are computed."""

    def __init__(self, model: ir.Model) -> None:
        """Finds the values that depend on an input of the graph and that something reads."""
        self.model = model
        self.producers: dict[str, ir.Node] = {}
        self.names: list[str] = []
        graph = model.graph
        outputs = {id(value) for value in graph.outputs}
        dependent = {id(v) for v in graph.inputs if v.name not in graph.initializers}
        for node in graph:
            if not any(id(value) in dependent for value in _read_by(node)):
                continue
            for value in node.outputs:
                dependent.add(id(value))
                used = id(value) in outputs or bool(value.uses())
                if value.name and used and _may_be_float(value):
                    self.producers[value.name] = node
                    self.names.append(value.name)
        self._dependent = frozenset(dependent)
        self.all_named = all(node.name for node in graph)
        self.order: Mapping[str, int] = {name: number for number, name in enumerate(self.names)}

    def segment(self, name: str, cut: Collection[str]) -> list[ir.Node]:
        """The nodes that compute a value from cut values, inputs and weights, in their order.

        Nodes that only compute shapes and indices are left out.
        """
        found: dict[int, ir.Node] = {}
        waiting = [self.producers[name]]
        while waiting:
            node = waiting.pop()
            if id(node) in found:
                continue
            found[id(node)] = node
            for value in _read_by(node):
                if value.name in self.producers and value.name not in cut:
                    waiting.append(self.producers[value.name])
        first = {id(node): number for number, node in enumerate(self.model.graph)}
        return sorted(found.values(), key=lambda node: first[id(node)])

    def inputs_of(self, node: ir.Node) -> list[str]:
        """The floating-point values that a node, or a subgraph of it, reads and that are computed."""
        names = (value.name for value in _read_by(node))
        return list(dict.fromkeys(name for name in names if name in self.producers))

    def does_more(self, node: ir.Node) -> bool:
        """Whether a node does more than its weight says: it adds a residual, or applies a function."""
        varying = [value for value in node.inputs if value is not None and value.const_value is None]
        return node.op_type in _WITH_ACTIVATION or (node.op_type == "Sum" and len(varying) > 1)

    def weights_of(self, node: ir.Node) -> set[str]:
        """The initializers that a node computes with, directly or after nodes that only prepare weights."""
        found: set[str] = set()
        waiting, seen = [value for value in node.inputs if value is not None], set()
        while waiting:
            value = waiting.pop()
            if id(value) in seen or value.name in self.producers:
                continue
            seen.add(id(value))
            if value.is_initializer():
                found.add(value.name or "")
                continue
            producer = value.producer()
            if producer is not None and id(value) not in self._dependent:
                waiting += [one for one in producer.inputs if one is not None]
        return found


def build_part(
    model: ir.Model, *, given: Mapping[str, GivenValue], outputs: Sequence[str], name: str = "part"
) -> ModelPackage:
    """Makes a model of what lies between given values and outputs.

    Everything else that the outputs need is computed from the graph's own inputs, as in the whole graph.

    Args:
        model: The whole graph; it is not changed.
        given: Values of the main graph that become inputs, called ``NAME.given``.
        outputs: Values of the main graph that become outputs, under their own names; also such as are
            given, which are then computed and not passed through.
        name: For messages.

    Returns:
        A package whose weights are shared with the model.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    part = model.clone()
    graph = part.graph
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    wanted = [values[output] for output in outputs]
    inputs = []
    for key, spec in given.items():
        value = values.get(key)
        if value is None:
            continue
        known = value.shape if value.shape is not None and len(value.shape) == spec.rank else None
        replacement = ir.Value(
            name=f"{key}{GIVEN_SUFFIX}",
            type=ir.TensorType(ir.DataType.from_numpy(numpy_dtype(spec.dtype))),
            shape=ir.Shape(list(known)) if known is not None else ir.Shape([None] * spec.rank),
        )
        value.replace_all_uses_with(replacement)
        inputs.append(replacement)
    graph.inputs.extend(inputs)
    graph.outputs.extend(wanted)
    common.RemoveUnusedNodesPass()(part)
    kept = {id(value) for value in graph.outputs}
    for value in list(graph.inputs):
        if not value.uses() and id(value) not in kept:
            graph.inputs.remove(value)
            graph.initializers.pop(value.name or "", None)
    common.RemoveUnusedOpsetsPass()(part)
    return ModelPackage({name: Component(part)})


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what its subgraphs read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for graph in _subgraphs(node):
        inner = {id(value) for value in graph.inputs}
        for nested in graph:
            for value in _read_by(nested):
                if id(value) not in inner:
                    yield value
            inner.update(id(value) for value in nested.outputs)
        yield from (value for value in graph.outputs if id(value) not in inner)


def _subgraphs(node: ir.Node) -> Iterator[Any]:
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.value


def _may_be_float(value: ir.Value) -> bool:
    """Where tracing or fusion left no type, running says what it is."""
    import onnx_ir as ir

    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    return value.dtype is None or value.dtype.is_floating_point()
