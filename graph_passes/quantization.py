"""Weight-only quantization to blocks of 4 or 8 bits, for ONNX Runtime's MatMulNBits and GatherBlockQuantized.

The formats are those of the operators' definitions
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.blocks import QuantizedBlocks, dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.weights import MatMulWeight, find_matmul_weights

__all__ = ["QuantizeWeights", "QuantizedBlocks", "dequantize_blocks", "quantize_blocks"]

_DOMAIN = "com.microsoft"


class _Memo:
    """Quantizes a matrix once for the tensors that are made of it, and forgets it with the last one."""

    def __init__(self, weight: _Source, options: dict[str, Any], parts: int) -> None:
        self._weight = weight
        self._options = options
        self._parts = parts
        self._left = parts
        self._result: QuantizedBlocks | None = None

    def get(self) -> QuantizedBlocks:
        result = self._result or quantize_blocks(self._weight.rows(), **self._options)
        self._left -= 1
        if self._left:
            self._result = result
        else:
            self._result, self._left = None, self._parts
        return result


@dataclasses.dataclass(frozen=True)
class _Source:
    """A weight tensor as (N, K), whoever uses it."""

    value: ir.Value
    is_transposed: bool

    def rows(self) -> npt.NDArray[np.float32]:
        assert self.value.const_value is not None
        array = self.value.const_value.numpy()
        return np.ascontiguousarray(array if self.is_transposed else array.T, dtype=np.float32)


class QuantizeWeights(GraphPass):
    """Replaces MatMul and Gather on constant weights by MatMulNBits and GatherBlockQuantized.

    A weight that is tied, such as an embedding that is also the output head, is quantized once and stored
    once. Weights are quantized when they are written, one at a time.
    """

    name: ClassVar[str] = "quantize_weights"
    summary: ClassVar[str] = "round weights to blocks of 4 or 8 bits (MatMulNBits, GatherBlockQuantized)"

    def __init__(
        self,
        *,
        bits: Literal[4, 8] = 4,
        block_size: Literal[16, 32, 64, 128, 256] = 32,
        symmetric: bool = False,
        accuracy_level: Literal[0, 1, 2, 3, 4] = 4,
        search_steps: int = 9,
        embeddings: bool = True,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets the format.

        Args:
            bits: Bits of a weight.
            block_size: Weights that share a scale.
            symmetric: Without zero points.
            accuracy_level: What MatMulNBits may compute in: 0 the input's type, 4 int8 (much faster on a
                CPU; activations are rounded to 8 bits in blocks).
            search_steps: Grids tried for each block; 0 is plain round to nearest.
            embeddings: Also quantize embeddings (Gather).
            skip_nodes: Patterns of node or weight names that keep their precision.

        Raises:
            BadInputError: ``search_steps`` is negative or above 100.
        """
        if not 0 <= search_steps <= 100:
            raise BadInputError(
                "pass quantize_weights: search_steps", got=str(search_steps), expected="0 to 100"
            )
        self.bits = bits
        self.block_size = block_size
        self.symmetric = symmetric
        self.accuracy_level = accuracy_level
        self.search_steps = search_steps
        self.embeddings = embeddings
        self.skip_nodes = tuple(skip_nodes)

    def requires(self, model: ir.Model) -> None:
        """Raises PreconditionError where there is nothing to quantize."""
        found = next((w for w in find_matmul_weights(model) if isinstance(w, MatMulWeight)), None)
        if found is None and not (self.embeddings and next(self._embeddings(model), None)):
            raise PreconditionError(
                f"pass {self.name}",
                got="no MatMul or Gather with a constant float matrix",
                expected="at least one",
                remedy="The model may be quantized already, or compute with Gemm or Conv only",
            )

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes()
        groups: dict[tuple[str, bool], list[MatMulWeight | ir.Node]] = {}
        sources: dict[tuple[str, bool], _Source] = {}
        for found in find_matmul_weights(model):
            if not isinstance(found, MatMulWeight):
                node, reason = found
                changes.skipped[node.name or "?"] = reason
                continue
            reason = self._refusal(found.node, found.source, found.in_features)
            if reason:
                changes.skipped[found.node.name or "?"] = reason
                continue
            key = (found.source.name or "", found.is_transposed)
            sources[key] = _Source(found.source, found.is_transposed)
            groups.setdefault(key, []).append(found)
        for node in self._embeddings(model) if self.embeddings else ():
            table = node.inputs[0]
            assert table is not None and table.const_value is not None
            reason = self._refusal(node, table, table.const_value.shape.numpy()[1])
            if reason:
                changes.skipped[node.name or "?"] = reason
                continue
            key = (table.name or "", True)
            sources[key] = _Source(table, True)
            groups.setdefault(key, []).append(node)
        for key, users in groups.items():
            self._replace(model, sources[key], users)
            changes.count += len(users)
        common.RemoveUnusedNodesPass()(model)
        if changes.count:
            model.opset_imports.setdefault(_DOMAIN, 1)
        changes.details = {
            "bits": self.bits,
            "matmuls": sum(isinstance(u, MatMulWeight) for users in groups.values() for u in users),
            "embeddings": sum(isinstance(u, ir.Node) for users in groups.values() for u in users),
            "tied": sum(len(users) > 1 for users in groups.values()),
        }
        return changes

    def _embeddings(self, model: ir.Model) -> Iterator[ir.Node]:
        for node in model.graph:
            if (node.domain, node.op_type) != ("", "Gather"):
                continue
            axis = node.attributes.get("axis")
            table = node.inputs[0]
            if table is None or table.const_value is None or not table.is_initializer():
                continue
            is_float = table.const_value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
            if (axis is None or axis.as_int() == 0) and len(table.const_value.shape) == 2 and is_float:
                yield node

    def _refusal(self, node: ir.Node, weight: ir.Value, columns: int) -> str:
        for pattern in self.skip_nodes:
            if fnmatch.fnmatchcase(node.name or "", pattern) or fnmatch.fnmatchcase(
                weight.name or "", pattern
            ):
                return f"skip_nodes has {pattern!r}"
        if columns % self.block_size:
            return f"rows of {columns} are no multiple of block_size {self.block_size}"
        return ""

    def _replace(self, model: ir.Model, source: _Source, users: list[MatMulWeight | ir.Node]) -> None:
        graph = model.graph
        tensor = source.value.const_value
        assert tensor is not None
        name = source.value.name or "weight"
        first, second = tensor.shape.numpy()
        rows, columns = (first, second) if source.is_transposed else (second, first)
        blocks = columns // self.block_size
        shared = any(isinstance(user, ir.Node) for user in users)
        options = {
            "bits": self.bits,
            "block_size": self.block_size,
            "symmetric": self.symmetric,
            "search_steps": self.search_steps,
        }
        memo = _Memo(source, options, parts=2 if self.symmetric else 3)
        width = self.block_size * self.bits // 8
        # GatherBlockQuantized wants rows, MatMulNBits rows of blocks; the bytes are the same.
        code_shape = (rows, blocks * width) if shared else (rows, blocks, width)
        codes = _lazy(
            graph,
            f"{name}_q{self.bits}",
            ir.DataType.UINT8,
            code_shape,
            lambda: memo.get().codes.reshape(code_shape),
        )
        # Scales have the type of the activations, which is the type that the weight had.
        scale_type = tensor.dtype
        scales = _lazy(
            graph,
            f"{name}_scales",
            scale_type,
            (rows, blocks),
            lambda: memo.get().scales.astype(scale_type.numpy()),
        )
        zeros = None
        if not self.symmetric:
            zero_shape = (rows, -(-blocks * self.bits // 8))

            def zero_points() -> npt.NDArray[Any]:
                packed = memo.get().zero_points
                assert packed is not None
                return packed

            zeros = _lazy(graph, f"{name}_zero_points", ir.DataType.UINT8, zero_shape, zero_points)
        blocked: ir.Value | None = None
        for user in users:
            node = user.node if isinstance(user, MatMulWeight) else user
            if isinstance(user, MatMulWeight):
                right = codes
                if shared:
                    if blocked is None:
                        blocked = _reshape(graph, node, codes, (rows, blocks, width), f"{name}_blocks")
                    right = blocked
                new = self._matmul(user, right, scales, zeros)
            else:
                new = self._gather(user, codes, scales, zeros)
            old = node.outputs[0]
            made = new.outputs[0]
            made.name, made.shape, made.type = old.name, old.shape, old.type
            graph.insert_before(node, new)
            is_output = old.is_graph_output()
            old.replace_all_uses_with(made, replace_graph_outputs=is_output)
            graph.remove(node, safe=True)

    def _matmul(
        self, weight: MatMulWeight, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None
    ) -> ir.Node:
        return ir.node(
            "MatMulNBits",
            [weight.activation, codes, scales, *([zeros] if zeros is not None else [])],
            {
                "K": weight.in_features,
                "N": weight.out_features,
                "bits": self.bits,
                "block_size": self.block_size,
                "accuracy_level": self.accuracy_level,
            },
            domain=_DOMAIN,
            name=f"{weight.node.name}_nbits",
        )

    def _gather(self, node: ir.Node, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None) -> ir.Node:
        indices = node.inputs[1]
        return ir.node(
            "GatherBlockQuantized",
            [codes, indices, scales, *([zeros] if zeros is not None else [])],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block_size, "bits": self.bits},
            domain=_DOMAIN,
            name=f"{node.name}_nbits",
        )


def _lazy(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Any) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(compute()), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(list(shape)),
        name=name,
    )
    graph.register_initializer(value)
    return value


def _reshape(
    graph: ir.Graph, before: ir.Node, value: ir.Value, shape: tuple[int, ...], name: str
) -> ir.Value:
    target = ir.Value(
        name=f"{name}_shape", shape=ir.Shape([len(shape)]), type=ir.TensorType(ir.DataType.INT64)
    )
    target.const_value = ir.tensor(np.array(shape, np.int64), name=target.name)
    graph.register_initializer(target)
    node = ir.node("Reshape", [value, target], name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, ir.Shape(list(shape)), value.type
    graph.insert_before(before, node)
    return output
