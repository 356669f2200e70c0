"""What passes could still do for a graph, found by running them on a copy of its structure."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnxsmith.errors import OnnxsmithError
from onnxsmith.graph_passes.registry import load_pass

__all__ = ["still_to_do"]

# In the order of the presets: each works on what the ones before it leave.
_FOR_ANY_TARGET = ("transpose_weights", "cleanup", "fuse_transformer", "flatten_attention")


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
        if changes.count or (changes.skipped and name != "fuse_transformer"):
            found[name] = {"changes": changes.count, **changes.details, "skipped": dict(changes.skipped)}
    return found
