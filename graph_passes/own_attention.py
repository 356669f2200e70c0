"""Attention by the kernels of this project, with and without a cache.

The inputs are those of ONNX Runtime's operators, see docs/kernels.md.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.attention import range_of_rows
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import (
    axes_of,
    int_attribute,
    is_operator,
    label,
    leads_only_to,
    small_constant,
)
from onnxsmith.graph_passes.own_heads import HeadsTaker, heads_refusal
from onnxsmith.graph_passes.packed_functions import function_refusal, settle
from onnxsmith.own_operators import OWN_DOMAIN
from onnxsmith.package import depends_on_values

__all__ = ["UseOwnAttention"]

_DOMAIN = "com.microsoft"
_PAST, _LENGTHS, _COS, _SIN, _POSITIONS = 3, 5, 7, 8, 9
# As many inputs as the kernel takes. Of those behind, only the lengths of queries may be there: the kernel
# takes every position as it is given, which is what ONNX Runtime needs the lengths for.
_TAKEN, _QUERY_LENGTHS = 12, 16
_ATTRIBUTES = frozenset(
    {
        "num_heads",
        "kv_num_heads",
        "scale",
        "softcap",
        "local_window_size",
        "do_rotary",
        "rotary_interleaved",
    }
)
_VECTOR = 16


class UseOwnAttention(GraphPass):
    """Gives GroupQueryAttention and MultiHeadAttention to the kernels of this project.

    ONNX Runtime's GroupQueryAttention wants a table of angles for every position of the cache, which graphs
    compute anew for each token. The kernel here takes a row for each token. MultiHeadAttention takes a mask
    of padding as one row for all queries, where ONNX Runtime wants it repeated for each, and query, key and
    value as one operand: three products of one value become one. A row's result is bitwise the same whatever
    other rows are computed with it, so a prompt in pieces gives what the whole gives.
    """

    name: ClassVar[str] = "use_own_attention"
    summary: ClassVar[str] = "attention on the kernels of onnxsmith (CPU)"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Changes each operator that a kernel can take, and says why others stay."""
        changes = Changes()
        unable, heads = function_refusal(model), HeadsTaker(model)
        taken = []
        plain = packed = 0
        for node in list(model.graph.all_nodes()):
            if is_operator(node, "GroupQueryAttention", _DOMAIN):
                reason = unable or _refusal(node)
            elif is_operator(node, "MultiHeadAttention", _DOMAIN):
                reason = unable or (
                    heads_refusal(node) if node.graph is model.graph else "it stands in a branch"
                )
            else:
                continue
            if reason:
                changes.skipped[label(node)] = reason
            elif node.op_type == "MultiHeadAttention":
                plain += 1
                packed += heads.take(node)
            else:
                node.domain = OWN_DOMAIN
                node.resize_inputs(min(len(node.inputs), _TAKEN))
                while node.inputs[-1] is None:
                    node.resize_inputs(len(node.inputs) - 1)
                taken.append(node)
        changes.count = plain + len(taken)
        if changes.count:
            angles = _rows_of_angles(model, taken) if taken else False
            settle(model)
            changes.details = {"attention": changes.count}
            changes.details |= {"angles of new tokens only": angles} if taken else {}
            changes.details |= {"without a cache": plain, "of one operand": packed} if plain else {}
        return changes


def _refusal(node: ir.Node) -> str:
    strange = [
        name for name, attribute in node.attributes.items() if name not in _ATTRIBUTES and attribute.value
    ]
    if strange:
        return f"the kernel has no {', '.join(sorted(strange))}"
    for index, value in enumerate(node.inputs):
        if value is not None and index >= _TAKEN and index != _QUERY_LENGTHS:
            return f"the kernel has no input {index} of GroupQueryAttention"
    if node.inputs[0] is None or node.inputs[0].dtype is not ir.DataType.FLOAT:
        return "the kernel computes in float32"
    past = node.inputs[_PAST] if len(node.inputs) > _PAST else None
    if past is None or node.inputs[_PAST + 1] is None or len(node.outputs) < 3:
        return "it has no cache"
    if past.dtype is not ir.DataType.FLOAT:
        return f"its cache is {past.dtype}, and the kernel's is float32"
    axes = axes_of(past)
    if axes is None or not isinstance(axes[-1], int) or axes[-1] % _VECTOR:
        return f"the size of its heads is no known multiple of {_VECTOR}"
    lengths = node.inputs[_LENGTHS]
    if lengths is not None and depends_on_values(lengths):
        return "its rows have lengths of their own"
    return ""


def _rows_of_angles(model: ir.Model, nodes: list[ir.Node]) -> bool:
    """Computes angles of the positions that are asked for, where tables of all positions were computed."""
    rotating = [node for node in nodes if int_attribute(node, "do_rotary")]
    inputs = {tuple(node.inputs[_COS : _POSITIONS + 1]) for node in rotating}
    positions = next(iter(inputs))[-1] if len(inputs) == 1 and len(rotating[0].inputs) > _POSITIONS else None
    if positions is None or positions.dtype is not ir.DataType.INT64:
        return False
    tables = rotating[0].inputs[_COS : _SIN + 1]
    ranges = [range_of_rows(table) for table in tables if table is not None]
    if len(ranges) != 2 or None in ranges:
        return False
    sources = {source for source in ranges if source is not None}
    if not all(leads_only_to(source, rotating, depth=8) for source in sources):
        return False
    for source in sources:
        assert source.graph is not None
        counted = source.outputs[0]
        whole = small_constant(positions, np.array([-1], np.int64))
        flat = ir.node("Reshape", [positions, whole], name="positions_of_tokens")
        flat.outputs[0].type, flat.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None])
        made = [flat]
        if counted.dtype is not ir.DataType.INT64:
            assert counted.dtype is not None
            cast = ir.node("Cast", flat.outputs, {"to": counted.dtype.value}, name="positions_as_numbers")
            cast.outputs[0].type, cast.outputs[0].shape = counted.type, ir.Shape([None])
            made.append(cast)
        source.graph.insert_before(source, made)
        counted.replace_all_uses_with(made[-1].outputs[0])
    for node in rotating:
        node.attributes["rotary_rows"] = ir.AttrInt64("rotary_rows", 1)
    model.graph.sort()
    return True
