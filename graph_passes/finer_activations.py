"""Rounding of activations that loses less: weights in blocks stay what they are, bit by bit.

MatMulNBits with ``accuracy_level`` 4 rounds the activation x to 8 bits, in blocks as long as the weight's, by
the largest magnitude of each. What is lost is the rounding errors times ``scale * (code - zero point)``:

* Where a block has a float minimum, ``block_operators`` multiplies what all weights of the block share with
  sums of x that are not rounded. How much that is depends on the zero point. The code nearest to the block's
  mean leaves the smallest squares for the errors to be multiplied with.
* Two blocks with one scale are the same weight, but x is rounded by the largest magnitude of each half. A
  column that is large beside the others then costs 16 of them their precision and no longer 32.

Zero points cost nothing where a model runs: kernels multiply zero points with block sums of x in any case.
Smaller blocks do cost time: see docs/quantization.md for what a token pays.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_nodes import BlockTarget, add_node, constant, lazy, reshape
from onnxsmith.graph_passes.block_products import (
    Reading,
    deferred,
    is_computed_constant,
    offsets_product,
    product_with_offsets,
    sums_blocks,
)
from onnxsmith.graph_passes.blocks import pack_zero_points, unpack_codes
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import int_attribute, is_operator, label
from onnxsmith.graph_passes.names import value_names
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["FinerActivations"]

_DOMAIN = "com.microsoft"
_INT8 = 4
_FLOAT = ir.DataType.FLOAT
_CHUNK_BYTES = 1 << 17
_SIZES = (16, 32, 64, 128)
Bytes = npt.NDArray[np.uint8]


class FinerActivations(GraphPass):
    """Has MatMulNBits lose less where it rounds activations to 8 bits; the weights stay as they are.

    Scales are repeated where the model is loaded, so the file grows by zero points only: half a byte for a
    block of 4 bit codes.
    """

    name: ClassVar[str] = "finer_activations"
    summary: ClassVar[str] = (
        "round activations in smaller blocks, around the mean of each block of the weight"
    )

    def __init__(
        self,
        *,
        block_size: int = 16,
        after: Literal["norms", "any"] = "norms",
        widest: float = 2.0,
        centre: bool = True,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets what is done, and where.

        Args:
            block_size: Of activations, in columns; blocks that are larger are split.
            after: What is split: products of a norm's result, most of whose rounding error comes from a block
                or two with a large column, or any.
            widest: Only products with at most so many times more outputs than inputs are split. Each output
                has more scales to read then, and wide products gain no more by it than narrow ones.
            centre: Give blocks with a float minimum the zero point nearest to their mean.
            skip_nodes: Patterns of node or weight names that stay as they are.
        """
        where = f"pass {self.name}"
        if after not in ("norms", "any"):
            raise BadInputError(f"{where}: after", got=repr(after), expected="norms or any")
        if block_size not in _SIZES:
            raise BadInputError(
                f"{where}: block_size", got=str(block_size), expected=", ".join(map(str, _SIZES))
            )
        if not widest >= 0:
            raise BadInputError(f"{where}: widest", got=str(widest), expected="0 (no product) or more")
        self.block_size = block_size
        self.after = after
        self.widest = widest
        self.centre = centre
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Changes products of the graph and of its branches; new constants are made when they are written."""
        changes = Changes()
        centred = split = 0
        writer = _Writer(value_names(model))
        for graph in model.graphs():
            for node in list(graph):
                if not is_operator(node, "MatMulNBits", _DOMAIN):
                    continue
                reason = self._skipped(node) or _refusal(node)
                if reason:
                    changes.skipped[label(node)] = reason
                    continue
                is_centred = self.centre and writer.centre(node)
                is_split = self._gains(node) and writer.split(node, self.block_size)
                centred, split = centred + is_centred, split + is_split
                changes.count += is_centred or is_split
        if changes.count:
            changes.details = {"centred": centred, "split": split, "block_size": self.block_size}
            common.RemoveUnusedNodesPass()(model)
        return changes

    def _gains(self, node: ir.Node) -> bool:
        if int_attribute(node, "N") > self.widest * int_attribute(node, "K") or sums_blocks(node):
            return False
        return self.after == "any" or _is_of_norm(node.inputs[0])

    def _skipped(self, node: ir.Node) -> str:
        weight = node.inputs[1]
        names = (node.name or "", (weight.name or "") if weight is not None else "")
        fitting = [p for p in self.skip_nodes if any(fnmatch.fnmatchcase(name, p) for name in names)]
        return f"skip_nodes has {fitting[0]!r}" if fitting else ""


def _is_of_norm(x: ir.Value | None) -> bool:
    """Whether a value is a norm's result, block sums behind it or not."""
    maker = x.producer() if x is not None else None
    if maker is not None and maker.op_type == "Concat" and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    return maker is not None and maker.op_type.endswith("Normalization")


