"""MatMul and Gemm on 8 bit integers: what they multiply with, and the nodes that replace them.

Written with ONNX's own operators. ONNX Runtime fuses them when it loads the model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.names import value_names
from onnxsmith.graph_passes.weights import constant_of, find_matmul_weights

__all__ = [
    "GraphWriter",
    "IntegerWeight",
    "LinearNode",
    "biases_to_products",
    "find_linear_nodes",
    "integer_weight",
]

Floats = npt.NDArray[np.float32]

_FLOAT = ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True)
class LinearNode:
    """A MatMul or Gemm with a constant float32 weight.

    Attributes:
        node: The node.
        source: The initializer.
        is_transposed: True if the initializer lies as (N, K).
        shape: (N, K).
        bias: The third input of a Gemm.
    """

    node: ir.Node
    source: ir.Value
    is_transposed: bool
    shape: tuple[int, int]
    bias: ir.Value | None = None

    @property
    def activation(self) -> ir.Value:
        """The left side, now."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def label(self) -> str:
        """The node's name, or what it makes."""
        return self.node.name or f"{self.node.op_type} of {self.node.outputs[0].name!r}"

    def columns(self) -> Floats:
        """The weight as (K, N)."""
        assert self.source.const_value is not None
        array = self.source.const_value.numpy()
        return np.ascontiguousarray(array.T if self.is_transposed else array, np.float32)


def find_linear_nodes(model: ir.Model, skip_nodes: Sequence[str]) -> tuple[list[LinearNode], dict[str, str]]:
    """Finds what can be computed in integers; for the rest that has a constant weight, why not."""
    found: list[LinearNode] = []
    skipped: dict[str, str] = {}
    for one in _candidates(model):
        if isinstance(one, LinearNode):
            names = (one.node.name or "", one.source.name or "")
            fitting = [p for p in skip_nodes if any(fnmatch.fnmatchcase(name, p) for name in names)]
            if fitting:
                skipped[one.label] = f"skip_nodes has {fitting[0]!r}"
            elif one.source.dtype != _FLOAT:
                skipped[one.label] = f"the weight is {one.source.dtype}; expected FLOAT"
            else:
                found.append(one)
        else:
            node, reason = one
            skipped[node.name or f"{node.op_type} of {node.outputs[0].name!r}"] = reason
    return found, skipped


def _candidates(model: ir.Model) -> Iterator[LinearNode | tuple[ir.Node, str]]:
    for weight in find_matmul_weights(model):
        if isinstance(weight, tuple):
            yield weight
        else:
            shape = (weight.out_features, weight.in_features)
            yield LinearNode(weight.node, weight.source, weight.is_transposed, shape)
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Gemm":
            yield from _gemm(node)
        elif node.op_type in ("Conv", "ConvTranspose") and constant_of(node.inputs[1]) is not None:
            yield node, f"{node.op_type} stays in float here: quantize_static computes Conv on 8 bit integers"
    inner = list(model.graph.subgraphs())
    for function in model.functions.values():
        inner += [function.graph, *function.subgraphs()]
    for node in (node for graph in inner for node in graph):
        if node.op_type in ("MatMul", "Gemm") and constant_of(node.inputs[1]) is not None:
            yield node, "it is in a subgraph or function; only the main graph is quantized"


