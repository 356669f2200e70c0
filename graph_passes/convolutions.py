"""Convolutions on 8 bit integers: QuantizeLinear and DequantizeLinear around them, in the form that fuses.

ONNX Runtime makes QLinearConv of a Conv whose input, weight and bias are dequantized and whose result is
quantized. What lies between convolutions (sums, poolings) gets the same treatment, or every one of them would
leave the integers and come back.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.integer_operators import GraphWriter, integer_weight
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["Convolution", "Quantized", "find_convolutions", "ranges_needed", "write_convolutions"]

Quantized = tuple[ir.Value, ir.Value, ir.Value]
"""Codes, scale and zero point of an activation."""

_OWN_RANGE = frozenset({"Add", "AveragePool", "GlobalAveragePool"})
_SAME_RANGE = frozenset({"MaxPool"})
_CLIPPED = frozenset({"Clip", "Relu"})


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A Conv with constant weight, or what is computed between two of them.

    Attributes:
        node: The node.
        result: What is quantized after it: its own output, or that of the Relu or Clip which alone reads it.
    """

    node: ir.Node
    result: ir.Value

    @property
    def is_conv(self) -> bool:
        """Whether it has a weight."""
        return self.node.op_type == "Conv"

    @property
    def observed(self) -> list[ir.Value]:
        """The activations whose ranges it needs."""
        first = [self.node.inputs[0]] if self.is_conv else []
        last = [] if self.result.is_graph_output() else [self.result]
        return [value for value in (*first, *last) if value is not None]


def find_convolutions(model: ir.Model, skip_nodes: Sequence[str]) -> tuple[list[Convolution], dict[str, str]]:
    """The convolutions, with what is between them, in the graph's order; for the rest, why not."""
    found: list[Convolution] = []
    skipped: dict[str, str] = {}
    quantized: set[ir.Value] = set()
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("Conv", "ConvTranspose"):
            reason = _refusal(node, skip_nodes)
            if reason:
                if constant_of(node.inputs[1]) is not None:
                    skipped[label(node)] = reason
                continue
        elif node.op_type in _OWN_RANGE | _SAME_RANGE:
            inputs = [value for value in node.inputs if value is not None]
            if not inputs or not all(value in quantized for value in inputs) or len(node.outputs) > 1:
                continue
        else:
            continue
        result = _result(node)
        if result.is_graph_output() and node.op_type != "Conv":
            # A border inside of the graph would gain nothing there.
            continue
        found.append(Convolution(node, result))
        quantized.add(result)
    return found, skipped


def _refusal(node: ir.Node, skip_nodes: Sequence[str]) -> str:
    weight = node.inputs[1]
    tensor = constant_of(weight)
    if node.op_type == "ConvTranspose":
        return "ONNX Runtime has no integer ConvTranspose on the CPU"
    names = (node.name or "", weight.name or "" if weight is not None else "")
    for pattern in skip_nodes:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return f"skip_nodes has {pattern!r}"
    if tensor is None or weight is None or not weight.is_initializer():
        return "its weight is no initializer"
    if tensor.dtype != ir.DataType.FLOAT:
        return f"the weight is {tensor.dtype.name}; expected FLOAT"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_of(bias) is None:
        return "its bias varies"
    return ""


def _result(node: ir.Node) -> ir.Value:
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and not output.is_graph_output():
        reader = uses[0].node
        if reader.op_type in _CLIPPED and reader.domain in ("", "ai.onnx") and uses[0].idx == 0:
            return reader.outputs[0]
    return output


