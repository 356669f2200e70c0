"""Attention of decoders as ONNX Runtime runs it fastest: flat operands, rotation inside the operator.

The operators are defined at
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import (
    axes_of,
    constant_integers,
    insert_after,
    int_attribute,
    is_operator,
    label,
    same_axes,
    small_constant,
)

__all__ = ["FlattenAttention", "RotaryInAttention", "range_of_rows"]

_DOMAIN = "com.microsoft"
_QUERY, _KEY, _VALUE, _TOTAL = 0, 1, 2, 6
_COS, _SIN, _POSITIONS, _QUERY_LENGTHS = 7, 8, 9, 16
_SWAPPED = (0, 2, 1, 3)
# What may stand between the Range of positions and the table of cosines: each row of the result is made of
# one row of its input, so more rows leave those that were there as they are.
_ROW_WISE = frozenset({"Cast", "Cos", "Sin", "Mul", "MatMul", "Reshape", "Unsqueeze", "Identity"})


class FlattenAttention(GraphPass):
    """Feeds GroupQueryAttention and RotaryEmbedding without Reshape and Transpose around them.

    Models view a projection as (batch, sequence, heads, size), swap axes, rotate, and swap and view it back.
    Both operators take (batch, sequence, heads * size) as well, so all of that goes. A Reshape after others
    that ends in the shape that it began with goes everywhere.
    """

    name: ClassVar[str] = "flatten_attention"
    summary: ClassVar[str] = "remove the Reshape and Transpose around attention and rotary embedding"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Rewires the operands; what is not used any more goes."""
        changes = Changes()
        before = _layout_nodes(model)
        for node in list(model.graph):
            if not is_operator(node, "GroupQueryAttention", _DOMAIN):
                continue
            for index in (_QUERY, _KEY, _VALUE):
                value = node.inputs[index] if index < len(node.inputs) else None
                if value is None:
                    continue
                flat = _flat_rows(value)
                if isinstance(flat, str):
                    changes.skipped[f"{label(node)} input {index}"] = flat
                elif flat is not value:
                    node.replace_input_with(index, flat)
                    changes.count += 1
        changes.count += _shorten_reshapes(model.graph)
        if changes.count:
            common.RemoveUnusedNodesPass()(model)
            changes.details = {"layout_nodes_before": before, "layout_nodes_after": _layout_nodes(model)}
        return changes


def _layout_nodes(model: ir.Model) -> int:
    return sum(node.op_type in ("Reshape", "Transpose") for node in model.graph)


def _flat_rows(value: ir.Value) -> ir.Value | str:
    """The same content of shape (batch, sequence, heads * size), without detours.

    Returns:
        The value itself where there is no detour, or the reason why the detour stays.
    """
    node = value.producer()
    if node is None or not is_operator(node, "Reshape"):
        return value
    inner = node.inputs[0]
    axes = axes_of(value)
    if inner is None or axes is None or len(axes) != 3:
        return "the shape of its operand is not known"
    if same_axes(axes_of(inner), axes):
        return _flat_rows(inner) if is_operator(inner.producer(), "Reshape") else inner
    flat = _flat_from_views(inner)
    if isinstance(flat, str):
        return flat
    if not same_axes(axes_of(flat), axes):
        return "the operand comes from a value of another shape"
    return flat


def _flat_from_views(value: ir.Value) -> ir.Value | str:
    """From (batch, sequence, heads, size)."""
    axes = axes_of(value)
    if axes is None or len(axes) != 4 or not isinstance(axes[2], int) or not isinstance(axes[3], int):
        return "the number or size of its heads is not known"
    node = value.producer()
    if node is not None and is_operator(node, "Reshape") and node.inputs[0] is not None:
        source = node.inputs[0]
        if same_axes(axes_of(source), (axes[0], axes[1], axes[2] * axes[3])):
            return source
    if node is not None and _swaps_heads(node) and node.inputs[0] is not None:
        looked_through = _flat_from_heads(node.inputs[0])
        if looked_through is not None:
            return looked_through
        return f"{label(node)} swaps the axes of a value that no rule looks through"
    # Anything else that computes on views, such as a norm of each head: one Reshape, no Transpose.
    shape = small_constant(value, np.array([0, 0, axes[2] * axes[3]], np.int64))
    made = insert_after(value, "Reshape", [value, shape], {})
    made.shape = ir.Shape([axes[0], axes[1], axes[2] * axes[3]])
    return made


