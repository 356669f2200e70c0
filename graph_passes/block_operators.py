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

from onnxsmith.graph_passes.block_nodes import (
    BlockTarget,
    add_node,
    block_sums,
    constant,
    lazy,
    reshape,
    spread,
    unused,
)
from onnxsmith.graph_passes.blocks import BlocksOnce, QuantizedBlocks
from onnxsmith.graph_passes.names import value_names
from onnxsmith.graph_passes.weights import (
    MatMulWeight,
    constant_of,
    find_matmul_weights,
    is_transpose,
    matrix_rows,
)

__all__ = ["ARITHMETIC", "BlockFormat", "BlockWriter", "SharedWeight", "find_weights", "node_label"]

ARITHMETIC: Mapping[int, str] = {
    0: "float, as the activations",
    1: "float32",
    2: "float16",
    3: "bfloat16",
    4: "int8, activations rounded to 8 bits in blocks",
}
"""What MatMulNBits may compute in, by its accuracy_level; for manifests."""

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
    def read_elsewhere(self) -> bool:
        """Whether something else reads it, which must find it as it is."""
        known = {user.node if isinstance(user, MatMulWeight) else user for user in self.users}
        readers = {node for node, _ in self.value.uses()}
        for node in [node for node in readers if is_transpose(node)]:
            readers |= {user for user, _ in node.outputs[0].uses()}
            readers.discard(node)
        return self.value.is_graph_output() or not readers <= known

    @property
    def activations(self) -> list[ir.Value]:
        """What it is multiplied with."""
        return [user.activation for user in self.users if isinstance(user, MatMulWeight)]

    def rows(self) -> npt.NDArray[np.float32]:
        """The weight as (N, K), float32."""
        return np.asarray(matrix_rows(self.tensor, self.is_transposed), dtype=np.float32)


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
        self._into = BlockTarget(graph, accuracy_level, value_names(model))
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
                        parts.blocked = reshape(into, node, parts.codes, shape, f"{weight.name}_blocks")
                    right = parts.blocked
                made = _matmul(into, user, parts, right)
            else:
                made = _gather(into, node, parts)
            old = node.outputs[0]
            name = old.name
            old.replace_all_uses_with(made, replace_graph_outputs=old.is_graph_output())
            into.graph.remove(node, safe=True)
            made.name, made.shape, made.type = name, old.shape, old.type

    def constant(
        self, name: str, compute: Callable[[], npt.NDArray[Any]], shape: tuple[int, ...], dtype: ir.DataType
    ) -> ir.Value:
        """An initializer that is computed when it is written."""
        return lazy(self._into, name, dtype, shape, compute)

    def add_offsets(self, node: ir.Node, offsets: ir.Value) -> None:
        """Adds block sums of the input, times an offset for each block, to what a MatMulNBits gives.

        Args:
            node: The MatMulNBits.
            offsets: (N, blocks).
        """
        old = node.outputs[0]
        uses, is_output = list(old.uses()), old.is_graph_output()
        name, shape, kind = old.name, old.shape, old.type
        columns, size = (node.attributes[key].as_int() for key in ("K", "block_size"))
        made = _shifted(self._into, node, offsets, columns, size)
        for user, index in uses:
            user.replace_input_with(index, made)
        if is_output:
            outputs = self._into.graph.outputs
            outputs[:] = [made if value is old else value for value in outputs]
        made.name, made.shape, made.type = name, shape, kind


