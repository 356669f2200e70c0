"""Execution providers: their names, what is installed, what would bring the rest, and what a user chose."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from onnxsmith.errors import (
    BadInputError,
    MissingDependencyError,
    ProviderUnavailableError,
    UnknownNameError,
    require,
)
from onnxsmith.runtime.environments import Environment, find_environment
from onnxsmith.runtime.provider_options import check_options

__all__ = [
    "PROVIDERS",
    "Provider",
    "ProviderChoice",
    "available_providers",
    "choose_provider",
    "provider_named",
    "resolve_provider",
]


@dataclasses.dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: The short name, as on the command line.
        ort_name: ONNX Runtime's name.
        package: The pip package that has it, or an empty string where one has to build it. These packages
            exclude each other in one environment.
        needs: What the machine must have.
        plugin: For a provider that is a library of its own beside ``onnxruntime``: ``module:function`` of
            its package, a function that gives the library's path.
        device: ONNX Runtime's name of the memory that tensors of this provider lie in.
        asynchronous: Whether a kernel's call returns before the device has computed it.
        thread_option: The option that says how many threads it has, where it does not use those of ONNX
            Runtime.
    """

    name: str
    ort_name: str
    package: str
    needs: str
    plugin: str = ""
    device: str = "cpu"
    asynchronous: bool = False
    thread_option: str = ""


PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "onnxruntime", "nothing"),
        Provider(
            "cuda", "CUDAExecutionProvider", "onnxruntime-gpu", "an NVIDIA GPU, CUDA and cuDNN",
            device="cuda", asynchronous=True,
        ),
        Provider(
            "tensorrt", "TensorrtExecutionProvider", "onnxruntime-gpu", "an NVIDIA GPU and TensorRT",
            device="cuda", asynchronous=True,
        ),
        Provider(
            "rocm", "ROCMExecutionProvider", "onnxruntime-rocm", "an AMD GPU and ROCm", asynchronous=True
        ),
        Provider(
            "migraphx", "MIGraphXExecutionProvider", "onnxruntime-migraphx", "an AMD GPU and ROCm",
            asynchronous=True,
        ),
        Provider(
            "openvino", "OpenVINOExecutionProvider", "onnxruntime-openvino", "an x86-64 CPU or Intel GPU",
            thread_option="num_of_threads",
        ),
        Provider(
            "directml", "DmlExecutionProvider", "onnxruntime-directml", "Windows and a DirectX 12 GPU",
            asynchronous=True,
        ),
        Provider("coreml", "CoreMLExecutionProvider", "onnxruntime", "macOS"),
        Provider("qnn", "QNNExecutionProvider", "onnxruntime-qnn", "a Qualcomm NPU"),
        Provider(
            "webgpu", "WebGpuExecutionProvider", "onnxruntime-webgpu", "a GPU with Vulkan, Metal or D3D12",
            asynchronous=True,
        ),
        Provider(
            "xnnpack", "XnnpackExecutionProvider", "", "an ARM CPU", thread_option="intra_op_num_threads"
        ),
        Provider(
            "ggml", "ggml", "onnxruntime-ggml", "an x86-64 CPU, or a GPU with Vulkan",
            plugin="onnxruntime_ggml:library_path", thread_option="threads",
        ),
        Provider("nxrt", "cpu_ep", "nxrt-ep-cpu", "an x86-64 CPU", plugin="nxrt_ep_cpu:get_library_path"),
    )
}  # fmt: skip

# name, @library, :key=value,...
_CHOICE = re.compile(r"(?P<name>[\w.-]+)(?:@(?P<library>.+?))?(?::(?P<options>[\w.-]+=.*))?")


@dataclasses.dataclass(frozen=True)
class ProviderChoice:
    """What a user asked for with ``--provider``, found on this machine.

    Attributes:
        name: The short name, or ONNX Runtime's where there is no shorter one.
        ort_name: ONNX Runtime's name; for a library that the user named, the name it is registered under.
        options: Passed to the provider, and checked.
        environment: Where its package is installed; None for the environment that runs now.
        library: The library of a plugin: a path, or ``module:function`` of its package.
        device: ONNX Runtime's name of the memory of its tensors.
        asynchronous: Whether a kernel's call returns before the device has computed it.
        thread_option: The option that says how many threads it has, if it is one of its own.
    """

    name: str
    ort_name: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Environment | None = None
    library: str = ""
    device: str = "cpu"
    asynchronous: bool = False
    thread_option: str = ""

    @property
    def apart(self) -> bool:
        """Whether it runs in a process of its own: its package is elsewhere, or it is foreign code."""
        return self.environment is not None or bool(self.library)


