"""Constant folding and local rewrites of onnxscript, so that each node costs a bounded and small amount.

Both are onnxscript's own. What is added here decides what they need not do: infer the same types again from
equal operands, look into a node that no rule and no constant concerns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

__all__ = ["constants_as_tensors", "fold_constants", "local_rules", "node_inference"]

# Small enough that shape inference of onnxscript looks at the numbers, which the key then has to hold.
_LOOKED_AT_ELEMENTS = 20
_HASHABLE = frozenset({ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING})
_LISTS = frozenset({ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS})


def fold_constants(
    model: ir.Model,
    *,
    max_input_elements: int,
    max_output_elements: int,
    should_fold: Callable[[ir.Node], bool | None],
) -> None:
    """Folds constants and what follows from shapes, in the main graph, subgraphs and functions.

    Args:
        model: Changed in place.
        max_input_elements: A node with a larger constant input is not folded.
        max_output_elements: A node with a larger constant result is not folded.
        should_fold: False for what must not be computed; None leaves the decision to onnxscript.
    """
    folder: Any = _folder_class()(
        shape_inference=True,
        input_size_limit=max_input_elements,
        output_size_limit=max_output_elements,
        should_fold=should_fold,
    )
    folder(model)


def node_inference(model: ir.Model) -> Callable[[ir.Node], None]:
    """Infers types and shapes of a node of the model from its operands, and remembers equal cases."""
    folder: Any = _folder_class()(shape_inference=True, input_size_limit=0, output_size_limit=0)
    folder._opset_imports = model.opset_imports
    return folder._do_inference  # type: ignore[no-any-return]


@functools.cache
def _folder_class() -> type:
    from onnxscript.optimizer import _constant_folding as folding

    class Folder(folding.FoldConstantsPass):
        """Does what onnxscript's pass does, without repeating what is known."""

        def _reset(self) -> None:
            super()._reset()
            self._inferred: dict[Any, Any] = {}

        def process_node(self, node: ir.Node, is_function: bool) -> Any:
            """Hands on nodes with a rule, with only constants, or with an input that stands for another."""
            symbols = self._state.symbolic_value_map
            if (node.domain, node.op_type) in folding.registry.op_evaluators or not node.inputs:
                return super().process_node(node, is_function)
            varies = False
            for value in node.inputs:
                if value is None:
                    continue
                if isinstance(symbols.get(value), ir.Value):
                    return super().process_node(node, is_function)
                varies |= value.const_value is None
            if not varies:
                return super().process_node(node, is_function)
            if not _has_subgraph(node):
                self._do_inference(node)
            return None

        def _do_inference(self, node: ir.Node) -> None:
            """Infers types and shapes once for all nodes with equal operands and attributes."""
            key = _inference_key(node)
            known = None if key is None else self._inferred.get(key)
            if known is None:
                before = [(value, value.shape, value.type) for value in node.outputs]
                for value in node.outputs:
                    value.shape = value.type = None
                super()._do_inference(node)
                known = tuple((value.type, value.shape) for value in node.outputs)
                for value, shape, kind in before:
                    value.shape, value.type = shape, kind
                if key is not None:
                    self._inferred[key] = known
            for value, (kind, shape) in zip(node.outputs, known, strict=True):
                if kind is not None and kind is not value.type and value.type != kind:
                    value.type = _copied(kind)
                if shape is not None and (value.shape is None or value.shape.dims != shape.dims):
                    value.shape = folding._merge_shapes(value.shape, shape.copy())

    return Folder


def _copied(kind: ir.TypeProtocol) -> Any:
    return (
        kind if not isinstance(kind, ir.TensorType) else ir.TensorType(kind.dtype, denotation=kind.denotation)
    )


def _has_subgraph(node: ir.Node) -> bool:
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in graphs for attribute in node.attributes.values())


def _inference_key(node: ir.Node) -> Any:
    """Equal for two nodes whose results have the same types and shapes; None where that is not sure."""
    attributes = []
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        value = attribute.value
        if attribute.type in _LISTS:
            value = tuple(value)
        elif attribute.type is ir.AttributeType.TENSOR and value.size <= _LOOKED_AT_ELEMENTS:
            value = _content(value)
        elif attribute.type not in _HASHABLE:
            return None
        attributes.append((name, attribute.type, value))
    attributes.sort(key=lambda entry: entry[0])
    inputs: list[Any] = []
    for value in node.inputs:
        if value is None:
            inputs.append(None)
            continue
        shape, tensor = value.shape, value.const_value
        kind: Any = value.type.dtype if type(value.type) is ir.TensorType else value.type
        content = None
        if tensor is not None and tensor.size <= _LOOKED_AT_ELEMENTS:
            content = _content(tensor)
        inputs.append((kind, None if shape is None else shape.dims, content))
    outputs = tuple(bool(value.name) for value in node.outputs)
    return node.domain, node.op_type, node.overload, tuple(attributes), tuple(inputs), outputs


def _content(tensor: ir.TensorProtocol) -> Any:
    if tensor.dtype is ir.DataType.STRING:
        return tensor.dtype, tuple(tensor.shape.dims), tuple(tensor.numpy().reshape(-1).tolist())
    return tensor.dtype, tuple(tensor.shape.dims), tensor.tobytes()


def constants_as_tensors(model: ir.Model) -> None:
    """Gives each Constant a tensor: onnxscript writes the other forms, which came with opset 12."""
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        for node in root.all_nodes():
            if node.op_type != "Constant" or len(node.attributes) != 1 or "value" in node.attributes:
                continue
            tensor = node.outputs[0].const_value
            if tensor is not None:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", tensor)


def local_rules(opset: int) -> Any:
    """The default rules of onnxscript, without those that end in several nodes or need a later operator set.

    The matcher tries all pairs of nodes of the graph for a pattern with two ends, for each node: 60 s for
    the 4,500 nodes of a small decoder, where the other 45 rules together take 2 s.
    """
    from onnxscript import rewriter

    # There is no public name for the default rules, only functions that apply all of them.
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule._target_pattern.has_single_output_node]
    # It writes the attribute allowzero, whatever the operator set.
    rules = [rule for rule in rules if opset >= 14 or rule.name != "MaterializeReshapeShape"]
    return rewriter.RewriteRuleSet(rules)
