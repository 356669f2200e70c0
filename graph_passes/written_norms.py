"""LayerNorm and RMSNorm that are written out, as exporters for older operator sets leave them."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import axes_of, constant_integers, int_attribute, is_operator, label
from onnxsmith.graph_passes.rewriting import NoMatchError, rewrite_each
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["FuseNorms"]

_FIRST_OPSET = 17


class FuseNorms(GraphPass):
    """Fuses normalisation over the last axes, with a weight, into one operator.

    ``(x - mean) / sqrt(variance + epsilon) * weight + bias`` becomes LayerNormalization, which ONNX has since
    opset 17; ``x / sqrt(mean of x ** 2 + epsilon) * weight`` becomes SimplifiedLayerNormalization of ONNX
    Runtime. Squares may be Pow or Mul, and the root may divide or be inverted first.
    """

    name: ClassVar[str] = "fuse_norms"
    summary: ClassVar[str] = "fuse LayerNorm and RMSNorm that are written out, in any operator set"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Fuses in the main graph, and says at which square root nothing was fused and why."""
        opset = max((model.opset_imports.get(domain, 0) for domain in ("", "ai.onnx")), default=0)

        def fuse(graph: ir.Graph, node: ir.Node) -> str | None:
            return _fuse(graph, node, opset) if is_operator(node, "Sqrt") else None

        changes, made = rewrite_each(model, fuse)
        if changes.count:
            changes.details = {"made": made}
        return changes


def _fuse(graph: ir.Graph, root: ir.Node, opset: int) -> str | None:
    found = _mean_of_squares(root.inputs[0])
    if found is None:
        # A square root of something else.
        return None
    deviation, axes, epsilon = found
    x = _centred(deviation, axes)
    source = deviation if x is None else x
    kind = "SimplifiedLayerNormalization" if x is None else "LayerNormalization"
    if source.dtype != ir.DataType.FLOAT:
        got = source.dtype.name if source.dtype is not None else "not known"
        raise NoMatchError(f"it is fused in float32; the element type is {got}")
    if x is not None and opset < _FIRST_OPSET:
        raise NoMatchError(
            f"opset {opset} has no LayerNormalization; {_FIRST_OPSET} has (convert_opset). ONNX Runtime "
            "fuses it when it loads the model"
        )
    normalised = _normalised(root.outputs[0], deviation, x, axes)
    first = _first_axis(axes, source)
    product, weight = _only_with(normalised, "Mul", "the weight", source, first)
    output, inputs = product, [source, weight]
    if x is not None:
        try:
            output, bias = _only_with(product, "Add", "the bias", source, first)
            inputs.append(bias)
        except NoMatchError:
            # The bias is optional.
            output = product
    last = output.producer()
    assert last is not None
    if last.graph is not graph:
        raise NoMatchError("its result is computed in a subgraph")
    attributes = {"axis": first, "epsilon": epsilon, "stash_type": ir.DataType.FLOAT.value}
    node = ir.node(kind, inputs, attributes, name=f"{label(last)}_norm")
    graph.insert_before(last, node)
    made = node.outputs[0]
    made.type, made.shape = output.type or source.type, output.shape or source.shape
    # The name stays, so that tensors of the two graphs can be compared.
    made.name, output.name = output.name, f"{output.name}_unfused"
    output.replace_all_uses_with(made, replace_graph_outputs=True)
    return kind


def _mean_of_squares(value: ir.Value | None) -> tuple[ir.Value, list[int], float] | None:
    """What ``mean(d ** 2) + epsilon`` is of, over which axes, and epsilon."""
    add = value.producer() if value is not None else None
    if add is None or not is_operator(add, "Add"):
        return None
    for mean, constant in (add.inputs, add.inputs[::-1]):
        epsilon, averaged = _number(constant), _averaged(mean)
        if epsilon is None or averaged is None:
            continue
        square = averaged[0].producer()
        if square is None:
            continue
        base = square.inputs[0]
        twice = is_operator(square, "Mul") and base is square.inputs[1]
        power = is_operator(square, "Pow") and _number(square.inputs[1]) == 2.0
        if base is not None and (twice or power):
            return base, averaged[1], epsilon
    return None