def _refusal(node: ir.Node) -> str:
    level, bits = int_attribute(node, "accuracy_level"), int_attribute(node, "bits", 4)
    if level != _INT8:
        return f"its accuracy_level is {level}: activations are not rounded; expected {_INT8}"
    if bits not in (4, 8):
        return f"codes of {bits} bits; expected 4 or 8"
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        return "it has a group index"
    if not all(is_computed_constant(value) for value in node.inputs[1:4] if value is not None):
        return "its weight is not constant"
    scales, zeros = node.inputs[2], node.inputs[3] if len(node.inputs) > 3 else None
    if scales is None or scales.shape is None or scales.shape.rank() != 2:
        return "its scales are not known to have two axes"
    if zeros is not None and (zeros.dtype != ir.DataType.UINT8 or constant_of(zeros) is None):
        return "its zero points are not integers"
    return ""


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Numbers of a product: N, K, bits of a code, weights to a block, blocks to a row."""

    rows: int
    columns: int
    bits: int
    size: int

    @classmethod
    def of(cls, node: ir.Node) -> _Shape:
        rows, columns, size = (int_attribute(node, name) for name in ("N", "K", "block_size"))
        return cls(rows, columns, int_attribute(node, "bits", 4), size)

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.size)


class _Writer:
    """Changes products of a graph and its branches."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._targets: dict[ir.Graph, BlockTarget] = {}
        # Several products may read one weight.
        self._centred: dict[tuple[ir.Graph, ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
        self._split: dict[tuple[ir.Graph | ir.Value | None, ...], list[ir.Value | None]] = {}

    def _into(self, node: ir.Node) -> BlockTarget:
        """The graph that a node stands in."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        return self._targets.setdefault(graph, BlockTarget(graph, _INT8, self._taken))

    def centre(self, node: ir.Node) -> bool:
        """Gives a product with offsets beside it zero points, and takes them out of the offsets."""
        x, codes, scales = node.inputs[:3]
        if x is None or codes is None or scales is None or any(v is not None for v in node.inputs[3:]):
            return False
        result, offsets = product_with_offsets(node, x)
        minimums = None if offsets is None else _minimums(offsets, scales)
        shift = _multiplied(result, offsets)
        if offsets is None or minimums is None or shift is None:
            return False
        # In front of a branch where all of it depends on nothing inside.
        into = self._into(shift)
        key = (into.graph, codes, offsets)
        if key not in self._centred:
            self._centred[key] = _zero_points(into, shift, _Shape.of(node), codes, scales, minimums)
        zeros, shifted = self._centred[key]
        shift.replace_input_with(1, shifted)
        node.resize_inputs(4)
        node.replace_input_with(3, zeros)
        return True

    def split(self, node: ir.Node, size: int) -> bool:
        """Makes several blocks of each, with the same scale and zero point."""
        form, into = _Shape.of(node), self._into(node)
        if form.size <= size:
            return False
        key = (into.graph, *node.inputs[1:4])
        if key not in self._split:
            self._split[key] = _halves(into, node, form, size)
        for number, value in enumerate(self._split[key], start=1):
            if value is not None:
                node.replace_input_with(number, value)
        node.attributes["block_size"] = ir.AttrInt64("block_size", size)
        return True


def _multiplied(result: ir.Value, offsets: ir.Value | None) -> ir.Node | None:
    """The product of sums and offsets, where nothing else reads it."""
    shift = offsets_product(result, offsets)
    if shift is None or len(shift.outputs[0].uses()) != 1 or shift.outputs[0].is_graph_output():
        return None
    return shift


def _zero_points(
    into: BlockTarget, before: ir.Node, form: _Shape, codes: ir.Value, scales: ir.Value, minimums: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Packed zero points, and minimums plus scales times zero points."""
    base = codes.name or "weight"
    read = deferred(codes)

    def packed() -> Bytes:
        reading = Reading()
        points = _central_codes(read(reading).reshape(form.rows, form.blocks, -1), form.bits)
        reading.drop_pages()
        return pack_zero_points(points, form.bits)

    width = -(-form.blocks * form.bits // 8)
    zeros = lazy(into, f"{base}_centres", ir.DataType.UINT8, (form.rows, width), packed)
    points = zeros
    if form.bits == 4:
        # Both codes of a byte, looked up: ONNX Runtime folds it where it loads the model.
        pairs = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.uint8)
        indices = add_node(
            into, before, "Cast", [zeros], {"to": ir.DataType.INT32}, f"{base}_pairs", ir.DataType.INT32
        )
        both = add_node(
            into, before, "Gather", [_shared(into, pairs, "pairs"), indices], {"axis": 0},
            f"{base}_unpacked", ir.DataType.UINT8,
        )  # fmt: skip
        points = reshape(into, before, both, (form.rows, 2 * width), f"{base}_points")
        if 2 * width != form.blocks:
            some = _shared(into, np.arange(form.blocks, dtype=np.int64), f"first_{form.blocks}")
            points = add_node(
                into, before, "Gather", [points, some], {"axis": 1}, f"{base}_points", ir.DataType.UINT8
            )
    floats = add_node(into, before, "Cast", [points], {"to": _FLOAT}, f"{base}_centres_cast", _FLOAT)
    scaled = add_node(into, before, "Mul", [scales, floats], {}, f"{base}_centres_scaled", _FLOAT)
    shifted = add_node(into, before, "Add", [minimums, scaled], {}, f"{base}_means", _FLOAT)
    shifted.shape = ir.Shape([form.rows, form.blocks])
    return zeros, shifted


def _halves(into: BlockTarget, node: ir.Node, form: _Shape, size: int) -> list[ir.Value | None]:
    """Codes, scales and zero points of smaller blocks."""
    codes, scales = node.inputs[1:3]
    assert codes is not None and scales is not None
    zeros = node.inputs[3] if len(node.inputs) > 3 else None
    base, times, count = codes.name or "weight", form.size // size, -(-form.columns // size)
    shape = (form.rows, count, size * form.bits // 8)
    read = deferred(codes)

    def all_codes() -> Bytes:
        return read(Reading()).reshape(form.rows, form.blocks * times, -1)[:, :count]

    readers = {use.node for use in codes.uses()}
    if count == form.blocks * times and not (codes.is_initializer() and readers == {node}):
        # Something else reads it, such as an embedding: the bytes are the same.
        parts = reshape(into, node, codes, shape, f"{base}_by_{size}")
    else:
        parts = lazy(into, f"{base}_by_{size}", ir.DataType.UINT8, shape, all_codes)
    index = np.repeat(np.arange(form.blocks, dtype=np.int64), times)[:count]
    which = _shared(into, index, f"each_{times}_times_{count}")
    dtype = scales.dtype or _FLOAT
    spread = add_node(into, node, "Gather", [scales, which], {"axis": 1}, f"{base}_scales_by_{size}", dtype)
    spread.shape = ir.Shape([form.rows, count])
    points: ir.Value | None = None
    if zeros is not None:
        tensor = constant_of(zeros)
        assert tensor is not None

        def all_points() -> Bytes:
            unpacked = unpack_codes(tensor.numpy().reshape(form.rows, -1), form.bits)
            return pack_zero_points(unpacked[:, index], form.bits)

        width = -(-count * form.bits // 8)
        points = lazy(into, f"{zeros.name}_by_{size}", ir.DataType.UINT8, (form.rows, width), all_points)
    return [parts, spread, points]


def _shared(into: BlockTarget, array: npt.NDArray[Any], name: str) -> ir.Value:
    """One constant for all products of a graph."""
    key = f"onnxsmith_{name}"
    known = into.graph.initializers.get(key)
    return known if known is not None else constant(into, array, key)


def _minimums(offsets: ir.Value, scales: ir.Value) -> ir.Value | None:
    """The minimums in ``minimum + scale * middle``."""
    add = offsets.producer()
    if add is None or add.op_type != "Add":
        return None
    for minimums, other in (add.inputs, (add.inputs[1], add.inputs[0])):
        multiply = other.producer() if other is not None else None
        if minimums is None or multiply is None or multiply.op_type != "Mul":
            continue
        if scales in multiply.inputs:
            return minimums
    return None


def _central_codes(packed: Bytes, bits: int) -> Bytes:
    """The code nearest to the mean of each block, (N, blocks)."""
    found = np.empty(packed.shape[:2], np.uint8)
    # Some rows at a time: they stay in the processor's cache.
    step = max(1, _CHUNK_BYTES // packed[0].size)
    for begin in range(0, len(packed), step):
        codes = unpack_codes(packed[begin : begin + step], bits)
        found[begin : begin + step] = np.rint(codes.mean(axis=-1, dtype=np.float32))
    return found
