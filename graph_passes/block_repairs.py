"""The same weights in blocks, stored or computed in another way that is faster."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_operators import BlockWriter, node_label
from onnxsmith.graph_passes.blocks import pack_codes, unpack_codes
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["RepackBlocks", "SetAccuracyLevel", "slow_form"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class SetAccuracyLevel(GraphPass):
    """Sets what MatMulNBits may compute in."""

    name: ClassVar[str] = "set_accuracy_level"
    summary: ClassVar[str] = "let MatMulNBits compute on 8 bit integers (4) or in floats (0, 1)"

    def __init__(self, *, level: Literal[0, 1, 2, 3, 4] = 4) -> None:
        """Sets the level.

        Args:
            level: 0 is the type of the input, 1 float32, 2 float16, 3 bfloat16, 4 int8.

        Raises:
            BadInputError: Another number.
        """
        if level not in (0, 1, 2, 3, 4):
            raise BadInputError(f"pass {self.name}: level", got=repr(level), expected="0 to 4")
        self.level = level

    def apply(self, model: ir.Model) -> Changes:
        """Sets the attribute wherever it is another one."""
        changes = Changes()
        for node in model.graph.all_nodes():
            if node.op_type != "MatMulNBits" or node.domain != "com.microsoft":
                continue
            attribute = node.attributes.get("accuracy_level")
            if (attribute.as_int() if attribute is not None else 0) != self.level:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", self.level)
                changes.count += 1
        changes.details = {"set": changes.count}
        return changes


class RepackBlocks(GraphPass):
    """Stores blocks without a fast kernel in ONNX Runtime in a form that has one; nothing is rounded.

    Float zero points become symmetric codes beside a product of block sums, see ``block_operators``. Codes
    of 2 bits in blocks of 16 become codes of 4 bits.
    """

    name: ClassVar[str] = "repack_blocks"
    summary: ClassVar[str] = (
        "the same block weights in a form that has a fast kernel: float zero points, 2 bits"
    )

    def apply(self, model: ir.Model) -> Changes:
        """Replaces weights of MatMulNBits; new ones are made when they are written."""
        changes = Changes(details={"float_zero_points": 0, "widened": 0})
        writer = BlockWriter(model, accuracy_level=4)
        for node in list(model.graph):
            reason = slow_form(node)
            if not reason:
                continue
            problem = _refusal(node)
            if problem:
                changes.skipped[node_label(node)] = problem
            elif reason == _FLOAT_ZEROS:
                _split(writer, node)
                changes.details["float_zero_points"] += 1
                changes.count += 1
            else:
                _widen(writer, node)
                changes.details["widened"] += 1
                changes.count += 1
        if changes.count:
            common.RemoveUnusedNodesPass()(model)
        return changes


_FLOAT_ZEROS = "float zero points"
_SMALL_BLOCKS = "2 bits in blocks of 16"


def slow_form(node: ir.Node) -> str:
    """Why a node has no fast kernel on CPUs, or an empty string."""
    if node.op_type != "MatMulNBits" or node.domain != "com.microsoft":
        return ""
    zeros = node.inputs[3] if len(node.inputs) > 3 else None
    if zeros is not None and zeros.dtype in _FLOATS:
        return _FLOAT_ZEROS
    bits, size = node.attributes.get("bits"), node.attributes.get("block_size")
    if bits is not None and bits.as_int() == 2 and size is not None and size.as_int() == 16:
        return _SMALL_BLOCKS
    return ""


def _refusal(node: ir.Node) -> str:
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        return "it has g_idx, which permutes the blocks"
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        return "it has a bias"
    for value in node.inputs[1:4]:
        if value is not None and (constant_of(value) is None or not value.is_initializer()):
            return "its weight is not an initializer"
    if node.inputs[0] is None or node.inputs[0].dtype not in (ir.DataType.FLOAT, None):
        return "its input is not float32"
    return ""


def _split(writer: BlockWriter, node: ir.Node) -> None:
    """Float zero points: ``scale * (code - zero) = scale * (code - middle) + scale * (middle - zero)``."""
    scales, zeros = constant_of(node.inputs[2]), constant_of(node.inputs[3])
    assert scales is not None and zeros is not None
    size, columns = (node.attributes[name].as_int() for name in ("block_size", "K"))
    rows, blocks = node.attributes["N"].as_int(), -(-columns // size)
    middle = 1 << (node.attributes["bits"].as_int() - 1) if "bits" in node.attributes else 8

    def offsets() -> npt.NDArray[Any]:
        scale = scales.numpy().astype(np.float32).reshape(rows, blocks)
        zero = zeros.numpy().astype(np.float32).reshape(rows, blocks)
        return scale * (np.float32(middle) - zero)

    name = f"{node.inputs[2].name if node.inputs[2] is not None else 'block'}_offsets"
    node.resize_inputs(3)
    writer.add_offsets(node, writer.constant(name, offsets, (rows, blocks), ir.DataType.FLOAT))


def _widen(writer: BlockWriter, node: ir.Node) -> None:
    """2 bits become 4: codes and zero points are moved up together, so that the middle stays the middle."""
    for index in (1, 3):
        old = node.inputs[index] if len(node.inputs) > index else None
        tensor = constant_of(old)
        if old is None or tensor is None:
            continue
        shape = [int(size) for size in tensor.shape.numpy()]
        rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
        blocks = -(-columns // node.attributes["block_size"].as_int())
        if index == 1:
            shape[-1] *= 2
        else:
            shape = [rows, -(-blocks // 2)]

        def widened(
            tensor: ir.TensorProtocol = tensor, index: int = index, rows: int = rows, blocks: int = blocks
        ) -> npt.NDArray[np.uint8]:
            packed = tensor.numpy()
            if index == 1:
                return pack_codes(unpack_codes(packed, 2) + np.uint8(6), 4)
            codes = unpack_codes(packed.reshape(rows, -1), 2)[:, :blocks] + np.uint8(6)
            return pack_codes(np.pad(codes, ((0, 0), (0, blocks % 2))), 4)

        made = writer.constant(f"{old.name}_4_bits", widened, tuple(shape), ir.DataType.UINT8)
        node.replace_input_with(index, made)
    node.attributes["bits"] = ir.AttrInt64("bits", 4)
