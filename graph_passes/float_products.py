"""Products with constant matrices in float32 that the kernels of this project can compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from onnxsmith.graph_passes.float_weights import FloatWeight
from onnxsmith.graph_passes.matching import int_attribute, is_operator, label
from onnxsmith.graph_passes.packed_attention import why_closed
from onnxsmith.graph_passes.packed_products import Lookup, Product, Uses, is_bias, with_bias
from onnxsmith.graph_passes.weights import MatMulWeight, constant_of, find_matmul_weights, is_transpose
from onnxsmith.packed_tiles import TILE_ROWS

__all__ = ["find_float_products", "find_projections"]

_FLOAT = ir.DataType.FLOAT


def find_float_products(model: ir.Model, *, refuse: Callable[[ir.Node, str], str]) -> Uses:
    """Finds the products of the main graph.

    A weight that something else reads as well, such as an embedding that is the head too, would be stored
    twice in tiles and in rows: it stays.

    Args:
        model: Where to look.
        refuse: Says why a node, with the name of its weight, has to stay; an empty string where it need not.
    """
    refused: dict[str, str] = {}
    weights: list[MatMulWeight] = []
    for one in (*find_matmul_weights(model), *_gemms(model)):
        if isinstance(one, tuple):
            refused[label(one[0])] = one[1]
        else:
            weights.append(one)
    candidates: dict[ir.Value, set[ir.Node]] = {}
    for weight in weights:
        reason = _refusal(weight) or refuse(weight.node, weight.source.name or "")
        if reason:
            refused[label(weight.node)] = reason
        else:
            candidates.setdefault(weight.source, set()).add(weight.node)
    products: list[Product | Lookup] = []
    for weight in weights:
        if weight.node not in candidates.get(weight.source, set()):
            continue
        others = [node for node in _readers(weight.source) if node not in candidates[weight.source]]
        if others:
            refused[label(weight.node)] = (
                f"{label(others[0])} reads its weight too, which would be stored twice"
            )
        elif weight.source.is_graph_output():
            refused[label(weight.node)] = "its weight is an output of the graph"
        else:
            products.append(_product(weight))
    return Uses(products, refused)


def find_projections(model: ir.Model, *, refuse: Callable[[ir.Node, str], str]) -> set[ir.Node]:
    """The Attention nodes of ONNX Runtime whose projection would be such a product.

    Args:
        model: Where to look.
        refuse: As for products.
    """
    found: set[ir.Node] = set()
    for node in model.graph:
        if not is_operator(node, "Attention", "com.microsoft") or node.inputs[1] is None:
            continue
        source = node.inputs[1]
        tensor = source.const_value if source.is_initializer() else None
        if tensor is None or len(tensor.shape) != 2 or source.is_graph_output():
            continue
        columns, rows = tensor.shape.numpy()
        weight = MatMulWeight(node, source, source, False, in_features=columns, out_features=rows)
        if not _refusal(weight) and not refuse(node, source.name or "") and not why_closed(node):
            found.add(node)
    return {node for node in found if all(user in found for user in _weight(node).consumers())}


def _weight(attention: ir.Node) -> ir.Value:
    weight = attention.inputs[1]
    assert weight is not None
    return weight


def _gemms(model: ir.Model) -> Iterator[MatMulWeight | tuple[ir.Node, str]]:
    """Each Gemm with a constant matrix, or the reason why it stays."""
    for node in model.graph:
        tensor = constant_of(node.inputs[1]) if is_operator(node, "Gemm") else None
        x, weight = node.inputs[:2] if tensor is not None else (None, None)
        if tensor is None or x is None or weight is None:
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
        is_transposed = bool(int_attribute(node, "transB"))
        columns, rows = tensor.shape.numpy()[:: -1 if is_transposed else 1]
        if int_attribute(node, "transA") or any(factor != 1.0 for factor in factors):
            yield node, "Gemm turns its first operand, or has factors"
        elif not weight.is_initializer():
            yield node, "the weight is a Constant node; expected an initializer (run cleanup first)"
        elif bias is not None and not is_bias(bias, rows):
            yield node, f"its bias is no constant of {rows} numbers"
        else:
            yield MatMulWeight(node, x, weight, is_transposed, in_features=columns, out_features=rows)


def _refusal(weight: MatMulWeight) -> str:
    tensor = weight.source.const_value
    if tensor is None or tensor.dtype is not _FLOAT:
        return f"the weight is {'missing' if tensor is None else tensor.dtype.name}; expected FLOAT"
    if min(weight.out_features, weight.in_features) < TILE_ROWS:
        size = f"{weight.out_features} x {weight.in_features}"
        return f"a matrix of {size} is too small for tiles of {TILE_ROWS} rows"
    return ""


def _readers(source: ir.Value) -> list[ir.Node]:
    """The nodes that read a matrix, as it lies or turned."""
    found: list[ir.Node] = []
    for node in source.consumers():
        if is_transpose(node) and not node.outputs[0].is_graph_output():
            found += node.outputs[0].consumers()
        else:
            found.append(node)
    return found


def _product(weight: MatMulWeight) -> Product:
    source = weight.source
    assert source.const_value is not None
    floats = FloatWeight(
        source.name or "weight",
        weight.out_features,
        weight.in_features,
        ((source.const_value, weight.is_transposed),),
        (source,),
    )
    if is_operator(weight.node, "Gemm"):
        bias = weight.node.inputs[2] if len(weight.node.inputs) > 2 else None
        return Product(weight.node, weight.activation, floats, bias, weight.node.outputs[0])
    result, bias, summed = with_bias(weight.node.outputs[0], weight.out_features)
    return Product(weight.node, weight.activation, floats, bias, result, summed)
