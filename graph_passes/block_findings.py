"""What is slow in graphs with weights in blocks: see ``findings``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxsmith.finding import Finding
from onnxsmith.graph_passes.block_operators import find_weights, node_label
from onnxsmith.graph_passes.block_repairs import slow_form
from onnxsmith.onnx_file import weight_bytes
from onnxsmith.own_operators import PACKED_OPERATORS, WEIGHT_INPUT, rounds_weights

if TYPE_CHECKING:
    from onnxsmith.graph_passes.findings import Target

__all__ = ["accuracy_level", "float_weights", "slow_blocks"]

_FEW = 5
# Float weights in a quantized model that are less than this of its bytes are left alone.
_SHARE = 0.05
# Smaller models are not held up by their weights.
_SMALLEST_BYTES = 20_000_000


def _block_matmuls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]


def _float_tiles(model: ir.Model) -> list[ir.Value]:
    """The float32 weights that the own kernels read."""
    packed = [node for node in model.graph.all_nodes() if node.op_type in PACKED_OPERATORS]
    tiles = [node.inputs[WEIGHT_INPUT[node.op_type]] for node in packed if not rounds_weights(node)]
    return [value for value in dict.fromkeys(tiles) if value is not None]


def _number(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def accuracy_level(model: ir.Model, target: Target) -> Iterator[Finding]:
    """MatMulNBits that computes in floats, where integers would be several times as fast."""
    if not target.is_cpu:
        return
    found = [
        node
        for node in _block_matmuls(model)
        if _number(node, "accuracy_level", 0) != 4
        and node.inputs[0] is not None
        and node.inputs[0].dtype in (ir.DataType.FLOAT, None)
    ]
    if not found:
        return
    eights = sum(_number(node, "bits", 4) == 8 for node in found)
    yield Finding(
        "accuracy_level",
        "slow",
        f"{len(found)} MatMulNBits without accuracy_level=4",
        "the kernels compute in float32 and not on 8 bit integers"
        + (f"; for the {eights} with 8 bits there is no fast kernel at all" if eights else ""),
        "set accuracy_level to 4; activations are then rounded to 8 bits in blocks",
        tuple(node_label(node) for node in found[:_FEW]),
        len(found),
        (("set_accuracy_level", {"level": 4}),),
        exact=False,
    )


def slow_blocks(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Block formats without a fast kernel in ONNX Runtime, though another form of the same has one."""
    if not target.is_cpu:
        return
    found = [(node, reason) for node in _block_matmuls(model) if (reason := slow_form(node))]
    if not found:
        return
    reasons = dict.fromkeys(reason for _, reason in found)
    yield Finding(
        "slow_blocks",
        "slow",
        f"{len(found)} MatMulNBits in a form without a fast kernel: {', '.join(reasons)}",
        "the weight is turned into floats in each call",
        "store the same numbers in another form, which has one",
        tuple(node_label(node) for node, _ in found[:_FEW]),
        len(found),
        (("repack_blocks", {}),),
    )


def float_weights(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Large float matrices: left over in a quantized model, or all of them in one that is not quantized.

    Those that are in tiles for the own kernels no pass can quantize.
    """
    weights, _ = find_weights(model, embeddings=True, skip_nodes=())
    floats = [w for w in weights if w.tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)]
    large = sorted(floats, key=lambda w: -w.tensor.nbytes)
    total, own = weight_bytes(model), sum(w.tensor.nbytes for w in large)
    tiles = _float_tiles(model)
    if tiles and total >= _SMALLEST_BYTES:
        stored = sum(value.const_value.nbytes for value in tiles if value.const_value is not None)
        yield Finding(
            "float_weights",
            "large",
            f"no product is quantized: {stored / 1e6:.0f} MB of floats in tiles",
            "decoding reads all of them for each token, and 8 bits are a quarter of that",
            "make the model anew with a preset of 8 bits, such as cpu-int8-kernels: no pass quantizes tiles",
            tuple(value.name or "?" for value in tiles[:_FEW]),
            len(tiles),
            optional=True,
        )
        return
    if not large or not total:
        return
    names = tuple(w.name for w in large[:_FEW])
    ours = {"bits": 8, "block_size": 32, "symmetric": True, "half_scales": True}
    if any(node.op_type in _QUANTIZED or rounds_weights(node) for node in model.graph.all_nodes()):
        if own < _SHARE * total:
            return
        head = (
            " (the embedding that is the output head too)"
            if large[0].gathers and large[0].activations
            else ""
        )
        yield Finding(
            "float_weights",
            "slow",
            f"{len(large)} of the matrices are still floats, {own / 1e6:.1f} of {total / 1e6:.1f} MB{head}",
            "a quantized model reads most of its bytes for what was left out",
            "quantize them to 8 bits, which hardly loses anything",
            names,
            len(large),
            (("quantize_weights", ours),),
            exact=False,
        )
    elif total >= _SMALLEST_BYTES:
        yield Finding(
            "float_weights",
            "large",
            f"no weight is quantized: {own / 1e6:.0f} MB of floats",
            "decoding reads all of them for each token, and 8 bits are a quarter of that",
            "quantize them to 8 bits, which hardly loses anything, or see docs/quantization.md",
            names,
            len(large),
            (("quantize_weights", ours),),
            exact=False,
            optional=True,
        )


_QUANTIZED = frozenset(
    {
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulNBits",
        "QLinearMatMul",
        "DequantizeLinear",
    }
)
