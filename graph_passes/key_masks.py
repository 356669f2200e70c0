"""A mask of padding inside the keys, for attention that is fast only where it has no mask.

ONNX Runtime's MultiHeadAttention on CPUs has two roads. Without a mask it goes through the scores in tiles
that stay in the cache (FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135); with one it writes
bias, scores and their exponentials to memory. A mask that hides keys from all queries alike can be a number
of the key: with a 1 behind each head of the query and the mask behind each head of the key, their product is
the score with the mask added. The 1 is a bias of the query's projection, whose weight gets a column of zeros
for each head.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.integer_operators import GraphWriter
from onnxsmith.graph_passes.matching import axes_of, int_attribute, is_operator, label
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.padding_masks import KeyBiases, has_keys
from onnxsmith.graph_passes.rewriting import NoMatchError, rewrite_each
from onnxsmith.graph_passes.weights import constant_of, lazy_initializer
from onnxsmith.onnx_file import drop_pages

__all__ = ["MaskInKeys"]

Floats = npt.NDArray[np.float32]

_DOMAIN = "com.microsoft"
_FLOAT = ir.DataType.FLOAT
# Inputs of MultiHeadAttention. Attention has its padding at 3, and its bias of scores at 5 too.
_VALUE, _BIAS, _PADDING, _SCORES = 2, 3, 4, 5
# A float32 that any score is nothing beside, and that can still be divided by a scale.
_LOWEST = np.float32(-1e30)


class MaskInKeys(GraphPass):
    """Moves masks that are the same for all queries from the scores of attention into the keys.

    Nothing is added to the score of what is shown. A row whose keys are all hidden gets the mean of its
    values, which is what the lowest float gives as a mask.
    """

    name: ClassVar[str] = "mask_in_keys"
    summary: ClassVar[str] = (
        "masks of padding as one more number of each key: attention without masks is faster"
    )

    def apply(self, model: ir.Model) -> Changes:
        """Replaces each mask that is the same for all queries; says of the others what they are."""
        packed, kept = set[ir.Node](), {}
        for node in model.graph:
            if is_operator(node, "Attention", _DOMAIN) and _masks_of(node) != (None, None):
                try:
                    _must_fit(node)
                except NoMatchError as reason:
                    kept[label(node)] = str(reason)
                else:
                    packed.add(node)
        kept |= open_attention(model, apart=True, among=packed)
        changes, made = rewrite_each(model, _Mover(model).rewrite, domain=_DOMAIN)
        changes.details = dict(made)
        changes.skipped |= kept
        return changes


def _masks_of(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Of Attention or MultiHeadAttention, its mask of padding and its bias of scores."""
    inputs = [*node.inputs, *[None] * 6]
    return inputs[3 if node.op_type == "Attention" else _PADDING], inputs[_SCORES]


def _must_fit(node: ir.Node) -> None:
    """Asks what holds of Attention and MultiHeadAttention alike.

    Raises:
        NoMatchError: The mask cannot be moved, with the reason.
    """
    padding, bias = _masks_of(node)
    if node.inputs[0] is None or node.inputs[0].dtype != _FLOAT:
        raise NoMatchError("attention that is not known to be of float32")
    if int_attribute(node, "unidirectional"):
        raise NoMatchError("attention with a causal mask of its own")
    if padding is not None and (bias is not None or len(axes_of(padding) or ()) != 2):
        raise NoMatchError("attention whose mask of padding is not a number for each key alone")
    if bias is not None and not has_keys(bias):
        raise NoMatchError("attention whose bias is one number for all keys")


@dataclasses.dataclass(frozen=True)
class _Projection:
    """A MatMul with a constant weight, and the vector that is added to it.

    Attributes:
        product: What the MatMul makes.
        columns: How many it makes.
        bias: (columns,); zeros where nothing is added.
    """

    product: ir.Value
    columns: int
    bias: Floats


def _projection(value: ir.Value | None) -> _Projection | None:
    bias: Floats | None = None
    node = value.producer() if value is not None else None
    if node is not None and is_operator(node, "Add"):
        vector = next((x for x in node.inputs if constant_of(x) is not None), None)
        product = next((x for x in node.inputs if constant_of(x) is None), None)
        tensor = constant_of(vector)
        if product is None or tensor is None or len(tensor.shape) != 1 or _readers(value) > 1:
            return None
        value, node, bias = product, product.producer(), tensor.numpy()
    if value is None or node is None or not is_operator(node, "MatMul") or _readers(value) > 1:
        return None
    weight = constant_of(node.inputs[1])
    if weight is None or weight.dtype != _FLOAT or len(weight.shape) != 2:
        return None
    columns = int(weight.shape.numpy()[1])
    if bias is None:
        bias = np.zeros(columns, np.float32)
    return _Projection(value, columns, bias) if len(bias) == columns else None


def _readers(value: ir.Value | None) -> int:
    """How many nodes read the numbers of a value; a Shape of its first axes does not."""
    return 0 if value is None else sum(not _counts_rows(use.node) for use in value.uses())


def _counts_rows(node: ir.Node) -> bool:
    rank = len(axes_of(node.inputs[0]) or ()) if is_operator(node, "Shape") else 0
    return rank > 0 and (int_attribute(node, "end", rank) + rank) % rank != 0


def _behind_heads(array: Floats, heads: int, number: float) -> Floats:
    """(..., heads * size) with one more number for each head."""
    split = array.reshape(*array.shape[:-1], heads, -1)
    more = np.full((*split.shape[:-1], 1), number, np.float32)
    return np.concatenate([split, more], -1).reshape(*array.shape[:-1], -1)