def _store(
    into: BlockTarget,
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
    memo = BlocksOnce(compute, parts=2 + has_zeros + form.minimums)
    width = form.block_size * form.bits // 8
    # GatherBlockQuantized wants rows, MatMulNBits rows of blocks; the bytes are the same.
    code_shape = (rows, blocks * width) if weight.gathers else (rows, blocks, width)
    codes = lazy(
        into, f"{name}_q{form.bits}", ir.DataType.UINT8, code_shape,
        lambda: memo.get().codes.reshape(code_shape),
    )  # fmt: skip
    scales = lazy(
        into, f"{name}_scales", stored, (rows, blocks), lambda: memo.get().scales.astype(stored.numpy())
    )
    zeros = offsets = None
    if has_zeros:
        zero_shape = (rows, -(-blocks * form.bits // 8))

        def zero_points() -> npt.NDArray[Any]:
            packed = memo.get().zero_points
            assert packed is not None
            return packed

        zeros = lazy(into, f"{name}_zero_points", ir.DataType.UINT8, zero_shape, zero_points)
    if form.minimums:

        def minimums() -> npt.NDArray[Any]:
            values = memo.get().minimums
            assert values is not None
            return values.astype(stored.numpy())

        offsets = lazy(into, f"{name}_minimums", stored, (rows, blocks), minimums)
    # Computed by ONNX Runtime once, where it folds constants.
    if stored != dtype:
        scales = add_node(into, before, "Cast", [scales], {"to": dtype}, f"{name}_scales_cast", dtype)
        if offsets is not None:
            offsets = add_node(into, before, "Cast", [offsets], {"to": dtype}, f"{name}_minimums_cast", dtype)
    if offsets is not None:
        middle = constant(into, np.array(1 << (form.bits - 1), dtype.numpy()), f"{name}_middle")
        shift = add_node(into, before, "Mul", [scales, middle], {}, f"{name}_shift", dtype)
        offsets = add_node(into, before, "Add", [offsets, shift], {}, f"{name}_offsets", dtype)
    for value in (scales, offsets):
        if value is not None and value.shape is None:
            value.shape = ir.Shape([rows, blocks])
    return _Parts(form, (rows, columns), codes, scales, zeros, offsets)


def _matmul(
    into: BlockTarget,
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
    if parts.offsets is None:
        return new.outputs[0]
    return _shifted(into, new, parts.offsets, weight.in_features, form.block_size)


def _shifted(into: BlockTarget, node: ir.Node, offsets: ir.Value, columns: int, block_size: int) -> ir.Value:
    """What a MatMulNBits gives, and the block sums of its input times an offset for each block."""
    product, activation = node.outputs[0], node.inputs[0]
    assert activation is not None
    name = node.name or product.name or "nbits"
    product.name = unused(into, f"{name}_codes")
    dtype = activation.dtype or ir.DataType.FLOAT
    key = (activation, block_size)
    if key not in into.sums:
        into.sums[key] = block_sums(into, activation, columns, block_size)
    sums, factor = into.sums[key]
    attributes = {"transB": 1, "alpha": factor}
    shift = add_node(
        into, node, "FusedMatMul", [sums, offsets], attributes, f"{name}_offset", dtype,
        domain=_DOMAIN, after=True,
    )  # fmt: skip
    maker = shift.producer()
    assert maker is not None
    return add_node(into, maker, "Add", [product, shift], {}, f"{name}_sum", dtype, after=True)


def _gather(into: BlockTarget, node: ir.Node, parts: _Parts) -> ir.Value:
    form, indices = parts.format, node.inputs[1]
    name = f"{node.name or node.outputs[0].name}_nbits"
    inputs = [parts.codes, indices, parts.scales, *([parts.zeros] if parts.zeros is not None else [])]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": form.block_size, "bits": form.bits}
    new = ir.node("GatherBlockQuantized", inputs, attributes, domain=_DOMAIN, name=name)
    into.graph.insert_before(node, new)
    rows = new.outputs[0]
    if parts.offsets is None:
        return rows
    rows.name = unused(into, f"{name}_codes")
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    picked = add_node(into, node, "Gather", [parts.offsets, indices], {"axis": 0}, f"{name}_offset", dtype)
    blocks = spread(into, parts.shape[1], form.block_size, dtype)
    repeated = add_node(into, node, "MatMul", [picked, blocks], {}, f"{name}_spread", dtype)
    return add_node(into, node, "Add", [rows, repeated], {}, f"{name}_sum", dtype)
