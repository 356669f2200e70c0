"""Gemm between two Reshapes, as torch's ``addmm`` is written: MatMul and Add on all axes."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import (
    Axes,
    axes_of,
    int_attribute,
    is_operator,
    label,
    reads_dequantized,
    same_axes,
    small_constant,
)
from onnxsmith.graph_passes.reshapes import copies_axes, rows_refusal
from onnxsmith.graph_passes.rewriting import NoMatchError, rewrite_each
from onnxsmith.graph_passes.weights import constant_of, turned_weight

__all__ = ["GemmToMatMul"]


class GemmToMatMul(GraphPass):
    """Replaces a Gemm on flattened rows by MatMul and Add, which take the axes as they are.

    ``transformers.Conv1D`` (GPT-2) views (batch, sequence, width) as rows, calls ``addmm``, and views the
    result back. Fusions look for MatMul and Add, and so does quantization to blocks.
    """

    name: ClassVar[str] = "gemm_to_matmul"
    summary: ClassVar[str] = "Reshape, Gemm, Reshape become MatMul and Add: what fuses and what is quantized"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Rewrites in the main graph, and says which Gemm between Reshapes stays and why."""
        changes, _ = rewrite_each(model, _rewrite)
        if changes.count:
            changes.details = {"rewritten": changes.count}
        return changes


def _rewrite(graph: ir.Graph, gemm: ir.Node) -> str | None:
    view = gemm.inputs[0].producer() if is_operator(gemm, "Gemm") and gemm.inputs[0] else None
    if view is None or not is_operator(view, "Reshape"):
        return None
    if reads_dequantized(gemm):
        raise NoMatchError("it reads dequantized values, and a runtime computes it in integers")
    source, weight, bias = view.inputs[0], gemm.inputs[1], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    for name, usual in (("alpha", 1.0), ("beta", 1.0)):
        attribute = gemm.attributes.get(name)
        if attribute is not None and attribute.as_float() != usual and (name == "alpha" or bias is not None):
            raise NoMatchError(f"it has {name} {attribute.as_float():g}")
    if int_attribute(gemm, "transA"):
        raise NoMatchError("it turns its first operand")
    sizes = axes_of(weight)
    if source is None or weight is None or sizes is None or len(sizes) != 2:
        raise NoMatchError("the shape of its weight is not known")
    inner, width = sizes[::-1] if int_attribute(gemm, "transB") else sizes
    if not isinstance(inner, int) or not isinstance(width, int):
        raise NoMatchError("the shape of its weight is not known")
    if bias is not None and not _is_one_row(axes_of(bias), width):
        raise NoMatchError("its bias is not known to be the same for all rows")
    lead = _lead(axes_of(source), inner)
    result = gemm.outputs[0]
    users = result.consumers()
    if result.is_graph_output() or not users or not all(is_operator(user, "Reshape") for user in users):
        raise NoMatchError("its result is not read by Reshape alone")
    if any(user.inputs[0] is not result or user.graph is not graph for user in users):
        raise NoMatchError("its result is not read by Reshape alone")
    # The Reshape after it then has another input, of which it must copy no axis.
    back = [user for user in users if _is_back(user, source, lead, width)]
    if any(copies_axes(user) for user in users if user not in back):
        raise NoMatchError("the Reshape after it copies an axis")
    axes = axes_of(source)
    assert axes is not None
    left, kind = source, result.type or weight.type
    if len(axes) != len(lead) + 1:
        rows = small_constant(result, np.array([*[0] * len(lead), inner], np.int64))
        left = _add(graph, gemm, "Reshape", [source, rows], source.type, (*lead, inner), "rows")
    if int_attribute(gemm, "transB"):
        weight = _turned(graph, gemm, weight)
    made = _add(graph, gemm, "MatMul", [left, weight], kind, (*lead, width), "matmul")
    if bias is not None:
        made = _add(graph, gemm, "Add", [made, bias], kind, (*lead, width), "bias")
    for user in users:
        output = user.outputs[0]
        if user not in back or output.is_graph_output():
            user.replace_input_with(0, made)
            continue
        if user is back[0] and not any(one.outputs[0].is_graph_output() for one in back):
            # The name stays, so that tensors of the two graphs can be compared.
            made.name, output.name = output.name, f"{output.name}_viewed"
        output.replace_all_uses_with(made)
    return "MatMul"


def _is_one_row(axes: Axes | None, width: int) -> bool:
    """Whether a bias is added to each row alike, whatever axes the rows have."""
    return (
        axes is not None and len(axes) <= 2 and axes[:-1] in ((), (1,)) and axes[-1:] in ((), (1,), (width,))
    )


def _lead(axes: Axes | None, inner: int) -> Axes:
    """The axes of the rows: all but the fewest at the end that hold what is multiplied."""
    if axes is None:
        raise NoMatchError("the shape of what is viewed as rows is not known")
    for count in range(1, len(axes)):
        tail = [axis for axis in axes[-count:] if isinstance(axis, int)]
        if len(tail) == count and math.prod(tail) == inner:
            if len(axes) - count < 2:
                break
            return axes[:-count]
    raise NoMatchError(f"what is viewed as rows has no axes before those of size {inner}")


def _is_back(user: ir.Node, source: ir.Value, lead: Axes, width: int) -> bool:
    """Whether a Reshape gives back the axes that the rows had."""
    if same_axes(axes_of(user.outputs[0]), (*lead, width)):
        return True
    return len(lead) == 2 and not rows_refusal(user, source, [width])


def _turned(graph: ir.Graph, gemm: ir.Node, weight: ir.Value) -> ir.Value:
    if constant_of(weight) is not None and weight.is_initializer() and len(weight.uses()) == 1:
        return turned_weight(graph, weight)
    axes = axes_of(weight)
    assert axes is not None
    return _add(graph, gemm, "Transpose", [weight], weight.type, axes[::-1], "weight", perm=[1, 0])


def _add(
    graph: ir.Graph,
    gemm: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    kind: ir.TypeProtocol | None,
    axes: Axes,
    suffix: str,
    **attributes: list[int],
) -> ir.Value:
    """A node before the Gemm; its result has this type."""
    node = ir.node(op_type, inputs, attributes, name=f"{label(gemm)}_{suffix}")
    graph.insert_before(gemm, node)
    node.outputs[0].type, node.outputs[0].shape = kind, ir.Shape(axes)
    return node.outputs[0]
