"""Nodes, constants and weights that are made later, added to a graph under names that are free."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.weights import lazy_initializer

__all__ = ["BlockTarget", "add_node", "block_sums", "constant", "lazy", "reshape", "spread", "unused"]

_DOMAIN = "com.microsoft"


@dataclasses.dataclass
class BlockTarget:
    """The graph that is written to, the names in it, and the block sums of activations that it has."""

    graph: ir.Graph
    accuracy_level: int
    taken: set[str]
    sums: dict[tuple[ir.Value, int], tuple[ir.Value, float]] = dataclasses.field(default_factory=dict)


def block_sums(
    into: BlockTarget, x: ir.Value, columns: int, block_size: int, *, before: ir.Node | None = None
) -> tuple[ir.Value, float]:
    """The sum of each block of the last axis, but for a factor: (..., K) -> (..., K / block).

    Args:
        into: Where to.
        x: What to sum.
        columns: K.
        block_size: Columns to a block.
        before: The node before which it is put; behind what makes ``x`` where None.
    """
    name, dtype = f"{x.name}_sums_{block_size}", x.dtype or ir.DataType.FLOAT
    producer = x.producer()
    # At once after what makes it, so that it stands before everything that reads it.
    beside, after = (into.graph[0], False) if producer is None else (producer, True)
    if before is not None:
        beside, after = before, False
    if x.shape is not None and dtype == ir.DataType.FLOAT:
        # A tenth of what AveragePool takes for a prompt, and a third of a product with ones.
        leading = x.shape.rank() - 1
        blocks = (*[0] * leading, columns // block_size, block_size)
        shape = _shared(into, np.array(blocks, np.int64), f"blocks_{leading}_{columns}_{block_size}")
        axes = _shared(into, np.array([leading + 1], np.int64), f"axis_{leading + 1}")
        parts = add_node(into, beside, "Reshape", [x, shape], {}, f"{name}_blocks", dtype, after=after)
        split = parts.producer() if after else beside
        assert split is not None
        sums = add_node(into, split, "ReduceSum", [parts, axes], {"keepdims": 0}, name, dtype, after=after)
        return sums, 1.0
    # In float16 means, whose sums might be too large.
    inputs, attributes = (
        [x, spread(into, columns, block_size, dtype)],
        {"transB": 1, "alpha": 1 / block_size},
    )
    means = add_node(
        into, beside, "FusedMatMul", inputs, attributes, name, dtype, domain=_DOMAIN, after=after
    )
    return means, float(block_size)


def spread(into: BlockTarget, columns: int, block_size: int, dtype: ir.DataType) -> ir.Value:
    """(blocks, K), 1 where a column is in a block: repeats a value to a block, or sums a block to a value."""
    array = np.repeat(np.eye(columns // block_size, dtype=dtype.numpy()), block_size, axis=1)
    return _shared(into, array, f"spread_{columns}_{block_size}_{dtype.name.lower()}")


def _shared(into: BlockTarget, array: npt.NDArray[Any], name: str) -> ir.Value:
    """One constant for all weights of a graph."""
    key = f"onnxsmith_{name}"
    known = into.graph.initializers.get(key)
    return known if known is not None else constant(into, array, key)


def add_node(
    into: BlockTarget,
    beside: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    name: str,
    dtype: ir.DataType,
    *,
    domain: str = "",
    after: bool = False,
) -> ir.Value:
    """A node with one output, before or after another; its output."""
    name = unused(into, name)
    node = ir.node(op_type, inputs, dict(attributes), domain=domain, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(dtype)
    (into.graph.insert_after if after else into.graph.insert_before)(beside, node)
    return node.outputs[0]


def unused(into: BlockTarget, name: str) -> str:
    """The name, with a number behind it where something has it already; it is taken then."""
    names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count()))
    found = next(n for n in names if n not in into.taken)
    into.taken.add(found)
    return found


def constant(into: BlockTarget, array: npt.NDArray[Any], name: str) -> ir.Value:
    """An initializer."""
    name = unused(into, name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    value.const_value = ir.tensor(array, name=name)
    into.graph.register_initializer(value)
    return value


def lazy(into: BlockTarget, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Any) -> ir.Value:
    """An initializer that is computed when it is written."""
    return lazy_initializer(
        into.graph, unused(into, name), dtype, shape, lambda: np.ascontiguousarray(compute())
    )


def reshape(
    into: BlockTarget, before: ir.Node, value: ir.Value, shape: tuple[int, ...], name: str
) -> ir.Value:
    """A value in another shape."""
    name = unused(into, name)
    target = constant(into, np.array(shape, np.int64), f"{name}_shape")
    node = ir.node("Reshape", [value, target], name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, ir.Shape(list(shape)), value.type
    into.graph.insert_before(before, node)
    return output
