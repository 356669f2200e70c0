"""What is known of every execution provider on this machine."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from onnxsmith.errors import MissingDependencyError, OnnxsmithError

__all__ = ["list_providers"]


def list_providers(*, check: bool = False) -> list[dict[str, Any]]:
    """Each provider: whether and where it is installed, which devices it sees, and what would bring it.

    Args:
        check: Whether to run a small model on each that is installed; it takes some seconds.

    Returns:
        Plain data: ``name``, ``ort_name``, ``installed``, ``where`` (``here``, ``own environment`` or
        empty), ``package``, ``version``, ``devices``, ``needs``, ``command`` (what would bring it), and
        ``problem`` (why it does not run here; None where that was not tried).
    """
    from onnxsmith.runtime.environments import find_environment
    from onnxsmith.runtime.provider_install import describe_environment_of, problem_of
    from onnxsmith.runtime.providers import PROVIDERS, available_providers, choose_provider

    try:
        available = available_providers()
        here = describe_environment_of(None)
    except (MissingDependencyError, OnnxsmithError):
        available, here = [], {"onnxruntime": "", "devices": []}
    gpus = _nvidia_gpus()
    rows = []
    for provider in PROVIDERS.values():
        row: dict[str, Any] = {
            "name": provider.name,
            "ort_name": provider.ort_name,
            "installed": False,
            "where": "",
            "package": provider.package,
            "version": "",
            "devices": [],
            "needs": provider.needs,
            "command": _command(provider.name, provider.package),
            "problem": None,
        }
        environment = find_environment(provider.package) if provider.package else None
        if provider.ort_name in available:
            row |= {"installed": True, "where": "here", "version": here["onnxruntime"]}
            row["devices"] = _devices(here["devices"], provider.ort_name)
        elif environment is not None:
            row |= {"installed": True, "where": "own environment"}
            row["version"] = environment.versions.get(provider.package, "")
            try:
                found = describe_environment_of(environment, provider if provider.plugin else None)
                row["devices"] = _devices(found["devices"], provider.ort_name)
            except OnnxsmithError as error:
                row["problem"] = str(error)
        if row["installed"] and provider.device == "cuda":
            row["devices"] = gpus
        if check and row["installed"] and row["problem"] is None:
            row["problem"] = problem_of(choose_provider(provider.name))
        rows.append(row)
    known = {p.ort_name for p in PROVIDERS.values()}
    rows += [
        {
            "name": name, "ort_name": name, "installed": True, "where": "here", "package": "",
            "version": here["onnxruntime"], "devices": _devices(here["devices"], name), "needs": "",
            "command": "", "problem": None,
        }
        for name in available
        if name not in known
    ]  # fmt: skip
    return rows


def _command(name: str, package: str) -> str:
    if not package:
        return f"a build of onnxruntime with --use_{name}"
    return "pip install onnxruntime" if package == "onnxruntime" else f"onnxsmith providers --install {name}"


def _devices(listed: list[dict[str, Any]], ort_name: str) -> list[str]:
    return [
        " ".join(str(part) for part in (device["kind"], device["vendor"]) if part)
        for device in listed
        if device["provider"] == ort_name
    ]


def _nvidia_gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run(
        [program, "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True, check=False, text=True, timeout=20,
    )  # fmt: skip
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
