"""What a graph is, apart from names that nobody sees: to tell whether anything or its signature changed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import onnx_ir as ir

from onnxsmith.errors import PassError

__all__ = [
    "Fingerprint",
    "only_small_constants",
    "release_dead_users",
    "require_signature",
    "restore_outputs",
    "signature",
    "without_passed_through",
]

# Tensors up to this size are compared by content, larger ones by identity: weights are not read for this.
_SMALL_ELEMENTS = 1024
# Wider than the tolerances of onnxscript's constant patterns.
_ZERO, _ONE = 1e-7, 1e-4


class Fingerprint:
    """Equal for two states of a model if they differ in names of nodes and inner values at most.

    Holds the tensors that it was made of, so that none of their identities can be reused.
    """

    def __init__(self, model: ir.Model) -> None:
        self._numbers: dict[ir.Value, int] = {}
        self._kept: list[Any] = []
        self._content = (
            model.ir_version,
            tuple(sorted(model.opset_imports.items())),
            tuple(sorted(model.metadata_props.items())),
            self._graph(model.graph),
            tuple((key, self._graph(function.graph)) for key, function in sorted(model.functions.items())),
        )
        self._numbers.clear()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def _graph(self, graph: ir.Graph) -> tuple[Any, ...]:
        inputs = tuple((value.name, self._value(value)) for value in graph.inputs)
        # Those that nodes use follow in the order of use.
        unused = tuple(sorted(name for name, value in graph.initializers.items() if not value.uses()))
        nodes = tuple(self._node(node) for node in graph)
        outputs = tuple((value.name, self._value(value)) for value in graph.outputs)
        return inputs, len(graph.initializers), unused, nodes, outputs

    def _node(self, node: ir.Node) -> tuple[Any, ...]:
        attributes = tuple((name, self._attribute(attr)) for name, attr in sorted(node.attributes.items()))
        inputs = tuple(None if value is None else self._value(value) for value in node.inputs)
        outputs = tuple((bool(value.name), self._value(value)) for value in node.outputs)
        documentation = (node.doc_string, tuple(sorted(node.metadata_props.items())))
        return node.op_identifier(), node.version, inputs, outputs, attributes, documentation

    def _value(self, value: ir.Value) -> Any:
        number = self._numbers.get(value)
        if number is not None:
            # It is described where it is met first.
            return number
        number = self._numbers[value] = len(self._numbers)
        constant = self._tensor(value.const_value) if value.is_initializer() else None
        # Types are compared as text: those of sequences do not compare by content.
        kind = value.type.dtype if type(value.type) is ir.TensorType else str(value.type)
        return number, kind, None if value.shape is None else value.shape.dims, constant

    def _attribute(self, attribute: ir.Attr) -> Any:
        if attribute.is_ref():
            return attribute.ref_attr_name
        kind, value = attribute.type, attribute.value
        if kind is ir.AttributeType.GRAPH:
            return self._graph(value)
        if kind is ir.AttributeType.GRAPHS:
            return tuple(self._graph(graph) for graph in value)
        if kind is ir.AttributeType.TENSOR:
            return self._tensor(value)
        if kind is ir.AttributeType.TENSORS:
            return tuple(self._tensor(tensor) for tensor in value)
        return repr(value)

    def _tensor(self, tensor: ir.TensorProtocol | None) -> Any:
        if tensor is None:
            return None
        if isinstance(tensor, ir.Tensor) and tensor.size <= _SMALL_ELEMENTS:
            return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
        self._kept.append(tensor)
        return id(tensor)


def signature(model: ir.Model) -> tuple[Any, ...]:
    """Names, and types where they are known, of inputs and outputs, in order."""
    return tuple(
        tuple((value.name, value.dtype) for value in values)
        for values in (model.graph.inputs, model.graph.outputs)
    )


def release_dead_users(model: ir.Model) -> None:
    """Takes the inputs from nodes that belong to no graph any more, so that what they read can go too.

    onnxscript replaces an If by one branch and leaves the other one's nodes among the users of its inputs.
    """
    alive = set(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in alive for value in node.outputs]
    for value in values:
        for node, index in list(value.uses()):
            if node not in alive:
                node.replace_input_with(index, None)


@contextlib.contextmanager
def without_passed_through(graph: ir.Graph) -> Iterator[None]:
    """Takes outputs that are inputs out of a graph for a while: nothing is computed for them.

    ``OutputFixPass`` gives each a node of its own, and the input another name.
    """
    passed = [(place, value) for place, value in enumerate(graph.outputs) if value.is_graph_input()]
    for place, _ in reversed(passed):
        del graph.outputs[place]
    try:
        yield
    finally:
        for place, value in passed:
            graph.outputs.insert(place, value)


def restore_outputs(graph: ir.Graph, known: Sequence[tuple[ir.TypeProtocol | None, ir.Shape | None]]) -> None:
    """Gives outputs types and ranks again: a value that takes an output's place may have none.

    Args:
        graph: Its outputs are still those that they were, by number and meaning.
        known: Type and shape of each, from before.
    """
    for value, (kind, shape) in zip(graph.outputs, known, strict=True):
        if value.type is None:
            value.type = kind
        if value.shape is None and shape is not None:
            value.shape = shape.copy()


def require_signature(model: ir.Model, expected: tuple[Any, ...], name: str) -> None:
    """Raises PassError where a rewrite changed the inputs or outputs, which is a bug of the rewrite."""
    got = signature(model)
    if got != expected:
        raise PassError(
            f"pass {name}",
            got=f"the rewritten graph has the signature {_show(got)}",
            expected=_show(expected),
            remedy="The model is unchanged; report this with the model",
        )


def _show(found: tuple[Any, ...]) -> str:
    return " -> ".join(", ".join(f"{name}: {dtype}" for name, dtype in side) for side in found)


@contextlib.contextmanager
def only_small_constants(
    model: ir.Model, *, max_elements: int, keep: Collection[ir.Value] = ()
) -> Iterator[None]:
    """Makes everything that a rewrite must not take for a constant an input of the graph, for a while.

    These are: large weights, since matching a pattern against one reads it; defaults of inputs, which a
    caller may replace; and scalars that onnxscript's patterns take for 0 or 1, within a tolerance of 1e-8
    and 1e-5, so that an epsilon of 1e-12 would be dropped as an addition of nothing.

    Args:
        model: The model. What is unused at the end is removed.
        max_elements: An initializer with more elements is large.
        keep: Initializers to leave alone.
    """
    graph = model.graph
    order = list(graph.initializers.values())
    inputs = list(graph.inputs)
    hidden = {
        value: value.const_value
        for value in order
        if not value.is_graph_output()
        and (value.is_graph_input() or (value not in keep and _hide(value, max_elements)))
    }
    for value in hidden:
        graph.initializers.pop(value.name or "")
        value.const_value = None
        if not value.is_graph_input():
            graph.inputs.append(value)
    yield
    # Of so many weights, none may be looked for in a list.
    made = {value: None for value in graph.initializers.values() if value not in hidden}
    own, known = set(inputs), set(order)
    graph.inputs[:] = [value for value in graph.inputs if value not in hidden or value in own]
    graph.initializers.clear()
    for value in [*(v for v in order if v in hidden or v in made), *(v for v in made if v not in known)]:
        if value in hidden:
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                continue
            value.const_value = hidden[value]
        graph.register_initializer(value)


def _hide(value: ir.Value, max_elements: int) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.size > max_elements:
        return True
    if tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().item())
    return 0 < abs(number) < _ZERO or 0 < abs(number - 1) < _ONE
