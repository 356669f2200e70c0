"""What the kernels of this project can compute in a graph: products, and lookups with weights in blocks."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.block_products import is_computed_constant, product_with_offsets, sums_blocks
from onnxsmith.graph_passes.float_weights import FloatWeight
from onnxsmith.graph_passes.matching import axes_of, int_attribute, is_operator, label
from onnxsmith.graph_passes.packed_weights import BlockWeight, read_weight, stored_codes
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["Lookup", "PackedWeight", "Product", "Uses", "find_uses", "is_bias", "skip_reason", "with_bias"]

_DOMAIN = "com.microsoft"
_INT8 = 4
_FLOAT = ir.DataType.FLOAT
_IDS = (ir.DataType.INT64, ir.DataType.INT32)
_PRODUCTS = frozenset({("", "MatMul"), (_DOMAIN, "FusedMatMul"), (_DOMAIN, "MatMulNBits")})
PackedWeight = BlockWeight | FloatWeight


@dataclasses.dataclass(frozen=True)
class Product:
    """``x @ weight.T + bias``.

    Attributes:
        node: The MatMulNBits or MatMul.
        x: (..., K).
        weight: (N, K).
        bias: (N,), or None.
        result: (..., N), the value of all of it.
        summed: The Sum of more than these two, behind the result, that the bias is taken out of; or None.
    """

    node: ir.Node
    x: ir.Value
    weight: PackedWeight
    bias: ir.Value | None
    result: ir.Value
    summed: ir.Node | None = None

    @property
    def last(self) -> ir.Node:
        """What makes the result."""
        node = self.result.producer()
        assert node is not None
        return node


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a weight.

    Attributes:
        node: The GatherBlockQuantized.
        ids: Which rows.
        weight: (N, K).
        result: (..., K).
    """

    node: ir.Node
    ids: ir.Value
    weight: BlockWeight
    result: ir.Value

    @property
    def last(self) -> ir.Node:
        """What makes the result."""
        node = self.result.producer()
        assert node is not None
        return node


@dataclasses.dataclass
class Uses:
    """What reads weights in blocks.

    Attributes:
        found: In the order of the graph.
        refused: Names of nodes that stay, and why.
    """

    found: list[Product | Lookup]
    refused: dict[str, str]


def find_uses(model: ir.Model, *, refuse: Callable[[ir.Node, str], str]) -> Uses:
    """Finds the products and lookups of a graph and its branches that the kernels can compute.

    A weight goes over with everything that reads it, or it would be stored twice: where one of its readers
    stays, all stay.

    Args:
        model: Where to look.
        refuse: Says why a node, with the name of its weight, has to stay; an empty string where it need not.
    """
    found: list[Product | Lookup] = []
    refused: dict[str, str] = {}
    holders: dict[ir.Value, str] = {}
    for graph in model.graphs():
        for node in graph:
            if is_operator(node, "MatMulNBits", _DOMAIN):
                use: Product | Lookup | str = _product(node)
            elif is_operator(node, "GatherBlockQuantized", _DOMAIN):
                use = _lookup(node)
            else:
                continue
            if not isinstance(use, str):
                use = refuse(node, use.weight.name) or use
            if isinstance(use, str):
                refused[label(node)] = use
                holder = stored_codes(_codes(node))
                if holder is not None:
                    holders.setdefault(holder, f"{label(node)} reads its weight too, and stays: {use}")
            else:
                found.append(use)
    known = {use.node for use in found}
    for use in found:
        holder = _holder(use)
        other = next((node for node in _readers(holder) if node not in known), None)
        if other is not None:
            holders.setdefault(holder, f"{label(other)} reads its weight too")
        if holder.is_graph_output():
            holders.setdefault(holder, "its weight is an output of the graph")
    kept = []
    for use in found:
        reason = holders.get(_holder(use))
        if reason is None:
            kept.append(use)
        else:
            refused[label(use.node)] = reason
    return Uses(kept, refused)


def skip_reason(patterns: Sequence[str], *names: str) -> str:
    """Why something with these names stays, where patterns say so; an empty string else."""
    fitting = [one for one in patterns if any(fnmatch.fnmatchcase(name, one) for name in names)]
    return f"skip_nodes has {fitting[0]!r}" if fitting else ""


def _codes(node: ir.Node) -> ir.Value | None:
    return node.inputs[1 if node.op_type == "MatMulNBits" else 0]


def _holder(use: Product | Lookup) -> ir.Value:
    holder = use.weight.identity[0]
    assert holder is not None
    return holder


def _readers(holder: ir.Value) -> list[ir.Node]:
    """The nodes that read codes, through a Reshape or not."""
    found: list[ir.Node] = []
    for node in holder.consumers():
        if node.op_type == "Reshape" and not node.outputs[0].is_graph_output():
            found += node.outputs[0].consumers()
        else:
            found.append(node)
    return found


