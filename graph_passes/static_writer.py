"""The nodes of static quantization: what an integer MatMul, Gemm or convolution is written as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.convolutions import Convolution, write_convolutions
from onnxsmith.graph_passes.dynamic import store_weight
from onnxsmith.graph_passes.integer_operators import GraphWriter, IntegerWeight, LinearNode
from onnxsmith.graph_passes.observers import Range
from onnxsmith.graph_passes.weights import constant_of

if TYPE_CHECKING:
    from onnxsmith.graph_passes.static import QuantizeStatic

__all__ = ["ACTIVATION_TYPES", "StaticWriter", "bias_after"]

ACTIVATION_TYPES: Mapping[str, tuple[ir.DataType, int, int]] = {
    "uint8": (ir.DataType.UINT8, 0, 255),
    "int8": (ir.DataType.INT8, -128, 127),
    "uint16": (ir.DataType.UINT16, 0, 65535),
    "int16": (ir.DataType.INT16, -32768, 32767),
}
"""Name to type, lowest and highest code."""


class StaticWriter:
    """Puts integer operators in the place of float ones, by ranges of their activations."""

    def __init__(self, model: ir.Model, settings: QuantizeStatic) -> None:
        """Begins with a graph, which is changed in place."""
        self._writer = GraphWriter(model)
        self._settings = settings
        self._weights: dict[tuple[str, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._codes: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._ranges: dict[ir.Value, Range] = {}
        self._domain = ""
        if settings.activations.endswith("16") and model.opset_imports.get("", 0) < 21:
            # ONNX has 16 bits from opset 21 on, ONNX Runtime's own operators always.
            self._domain = "com.microsoft"
            model.opset_imports.setdefault(self._domain, 1)

    def write(
        self,
        one: LinearNode,
        weight: IntegerWeight,
        wide: Range,
        out: Range | None,
        shift: npt.NDArray[np.float64] | None,
    ) -> None:
        """Replaces a MatMul or Gemm.

        Args:
            one: What is replaced.
            weight: Its weight, rounded.
            wide: The range of its activation.
            out: The range of its result, where that is rounded too.
            shift: What rounding the weight shifts the mean of the result by.
        """
        writer, node = self._writer, one.node
        base = f"{node.name or node.outputs[0].name}_int8"
        key = (one.source.name or "", one.is_transposed)
        if key not in self._weights:
            self._weights[key] = store_weight(writer, one, weight)
        codes, scale, zero = self._weights[key]
        bias = one.bias
        left = self._quantized(one.activation, wide)
        if self._settings.form == "integer":
            follower = None if bias is not None else bias_after(node)
            bias = bias if follower is None else follower[1]
            inputs = [left[0], codes, left[1], scale, left[2], zero]
            if bias is not None:
                inputs.append(bias)
            if shift is not None and bias is None:
                inputs.append(writer.constant(shift.astype(np.float32), f"{base}_correction"))
            elif shift is not None:
                inputs[-1] = self._shifted(bias, shift, base)
            (result,) = writer.add(node, "MatMulIntegerToFloat", inputs, base, domain="com.microsoft")
            writer.graph.opset_imports.setdefault("com.microsoft", 1)
            writer.replace(node, result)
            if follower is not None:
                writer.replace(follower[0], result)
            return
        if out is None:
            kept = self._dequantize(node, left, f"{left[0].name}_float")
            attributes = {"axis": 1} if weight.scales.ndim else {}
            (right,) = writer.add(
                node, "DequantizeLinear", [codes, scale, zero], f"{base}_weight", attributes=attributes
            )
            (result,) = writer.add(node, "MatMul", [kept, right], base)
        else:
            scale_out, zero_out = self._parameters(out, base)
            (product,) = writer.add(
                node, "QLinearMatMul", [*left, codes, scale, zero, scale_out, zero_out], base,
                (ACTIVATION_TYPES[self._settings.activations][0],),
            )  # fmt: skip
            result = self._dequantize(node, (product, scale_out, zero_out), f"{base}_result")
        if bias is not None:
            (result,) = writer.add(node, "Add", [result, bias], f"{base}_sum")
        if shift is not None and not _into_bias(node, shift):
            correction = writer.constant(shift.astype(np.float32), f"{base}_correction")
            (result,) = writer.add(node, "Add", [result, correction], f"{base}_corrected")
        writer.replace(node, result)

    def convolutions(
        self, found: Sequence[Convolution], range_of: Callable[[ir.Value], Range]
    ) -> dict[str, dict[str, Any]]:
        """Convolutions and what is between them."""
        ranges: dict[ir.Value, Range] = {}

        def quantize(value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
            ranges[value] = range_of(value)
            return self._quantized(value, ranges[value])

        layers = write_convolutions(
            self._writer, found, quantize=quantize, codes=self._codes,
            per_channel=self._settings.per_channel, reduce_range=self._settings.reduce_range,
        )  # fmt: skip
        by_codes = {codes[0]: ranges[value] for value, codes in self._codes.items() if value in ranges}
        self._ranges = {v: by_codes[codes[0]] for v, codes in self._codes.items() if codes[0] in by_codes}
        return layers

    def known(self, value: ir.Value) -> Range | None:
        """The range of what a convolution gave, which is quantized already."""
        return self._ranges.get(value)

    def _shifted(self, bias: ir.Value | None, shift: npt.NDArray[np.float64], base: str) -> ir.Value:
        tensor = constant_of(bias)
        assert tensor is not None
        return self._writer.constant((tensor.numpy() + shift).astype(np.float32), f"{base}_bias")

    def _parameters(self, wide: Range, name: str) -> tuple[ir.Value, ir.Value]:
        dtype, bottom, top = ACTIVATION_TYPES[self._settings.activations]
        low, high = wide.low, wide.high
        if self._settings.activations.startswith("int"):
            # Around zero: the code 0 is the number 0, and no zero point has to be subtracted.
            largest = max(-low, high)
            step, zero = largest / top, 0
        else:
            step = (high - low) / (top - bottom)
            zero = round(bottom - low / step) if step else bottom
        step = max(step, 1e-30)
        zero_point = np.array(min(max(zero, bottom), top), dtype.numpy())
        return (
            self._writer.constant(np.array(step, np.float32), f"{name}_scale"),
            self._writer.constant(zero_point, f"{name}_zero_point"),
        )

    def _quantized(self, x: ir.Value, wide: Range) -> tuple[ir.Value, ir.Value, ir.Value]:
        if x not in self._codes:
            scale, zero = self._parameters(wide, f"{x.name}_activation")
            beside, after = self._writer.beside(x)
            (codes,) = self._writer.add(
                beside, "QuantizeLinear", [x, scale, zero], f"{x.name}_codes",
                (ACTIVATION_TYPES[self._settings.activations][0],), domain=self._domain, after=after,
            )  # fmt: skip
            self._codes[x] = (codes, scale, zero)
        return self._codes[x]

    def _dequantize(self, beside: ir.Node, codes: tuple[ir.Value, ir.Value, ir.Value], name: str) -> ir.Value:
        (value,) = self._writer.add(beside, "DequantizeLinear", codes, name, domain=self._domain)
        return value


def _into_bias(node: ir.Node, shift: npt.NDArray[np.float64]) -> bool:
    """Adds a correction to the bias that follows a node, where there is one of its own."""
    found = bias_after(node)
    if found is None:
        return False
    bias = found[1]
    tensor = bias.const_value
    if tensor is None or len(bias.uses()) != 1 or bias.is_graph_output():
        return False
    bias.const_value = ir.tensor((tensor.numpy() + shift).astype(tensor.dtype.numpy()), name=bias.name)
    return True


def bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a constant vector that is all that reads a node's output, and the vector."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    add, index = uses[0]
    bias = add.inputs[1 - index]
    tensor = constant_of(bias)
    if bias is None or tensor is None or not bias.is_initializer() or len(tensor.shape) != 1:
        return None
    return (add, bias) if tensor.size > 1 and tensor.dtype == ir.DataType.FLOAT else None