def provider_named(name: str) -> Provider | None:
    """The provider with a short name or ONNX Runtime's own, if it is known."""
    by_ort_name = {p.ort_name: p for p in PROVIDERS.values()}
    return PROVIDERS.get(name.lower()) or by_ort_name.get(name)


def available_providers() -> list[str]:
    """ONNX Runtime's names of the providers in the installed package, best first.

    Raises:
        MissingDependencyError: No onnxruntime package is installed.
    """
    names: list[str] = require("onnxruntime", purpose="execution providers").get_available_providers()
    return names


def choose_provider(text: str) -> ProviderChoice:
    """Finds what a user asked for.

    Args:
        text: ``openvino``, ``openvino:device_type=CPU,num_streams=2``, ONNX Runtime's own name, or
            ``name@/path/to/library.so`` for a plugin.

    Raises:
        UnknownNameError: No such provider or option.
        BadInputError: An option's value is wrong, or there is no such library.
        ProviderUnavailableError: It is not installed; the message says what brings it.
        MissingDependencyError: No onnxruntime package is installed.
    """
    matched = _CHOICE.fullmatch(text.strip())
    if matched is None:
        raise BadInputError(
            f"--provider {text}", got="no name of a provider", expected="NAME[@LIBRARY][:KEY=VALUE,...]"
        )
    options = _options(text, matched["options"] or "")
    name = matched["name"]
    if matched["library"]:
        library = Path(matched["library"]).expanduser().resolve()
        if not library.is_file():
            raise BadInputError(f"--provider {text}", got=f"no file {library}", expected="a library")
        return ProviderChoice(name, name, options, None, str(library))
    provider = provider_named(name)
    try:
        available, lacking = available_providers(), None
    except MissingDependencyError as error:
        available, lacking = [], error
    if provider is None:
        if name in available:
            return ProviderChoice(name, name, options)
        raise UnknownNameError("--provider", name=name, known=PROVIDERS, kind="execution provider")
    check_options(provider.name, options)
    environment = None
    if provider.ort_name not in available:
        environment = find_environment(provider.package) if provider.package else None
        if environment is None and lacking is not None and not provider.plugin and provider.name == "cpu":
            raise lacking
        if environment is None:
            raise ProviderUnavailableError(
                f"execution provider {provider.name}",
                got=f"the installed onnxruntime has {', '.join(available) or 'nothing: there is none'}",
                expected=provider.ort_name,
                remedy=f"It needs {provider.needs}, and {_origin(provider)}",
            )
    return ProviderChoice(
        provider.name, provider.ort_name, options, environment, provider.plugin, provider.device,
        provider.asynchronous, provider.thread_option,
    )  # fmt: skip


def resolve_provider(name: str) -> str:
    """ONNX Runtime's name of a provider that is installed, here or in an environment of its own.

    Args:
        name: See ``choose_provider``.

    Raises:
        OnnxsmithError: See ``choose_provider``.
    """
    return choose_provider(name).ort_name


def _options(text: str, given: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in given.split(",") if given else ():
        key, equals, value = part.partition("=")
        if not equals and options:
            # A comma inside a value, as in device_type=AUTO:GPU,CPU.
            last = next(reversed(options))
            options[last] += f",{part}"
            continue
        if not equals or not key.strip():
            raise BadInputError(f"--provider {text}", got=repr(part), expected="key=value")
        if key.strip() in options:
            raise BadInputError(
                f"--provider {text}", got=f"{key.strip()!r} twice", expected="each option once"
            )
        options[key.strip()] = value.strip()
    return options


def _origin(provider: Provider) -> str:
    if not provider.package:
        return f"a build of onnxruntime with --use_{provider.name}"
    if provider.package == "onnxruntime":
        return "`pip install onnxruntime` there"
    return (
        f"the package {provider.package}: `onnxsmith providers --install {provider.name}` puts it into an "
        "environment of its own"
    )
