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
    ("gemm_to_matmul", {}),
    ("fuse_norms", {}),
    ("fuse_gelu", {}),
    ("fuse_transformer", {}),
    ("fuse_attention", {}),
    ("fuse_silu", {}),
    ("fold_embedding_scale", {}),
    ("flatten_attention", {}),
)
# Before quantization, which wants biases beside the products, and takes them out of Sum and attention.
_APART: tuple[PassSpec, ...] = (*_FUSED, ("split_skip_layer_norm", {}), ("split_bias_gelu", {}))
_ON_CPU: tuple[PassSpec, ...] = (*_APART, ("mask_in_keys", {}))
_ON_GPU: tuple[PassSpec, ...] = (*_FUSED, ("lengths_in_attention", {}))
# What ONNX Runtime 1.32 can and older ones cannot load.
_NEWEST: tuple[PassSpec, ...] = (
    ("rotary_in_attention", {}),
    ("pack_projections", {}),
    ("logits_to_keep", {}),
)
# 5 bits a weight, scales and minimums counted: as small as integer zero points with float32 scales, with a
# fraction of their loss; 6 bits of the embedding and the head that is the same weight, where an error is one
# of the logits at once. See docs/quantization.md.
_INT4: PassSpec = (
    "quantize_weights",
    {"bits": 4, "block_size": 32, "minimums": True, "half_scales": True, "embedding_block_size": 16},
)
# With prompts on integers the finer head would cost a tenth of a token's time.
_INT4_FASTEST: PassSpec = (_INT4[0], {**_INT4[1], "embedding_block_size": 0})
# The same format, rounded by what the weights are multiplied with.
_INT4_CALIBRATED: PassSpec = (_INT4[0], {**_INT4[1], "method": "gptq"})
_INT8: PassSpec = (
    "quantize_weights",
    {"bits": 8, "block_size": 32, "symmetric": True, "half_scales": True},
)
# Longer blocks, for kernels that multiply them faster; the embedding is looked up and keeps its own.
_INT8_LONG: PassSpec = (_INT8[0], {**_INT8[1], "block_size": 128, "embedding_block_size": 32})
# The same, after columns of activations and weights have shared their spread.
_INT8_CALIBRATED: PassSpec = (_INT8[0], {**_INT8[1], "balance": True})
# Integer zero points have kernels everywhere; scales take the type of the activations, float16.
# 4 bits wherever they are cheap, 8 elsewhere: at most 1 % worse, measured on calibration data.
_MIXED: PassSpec = ("quantize_mixed", {"max_loss_pct": 1.0})
_GPU_INT4: PassSpec = ("quantize_weights", {"bits": 4, "block_size": 32, "accuracy_level": 0})
_WEB_INT4: PassSpec = ("quantize_weights", {"bits": 4, "block_size": 32, "symmetric": True})
# Less to read and fewer operators for each token; 8 bits for a rest of at most half a step.
_MINIMUMS: PassSpec = ("fold_minimums", {})
# Less of the loss of rounding activations, for zero points on disk and 2 % of a token's time.
_FINER: PassSpec = ("finer_activations", {})
# What makes most of that loss, in float; then smaller blocks bring little.
_FLOAT_COLUMNS: tuple[PassSpec, ...] = (("finer_activations", {"widest": 0.0}), ("float_columns", {}))
# A byte for each weight more on disk and in memory; prompts in little more than half the time.
_PROMPTS: PassSpec = ("fast_prompts", {})
_FINISH: tuple[PassSpec, ...] = (
    ("strip_metadata", {}),
    ("lower_opset", {}),
    ("lower_ir_version", {}),
)
# Query, key and value are joined behind quantization, where their formats agree: each keeps its own. The
# kernels' attention reads masks as they are.
_FOR_KERNELS: tuple[PassSpec, ...] = (*_APART, ("rotary_in_attention", {}), ("logits_to_keep", {}))
_BEHIND_PRODUCTS: tuple[PassSpec, ...] = (
    ("use_own_attention", {}),
    ("norms_in_products", {}),
    ("sums_in_products", {}),
    *_FINISH,
)
_KERNELS: tuple[PassSpec, ...] = (("use_packed_kernels", {}), *_BEHIND_PRODUCTS)

