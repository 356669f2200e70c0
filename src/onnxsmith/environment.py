"""What machine and which versions a result comes from."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from onnxsmith._version import __version__

__all__ = [
    "cpu_name",
    "describe_environment",
    "describe_versions",
    "give_back_memory",
    "peak_rss_mb",
    "usable_cpus",
]

_PACKAGES = (
    "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxscript",
    "torch", "tokenizers", "transformers", "gguf",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions, processor, memory, threads and execution providers, as plain data.

    ``threads`` is how many are used where nobody asks for another number. Imports ONNX Runtime, if it is
    installed, and none of the other packages that it names.
    """
    return describe_versions() | {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "logical_cpus": usable_cpus(),
        "threads": usable_cpus(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "providers": _providers(),
    }


def describe_versions() -> dict[str, Any]:
    """The part of the environment that decides what is made: versions, and nothing of the machine."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"onnxsmith": __version__, "python": platform.python_version(), "versions": versions}


def usable_cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_mb() -> float:
    """The highest resident memory that this process had, in MB (10**6 bytes).

    From ``VmHWM`` where there is one: ``ru_maxrss`` of a new process starts with its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def give_back_memory() -> None:
    """Lets the C library return freed memory to the system, where it keeps it otherwise (glibc).

    A session of ONNX Runtime that was closed leaves tens of megabytes that nobody uses any more.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _providers() -> list[str]:
    """ONNX Runtime's names of the execution providers in the installed package, best first."""
    try:
        runtime = importlib.import_module("onnxruntime")
        # Where one of its packages was removed badly, an empty namespace package is left.
        return list(runtime.get_available_providers())
    except (ImportError, AttributeError):
        return []


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
