"""Weights in blocks put into a graph: MatMulNBits, GatherBlockQuantized, and what these cannot express.

Both operators know integer zero points only, or float ones without a fast kernel. A weight of the form
``scale * code + minimum``, as GGUF's Q4_1 has it, is written as

    x @ w.T = MatMulNBits(x, code - 8, scale) + blocksum(x) @ (minimum + 8 * scale).T

which is exact and keeps the fast kernel: the second product is a thirty-second of the first.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.blocks import QuantizedBlocks
from onnxsmith.graph_passes.weights import MatMulWeight, constant_of, find_matmul_weights

__all__ = ["BlockFormat", "BlockWriter", "SharedWeight", "find_weights", "node_label"]

_DOMAIN = "com.microsoft"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_MATMULS = frozenset({("", "MatMul"), (_DOMAIN, "FusedMatMul")})


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """How a weight is stored.

    Attributes:
        bits: Bits of a code: 2, 4 or 8.
        block_size: Weights that share a scale.
        symmetric: Without zero points: the code in the middle is zero.
        minimums: With a float minimum to each block in place of a zero point.
        half_scales: Scales and minimums are stored in float16 and cast where the model is loaded.
    """

    bits: int
    block_size: int
    symmetric: bool = False
    minimums: bool = False
    half_scales: bool = False

    def __str__(self) -> str:
        zero = "minimum" if self.minimums else "symmetric" if self.symmetric else "zero point"
        return f"{self.bits} bits, blocks of {self.block_size}, {zero}"


@dataclasses.dataclass
class SharedWeight:
    """A constant matrix with everything that reads it the same way round.

    Attributes:
        value: The initializer.
        is_transposed: True if it lies as (N, K), False if as (K, N).
        users: The MatMuls and the Gathers (a bare node) that read it.
    """

    value: ir.Value
    is_transposed: bool
    users: list[MatMulWeight | ir.Node]

    @property
    def name(self) -> str:
        """The initializer's name."""
        return self.value.name or "weight"

    @property
    def tensor(self) -> ir.TensorProtocol:
        """What it holds."""
        assert self.value.const_value is not None
        return self.value.const_value

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        first, second = self.tensor.shape.numpy()
        return (first, second) if self.is_transposed else (second, first)

    @property
    def gathers(self) -> bool:
        """Whether it is an embedding, too."""
        return any(isinstance(user, ir.Node) for user in self.users)

    @property
    def activations(self) -> list[ir.Value]:
        """What it is multiplied with."""
        return [user.activation for user in self.users if isinstance(user, MatMulWeight)]

    def rows(self) -> npt.NDArray[np.float32]:
        """The weight as (N, K), float32."""
        array = self.tensor.numpy()
        return np.ascontiguousarray(array if self.is_transposed else array.T, dtype=np.float32)


def find_weights(
    model: ir.Model, *, embeddings: bool, skip_nodes: Sequence[str]
) -> tuple[list[SharedWeight], dict[str, str]]:
    """Finds the weights that might be stored in blocks.

    Args:
        model: Where to look.
        embeddings: Also look at Gather.
        skip_nodes: Patterns of names of nodes or weights to leave alone.

    Returns:
        The weights, and for every other node with a constant matrix the reason why not.
    """
    skipped: dict[str, str] = {}
    found: dict[tuple[str, bool], SharedWeight] = {}
    for user, reason in _candidates(model, embeddings, skip_nodes):
        node = user.node if isinstance(user, MatMulWeight) else user
        if reason:
            skipped[node_label(node)] = reason
            continue
        source = user.source if isinstance(user, MatMulWeight) else user.inputs[0]
        assert source is not None
        is_transposed = user.is_transposed if isinstance(user, MatMulWeight) else True
        key = (source.name or "", is_transposed)
        found.setdefault(key, SharedWeight(source, is_transposed, [])).users.append(user)
    return list(found.values()), skipped


def node_label(node: ir.Node) -> str:
    """A node's name, or what it makes."""
    return node.name or f"{node.op_type} of {node.outputs[0].name!r}"