PRESETS: Mapping[str, tuple[PassSpec, ...]] = {
    "clean": (("transpose_weights", {}), ("cleanup", {}), *_FINISH),
    "cpu-fp32": (*_ON_CPU, *_FINISH),
    "cpu-int8": (*_ON_CPU, _INT8, *_FINISH),
    "cpu-int8-calibrated": (*_ON_CPU, _INT8_CALIBRATED, *_FINISH),
    "cpu-int4": (*_ON_CPU, _INT4, *_FINISH),
    "cpu-int4-calibrated": (*_ON_CPU, _INT4_CALIBRATED, *_FINISH),
    "cpu-int4-1pct": (*_ON_CPU, _MIXED, *_FINISH),
    "cpu-gguf": (*_ON_CPU, ("keep_gguf_blocks", {}), _FINER, *_FINISH),
    "cpu-gguf-calibrated": (*_ON_CPU, ("keep_gguf_blocks", {}), *_FLOAT_COLUMNS, *_FINISH),
    "cpu-int8-dynamic": (*_ON_CPU, ("quantize_dynamic", {}), *_FINISH),
    "cpu-int8-static": (*_ON_CPU, ("quantize_static", {}), *_FINISH),
    "gpu-fp16": (*_ON_GPU, ("to_float16", {}), *_FINISH),
    "gpu-int4": (*_ON_GPU, _GPU_INT4, ("to_float16", {}), *_FINISH),
    "web": (*_FUSED, _WEB_INT4, *_FINISH),
    "mobile": (*_ON_CPU, _INT8, *_FINISH),
    "cpu-fp32-newest": (*_ON_CPU, *_NEWEST, *_FINISH),
    "cpu-int8-newest": (*_ON_CPU, *_NEWEST, _INT8, *_FINISH),
    "cpu-int4-newest": (*_ON_CPU, *_NEWEST, _INT4, _MINIMUMS, *_FINISH),
    "cpu-gguf-newest": (*_ON_CPU, *_NEWEST, ("keep_gguf_blocks", {}), _MINIMUMS, _FINER, *_FINISH),
    "cpu-int4-fastest": (*_ON_CPU, *_NEWEST, _INT4_FASTEST, _PROMPTS, _MINIMUMS, *_FINISH),
    "cpu-gguf-fastest": (
        *_ON_CPU,
        *_NEWEST,
        ("keep_gguf_blocks", {}),
        _PROMPTS,
        _MINIMUMS,
        _FINER,
        *_FINISH,
    ),
    "cpu-gguf-kernels": (*_FOR_KERNELS, ("keep_gguf_blocks", {}), *_KERNELS),
    "cpu-int4-kernels": (*_FOR_KERNELS, _INT4, *_KERNELS),
    "cpu-int8-kernels": (*_FOR_KERNELS, _INT8, *_KERNELS),
    "cpu-int8-dynamic-kernels": (
        *_FOR_KERNELS,
        _INT8_LONG,
        ("use_packed_kernels", {"activation_block": 128}),
        *_BEHIND_PRODUCTS,
    ),
    "cpu-fp32-kernels": (*_FOR_KERNELS, ("use_float_kernels", {}), *_BEHIND_PRODUCTS),
}

