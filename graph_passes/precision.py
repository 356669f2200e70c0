"""Floating-point precision of the whole graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import require
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError

__all__ = ["ToFloat16"]

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_CASTS = ("graph_input_cast", "graph_output_cast")


class ToFloat16(GraphPass):
    """Converts weights and computation to float16.

    Wraps ``onnxruntime.transformers.float16``, which keeps operators that overflow or lack a float16 kernel
    in float32. On the CPU provider this is a format for size, not for speed: most kernels there compute in
    float32 behind casts.
    """

    name: ClassVar[str] = "to_float16"
    summary: ClassVar[str] = "convert weights and computation to float16 (onnxruntime.transformers.float16)"

    def __init__(self, *, keep_io_types: bool = True, keep_operators: tuple[str, ...] = ()) -> None:
        """Sets what stays in float32.

        Args:
            keep_io_types: Keep inputs and outputs in float32, behind casts. Clients that do not look at
                the type of an output read garbage otherwise.
            keep_operators: Operator types that stay in float32 besides the defaults.
        """
        self.keep_io_types = keep_io_types
        self.keep_operators = tuple(keep_operators)

    def requires(self, model: ir.Model) -> None:
        """Raises PreconditionError for models over 2 GB, which do not fit the protobuf that it works on."""
        total = sum(
            v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
        )
        if total > _PROTOBUF_LIMIT_BYTES:
            raise PreconditionError(
                f"pass {self.name}",
                got=f"{total} bytes of weights",
                expected=f"at most {_PROTOBUF_LIMIT_BYTES}",
            )

    def apply(self, model: ir.Model) -> Changes:
        """Converts, reading every weight once."""
        float16 = require("onnxruntime.transformers.float16", purpose="the pass to_float16")
        # The converter does not look into functions, nor into files of external data.
        common.InlinePass()(model)
        for value in _initializers(model):
            if value.const_value is not None and not isinstance(value.const_value, ir.TensorProtoTensor):
                value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.dtype, name=value.name)
        before = _float_bytes(model)
        if not before:
            return Changes()
        _free_names(model)
        converted = float16.convert_float_to_float16(
            ir.to_proto(model),
            keep_io_types=self.keep_io_types,
            # Its shape inference cannot see through contrib operators; the types are already there.
            disable_shape_infer=True,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *self.keep_operators],
        )
        result = ir.from_proto(converted)
        model.graph = result.graph
        model.functions.clear()
        model.functions.update(result.functions)
        # The converter appends its casts at the end, whoever reads them.
        model.graph.sort()
        after = _float_bytes(model)
        return Changes(int(before != after), {"float32_bytes_before": before, "float32_bytes_after": after})


def _free_names(model: ir.Model) -> None:
    """Renames the casts of an earlier run, whose names the converter gives again."""
    for node in model.graph:
        if (node.name or "").startswith(_CASTS):
            node.name = f"earlier_{node.name}"
        for value in node.outputs:
            if (value.name or "").startswith(_CASTS) and not value.is_graph_output():
                value.name = f"earlier_{value.name}"


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _float_bytes(model: ir.Model) -> int:
    """The bytes of all float32 constants, in initializers and attributes, in the graph and its subgraphs."""
    tensors = [value.const_value for value in _initializers(model)]
    for node in model.graph.all_nodes():
        tensors += [
            attribute.as_tensor()
            for attribute in node.attributes.values()
            if attribute.type is ir.AttributeType.TENSOR
        ]
    return sum(t.nbytes for t in tensors if t is not None and t.dtype == ir.DataType.FLOAT)
