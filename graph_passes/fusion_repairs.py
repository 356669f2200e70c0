"""What onnxscript's fusions leave that ONNX Runtime refuses to run, made right after them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.matching import axes_of, int_attribute, is_operator, small_constant

__all__ = ["repair_fusions", "spread_positions", "turn_batches"]

_DOMAIN = "com.microsoft"


def repair_fusions(model: ir.Model) -> None:
    """Repairs a model in place; shapes have to be known as far as they were before the fusions."""
    spread_positions(model)
    turn_batches(model)


def spread_positions(model: ir.Model) -> int:
    """Gives RotaryEmbedding a position for each token of each row, where one row of positions was for all.

    onnxscript takes positions (1, tokens) as they are; the operator has them repeated for the batch.

    Returns:
        For how many.
    """
    made: dict[tuple[ir.Value, int | str | ir.Value], ir.Value] = {}
    count = 0
    for node in list(model.graph):
        if not is_operator(node, "RotaryEmbedding", _DOMAIN):
            continue
        x, positions = node.inputs[:2]
        axes, given = axes_of(x), axes_of(positions)
        if x is None or positions is None or not axes or given is None or len(given) != 2:
            continue
        if given[0] != 1 or axes[0] == 1:
            continue
        key = (positions, axes[0] if axes[0] is not None else x)
        if key not in made:
            made[key] = _for_each_row(node, positions, x)
        node.replace_input_with(1, made[key])
        count += 1
    return count


def _for_each_row(node: ir.Node, positions: ir.Value, x: ir.Value) -> ir.Value:
    first, one = (small_constant(node.outputs[0], np.array([number], np.int64)) for number in (0, 1))
    size = ir.node("Shape", [x])
    rows = ir.node("Gather", [size.outputs[0], first])
    target = ir.node("Concat", [rows.outputs[0], one], {"axis": 0})
    spread = ir.node("Expand", [positions, target.outputs[0]])
    assert node.graph is not None
    node.graph.insert_before(node, [size, rows, target, spread])
    lengths = ((size, len(axes_of(x) or ())), (rows, 1), (target, 2))
    for maker, length in lengths:
        maker.outputs[0].type, maker.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([length])
    value = spread.outputs[0]
    value.type = positions.type
    value.shape = ir.Shape([(axes_of(x) or (None,))[0], (axes_of(positions) or (None, None))[1]])
    return value


def turn_batches(model: ir.Model) -> int:
    """Puts a Transpose back that FusedMatMul does only for two operands of three or more axes each.

    ``transBatchA`` and ``transBatchB`` move the first axis behind the other batch axes. With a matrix for the
    other operand ONNX Runtime refuses to.

    Returns:
        How many.
    """
    count = 0
    for node in list(model.graph):
        if not is_operator(node, "FusedMatMul", _DOMAIN):
            continue
        ranks = [len(axes) if (axes := axes_of(value)) is not None else None for value in node.inputs[:2]]
        if ranks[0] == ranks[1] and (ranks[0] or 0) > 2:
            continue
        for index, name in enumerate(("transBatchA", "transBatchB")):
            value, rank = node.inputs[index], ranks[index]
            if not int_attribute(node, name) or value is None or rank is None:
                continue
            order = [*range(1, rank - 1), 0, rank - 1]
            turned = ir.node("Transpose", [value], {"perm": order})
            model.graph.insert_before(node, turned)
            made = turned.outputs[0]
            made.type = value.type
            made.shape = (
                None if value.shape is None else ir.Shape([list(value.shape)[axis] for axis in order])
            )
            node.replace_input_with(index, made)
            node.attributes.pop(name)
            count += 1
    return count