PURPOSES: Mapping[str, str] = {
    "clean": "Nothing that changes a result by more than rounding; ONNX operators only, for any runtime.",
    "cpu-fp32": "The reference for everything else: fused for ONNX Runtime, full precision.",
    "cpu-int8": "8 bit weights, int8 arithmetic: the loss is hardly measurable, a quarter of the size.",
    "cpu-int8-calibrated": "As cpu-int8, activations and weights balanced: half the loss; needs calibration.",
    "cpu-int4": "4 bit weights, int8 arithmetic: smallest and fastest in decode; the loss must be measured.",
    "cpu-int4-calibrated": "As cpu-int4, by GPTQ: half the loss; needs calibration data.",
    "cpu-int4-1pct": "4 bits where they cost little, 8 elsewhere: at most 1 % worse; needs calibration data.",
    "cpu-gguf": "The blocks of a GGUF source as they are: nothing is rounded again. The rest gets 8 bits.",
    "cpu-gguf-calibrated": "As cpu-gguf, the largest columns in float: half the divergence; needs data.",
    "cpu-int8-dynamic": "For encoders: matrices on 8 bit integers, half the time; needs no data.",
    "cpu-int8-static": "For encoders: as dynamic, more exact and a little faster; needs calibration data.",
    "gpu-fp16": "Half the size, for GPUs; inputs and outputs stay float32. Checked on a CPU only.",
    "gpu-int4": "4 bit weights under float16 arithmetic, for GPUs. Checked on a CPU only.",
    "web": "4 bit weights without zero points, with operators of ONNX Runtime Web: size is loading time.",
    "mobile": "8 bit weights for phones' CPUs: small, and hardly any loss. Checked on x86 only.",
    "cpu-fp32-newest": "As cpu-fp32, and what makes decoders faster but needs ONNX Runtime 1.32.",
    "cpu-int8-newest": "As cpu-int8, and what makes decoders faster but needs ONNX Runtime 1.32.",
    "cpu-int4-newest": "As cpu-int4, and what makes decoders faster but needs ONNX Runtime 1.32.",
    "cpu-gguf-newest": "As cpu-gguf, minimums in 8 bits, and what is faster but needs ONNX Runtime 1.32.",
    "cpu-int4-fastest": "As cpu-int4-newest, with prompts on 8 bit integers: much faster, twice the size.",
    "cpu-gguf-fastest": "As cpu-gguf-newest, with prompts on 8 bit integers: much faster, twice the size.",
    "cpu-gguf-kernels": "As cpu-gguf, by kernels of our own that are compiled where it runs: fastest.",
    "cpu-int4-kernels": "As cpu-int4, by kernels of our own that are compiled where it runs: fastest.",
    "cpu-int8-kernels": "As cpu-int8, by kernels of our own that are compiled where it runs; encoders too.",
    "cpu-int8-dynamic-kernels": "For encoders: as cpu-int8-kernels, in longer blocks: the fastest.",
    "cpu-fp32-kernels": "As cpu-fp32, by kernels of our own that are compiled where it runs; encoders too.",
}

REASONS: Mapping[str, str] = {
    "transpose_weights": "first, or folding would compute turned copies of the weights in memory",
    "cleanup": "before fusion: patterns are written for graphs without no-ops and computed constants",
    "gemm_to_matmul": "before fusion and quantization, which look for MatMul and Add",
    "fuse_norms": "before fuse_transformer, which adds residual sums to norms",
    "fuse_gelu": "before fuse_transformer, which knows one order of its terms and adds biases to it",
    "fuse_transformer": "before quantization, which keeps MatMul and replaces its weight",
    "fuse_attention": "what fuse_transformer does not recognise: attention in graphs of other exporters",
    "fuse_silu": "after cleanup, which takes away what stands between Sigmoid and Mul",
    "fold_embedding_scale": "before quantization, so that the scaled table is what gets quantized",
    "flatten_attention": "after fusion has made RotaryEmbedding of the nodes between the axes' swaps",
    "lengths_in_attention": "after fusion: CUDA's attention takes lengths of rows and no bias",
    "split_skip_layer_norm": "after fusion, which made them: on CPUs two operators are faster",
    "split_bias_gelu": "after fusion, which made them: on CPUs two operators are faster",
    "mask_in_keys": "after fusion, before quantization: projections get a column for each head",
    "rotary_in_attention": "after flatten_attention, whose flat operands it needs",
    "logits_to_keep": "before quantization: a prompt's logits cost as much as a fifth of a small model",
    "pack_projections": "last before quantization, so that the packed matrix is what gets quantized",
    "quantize_weights": "when the matrices have their final form",
    "keep_gguf_blocks": "when the matrices have their final form",
    "quantize_mixed": "when the matrices have their final form",
    "fast_prompts": "after quantization, whose products it doubles",
    "fold_minimums": "after fast_prompts, which reads the minimums beside the products",
    "finer_activations": "after fold_minimums, which wants weights without zero points",
    "float_columns": "after finer_activations, which finds block sums alone beside the products",
    "use_packed_kernels": "after quantization, whose blocks it puts in the order that the kernels read",
    "use_float_kernels": "when the matrices have their final form, and biases stand beside them",
    "use_own_attention": "after the products, of which it joins those of query, key and value",
    "norms_in_products": "after the products, which take the norms that they alone read",
    "sums_in_products": "after norms_in_products, whose norms add residuals themselves",
    "quantize_dynamic": "when the matrices have their final form",
    "quantize_static": "when the matrices have their final form",
    "to_float16": "after quantization, so that scales follow the type of the activations",
    "strip_metadata": "near the end, because earlier passes leave metadata",
    "lower_opset": "after everything that may need a later operator",
    "lower_ir_version": "last: it follows from operator set and types",
}
