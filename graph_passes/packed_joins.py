"""What the kernels compute with a product: the gate of an MLP, an activation; query, key and value as one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from onnxsmith.graph_passes.matching import int_attribute, is_operator, label
from onnxsmith.graph_passes.packed_products import Product, Uses
from onnxsmith.graph_passes.weights import constant_of
from onnxsmith.packed_tiles import TILE_ROWS

__all__ = ["Activated", "Gate", "Joined", "find_activated", "find_gates", "find_joined"]

_DOMAIN = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Gate:
    """``activation(gate) * up``.

    Attributes:
        node: The Mul.
        parts: Gate and up.
        activation: As MatMulPacked names it.
    """

    node: ir.Node
    parts: tuple[Product, Product]
    activation: str


@dataclasses.dataclass(frozen=True)
class Activated:
    """``activation(product)``.

    Attributes:
        node: The last node of the activation.
        product: What it is of, with its bias.
        activation: As MatMulPacked names it.
    """

    node: ir.Node
    product: Product
    activation: str


@dataclasses.dataclass(frozen=True)
class Joined:
    """Operands of an attention.

    Attributes:
        node: The GroupQueryAttention.
        parts: Query, key and value.
    """

    node: ir.Node
    parts: tuple[Product, ...]


def find_gates(uses: Uses) -> tuple[list[Gate], dict[str, str]]:
    """The gates of MLPs, and for those that stay several nodes the reason.

    Args:
        uses: Of the model.
    """
    products = {use.result: use for use in uses.found if isinstance(use, Product)}
    readers = _readers(uses)
    gates, refused = [], {}
    for up in products.values():
        for node in up.result.consumers():
            if not is_operator(node, "Mul") or len(node.inputs) != 2 or node.graph is not up.node.graph:
                continue
            other = node.inputs[1] if node.inputs[0] is up.result else node.inputs[0]
            found = None if other is None else _activated(other, products)
            if found is None or found[0].node is up.node:
                continue
            gate, activation, inner = found
            reason = _refusal([gate, up], readers)
            if not reason and gate.weight.rows != up.weight.rows:
                reason = f"gate and up have {gate.weight.rows} and {up.weight.rows} rows"
            if not reason and gate.weight.rows % TILE_ROWS:
                reason = f"gate and up have {gate.weight.rows} rows; expected a multiple of {TILE_ROWS}"
            if not reason and not _is_read_by(gate.result, inner):
                reason = "the gate is read elsewhere"
            if not reason and not (
                _is_read_by(up.result, {node}) and other is not None and _is_read_by(other, {node})
            ):
                reason = "its factors are read elsewhere"
            if reason:
                refused[label(node)] = reason
            else:
                gates.append(Gate(node, (gate, up), activation))
    return gates, refused


def find_activated(uses: Uses, gates: Sequence[Gate]) -> list[Activated]:
    """Products with an activation that is all that reads them.

    Args:
        uses: Of the model.
        gates: What is taken already.
    """
    taken = {part.node for gate in gates for part in gate.parts}
    products = {use.result: use for use in uses.found if isinstance(use, Product) and use.node not in taken}
    found = []
    for use in products.values():
        for node in use.result.consumers():
            # Of Sigmoid and Mul, Mul reads the product too.
            activated = _activated(node.outputs[0], products)
            if activated is None or activated[0].node is not use.node or node.graph is not use.node.graph:
                continue
            product, activation, inner = activated
            if _is_read_by(use.result, inner):
                found.append(Activated(node, product, activation))
    return found


def find_joined(model: ir.Model, uses: Uses, gates: Sequence[Gate]) -> tuple[list[Joined], dict[str, str]]:
    """Queries, keys and values that one product can compute, and for others the reason why not.

    Args:
        model: The graph.
        uses: Of it.
        gates: What is taken already.
    """
    taken = {part.node for gate in gates for part in gate.parts}
    products = {use.result: use for use in uses.found if isinstance(use, Product) and use.node not in taken}
    readers = _readers(uses)
    found, refused = [], {}
    for graph in model.graphs():
        for node in graph:
            if not is_operator(node, "GroupQueryAttention", _DOMAIN) or None in node.inputs[:3]:
                continue
            parts = tuple(products[value] for value in node.inputs[:3] if value in products)
            if not parts:
                continue
            reason = _origin(node, products) or _refusal(parts, readers)
            if not reason and not all(_is_read_by(part.result, {node}) for part in parts):
                reason = "query, key or value is read elsewhere"
            sizes = [part.weight.rows for part in parts]
            heads, kv_heads = int_attribute(node, "num_heads"), int_attribute(node, "kv_num_heads")
            if not reason and (sizes[0] % heads or sizes[1:] != [sizes[0] // heads * kv_heads] * 2):
                reason = f"the products have {', '.join(map(str, sizes))} rows, which are not its heads"
            if reason:
                refused[label(node)] = reason
            else:
                found.append(Joined(node, parts))
    return found, refused


def _origin(node: ir.Node, products: dict[ir.Value, Product]) -> str:
    """What makes an operand of an attention that is no product."""
    for value in node.inputs[:3]:
        if value is not None and value not in products:
            maker = value.producer()
            return f"an operand comes from {maker.op_type if maker is not None else 'outside'}"
    return ""


def _readers(uses: Uses) -> Counter[ir.Value | None]:
    """How many nodes read what holds the codes of a weight."""
    return Counter(use.weight.identity[0] for use in uses.found)


def _refusal(parts: Sequence[Product], readers: Counter[ir.Value | None]) -> str:
    first = parts[0]
    if any(part.x is not first.x for part in parts):
        return "its products are of different values"
    if any(part.node.graph is not first.node.graph for part in parts):
        return "its products stand in different graphs"
    if len({part.weight.form for part in parts}) > 1:
        forms = "; ".join(dict.fromkeys(str(part.weight) for part in parts))
        return f"its weights have different formats: {forms}"
    if any(readers[part.weight.identity[0]] > 1 for part in parts):
        return "one of its weights is read by other nodes too"
    return ""


def _is_read_by(value: ir.Value, nodes: set[ir.Node]) -> bool:
    """Whether these nodes read a value and nothing else does."""
    return not value.is_graph_output() and set(value.consumers()) <= nodes


def _activated(
    value: ir.Value, products: dict[ir.Value, Product]
) -> tuple[Product, str, set[ir.Node]] | None:
    """The product that an activation is of, the activation, and the nodes that compute it."""
    node = value.producer()
    if node is None:
        return None
    name, bias = "", None
    x = node.inputs[0] if node.inputs else None
    nodes = {node}
    if is_operator(node, "QuickGelu", _DOMAIN):
        alpha = node.attributes.get("alpha")
        name = "silu" if alpha is not None and alpha.as_float() == 1.0 else ""
    elif is_operator(node, "Gelu", _DOMAIN):
        name = "gelu"
    elif is_operator(node, "Gelu"):
        form = node.attributes.get("approximate")
        name = "gelu_tanh" if form is not None and form.as_string() == "tanh" else "gelu"
    elif is_operator(node, "FastGelu", _DOMAIN):
        name, bias = "gelu_tanh", node.inputs[1] if len(node.inputs) > 1 else None
    elif is_operator(node, "Mul") and len(node.inputs) == 2:
        for x, other in (node.inputs, node.inputs[::-1]):
            sigmoid = other.producer() if other is not None else None
            if sigmoid is not None and is_operator(sigmoid, "Sigmoid") and sigmoid.inputs[0] is x:
                if not _is_read_by(sigmoid.outputs[0], {node}):
                    return None
                name, nodes = "silu", {node, sigmoid}
                break
    product = products.get(x) if x is not None and name else None
    if product is None:
        return None
    if bias is not None:
        tensor = constant_of(bias)
        if (
            product.bias is not None
            or tensor is None
            or tuple(tensor.shape.numpy()) != (product.weight.rows,)
        ):
            return None
        product = dataclasses.replace(product, bias=bias)
    return product, name, nodes