def _gemm(node: ir.Node) -> Iterator[LinearNode | tuple[ir.Node, str]]:
    right = node.inputs[1]
    tensor = constant_of(right)
    if tensor is None or right is None:
        return
    numbers = {
        name: node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes
    }
    flags = {name: node.attributes[name].as_int() for name in ("transA", "transB") if name in node.attributes}
    if not right.is_initializer():
        yield node, "the weight is a Constant node; expected an initializer (run cleanup first)"
    elif set(numbers.values()) - {1.0} or flags.get("transA"):
        yield node, "Gemm with alpha, beta or transA"
    elif len(tensor.shape) != 2:
        yield node, f"the weight has {len(tensor.shape)} axes; expected 2"
    else:
        first, second = tensor.shape.numpy()
        turned = bool(flags.get("transB"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        yield LinearNode(node, right, turned, (first, second) if turned else (second, first), bias)


def biases_to_products(model: ir.Model, linear: Sequence[LinearNode]) -> int:
    """Brings biases that the next operator adds to the products that they belong to.

    An integer MatMul of ONNX Runtime adds a bias at no cost while it scales its sums. In operators after it,
    a bias is one more operand to read: BiasGelu takes 1.7 times as long as Gelu without one.

    Returns:
        How many biases were moved.
    """
    writer = GraphWriter(model)
    moved = 0
    for one in linear:
        product = one.node.outputs[0]
        uses = list(product.uses())
        if one.bias is not None or len(uses) != 1 or product.is_graph_output():
            continue
        user = uses[0].node
        bias = _bias_in(user, product, one.shape[0])
        if bias is None:
            continue
        (added,) = writer.add(user, "Add", [product, bias], f"{one.label}_bias", (product.dtype or _FLOAT,))
        added.shape = product.shape
        left = [added if value is product else value for value in user.inputs if value is not bias]
        if user.op_type == "Sum" and len(left) == 1:
            # A Sum of the two was an Add that ONNX Runtime shall not fuse.
            writer.replace(user, added)
            moved += 1
            continue
        plain = "Gelu" if user.op_type == "BiasGelu" else user.op_type
        attributes = {key: attribute.value for key, attribute in user.attributes.items()}
        (result,) = writer.add(
            user, plain, left, f"{user.name or plain}_without_bias", (user.outputs[0].dtype or _FLOAT,),
            attributes=attributes, domain=user.domain,
        )  # fmt: skip
        writer.replace(user, result)
        moved += 1
    for node in list(model.graph):
        if (node.domain, node.op_type) == ("com.microsoft", "MultiHeadAttention"):
            moved += _attention_bias_to_products(writer, node, {one.node for one in linear})
    return moved


def _attention_bias_to_products(writer: GraphWriter, node: ir.Node, products: Container[ir.Node]) -> int:
    """Takes the bias of query, key and value out of an attention, if all three are products."""
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    given = constant_of(bias)
    made = [_product_below(value, products) for value in node.inputs[:3]]
    if given is None or given.dtype != _FLOAT or any(value is None for value in made):
        return 0
    sizes = [0 if value is None or value.shape is None else value.shape[-1] for value in made]
    widths = [size for size in sizes if isinstance(size, int) and size]
    if len(widths) < 3 or sum(widths) != given.size:
        return 0
    for value, part in zip(made, np.split(given.numpy(), np.cumsum(widths)[:-1]), strict=True):
        producer = value.producer() if value is not None else None
        assert value is not None and producer is not None
        base = producer.name or value.name
        vector = writer.constant(part, f"{base}_bias_vector")
        (added,) = writer.add(producer, "Add", [value, vector], f"{base}_bias", after=True)
        added.shape = value.shape
        for use in list(value.uses()):
            if use.node is not added.producer():
                use.node.replace_input_with(use.idx, added)
    node.replace_input_with(3, None)
    while node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)
    return 3


def _product_below(value: ir.Value | None, products: Container[ir.Node]) -> ir.Value | None:
    """An operand of attention that is one of the products, or one with something added to it."""
    node = value.producer() if value is not None else None
    if node is not None and (node.domain, node.op_type) == ("", "Add") and len(node.outputs[0].uses()) == 1:
        value = next((x for x in node.inputs if x is not None and x.producer() in products), None)
        node = value.producer() if value is not None else None
    return value if node in products and value is not None and len(value.uses()) == 1 else None


def _bias_in(node: ir.Node, product: ir.Value, size: int) -> ir.Value | None:
    """The vector of ``size`` numbers that an operator adds to a product, where it can do without."""
    if (node.domain, node.op_type) in (("com.microsoft", "BiasGelu"), ("com.microsoft", "FastGelu")):
        operands = node.inputs[1:2] if node.inputs[0] is product else ()
    elif (node.domain, node.op_type) == ("", "Sum"):
        operands = node.inputs
    else:
        return None
    vectors = [
        value
        for value in operands
        if value is not None
        and value.is_initializer()
        and (tensor := constant_of(value)) is not None
        and (tensor.dtype, list(tensor.shape.numpy())) == (_FLOAT, [size])
    ]
    return vectors[0] if len(vectors) == 1 and list(node.inputs).count(vectors[0]) == 1 else None


@dataclasses.dataclass(frozen=True)
class IntegerWeight:
    """A weight in 8 bits.

    Attributes:
        codes: (K, N), int8 or uint8.
        scales: (N,) or a scalar, float32.
        zeros: As the scales, of the codes' type.
    """

    codes: npt.NDArray[Any]
    scales: Floats
    zeros: npt.NDArray[Any]

    def dequantized(self) -> Floats:
        """(K, N): what is computed with."""
        centred = self.codes.astype(np.float32) - self.zeros.astype(np.float32)
        result: Floats = centred * self.scales
        return result


def integer_weight(
    columns: Floats, *, per_channel: bool, symmetric: bool, reduce_range: bool, search_steps: int = 8
) -> IntegerWeight:
    """Rounds a weight (K, N) to 8 bits, or 7 with ``reduce_range``.

    The range is that of the values, or one of ``search_steps`` narrower ones with a smaller squared error.
    """
    top = 63 if reduce_range else 127
    axis = 0 if per_channel else None
    if symmetric:
        largest = np.abs(columns).max(axis)
        best, smallest = np.asarray(largest), np.full(np.shape(largest), np.inf)
        for part in np.linspace(1, 0.75, search_steps + 1):
            scale = np.maximum(largest * np.float32(part) / top, np.float32(1e-30))
            codes = np.clip(np.rint(columns / scale), -top, top)
            error = np.square(codes * scale - columns).sum(axis)
            best = np.where(error < smallest, scale, best)
            smallest = np.minimum(error, smallest)
        scales = np.asarray(best, np.float32)
        signed = np.clip(np.rint(columns / scales), -top, top).astype(np.int8)
        return IntegerWeight(signed, scales, np.zeros(scales.shape, np.int8))
    levels = np.float32(2 * top + 1)
    low, high = np.minimum(columns.min(axis), 0), np.maximum(columns.max(axis), 0)
    scales = np.asarray(np.maximum((high - low) / levels, np.float32(1e-30)), np.float32)
    zeros = np.clip(np.rint(-low / scales), 0, levels)
    codes = np.clip(np.rint(columns / scales) + zeros, 0, levels).astype(np.uint8)
    return IntegerWeight(codes, scales, np.asarray(zeros, np.uint8))


class GraphWriter:
    """Adds nodes and constants before a node, under names that are free."""

    def __init__(self, model: ir.Model) -> None:
        """Begins with a graph.

        Args:
            model: Changed in place.
        """
        self.graph = model.graph
        self._taken = value_names(model)

    def name(self, wanted: str) -> str:
        """The name, with a number behind it where something has it; it is taken then."""
        names = (wanted, *(f"{wanted}_{i}" for i in range(len(self._taken) + 1)))
        found = next(name for name in names if name not in self._taken)
        self._taken.add(found)
        return found

    def constant(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        """An initializer."""
        name = self.name(name)
        dtype = ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
        value.const_value = ir.tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
        self.graph.register_initializer(value)
        return value

    def add(
        self,
        beside: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        types: Sequence[ir.DataType] = (_FLOAT,),
        *,
        attributes: dict[str, Any] | None = None,
        domain: str = "",
        after: bool = False,
    ) -> list[ir.Value]:
        """A node beside another; its outputs."""
        name = self.name(name)
        node = ir.node(op_type, inputs, attributes or {}, domain=domain, name=name, num_outputs=len(types))
        for number, (value, dtype) in enumerate(zip(node.outputs, types, strict=True)):
            value.name = name if len(types) == 1 else self.name(f"{name}_{number}")
            value.type = ir.TensorType(dtype)
        (self.graph.insert_after if after else self.graph.insert_before)(beside, node)
        return list(node.outputs)

    def beside(self, value: ir.Value) -> tuple[ir.Node, bool]:
        """Where to put what reads a value at once: the node, and whether after it."""
        producer = value.producer()
        return (self.graph[0], False) if producer is None else (producer, True)

    def replace(self, node: ir.Node, made: ir.Value) -> None:
        """Puts a value in the place of a node's only output, and removes the node."""
        old = node.outputs[0]
        name = old.name
        old.replace_all_uses_with(made, replace_graph_outputs=old.is_graph_output())
        self.graph.remove(node, safe=True)
        made.name, made.shape, made.type = name, old.shape, old.type
