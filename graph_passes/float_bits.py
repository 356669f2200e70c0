"""Weights in small floating-point formats, where ONNX Runtime has operators for them: fp4 and nf4, and fp8.

4 bits are MatMulBnb4, with the code books of bitsandbytes (Dettmers et al., 2023,
https://arxiv.org/abs/2305.14314); 8 bits are ONNX's float8e4m3fn behind DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_operators import SharedWeight, find_weights, node_label
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.weights import MatMulWeight, lazy_initializer
from onnxsmith.onnx_file import drop_pages

__all__ = ["CODE_BOOKS", "QuantizeFloats", "code_book_blocks", "code_book_values"]

Floats = npt.NDArray[np.float32]

_DOMAIN = "com.microsoft"
_FP8 = ir.DataType.FLOAT8E4M3FN
_FP8_LARGEST = np.float32(448)
_FP8_OPSET = 19
_POSITIVE = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
# (quant_type of MatMulBnb4, what each code stands for).
CODE_BOOKS: Mapping[str, tuple[int, tuple[float, ...]]] = {
    "fp4": (0, (*_POSITIVE, *(-value for value in _POSITIVE))),
    "nf4": (
        1,
        (
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
            0.7229568362236023, 1.0,
        ),
    ),
}  # fmt: skip


class QuantizeFloats(GraphPass):
    """Stores weights of MatMul in fp4, nf4 or fp8.

    On the CPU these are formats for size: ONNX Runtime turns the weight into floats in each call. Rounding to
    integers (``quantize_weights``) has fast kernels there and loses less in the same bits.
    """

    name: ClassVar[str] = "quantize_floats"
    summary: ClassVar[str] = "weights in fp4 or nf4 (MatMulBnb4) or fp8: small, without fast kernels on CPUs"

    def __init__(
        self,
        *,
        format: Literal["fp4", "nf4", "fp8"] = "nf4",
        block_size: Literal[16, 32, 64, 128, 256] = 64,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets the format.

        Args:
            format: fp4 and nf4 have a scale for each block; fp8 (e4m3) one for each output channel.
            block_size: Weights that share a scale.
            skip_nodes: Patterns of node or weight names that keep their precision.

        Raises:
            BadInputError: Another format.
        """
        if format not in ("fp4", "nf4", "fp8"):
            raise BadInputError(f"pass {self.name}: format", got=repr(format), expected="fp4, nf4 or fp8")
        self.format = format
        self.block_size = block_size
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Replaces MatMuls; weights are rounded when they are written.

        Raises:
            PreconditionError: There is nothing to quantize.
        """
        weights, skipped = find_weights(model, embeddings=True, skip_nodes=self.skip_nodes)
        changes = Changes(skipped=skipped)
        layers: dict[str, dict[str, Any]] = {}
        opset = max(model.opset_imports.get(domain, 0) for domain in ("", "ai.onnx"))
        for weight in weights:
            reason = self._refusal(weight, opset)
            if reason:
                for user in weight.users:
                    changes.skipped[node_label(user.node if isinstance(user, MatMulWeight) else user)] = (
                        reason
                    )
                continue
            entry = {
                "shape": list(weight.shape),
                "method": self.format,
                "bits": 8 if self.format == "fp8" else 4,
            }
            layers[weight.name] = entry | {"weight_error": None}
            replace = _to_fp8 if self.format == "fp8" else self._to_bnb4
            replace(model, weight, layers[weight.name])
            changes.count += len(weight.users)
        if not layers:
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(changes.skipped.items())[:4])
            raise PreconditionError(
                f"pass {self.name}",
                got=f"nothing to quantize ({shown or 'no MatMul with a constant float matrix'})",
                expected="at least one MatMul with a constant float32 matrix",
            )
        common.RemoveUnusedNodesPass()(model)
        changes.details = {"format": self.format, "weights": len(layers), "layers": layers}
        return changes

    def _refusal(self, weight: SharedWeight, opset: int) -> str:
        if weight.tensor.dtype != ir.DataType.FLOAT:
            return f"the weight is {weight.tensor.dtype.name}; expected FLOAT"
        if weight.gathers:
            return f"it is an embedding: no operator looks up rows in {self.format} of a shared matrix"
        if self.format == "fp8":
            return "" if opset >= _FP8_OPSET else f"DequantizeLinear takes fp8 from opset {_FP8_OPSET} on"
        return "" if weight.shape[1] % 16 == 0 else f"rows of {weight.shape[1]} are no multiple of 16"

    def _to_bnb4(self, model: ir.Model, weight: SharedWeight, entry: dict[str, Any]) -> None:
        rows, columns = weight.shape
        size = int(self.block_size)
        while columns % size:
            size //= 2
        entry["block_size"] = size
        book = self.format
        made: list[tuple[npt.NDArray[np.uint8], Floats]] = []

        def rounded() -> tuple[npt.NDArray[np.uint8], Floats]:
            # Two tensors hold it; made once for both.
            if made:
                return made.pop()
            matrix = weight.rows()
            found = code_book_blocks(matrix, book, size)
            error = np.square(code_book_values(*found, book, size).reshape(matrix.shape) - matrix).sum()
            entry["weight_error"] = float(error / max(float(np.square(matrix).sum()), 1e-30))
            drop_pages(weight.tensor)
            made.append(found)
            return found

        name = weight.name
        codes = lazy_initializer(
            model.graph, f"{name}_{book}", ir.DataType.UINT8, (rows * columns // 2,), lambda: rounded()[0]
        )
        scales = lazy_initializer(
            model.graph, f"{name}_absmax", ir.DataType.FLOAT, (rows * columns // size,), lambda: rounded()[1]
        )
        for user in weight.users:
            assert isinstance(user, MatMulWeight)
            attributes = {"K": columns, "N": rows, "block_size": size, "quant_type": CODE_BOOKS[book][0]}
            node = ir.node(
                "MatMulBnb4", [user.node.inputs[0], codes, scales], attributes, domain=_DOMAIN,
                name=f"{user.node.name or user.node.outputs[0].name}_{book}",
            )  # fmt: skip
            _put(model, user.node, node)
        model.opset_imports.setdefault(_DOMAIN, 1)


def _to_fp8(model: ir.Model, weight: SharedWeight, entry: dict[str, Any]) -> None:
    rows, columns = weight.shape
    name = weight.name

    def steps() -> Floats:
        largest: Floats = np.abs(weight.rows()).max(1) / _FP8_LARGEST
        return np.maximum(largest, np.float32(1e-30))

    def codes() -> npt.NDArray[Any]:
        matrix, scale = weight.rows(), steps()
        made = (matrix / scale[:, None]).astype(ml_dtypes.float8_e4m3fn)
        error = np.square(made.astype(np.float32) * scale[:, None] - matrix).sum()
        entry["weight_error"] = float(error / max(float(np.square(matrix).sum()), 1e-30))
        drop_pages(weight.tensor)
        return np.ascontiguousarray(made.T)

    stored = lazy_initializer(model.graph, f"{name}_fp8", _FP8, (columns, rows), codes)
    scales = lazy_initializer(model.graph, f"{name}_fp8_scale", ir.DataType.FLOAT, (rows,), steps)
    for user in weight.users:
        assert isinstance(user, MatMulWeight)
        node = user.node
        label = f"{node.name or node.outputs[0].name}_fp8"
        wide = ir.node("DequantizeLinear", [stored, scales], {"axis": 1}, name=f"{label}_weight")
        wide.outputs[0].name = f"{label}_weight"
        wide.outputs[0].type, wide.outputs[0].shape = (
            ir.TensorType(ir.DataType.FLOAT),
            ir.Shape([columns, rows]),
        )
        model.graph.insert_before(node, wide)
        _put(model, node, ir.node("MatMul", [node.inputs[0], wide.outputs[0]], name=label))


def code_book_blocks(matrix: Floats, book: str, block_size: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Packed codes, the first one high, and the largest magnitude of each block of the flattened matrix."""
    values = np.array(CODE_BOOKS[book][1], np.float32)
    order = np.argsort(values, kind="stable")
    edges = (values[order][1:] + values[order][:-1]) / 2
    blocks = matrix.reshape(-1, block_size)
    largest = np.abs(blocks).max(1)
    codes = np.empty(blocks.shape, np.uint8)
    step = max(1, (1 << 18) // block_size)
    for begin in range(0, len(blocks), step):
        part = slice(begin, begin + step)
        scaled = blocks[part] / np.where(largest[part] == 0, np.float32(1), largest[part])[:, None]
        codes[part] = order[np.searchsorted(edges, scaled)]
    flat = codes.reshape(-1)
    return (flat[0::2] << np.uint8(4)) | flat[1::2], largest


def code_book_values(codes: npt.NDArray[np.uint8], largest: Floats, book: str, block_size: int) -> Floats:
    """What packed codes stand for, flattened."""
    values = np.array(CODE_BOOKS[book][1], np.float32)
    flat = np.empty(2 * len(codes), np.float32)
    flat[0::2], flat[1::2] = values[codes >> 4], values[codes & 15]
    return (flat.reshape(-1, block_size) * largest[:, None]).reshape(-1)


def _put(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Puts a node in the place of another."""
    before, after = old.outputs[0], new.outputs[0]
    model.graph.insert_before(old, new)
    name = before.name
    before.replace_all_uses_with(after, replace_graph_outputs=before.is_graph_output())
    model.graph.remove(old, safe=True)
    after.name, after.shape, after.type = name, before.shape, before.type
