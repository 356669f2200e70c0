"""The passes by name: this package's own, and those that other packages add by entry point."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from onnxsmith.errors import BadInputError, UnknownNameError

if TYPE_CHECKING:
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.graph_passes.presets import PassSpec

__all__ = ["ENTRY_POINT_GROUP", "PASSES", "load_pass", "make_passes", "pass_names"]

ENTRY_POINT_GROUP = "onnxsmith.passes"

# Name -> module:class. Strings, so that listing the names imports nothing heavy.
PASSES: Mapping[str, str] = MappingProxyType(
    {
        "cleanup": "onnxsmith.graph_passes.cleanup:Cleanup",
        "convert_opset": "onnxsmith.graph_passes.versions:ConvertOpset",
        "fast_prompts": "onnxsmith.graph_passes.prompts:FastPrompts",
        "finer_activations": "onnxsmith.graph_passes.finer_activations:FinerActivations",
        "flatten_attention": "onnxsmith.graph_passes.attention:FlattenAttention",
        "float_columns": "onnxsmith.graph_passes.float_columns:FloatColumns",
        "fold_embedding_scale": "onnxsmith.graph_passes.embeddings:FoldEmbeddingScale",
        "fold_minimums": "onnxsmith.graph_passes.minimums:FoldMinimums",
        "fuse_attention": "onnxsmith.graph_passes.plain_attention:FuseAttention",
        "fuse_gelu": "onnxsmith.graph_passes.gelu:FuseGelu",
        "fuse_norms": "onnxsmith.graph_passes.written_norms:FuseNorms",
        "fuse_silu": "onnxsmith.graph_passes.activations:FuseSilu",
        "fuse_transformer": "onnxsmith.graph_passes.fusion:FuseTransformer",
        "gemm_to_matmul": "onnxsmith.graph_passes.gemm:GemmToMatMul",
        "infer_shapes": "onnxsmith.graph_passes.shapes:InferShapes",
        "keep_gguf_blocks": "onnxsmith.graph_passes.transcoding:KeepGgufBlocks",
        "lengths_in_attention": "onnxsmith.graph_passes.attention_lengths:LengthsInAttention",
        "logits_to_keep": "onnxsmith.graph_passes.signature:LogitsToKeep",
        "lower_ir_version": "onnxsmith.graph_passes.versions:LowerIrVersion",
        "lower_opset": "onnxsmith.graph_passes.versions:LowerOpset",
        "mask_in_keys": "onnxsmith.graph_passes.key_masks:MaskInKeys",
        "mixed_precision": "onnxsmith.graph_passes.mixed_precision:MixedPrecision",
        "norms_in_products": "onnxsmith.graph_passes.own_norms:NormsInProducts",
        "pack_projections": "onnxsmith.graph_passes.projections:PackProjections",
        "prune_vocabulary": "onnxsmith.graph_passes.vocabulary:PruneVocabulary",
        "prune_weights": "onnxsmith.graph_passes.sparsity:PruneWeights",
        "quantize_cache": "onnxsmith.graph_passes.cache_bits:QuantizeCache",
        "prune_channels": "onnxsmith.graph_passes.structured_pruning:PruneChannels",
        "prune_heads": "onnxsmith.graph_passes.structured_pruning:PruneHeads",
        "prune_layers": "onnxsmith.graph_passes.layer_removal:PruneLayers",
        "prune_neurons": "onnxsmith.graph_passes.structured_pruning:PruneNeurons",
        "quantize_dynamic": "onnxsmith.graph_passes.dynamic:QuantizeDynamic",
        "quantize_floats": "onnxsmith.graph_passes.float_bits:QuantizeFloats",
        "quantize_mixed": "onnxsmith.graph_passes.mixed:QuantizeMixed",
        "quantize_static": "onnxsmith.graph_passes.static:QuantizeStatic",
        "quantize_weights": "onnxsmith.graph_passes.quantization:QuantizeWeights",
        "remove_casts": "onnxsmith.graph_passes.type_repairs:RemoveCasts",
        "remove_unfused_qdq": "onnxsmith.graph_passes.integer_repairs:RemoveUnfusedQdq",
        "remove_unused_inputs": "onnxsmith.graph_passes.signature:RemoveUnusedInputs",
        "repack_blocks": "onnxsmith.graph_passes.block_repairs:RepackBlocks",
        "rotary_in_attention": "onnxsmith.graph_passes.attention:RotaryInAttention",
        "select_outputs": "onnxsmith.graph_passes.signature:SelectOutputs",
        "set_accuracy_level": "onnxsmith.graph_passes.block_repairs:SetAccuracyLevel",
        "set_axes": "onnxsmith.graph_passes.signature:SetAxes",
        "split_bias_gelu": "onnxsmith.graph_passes.gelu:SplitBiasGelu",
        "split_skip_layer_norm": "onnxsmith.graph_passes.norms:SplitSkipLayerNorm",
        "strip_metadata": "onnxsmith.graph_passes.cleanup:StripMetadata",
        "sums_in_products": "onnxsmith.graph_passes.own_sums:SumsInProducts",
        "to_bfloat16": "onnxsmith.graph_passes.precision:ToBfloat16",
        "to_float16": "onnxsmith.graph_passes.precision:ToFloat16",
        "to_float32": "onnxsmith.graph_passes.type_repairs:ToFloat32",
        "use_own_attention": "onnxsmith.graph_passes.own_attention:UseOwnAttention",
        "transpose_weights": "onnxsmith.graph_passes.weights:TransposeWeights",
        "use_float_kernels": "onnxsmith.graph_passes.float_kernels:UseFloatKernels",
        "use_packed_kernels": "onnxsmith.graph_passes.packed_kernels:UsePackedKernels",
    }
)


def _third_party() -> dict[str, importlib.metadata.EntryPoint]:
    # A foreign package must not silently replace one of ours.
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points if point.name not in PASSES}


def pass_names() -> list[str]:
    """The names of all passes that are installed, sorted."""
    return sorted({*PASSES, *_third_party()})


def load_pass(name: str) -> type[GraphPass]:
    """The class of a pass.

    Raises:
        UnknownNameError: No such pass; the message names the nearest and all known ones.
        BadInputError: An entry point of another package that is not a pass.
    """
    from onnxsmith.graph_passes.contract import GraphPass

    if name in PASSES:
        module, _, attribute = PASSES[name].partition(":")
        ours: type[GraphPass] = getattr(importlib.import_module(module), attribute)
        return ours
    points = _third_party()
    if name not in points:
        raise UnknownNameError("passes", name=name, known=pass_names(), kind="pass")
    point = points[name]
    where, expected = f"pass {name}", f"a GraphPass class with the name {name!r}"
    package = repr(point.dist.name) if point.dist is not None else "that brings it"
    remedy = f"Update or remove the package {package}"
    try:
        loaded = point.load()
    except Exception as error:
        # Whatever foreign code raises on import.
        got = f"its entry point {point.value} fails: {type(error).__name__}: {error}"
        raise BadInputError(where, got=got, expected=expected, remedy=remedy) from error
    if not (isinstance(loaded, type) and issubclass(loaded, GraphPass)):
        raise BadInputError(where, got=f"{point.value} is {loaded!r}", expected=expected, remedy=remedy)
    if getattr(loaded, "name", None) != name:
        got = f"{point.value} has the name {getattr(loaded, 'name', None)!r}"
        raise BadInputError(where, got=got, expected=expected, remedy=remedy)
    return loaded


def make_passes(specs: Iterable[PassSpec]) -> list[GraphPass]:
    """Makes passes from names and parameters, and so checks all of them before any of them runs.

    Raises:
        UnknownNameError: An unknown pass or parameter.
        BadInputError: A parameter of the wrong type or outside its range.
    """
    return [load_pass(name).create(arguments) for name, arguments in specs]
