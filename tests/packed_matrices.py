"""What the operators of onnxsmith's library should give, in numpy, and graphs that have them.

The layout and the arithmetic are those of docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsmith.own_operators import OWN_DOMAIN

Array = np.ndarray[Any, np.dtype[Any]]
TILE = 16
OFFSETS = ("middle", "zero_points", "minimums")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight of N rows and K columns in blocks: codes [N, K], scales and offsets [N, K / block_size]."""

    codes: Array
    scales: Array
    offsets: Array | None
    bits: int
    block_size: int
    activation_block: int = 32

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def unit(self) -> int:
        """Columns that share a scale, of the weight and of the activations."""
        return min(self.block_size, self.activation_block)

    def inputs(self) -> dict[str, Array]:
        """As the operators take them, by name."""
        found = {"B": pack_codes(self.codes, self.bits), "scales": pack_blocks(self.scales)}
        if self.offsets is not None:
            found["offsets"] = pack_blocks(self.offsets)
        return found

    def weight(self) -> Array:
        """The numbers that it stands for, [N, K] in float64."""
        scales = np.repeat(self.scales.astype(np.float64), self.block_size, axis=1)
        codes = self.codes.astype(np.float64)
        if self.offsets is None:
            return scales * (codes - 2 ** (self.bits - 1))
        offsets = np.repeat(self.offsets.astype(np.float64), self.block_size, axis=1)
        return scales * (codes - offsets) if self.offsets.dtype == np.uint8 else scales * codes + offsets


def random_matrix(
    random: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    block_size: int = 32,
    offsets: str = "middle",
    scales: type[Any] = np.float16,
) -> Matrix:
    blocks = (rows, columns // block_size)
    codes = random.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    steps = random.uniform(0.002, 0.05, blocks).astype(scales)
    if offsets == "zero_points":
        return Matrix(codes, steps, random.integers(0, 2**bits, blocks, dtype=np.uint8), bits, block_size)
    if offsets == "minimums":
        lowest = (-steps.astype(np.float64) * random.uniform(0, 2**bits, blocks)).astype(scales)
        return Matrix(codes, steps, lowest, bits, block_size)
    return Matrix(codes, steps, None, bits, block_size)


def _whole_tiles(array: Array) -> Array:
    missing = -array.shape[0] % TILE
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def pack_codes(codes: Array, bits: int) -> Array:
    """[N, K] to [N / 16, K / 4, 64] for 8 bits and [N / 16, K / 8, 64] for 4."""
    whole = _whole_tiles(codes)
    rows, columns = whole.shape
    if bits == 8:
        return whole.reshape(-1, TILE, columns // 4, 4).transpose(0, 2, 1, 3).reshape(rows // TILE, -1, 64)
    halves = whole.reshape(-1, TILE, columns // 8, 2, 4).transpose(3, 0, 2, 1, 4)
    low, high = halves.reshape(2, rows // TILE, -1, 64)
    return low | (high << 4)


def pack_blocks(values: Array) -> Array:
    """[N, blocks] to [N / 16, blocks, 16]."""
    whole = _whole_tiles(values)
    return np.ascontiguousarray(whole.reshape(-1, TILE, whole.shape[1]).transpose(0, 2, 1))


def rounded(activations: Array, unit: int = 32) -> Array:
    """Activations [..., K] as the kernel sees them: int8 in blocks with the scale max|a| / 127."""
    blocks = activations.astype(np.float32).reshape(-1, unit)
    top = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 1e-35)
    codes = np.rint(blocks * inverse).astype(np.float64)
    return (codes * (top / np.float32(127)).astype(np.float64)).reshape(activations.shape)


_ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def product(a: Array, matrix: Matrix, bias: Array | None = None, activation: str = "none") -> Array:
    """``MatMulPacked`` in float64, on activations that are rounded as the kernel rounds them."""
    y = rounded(a, matrix.unit) @ matrix.weight().T
    if bias is not None:
        y = y + bias.astype(np.float64)
    if activation == "none":
        return np.asarray(y)
    gate, up = np.split(y, 2, axis=-1)
    return np.asarray(ACTIVATIONS[activation](gate) * up)


def matmul_node(matrix: Matrix, *, bias: bool = False, activation: str = "none", **changed: Any) -> Any:
    inputs = ["A", "B", "scales", "offsets" if matrix.offsets is not None else ""]
    inputs = [*inputs, "bias"] if bias else inputs if matrix.offsets is not None else inputs[:3]
    attributes = _attributes(matrix) | ({} if activation == "none" else {"activation": activation})
    return helper.make_node(
        "MatMulPacked", inputs, ["Y"], "packed", domain=OWN_DOMAIN, **(attributes | changed)
    )


def norm_node(matrix: Matrix, *, skip: bool, epsilon: float = 1e-5) -> Any:
    inputs = ["A", "skip" if skip else "", "norm", "B", "scales"]
    inputs += ["offsets"] if matrix.offsets is not None else []
    attributes = _attributes(matrix) | {"epsilon": epsilon}
    return helper.make_node(
        "NormMatMulPacked", inputs, ["Y", "sum"], "packed", domain=OWN_DOMAIN, **attributes
    )


def gather_node(matrix: Matrix, **changed: Any) -> Any:
    inputs = ["ids", "B", "scales", *(["offsets"] if matrix.offsets is not None else [])]
    return helper.make_node(
        "GatherPacked", inputs, ["Y"], "rows", domain=OWN_DOMAIN, **(_attributes(matrix) | changed)
    )


def _attributes(matrix: Matrix) -> dict[str, Any]:
    rows, columns = matrix.shape
    found = {"K": columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block_size}
    return found if matrix.activation_block == 32 else found | {"activation_block": matrix.activation_block}


def model_of(
    node: Any, weights: dict[str, Array], shapes: dict[str, Any], *, width: int | None = None
) -> onnx.ModelProto:
    """A graph of one node whose weights are initializers.

    ``shapes`` are of its inputs: A in float32, ids in int64.
    """
    given = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    rank = len(next(iter(shapes.values()))) + ("ids" in shapes)
    axes = [f"axis_{n}" for n in range(rank - 1)]
    last = width if width is not None else "width"
    graph = helper.make_graph(
        [node],
        "packed",
        given,
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [*axes, last])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(OWN_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def matmul_model(
    matrix: Matrix, *, bias: Array | None = None, activation: str = "none", rank: int = 2
) -> onnx.ModelProto:
    node = matmul_node(matrix, bias=bias is not None, activation=activation)
    weights = matrix.inputs() | ({} if bias is None else {"bias": bias})
    axes = [*(f"batch_{n}" for n in range(rank - 1)), matrix.shape[1]]
    return model_of(node, weights, {"A": axes})


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path
