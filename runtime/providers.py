"""Execution providers: their names, what is installed, and what would bring the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from onnxsmith.errors import ProviderUnavailableError, UnknownNameError, require

__all__ = ["PROVIDERS", "Provider", "available_providers", "resolve_provider"]


@dataclasses.dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: The short name, as on the command line.
        ort_name: ONNX Runtime's name.
        package: The pip package that has it, or an empty string where one has to build it. These packages
            exclude each other in one environment.
        needs: What the machine must have.
    """

    name: str
    ort_name: str
    package: str
    needs: str


PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "onnxruntime", "nothing"),
        Provider("cuda", "CUDAExecutionProvider", "onnxruntime-gpu", "an NVIDIA GPU, CUDA and cuDNN"),
        Provider("tensorrt", "TensorrtExecutionProvider", "onnxruntime-gpu", "an NVIDIA GPU and TensorRT"),
        Provider(
            "openvino", "OpenVINOExecutionProvider", "onnxruntime-openvino", "an x86-64 CPU or Intel GPU"
        ),
        Provider("directml", "DmlExecutionProvider", "onnxruntime-directml", "Windows and a DirectX 12 GPU"),
        Provider("coreml", "CoreMLExecutionProvider", "onnxruntime", "macOS"),
        Provider("migraphx", "MIGraphXExecutionProvider", "onnxruntime-migraphx", "an AMD GPU and ROCm"),
        Provider("qnn", "QNNExecutionProvider", "onnxruntime-qnn", "a Qualcomm NPU"),
        Provider(
            "webgpu", "WebGpuExecutionProvider", "onnxruntime-webgpu", "a GPU with Vulkan, Metal or D3D12"
        ),
        Provider("xnnpack", "XnnpackExecutionProvider", "", "an ARM CPU"),
    )
}


def available_providers() -> list[str]:
    """ONNX Runtime's names of the providers in the installed package, best first.

    Raises:
        MissingDependencyError: No onnxruntime package is installed.
    """
    names: list[str] = require("onnxruntime", purpose="execution providers").get_available_providers()
    return names


def resolve_provider(name: str) -> str:
    """ONNX Runtime's name of a provider that is installed.

    Args:
        name: The short name (``cpu``) or ONNX Runtime's own.

    Raises:
        UnknownNameError: No such provider.
        ProviderUnavailableError: The installed package does not have it.
    """
    by_ort_name = {p.ort_name: p for p in PROVIDERS.values()}
    provider = PROVIDERS.get(name.lower()) or by_ort_name.get(name)
    available = available_providers()
    if provider is None:
        if name in available:
            return name
        raise UnknownNameError("--provider", name=name, known=PROVIDERS, kind="execution provider")
    if provider.ort_name not in available:
        raise ProviderUnavailableError(
            f"execution provider {provider.name}",
            got=f"the installed onnxruntime has {', '.join(available)}",
            expected=provider.ort_name,
            remedy=f"It needs {provider.needs}, and {_origin(provider)}",
        )
    return provider.ort_name


def _origin(provider: Provider) -> str:
    if not provider.package:
        return f"a build of onnxruntime with --use_{provider.name}"
    return f"an environment of its own with `pip install {provider.package}`"
