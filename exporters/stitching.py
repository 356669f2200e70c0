"""From a graph with one layer of each kind to the graph of the whole decoder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.exporters.layers import ENTRY, EXIT, MARKER_DOMAIN, LayerKinds, NotAlikeError

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxsmith.package import TensorSpec

__all__ = ["stitch", "tidied"]

# torch's names of sizes that it does not know before it runs.
_DATA_SIZE = re.compile(r"\bu\d+\b")


@dataclasses.dataclass(frozen=True)
class _Template:
    """A layer that was traced.

    Attributes:
        entry: The marker in front of it.
        exit: The marker behind it.
        nodes: Its nodes, in order.
    """

    entry: ir.Node
    exit: ir.Node
    nodes: list[ir.Node]


def stitch(
    model: ir.Model,
    kinds: LayerKinds,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    weight: Callable[[str], Any],
) -> None:
    """Adds the layers that were not traced, as copies of those that were, with their own weights and cache.

    Args:
        model: The graph of the shortened decoder, changed in place.
        kinds: Which layer is like which.
        inputs: The signature of the whole decoder.
        outputs: The same.
        weight: Gives the tensor of a weight by its name.

    Raises:
        NotAlikeError: A layer in the graph is not separate from the rest.
    """
    graph = model.graph
    templates = {layer: _template(model, kinds, layer) for layer in kinds.distinct}
    _extend_inputs(graph, inputs)
    names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    copier = _Copier(graph, kinds, weight, names)
    hidden = templates[0].entry.inputs[0]
    assert hidden is not None
    entered: dict[int, ir.Value] = {}
    anchor = templates[0].exit
    for layer, first in enumerate(kinds.first):
        template = templates[first]
        if layer == first:
            entered[layer] = hidden
            result = template.exit.inputs[0]
            anchor = template.exit
        else:
            nodes, result = copier.copy(template, first, layer, hidden)
            graph.insert_after(anchor, nodes)
            anchor = nodes[-1]
        assert result is not None
        hidden = result
    _remove_markers(graph, templates, entered, hidden)
    _order_outputs(graph, outputs)
    model.opset_imports.pop(MARKER_DOMAIN, None)


def tidied(model: ir.Model, kinds: LayerKinds, tidy: Callable[[ir.Model], ir.Model]) -> ir.Model:
    """Cleans the graph of the shortened decoder.

    Meanwhile the weights of its layers look like inputs: what is computed from a layer's weights, or shared
    because two weights are equal, would be wrong in the copies.

    Args:
        model: The graph with one layer of each kind.
        kinds: Which layer is like which.
        tidy: Gives the clean graph.
    """
    graph = model.graph
    prefixes = tuple(kinds.prefix(layer) for layer in kinds.distinct)
    held = {
        name: value.const_value for name, value in graph.initializers.items() if name.startswith(prefixes)
    }
    for name in held:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    model = tidy(model)
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in held]:
        graph.inputs.remove(value)
        if value.uses():
            value.const_value = held[value.name or ""]
            graph.register_initializer(value)
    return model


def _template(model: ir.Model, kinds: LayerKinds, layer: int) -> _Template:
    graph = model.graph
    entry, exit_ = (_marker(graph, kind, layer) for kind in (ENTRY, EXIT))
    prefix = kinds.prefix(layer)
    sources = [entry.outputs[0]]
    sources += [value for name, value in graph.initializers.items() if name.startswith(prefix)]
    sources += [v for v in graph.inputs if (v.name or "").startswith(f"past_key_values.{layer}.")]
    found: set[ir.Node] = set()
    waiting = list(sources)
    while waiting:
        value = waiting.pop()
        for node, _ in value.uses():
            # The length of the cache is the same in all layers; torch asks whichever input comes first.
            if node is exit_ or node in found or (node.op_type == "Shape" and value.is_graph_input()):
                continue
            if node.domain == MARKER_DOMAIN or node.graph is not graph:
                raise NotAlikeError(f"layer {layer} reaches beyond its end in the graph")
            if any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values()):
                raise NotAlikeError(f"layer {layer} has a node with a graph of its own")
            found.add(node)
            waiting += node.outputs
    inside = [node for node in graph if node in found]
    for node in inside:
        for value in node.outputs:
            name = value.name or ""
            if value.is_graph_output() and not name.startswith(f"present.{layer}."):
                raise NotAlikeError(f"output {name} comes from inside layer {layer}")
    return _Template(entry, exit_, inside)


def _marker(graph: ir.Graph, kind: str, layer: int) -> ir.Node:
    found = [
        node
        for node in graph
        if node.domain == MARKER_DOMAIN
        and node.op_type == kind
        and node.attributes["layer"].as_int() == layer
    ]
    if len(found) != 1:
        raise NotAlikeError(f"layer {layer} is {len(found)} times in the graph")
    return found[0]


class _Copier:
    def __init__(
        self, graph: ir.Graph, kinds: LayerKinds, weight: Callable[[str], Any], names: set[str | None]
    ) -> None:
        self.graph = graph
        self.kinds = kinds
        self.weight = weight
        self.names = names
        self.inputs = {value.name: value for value in graph.inputs}

    def copy(
        self, template: _Template, first: int, layer: int, hidden: ir.Value
    ) -> tuple[list[ir.Node], ir.Value]:
        """The nodes of another layer, and its result."""
        import onnx_ir as ir

        values: dict[ir.Value, ir.Value] = {template.entry.outputs[0]: hidden}
        prefix, own = self.kinds.prefix(first), self.kinds.prefix(layer)
        past = f"past_key_values.{first}."
        nodes = []
        for node in template.nodes:
            for value in node.inputs:
                if value is None or value in values:
                    continue
                name = value.name or ""
                if name.startswith(prefix) and value.is_initializer():
                    values[value] = self.initializer(value, own + name.removeprefix(prefix))
                elif name.startswith(past) and value.is_graph_input():
                    other = f"past_key_values.{layer}.{name.removeprefix(past)}"
                    values[value] = self.inputs[other]
            outputs = []
            for value in node.outputs:
                new = ir.Value(
                    name=self.output_name(value, first, layer),
                    shape=_own_shape(value.shape, layer),
                    type=value.type,
                )
                values[value] = new
                outputs.append(new)
            copied = ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else values.get(value, value) for value in node.inputs],
                list(node.attributes.values()),
                overload=node.overload,
                version=node.version,
                outputs=outputs,
                name=f"{node.name}_layer_{layer}" if node.name else None,
            )
            copied.metadata_props.update(self.metadata(node.metadata_props, first, layer))
            nodes.append(copied)
        result = template.exit.inputs[0]
        assert result is not None
        return nodes, values[result]

    def initializer(self, like: ir.Value, name: str) -> ir.Value:
        import onnx_ir as ir

        if name in self.graph.initializers:
            return self.graph.initializers[name]
        value = ir.Value(name=name, shape=like.shape, type=like.type, const_value=self.weight(name))
        self.graph.register_initializer(value)
        return value

    def output_name(self, value: ir.Value, first: int, layer: int) -> str:
        name = value.name or "value"
        if value.is_graph_output():
            return name.replace(f"present.{first}.", f"present.{layer}.", 1)
        wanted, number = f"{name}_layer_{layer}", 0
        while wanted in self.names:
            number += 1
            wanted = f"{name}_layer_{layer}_{number}"
        self.names.add(wanted)
        return wanted

    def metadata(self, properties: Mapping[str, str], first: int, layer: int) -> dict[str, str]:
        """With the names of modules as in the copied layer."""
        old, new = f"{self.kinds.path}.{first}", f"{self.kinds.path}.{layer}"
        return {
            key: text.replace(f"{old}.", f"{new}.").replace(f"{old}'", f"{new}'")
            for key, text in properties.items()
        }


def _own_shape(shape: ir.Shape | None, layer: int) -> ir.Shape | None:
    """Sizes that depend on data, such as the tokens of an expert, are others in each layer."""
    import onnx_ir as ir

    if shape is None:
        return None
    return ir.Shape(
        [
            dim if isinstance(dim, int) else _DATA_SIZE.sub(rf"\g<0>_layer_{layer}", dim.value or "") or None
            for dim in shape
        ]
    )


def _extend_inputs(graph: ir.Graph, specs: tuple[TensorSpec, ...]) -> None:
    import onnx_ir as ir

    have = {value.name: value for value in graph.inputs}
    cache = next(value for name, value in have.items() if (name or "").startswith("past_key_values."))
    every = [
        have.get(spec.name)
        or ir.Value(name=spec.name, shape=ir.Shape(list(spec.shape or ())), type=cache.type)
        for spec in specs
    ]
    graph.inputs.clear()
    graph.inputs.extend(every)


def _order_outputs(graph: ir.Graph, specs: tuple[TensorSpec, ...]) -> None:
    have = {value.name: value for node in graph for value in node.outputs}
    every = [have[spec.name] for spec in specs]
    graph.outputs.clear()
    graph.outputs.extend(every)


def _remove_markers(
    graph: ir.Graph, templates: Mapping[int, _Template], entered: Mapping[int, ir.Value], last: ir.Value
) -> None:
    """Joins the layers in their order."""
    order = sorted(templates)
    for position, layer in enumerate(order):
        template = templates[layer]
        following = templates[order[position + 1]].entry if layer != order[-1] else None
        users = {node for node, _ in template.exit.outputs[0].uses()}
        if following is not None and users != {following}:
            raise NotAlikeError(f"what layer {layer} returns is used elsewhere")
    for layer in order:
        templates[layer].entry.outputs[0].replace_all_uses_with(entered[layer])
    templates[order[-1]].exit.outputs[0].replace_all_uses_with(last)
    for layer in reversed(order):
        graph.remove(templates[layer].exit, safe=False)
        graph.remove(templates[layer].entry, safe=False)
