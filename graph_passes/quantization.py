"""Weight-only quantization to blocks of few bits, for ONNX Runtime's MatMulNBits and GatherBlockQuantized.

The formats are those of the operators' definitions
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NoReturn, get_args

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_operators import (
    BlockFormat,
    BlockWriter,
    SharedWeight,
    find_weights,
    node_label,
)
from onnxsmith.graph_passes.blocks import QuantizedBlocks, dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.weights import MatMulWeight

__all__ = ["QuantizeWeights", "QuantizedBlocks", "dequantize_blocks", "quantize_blocks"]

_DOMAIN = "com.microsoft"


class QuantizeWeights(GraphPass):
    """Replaces MatMul and Gather on constant weights by MatMulNBits and GatherBlockQuantized.

    A weight that is tied, such as an embedding that is also the output head, is quantized once and stored
    once. Weights are quantized when they are written, one at a time.
    """

    name: ClassVar[str] = "quantize_weights"
    summary: ClassVar[str] = "round weights to blocks of 2, 4 or 8 bits (MatMulNBits, GatherBlockQuantized)"

    def __init__(
        self,
        *,
        bits: Literal[2, 4, 8] = 4,
        block_size: Literal[16, 32, 64, 128, 256] = 32,
        symmetric: bool = False,
        minimums: bool = False,
        half_scales: bool = False,
        accuracy_level: Literal[0, 1, 2, 3, 4] = 4,
        search_steps: int = 9,
        embeddings: bool = True,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets the format.

        Args:
            bits: Bits of a weight.
            block_size: Weights that share a scale; half as many, and so on, where rows do not divide by it.
            symmetric: Without zero points.
            minimums: A float minimum to each block in place of an integer zero point: more exact, and as
                fast (a second, small product adds it). See docs/quantization.md.
            half_scales: Store scales and minimums in float16; they are cast where the model is loaded.
            accuracy_level: What MatMulNBits may compute in: 0 the input's type, 4 int8 (much faster on a
                CPU; activations are rounded to 8 bits in blocks).
            search_steps: Grids tried for each block; 0 is plain round to nearest.
            embeddings: Also quantize embeddings (Gather).
            skip_nodes: Patterns of node or weight names that keep their precision.

        Raises:
            BadInputError: A value that is not among those listed, ``search_steps`` below 0 or above 100, or
                both ``symmetric`` and ``minimums``.
        """
        known = self.parameters()
        given = {"bits": bits, "block_size": block_size, "accuracy_level": accuracy_level}
        for name, value in given.items():
            choices = get_args(known[name].annotation)
            if value not in choices:
                raise BadInputError(
                    f"pass {self.name}: {name}",
                    got=repr(value),
                    expected=f"one of {', '.join(map(str, choices))}",
                )
        if not 0 <= search_steps <= 100:
            raise BadInputError(
                "pass quantize_weights: search_steps", got=str(search_steps), expected="0 to 100"
            )
        if symmetric and minimums:
            raise BadInputError(
                "pass quantize_weights", got="symmetric and minimums", expected="one of them, or neither"
            )
        self.bits = bits
        self.block_size = block_size
        self.symmetric = symmetric
        self.minimums = minimums
        self.half_scales = half_scales
        self.accuracy_level = accuracy_level
        self.search_steps = search_steps
        self.embeddings = embeddings
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Replaces what can be replaced; the weights themselves are rounded when they are written.

        Raises:
            PreconditionError: There is nothing to quantize, or everything was skipped.
        """
        weights, skipped = find_weights(model, embeddings=self.embeddings, skip_nodes=self.skip_nodes)
        changes = Changes(skipped=skipped)
        fitting = []
        for weight in weights:
            form = self._format(weight)
            if isinstance(form, BlockFormat):
                fitting.append((weight, form))
                continue
            for user in weight.users:
                node = user.node if isinstance(user, MatMulWeight) else user
                changes.skipped[node_label(node)] = form
        if not fitting:
            self._refuse(changes.skipped)
        layers: dict[str, dict[str, Any]] = {}
        writer = BlockWriter(model, accuracy_level=self.accuracy_level)
        for weight, form in fitting:
            entry = layers[weight.name] = _entry(weight, form, "rtn")
            writer.replace(weight, form, _Rounding(weight, form, self.search_steps, entry).blocks)
            changes.count += len(weight.users)
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault(_DOMAIN, 1)
        users = [user for weight, _ in fitting for user in weight.users]
        changes.details = {
            "bits": self.bits,
            "matmuls": sum(isinstance(u, MatMulWeight) for u in users),
            "embeddings": sum(isinstance(u, ir.Node) for u in users),
            "tied": sum(len(weight.users) > 1 for weight, _ in fitting),
            "layers": layers,
        }
        return changes

    def _format(self, weight: SharedWeight) -> BlockFormat | str:
        """The format of a weight, or why there is none."""
        columns, size = weight.shape[1], int(self.block_size)
        while columns % size and size > 16:
            size //= 2
        if columns % size:
            return f"rows of {columns} are no multiple of block_size {self.block_size}"
        if self.bits == 2 and weight.gathers:
            return "GatherBlockQuantized has no kernel for 2 bits"
        half = self.half_scales and weight.tensor.dtype == ir.DataType.FLOAT
        return BlockFormat(self.bits, size, self.symmetric, self.minimums, half)

    def _refuse(self, skipped: dict[str, str]) -> NoReturn:
        if not skipped:
            raise PreconditionError(
                f"pass {self.name}",
                got="no MatMul or Gather with a constant float matrix",
                expected="at least one",
                remedy="The model may be quantized already, or compute with Gemm or Conv only",
            )
        shown = [f"{name}: {reason}" for name, reason in list(skipped.items())[:5]]
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise PreconditionError(
            f"pass {self.name}",
            got=f"nothing to quantize, because every candidate was skipped ({'; '.join(shown)}{more})",
            expected="at least one MatMul or Gather with a constant float matrix that fits",
            remedy="Change block_size or skip_nodes, or leave the pass out; the model is unchanged",
        )


class _Rounding:
    """Rounds one weight when it is written, and then fills in what that cost."""

    def __init__(self, weight: SharedWeight, form: BlockFormat, steps: int, entry: dict[str, Any]) -> None:
        self._weight, self._form, self._steps, self._entry = weight, form, steps, entry

    def blocks(self) -> QuantizedBlocks:
        form, rows = self._form, self._weight.rows()
        blocks = quantize_blocks(
            rows,
            bits=form.bits,
            block_size=form.block_size,
            symmetric=form.symmetric,
            minimums=form.minimums,
            search_steps=self._steps,
            scale_type=np.float16 if form.half_scales else self._weight.tensor.dtype.numpy(),
            name=self._weight.name,
        )
        self._entry["weight_error"] = relative_error(rows, blocks)
        return blocks


def relative_error(rows: Any, blocks: QuantizedBlocks) -> float:
    """The squared error of a weight, relative to its square; read some rows at a time."""
    error = square = 0.0
    step = max(1, (1 << 20) // max(1, rows.shape[1]))
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        difference = (dequantize_blocks(blocks.rows(begin, begin + step)) - part).ravel()
        error += float(np.dot(difference, difference))
        square += float(np.dot(part.ravel(), part.ravel()))
    return error / square if square else 0.0


def _entry(weight: SharedWeight, form: BlockFormat, method: str) -> dict[str, Any]:
    return {
        "shape": list(weight.shape),
        "method": method,
        "bits": form.bits,
        "block_size": form.block_size,
        "zero_points": "float minimum" if form.minimums else "none" if form.symmetric else "integer",
        # Filled in when the weight is written.
        "weight_error": None,
    }