def _averaged(value: ir.Value | None) -> tuple[ir.Value, list[int]] | None:
    """What a value is the mean of, with its axes kept, and which axes."""
    node = value.producer() if value is not None else None
    if node is None or not is_operator(node, "ReduceMean") or not int_attribute(node, "keepdims", 1):
        return None
    given = node.attributes.get("axes")
    if given is not None:
        axes: list[int] | None = list(given.as_ints())
    else:
        axes = constant_integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if not axes or node.inputs[0] is None:
        return None
    return node.inputs[0], axes


def _centred(value: ir.Value, axes: list[int]) -> ir.Value | None:
    """x, if a value is x without its mean over the axes."""
    node = value.producer()
    if node is None or not is_operator(node, "Sub"):
        return None
    averaged = _averaged(node.inputs[1])
    if averaged is None or averaged[0] is not node.inputs[0] or averaged[1] != axes:
        return None
    return node.inputs[0]


def _normalised(root: ir.Value, deviation: ir.Value, x: ir.Value | None, axes: list[int]) -> ir.Value:
    """The deviation divided by its root, or multiplied with one over it."""
    users = root.consumers()
    if root.is_graph_output() or len(users) != 1:
        raise NoMatchError("its square root is not read by one node alone")
    [user] = users
    inverse = is_operator(user, "Reciprocal") or (
        is_operator(user, "Div") and user.inputs[1] is root and _number(user.inputs[0]) == 1.0
    )
    if inverse:
        again = user.outputs[0].consumers()
        if user.outputs[0].is_graph_output() or len(again) != 1 or not is_operator(again[0], "Mul"):
            raise NoMatchError("one over its square root is not read by one Mul alone")
        [product] = again
        others = [value for value in product.inputs if value is not user.outputs[0]]
    elif is_operator(user, "Div") and user.inputs[1] is root:
        product, others = user, [user.inputs[0]]
    else:
        raise NoMatchError(f"its square root is read by {user.op_type}; expected Div or Reciprocal")
    [divided] = others if len(others) == 1 else [None]
    same = divided is deviation or (x is not None and divided is not None and _centred(divided, axes) is x)
    if not same:
        raise NoMatchError("its square root divides another value than the one that was averaged")
    return product.outputs[0]


def _only_with(
    value: ir.Value, op_type: str, what: str, source: ir.Value, first: int
) -> tuple[ir.Value, ir.Value]:
    """The one product or sum of a value and an operand with the shape of the axes, and that operand."""
    users = value.consumers()
    if value.is_graph_output() or len(users) != 1 or not is_operator(users[0], op_type):
        raise NoMatchError(f"{what} is not applied by one {op_type} alone")
    [user] = users
    operands = [one for one in user.inputs if one is not value]
    operand = operands[0] if len(operands) == 1 else None
    wanted, got = (axes_of(source) or ())[first:], axes_of(operand)
    if operand is None or not wanted or None in wanted or got != wanted or operand.dtype != source.dtype:
        raise NoMatchError(f"{what} has shape {got}; expected {wanted}, that of the axes")
    return user.outputs[0], operand


def _first_axis(axes: list[int], source: ir.Value) -> int:
    """The first of the axes, counted from the end, if they are the last ones."""
    rank = len(axes_of(source) or ())
    if not rank and any(axis >= 0 for axis in axes):
        raise NoMatchError("how many axes its operand has is not known")
    counted = sorted(axis - rank if axis >= 0 else axis for axis in axes)
    if counted != list(range(-len(axes), 0)):
        raise NoMatchError(f"it normalises over axes {axes} of {rank}, not over the last ones")
    return counted[0]


def _number(value: ir.Value | None) -> float | None:
    tensor = constant_of(value)
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return None
    return float(tensor.numpy().item())
