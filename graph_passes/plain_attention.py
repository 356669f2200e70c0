"""Attention written out in ONNX's own operators, as TorchScript's exporter and optimum leave it."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import (
    axes_of,
    constant_integers,
    int_attribute,
    is_operator,
    label,
    leads_only_to,
    reads_dequantized,
    small_constant,
)
from onnxsmith.graph_passes.reshapes import rows_refusal, same_rows_as
from onnxsmith.graph_passes.rewriting import NoMatchError, rewrite_each
from onnxsmith.graph_passes.weights import constant_of, joined_weights

__all__ = ["FuseAttention"]

_DOMAIN = "com.microsoft"
_SWAP_HEADS, _KEYS_AT_ONCE, _SWAP_LAST = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2)


# A mask, and the values whose rows queries and keys are, to the mask in full.
_Masks = dict[tuple[ir.Value, ir.Value, ir.Value], ir.Value]


@dataclasses.dataclass(frozen=True)
class _Heads:
    """A projection seen as heads.

    Attributes:
        rows: (batch, sequence, heads * size).
        heads: How many.
        size: Of each.
        scale: What it is multiplied with on the way.
    """

    rows: ir.Value
    heads: int
    size: int
    scale: float = 1.0


class FuseAttention(GraphPass):
    """Fuses ``softmax(q @ k + mask) @ v`` into Attention or MultiHeadAttention of ONNX Runtime.

    Looks through scales on either side of the product, and through shapes that the graph computes. Where
    query, key and value are projections of one value, their weights are joined and the projections go into
    the operator too. The mask stays the addition that it was.
    """

    name: ClassVar[str] = "fuse_attention"
    summary: ClassVar[str] = "fuse attention that is written out in ONNX operators, as in optimum's exports"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Fuses what matches, and says at which node the others do not."""
        masks: _Masks = {}

        def fuse(graph: ir.Graph, node: ir.Node) -> str | None:
            return _fuse(graph, node, masks) if is_operator(node, "Softmax") else None

        changes, made = rewrite_each(model, fuse, domain=_DOMAIN)
        if changes.count:
            changes.details = {"made": dict(sorted(made.items()))}
        return changes


def _fuse(
    graph: ir.Graph, softmax: ir.Node, masks: dict[tuple[ir.Value, ir.Value, ir.Value], ir.Value]
) -> str:
    axis = int_attribute(softmax, "axis", -1)
    source = softmax.inputs[0]
    if source is None or axis not in (-1, 3) or len(axes_of(source) or ()) != 4:
        raise NoMatchError("a softmax that is not over the last of four axes")
    weighted = _only_user(softmax.outputs[0], "MatMul")
    if weighted.inputs[0] is not softmax.outputs[0] or weighted.inputs[1] is None:
        raise NoMatchError("its result is not the left side of the product with the values")
    scores, mask = _scores_and_mask(source)
    scores, after = _unscaled(scores)
    product = scores.producer()
    if product is None or not _is_product(product) or None in product.inputs:
        raise NoMatchError("the scores do not come from a MatMul")
    left, right = product.inputs
    assert left is not None and right is not None
    factor = product.attributes.get("alpha")
    after *= 1.0 if factor is None else factor.as_float()
    query, key, value = (
        _heads(left, keys=False),
        _heads(right, keys=not int_attribute(product, "transB")),
        _heads(weighted.inputs[1], keys=False),
    )
    if len({one.heads for one in (query, key, value)}) != 1 or query.size != key.size:
        raise NoMatchError("query, key and value have different heads")
    back = _only_user(weighted.outputs[0], "Transpose")
    if _permutation(back) != _SWAP_HEADS:
        raise NoMatchError("its result is not swapped back to (batch, sequence, heads, size)")
    final = _view_of(back.outputs[0])
    width = value.heads * value.size
    _require_rows(final, query.rows, [width])
    bias = _whole_mask(graph, mask, query.rows, key.rows, masks, before=final) if mask is not None else None
    kind, made = _operator(graph, query, key, value, bias, query.scale * key.scale * after, final)
    made.type = final.outputs[0].type or query.rows.type
    made.shape = ir.Shape([*(axes_of(query.rows) or (None, None))[:2], width])
    output = final.outputs[0]
    if output.is_graph_output():
        made.name, output.name = output.name, f"{output.name}_unfused"
    output.replace_all_uses_with(made, replace_graph_outputs=True)
    return kind


def _require_rows(node: ir.Node, like: ir.Value, tail: list[int]) -> None:
    reason = rows_refusal(node, like, tail)
    if reason:
        raise NoMatchError(reason)