def _flat_from_heads(value: ir.Value) -> ir.Value | None:
    """From (batch, heads, sequence, size)."""
    axes = axes_of(value)
    node = value.producer()
    if node is None or axes is None or len(axes) != 4:
        return None
    if _swaps_heads(node) and node.inputs[0] is not None:
        viewed = _flat_from_views(node.inputs[0])
        return None if isinstance(viewed, str) else viewed
    if not is_operator(node, "RotaryEmbedding", _DOMAIN):
        return None
    source, positions, cos, sin = node.inputs[:4]
    heads, size, cos_axes = axes[1], axes[3], axes_of(cos)
    if source is None or not isinstance(heads, int) or not isinstance(size, int) or cos_axes is None:
        return None
    rotated = int_attribute(node, "rotary_embedding_dim") or size
    if not isinstance(cos_axes[-1], int) or 2 * cos_axes[-1] != rotated:
        return None
    flat = _flat_from_heads(source)
    if flat is None:
        return None
    attributes = {name: attr for name, attr in node.attributes.items() if name != "num_heads"}
    made = insert_after(
        value, "RotaryEmbedding", [flat, positions, cos, sin], {"num_heads": heads}, domain=_DOMAIN
    )
    new = made.producer()
    assert new is not None
    for name, attribute in attributes.items():
        new.attributes[name] = attribute
    if rotated == size:
        # The size of a head follows from the table; the operator wants both or neither.
        new.attributes.pop("num_heads", None)
        new.attributes.pop("rotary_embedding_dim", None)
    made.shape = ir.Shape([axes[0], axes[2], heads * size])
    return made


