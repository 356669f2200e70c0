"""Ready-made lists of passes for a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS", "PassSpec"]

PassSpec = tuple[str, Mapping[str, Any]]
"""The name of a pass and its parameters."""

# What every target starts with.
_FUSED: tuple[PassSpec, ...] = (
    # First, so that folding does not compute transposed copies of the weights in memory.
    ("transpose_weights", {}),
    # Before fusion: the patterns are written for graphs without no-ops and computed constants.
    ("cleanup", {}),
    ("fuse_transformer", {}),
)
_FINISH: tuple[PassSpec, ...] = (
    # Last, because earlier passes add metadata and may need a higher version.
    ("strip_metadata", {}),
    ("lower_ir_version", {}),
)

PRESETS: Mapping[str, tuple[PassSpec, ...]] = {
    # Nothing that changes a result by more than rounding; ONNX operators only.
    "clean": (("transpose_weights", {}), ("cleanup", {}), *_FINISH),
    # The reference for everything else: fused, full precision.
    "cpu-fp32": (*_FUSED, *_FINISH),
    # 8 bit weights, int8 arithmetic: the loss is hardly measurable, a quarter of the size.
    "cpu-int8": (*_FUSED, ("quantize_weights", {"bits": 8, "block_size": 32}), *_FINISH),
    # 4 bit weights, int8 arithmetic: smallest and fastest in decode, with a loss that must be measured.
    "cpu-int4": (*_FUSED, ("quantize_weights", {"bits": 4, "block_size": 32}), *_FINISH),
    # The blocks of a GGUF source as they are: nothing is rounded again. What the file has in no block that
    # an operator knows gets 8 bits.
    "cpu-gguf": (*_FUSED, ("keep_gguf_blocks", {}), *_FINISH),
}