def _candidates(
    model: ir.Model, embeddings: bool, skip_nodes: Sequence[str]
) -> Iterator[tuple[MatMulWeight | ir.Node, str]]:
    """Every node with a weight that might be quantized, and why it is not, or an empty string."""
    for found in find_matmul_weights(model):
        if isinstance(found, MatMulWeight):
            shape = (found.out_features, found.in_features)
            yield found, _refusal(found.node, found.source, shape, skip_nodes)
        else:
            yield found
    for node in model.graph if embeddings else ():
        table = _embedding_table(node)
        tensor = constant_of(table)
        if table is None or tensor is None:
            continue
        if not table.is_initializer():
            yield node, "the weight is a Constant node; expected an initializer (run cleanup first)"
            continue
        yield node, _refusal(node, table, tensor.shape.numpy(), skip_nodes)
    inner = list(model.graph.subgraphs())
    for function in model.functions.values():
        inner += [function.graph, *function.subgraphs()]
    for node in (node for graph in inner for node in graph):
        if _has_constant_matrix(node) or (embeddings and _embedding_table(node) is not None):
            yield node, "it is in a subgraph or function; only the main graph is quantized"


def _refusal(node: ir.Node, weight: ir.Value, shape: Sequence[int], skip_nodes: Sequence[str]) -> str:
    names = (node.name or "", weight.name or "")
    for pattern in skip_nodes:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return f"skip_nodes has {pattern!r}"
    if weight.is_graph_output():
        return "the weight is an output of the graph"
    if not all(shape):
        return "the weight is empty"
    left = node.inputs[0]
    rank = left.shape.rank() if left is not None and left.shape is not None else 2
    if node.op_type != "Gather" and rank < 2:
        return f"the left side has {rank} axes; expected at least 2"
    return ""


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


class _Memo:
    """Makes the blocks of a weight once for all the tensors that hold them, then forgets them."""

    def __init__(self, compute: Callable[[], QuantizedBlocks], parts: int) -> None:
        self._compute = compute
        self._parts = parts
        self._left = parts
        self._result: QuantizedBlocks | None = None

    def get(self) -> QuantizedBlocks:
        result = self._result or self._compute()
        self._left -= 1
        if self._left:
            self._result = result
        else:
            self._result, self._left = None, self._parts
        return result


@dataclasses.dataclass
class _Target:
    """The graph that is written to, the names in it, and the block means of activations that it has."""

    graph: ir.Graph
    accuracy_level: int
    taken: set[str]
    means: dict[tuple[ir.Value, int], ir.Value] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Parts:
    """The initializers of one weight, and what was derived from them in the graph."""

    format: BlockFormat
    shape: tuple[int, int]
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    offsets: ir.Value | None
    blocked: ir.Value | None = None


