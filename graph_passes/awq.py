"""Weights scaled before they are rounded, and activations the other way: AWQ.

AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978): columns that meet large activations are multiplied
by a factor, so that their rounding error counts less; the activation is divided by it. The exponent of the
factor is searched, one for each activation, by the error of the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.block_operators import SharedWeight
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["Scaling", "best_exponent", "can_fold", "divide_activation", "divide_rows", "scale_weight"]

Floats = npt.NDArray[np.float32]

_EXPONENTS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
# A search on some of the rows finds the same exponent as one on all of them.
_ROWS = 512
# Normalisations whose input 1 (or 2, with a skip) is multiplied into every column of output 0.
_GAINS: Mapping[str, tuple[int, ...]] = {
    "SimplifiedLayerNormalization": (1,),
    "RMSNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The factors of one activation.

    Attributes:
        exponent: What was found; 0 is no scaling.
        factors: (K,): the weights' columns are multiplied by it.
    """

    exponent: float
    factors: Floats


def best_exponent(
    weights: Sequence[Floats],
    moments: Floats,
    rounded: Callable[[Floats], Floats],
    *,
    judged_by: Floats | None = None,
) -> Scaling:
    """Searches the exponent with the smallest error of the outputs of all weights of an activation.

    Args:
        weights: (N, K) each.
        moments: (K, K) of the activation.
        rounded: Rounds a matrix and gives back what it computes with.
        judged_by: Moments that errors are measured with; those of the activation where None.
    """
    size = np.sqrt(np.maximum(np.diagonal(moments), 1e-12)).astype(np.float32)
    judge = moments if judged_by is None else judged_by
    best = Scaling(0.0, np.ones_like(size))
    smallest = np.inf
    parts = [w[:: max(1, len(w) // _ROWS)][:_ROWS] for w in weights]
    for exponent in _EXPONENTS:
        factors = np.power(size, np.float32(exponent))
        # Around one, so that no column leaves the range of the others.
        factors /= np.sqrt(factors.max() * factors.min())
        factors = np.clip(factors, np.float32(1e-2), np.float32(1e2))
        error = 0.0
        for part in parts:
            difference = rounded(part * factors) / factors - part
            error += float(np.vdot(difference @ judge, difference))
        if error < smallest * 0.999:
            smallest, best = error, Scaling(exponent, factors)
    return best


def scale_weight(model: ir.Model, weight: SharedWeight, factors: Floats) -> None:
    """Multiplies a weight's columns, when it is read."""
    old, tensor = weight.value, weight.tensor
    shape = (1, -1) if weight.is_transposed else (-1, 1)
    value = ir.Value(name=old.name, shape=old.shape, type=old.type)

    def compute() -> ir.TensorProtocol:
        array = tensor.numpy() * factors.reshape(shape).astype(tensor.dtype.numpy())
        return ir.Tensor(array, dtype=tensor.dtype, name=value.name)

    value.const_value = ir.LazyTensor(
        compute, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=old.name
    )
    model.graph.initializers.pop(old.name or "")
    old.replace_all_uses_with(value)
    model.graph.register_initializer(value)
    weight.value = value


def can_fold(activation: ir.Value, users: Sequence[ir.Node]) -> bool:
    """Whether a normalisation makes an activation, for these nodes alone, and its gains can be divided."""
    producer = activation.producer()
    if producer is None or activation is not producer.outputs[0] or activation.is_graph_output():
        return False
    present = _gains_of(producer)
    readers = {node for node, _ in activation.uses()}
    known = all(constant_of(producer.inputs[index]) is not None for index in present)
    return bool(present) and known and readers <= set(users)


def _gains_of(producer: ir.Node) -> list[int]:
    gains = _GAINS.get(producer.op_type, ())
    return [index for index in gains if index < len(producer.inputs) and producer.inputs[index] is not None]


def divide_activation(
    model: ir.Model, activation: ir.Value, users: Sequence[ir.Node], factors: Floats
) -> str:
    """Divides an activation by factors: in the normalisation that makes it, or with a Mul of its own.

    Returns:
        ``folded`` or ``multiplied``.
    """
    graph, name = model.graph, activation.name or "activation"
    producer = activation.producer()
    if can_fold(activation, users) and producer is not None:
        for index in _gains_of(producer):
            old = producer.inputs[index]
            tensor = constant_of(old)
            assert old is not None and tensor is not None
            array = (tensor.numpy() / factors).astype(tensor.dtype.numpy())
            producer.replace_input_with(index, _constant(graph, array, f"{old.name}_for_{name}"))
        return "folded"
    dtype = activation.dtype or ir.DataType.FLOAT
    inverse = _constant(graph, (1 / factors).astype(dtype.numpy()), f"{name}_inverse_factors")
    node = ir.node("Mul", [activation, inverse], name=f"{name}_scaled")
    node.outputs[0].name = f"{name}_scaled"
    node.outputs[0].type, node.outputs[0].shape = activation.type, activation.shape
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    for user in users:
        user.replace_input_with(0, node.outputs[0])
    return "multiplied"


def divide_rows(model: ir.Model, gather: ir.Node, factors: Floats) -> None:
    """Divides the rows that an embedding looks up by the factors that its columns were multiplied with."""
    graph, output = model.graph, gather.outputs[0]
    uses, name, is_output = list(output.uses()), output.name or "rows", output.is_graph_output()
    dtype = output.dtype or ir.DataType.FLOAT
    inverse = _constant(graph, (1 / factors).astype(dtype.numpy()), f"{name}_inverse_factors")
    node = ir.node("Mul", [output, inverse], name=f"{name}_unscaled")
    made = node.outputs[0]
    made.type, made.shape = output.type, output.shape
    graph.insert_after(gather, node)
    for user, index in uses:
        user.replace_input_with(index, made)
    made.name = f"{name}_unscaled"
    if is_output:
        graph.outputs[:] = [made if value is output else value for value in graph.outputs]
        output.name, made.name = f"{name}_scaled", name


def _constant(graph: ir.Graph, array: npt.NDArray[np.generic], name: str) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value
