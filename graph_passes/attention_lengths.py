"""Padding as lengths instead of a bias: what GroupQueryAttention takes on CUDA.

The operator's CUDA kernel has no attention bias. It takes one length for each row and reads the row as padded
on the right, which is also how onnxruntime-genai feeds it. The operator is defined at
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import axes_of, is_operator, label, small_constant
from onnxsmith.graph_passes.rewriting import NoMatchError
from onnxsmith.graph_passes.weights import constant_of
from onnxsmith.package import depends_on_values

__all__ = ["LengthsInAttention", "why_not_lengths"]

_DOMAIN = "com.microsoft"
_LENGTHS, _BIAS = 5, 10
_MASK = "attention_mask"
# exp() of it is 0 in every float type that scores have: what has it is hidden.
_HIDDEN = -1e3
# They move or repeat numbers. A value that is the same at all places stays so.
_LAYOUT = frozenset(
    {
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_ARITHMETIC: Mapping[str, Callable[..., object]] = {
    "Add": np.add,
    "And": np.logical_and,
    "Div": np.divide,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Sub": np.subtract,
    "Where": np.where,
}


class LengthsInAttention(GraphPass):
    """Gives GroupQueryAttention the lengths of rows in the place of a bias that hides padding.

    It is done where the bias is 0 at all places if nothing is padded, and hides everything if all is: then
    it says no more than the lengths do. ALiBi, masks of images, prefixes and the like are more, and stay.
    Windows, soft caps and sinks are the operator's own and stay as they are.

    What follows: rows without padding, or with padding on the right, give what they gave. **Padding on the
    left cannot be told by lengths**; ``onnxsmith.package.reads_lengths`` knows such a graph, and this
    package's runtime never feeds it padding on the left.
    """

    name: ClassVar[str] = "lengths_in_attention"
    summary: ClassVar[str] = "lengths of rows for GroupQueryAttention instead of a bias, which CUDA lacks"

    def apply(self, model: ir.Model) -> Changes:
        """Replaces each bias that holds padding alone, and says of the others what else they hold."""
        changes = Changes()
        lengths: ir.Value | None = None
        for node in model.graph.all_nodes():
            if not is_operator(node, "GroupQueryAttention", _DOMAIN) or len(node.inputs) <= _BIAS:
                continue
            bias, known = node.inputs[_BIAS], node.inputs[_LENGTHS]
            if bias is None:
                continue
            try:
                mask = _padding_mask(model.graph, bias)
            except NoMatchError as reason:
                changes.skipped[label(node)] = str(reason)
                continue
            if known is not None and not depends_on_values(known):
                lengths = lengths or _lengths_of(model.graph, mask)
                node.replace_input_with(_LENGTHS, lengths)
            node.replace_input_with(_BIAS, None)
            while node.inputs[-1] is None:
                node.resize_inputs(len(node.inputs) - 1)
            changes.count += 1
        if changes.count:
            common.RemoveUnusedNodesPass()(model)
            changes.details = {"attention": changes.count, "padding": "right"}
        return changes


def why_not_lengths(model: ir.Model, bias: ir.Value) -> str:
    """Why lengths cannot stand for an attention bias; empty where they can."""
    try:
        _padding_mask(model.graph, bias)
    except NoMatchError as reason:
        return str(reason)
    return ""


def _padding_mask(graph: ir.Graph, bias: ir.Value) -> ir.Value:
    """The input that a bias follows from, if it holds nothing but padding.

    Raises:
        NoMatchError: It holds something else.
    """
    mask = next((value for value in graph.inputs if value.name == _MASK), None)
    if mask is None or len(axes_of(mask) or ()) != 2:
        raise NoMatchError(f"the graph has no input {_MASK} of two axes")
    if mask.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
        raise NoMatchError(f"{_MASK} is no mask of integers")
    shown, hidden = (_number(bias, mask, content, {}) for content in (1, 0))
    if shown != 0:
        raise NoMatchError(f"its attention bias is {shown:g}, and not 0, where nothing is padded")
    if hidden > _HIDDEN:
        raise NoMatchError(f"its attention bias is {hidden:g} at padding, which does not hide it")
    return mask


def _number(value: ir.Value, mask: ir.Value, content: int, known: dict[ir.Value, float]) -> float:
    """The number that a value has at all places when the mask has ``content`` at all places.

    Raises:
        NoMatchError: It has several, or that cannot be told.
    """
    if value in known:
        return known[value]
    node, tensor = value.producer(), constant_of(value)
    if value is mask:
        found: float = content
    elif tensor is not None:
        if not tensor.size:
            raise NoMatchError(f"its attention bias holds {value.name!r}, which is empty")
        numbers = tensor.numpy()
        found = numbers.reshape(-1)[0].item()
        if not (numbers == numbers.reshape(-1)[0]).all():
            raise NoMatchError(f"its attention bias holds {value.name!r}, which has several values")
    elif node is None:
        raise NoMatchError(f"its attention bias follows from the input {value.name!r}")
    elif node.domain not in ("", "ai.onnx"):
        raise NoMatchError(f"its attention bias is computed by {node.domain}.{node.op_type}")
    elif node.op_type in _LAYOUT and node.inputs[0] is not None:
        found = _number(node.inputs[0], mask, content, known)
    elif node.op_type == "Cast" and node.inputs[0] is not None:
        found = _number(node.inputs[0], mask, content, known)
        target = ir.DataType(node.attributes["to"].as_int())
        if target is ir.DataType.BOOL:
            found = bool(found)
        elif target.is_integer():
            found = int(found)
    elif node.op_type in _ARITHMETIC and None not in node.inputs:
        operands = [_number(one, mask, content, known) for one in node.inputs if one is not None]
        found = np.asarray(_ARITHMETIC[node.op_type](*operands)).item()
    else:
        raise NoMatchError(
            f"its attention bias is computed by {node.op_type}, and may hold more than padding"
        )
    known[value] = found
    return found


def _lengths_of(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """(batch,) int32: the index of each row's last token, as the operator wants it."""
    axis, one = (
        small_constant(mask, np.array(numbers, dtype))
        for numbers, dtype in (([1], np.int64), (1, mask.dtype.numpy() if mask.dtype else np.int64))
    )
    tokens = ir.node("ReduceSum", [mask, axis], {"keepdims": 0}, name="tokens_of_rows")
    last = ir.node("Sub", [tokens.outputs[0], one], name="last_of_rows")
    narrow = ir.node("Cast", last.outputs, {"to": ir.DataType.INT32.value}, name="last_of_rows_int32")
    first = graph[0]
    for node in (tokens, last, narrow):
        made = node.outputs[0]
        made.name, made.shape = node.name, ir.Shape([(axes_of(mask) or (None,))[0]])
        made.type = ir.TensorType(ir.DataType.INT32) if node is narrow else mask.type
        graph.insert_before(first, node)
    return narrow.outputs[0]
