"""Fusion: many nodes into the one that ONNX Runtime has a kernel for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.cleanup import operator_counts
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.structure import (
    only_small_constants,
    release_dead_users,
    require_signature,
    signature,
    splits_left_alone,
)
from onnxsmith.graph_passes.weights import join_concatenated_weights

__all__ = ["FuseTransformer"]

# onnxscript's limit for folding. Larger constants are weights, and no pattern needs to look into them.
_MAX_CONSTANT_ELEMENTS = 8192
_PATCH_LOCK = threading.Lock()
# The one operator of ONNX Runtime that is registered, by an old mistake, in ONNX's own domain.
_MISPLACED = frozenset({"SimplifiedLayerNormalization"})


@contextlib.contextmanager
def _wrong_fusions_off() -> Iterator[None]:
    """Turns off what onnxscript fuses into something else.

    The fusions into GroupQueryAttention drop the attention mask, on the assumption that it is all ones: a
    padded batch would silently compute something else. Where the mask allows it, the exporter writes
    GroupQueryAttention itself. Those into MultiHeadAttention take a rotation of a part of each head for one
    of the whole.
    """
    from onnxscript.rewriter.ort_fusions import _core

    with _PATCH_LOCK:
        kept = {name: getattr(_core, name) for name in ("fuse_gqa", "fuse_qkv_gqa", "fuse_mha1", "fuse_mha2")}
        try:
            for name, fuse in kept.items():
                setattr(_core, name, _fuse_nothing if "gqa" in name else _unless_partly_rotated(fuse))
            yield
        finally:
            for name, fuse in kept.items():
                setattr(_core, name, fuse)


def _fuse_nothing(model: ir.Model, *, debug: bool = False) -> int:
    del model, debug
    return 0


def _unless_partly_rotated(fuse: Callable[..., int]) -> Callable[..., int]:
    def guarded(model: ir.Model, *, debug: bool = False) -> int:
        for node in model.graph:
            size = node.attributes.get("rotary_embedding_dim")
            if node.op_type == "RotaryEmbedding" and size is not None and size.as_int():
                return 0
        return fuse(model, debug=debug)

    return guarded


class FuseTransformer(GraphPass):
    """Fuses normalisation, rotary embedding, attention and activation for ONNX Runtime.

    Wraps ``onnxscript.rewriter.ort_fusions``. The result uses operators of the ``com.microsoft`` domain,
    which only ONNX Runtime has. Where nothing was fused, the model stays as it is.
    """

    name: ClassVar[str] = "fuse_transformer"
    summary: ClassVar[str] = "fuse RMSNorm, LayerNorm, skip, rotary, attention and Gelu for ONNX Runtime"

    def apply(self, model: ir.Model) -> Changes:
        """Fuses, and counts what came of it."""
        from onnxscript.rewriter import ort_fusions

        before, interface = operator_counts(model), signature(model)
        with only_small_constants(model, max_elements=_MAX_CONSTANT_ELEMENTS):
            with _wrong_fusions_off(), splits_left_alone():
                _, counts = ort_fusions.optimize_for_ort(model)
            release_dead_users(model)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        joined = join_concatenated_weights(model, min_elements=_MAX_CONSTANT_ELEMENTS)
        require_signature(model, interface, self.name)
        after = operator_counts(model)
        skipped = {name: "the pattern is not in the graph" for name, count in counts.items() if not count}
        made = {
            op: count - before.get(op, 0)
            for op, count in after.items()
            if ("." in op or op in _MISPLACED) and count > before.get(op, 0)
        }
        if not made:
            # What else it does on the way, such as Gemm into MatMul and Add, is no gain of its own.
            return Changes(0, {"fused": {}}, skipped)
        changed = sum(abs(after.get(op, 0) - before.get(op, 0)) for op in before.keys() | after.keys())
        fired = {name: count for name, count in counts.items() if count}
        return Changes(
            changed,
            {
                "fused": fired,
                "made": made,
                **({"weights_joined": joined} if joined else {}),
                "nodes_before": sum(before.values()),
                "nodes_after": sum(after.values()),
            },
            skipped,
        )