def _product(node: ir.Node) -> Product | str:
    x = node.inputs[0]
    inputs = [*node.inputs, None, None, None]
    level = int_attribute(node, "accuracy_level")
    if level != _INT8:
        return f"its accuracy_level is {level}: activations are not rounded there; expected {_INT8}"
    if inputs[4] is not None:
        return "it has a group index"
    if x is None or (x.dtype is not None and x.dtype is not _FLOAT):
        return f"its left side is {x.dtype.name if x is not None and x.dtype else 'missing'}; expected FLOAT"
    behind = x.producer()
    if sums_blocks(node) or (behind is not None and _sums_stand_behind(behind)):
        return "it is for block sums behind its input, as fold_minimums has them; leave that pass out"
    rows, columns = int_attribute(node, "N"), int_attribute(node, "K")
    result, offsets = product_with_offsets(node, x)
    weight = read_weight(
        node, codes=inputs[1], scales=inputs[2], zeros=inputs[3], offsets=offsets, rows=rows, columns=columns
    )
    if isinstance(weight, str):
        return weight
    bias = inputs[5]
    if bias is not None and not is_bias(bias, rows):
        return "its bias is not constant"
    summed = None
    if bias is None:
        result, bias, summed = with_bias(result, rows)
    if result.producer() is None or result.producer().graph is not node.graph:  # type: ignore[union-attr]
        return "what is added to it stands in another graph"
    return Product(node, x, weight, bias, result, summed)


def _sums_stand_behind(concat: ir.Node) -> bool:
    """Whether a node puts block sums of its first operand behind that."""
    if concat.op_type != "Concat":
        return False
    first = concat.inputs[0]
    pending, seen = list(concat.inputs[1:]), 0
    while pending and seen < 8:
        value, seen = pending.pop(), seen + 1
        if value is first:
            return True
        node = value.producer() if value is not None else None
        pending += [] if node is None else list(node.inputs)
    return False


def with_bias(result: ir.Value, rows: int) -> tuple[ir.Value, ir.Value | None, ir.Node | None]:
    """What a product becomes with a constant of N numbers that is added to it, alone or with other values."""
    users = result.consumers()
    if len(users) != 1 or result.is_graph_output() or len(result.uses()) != 1:
        return result, None, None
    add = users[0]
    if not (is_operator(add, "Add") or is_operator(add, "Sum")):
        return result, None, None
    others = [value for value in add.inputs if value is not None and value is not result]
    biases = [value for value in others if is_bias(value, rows)]
    if len(biases) != 1:
        return result, None, None
    if len(others) == 1:
        return add.outputs[0], biases[0], None
    first = next((value.producer() for value in add.inputs if value is not None and _is_product(value)), None)
    # Of two products in one sum, the first gets it.
    return (result, biases[0], add) if first is result.producer() else (result, None, None)


def _is_product(value: ir.Value) -> bool:
    """Whether a value is a product, or the sum of one and its offsets."""
    node = value.producer()
    if node is not None and is_operator(node, "Add"):
        makers = [one.producer() for one in node.inputs if one is not None]
        return any(is_operator(one, "MatMulNBits", _DOMAIN) for one in makers)
    return node is not None and (node.domain, node.op_type) in _PRODUCTS


def is_bias(value: ir.Value, rows: int) -> bool:
    """Whether a value is a constant of so many float32 numbers."""
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype is _FLOAT and tuple(tensor.shape.numpy()) == (rows,)


def _lookup(node: ir.Node) -> Lookup | str:
    inputs = [*node.inputs, None]
    codes, ids, scales, zeros = inputs[:4]
    if int_attribute(node, "gather_axis") or int_attribute(node, "quantize_axis", 1) not in (1, -1):
        return "it looks up columns, or its blocks lie along rows"
    if ids is None or ids.dtype not in _IDS:
        return "the type of its ids is not known to be INT64 or INT32"
    axes = axes_of(codes)
    if axes is None or len(axes) != 2 or not all(isinstance(size, int) for size in axes):
        return "its codes are not known to have two axes"
    rows, width = (size for size in axes if isinstance(size, int))
    result, offsets = _with_spread(node, ids)
    weight = read_weight(
        node, codes=codes, scales=scales, zeros=zeros, offsets=offsets, rows=rows,
        columns=width * 8 // int_attribute(node, "bits", 4),
    )  # fmt: skip
    if isinstance(weight, str):
        return weight
    if result.producer() is None or result.producer().graph is not node.graph:  # type: ignore[union-attr]
        return "what is added to it stands in another graph"
    return Lookup(node, ids, weight, result)


def _with_spread(node: ir.Node, ids: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The rows with what is added to each block of them, as ``block_operators`` writes it."""
    rows = node.outputs[0]
    uses = list(rows.uses())
    if len(uses) != 1 or rows.is_graph_output() or uses[0].node.op_type != "Add":
        return rows, None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    repeated = other.producer() if other is not None else None
    if repeated is None or repeated.op_type != "MatMul" or not is_computed_constant(repeated.inputs[1]):
        return rows, None
    picked = repeated.inputs[0].producer() if repeated.inputs[0] is not None else None
    if picked is None or picked.op_type != "Gather" or picked.inputs[1] is not ids:
        return rows, None
    offsets = picked.inputs[0]
    if int_attribute(picked, "axis") or not is_computed_constant(offsets):
        return rows, None
    spread = constant_of(repeated.inputs[1])
    if spread is None or not _repeats(spread.numpy(), int_attribute(node, "block_size")):
        return rows, None
    return add.outputs[0], offsets


def _repeats(matrix: npt.NDArray[Any], size: int) -> bool:
    """Whether a product with a matrix repeats each number so often."""
    return np.array_equal(matrix, np.repeat(np.eye(len(matrix), dtype=matrix.dtype), size, axis=1))