def _swaps_heads(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return (
        is_operator(node, "Transpose")
        and permutation is not None
        and tuple(permutation.as_ints()) == _SWAPPED
    )


def _shorten_reshapes(graph: ir.Graph) -> int:
    """Removes each Reshape whose result has the shape that a value had before one or more Reshapes."""
    count = 0
    for node in list(graph):
        if not is_operator(node, "Reshape"):
            continue
        output, value = node.outputs[0], node.inputs[0]
        axes = axes_of(output)
        while value is not None and axes is not None:
            if same_axes(axes_of(value), axes) and value.dtype == output.dtype:
                if output.uses() and not output.is_graph_output():
                    output.replace_all_uses_with(value)
                    count += 1
                break
            producer = value.producer()
            value = producer.inputs[0] if producer is not None and is_operator(producer, "Reshape") else None
    return count


class RotaryInAttention(GraphPass):
    """Moves RotaryEmbedding of query and key into GroupQueryAttention (``do_rotary``).

    The operator, given a prompt and no more, counts positions from the first one of the first row, for all
    rows. For batches with padding on the left that is wrong. With its input ``query_seqlens`` it takes every
    position as given. ONNX Runtime has that input since 1.32, on CPU and CUDA.
    """

    name: ClassVar[str] = "rotary_in_attention"
    summary: ClassVar[str] = "rotate query and key inside GroupQueryAttention (do_rotary)"
    layerwise: ClassVar[bool] = True

    def __init__(self, *, padded_batches: bool = True) -> None:
        """Sets which positions the result is right for.

        Args:
            padded_batches: True: any positions, which needs ONNX Runtime 1.32 or later and its CPU or CUDA
                provider. False: runs on older ones too, but a prompt's positions must count up from the
                same number in every row, so batches with padding on the left are **wrong, silently**.
        """
        self.padded_batches = padded_batches

    def apply(self, model: ir.Model) -> Changes:
        """Moves each pair of rotations that fits, and says why others stay."""
        changes = Changes()
        tables: dict[ir.Value, None] = {}
        lengths: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            if not is_operator(node, "GroupQueryAttention", _DOMAIN) or int_attribute(node, "do_rotary"):
                continue
            rotations = [value.producer() for value in node.inputs[:2] if value is not None]
            if not any(is_operator(one, "RotaryEmbedding", _DOMAIN) for one in rotations):
                if any(_turns_back(one) for one in rotations):
                    changes.skipped[label(node)] = "its operands are not flat (run flatten_attention first)"
                continue
            reason = self._refusal(node, rotations)
            if reason:
                changes.skipped[label(node)] = reason
                continue
            query, key = rotations
            assert query is not None and key is not None
            positions, cos, sin = query.inputs[1:4]
            assert positions is not None and cos is not None and sin is not None
            for table in (cos, sin):
                if table not in tables:
                    _lengthen(table, node.inputs[_TOTAL])
                    tables[table] = None
            inputs = [*node.inputs, *[None] * (10 - len(node.inputs))]
            inputs[_QUERY], inputs[_KEY] = query.inputs[0], key.inputs[0]
            inputs[_COS], inputs[_SIN], inputs[_POSITIONS] = cos, sin, positions
            if self.padded_batches:
                if positions not in lengths:
                    lengths[positions] = _row_lengths(node, positions)
                inputs += [None] * (_QUERY_LENGTHS + 1 - len(inputs))
                inputs[_QUERY_LENGTHS] = lengths[positions]
            _replace_inputs(node, inputs)
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
            node.attributes["rotary_interleaved"] = ir.AttrInt64(
                "rotary_interleaved", int_attribute(query, "interleaved")
            )
            changes.count += 1
        if changes.count:
            model.graph.sort()
            common.RemoveUnusedNodesPass()(model)
            changes.details = {"fused": changes.count}
        return changes

    def _refusal(self, node: ir.Node, rotations: list[ir.Node | None]) -> str:
        if len(rotations) != 2 or not all(is_operator(one, "RotaryEmbedding", _DOMAIN) for one in rotations):
            return "only one of query and key is rotated"
        query, key = rotations
        assert query is not None and key is not None
        if query.inputs[1:4] != key.inputs[1:4]:
            return "query and key are rotated by different angles"
        for name in ("interleaved", "is_packed_batching", "rotary_embedding_dim"):
            if int_attribute(query, name) != int_attribute(key, name):
                return f"query and key are rotated with different {name}"
        if int_attribute(query, "is_packed_batching"):
            return "rows are packed without padding"
        for one in (query, key):
            scale = one.attributes.get("scale")
            if scale is not None and scale.as_float() != 1.0:
                return "the rotation also scales"
        axes, cos = axes_of(query.inputs[0]), axes_of(query.inputs[2])
        if axes is None or len(axes) != 3:
            return "the shape of its operand is not known"
        heads = int_attribute(node, "num_heads")
        if not isinstance(axes[2], int) or cos is None or not isinstance(cos[-1], int):
            return "the size of a head is not known"
        # What the kernel checks when it runs.
        if (axes[2] // heads) % 16:
            return f"heads of size {axes[2] // heads}; with do_rotary the operator wants a multiple of 16"
        if cos[-1] % 8:
            return f"{cos[-1]} angles; with do_rotary the operator wants a multiple of 8"
        if not same_axes(axes_of(query.inputs[1]), axes[:2]):
            return "there is not one position for each token of each row"
        if query.inputs[1] is None or query.inputs[1].dtype != ir.DataType.INT64:
            return "positions are not int64"
        if len(node.inputs) > _COS and any(node.inputs[_COS : _POSITIONS + 1]):
            return "the operator has a table already"
        for table in query.inputs[2:4]:
            if table is None or (table.const_value is None and range_of_rows(table) is None):
                return "the table of angles is computed in a way that no rule knows"
        return ""


def _turns_back(node: ir.Node | None) -> bool:
    inner = node.inputs[0] if node is not None and is_operator(node, "Reshape") else None
    return inner is not None and is_operator(inner.producer(), "Transpose")


def range_of_rows(table: ir.Value) -> ir.Node | None:
    """The Range of positions that a table of cosines or sines is made of, row by row, or None."""
    value: ir.Value | None = table
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if is_operator(node, "Range"):
            start, _, step = (constant_integers(one) for one in node.inputs)
            return node if start == [0] and step == [1] else None
        if node.op_type not in _ROW_WISE or node.domain not in ("", "ai.onnx"):
            return None
        # Everything but the first operand must be the same for all rows.
        varying = [one for one in node.inputs if one is not None and one.const_value is None]
        if len(varying) != 1:
            return None
        value = varying[0]
    return None


def _lengthen(table: ir.Value, total: ir.Value | None) -> None:
    """Makes a table as long as the cache: the operator checks that, whatever positions it is given."""
    node = range_of_rows(table)
    if node is None or total is None:
        return
    limit = node.inputs[1]
    assert limit is not None
    maker = limit.producer()
    if maker is not None and is_operator(maker, "Max") and (maker.name or "").startswith("table_length"):
        return
    widened = ir.node("Cast", [total], {"to": ir.DataType.INT64.value}, name="table_total")
    longest = ir.node("Max", [limit, widened.outputs[0]], name="table_length")
    for one, like in ((widened, ir.Shape([])), (longest, ir.Shape([]))):
        one.outputs[0].shape = like
        one.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        assert node.graph is not None
        node.graph.insert_before(node, one)
    node.replace_input_with(1, longest.outputs[0])


def _row_lengths(node: ir.Node, positions: ir.Value) -> ir.Value:
    """(batch,) int32: all of a row's new tokens are valid. Padding is hidden by the attention bias."""
    # Without the attributes start and end of Shape, which operator sets below 15 do not have.
    size = ir.node("Shape", [positions], name="size_of_batch")
    first, second = (small_constant(positions, np.array([index], np.int64)) for index in (0, 1))
    rows = ir.node("Gather", [size.outputs[0], first], name="rows_of_batch")
    tokens = ir.node("Gather", [size.outputs[0], second], name="tokens_of_row")
    narrow = ir.node("Cast", tokens.outputs, {"to": ir.DataType.INT32.value}, name="tokens_of_row_int32")
    spread = ir.node("Expand", [narrow.outputs[0], rows.outputs[0]], name="tokens_of_rows")
    kinds = (
        (size, "INT64", 2),
        (rows, "INT64", 1),
        (tokens, "INT64", 1),
        (narrow, "INT32", 1),
        (spread, "INT32", 1),
    )
    for one, kind, _ in kinds:
        one.outputs[0].type = ir.TensorType(ir.DataType[kind])
        one.outputs[0].shape = ir.Shape([2 if one is size else 1])
        assert node.graph is not None
        node.graph.insert_before(node, one)
    axes = axes_of(positions)
    assert axes is not None
    spread.outputs[0].shape = ir.Shape([axes[0]])
    return spread.outputs[0]


def _replace_inputs(node: ir.Node, inputs: list[ir.Value | None]) -> None:
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        if node.inputs[index] is not value:
            node.replace_input_with(index, value)
