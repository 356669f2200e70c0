"""Fusion: many nodes into the one that ONNX Runtime has a kernel for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.attention_guards import keep_cached_heads
from onnxsmith.graph_passes.cleanup import operator_counts
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.corrections import corrected_onnxscript
from onnxsmith.graph_passes.fusion_repairs import repair_fusions
from onnxsmith.graph_passes.near_misses import NearMisses
from onnxsmith.graph_passes.own_functions import own_functions_aside
from onnxsmith.graph_passes.structure import (
    only_small_constants,
    release_dead_users,
    require_signature,
    signature,
    without_passed_through,
)
from onnxsmith.graph_passes.weights import join_concatenated_weights

__all__ = ["DROPS_THE_MASK", "NOT_NEAR", "FuseTransformer"]

# onnxscript's limit for folding. Larger constants are weights, and no pattern needs to look into them.
_MAX_CONSTANT_ELEMENTS = 8192
# The one operator of ONNX Runtime that is registered, by an old mistake, in ONNX's own domain.
_MISPLACED = frozenset({"SimplifiedLayerNormalization"})
# Said of a fusion for which there is nothing to do.
NOT_NEAR = "nothing in the graph is near its pattern"
DROPS_THE_MASK = (
    "it would drop the attention mask; where the mask allows it, the exporter writes the operator"
)
_LEFT_OUT: Mapping[str, str] = {"gqa": DROPS_THE_MASK, "packed_qkv_for_gqa": DROPS_THE_MASK}
# Their mean, deviation and sum are optional outputs. ONNX Runtime allocates each that has a name: for a
# decoder's single token that is a quarter of such an operator's time.
_SKIP_NORMS = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})


class FuseTransformer(GraphPass):
    """Fuses normalisation, rotary embedding, attention and activation for ONNX Runtime.

    Wraps ``onnxscript.rewriter.ort_fusions``. The result uses operators of the ``com.microsoft`` domain,
    which only ONNX Runtime has. Where nothing was fused, the model stays as it is.
    """

    name: ClassVar[str] = "fuse_transformer"
    summary: ClassVar[str] = "fuse RMSNorm, LayerNorm, skip, rotary, attention and Gelu for ONNX Runtime"
    layerwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Fuses, and counts what came of it."""
        from onnxscript.rewriter import ort_fusions

        before, interface = operator_counts(model), signature(model)
        near = NearMisses()
        with (
            own_functions_aside(model),
            without_passed_through(model.graph),
            only_small_constants(model, max_elements=_MAX_CONSTANT_ELEMENTS),
        ):
            with corrected_onnxscript(model, near), near.collected():
                _, counts = ort_fusions.optimize_for_ort(model)
            release_dead_users(model)
        heads = keep_cached_heads(model)
        repair_fusions(model)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        _leave_out_unused(model)
        joined = join_concatenated_weights(model, min_elements=_MAX_CONSTANT_ELEMENTS)
        require_signature(model, interface, self.name)
        after = operator_counts(model)
        missed = near.reasons()
        nearly = {name.partition(" ")[0] for name in missed}
        skipped = {
            name: _LEFT_OUT.get(name, NOT_NEAR)
            for name, count in counts.items()
            if not count and name not in nearly
        } | missed
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
                **({"caches_read_as_heads": heads} if heads else {}),
                "nodes_before": sum(before.values()),
                "nodes_after": sum(after.values()),
            },
            skipped,
        )


def _leave_out_unused(model: ir.Model) -> None:
    """Takes the names from optional outputs that nothing reads, and the last of them away."""
    for node in model.graph.all_nodes():
        if node.domain != "com.microsoft" or node.op_type not in _SKIP_NORMS:
            continue
        for value in node.outputs[1:]:
            if not value.uses() and not value.is_graph_output():
                value.name = ""
        named = [number for number, value in enumerate(node.outputs) if value.name]
        node.resize_outputs(named[-1] + 1)
