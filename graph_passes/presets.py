"""Ready-made lists of passes for a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS", "PURPOSES", "REASONS", "PassSpec"]

PassSpec = tuple[str, Mapping[str, Any]]
"""The name of a pass and its parameters."""

# What every target of ONNX Runtime starts with.
_FUSED: tuple[PassSpec, ...] = (
    ("transpose_weights", {}),
    ("cleanup", {}),
    ("fuse_transformer", {}),
    ("flatten_attention", {}),
)
_ON_CPU: tuple[PassSpec, ...] = (*_FUSED, ("split_skip_layer_norm", {}))
# What ONNX Runtime 1.32 can and older ones cannot load.
_NEWEST: tuple[PassSpec, ...] = (
    ("rotary_in_attention", {}),
    ("pack_projections", {}),
)
_FINISH: tuple[PassSpec, ...] = (
    ("strip_metadata", {}),
    ("lower_opset", {}),
    ("lower_ir_version", {}),
)

PRESETS: Mapping[str, tuple[PassSpec, ...]] = {
    "clean": (("transpose_weights", {}), ("cleanup", {}), *_FINISH),
    "cpu-fp32": (*_ON_CPU, *_FINISH),
    "cpu-int8": (*_ON_CPU, ("quantize_weights", {"bits": 8, "block_size": 32}), *_FINISH),
    "cpu-int4": (*_ON_CPU, ("quantize_weights", {"bits": 4, "block_size": 32}), *_FINISH),
    "cpu-gguf": (*_ON_CPU, ("keep_gguf_blocks", {}), *_FINISH),
    "cpu-fp32-newest": (*_ON_CPU, *_NEWEST, *_FINISH),
    "cpu-int8-newest": (*_ON_CPU, *_NEWEST, ("quantize_weights", {"bits": 8, "block_size": 32}), *_FINISH),
    "cpu-int4-newest": (*_ON_CPU, *_NEWEST, ("quantize_weights", {"bits": 4, "block_size": 32}), *_FINISH),
    "cpu-gguf-newest": (*_ON_CPU, *_NEWEST, ("keep_gguf_blocks", {}), *_FINISH),
}

PURPOSES: Mapping[str, str] = {
    "clean": "Nothing that changes a result by more than rounding; ONNX operators only, for any runtime.",
    "cpu-fp32": "The reference for everything else: fused for ONNX Runtime, full precision.",
    "cpu-int8": "8 bit weights, int8 arithmetic: the loss is hardly measurable, a quarter of the size.",
    "cpu-int4": "4 bit weights, int8 arithmetic: smallest and fastest in decode; the loss must be measured.",
    "cpu-gguf": "The blocks of a GGUF source as they are: nothing is rounded again. The rest gets 8 bits.",
    "cpu-fp32-newest": "As cpu-fp32, and what makes decoders faster but needs ONNX Runtime 1.32.",
    "cpu-int8-newest": "As cpu-int8, and what makes decoders faster but needs ONNX Runtime 1.32.",
    "cpu-int4-newest": "As cpu-int4, and what makes decoders faster but needs ONNX Runtime 1.32.",
    "cpu-gguf-newest": "As cpu-gguf, and what makes decoders faster but needs ONNX Runtime 1.32.",
}

REASONS: Mapping[str, str] = {
    "transpose_weights": "first, or folding would compute turned copies of the weights in memory",
    "cleanup": "before fusion: patterns are written for graphs without no-ops and computed constants",
    "fuse_transformer": "before quantization, which keeps MatMul and replaces its weight",
    "flatten_attention": "after fusion has made RotaryEmbedding of the nodes between the axes' swaps",
    "split_skip_layer_norm": "after fusion, which made them: on CPUs two operators are faster",
    "rotary_in_attention": "after flatten_attention, whose flat operands it needs",
    "pack_projections": "last before quantization, so that the packed matrix is what gets quantized",
    "quantize_weights": "when the matrices have their final form",
    "keep_gguf_blocks": "when the matrices have their final form",
    "strip_metadata": "near the end, because earlier passes leave metadata",
    "lower_opset": "after everything that may need a later operator",
    "lower_ir_version": "last: it follows from operator set and types",
}
