"""Minimums of blocks as further columns of a weight, computed in the same product as its codes.

Blocks with a float minimum, as GGUF's Q4_1 has them, have no fast kernel of their own, so they are written as

    x @ w.T = MatMulNBits(x, codes, scales) + blocksum(x) @ offsets.T

The second product and the sum are small but read another float for each block, and a decoder has hundreds of
them. This pass appends the block sums to x and the offsets to the weight, and one MatMulNBits computes all:

    x @ w.T = MatMulNBits([x, blocksum(x), ...], [codes, digits of the rests], scales, zero points)

An integer zero point takes the nearest step of an offset; the rest, at most half a scale, becomes a number of
8 bits, its digits in the weight's own bits. The largest rest of a row sets the rests' scale, so each minimum
is off by at most a 476th of the row's largest scale, where zero points reach it. (Where a row's minimums lie
outside of what zero points can say, the rests are larger, and the error with them.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.block_nodes import BlockTarget, add_node, block_sums, constant, lazy, unused
from onnxsmith.graph_passes.block_products import (
    Reading,
    deferred,
    is_computed_constant,
    product_with_offsets,
)
from onnxsmith.graph_passes.blocks import (
    BlocksOnce,
    QuantizedBlocks,
    pack_codes,
    packed_blocks,
)
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import int_attribute, is_operator, label
from onnxsmith.graph_passes.names import value_names
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["FoldMinimums"]

_DOMAIN = "com.microsoft"
_INT8 = 4
# Up to so many blocks in a row a product with ones takes less time than Reshape, ReduceSum and Mul; it grows
# with their square.
_MOST_SUMMED_BLOCKS = 64
_FLOAT = ir.DataType.FLOAT


class FoldMinimums(GraphPass):
    """Computes the minimums of blocks in the product of the codes, in 8 bits.

    For weights whose products are computed on 8 bit integers (``accuracy_level`` 4): there the block sums are
    rounded as the activations are. Works in branches too.
    """

    name: ClassVar[str] = "fold_minimums"
    summary: ClassVar[str] = "float minimums of blocks as further columns of the weight, in 8 bits"

    def apply(self, model: ir.Model) -> Changes:
        """Replaces products with offsets beside them; weights are made when they are written."""
        changes = Changes()
        taken = value_names(model)
        for graph in model.graphs():
            folder = _Folder(BlockTarget(graph, _INT8, taken))
            for node in list(graph):
                x = node.inputs[0] if is_operator(node, "MatMulNBits", _DOMAIN) else None
                if x is None:
                    continue
                result, offsets = product_with_offsets(node, x)
                if offsets is None:
                    continue
                reason = _refusal(node, x)
                if reason:
                    changes.skipped[label(node)] = reason
                else:
                    folder.fold(node, x, result, offsets)
                    changes.count += 1
        if changes.count:
            changes.details = {"folded": changes.count}
            common.RemoveUnusedNodesPass()(model)
        return changes


def _refusal(node: ir.Node, x: ir.Value) -> str:
    level, bits = int_attribute(node, "accuracy_level"), int_attribute(node, "bits", 4)
    if level != _INT8:
        return f"its accuracy_level is {level}, where float minimums are exact; expected {_INT8}"
    if bits not in (4, 8):
        return f"codes of {bits} bits; expected 4 or 8"
    if int_attribute(node, "K") % int_attribute(node, "block_size"):
        return "its rows do not end with a block"
    if any(value is not None for value in node.inputs[3:]):
        return "it has zero points, a group index or a bias"
    codes, scales = node.inputs[1], node.inputs[2]
    if codes is None or not codes.is_initializer() or constant_of(codes) is None or len(codes.uses()) != 1:
        return "something else reads its weight"
    if not is_computed_constant(scales):
        return "its scales are not constant"
    if x.dtype != _FLOAT or x.shape is None or x.shape.rank() < 2:
        return "its left side is not known to be float32 of two axes or more"
    return ""


class _Folder:
    """Changes products of one graph."""

    def __init__(self, into: BlockTarget) -> None:
        self._into = into
        self._longer: dict[tuple[ir.Value, int, int], ir.Value] = {}

    def fold(self, node: ir.Node, x: ir.Value, result: ir.Value, offsets: ir.Value) -> None:
        """Replaces a product and what is added to it by one product."""
        bits, size = int_attribute(node, "bits", 4), int_attribute(node, "block_size")
        rows, columns = int_attribute(node, "N"), int_attribute(node, "K")
        codes, scales = node.inputs[1], node.inputs[2]
        assert codes is not None and scales is not None
        key = (x, size, bits)
        if key not in self._longer:
            self._longer[key] = self._with_sums(node, x, columns, size, bits)
        longer = self._longer[key]
        blocks, digits = columns // size, 8 // bits
        whole = columns + digits * blocks
        count = -(-whole // size)
        caster = scales.producer()
        stored = _FLOAT
        if caster is not None and caster.op_type == "Cast" and caster.inputs[0] is not None:
            stored = caster.inputs[0].dtype or _FLOAT

        read = [deferred(value) for value in (codes, scales, offsets)]

        def compute() -> QuantizedBlocks:
            reading = Reading()
            packed, scale, shift = (part(reading) for part in read)
            made = fold_offsets(
                packed.reshape(rows, blocks, -1), scale.reshape(rows, blocks), shift.reshape(rows, blocks),
                bits=bits, scale_type=stored.numpy(),
            )  # fmt: skip
            reading.drop_pages()
            return made

        once = BlocksOnce(compute, parts=3)
        into, base = self._into, codes.name or "weight"

        def zero_points() -> npt.NDArray[Any]:
            packed = once.get().zero_points
            assert packed is not None
            return packed

        new_codes = lazy(
            into, f"{base}_folded", ir.DataType.UINT8, (rows, count, size * bits // 8),
            lambda: once.get().codes,
        )  # fmt: skip
        new_scales = lazy(
            into, f"{base}_folded_scales", stored, (rows, count),
            lambda: once.get().scales.astype(stored.numpy()),
        )  # fmt: skip
        zeros = lazy(
            into, f"{base}_folded_zero_points", ir.DataType.UINT8, (rows, -(-count * bits // 8)), zero_points
        )
        if stored != _FLOAT:
            shape = new_scales.shape
            new_scales = add_node(
                into, node, "Cast", [new_scales], {"to": _FLOAT}, f"{base}_folded_scales_cast", _FLOAT
            )
            new_scales.shape = shape
        attributes = {key: value for key, value in node.attributes.items() if key != "K"}
        new = ir.Node(
            _DOMAIN, "MatMulNBits", [longer, new_codes, new_scales, zeros],
            [ir.AttrInt64("K", whole), *attributes.values()],
            name=unused(into, f"{label(node)}_folded"),
        )  # fmt: skip
        into.graph.insert_before(node, new)
        made, name = new.outputs[0], result.name
        made.type, made.shape = result.type, result.shape
        result.replace_all_uses_with(made, replace_graph_outputs=result.is_graph_output())
        result.name, made.name = unused(into, f"{name}_before"), name

    def _with_sums(self, before: ir.Node, x: ir.Value, columns: int, size: int, bits: int) -> ir.Value:
        """x, its block sums, and the sums divided by the weight of each further digit."""
        into, name = self._into, f"{x.name}_with_sums"
        blocks, digits = columns // size, 8 // bits
        if blocks <= _MOST_SUMMED_BLOCKS:
            codes, scales = self._ones(columns, size, bits)
            attributes = {
                "K": columns, "N": digits * blocks, "bits": bits, "block_size": size, "accuracy_level": _INT8,
            }  # fmt: skip
            sums = [
                add_node(
                    into, before, "MatMulNBits", [x, codes, scales], attributes, f"{name}_sums", _FLOAT,
                    domain=_DOMAIN,
                )
            ]  # fmt: skip
        else:
            first, _ = block_sums(into, x, columns, size, before=before)
            sums = [first]
            if digits > 1:
                radix = self._shared(np.array(1 / (1 << bits), np.float32), f"digit_{bits}")
                sums.append(add_node(into, before, "Mul", [first, radix], {}, f"{name}_digit", _FLOAT))
        longer = add_node(into, before, "Concat", [x, *sums], {"axis": -1}, name, _FLOAT)
        assert x.shape is not None
        longer.shape = ir.Shape([*x.shape[:-1], columns + digits * blocks])
        return longer

    def _ones(self, columns: int, size: int, bits: int) -> tuple[ir.Value, ir.Value]:
        """A weight (digits * blocks, columns) that sums blocks, for each digit by its factor."""
        blocks, digits, middle = columns // size, 8 // bits, 1 << (bits - 1)
        codes = np.full((digits, blocks, blocks, size), middle, np.uint8)
        codes[:, np.arange(blocks), np.arange(blocks)] += 1
        scales = np.float32(1 << bits) ** -np.arange(digits, dtype=np.float32)
        spread = np.broadcast_to(scales[:, None, None], (digits, blocks, blocks))
        packed = pack_codes(codes.reshape(digits * blocks, blocks, size), bits)
        name = f"block_ones_{columns}_{size}_{bits}"
        return (
            self._shared(packed, name),
            self._shared(np.ascontiguousarray(spread.reshape(digits * blocks, blocks)), f"{name}_scales"),
        )

    def _shared(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        """One constant for all products of a graph."""
        key = f"onnxsmith_{name}"
        known = self._into.graph.initializers.get(key)
        return known if known is not None else constant(self._into, array, key)


def fold_offsets(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.float32],
    *,
    bits: int,
    scale_type: npt.DTypeLike,
) -> QuantizedBlocks:
    """A weight with its offsets as further columns.

    Args:
        codes: (N, blocks, block_size * bits / 8), packed, with the middle code for zero.
        scales: (N, blocks).
        offsets: (N, blocks): what is added to each weight of a block.
        bits: 4 or 8.
        scale_type: What scales are stored as.

    Returns:
        Blocks of the columns of before, and of 8 / bits columns for each block.
    """
    rows, blocks, width = codes.shape
    size, middle, digits = width * 8 // bits, 1 << (bits - 1), 8 // bits
    steps = np.where(scales == 0, np.float32(1), scales)
    zeros = np.clip(np.rint(middle - offsets / steps), 0, 2 * middle - 1)
    zeros[scales == 0] = middle
    rests = offsets + scales * (zeros - np.float32(middle))
    # A number of 8 bits whose digits have signs: -128 to 119 where there are two of them.
    highest, radix = (119, 16) if digits == 2 else (127, 1)
    wanted = np.maximum(rests.max(1) / highest, rests.min(1) / -128) * np.float32(radix)
    scale = wanted.astype(scale_type)
    scale = np.where(scale < wanted, np.nextafter(scale, np.inf, dtype=scale.dtype), scale).astype(np.float32)
    unit = np.where(scale == 0, np.float32(1), scale / np.float32(radix))
    numbers = np.rint(rests / unit[:, None]).astype(np.int16)
    numbers[scale == 0] = 0
    parts = [numbers]
    if digits == 2:
        low = ((numbers + 8) & 15) - 8
        parts = [(numbers - low) >> 4, low]
    further = -(-digits * blocks // size)
    columns = np.zeros((rows, further * size), np.int16)
    columns[:, : digits * blocks] = np.concatenate(parts, axis=1)
    added = pack_codes((columns + middle).astype(np.uint8).reshape(rows, further, size), bits)
    return packed_blocks(
        np.concatenate([codes, added], axis=1),
        np.concatenate([scales, np.repeat(scale[:, None], further, axis=1)], axis=1).astype(np.float32),
        np.concatenate([zeros, np.full((rows, further), middle)], axis=1).astype(np.uint8),
        bits=bits, block_size=size, columns=blocks * size + digits * blocks, symmetric=False,
    )  # fmt: skip
