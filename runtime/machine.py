"""The machine that models run on: what it has, what limits it, and what of that slows a model down."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from onnxsmith.environment import usable_cpus
from onnxsmith.errors import KernelsUnavailableError
from onnxsmith.finding import Finding
from onnxsmith.runtime.kernel_library import KernelLibrary, instruction_set, ready_library
from onnxsmith.runtime.providers import PROVIDERS

__all__ = ["MACHINE_RULES", "Machine", "machine_findings", "read_machine"]

_ROOT = Path("/")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What kernels of ONNX Runtime and PyTorch ask for.
_FEATURES = frozenset(
    {"avx", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
     "amx_bf16", "amx_tile", "f16c", "fma", "asimd", "asimddp", "i8mm", "sve", "bf16", "fphp", "asimdhp"}
)  # fmt: skip
_NVIDIA = (Path("dev/nvidia0"), Path("proc/driver/nvidia/version"))
# Memory that is left below this share makes the system write pages out and read mapped weights again.
_LITTLE_MEMORY = 0.1
_BUSY_PCT = 25.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this process has of the machine.

    Attributes:
        cpu: The processor's name.
        logical_cpus: Of the machine.
        usable_cpus: That this process may run on.
        physical_cores: Of the machine; None where unknown.
        cpu_quota: Processors that a control group grants, in whole time slices; None for no limit.
        features: Instruction sets that kernels ask for, as the kernel names them.
        governor: How the system sets the clock; empty where it does not say.
        memory_bytes: Of the machine, or of the control group where that is less.
        available_bytes: Not in use now.
        runtimes: Installed packages that each bring the module ``onnxruntime``, with their versions.
        variables: Environment variables that set numbers of threads.
        has_nvidia: Whether a driver of NVIDIA is loaded.
        providers: ONNX Runtime's names of the providers in this environment; empty without ONNX Runtime.
        other_load_pct: Share of the processors that other programs use now; None where not watched.
        own_kernels: What runs onnxsmith's own operators, or what would compile them; empty where nothing can.
        no_own_kernels: Why nothing can.
    """

    cpu: str = ""
    logical_cpus: int = 1
    usable_cpus: int = 1
    physical_cores: int | None = None
    cpu_quota: float | None = None
    features: frozenset[str] = frozenset()
    governor: str = ""
    memory_bytes: int = 0
    available_bytes: int = 0
    runtimes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_nvidia: bool = False
    providers: tuple[str, ...] = ()
    other_load_pct: float | None = None
    own_kernels: str = ""
    no_own_kernels: str = ""

    @property
    def threads(self) -> int:
        """How many threads are worth starting."""
        return max(1, min(self.usable_cpus, int(self.cpu_quota or self.usable_cpus)))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = dataclasses.asdict(self)
        return plain | {"features": sorted(self.features), "threads": self.threads}