def _only_user(value: ir.Value, op_type: str) -> ir.Node:
    users = [use.node for use in value.uses()]
    if value.is_graph_output() or len(users) != 1 or not is_operator(users[0], op_type):
        raise NoMatchError(f"{value.name!r} is not read by one {op_type} alone")
    return users[0]


def _view_of(value: ir.Value) -> ir.Node:
    """The one Reshape that reads a value; its own shape may be computed from the value's shape."""
    users = [use.node for use in value.uses()]
    views = [node for node in users if is_operator(node, "Reshape")]
    others = [node for node in users if node not in views]
    if (
        value.is_graph_output()
        or len(views) != 1
        or not all(is_operator(node, "Shape") and leads_only_to(node, views[:1]) for node in others)
    ):
        raise NoMatchError(f"{value.name!r} is not read by one Reshape alone")
    return views[0]


def _permutation(node: ir.Node | None) -> tuple[int, ...]:
    attribute = node.attributes.get("perm") if node is not None and is_operator(node, "Transpose") else None
    return () if attribute is None else tuple(attribute.as_ints())


def _scores_and_mask(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    node = value.producer()
    if node is None or not is_operator(node, "Add"):
        return value, None
    left, right = node.inputs
    assert left is not None and right is not None
    for scores, mask in ((left, right), (right, left)):
        try:
            inner, _ = _unscaled(scores)
        except NoMatchError:
            continue
        if _is_product(inner.producer()):
            if axes_of(mask) is None:
                raise NoMatchError("what is added to the scores has an unknown shape")
            if len(axes_of(mask) or ()) > 4:
                raise NoMatchError("the mask has more than four axes")
            return scores, mask
    raise NoMatchError("neither operand of the sum before it is a product, scaled by one constant")


def _is_product(node: ir.Node | None) -> bool:
    """MatMul, or what onnxscript makes of it and a scale or a transposition of the keys."""
    if node is not None and is_operator(node, "FusedMatMul", _DOMAIN):
        return not any(int_attribute(node, name) for name in ("transA", "transBatchA", "transBatchB"))
    return is_operator(node, "MatMul")


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """What a value is a multiple of, and the factor."""
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div") or node.domain not in ("", "ai.onnx"):
        return value, 1.0
    left, right = node.inputs
    assert left is not None and right is not None
    factor = _scalar(right)
    if factor is not None:
        return left, factor if node.op_type == "Mul" else 1 / factor
    factor = _scalar(left) if node.op_type == "Mul" else None
    if factor is None:
        raise NoMatchError("the scores or their operands are scaled by something that is not one constant")
    return right, factor


def _scalar(value: ir.Value | None, depth: int = 0) -> float | None:
    """The number that a value always is, also where the graph computes it from a fixed axis."""
    tensor = constant_of(value)
    if tensor is not None:
        return float(tensor.numpy().reshape(-1)[0]) if tensor.size == 1 else None
    node = value.producer() if value is not None else None
    if node is None or depth > 8 or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in ("Slice", "Gather"):
        shape = node.inputs[0].producer() if node.inputs[0] is not None else None
        index = constant_integers(node.inputs[1])
        axes = axes_of(shape.inputs[0]) if shape is not None and is_operator(shape, "Shape") else None
        if not axes or not index or len(index) != 1 or not -len(axes) <= index[0] < len(axes):
            return None
        if node.op_type == "Slice" and index[0] not in (-1, len(axes) - 1):
            return None
        size = axes[index[0]]
        return float(size) if isinstance(size, int) else None
    parts = [_scalar(one, depth + 1) for one in node.inputs]
    numbers = [part for part in parts if part is not None]
    if len(numbers) != len(parts):
        return None
    if node.op_type in ("Cast", "Identity", "Unsqueeze", "Squeeze") and numbers:
        return numbers[0]
    if node.op_type == "Sqrt" and numbers[0] >= 0:
        return math.sqrt(numbers[0])
    if node.op_type == "Div" and numbers[1]:
        return numbers[0] / numbers[1]
    return numbers[0] * numbers[1] if node.op_type == "Mul" else None


def _heads(value: ir.Value, *, keys: bool) -> _Heads:
    """Query and value as (batch, heads, sequence, size), keys with the last two axes swapped."""
    value, scale = _unscaled(value)
    node = value.producer()
    permutation = _permutation(node)
    if keys and permutation == _SWAP_LAST:
        assert node is not None and node.inputs[0] is not None
        value, more = _unscaled(node.inputs[0])
        scale, node = scale * more, value.producer()
        permutation = _KEYS_AT_ONCE if _permutation(node) == _SWAP_HEADS else ()
    if node is None or permutation != (_KEYS_AT_ONCE if keys else _SWAP_HEADS):
        raise NoMatchError(f"{value.name!r} is not a projection with its axes swapped")
    view = node.inputs[0].producer() if node.inputs[0] is not None else None
    if view is None or not is_operator(view, "Reshape") or view.inputs[0] is None:
        raise NoMatchError(f"{value.name!r} is not a projection that was viewed as heads")
    axes, rows = axes_of(view.outputs[0]), axes_of(view.inputs[0])
    if axes is None or rows is None or len(rows) != 3 or not all(isinstance(axis, int) for axis in axes[2:]):
        raise NoMatchError(f"the number or size of the heads of {value.name!r} is not known")
    heads, size = (int(axis) for axis in axes[2:] if axis is not None)
    if rows[2] != heads * size:
        raise NoMatchError(f"the heads of {value.name!r} are not all of its columns")
    _require_rows(view, view.inputs[0], [heads, size])
    return _Heads(view.inputs[0], heads, size, scale)


def _whole_mask(
    graph: ir.Graph,
    mask: ir.Value,
    query: ir.Value,
    key: ir.Value,
    known: _Masks,
    *,
    before: ir.Node,
) -> ir.Value:
    """The mask with its last two axes in full, which the operator does not broadcast."""
    where = (mask, same_rows_as(query), same_rows_as(key))
    if where in known:
        return known[where]
    nodes = []
    lengths = []
    one = small_constant(mask if mask.graph is not None else query, np.array([1], np.int64))
    for value in where[1:]:
        size = ir.node("Shape", [value])
        pick = ir.node("Gather", [size.outputs[0], one])
        nodes += [size, pick]
        lengths.append(pick.outputs[0])
    target = ir.node("Concat", [one, one, *lengths], {"axis": 0})
    spread = ir.node("Expand", [mask, target.outputs[0]])
    for node in (*nodes, target):
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([{"Shape": 3, "Gather": 1, "Concat": 4}[node.op_type]])
    spread.outputs[0].type, spread.outputs[0].shape = mask.type, ir.Shape([None] * 4)
    graph.insert_before(before, [*nodes, target, spread])
    known[where] = spread.outputs[0]
    return spread.outputs[0]


def _operator(
    graph: ir.Graph,
    query: _Heads,
    key: _Heads,
    value: _Heads,
    mask: ir.Value | None,
    scale: float,
    before: ir.Node,
) -> tuple[str, ir.Value]:
    """Attention where the three are projections of one value, else MultiHeadAttention."""
    parts = [_projection(one.rows) for one in (query, key, value)]
    attributes = {"num_heads": query.heads, "scale": scale}
    name = f"{label(before)}_attention"
    whole = all(part is not None for part in parts)
    known = [part for part in parts if part is not None]
    if whole and len({part[0] for part in known}) == 1 and value.size == query.size:
        # The operator wants a bias, the weights and the bias in one.
        weights = joined_weights(graph, [part[1] for part in known], axis=1)
        biases = joined_weights(graph, [part[2] for part in known], axis=0)
        node = ir.node(
            "Attention", [known[0][0], weights, biases, None, None, mask],
            attributes | {"qkv_hidden_sizes": [one.heads * one.size for one in (query, key, value)]},
            domain=_DOMAIN, name=name,
        )  # fmt: skip
    else:
        node = ir.node(
            "MultiHeadAttention", [query.rows, key.rows, value.rows, None, None, mask],
            attributes, domain=_DOMAIN, name=name,
        )  # fmt: skip
    graph.insert_before(before, node)
    return node.op_type, node.outputs[0]


def _projection(rows: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Activation, weight and bias of ``x @ w + b`` that nobody else reads, or None."""
    node = rows.producer()
    if node is None or not is_operator(node, "Add"):
        return None
    for product, bias in (node.inputs, node.inputs[::-1]):
        maker = product.producer() if product is not None else None
        if maker is None or not is_operator(maker, "MatMul") or bias is None or maker.inputs[1] is None:
            continue
        weight, activation = maker.inputs[1], maker.inputs[0]
        tensors = [constant_of(weight), constant_of(bias)]
        if activation is None or any(tensor is None for tensor in tensors) or reads_dequantized(maker):
            continue
        ranks = [len(tensor.shape) for tensor in tensors if tensor is not None]
        usable = all(one.is_initializer() and len(one.uses()) == 1 for one in (weight, bias))
        if ranks == [2, 1] and usable and len(rows.uses()) == 1:
            return activation, weight, bias
    return None
