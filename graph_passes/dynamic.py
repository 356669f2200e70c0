"""8 bit weights and activations whose range is measured while the model runs: dynamic quantization."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.block_operators import BlockFormat, BlockWriter, find_weights
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.integer_operators import (
    GraphWriter,
    IntegerWeight,
    LinearNode,
    biases_to_products,
    find_linear_nodes,
    integer_weight,
)
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.rounding import Choice, Rounding, entry_of
from onnxsmith.onnx_file import drop_pages

__all__ = ["QuantizeDynamic", "quantize_embeddings", "refuse_nothing"]


class QuantizeDynamic(GraphPass):
    """Computes MatMul and Gemm on 8 bit integers, with the activation's range found for each input.

    DynamicQuantizeLinear, MatMulInteger, Cast and Mul, which ONNX Runtime fuses. Embeddings are stored in
    blocks of 8 bits (GatherBlockQuantized).
    """

    name: ClassVar[str] = "quantize_dynamic"
    summary: ClassVar[str] = "MatMul and Gemm on 8 bit integers; ranges of activations found at run time"

    def __init__(
        self,
        *,
        per_channel: bool = True,
        symmetric: bool = True,
        reduce_range: bool = False,
        embeddings: bool = True,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets the format of the weights.

        Args:
            per_channel: A scale for each output channel; else one for the weight.
            symmetric: int8 around zero; else uint8 with a zero point.
            reduce_range: 7 bits, for x86 processors without VNNI, where sums of two products of 8 bits
                saturate.
            embeddings: Also store embeddings (Gather) in 8 bits.
            skip_nodes: Patterns of node or weight names that keep their precision.
        """
        self.per_channel = per_channel
        self.symmetric = symmetric
        self.reduce_range = reduce_range
        self.embeddings = embeddings
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Replaces every MatMul and Gemm with a constant weight.

        Raises:
            PreconditionError: There is nothing to quantize.
        """
        kept = open_attention(model, apart=True)
        linear, skipped = find_linear_nodes(model, self.skip_nodes)
        biases_to_products(model, linear)
        skipped |= kept
        refuse_nothing(self.name, linear, skipped)
        writer = GraphWriter(model)
        activations: dict[ir.Value, list[ir.Value]] = {}
        weights: dict[tuple[str, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}
        layers: dict[str, dict[str, Any]] = {}
        for one in linear:
            x = one.activation
            if x not in activations:
                beside, after = writer.beside(x)
                types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
                name = f"{x.name}_quantized"
                activations[x] = writer.add(beside, "DynamicQuantizeLinear", [x], name, types, after=after)
            codes, scale, zero = activations[x]
            key = (one.source.name or "", one.is_transposed)
            entry: dict[str, Any] = {
                "shape": list(one.shape),
                "method": "dynamic",
                "bits": 7 if self.reduce_range else 8,
            }
            if key not in weights:
                made = integer_weight(
                    one.columns(), per_channel=self.per_channel, symmetric=self.symmetric,
                    reduce_range=self.reduce_range,
                )  # fmt: skip
                entry["weight_error"] = weight_error(one, made)
                weights[key] = store_weight(writer, one, made)
                drop_pages(one.source.const_value)
            right, right_scale, right_zero = weights[key]
            layers[one.label] = entry
            base = f"{one.label}_int8" if one.node.name else f"{one.node.outputs[0].name}_int8"
            (product,) = writer.add(
                one.node, "MatMulInteger", [codes, right, zero, right_zero], base, (ir.DataType.INT32,)
            )
            (as_float,) = writer.add(
                one.node, "Cast", [product], f"{base}_cast", attributes={"to": ir.DataType.FLOAT}
            )
            (scales,) = writer.add(one.node, "Mul", [scale, right_scale], f"{base}_scales")
            (result,) = writer.add(one.node, "Mul", [as_float, scales], f"{base}_scaled")
            if one.bias is not None:
                (result,) = writer.add(one.node, "Add", [result, one.bias], f"{base}_sum")
            writer.replace(one.node, result)
        layers |= quantize_embeddings(model, self.skip_nodes, skipped) if self.embeddings else {}
        common.RemoveUnusedNodesPass()(model)
        return Changes(len(layers), {"integer": len(linear), "layers": layers}, skipped)


def refuse_nothing(name: str, linear: list[LinearNode], skipped: dict[str, str]) -> None:
    """Raises PreconditionError where nothing is left to quantize."""
    if linear:
        return
    shown = "; ".join(f"{node}: {reason}" for node, reason in list(skipped.items())[:5])
    raise PreconditionError(
        f"pass {name}",
        got=f"nothing to quantize ({shown or 'no MatMul or Gemm with a constant weight'})",
        expected="at least one MatMul or Gemm with a constant float32 matrix",
        remedy="The model may be quantized already; the model is unchanged",
    )


def weight_error(one: LinearNode, made: IntegerWeight) -> float:
    """The squared error of a weight, relative to its square."""
    exact = one.columns()
    square = float(np.square(exact).sum())
    return float(np.square(made.dequantized() - exact).sum()) / square if square else 0.0


def store_weight(
    writer: GraphWriter, one: LinearNode, made: IntegerWeight
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes, scales and zero points as initializers."""
    name = one.source.name or "weight"
    return (
        writer.constant(made.codes, f"{name}_q8"),
        writer.constant(made.scales, f"{name}_scale"),
        writer.constant(made.zeros, f"{name}_zero_point"),
    )


def quantize_embeddings(
    model: ir.Model, skip_nodes: tuple[str, ...], skipped: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Stores embeddings in blocks of 8 bits; adds those that cannot to ``skipped``."""
    weights, _ = find_weights(model, embeddings=True, skip_nodes=skip_nodes)
    writer = BlockWriter(model, accuracy_level=4)
    layers: dict[str, dict[str, Any]] = {}
    for weight in weights:
        if not weight.gathers or weight.activations:
            continue
        columns = weight.shape[1]
        size = next((size for size in (32, 16) if columns % size == 0), None)
        if size is None:
            skipped[weight.name] = f"rows of {columns} are no multiple of 16"
            continue
        form = BlockFormat(8, size, symmetric=True, half_scales=weight.tensor.dtype == ir.DataType.FLOAT)
        layers[weight.name] = entry_of(weight, form, "rtn")
        choice = Choice(weight, form, "rtn", layers[weight.name])
        writer.replace(weight, form, Rounding(choice, 0))
    if layers:
        model.opset_imports.setdefault("com.microsoft", 1)
    return layers