def read_machine(root: Path = _ROOT, *, load_pct: float | None = None) -> Machine:
    """Reads what there is; nothing is measured.

    Args:
        root: Where the system's files are.
        load_pct: What ``MachineLoad`` saw.
    """
    import psutil

    from onnxsmith.environment import describe_environment

    memory = psutil.virtual_memory()
    limit = _cgroup_number(root, "memory.max", "memory/memory.limit_in_bytes")
    used = _cgroup_number(root, "memory.current", "memory/memory.usage_in_bytes")
    total, free = int(memory.total), int(memory.available)
    if limit is not None and limit < total:
        total, free = int(limit), min(free, max(0, int(limit - (used or 0))))
    described = describe_environment()
    own_kernels, no_own_kernels = _own_kernels()
    governor = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    return Machine(
        cpu=described["cpu"],
        logical_cpus=os.cpu_count() or 1,
        usable_cpus=usable_cpus(),
        physical_cores=psutil.cpu_count(logical=False),
        cpu_quota=_cpu_quota(root),
        features=_features(root),
        governor=governor.read_text().strip() if governor.is_file() else "",
        memory_bytes=total,
        available_bytes=free,
        runtimes=_runtimes(),
        variables={name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        has_nvidia=any((root / path).exists() for path in _NVIDIA),
        providers=tuple(described["providers"]),
        other_load_pct=load_pct,
        own_kernels=own_kernels,
        no_own_kernels=no_own_kernels,
    )


def _features(root: Path) -> frozenset[str]:
    info = root / "proc/cpuinfo"
    if not info.is_file():
        return frozenset()
    for line in info.read_text(errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            return _FEATURES & frozenset(line.partition(":")[2].split())
    return frozenset()


def _groups(root: Path) -> Iterator[Path]:
    """The directories of this process's control group and those above it, version 2."""
    listed = root / "proc/self/cgroup"
    own = ""
    if listed.is_file():
        lines = [line for line in listed.read_text().splitlines() if line.startswith("0::")]
        own = lines[0].removeprefix("0::").strip("/") if lines else ""
    base = root / "sys/fs/cgroup"
    path = base / own
    while path != base:
        yield path
        path = path.parent
    yield base


def _cgroup_number(root: Path, name: str, old: str) -> float | None:
    """The smallest number in files of a name, from the own group upwards; else that of version 1."""
    found = []
    for path in [*(group / name for group in _groups(root)), root / "sys/fs/cgroup" / old]:
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            found.append(float(text))
    return min(found, default=None)


def _cpu_quota(root: Path) -> float | None:
    found = []
    for group in _groups(root):
        path = group / "cpu.max"
        parts = path.read_text().split() if path.is_file() else []
        if len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit():
            found.append(int(parts[0]) / int(parts[1]))
    old = root / "sys/fs/cgroup/cpu"
    quota, period = old / "cpu.cfs_quota_us", old / "cpu.cfs_period_us"
    if quota.is_file() and period.is_file() and int(quota.read_text()) > 0:
        found.append(int(quota.read_text()) / int(period.read_text()))
    return min(found, default=None)


def _runtimes() -> dict[str, str]:
    """The installed packages that each bring the module ``onnxruntime``."""
    names = {provider.package for provider in PROVIDERS.values() if not provider.plugin and provider.package}
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if name in names or (name.startswith("ort-") and name.endswith("nightly")):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _own_kernels() -> tuple[str, str]:
    """What runs or would compile onnxsmith's own operators, and why nothing can."""
    try:
        found = ready_library()
        if isinstance(found, KernelLibrary):
            return instruction_set(found), ""
        return f"to be compiled by {found.name} when they are first used", ""
    except KernelsUnavailableError as error:
        return "", f"{error.where}: {error.got}"


def machine_findings(machine: Machine) -> list[Finding]:
    """What of a machine makes models slow or wrong."""
    return [finding for rule in MACHINE_RULES.values() if (finding := rule(machine)) is not None]


def _packages(machine: Machine) -> Finding | None:
    names = list(machine.runtimes)
    if len(names) < 2:
        return None
    return Finding(
        "packages",
        "wrong",
        f"{' and '.join(names)} are installed into one environment",
        "each brings the module onnxruntime, and the last one to be installed has overwritten the others: "
        "providers vanish, and removing one breaks the other",
        f"pip uninstall {' '.join(names)}, then install the one that you need; "
        "`onnxsmith providers --install` keeps others apart",
        tuple(names),
        len(names),
    )


def _no_runtime(machine: Machine) -> Finding | None:
    if machine.providers:
        return None
    return Finding(
        "no_runtime",
        "wrong",
        "no onnxruntime can be imported",
        "nothing can be run, compared or measured",
        "pip install onnxruntime, or one of its provider packages",
    )


def _quota(machine: Machine) -> Finding | None:
    quota = machine.cpu_quota
    if quota is None or quota >= machine.usable_cpus:
        return None
    return Finding(
        "cpu_quota",
        "slow",
        f"a control group grants the time of {quota:g} processors, and {machine.usable_cpus} are to be seen",
        "ONNX Runtime starts a thread for each that it sees; they use the time up together, and all of them "
        "are then stopped until the next slice",
        f"set the number of threads: --threads {machine.threads}, or intra_op_num_threads in your program",
    )


def _memory(machine: Machine) -> Finding | None:
    if not machine.memory_bytes or machine.available_bytes > _LITTLE_MEMORY * machine.memory_bytes:
        return None
    return Finding(
        "memory",
        "slow",
        f"{machine.available_bytes / 1e9:.1f} of {machine.memory_bytes / 1e9:.1f} GB of memory are left",
        "weights that are mapped from a file are dropped and read again, and allocations may fail",
        "free memory, or take a smaller model",
    )


def _no_vnni(machine: Machine) -> Finding | None:
    if "avx2" not in machine.features or any("vnni" in f or "amx" in f for f in machine.features):
        return None
    return Finding(
        "no_vnni",
        "note",
        "the processor has AVX2, and neither VNNI nor AMX",
        "8 bit integers gain little speed there, and full 8 bit weights may saturate",
        "quantize with reduce_range: true, and measure against float32",
    )


def _no_own_kernels(machine: Machine) -> Finding | None:
    if not machine.no_own_kernels:
        return None
    return Finding(
        "no_own_kernels",
        "note",
        f"onnxsmith's own operators cannot be used here: {machine.no_own_kernels}",
        "graphs that were made with them run by standard operators, slowly, or not at all",
        "`onnxsmith kernels` says what is missing and what brings it; other presets do not need them",
    )


def _governor(machine: Machine) -> Finding | None:
    if machine.governor != "powersave":
        return None
    return Finding(
        "governor",
        "slow",
        "the clock of the processor is governed by 'powersave'",
        "short calls are over before the clock has gone up, and measurements vary",
        "cpupower frequency-set -g performance, where you may",
    )


def _variables(machine: Machine) -> Finding | None:
    set_low = [
        f"{name}={value}"
        for name, value in machine.variables.items()
        if value.isdigit() and int(value) < machine.threads
    ]
    if not set_low:
        return None
    return Finding(
        "thread_variables",
        "note",
        f"{', '.join(set_low)} with {machine.threads} processors",
        "PyTorch and numpy use no more threads than that; ONNX Runtime does not heed it",
        "unset it where PyTorch is to be compared or to export fast",
    )


def _idle_gpu(machine: Machine) -> Finding | None:
    on_gpu = {provider.ort_name for provider in PROVIDERS.values() if provider.device == "cuda"}
    if not machine.has_nvidia or not machine.providers or on_gpu & set(machine.providers):
        return None
    return Finding(
        "idle_gpu",
        "slow",
        "there is an NVIDIA GPU, and no execution provider that would use it",
        f"models run on {', '.join(machine.providers)}",
        "onnxsmith providers --install cuda, then --provider cuda",
    )


def _load(machine: Machine) -> Finding | None:
    load = machine.other_load_pct
    if load is None or load < _BUSY_PCT:
        return None
    return Finding(
        "busy",
        "note",
        f"other programs use {load:.0f} % of the processors",
        "what is measured now is slower than it has to be, and varies",
        "measure again on a quiet machine",
    )


MACHINE_RULES: Mapping[str, Callable[[Machine], Finding | None]] = MappingProxyType(
    {
        "packages": _packages,
        "no_runtime": _no_runtime,
        "cpu_quota": _quota,
        "memory": _memory,
        "governor": _governor,
        "no_vnni": _no_vnni,
        "no_own_kernels": _no_own_kernels,
        "thread_variables": _variables,
        "idle_gpu": _idle_gpu,
        "busy": _load,
    }
)
"""The rules about machines, by name."""
