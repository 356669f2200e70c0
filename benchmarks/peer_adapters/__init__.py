"""Other people's converters and runtimes, each behind the same few methods: see ``contract``.

What is here runs with the Python of a peer's own environment, so it imports numpy, the standard library, and
the peer itself inside the methods that need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from peer_adapters.contract import Adapter

__all__ = ["ADAPTERS", "BUILDS", "ENVIRONMENTS", "adapter"]

# Module to environment. None is the environment of this project.
ADAPTERS: Mapping[str, str | None] = {
    "onnxsmith": None,
    "ort_quantizers": None,
    "pytorch": None,
    "genai": "genai",
    "llamacpp": "llamacpp",
    "optimum": "optimum",
    "olive": "olive",
    "simplifiers": "simplifiers",
    "openvino": "openvino",
    "mobius": "mobius",
}

_TORCH = ("torch==2.13.0",)
ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {
    # Its model builder needs transformers 5, which optimum-onnx excludes.
    "genai": (
        "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0", *_TORCH,
        "transformers==5.24.0", "accelerate==1.15.0",
    ),
    # A source distribution: it compiles llama.cpp for this processor, several minutes.
    "llamacpp": ("llama-cpp-python==0.3.36",),
    "optimum": ("optimum-onnx==0.1.0", "optimum==2.1.0", "onnxruntime==1.32.0", "onnx==1.23.2", *_TORCH,
                "transformers==4.57.6"),
    "olive": ("olive-ai==0.13.0", "onnxruntime==1.32.0", "onnx==1.23.2", *_TORCH, "transformers==4.57.6"),
    "simplifiers": ("onnxsim==0.8.1", "onnxslim==0.1.98", "onnx==1.23.2", "onnxruntime==1.32.0"),
    "openvino": ("openvino==2026.4.1",),
    "mobius": ("mobius-onnx==0.1.0", "gguf==0.19.0", "onnxruntime==1.32.0", *_TORCH),
}  # fmt: skip
"""Pinned, or a repetition would measure something else."""

BUILDS: Mapping[str, Mapping[str, str]] = {
    "llamacpp": {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF "
        "-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
    },
}
"""Variables for what is compiled: for this very processor, and without its programs."""


def adapter(name: str) -> Adapter:
    """The adapter of a module."""
    found: Adapter = importlib.import_module(f"peer_adapters.{name}").ADAPTER
    return found
