"""MultiHeadAttention for the own kernel: masks of one row; query, key and value as one operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.integer_operators import GraphWriter
from onnxsmith.graph_passes.matching import (
    axes_of,
    constant_integers,
    input_of,
    int_attribute,
    is_operator,
)
from onnxsmith.graph_passes.padding_masks import KeyBiases, has_keys
from onnxsmith.graph_passes.rewriting import NoMatchError
from onnxsmith.graph_passes.weights import common_name, constant_of, lazy_initializer
from onnxsmith.onnx_file import drop_pages
from onnxsmith.own_operators import OWN_DOMAIN, RESIDUAL_INPUT
from onnxsmith.packed_tiles import TILE_ROWS

__all__ = ["HeadsTaker", "heads_refusal"]

_DOMAIN = "com.microsoft"
_FLOAT = ir.DataType.FLOAT
# Inputs of ONNX Runtime's MultiHeadAttention; those behind belong to a cache.
_PADDING, _SCORES = 4, 5
# Of MatMulPacked.
_NUMBERS, _PRODUCT_BIAS = (1, 2, 3), 4
_ATTRIBUTES = frozenset({"num_heads", "scale"})


def heads_refusal(node: ir.Node) -> str:
    """Why a MultiHeadAttention of ONNX Runtime stays; an empty string where the kernel can compute it."""
    inputs = [*node.inputs, *[None] * 6]
    if int_attribute(node, "unidirectional"):
        return "it has a causal mask of its own"
    if any(value is not None for value in inputs[_SCORES + 1 :]):
        return "it has a cache"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its keys and values are read, or its scores"
    for what, value in zip(("query", "key", "value"), inputs, strict=False):
        axes = axes_of(value)
        if value is None or axes is None or len(axes) != 3:
            return f"its {what} has {len(axes) if axes else 'no known'} axes; the kernel wants three"
        if value.dtype is not _FLOAT:
            return "the kernel computes in float32"
    padding, scores = inputs[_PADDING], inputs[_SCORES]
    if padding is not None and (scores is not None or len(axes_of(padding) or ()) != 2):
        return "its mask of padding is not a number for each key alone"
    if scores is not None and scores.dtype is not _FLOAT:
        return "its bias of scores is not of float32"
    return ""


class HeadsTaker:
    """Gives MultiHeadAttention of the main graph to the kernel; what is made of a mask is made once."""

    def __init__(self, model: ir.Model) -> None:
        """Begins with a graph.

        Args:
            model: Changed in place.
        """
        self._writer = GraphWriter(model)
        self._biases = KeyBiases(self._writer)

    def take(self, node: ir.Node) -> bool:
        """Makes one that ``heads_refusal`` accepts a node of the kernel's.

        Returns:
            Whether query, key and value are one operand now.
        """
        query, key, value, bias, padding, scores = [*node.inputs, *[None] * 6][:6]
        assert query is not None and key is not None and value is not None
        packed = _split_whole((query, key, value)) or self._joined(node, (query, key, value))
        if padding is not None:
            scores = self._biases.of_padding(node, padding)
        elif scores is not None:
            scores = self._one_row(scores, key)
        given = [*((packed, None, None) if packed is not None else (query, key, value)), bias, scores]
        while given[-1] is None:
            given.pop()
        node.resize_inputs(len(given))
        for index, one in enumerate(given):
            if node.inputs[index] is not one:
                node.replace_input_with(index, one)
        for name in [name for name in node.attributes if name not in _ATTRIBUTES]:
            del node.attributes[name]
        node.resize_outputs(1)
        node.domain = OWN_DOMAIN
        return packed is not None

    def _one_row(self, scores: ir.Value, key: ir.Value) -> ir.Value:
        """A mask that is the same for all queries, before it is repeated for each of them."""
        try:
            narrow = self._biases.narrow(scores) if has_keys(scores) else scores
        except NoMatchError:
            return scores
        # One number for all keys would have to be repeated for each.
        keys = [axes[at] for one, at in ((scores, -1), (key, 1)) if (axes := axes_of(one))]
        axes = axes_of(narrow)
        return narrow if axes and axes[-1] is not None and axes[-1] in keys else scores

    def _joined(self, node: ir.Node, parts: Sequence[ir.Value]) -> ir.Value | None:
        """One product in the place of three of the own kernels, or None where these do not fit."""
        products = [value.producer() for value in parts]
        found = [one for one in products if one is not None and is_operator(one, "MatMulPacked", OWN_DOMAIN)]
        first = found[0] if found else None
        if first is None or len(found) != 3 or not _fit(node, found):
            return None
        inputs = [first.inputs[0]]
        for index in _NUMBERS:
            tiles = [input_of(product, index) for product in found]
            inputs.append(self._stacked([one for one in tiles if one is not None]))
        inputs.append(self._biases_of(found))
        while inputs[-1] is None:
            inputs.pop()
        rows = sum(int_attribute(product, "N") for product in found)
        attributes = {name: attribute.value for name, attribute in first.attributes.items()} | {"N": rows}
        name = common_name([product.name or "" for product in found])
        (made,) = self._writer.add(
            node, "MatMulPacked", inputs, name, attributes=attributes, domain=OWN_DOMAIN
        )
        axes = axes_of(parts[0])
        assert axes is not None
        made.shape = ir.Shape([*axes[:-1], rows])
        return made

    def _stacked(self, tiles: Sequence[ir.Value]) -> ir.Value | None:
        """Tiles one behind the other: rows of a weight are filled up only at its end."""
        if not tiles:
            return None
        tensors = [_tensor(value) for value in tiles]
        shape = [sum(int(tensor.shape.numpy()[0]) for tensor in tensors), *tensors[0].shape.numpy()[1:]]
        return self._stored(tiles, tensors, shape)

    def _biases_of(self, products: Sequence[ir.Node]) -> ir.Value | None:
        biases = [input_of(product, _PRODUCT_BIAS) for product in products]
        given = [one for one in biases if one is not None]
        if not given:
            return None
        rows = [int_attribute(product, "N") for product in products]
        tensors = [
            ir.tensor(np.zeros(count, np.float32)) if value is None else _tensor(value)
            for value, count in zip(biases, rows, strict=True)
        ]
        return self._stored(given, tensors, [sum(rows)])

    def _stored(
        self, values: Sequence[ir.Value], tensors: Sequence[ir.TensorProtocol], shape: Sequence[int]
    ) -> ir.Value:
        def compute() -> npt.NDArray[Any]:
            parts = []
            for tensor in tensors:
                parts.append(np.asarray(tensor.numpy()))
                drop_pages(tensor)
            return np.concatenate(parts)

        names = [value.name or "weight" for value in values]
        name = self._writer.name(common_name(names) if len(names) > 1 else f"{names[0]}_joined")
        return lazy_initializer(self._writer.graph, name, tensors[-1].dtype, shape, compute)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = constant_of(value)
    assert tensor is not None
    return tensor


def _split_whole(parts: Sequence[ir.Value]) -> ir.Value | None:
    """What query, key and value are equal parts of, in this order, or None."""
    node = parts[0].producer()
    if node is None or not is_operator(node, "Split") or list(node.outputs) != list(parts):
        return None
    widths = {axes[-1] for one in parts if (axes := axes_of(one))}
    whole = node.inputs[0]
    axes = axes_of(whole)
    if axes is None or len(axes) != 3 or int_attribute(node, "axis") not in (-1, 2):
        return None
    sizes = constant_integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is not None:
        return whole if len(set(sizes)) == 1 else None
    return whole if len(widths) == 1 and isinstance(axes[-1], int) and not axes[-1] % 3 else None


def _fit(node: ir.Node, products: Sequence[ir.Node]) -> bool:
    """Whether products that make query, key and value can be one."""
    first = products[0]
    if len(set(products)) != 3 or int_attribute(first, "N") % TILE_ROWS:
        return False
    for product in products:
        result = product.outputs[0]
        if product.graph is not node.graph or product.inputs[0] is not first.inputs[0]:
            return False
        if len(result.uses()) != 1 or result.is_graph_output() or _form(product) != _form(first):
            return False
        # What something else reads too would be stored twice.
        tiles = [value for index in _NUMBERS if (value := input_of(product, index)) is not None]
        if any(constant_of(value) is None or len(value.uses()) != 1 for value in tiles):
            return False
        bias = input_of(product, _PRODUCT_BIAS)
        if bias is not None and constant_of(bias) is None:
            return False
    activation = first.attributes.get("activation")
    return (activation is None or activation.as_string() == "none") and len(first.inputs) <= RESIDUAL_INPUT


def _form(product: ir.Node) -> tuple[Any, ...]:
    """Equal for products whose tiles can be put one behind the other."""
    tiles = [input_of(product, index) for index in _NUMBERS]
    kinds = [None if value is None else (value.dtype, axes_of(value)) for value in tiles]
    attributes = sorted((name, str(attribute.value)) for name, attribute in product.attributes.items())
    return kinds, attributes, len(product.inputs) > RESIDUAL_INPUT
