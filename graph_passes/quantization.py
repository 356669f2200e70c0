"""Weight-only quantization to blocks of 4 or 8 bits, for ONNX Runtime's MatMulNBits and GatherBlockQuantized.

The formats are those of the operators' definitions
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NoReturn, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.blocks import QuantizedBlocks, dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.weights import MatMulWeight, constant_of, find_matmul_weights

__all__ = ["QuantizeWeights", "QuantizedBlocks", "dequantize_blocks", "quantize_blocks"]

_DOMAIN = "com.microsoft"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_MATMULS = frozenset({("", "MatMul"), (_DOMAIN, "FusedMatMul")})


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
            BadInputError: A value that is not among those listed, or ``search_steps`` below 0 or above 100.
        """
        known = self.parameters()
        given = {"bits": bits, "block_size": block_size, "accuracy_level": accuracy_level}
        for name, value in given.items():
            choices = get_args(known[name].annotation)
            if value not in choices:
                raise BadInputError(
                    f"pass {self.name}: {name}",
                    got=repr(value),
                    expected=f"one of {', '.join(map(str, choices))}",
                )
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

    def apply(self, model: ir.Model) -> Changes:
        """Replaces what can be replaced; the weights themselves are rounded when they are written.

        Raises:
            PreconditionError: There is nothing to quantize, or everything was skipped.
        """
        changes = Changes()
        groups: dict[tuple[str, bool], list[MatMulWeight | ir.Node]] = {}
        sources: dict[tuple[str, bool], _Source] = {}
        for user, reason in self._candidates(model):
            node = user.node if isinstance(user, MatMulWeight) else user
            if reason:
                changes.skipped[_label(node)] = reason
                continue
            source = user.source if isinstance(user, MatMulWeight) else user.inputs[0]
            assert source is not None
            is_transposed = user.is_transposed if isinstance(user, MatMulWeight) else True
            key = (source.name or "", is_transposed)
            sources[key] = _Source(source, is_transposed)
            groups.setdefault(key, []).append(user)
        if not groups:
            self._refuse(changes.skipped)
        for key, users in groups.items():
            self._replace(model, sources[key], users)
            changes.count += len(users)
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault(_DOMAIN, 1)
        changes.details = {
            "bits": self.bits,
            "matmuls": sum(isinstance(u, MatMulWeight) for users in groups.values() for u in users),
            "embeddings": sum(isinstance(u, ir.Node) for users in groups.values() for u in users),
            "tied": sum(len(users) > 1 for users in groups.values()),
        }
        return changes

    def _refuse(self, skipped: dict[str, str]) -> NoReturn:
        if not skipped:
            raise PreconditionError(
                f"pass {self.name}",
                got="no MatMul or Gather with a constant float matrix",
                expected="at least one",
                remedy="The model may be quantized already, or compute with Gemm or Conv only",
            )
        shown = [f"{name}: {reason}" for name, reason in list(skipped.items())[:5]]
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise PreconditionError(
            f"pass {self.name}",
            got=f"nothing to quantize, because every candidate was skipped ({'; '.join(shown)}{more})",
            expected="at least one MatMul or Gather with a constant float matrix that fits",
            remedy="Change block_size or skip_nodes, or leave the pass out; the model is unchanged",
        )

    def _candidates(self, model: ir.Model) -> Iterator[tuple[MatMulWeight | ir.Node, str]]:
        """Every node with a weight that might be quantized, and why it is not, or an empty string."""
        for found in find_matmul_weights(model):
            if isinstance(found, MatMulWeight):
                yield found, self._refusal(found.node, found.source, found.in_features, found.out_features)
            else:
                yield found
        for node in model.graph if self.embeddings else ():
            table = _embedding_table(node)
            tensor = constant_of(table)
            if table is None or tensor is None:
                continue
            if not table.is_initializer():
                yield node, "the weight is a Constant node; expected an initializer (run cleanup first)"
                continue
            rows, columns = tensor.shape.numpy()
            yield node, self._refusal(node, table, columns, rows)
        inner = list(model.graph.subgraphs())
        for function in model.functions.values():
            inner += [function.graph, *function.subgraphs()]
        for node in (node for graph in inner for node in graph):
            if _has_constant_matrix(node) or (self.embeddings and _embedding_table(node) is not None):
                yield node, "it is in a subgraph or function; only the main graph is quantized"

    def _refusal(self, node: ir.Node, weight: ir.Value, columns: int, rows: int) -> str:
        names = (node.name or "", weight.name or "")
        for pattern in self.skip_nodes:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return f"skip_nodes has {pattern!r}"
        if weight.is_graph_output():
            return "the weight is an output of the graph"
        if not rows or not columns:
            return "the weight is empty"
        if columns % self.block_size:
            return f"rows of {columns} are no multiple of block_size {self.block_size}"
        left = node.inputs[0]
        rank = left.shape.rank() if left is not None and left.shape is not None else 2
        if node.op_type != "Gather" and rank < 2:
            return f"the left side has {rank} axes; expected at least 2"
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
        # Scales have the type of the activations, which is the type that the weight had.
        scale_type = tensor.dtype
        options = {
            "name": name,
            "scale_type": scale_type.numpy(),
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
            name=f"{weight.node.name or weight.node.outputs[0].name}_nbits",
        )

    def _gather(self, node: ir.Node, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None) -> ir.Node:
        indices = node.inputs[1]
        return ir.node(
            "GatherBlockQuantized",
            [codes, indices, scales, *([zeros] if zeros is not None else [])],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block_size, "bits": self.bits},
            domain=_DOMAIN,
            name=f"{node.name or node.outputs[0].name}_nbits",
        )


def _label(node: ir.Node) -> str:
    return node.name or f"{node.op_type} of {node.outputs[0].name!r}"


def _has_constant_matrix(node: ir.Node) -> bool:
    if (node.domain, node.op_type) not in _MATMULS:
        return False
    tensor = constant_of(node.inputs[1])
    return tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) == 2


def _embedding_table(node: ir.Node) -> ir.Value | None:
    """The constant float matrix whose rows a Gather looks up, or None."""
    if (node.domain, node.op_type) != ("", "Gather"):
        return None
    axis, table = node.attributes.get("axis"), node.inputs[0]
    tensor = constant_of(table)
    if tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
        return None
    return table if axis is None or axis.as_int() in (0, -2) else None


def _unused(graph: ir.Graph, name: str) -> str:
    """The name, with a number behind it where something has it already."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken.update(value.name for node in graph.all_nodes() for value in node.outputs)
    return next(n for n in (name, *(f"{name}_{i}" for i in range(len(taken) + 1))) if n not in taken)


def _lazy(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Any) -> ir.Value:
    name = _unused(graph, name)
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
    name = _unused(graph, name)
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