class _Mover:
    """Rewrites MultiHeadAttention; what is made of a mask is made once."""

    def __init__(self, model: ir.Model) -> None:
        self._writer = GraphWriter(model)
        self._biases = KeyBiases(self._writer)
        self._spread: dict[tuple[ir.Value, int, int, float], ir.Value] = {}

    def rewrite(self, graph: ir.Graph, node: ir.Node) -> str | None:
        """One node; None where there is no mask.

        Raises:
            NoMatchError: The mask stays, with the reason.
        """
        if not is_operator(node, "MultiHeadAttention", _DOMAIN) or _masks_of(node) == (None, None):
            return None
        _must_fit(node)
        inputs = [*node.inputs, *[None] * 4]
        if any(value is not None for value in inputs[_SCORES + 1 :]) or len(node.outputs) > 1:
            raise NoMatchError("attention with a cache")
        query, key, value = parts = [_projection(one) for one in inputs[:3]]
        if query is None or key is None or value is None:
            raise NoMatchError("attention whose query, key or value is not a product with a constant weight")
        heads = node.attributes["num_heads"].as_int()
        if query.columns != key.columns or query.columns % heads:
            raise NoMatchError(f"{query.columns} and {key.columns} columns are no {heads} heads")
        biases = [one.bias for one in parts if one is not None]
        if inputs[_BIAS] is not None:
            given = constant_of(inputs[_BIAS])
            if given is None:
                raise NoMatchError("attention whose bias of projections is not constant")
            ends = np.cumsum([len(one) for one in biases])[:-1]
            biases = [one + other for one, other in zip(biases, np.split(given.numpy(), ends), strict=True)]
        size = query.columns // heads
        scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 0.0
        scale = scale or size**-0.5
        mask = self._spread_over_heads(node, heads, size, scale)
        base = node.name or node.outputs[0].name or "attention"
        bias = np.concatenate(
            [_behind_heads(biases[0], heads, 1), _behind_heads(biases[1], heads, 0), biases[2]]
        )
        queries, keys = (self._widened(node, one, heads) for one in (query, key))
        (masked,) = self._writer.add(node, "Add", [keys, mask], f"{base}_masked_keys")
        masked.shape = keys.shape
        (result,) = self._writer.add(
            node, "MultiHeadAttention",
            [queries, masked, value.product, self._writer.constant(bias, f"{base}_bias")],
            f"{base}_mask_in_keys", attributes={"num_heads": heads, "scale": scale}, domain=_DOMAIN,
        )  # fmt: skip
        self._writer.replace(node, result)
        return "attention"

    def _widened(self, node: ir.Node, one: _Projection, heads: int) -> ir.Value:
        """The projection with a column of zeros behind each head."""
        product = one.product.producer()
        assert product is not None and product.inputs[1] is not None
        tensor, name = constant_of(product.inputs[1]), product.inputs[1].name
        assert tensor is not None

        def compute() -> Floats:
            wide = _behind_heads(tensor.numpy(), heads, 0)
            drop_pages(tensor)
            return wide

        shape = [int(tensor.shape.numpy()[0]), one.columns + heads]
        name = self._writer.name(f"{name}_of_wider_heads")
        weight = lazy_initializer(self._writer.graph, name, _FLOAT, shape, compute)
        (made,) = self._writer.add(
            product, "MatMul", [product.inputs[0], weight], f"{label(product)}_of_wider_heads"
        )
        if one.product.shape is not None:
            made.shape = ir.Shape([*list(one.product.shape)[:-1], shape[1]])
        for old in (one.product, *(use.node.outputs[0] for use in one.product.uses())):
            for use in list(old.uses()):
                if _counts_rows(use.node):
                    use.node.replace_input_with(0, made)
        return made

    def _spread_over_heads(self, node: ir.Node, heads: int, size: int, scale: float) -> ir.Value:
        """(batch or 1, keys, heads * (size + 1)): the mask behind each head, divided by the scale, else 0."""
        padding, bias = _masks_of(node)
        if bias is not None:
            mask = self._biases.narrow(bias)
        else:
            assert padding is not None
            mask = self._biases.of_padding(node, padding)
        wanted = (mask, heads, size, scale)
        if wanted not in self._spread:
            writer, name = self._writer, mask.name or "mask"
            one_a_key = writer.constant(np.array([0, -1, 1], np.int64), f"{name}_of_keys_shape")
            places = _behind_heads(np.zeros(heads * size, np.float32), heads, 1 / scale)
            producer, after = writer.beside(mask)
            made = [mask]
            for op_type, operand, new in (
                ("Max", writer.constant(np.array(_LOWEST), "lowest_mask"), f"{name}_finite"),
                ("Reshape", one_a_key, f"{name}_of_keys"),
                ("Mul", writer.constant(places, "mask_behind_heads"), f"{name}_behind_heads"),
            ):
                (value,) = writer.add(producer, op_type, [made[-1], operand], new, after=after)
                made.append(value)
                producer, after = writer.beside(value)
            axes = list(mask.shape) if mask.shape is not None else [None] * 4
            made[1].shape, made[2].shape = mask.shape, ir.Shape([axes[0], axes[3], 1])
            made[3].shape = ir.Shape([axes[0], axes[3], heads * (size + 1)])
            self._spread[wanted] = made[3]
        return self._spread[wanted]
