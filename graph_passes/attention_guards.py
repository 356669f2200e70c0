"""What onnxscript's fusions of attention take for granted, made true before they look."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.matching import axes_of, int_attribute, is_operator, small_constant
from onnxsmith.graph_passes.reshapes import copies_axes, rows_refusal
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["guard_biases", "guard_results", "keep_cached_heads"]

_DOMAIN = "com.microsoft"
# onnxscript's operator between the product of attention and its fused forms.
_ATTENTION, _FUSION_DOMAIN = "SDPA", "ai.onnxruntime._fusion"
_SWAP_HEADS = (0, 2, 1, 3)
_KEY, _VALUE, _BIAS = 1, 2, 3


def guard_results(model: ir.Model) -> None:
    """Makes each Reshape of an attention's result one to (batch, sequence, heads * size), and one from there.

    MultiHeadAttention is put in the place of the Reshape, which may make something else: GPT-2 views the
    result as rows for a Gemm. A mask that is the same for all keys is spread over them, which the operator
    does not do.
    """
    for node in list(model.graph):
        if not is_operator(node, _ATTENTION, _FUSION_DOMAIN):
            continue
        _spread_mask(model.graph, node)
        for turned in node.outputs[0].consumers():
            if _permutation(turned) != _SWAP_HEADS:
                continue
            for user in turned.outputs[0].consumers():
                if is_operator(user, "Reshape") and user.inputs[0] is turned.outputs[0]:
                    _guard_result(model.graph, turned.outputs[0], user)


def _guard_result(graph: ir.Graph, heads: ir.Value, view: ir.Node) -> None:
    axes = axes_of(heads)
    if axes is not None and len(axes) == 4:
        count, size = axes[2:]
        if isinstance(count, int) and isinstance(size, int) and not rows_refusal(view, heads, [count * size]):
            return
    if copies_axes(view, first=2):
        # Of an axis that the rows do not have any more: no fusion looks through an Identity.
        between = ir.node("Identity", [heads])
    else:
        shape = small_constant(view.outputs[0], np.array([0, 0, -1], np.int64))
        between = ir.node("Reshape", [heads, shape])
    graph.insert_before(view, between)
    made = between.outputs[0]
    made.type = heads.type
    if axes is not None and len(axes) == 4:
        count, size = axes[2:]
        width = count * size if isinstance(count, int) and isinstance(size, int) else None
        made.shape = ir.Shape(axes if between.op_type == "Identity" else [*axes[:2], width])
    view.replace_input_with(0, made)


def _spread_mask(graph: ir.Graph, node: ir.Node) -> None:
    mask, key = node.inputs[3] if len(node.inputs) > 3 else None, node.inputs[1]
    axes, keys = axes_of(mask), axes_of(key)
    if mask is None or key is None or axes is None or keys is None or len(keys) != 4:
        return
    form = node.attributes.get("key_format")
    length = 1 if form is not None and form.as_string() == "BSHd" else 2
    if (axes and axes[-1] != 1) or keys[length] == 1:
        return
    # Without the attributes start and end of Shape, which operator sets below 15 do not have.
    place = small_constant(node.outputs[0], np.array([length], np.int64))
    size = ir.node("Shape", [key])
    pick = ir.node("Gather", [size.outputs[0], place])
    spread = ir.node("Expand", [mask, pick.outputs[0]])
    graph.insert_before(node, [size, pick, spread])
    for value, sizes in ((size.outputs[0], [4]), (pick.outputs[0], [1])):
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(sizes)
    made = spread.outputs[0]
    made.type, made.shape = mask.type, ir.Shape([*axes[:-1], keys[length]])
    node.replace_input_with(3, made)


def guard_biases(model: ir.Model) -> None:
    """Hides each sum before a MultiHeadAttention that does not add the same row to all rows.

    The fusion takes what is added for a bias, of whatever shape it is.
    """
    for node in list(model.graph):
        if not is_operator(node, "MultiHeadAttention", _DOMAIN):
            continue
        for index, value in enumerate(node.inputs[:3]):
            adding = value.producer() if value is not None else None
            if value is None or adding is None or not is_operator(adding, "Add"):
                continue
            bias, width = adding.inputs[1], (axes_of(value) or (None,))[-1:]
            if constant_of(bias) is not None and axes_of(bias) == width:
                continue
            hidden = ir.node("Identity", [value])
            model.graph.insert_before(node, hidden)
            hidden.outputs[0].type, hidden.outputs[0].shape = value.type, value.shape
            node.replace_input_with(index, hidden.outputs[0])


def keep_cached_heads(model: ir.Model) -> int:
    """Gives MultiHeadAttention a cache of other tokens' keys and values as (batch, heads, length, size).

    onnxscript turns both into rows first, which copies all of the cache for each token, and the operator
    turns them back.

    Returns:
        For how many.
    """
    count = 0
    for node in list(model.graph):
        if not is_operator(node, "MultiHeadAttention", _DOMAIN):
            continue
        given = [*node.inputs, *[None] * 8]
        if any(value is not None for value in (given[_BIAS], *given[6:8])) or len(node.outputs) > 1:
            continue
        heads = [_heads_of(given[index], int_attribute(node, "num_heads")) for index in (_KEY, _VALUE)]
        if any(value is None for value in heads):
            continue
        # As rows the two may have heads of other sizes (DeepSeek's latent attention), as heads not.
        if len({(axes_of(value) or ())[-1:] for value in heads}) > 1:
            continue
        for index, value in zip((_KEY, _VALUE), heads, strict=True):
            node.replace_input_with(index, value)
        count += 1
    return count


def _heads_of(rows: ir.Value | None, count: int) -> ir.Value | None:
    """(batch, heads, length, size), if rows are made of that by Transpose and Reshape."""
    view = rows.producer() if rows is not None else None
    if view is None or not is_operator(view, "Reshape") or view.inputs[0] is None:
        return None
    turned = view.inputs[0].producer()
    if turned is None or _permutation(turned) != _SWAP_HEADS or turned.inputs[0] is None:
        return None
    axes = axes_of(turned.inputs[0])
    if axes is None or len(axes) != 4 or axes[1] != count or not isinstance(axes[3], int):
        return None
    return None if rows_refusal(view, turned.outputs[0], [count * axes[3]]) else turned.inputs[0]


def _permutation(node: ir.Node) -> tuple[int, ...]:
    attribute = node.attributes.get("perm") if is_operator(node, "Transpose") else None
    return () if attribute is None else tuple(attribute.as_ints())
