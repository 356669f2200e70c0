"""What passes could still do for a graph, found by running them on a copy of its structure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxsmith.errors import OnnxsmithError
from onnxsmith.finding import Finding
from onnxsmith.graph_passes.fusion import DROPS_THE_MASK, NOT_NEAR
from onnxsmith.graph_passes.registry import load_pass

if TYPE_CHECKING:
    from onnxsmith.graph_passes.findings import Target

__all__ = ["still_to_do", "unfused"]

# In the order of the presets: each works on what the ones before it leave.
_FOR_ANY_TARGET = (
    "transpose_weights", "cleanup", "gemm_to_matmul", "fuse_norms", "fuse_gelu", "fuse_transformer",
    "fuse_attention", "fuse_silu", "fold_embedding_scale", "flatten_attention",
)  # fmt: skip
_FOR_DOCTOR = (
    "transpose_weights", "cleanup", "gemm_to_matmul", "fuse_norms", "fuse_gelu", "fuse_transformer",
    "fuse_attention", "flatten_attention",
)  # fmt: skip
_FOR_DOCTOR_ON_CPU = ("split_skip_layer_norm", "mask_in_keys", "split_bias_gelu")
_NO_POTENTIAL = (NOT_NEAR, DROPS_THE_MASK)


def still_to_do(model: ir.Model, *, passes: tuple[str, ...] = _FOR_ANY_TARGET) -> dict[str, dict[str, Any]]:
    """Runs passes on a copy and says what each changed. Weights are shared and not read.

    Args:
        model: It stays as it is.
        passes: Which.

    Returns:
        Pass to its number of changes, its details and what it left out and why; to the error where it
        failed. Passes that changed nothing and left nothing out are not listed.
    """
    trial = model.clone()
    found: dict[str, dict[str, Any]] = {}
    for name in passes:
        try:
            outcome = load_pass(name).create({})(trial)
        except OnnxsmithError as error:
            found[name] = {"error": str(error)}
            continue
        changes = outcome.changes
        skipped = {
            what: why for what, why in changes.skipped.items() if why not in (NOT_NEAR, DROPS_THE_MASK)
        }
        if changes.count or skipped:
            found[name] = {"changes": changes.count, **changes.details, "skipped": skipped}
    return found


def unfused(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Patterns that a fused operator computes faster, and nodes that compute nothing."""
    passes = (*_FOR_DOCTOR, *_FOR_DOCTOR_ON_CPU) if target.is_cpu else _FOR_DOCTOR
    found = {name: part for name, part in still_to_do(model, passes=passes).items() if part.get("changes")}
    if not found:
        return
    before = sum(1 for _ in model.graph.all_nodes())
    yield Finding(
        "unfused",
        "slow",
        "; ".join(f"{name}: {part['changes']} changes" for name, part in found.items()),
        f"each of {before} nodes costs a call, and a pass through memory where a fused one needs none",
        f"run {', '.join(found)}",
        (),
        sum(part["changes"] for part in found.values()),
        tuple((name, {}) for name in found),
    )