def write_convolutions(
    writer: GraphWriter,
    convolutions: Sequence[Convolution],
    *,
    quantize: Callable[[ir.Value], Quantized],
    codes: dict[ir.Value, Quantized],
    per_channel: bool,
    reduce_range: bool,
) -> dict[str, dict[str, Any]]:
    """Puts QuantizeLinear and DequantizeLinear around them.

    Args:
        writer: Of the graph.
        convolutions: In the graph's order.
        quantize: Quantizes an activation by its range.
        codes: What is quantized already; what is dequantized here is added, so that it is not done twice.
        per_channel: A scale for each output channel.
        reduce_range: 7 bits for weights.

    Returns:
        For each node what was done.
    """
    layers: dict[str, dict[str, Any]] = {}
    parameters: dict[ir.Value, Quantized] = {}
    for one in convolutions:
        node = one.node
        entry: dict[str, Any] = {"method": "static", "bits": 8, "operator": node.op_type}
        if one.is_conv:
            x = node.inputs[0]
            assert x is not None
            left = parameters.get(x) or quantize(x)
            if x not in parameters:
                node.replace_input_with(0, _dequantized(writer, node, left, f"{x.name}_float"))
            entry |= _weight(writer, node, left, per_channel=per_channel, reduce_range=reduce_range)
        layers[label(node)] = entry
        if one.result.is_graph_output():
            continue
        uses = list(one.result.uses())
        if node.op_type in _SAME_RANGE:
            source = node.inputs[0]
            assert source is not None
            _, scale, zero = parameters[source]
            maker = one.result.producer()
            assert maker is not None
            (made,) = writer.add(
                maker, "QuantizeLinear", [one.result, scale, zero], f"{one.result.name}_codes",
                (zero.dtype or ir.DataType.UINT8,), after=True,
            )  # fmt: skip
            out: Quantized = (made, scale, zero)
        else:
            out = quantize(one.result)
        behind = out[0].producer()
        assert behind is not None
        back = _dequantized(writer, behind, out, f"{one.result.name}_dequantized", after=True)
        back.shape = one.result.shape
        for user, index in uses:
            user.replace_input_with(index, back)
        parameters[back] = codes[back] = out
    return layers


def _dequantized(
    writer: GraphWriter, beside: ir.Node, codes: Quantized, name: str, *, after: bool = False
) -> ir.Value:
    (value,) = writer.add(beside, "DequantizeLinear", list(codes), name, after=after)
    return value


def _weight(
    writer: GraphWriter, node: ir.Node, left: Quantized, *, per_channel: bool, reduce_range: bool
) -> dict[str, Any]:
    weight = node.inputs[1]
    tensor = constant_of(weight)
    assert weight is not None and tensor is not None
    array = np.asarray(tensor.numpy(), np.float32)
    flat = array.reshape(len(array), -1).T
    made = integer_weight(flat, per_channel=per_channel, symmetric=True, reduce_range=reduce_range)
    shaped = np.ascontiguousarray(made.codes.T).reshape(array.shape)
    name = weight.name or "weight"
    axis: Mapping[str, Any] = {"axis": 0} if per_channel else {}
    parts = [
        writer.constant(shaped, f"{name}_q8"),
        writer.constant(made.scales, f"{name}_scale"),
        writer.constant(made.zeros, f"{name}_zero_point"),
    ]
    (value,) = writer.add(node, "DequantizeLinear", parts, f"{name}_dequantized", attributes=dict(axis))
    value.shape = weight.shape
    node.replace_input_with(1, value)
    bias = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    step = constant_of(left[1])
    assert step is not None
    if bias is not None:
        scales = np.broadcast_to(made.scales * float(step.numpy()), (len(array),)).astype(np.float32)
        integers = np.clip(np.rint(bias.numpy() / scales), -(2**31) + 1, 2**31 - 1).astype(np.int32)
        inputs = [
            writer.constant(integers, f"{name}_bias"),
            writer.constant(np.ascontiguousarray(scales), f"{name}_bias_scale"),
        ]
        (shifted,) = writer.add(
            node, "DequantizeLinear", inputs, f"{name}_bias_float", attributes={"axis": 0}
        )
        node.replace_input_with(2, shifted)
    square = float(np.square(flat).sum())
    error = float(np.square(made.dequantized() - flat).sum()) / square if square else 0.0
    return {"shape": list(array.shape), "bits": 7 if reduce_range else 8, "weight_error": error}


def ranges_needed(convolutions: Sequence[Convolution]) -> list[str]:
    """The names of the activations that have to be observed."""
    return list(dict.fromkeys(value.name or "" for one in convolutions for value in one.observed))