class BlockWriter:
    """Puts weights in blocks in the place of float ones. Nodes that are left without a use stay."""

    def __init__(self, model: ir.Model, *, accuracy_level: int) -> None:
        """Begins with a graph.

        Args:
            model: Changed in place.
            accuracy_level: Of MatMulNBits.
        """
        graph = model.graph
        taken = {value.name or "" for value in (*graph.inputs, *graph.initializers.values())}
        taken.update(value.name or "" for node in graph.all_nodes() for value in node.outputs)
        self._into = _Target(graph, accuracy_level, taken)
        self._positions = {node: number for number, node in enumerate(graph)}

    def replace(
        self, weight: SharedWeight, form: BlockFormat, compute: Callable[[], QuantizedBlocks]
    ) -> None:
        """Replaces a weight in every node that reads it.

        Args:
            weight: What to replace.
            form: How it will be stored.
            compute: Makes the blocks; called when they are written.
        """
        into = self._into

        # In the graph's order, so that what several nodes read stands before the first of them.
        def position(user: MatMulWeight | ir.Node) -> int:
            return self._positions[user.node if isinstance(user, MatMulWeight) else user]

        users = sorted(weight.users, key=position)
        first = users[0].node if isinstance(users[0], MatMulWeight) else users[0]
        parts = _store(into, first, weight, form, compute)
        for user in users:
            node = user.node if isinstance(user, MatMulWeight) else user
            if isinstance(user, MatMulWeight):
                right = parts.codes
                if weight.gathers:
                    if parts.blocked is None:
                        blocks = -(-parts.shape[1] // form.block_size)
                        shape = (parts.shape[0], blocks, form.block_size * form.bits // 8)
                        parts.blocked = _reshape(into, node, parts.codes, shape, f"{weight.name}_blocks")
                    right = parts.blocked
                made = _matmul(into, user, parts, right)
            else:
                made = _gather(into, node, parts)
            old = node.outputs[0]
            name = old.name
            old.replace_all_uses_with(made, replace_graph_outputs=old.is_graph_output())
            into.graph.remove(node, safe=True)
            made.name, made.shape, made.type = name, old.shape, old.type


def _store(
    into: _Target,
    before: ir.Node,
    weight: SharedWeight,
    form: BlockFormat,
    compute: Callable[[], QuantizedBlocks],
) -> _Parts:
    name, (rows, columns) = weight.name, weight.shape
    blocks = -(-columns // form.block_size)
    dtype = weight.tensor.dtype
    stored = ir.DataType.FLOAT16 if form.half_scales else dtype
    has_zeros = not form.symmetric and not form.minimums
    memo = _Memo(compute, parts=2 + has_zeros + form.minimums)
    width = form.block_size * form.bits // 8
    # GatherBlockQuantized wants rows, MatMulNBits rows of blocks; the bytes are the same.
    code_shape = (rows, blocks * width) if weight.gathers else (rows, blocks, width)
    codes = _lazy(
        into, f"{name}_q{form.bits}", ir.DataType.UINT8, code_shape,
        lambda: memo.get().codes.reshape(code_shape),
    )  # fmt: skip
    scales = _lazy(
        into, f"{name}_scales", stored, (rows, blocks), lambda: memo.get().scales.astype(stored.numpy())
    )
    zeros = offsets = None
    if has_zeros:
        zero_shape = (rows, -(-blocks * form.bits // 8))

        def zero_points() -> npt.NDArray[Any]:
            packed = memo.get().zero_points
            assert packed is not None
            return packed

        zeros = _lazy(into, f"{name}_zero_points", ir.DataType.UINT8, zero_shape, zero_points)
    if form.minimums:

        def minimums() -> npt.NDArray[Any]:
            values = memo.get().minimums
            assert values is not None
            return values.astype(stored.numpy())

        offsets = _lazy(into, f"{name}_minimums", stored, (rows, blocks), minimums)
    # Computed by ONNX Runtime once, where it folds constants.
    if stored != dtype:
        scales = _add(into, before, "Cast", [scales], {"to": dtype}, f"{name}_scales_cast", dtype)
        if offsets is not None:
            offsets = _add(into, before, "Cast", [offsets], {"to": dtype}, f"{name}_minimums_cast", dtype)
    if offsets is not None:
        middle = _constant(into, np.array(1 << (form.bits - 1), dtype.numpy()), f"{name}_middle")
        shift = _add(into, before, "Mul", [scales, middle], {}, f"{name}_shift", dtype)
        offsets = _add(into, before, "Add", [offsets, shift], {}, f"{name}_offsets", dtype)
    for value in (scales, offsets):
        if value is not None and value.shape is None:
            value.shape = ir.Shape([rows, blocks])
    return _Parts(form, (rows, columns), codes, scales, zeros, offsets)


def _matmul(
    into: _Target,
    weight: MatMulWeight,
    parts: _Parts,
    right: ir.Value,
) -> ir.Value:
    node, form = weight.node, parts.format
    # Not the one that was found: what makes it may have been replaced since.
    activation = node.inputs[0]
    assert activation is not None
    name = f"{node.name or node.outputs[0].name}_nbits"
    inputs = [activation, right, parts.scales, *([parts.zeros] if parts.zeros is not None else [])]
    attributes: dict[str, Any] = {
        "K": weight.in_features,
        "N": weight.out_features,
        "bits": form.bits,
        "block_size": form.block_size,
        "accuracy_level": into.accuracy_level,
    }
    new = ir.node("MatMulNBits", inputs, attributes, domain=_DOMAIN, name=name)
    into.graph.insert_before(node, new)
    product = new.outputs[0]
    if parts.offsets is None:
        return product
    product.name = _unused(into, f"{name}_codes")
    dtype = activation.dtype or ir.DataType.FLOAT
    key = (activation, form.block_size)
    if key not in into.means:
        into.means[key] = _block_means(into, activation, weight.in_features, form.block_size)
    attributes = {"transB": 1, "alpha": float(form.block_size)}
    shift = _add(
        into, node, "FusedMatMul", [into.means[key], parts.offsets], attributes, f"{name}_offset", dtype,
        domain=_DOMAIN,
    )  # fmt: skip
    return _add(into, node, "Add", [product, shift], {}, f"{name}_sum", dtype)


def _block_means(into: _Target, x: ir.Value, columns: int, block_size: int) -> ir.Value:
    """The mean of each block of the last axis: (..., K) -> (..., K / block)."""
    name, dtype = f"{x.name}_means_{block_size}", x.dtype or ir.DataType.FLOAT
    producer = x.producer()
    # At once after what makes it, so that it stands before everything that reads it.
    beside, after = (into.graph[0], False) if producer is None else (producer, True)
    attributes: dict[str, Any]
    # The one operator with a kernel for it takes three axes, in float32.
    if x.shape is not None and x.shape.rank() == 3 and dtype == ir.DataType.FLOAT:
        attributes = {"kernel_shape": [block_size], "strides": [block_size]}
        return _add(into, beside, "AveragePool", [x], attributes, name, dtype, after=after)
    inputs, attributes = (
        [x, _spread(into, columns, block_size, dtype)],
        {"transB": 1, "alpha": 1 / block_size},
    )
    return _add(into, beside, "FusedMatMul", inputs, attributes, name, dtype, domain=_DOMAIN, after=after)


def _spread(into: _Target, columns: int, block_size: int, dtype: ir.DataType) -> ir.Value:
    """(blocks, K), 1 where a column is in a block: repeats a value to a block, or sums a block to a value."""
    name = f"spread_{columns}_{block_size}_{dtype.name.lower()}"
    if name in into.graph.initializers:
        return into.graph.initializers[name]
    array = np.repeat(np.eye(columns // block_size, dtype=dtype.numpy()), block_size, axis=1)
    return _constant(into, array, name)


def _gather(into: _Target, node: ir.Node, parts: _Parts) -> ir.Value:
    form, indices = parts.format, node.inputs[1]
    name = f"{node.name or node.outputs[0].name}_nbits"
    inputs = [parts.codes, indices, parts.scales, *([parts.zeros] if parts.zeros is not None else [])]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": form.block_size, "bits": form.bits}
    new = ir.node("GatherBlockQuantized", inputs, attributes, domain=_DOMAIN, name=name)
    into.graph.insert_before(node, new)
    rows = new.outputs[0]
    if parts.offsets is None:
        return rows
    rows.name = _unused(into, f"{name}_codes")
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    picked = _add(into, node, "Gather", [parts.offsets, indices], {"axis": 0}, f"{name}_offset", dtype)
    spread = _spread(into, parts.shape[1], form.block_size, dtype)
    repeated = _add(into, node, "MatMul", [picked, spread], {}, f"{name}_spread", dtype)
    return _add(into, node, "Add", [rows, repeated], {}, f"{name}_sum", dtype)


def _add(
    into: _Target,
    beside: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    name: str,
    dtype: ir.DataType,
    *,
    domain: str = "",
    after: bool = False,
) -> ir.Value:
    name = _unused(into, name)
    node = ir.node(op_type, inputs, dict(attributes), domain=domain, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(dtype)
    (into.graph.insert_after if after else into.graph.insert_before)(beside, node)
    return node.outputs[0]


def _unused(into: _Target, name: str) -> str:
    """The name, with a number behind it where something has it already; it is taken then."""
    found = next(
        n for n in (name, *(f"{name}_{i}" for i in range(len(into.taken) + 1))) if n not in into.taken
    )
    into.taken.add(found)
    return found


def _constant(into: _Target, array: npt.NDArray[Any], name: str) -> ir.Value:
    name = _unused(into, name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    value.const_value = ir.tensor(array, name=name)
    into.graph.register_initializer(value)
    return value


def _lazy(into: _Target, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Any) -> ir.Value:
    name = _unused(into, name)
    value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(compute()), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(list(shape)),
        name=name,
    )
    into.graph.register_initializer(value)
    return value


def _reshape(into: _Target, before: ir.Node, value: ir.Value, shape: tuple[int, ...], name: str) -> ir.Value:
    name = _unused(into, name)
    target = _constant(into, np.array(shape, np.int64), f"{name}_shape")
    node = ir.node("Reshape", [value, target], name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, ir.Shape(list(shape)), value.type
    into.graph.insert_before(before, node)
    return output
