"""Brings a provider to this machine, and finds out whether it really runs here."""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith.errors import (
    BadInputError,
    CheckFailedError,
    OnnxsmithError,
    ProviderUnavailableError,
    UnknownNameError,
)
from onnxsmith.package import TensorSpec
from onnxsmith.runtime.environments import Environment, make_environment, remove_environment
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.providers import PROVIDERS, Provider, ProviderChoice, provider_named
from onnxsmith.runtime.worker_process import WorkerProcess
from onnxsmith.runtime.worker_session import WorkerSession

__all__ = ["describe_environment_of", "install_provider", "problem_of", "uninstall_provider"]

_REQUEST = re.compile(r"(?P<name>[\w.-]+?)(?:==(?P<version>[\w.+!-]+))?")
# Beside the provider's package: our code, in a process without torch, needs these two.
_NEEDED = ("numpy", "ml_dtypes")


def install_provider(text: str, *, on_step: Callable[[str], None] = lambda _: None) -> Environment:
    """Puts the package of a provider into an environment of its own, in place of one that is there.

    Args:
        text: ``openvino``, or ``openvino==1.24.1`` for a version of its package.
        on_step: Called with each thing that begins.

    Raises:
        UnknownNameError: No such provider.
        BadInputError: It is part of every package, or has no package.
        ProviderUnavailableError: pip cannot install it, or it does not start; nothing was changed.
    """
    matched = _REQUEST.fullmatch(text.strip())
    provider = provider_named(matched["name"]) if matched else None
    if matched is None or provider is None:
        raise UnknownNameError("--install", name=text, known=PROVIDERS, kind="execution provider")
    if not provider.package or provider.package == "onnxruntime":
        raise BadInputError(
            f"--install {provider.name}",
            got="it has no package of its own"
            if not provider.package
            else "it is part of onnxruntime itself",
            expected=f"one of {', '.join(p.name for p in PROVIDERS.values() if _has_package(p))}",
        )
    version = f"=={matched['version']}" if matched["version"] else ""
    package = f"{provider.package}{version}"

    def check(environment: Environment) -> None:
        found = describe_environment_of(environment, provider if provider.plugin else None)
        if provider.ort_name not in found["providers"]:
            raise ProviderUnavailableError(
                f"--install {provider.name}",
                got=f"{package} has {', '.join(found['providers'])}",
                expected=provider.ort_name,
            )

    if provider.plugin:
        return make_environment(
            provider.package, (_own_onnxruntime(), *_NEEDED), without_dependencies=(package,),
            check=check, on_step=on_step,
        )  # fmt: skip
    return make_environment(provider.package, (package, *_NEEDED), check=check, on_step=on_step)


def uninstall_provider(name: str) -> bool:
    """Removes the environment of a provider.

    Returns:
        Whether there was one.

    Raises:
        UnknownNameError: No such provider.
    """
    provider = provider_named(name)
    if provider is None:
        raise UnknownNameError("--remove", name=name, known=PROVIDERS, kind="execution provider")
    return bool(provider.package) and remove_environment(provider.package)


def describe_environment_of(
    environment: Environment | None, plugin: Provider | None = None
) -> dict[str, Any]:
    """What a worker in an environment says of itself: ``versions``, ``providers`` and ``devices``.

    Args:
        environment: Which; None for this one.
        plugin: A plugin that it is to load before it answers.

    Raises:
        OnnxsmithError: It does not start.
    """
    where = environment.package if environment else "this environment"
    request: dict[str, Any] = {"do": "hello"}
    if plugin is not None:
        request["plugin"] = {"name": plugin.ort_name, "library": plugin.plugin}
    try:
        with WorkerProcess(environment, where=where) as worker:
            return worker.ask(request)
    except CheckFailedError as error:
        raise ProviderUnavailableError(
            where, got=f"it does not start: {error.got}", expected="an onnxruntime that can be imported"
        ) from error


def problem_of(choice: ProviderChoice) -> str:
    """Why a provider does not compute on this machine, or an empty string where it does.

    A small product of matrices is run on it, in a process of its own, and compared with numpy's.
    """
    import onnx

    random = np.random.default_rng(0)
    x = random.standard_normal((2, 16), np.float32)
    weight = random.standard_normal((16, 8), np.float32)
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        check (float[rows, 16] x) => (float[rows, 8] y) { y = MatMul(x, weight) }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    with tempfile.TemporaryDirectory(prefix="onnxsmith-check-") as directory:
        path = Path(directory) / "check.onnx"
        path.write_bytes(model.SerializeToString())
        graph = GraphFile(
            path,
            (TensorSpec("x", "float32", ("rows", 16)),),
            (TensorSpec("y", "float32", ("rows", 8)),),
            {},
        )
        try:
            with WorkerSession(graph, choice, name="a product of matrices") as session:
                session.check_placement()
                error = float(np.abs(session.run({"x": x})["y"] - x @ weight).max())
        except OnnxsmithError as problem:
            return str(problem)
    # Providers may compute in half precision, but not wrongly.
    return "" if error < 0.05 else f"its results are off by {error:.2g}"


def _has_package(provider: Provider) -> bool:
    return bool(provider.package) and provider.package != "onnxruntime"


def _own_onnxruntime() -> str:
    """A plugin is built against one version: take ours, which users compare with."""
    try:
        return f"onnxruntime=={importlib.metadata.version('onnxruntime')}"
    except importlib.metadata.PackageNotFoundError:
        return "onnxruntime"
