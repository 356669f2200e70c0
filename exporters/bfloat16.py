"""Arithmetic in bfloat16 inside a model of another type, for runtimes without kernels for it.

Some models round a part of their computation to bfloat16, whatever their weights are in (the slopes of ALiBi
in Falcon). ONNX Runtime's CPU provider converts to and from that type and does nothing else with it. PyTorch
computes such an operator in float32 and rounds the result, and so does the graph then: to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["widen_bfloat16"]


def widen_bfloat16(model: ir.Model) -> int:
    """Computes operators on bfloat16 in float32, and rounds their results; says how many there were."""
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    graph, widened = model.graph, 0
    given: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        inside = any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
        )
        if node.op_type in ("Cast", "Constant") or node.domain not in ("", "ai.onnx") or inside:
            continue
        ours = [output for output in node.outputs if output.dtype == narrow]
        if not ours and not any(value is not None and value.dtype == narrow for value in node.inputs):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != narrow:
                continue
            if value not in given:
                cast = ir.node("Cast", [value], {"to": int(wide)})
                cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(wide), value.shape
                graph.insert_before(node, cast)
                given[value] = cast.outputs[0]
            node.replace_input_with(index, given[value])
        for output in ours:
            cast = ir.node("Cast", [output], {"to": int(narrow)})
            rounded = cast.outputs[0]
            rounded.type, rounded.shape = ir.TensorType(narrow), output.shape
            for user, index in tuple(output.uses()):
                if user is not cast:
                    user.replace_input_with(index, rounded)
            for place, value in enumerate(graph.outputs):
                if value is output:
                    graph.outputs[place] = rounded
                    rounded.name, output.name = output.name, f"{output.name}_float32"
            output.type = ir.TensorType(wide)
            graph.insert_after(node, cast)
        widened += 1
    return widened
