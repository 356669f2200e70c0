"""What CUDA has no kernel for among the operators of ONNX Runtime's own domain: see ``findings``.

The types are those of the generated list of kernels
(https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md, CUDAExecutionProvider), further
limits those that the kernels check when they run, as read in ONNX Runtime's sources in November 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxsmith.finding import Finding
from onnxsmith.graph_passes.attention_lengths import why_not_lengths
from onnxsmith.graph_passes.matching import axes_of, int_attribute, label
from onnxsmith.own_operators import OWN_DOMAIN

if TYPE_CHECKING:
    from onnxsmith.graph_passes.findings import Target

__all__ = ["cuda_kernels"]

_CUDA = "CUDAExecutionProvider"
_DOMAIN = "com.microsoft"
_FEW = 5
_BIAS = 10
_LARGEST_HEAD = 256
_HALF, _BRAIN, _FLOAT, _DOUBLE = (
    ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE,
)  # fmt: skip
_BOTH = frozenset({_HALF, _FLOAT})
_THREE = _BOTH | {_BRAIN}
_FOUR = _THREE | {_DOUBLE}
# Operator to the floating-point types of its kernels.
_TYPES: Mapping[str, frozenset[ir.DataType]] = {
    "Attention": _THREE,
    "BiasAdd": _BOTH,
    "BiasGelu": _FOUR,
    "BiasSoftmax": _BOTH | {_DOUBLE},
    "BiasSplitGelu": _BOTH,
    "DecoderMaskedMultiHeadAttention": _BOTH,
    "EmbedLayerNormalization": _BOTH,
    "FastGelu": _FOUR,
    "FusedConv": frozenset({_FLOAT}),
    "FusedMatMul": _FOUR,
    "GatedRelativePositionBias": _BOTH,
    "GatherBlockQuantized": _THREE,
    "Gelu": _FOUR,
    "GroupNorm": _BOTH,
    "GroupQueryAttention": frozenset({_HALF, _BRAIN}),
    "MatMulBnb4": _THREE,
    "MatMulNBits": _THREE,
    "MoE": _THREE,
    "MultiHeadAttention": _THREE,
    "NhwcConv": _BOTH,
    "PackedAttention": _BOTH,
    "PackedMultiHeadAttention": _BOTH,
    "QMoE": frozenset({_HALF, _BRAIN}),
    "QuickGelu": _FOUR,
    "RelativePositionBias": _BOTH,
    "RotaryEmbedding": _THREE,
    "SkipGroupNorm": _BOTH,
    "SkipLayerNormalization": _THREE,
    "SkipSimplifiedLayerNormalization": _THREE,
    "SparseAttention": frozenset({_HALF, _BRAIN}),
}


def cuda_kernels(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Nodes that CUDA's kernels refuse when they run, and those that fall back to the CPU without a word."""
    if target.provider != _CUDA:
        return
    nodes = [node for node in model.graph.all_nodes() if node.domain in (_DOMAIN, OWN_DOMAIN)]
    yield from _biased(model, [node for node in nodes if node.op_type == "GroupQueryAttention"])
    refused: dict[str, list[ir.Node]] = {}
    lacking: dict[str, list[ir.Node]] = {}
    for node in nodes:
        types = _TYPES.get(node.op_type)
        kind = _float_type(node)
        if types is None:
            lacking.setdefault(f"{node.op_type}", []).append(node)
        elif kind is not None and kind not in types:
            lacking.setdefault(f"{node.op_type} in {kind.name.lower()}", []).append(node)
        elif limit := _limit(node):
            refused.setdefault(limit, []).append(node)
    for limit, found in refused.items():
        yield _finding(
            "wrong", f"{found[0].op_type} with {limit}", found, "CUDA's kernel refuses it at the first call"
        )
    for what, found in lacking.items():
        passes: Any = ()
        if what == "GroupQueryAttention in float":
            # In this order: in float16 the kernel would be there, and refuse the bias.
            passes = (("lengths_in_attention", {}), ("to_float16", {}))
        yield _finding(
            "slow", what, found, "CUDA has no kernel for it: the CPU runs it, behind copies to and fro",
            remedy="convert to float16, as the presets for GPUs do" if passes else "use another operator",
            passes=passes,
        )  # fmt: skip


def _biased(model: ir.Model, attentions: list[ir.Node]) -> Iterator[Finding]:
    """GroupQueryAttention with an attention bias, which has no kernel, and what can be done for it."""
    found: dict[str, list[ir.Node]] = {}
    for node in attentions:
        bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
        # In other types the CPU runs it, which takes a bias.
        if bias is not None and _float_type(node) in _TYPES[node.op_type]:
            found.setdefault(why_not_lengths(model, bias), []).append(node)
    why = "CUDA's kernel refuses attention_bias at the first call"
    for reason, nodes in found.items():
        what = "GroupQueryAttention with an attention bias"
        if reason:
            remedy = "export it with --attention standard"
            yield _finding("wrong", f"{what}: {reason}", nodes, why, remedy=remedy)
        else:
            remedy = "tell padding by lengths of rows; rows may then be padded on the right only"
            yield _finding("wrong", what, nodes, why, remedy=remedy, passes=(("lengths_in_attention", {}),))


def _float_type(node: ir.Node) -> ir.DataType | None:
    """The type that a node computes in, where it is known."""
    for value in (*node.outputs[:1], *node.inputs):
        if value is not None and value.dtype is not None and value.dtype.is_floating_point():
            return value.dtype
    return None


def _limit(node: ir.Node) -> str:
    """What a kernel checks when it runs and a node does not keep, or nothing."""
    if node.op_type == "MatMulNBits" and int_attribute(node, "bits", 4) not in (4, 8):
        return f"{int_attribute(node, 'bits')} bits"
    if node.op_type == "GatherBlockQuantized":
        axis, axes = int_attribute(node, "quantize_axis", 1), axes_of(node.inputs[0])
        if axes is not None and axis % len(axes) != len(axes) - 1:
            return "blocks that are not on the last axis"
    if node.op_type == "GroupQueryAttention":
        axes = axes_of(node.inputs[3]) if len(node.inputs) > 3 else None
        size = axes[-1] if axes else None
        if isinstance(size, int) and size > _LARGEST_HEAD:
            return f"heads of size {size}, above {_LARGEST_HEAD}"
    return ""


def _finding(kind: Any, what: str, nodes: list[ir.Node], why: str, **more: Any) -> Finding:
    remedy = more.pop("remedy", "export it in another form")
    return Finding(
        "cuda_kernels", kind, f"{len(nodes)} nodes: {what}", why, remedy,
        tuple(label(node) for node in nodes[:_FEW]), len(nodes), **more,
    )  # fmt: skip
