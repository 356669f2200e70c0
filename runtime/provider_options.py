"""The options of execution providers, so that a misspelt one is an error and not ignored.

From the provider pages of https://onnxruntime.ai/docs/execution-providers and the parsers in ONNX Runtime's
sources. A provider that is not listed here, as most plugins are, gets its options unseen.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxsmith.errors import BadInputError, UnknownNameError

__all__ = ["OPTIONS", "check_options"]

_TEXT = ""
_INTEGER = "an integer"
_FLAG = ("0", "1", "true", "false")

_CUDA: Mapping[str, str | tuple[str, ...]] = {
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv1d_pad_to_nc1d": _FLAG,
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "cudnn_conv_use_max_workspace": _FLAG,
    "device_id": _INTEGER,
    "do_copy_in_default_stream": _FLAG,
    "enable_cuda_graph": _FLAG,
    "enable_skip_layer_norm_strict_mode": _FLAG,
    "fuse_conv_bias": _FLAG,
    "gpu_mem_limit": _INTEGER,
    "prefer_nhwc": _FLAG,
    "sdpa_kernel": _INTEGER,
    "tunable_op_enable": _FLAG,
    "tunable_op_max_tuning_duration_ms": _INTEGER,
    "tunable_op_tuning_enable": _FLAG,
    "use_ep_level_unified_stream": _FLAG,
    "use_tf32": _FLAG,
}
_MIGRAPHX_FLAGS = ("fp16_enable", "bf16_enable", "fp8_enable", "int8_enable", "exhaustive_tune")
_TENSORRT_FLAGS = (
    "engine_cache_enable", "engine_hw_compatible", "fp16_enable", "bf16_enable", "int8_enable",
    "int8_use_native_calibration_table", "dla_enable", "dump_subgraphs", "force_sequential_engine_build",
    "context_memory_sharing_enable", "layer_norm_fp32_fallback", "timing_cache_enable", "force_timing_cache",
    "detailed_build_log", "build_heuristics_enable", "cuda_graph_enable", "sparsity_enable",
    "dump_ep_context_model", "weight_stripped_engine_enable",
)  # fmt: skip
_TENSORRT_INTEGERS = (
    "max_workspace_size", "dla_core", "max_partition_iterations", "min_subgraph_size",
    "builder_optimization_level", "auxiliary_streams", "ep_context_embed_mode",
)  # fmt: skip
_TENSORRT_TEXTS = (
    "engine_cache_path", "engine_cache_prefix", "int8_calibration_table_name", "op_types_to_exclude",
    "timing_cache_path", "tactic_sources", "extra_plugin_lib_paths", "profile_min_shapes",
    "profile_max_shapes", "profile_opt_shapes", "ep_context_file_path", "onnx_model_folder_path",
)  # fmt: skip

# Short name of the provider -> option -> what its value must be.
OPTIONS: Mapping[str, Mapping[str, str | tuple[str, ...]]] = {
    "cpu": {},
    "cuda": _CUDA,
    "tensorrt": {
        "device_id": _INTEGER,
        **{f"trt_{name}": _FLAG for name in _TENSORRT_FLAGS},
        **{f"trt_{name}": _INTEGER for name in _TENSORRT_INTEGERS},
        **{f"trt_{name}": _TEXT for name in _TENSORRT_TEXTS},
    },
    "rocm": {
        "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
        "device_id": _INTEGER,
        "do_copy_in_default_stream": _FLAG,
        "gpu_mem_limit": _INTEGER,
        "miopen_conv_exhaustive_search": _FLAG,
        "miopen_conv_use_max_workspace": _FLAG,
        "tunable_op_enable": _FLAG,
        "tunable_op_tuning_enable": _FLAG,
    },
    "migraphx": {
        "device_id": _INTEGER,
        "migraphx_arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
        "migraphx_int8_calibration_table_name": _TEXT,
        "migraphx_int8_use_native_calibration_table": _FLAG,
        "migraphx_mem_limit": _INTEGER,
        "migraphx_model_cache_dir": _TEXT,
        **{f"migraphx_{name}": _FLAG for name in _MIGRAPHX_FLAGS},
    },
    "openvino": {
        "cache_dir": _TEXT,
        "device_id": _TEXT,
        # Also AUTO:GPU,CPU and the like, so not a list of names.
        "device_type": _TEXT,
        "disable_dynamic_shapes": _FLAG,
        "enable_causallm": _FLAG,
        "enable_opencl_throttling": _FLAG,
        "enable_qdq_optimizer": _FLAG,
        "layout": _TEXT,
        "load_config": _TEXT,
        "model_priority": ("LOW", "MEDIUM", "HIGH", "DEFAULT"),
        "num_of_threads": _INTEGER,
        "num_streams": _INTEGER,
        "precision": ("FP32", "FP16", "ACCURACY"),
        "reshape_input": _TEXT,
    },
    "directml": {
        "device_filter": ("gpu", "npu", "any"),
        "device_id": _INTEGER,
        "disable_metacommands": _FLAG,
        "enable_graph_capture": _FLAG,
        "performance_preference": ("default", "high_performance", "minimum_power"),
    },
    "coreml": {
        "AllowLowPrecisionAccumulationOnGPU": _FLAG,
        "EnableOnSubgraphs": _FLAG,
        "MLComputeUnits": ("CPUOnly", "CPUAndNeuralEngine", "CPUAndGPU", "ALL"),
        "ModelCacheDirectory": _TEXT,
        "ModelFormat": ("MLProgram", "NeuralNetwork"),
        "ProfileComputePlan": _FLAG,
        "RequireStaticInputShapes": _FLAG,
        "SpecializationStrategy": ("Default", "FastPrediction"),
    },
    "qnn": {
        "backend_path": _TEXT,
        "backend_type": ("cpu", "gpu", "htp", "saver", "ir"),
        "device_id": _INTEGER,
        "enable_htp_fp16_precision": _FLAG,
        "enable_htp_shared_memory_allocator": _FLAG,
        "enable_htp_spill_fill_buffer": _FLAG,
        "htp_arch": _INTEGER,
        "htp_graph_finalization_optimization_mode": ("0", "1", "2", "3"),
        "htp_performance_mode": _TEXT,
        "offload_graph_io_quantization": _FLAG,
        "profiling_file_path": _TEXT,
        "profiling_level": ("off", "basic", "detailed", "optrace"),
        "qnn_context_priority": ("low", "normal", "normal_high", "high"),
        "rpc_control_latency": _INTEGER,
        "soc_model": _INTEGER,
        "vtcm_mb": _INTEGER,
    },
    "webgpu": {
        "dawnBackendType": ("Vulkan", "D3D12"),
        "defaultBufferCacheMode": ("disabled", "lazyRelease", "simple", "bucket"),
        "deviceId": _INTEGER,
        "enableGraphCapture": _FLAG,
        "enablePIXCapture": _FLAG,
        "forceCpuNodeNames": _TEXT,
        "preferredLayout": ("NCHW", "NHWC"),
        "preserveDevice": _FLAG,
        "queryResolveBufferCacheMode": ("disabled", "lazyRelease", "simple", "bucket"),
        "storageBufferCacheMode": ("disabled", "lazyRelease", "simple", "bucket"),
        "uniformBufferCacheMode": ("disabled", "lazyRelease", "simple", "bucket"),
        "validationMode": ("disabled", "wgpuOnly", "basic", "full"),
    },
    "xnnpack": {"intra_op_num_threads": _INTEGER},
    "ggml": {
        "device": ("auto", "gpu", "cpu"),
        "dump": _FLAG,
        "partial": _FLAG,
        "threads": _INTEGER,
        "weights": ("f32", "f16"),
    },
}


def check_options(provider: str, options: Mapping[str, str]) -> None:
    """Refuses options that a provider does not have, and values that it cannot take.

    Args:
        provider: Its short name. One that nothing is known about may have any options.
        options: What was given.

    Raises:
        UnknownNameError: No such option; the message says the nearest.
        BadInputError: No such value.
    """
    known = OPTIONS.get(provider)
    if known is None:
        return
    for name, value in options.items():
        where = f"--provider {provider}"
        if name not in known:
            raise UnknownNameError(where, name=name, known=known, kind="option")
        allowed = known[name]
        if allowed == _INTEGER and not value.strip().lstrip("-").isdecimal():
            raise BadInputError(f"{where}:{name}", got=repr(value), expected=_INTEGER)
        if isinstance(allowed, tuple) and value.lower() not in {choice.lower() for choice in allowed}:
            raise BadInputError(f"{where}:{name}", got=repr(value), expected=f"one of {', '.join(allowed)}")
