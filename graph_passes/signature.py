"""What a graph takes and gives: fixed axes, chosen outputs, unread inputs, the logits that are wanted."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.matching import axes_of, label, small_constant
from onnxsmith.graph_passes.packed_functions import inline_functions
from onnxsmith.graph_passes.shapes import infer_shapes
from onnxsmith.graph_passes.weights import constant_of
from onnxsmith.own_operators import OWN_DOMAIN, RESIDUAL_INPUT

__all__ = ["LogitsToKeep", "RemoveUnusedInputs", "SelectOutputs", "SetAxes"]

_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    }
)
_FIXED_AXES = "onnxsmith.fixed_axes"
# Between the output head and the logits: each number of the result is made of one number.
_POINTWISE = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Tanh"})
_HEADS = frozenset(
    {
        ("", "MatMul"),
        ("com.microsoft", "FusedMatMul"),
        ("com.microsoft", "MatMulNBits"),
        (OWN_DOMAIN, "MatMulPacked"),
    }
)


class SetAxes(GraphPass):
    """Gives dynamic axes a fixed size, in the whole graph: ``set_axes:batch=1,sequence=128``.

    An axis is named as in the signature (``batch``), or by input and number (``input_ids.0``). Sizes that
    follow from it, such as ``2*batch``, become fixed too. The pass cleanup then folds what was computed
    from shapes.
    """

    name: ClassVar[str] = "set_axes"
    summary: ClassVar[str] = "fix dynamic axes: set_axes:batch=1"

    def __init__(self, *, axes: Mapping[str, int] = MappingProxyType({})) -> None:
        """Sets the sizes.

        Args:
            axes: Axis to size. On a command line and in a recipe the axes may stand for themselves.

        Raises:
            BadInputError: A size below 1.
        """
        for axis, size in axes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise BadInputError(f"pass {self.name}: {axis}", got=repr(size), expected="1 or more")
        self.axes = dict(axes)

    @classmethod
    def create(cls, arguments: Mapping[str, Any]) -> GraphPass:
        """Takes every argument but ``axes`` as the name of an axis."""
        named = {key: value for key, value in arguments.items() if key != "axes"}
        given = arguments.get("axes", {})
        if not isinstance(given, Mapping):
            raise BadInputError(
                f"pass {cls.name}: axes", got=repr(given), expected="a mapping from axis to size"
            )
        return cls(axes={**given, **named})

    def requires(self, model: ir.Model) -> None:
        """Raises PreconditionError for axes that the signature does not have."""
        known = list(_dynamic_axes(model))
        done = json.loads(model.metadata_props.get(_FIXED_AXES, "{}"))
        if not self.axes:
            raise PreconditionError(
                f"pass {self.name}", got="no axis", expected="at least one, such as set_axes:batch=1"
            )
        for axis in self.axes:
            if axis not in known and axis not in _fixed_axes(model) and done.get(axis) != self.axes[axis]:
                raise PreconditionError(
                    f"pass {self.name}",
                    got=f"the axis {axis!r}",
                    expected=f"one of the dynamic axes {', '.join(known) or '(there are none)'}",
                )

    def apply(self, model: ir.Model) -> Changes:
        """Sets them in every shape of the graph and its subgraphs."""
        sizes = {axis: size for axis, size in self.axes.items() if "." not in axis}
        changed: dict[str, list[int | str | None]] = {}
        for value in model.graph.inputs:
            for index, dim in enumerate(axes_of(value) or ()):
                wanted = self.axes.get(f"{value.name}.{index}")
                if wanted is None:
                    continue
                if isinstance(dim, int) and dim != wanted:
                    raise PreconditionError(
                        f"pass {self.name}",
                        got=f"axis {index} of {value.name!r} fixed at {dim}",
                        expected=f"a dynamic axis, or {wanted}",
                    )
                if isinstance(dim, str):
                    if sizes.setdefault(dim, wanted) != wanted:
                        raise PreconditionError(
                            f"pass {self.name}",
                            got=f"sizes {sizes[dim]} and {wanted} for the axis {dim!r}",
                            expected="one size",
                        )
                elif dim is None and value.shape is not None:
                    changed.setdefault(value.name or "", list(axes_of(value) or ()))[index] = wanted
        count = 0
        for graph in model.graphs():
            values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
            for value in dict.fromkeys(values):
                axes = axes_of(value)
                if axes is None:
                    continue
                before = list(axes)
                if graph is model.graph and value.is_graph_input():
                    before = changed.get(value.name or "", before)
                after = [_evaluated(dim, sizes) for dim in before]
                if after != list(axes):
                    value.shape = ir.Shape(after)
                    count += 1
        if count:
            # So that a second run knows what was an axis once.
            done = json.loads(model.metadata_props.get(_FIXED_AXES, "{}"))
            model.metadata_props[_FIXED_AXES] = json.dumps(done | sizes)
        return Changes(count, {"axes": dict(self.axes), "shapes": count})


def _dynamic_axes(model: ir.Model) -> Iterator[str]:
    seen: dict[str, None] = {}
    for value in model.graph.inputs:
        for dim in axes_of(value) or ():
            if isinstance(dim, str):
                seen.setdefault(dim)
    yield from seen
    for value in model.graph.inputs:
        for index, dim in enumerate(axes_of(value) or ()):
            if not isinstance(dim, int):
                yield f"{value.name}.{index}"


def _fixed_axes(model: ir.Model) -> set[str]:
    return {
        f"{value.name}.{index}"
        for value in model.graph.inputs
        for index, dim in enumerate(axes_of(value) or ())
        if isinstance(dim, int)
    }


def _evaluated(dim: int | str | None, sizes: Mapping[str, int]) -> int | str | None:
    """``batch`` and ``2*batch + 1`` become numbers where every name in them has a size."""
    if not isinstance(dim, str):
        return dim
    if dim in sizes:
        return sizes[dim]
    try:
        result = _number(ast.parse(dim, mode="eval").body, sizes)
    except (SyntaxError, KeyError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        return dim
    return result if result >= 0 else dim


def _number(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_number(node.left, sizes), _number(node.right, sizes))
    raise TypeError(ast.dump(node))


class SelectOutputs(GraphPass):
    """Makes named tensors of the graph its outputs, and removes what is not needed for them.

    To cut a model at a layer, or to look at a tensor inside.
    """

    name: ClassVar[str] = "select_outputs"
    summary: ClassVar[str] = "cut the model at named tensors: select_outputs:names=[hidden]"

    def __init__(self, *, names: tuple[str, ...] = (), remove_inputs: bool = True) -> None:
        """Sets the cut.

        Args:
            names: Values of the main graph, in the order that the outputs are to have.
            remove_inputs: Also remove inputs that nothing reads afterwards.
        """
        self.names = tuple(names)
        self.remove_inputs = remove_inputs

    def requires(self, model: ir.Model) -> None:
        """Raises PreconditionError for no names, a name twice, or one that is no value of the graph."""
        if not self.names or len(set(self.names)) != len(self.names):
            raise PreconditionError(
                f"pass {self.name}", got=f"the names {list(self.names)}", expected="each output once"
            )
        values = _main_values(model)
        for name in self.names:
            if name not in values:
                import difflib

                near = difflib.get_close_matches(name, values, n=3)
                raise PreconditionError(
                    f"pass {self.name}",
                    got=f"{name!r}, which no node of the main graph makes",
                    expected=f"a value such as {', '.join(near or list(values)[-3:])}",
                )

    def apply(self, model: ir.Model) -> Changes:
        """Cuts, and says what went."""
        graph = model.graph
        if [value.name for value in graph.outputs] == list(self.names):
            return Changes()
        values = _main_values(model)
        if any(values[name].dtype is None for name in self.names):
            # Types are not inferred through calls of functions.
            inline_functions(model)
            infer_shapes(model)
            values = _main_values(model)
        for name in self.names:
            if values[name].dtype is None:
                raise PreconditionError(
                    f"pass {self.name}",
                    got=f"{name!r}, whose element type is not known",
                    expected="a value with a type, which an output must have",
                )
        before = len(graph)
        graph.outputs[:] = [values[name] for name in self.names]
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        removed = _drop_unused_inputs(graph) if self.remove_inputs else []
        return Changes(
            before - len(graph) + 1,
            {"outputs": list(self.names), "nodes_removed": before - len(graph), "inputs_removed": removed},
        )


def _main_values(model: ir.Model) -> dict[str, ir.Value]:
    """What nodes of the main graph make."""
    return {value.name: value for node in model.graph for value in node.outputs if value.name}


class RemoveUnusedInputs(GraphPass):
    """Removes inputs of the graph that nothing reads.

    This changes the signature, so it is not part of cleanup.
    """

    name: ClassVar[str] = "remove_unused_inputs"
    summary: ClassVar[str] = "remove inputs of the graph that nothing reads (changes the signature)"

    def apply(self, model: ir.Model) -> Changes:
        """Removes them from the main graph."""
        removed = _drop_unused_inputs(model.graph)
        return Changes(len(removed), {"inputs_removed": removed})


def _drop_unused_inputs(graph: ir.Graph) -> list[str]:
    unused = [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]
    for value in unused:
        graph.inputs.remove(value)
        graph.initializers.pop(value.name or "", None)
    return [value.name or "?" for value in unused]


class LogitsToKeep(GraphPass):
    """Adds the optional input ``num_logits_to_keep``: how many positions at the end get logits; 0 is all.

    Only the last position's logits choose the next token, and the output head is the widest matrix of a
    small model: a prompt costs less without the others. The name and the meaning are those of transformers
    and optimum. The input has a default, 0, so whoever does not know it gets what the model gave before.
    """

    name: ClassVar[str] = "logits_to_keep"
    summary: ClassVar[str] = "optional input num_logits_to_keep: logits of the last positions only"

    _INPUT: ClassVar[str] = "num_logits_to_keep"

    def __init__(self, *, output: str = "logits") -> None:
        """Sets the output.

        Args:
            output: Its name; its shape is (batch, sequence, vocabulary).
        """
        self.output = output

    def apply(self, model: ir.Model) -> Changes:
        """Cuts what goes into the output head."""
        graph = model.graph
        if any(value.name == self._INPUT for value in graph.inputs):
            return Changes()
        logits = next((value for value in graph.outputs if value.name == self.output), None)
        if logits is None:
            return Changes(0, {}, {self.output: "the graph has no such output"})
        head = _head_of(logits)
        if isinstance(head, str):
            return Changes(0, {}, {self.output: head})
        hidden = head.inputs[0]
        assert hidden is not None
        kept = ir.Value(name=self._INPUT, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        kept.const_value = ir.tensor(np.array(0, np.int64), name=self._INPUT)
        graph.inputs.append(kept)
        graph.register_initializer(kept)
        # x[:, -0:] is all of x: 0 needs no case of its own.
        negative = ir.node("Neg", [kept], name="logits_to_keep_start")
        one = small_constant(kept, np.array([1], np.int64))
        starts = ir.node("Reshape", [negative.outputs[0], one], name="logits_to_keep_starts")
        ends = small_constant(kept, np.array([np.iinfo(np.int64).max], np.int64))
        cut = ir.node("Slice", [hidden, starts.outputs[0], ends, one], name="logits_to_keep")
        for node in (negative, starts, cut):
            graph.insert_before(head, node)
        negative.outputs[0].type, negative.outputs[0].shape = kept.type, ir.Shape([])
        starts.outputs[0].type, starts.outputs[0].shape = kept.type, ir.Shape([1])
        axes = axes_of(hidden)
        assert axes is not None
        cut.outputs[0].type = hidden.type
        cut.outputs[0].shape = ir.Shape([axes[0], "num_logits", *axes[2:]])
        head.replace_input_with(0, cut.outputs[0])
        value: ir.Value = head.outputs[0]
        while True:
            shape = axes_of(value)
            if shape is not None and len(shape) == 3:
                value.shape = ir.Shape([shape[0], "num_logits", shape[2]])
            if value is logits:
                break
            value = next(iter(value.uses())).node.outputs[0]
        return Changes(1, {"input": self._INPUT, "default": 0})


def _head_of(logits: ir.Value) -> ir.Node | str:
    """The MatMul that makes the logits, through nodes that work number by number; or why there is none."""
    value = logits
    while True:
        axes = axes_of(value)
        node = value.producer()
        if node is None or axes is None or len(axes) != 3:
            return "it is not made by a MatMul of three axes"
        if value is not logits and len(value.uses()) != 1:
            return f"what leads to it is used elsewhere ({value.name})"
        if (node.domain, node.op_type) in _HEADS:
            hidden = axes_of(node.inputs[0])
            if hidden is None or len(hidden) != 3 or node.inputs[0].is_graph_output():  # type: ignore[union-attr]
                return "its operand does not have the axes (batch, sequence, features)"
            if node.domain == OWN_DOMAIN and len(node.inputs) > RESIDUAL_INPUT:
                return f"{label(node)} adds a residual"
            return node
        if node.op_type not in _POINTWISE or node.domain not in ("", "ai.onnx"):
            return f"{label(node)} ({node.op_type}) lies between the output head and it"
        varying = [one for one in node.inputs if one is not None and constant_of(one) is None]
        sizes = [constant_of(one) for one in node.inputs]
        if len(varying) != 1 or any(
            tensor is not None and len(tensor.shape) > 1 and tensor.size > 1 for tensor in sizes
        ):
            return f"{label(node)} ({node.op_type}) lies between the output head and it"
        value = varying[0]
