"""A few columns of an activation multiplied in float, so that others of their blocks keep their precision.

MatMulNBits with ``accuracy_level`` 4 rounds an activation in blocks by the largest magnitude of each. In
decoders a few columns of what norms give are a hundred times larger than the others, in nearly all tokens
(LLM.int8, Dettmers et al., 2022, https://arxiv.org/abs/2208.07339, section 4): of the error of rounding, one
such column makes a half, in the block that it stands in. Here the gain of the norm makes it smaller by a
power of two, which is exact, and what is missing of its product is added in float:

    x @ w.T = x' @ w.T + x'[c] * (2 ** 7 - 1) * w[:, c],  x'[c] = x[c] / 2 ** 7

Weights with float minimums have a float product beside them already, of block sums: it gets a column more
for each, and the sums are computed with what picks the columns. Weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_nodes import BlockTarget, add_node, constant, lazy, spread
from onnxsmith.graph_passes.block_products import (
    Reading,
    deferred,
    is_computed_constant,
    offsets_product,
    product_with_offsets,
)
from onnxsmith.graph_passes.blocks import unpack_codes
from onnxsmith.graph_passes.context import Activations, activations_for
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import int_attribute, is_operator, label
from onnxsmith.graph_passes.names import value_names
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["FloatColumns"]

_DOMAIN = "com.microsoft"
_INT8 = 4
_FLOAT = ir.DataType.FLOAT
_SMALLER = np.float32(2.0**-7)
_MISSING = np.float32(2.0**7 - 1)
# Inputs that the result grows with, by operator: the gain, and the shift where there is one.
_NORMS: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
Floats = npt.NDArray[np.float32]


class FloatColumns(GraphPass):
    """Multiplies the largest columns of norms' results in float, beside products on 8 bit integers.

    Which columns, calibration data tells; they hardly depend on it. Only the main graph is changed.
    """

    name: ClassVar[str] = "float_columns"
    summary: ClassVar[str] = "a few large columns of norms' results in float (calibrated)"

    def __init__(self, *, columns: int = 2, samples: int = 2) -> None:
        """Sets how many.

        Args:
            columns: Of each norm's result.
            samples: Samples of the calibration data that are looked at.
        """
        for name, value in (("columns", columns), ("samples", samples)):
            if value < 1:
                raise BadInputError(f"pass {self.name}: {name}", got=str(value), expected="at least 1")
        self.columns = columns
        self.samples = samples

    def apply(self, model: ir.Model) -> Changes:
        """Finds the columns and changes gains, sums and offsets.

        Raises:
            PreconditionError: There is no calibration data.
        """
        changes = Changes()
        found: dict[str, _Norm] = {}
        for node in model.graph:
            if node.op_type in _NORMS:
                norm = _Norm(node)
                if norm.products:
                    reason = norm.refusal(self.columns)
                    if reason:
                        changes.skipped[label(node)] = reason
                    else:
                        found[norm.x.name or ""] = norm
        if not found:
            return changes
        sizes = {name: (norm.width, norm.block) for name, norm in found.items()}
        run = activations_for(model, self.name, method="of finding large columns")
        chosen = _largest(model, sizes, run, columns=self.columns, samples=self.samples)
        into = BlockTarget(model.graph, _INT8, value_names(model))
        for name, norm in found.items():
            norm.take_out(into, chosen[name])
            changes.count += 1
        changes.details = {
            "norms": changes.count,
            "products": sum(len(norm.products) for norm in found.values()),
            "columns": {name: chosen[name] for name in found},
        }
        common.RemoveUnusedNodesPass()(model)
        return changes


class _Norm:
    """A norm and the products that read what it gives."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.x = node.outputs[0]
        self.products = [
            use.node
            for use in self.x.uses()
            if is_operator(use.node, "MatMulNBits", _DOMAIN)
            and use.idx == 0
            and int_attribute(use.node, "accuracy_level") == _INT8
        ]

    @property
    def width(self) -> int:
        return int_attribute(self.products[0], "K")

    @property
    def block(self) -> int:
        """The blocks of the sums that are multiplied in float; of the product where there are none."""
        _, offsets = product_with_offsets(self.products[0], self.x)
        if offsets is None or offsets.shape is None or not isinstance(offsets.shape[1], int):
            return int_attribute(self.products[0], "block_size")
        return self.width // offsets.shape[1]

    def _parameters(self) -> dict[int, ir.Value]:
        given = {index: value for index, value in enumerate(self.node.inputs) if value is not None}
        return {index: given[index] for index in _NORMS[self.node.op_type] if index in given}

    def refusal(self, columns: int) -> str:
        for value in self._parameters().values():
            tensor = constant_of(value)
            if tensor is None or tensor.dtype != _FLOAT:
                return "its gain or shift is not a float32 constant"
        shifts = {id(_multiplied(node, self.x)) for node in self.products}
        sums = [use.node for use in self.x.uses() if use.node not in self.products]
        if self.x.is_graph_output() or any(node.op_type != "Reshape" for node in sums):
            return "something else reads what it gives"
        made = [value for node in sums for one in (node, *_after(node, 1)) for value in one.outputs]
        read = [user for node in sums for user in _after(node, 2)]
        if any(value.is_graph_output() for value in made) or any(id(node) not in shifts for node in read):
            return "something else reads sums of what it gives"
        for node in self.products:
            if int_attribute(node, "bits", 4) not in (4, 8):
                return f"{label(node)} has codes of {int_attribute(node, 'bits', 4)} bits; expected 4 or 8"
            if any(value is not None for value in node.inputs[4:]):
                return f"{label(node)} has a group index or a bias"
            if not all(is_computed_constant(value) for value in node.inputs[1:4] if value is not None):
                return f"the weight of {label(node)} is not constant"
        if self.width <= columns:
            return f"it has {self.width} columns"
        return ""

    def take_out(self, into: BlockTarget, columns: Sequence[int]) -> None:
        """Makes columns of the result small, and adds what is missing to the products."""
        for index, value in self._parameters().items():
            tensor = constant_of(value)
            assert tensor is not None
            values = tensor.numpy().copy()
            values[list(columns)] *= _SMALLER
            # Under a name of its own: it is not the weight of before.
            name = f"{self.x.name}_smaller_{index}"
            self.node.replace_input_with(index, constant(into, values, name))
        # In each form once: picked columns alone, or behind block sums.
        picked: dict[int, ir.Value] = {}
        for node in self.products:
            _, offsets = product_with_offsets(node, self.x)
            missing = self._missing(into, node, offsets, columns)
            if offsets is None:
                if 0 not in picked:
                    picked[0] = self._picked(into, columns, 0)
                _add(into, node, picked[0], missing)
                continue
            shift = _multiplied(node, self.x)
            assert shift is not None and offsets.shape is not None and isinstance(offsets.shape[1], int)
            block = self.width // offsets.shape[1]
            if block not in picked:
                picked[block] = self._picked(into, columns, block)
            both = add_node(
                into, shift, "Concat", [offsets, missing], {"axis": 1}, f"{shift.name}_columns", _FLOAT
            )
            both.shape = ir.Shape([offsets.shape[0], offsets.shape[1] + len(columns)])
            shift.replace_input_with(0, picked[block])
            shift.replace_input_with(1, both)

    def _picked(self, into: BlockTarget, columns: Sequence[int], block: int) -> ir.Value:
        """The block sums of the result, if any, and its columns: (..., blocks + columns)."""
        rows = np.zeros((len(columns), self.width), np.float32)
        rows[np.arange(len(columns)), list(columns)] = 1
        name = f"{self.x.name}_columns"
        which = constant(into, rows, f"{name}_picked")
        first = self.node
        if block:
            blocks = spread(into, self.width, block, _FLOAT)
            which = add_node(into, first, "Concat", [blocks, which], {"axis": 0}, f"{name}_rows", _FLOAT)
        return add_node(
            into,
            first,
            "FusedMatMul",
            [self.x, which],
            {"transB": 1},
            name,
            _FLOAT,
            domain=_DOMAIN,
            after=True,
        )

    def _missing(
        self, into: BlockTarget, node: ir.Node, offsets: ir.Value | None, columns: Sequence[int]
    ) -> ir.Value:
        """What the columns of the weight lack, (N, columns)."""
        rows, bits, size = (
            int_attribute(node, "N"),
            int_attribute(node, "bits", 4),
            int_attribute(node, "block_size"),
        )
        read = [None if value is None else deferred(value) for value in node.inputs[1:4]]
        shift = None if offsets is None else deferred(offsets)
        which = np.array(columns)
        width = self.width

        def compute() -> Floats:
            reading = Reading()
            codes, scales, zeros = (*(None if one is None else one(reading) for one in read), None)[:3]
            assert codes is not None and scales is not None
            added = None if shift is None else shift(reading)
            found = _columns(
                codes.reshape(rows, -1), scales.reshape(rows, -1), zeros, which, bits=bits, size=size
            )
            if added is not None:
                added = added.reshape(rows, -1)
                found += added[:, which // (width // added.shape[1])]
            reading.drop_pages()
            return found * _MISSING

        base = node.inputs[1].name if node.inputs[1] is not None else "weight"
        return lazy(into, f"{base}_missing", _FLOAT, (rows, len(columns)), compute)


def _columns(
    codes: npt.NDArray[np.uint8],
    scales: Floats,
    zeros: npt.NDArray[np.uint8] | None,
    which: npt.NDArray[np.int64],
    *,
    bits: int,
    size: int,
) -> Floats:
    """Some columns of a weight in blocks, (N, columns), offsets not counted."""
    per_byte, mask = 8 // bits, np.uint8((1 << bits) - 1)
    found = (codes[:, which // per_byte] >> (which % per_byte * bits).astype(np.uint8)) & mask
    blocks = which // size
    points: npt.NDArray[np.float32] | np.float32 = np.float32(1 << (bits - 1))
    if zeros is not None:
        points = unpack_codes(zeros.reshape(len(codes), -1), bits)[:, blocks].astype(np.float32)
    made: Floats = (found.astype(np.float32) - points) * scales[:, blocks].astype(np.float32)
    return made


def _multiplied(node: ir.Node, x: ir.Value) -> ir.Node | None:
    """The product of block sums with the offsets of a product."""
    result, offsets = product_with_offsets(node, x)
    return None if offsets is None else offsets_product(result, offsets)


def _after(node: ir.Node, steps: int) -> Iterator[ir.Node]:
    """The nodes so many steps behind a node."""
    users = [use.node for value in node.outputs for use in value.uses()]
    for user in users:
        if steps == 1:
            yield user
        else:
            yield from _after(user, steps - 1)


def _add(into: BlockTarget, node: ir.Node, picked: ir.Value, missing: ir.Value) -> None:
    """Adds a product of picked columns to a product without offsets."""
    old = node.outputs[0]
    uses, is_output = list(old.uses()), old.is_graph_output()
    name, shape, kind = old.name, old.shape, old.type
    old.name = f"{name}_rounded"
    into.taken.add(old.name)
    base = label(node)
    few = add_node(
        into, node, "FusedMatMul", [picked, missing], {"transB": 1}, f"{base}_columns", _FLOAT,
        domain=_DOMAIN, after=True,
    )  # fmt: skip
    maker = few.producer()
    assert maker is not None
    made = add_node(into, maker, "Add", [old, few], {}, f"{base}_whole", _FLOAT, after=True)
    for user, index in uses:
        user.replace_input_with(index, made)
    if is_output:
        outputs = into.graph.outputs
        outputs[:] = [made if value is old else value for value in outputs]
    made.name, made.shape, made.type = name, shape, kind


def _largest(
    model: ir.Model,
    sizes: Mapping[str, tuple[int, int]],
    activations: Activations,
    *,
    columns: int,
    samples: int,
) -> dict[str, list[int]]:
    """The columns without which rounding in blocks loses least.

    The error of a block follows the square of its largest magnitude. A column that is the largest of its
    block counts what would be left without it, and so does the second largest, in case the first is gone;
    each row counts the same.
    """
    gains = {name: np.zeros(width, np.float64) for name, (width, _) in sizes.items()}
    for number, batch in enumerate(activations(model, list(sizes))):
        for name, (width, block) in sizes.items():
            x = np.abs(np.asarray(batch[name], np.float32)).reshape(-1, width // block, block)
            order = np.argpartition(x, (-3, -2, -1), axis=-1)[..., -3:]
            squares = np.take_along_axis(x, order, axis=-1).astype(np.float64) ** 2
            whole = np.maximum(squares[..., 2].sum(axis=-1), 1e-30)[:, None]
            begins = np.arange(width // block) * block
            for place in (2, 1):
                gain = (squares[..., place] - squares[..., place - 1]) / whole
                np.add.at(gains[name], (order[..., place] + begins).ravel(), gain.ravel())
        if number + 1 == samples:
            break
    return {
        name: [int(c) for c in np.argsort(-gain, kind="stable")[:columns]] for name, gain in gains.items()
    }
