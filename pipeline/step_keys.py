"""Addresses of steps: hashes of everything that decides what comes of them.

That is what went in, byte by byte; the parameters; the versions of the libraries that do the work; the code
of onnxsmith itself; and, where arithmetic on this machine decides, its processor and the number of threads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.environment import cpu_name, usable_cpus
from onnxsmith.errors import OnnxsmithError
from onnxsmith.hashing import file_sha256
from onnxsmith.source import ModelSource, SourceKind

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.runtime import OrtBackend

__all__ = [
    "StepKey",
    "file_identity",
    "loaded_identity",
    "machine",
    "pass_identity",
    "provider_identity",
    "source_identity",
    "step_key",
    "trained_identity",
]

_LIBRARIES = (
    "accelerate", "gguf", "jiwer", "ml-dtypes", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-openvino", "onnxscript", "optimum", "optimum-onnx", "peft", "protobuf", "rouge-score",
    "sacrebleu", "safetensors", "scikit-learn", "scipy", "sentencepiece", "tokenizers", "torch",
    "transformers",
)  # fmt: skip
_CODE = frozenset({".cpp", ".h", ".inl", ".py"})
# What a model directory may be read for.
_READ = frozenset({".bin", ".jinja", ".json", ".model", ".safetensors", ".txt"})
# What decides how arithmetic is done, and so the last digits.
_ARITHMETIC = (
    "MKL_NUM_THREADS", "OMP_NUM_THREADS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY",
    "ONNXSMITH_KERNELS_ISA", "ONNXSMITH_KERNELS_LIBRARY",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepKey:
    """The address of a step's result.

    Attributes:
        kind: Which step.
        digest: SHA-256 of everything that decides it, in hex.
        made_from: That, as plain data.
    """

    kind: str
    digest: str
    made_from: Mapping[str, Any]


def step_key(kind: str, **made_from: Any) -> StepKey:
    """The address of a step.

    Args:
        kind: Which step.
        **made_from: What decides its result besides versions and code: plain data. ``summary`` is for people
            and decides nothing.
    """
    decides = {key: value for key, value in made_from.items() if key != "summary"}
    decides |= {"kind": kind, "versions": dict(_versions()), "code": _code_sha256()}
    text = json.dumps(decides, sort_keys=True, default=str)
    return StepKey(kind, hashlib.sha256(text.encode()).hexdigest(), made_from)


def machine() -> dict[str, Any]:
    """What decides the last digits of arithmetic."""
    settings = {name: os.environ[name] for name in _ARITHMETIC if name in os.environ}
    return {"cpu": cpu_name(), "threads": usable_cpus(), "settings": settings}


def source_identity(source: ModelSource) -> dict[str, Any] | None:
    """What a source is, byte by byte; None where it must be loaded to know, see ``loaded_identity``."""
    described = {"kind": str(source.kind), "text": source.text}
    path = source.path
    if path is None:
        return None
    if source.kind is SourceKind.ADAPTER:
        from onnxsmith.exporters.other_sources import base_of_adapter

        try:
            base = source_identity(base_of_adapter(source))
        except OnnxsmithError:
            return None
        return None if base is None else described | {"files": _tree(path), "base": base}
    if source.kind in (SourceKind.GGUF, SourceKind.EXPORTED_PROGRAM):
        return described | {"files": {path.name: file_identity(path)}}
    return described | {"files": _tree(path)} if source.kind is SourceKind.HUGGING_FACE_DIRECTORY else None


def loaded_identity(loaded: LoadedModel) -> dict[str, Any] | None:
    """What a loaded model is, where its source does not say: a hub's commit, or a factory's weights and code.

    None where even that does not say it, as with a factory that was typed into an interpreter.
    """
    source = loaded.source
    described = {"kind": str(source.kind), "text": source.text}
    if source.kind is SourceKind.HUGGING_FACE_HUB:
        revision = loaded.provenance.get("revision")
        # A branch moves; a commit does not.
        sound = isinstance(revision, str) and len(revision) == 40
        return described | {"revision": revision} if sound else None
    if source.kind is not SourceKind.FACTORY:
        return None
    code = _code_of(loaded.module, source)
    if code is None:
        return None
    return described | {"tensors": _tensors_sha256(loaded), "code": code}


def trained_identity(loaded: LoadedModel) -> dict[str, Any]:
    """What a model is whose weights were changed since it was loaded, from wherever it came."""
    files = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(loaded.files.items())}
    kind = type(loaded.module)
    return {
        "source": loaded.source.text,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "structure": hashlib.sha256(repr(loaded.module).encode()).hexdigest(),
        "task": loaded.task,
        "files": files,
        "provenance": loaded.provenance,
        "tensors": _tensors_sha256(loaded),
    }


def file_identity(path: Path) -> str:
    """The SHA-256 of a file's content, in hex; read once per process unless it is changed."""
    status = path.stat()
    return _file_sha256(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


def pass_identity(one: GraphPass) -> dict[str, Any]:
    """What a pass is: its name, parameters, the files that these name, and its code where it is not ours."""
    arguments = one.arguments()
    identity: dict[str, Any] = {"name": one.name, "parameters": arguments}
    files = {text: file_identity(Path(text)) for text in _strings(arguments) if _is_file(text)}
    if files:
        identity["files"] = files
    if not type(one).__module__.startswith("onnxsmith."):
        module = sys.modules.get(type(one).__module__)
        file = getattr(module, "__file__", None)
        identity["code"] = file_identity(Path(file)) if file else repr(type(one))
        identity["version"] = _distribution_version(type(one).__module__)
    return identity


def provider_identity(backend: OrtBackend) -> dict[str, Any]:
    """What a provider is: its name and options, and the versions or the library of one that runs apart."""
    from onnxsmith.runtime.providers import choose_provider

    choice = choose_provider(backend.provider)
    identity: dict[str, Any] = {"provider": backend.provider, "threads": backend.threads}
    if choice.environment is not None:
        identity["environment"] = [choice.environment.python, dict(choice.environment.versions)]
    if choice.library:
        identity["library"] = (
            file_identity(Path(choice.library)) if _is_file(choice.library) else choice.library
        )
    return identity


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


@functools.cache
def _code_sha256() -> str:
    """Of all of onnxsmith's own modules: whoever works on it never gets what older code made."""
    # Not resolved: this folder stands elsewhere in a checkout, and is a link in the package.
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(_modules(root)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _modules(root: Path) -> Iterator[Path]:
    # Its folders may be links, which a recursive search does not follow.
    for path in root.iterdir():
        if path.is_dir():
            yield from _modules(path)
        elif path.suffix in _CODE:
            yield path


@functools.cache
def _file_sha256(path: Path, size: int, changed_ns: int, inode: int) -> str:
    del size, changed_ns, inode  # They are for the cache of this function: another file, another hash.
    return file_sha256(path)


def _tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): file_identity(path)
        for path in sorted(root.rglob("*"))
        if path.suffix in _READ and path.is_file()
    }


def _code_of(module: Any, source: ModelSource) -> dict[str, Any] | None:
    """The code of a factory and of the classes of all modules in what it made.

    Hashes of the user's files, and of what was imported from beside them; versions of what is installed.
    """
    found: dict[str, Any] = {}
    names = {type(part).__module__ for part in module.modules()} | {source.target.partition(":")[0]}
    own_roots = set()
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or not Path(file).is_file():
            return None
        if _is_installed(file):
            found[name] = _distribution_version(name)
        else:
            found[name] = file_identity(Path(file))
            own_roots.add(Path(file).resolve().parent)
    # What these import beside them decides too.
    for name, other in list(sys.modules.items()):
        file = getattr(other, "__file__", None)
        if file and name not in found and name != "__main__" and not _is_installed(file):
            path = Path(file).resolve()
            # Code that was made at run time calls itself files that are not there.
            if path.is_file() and any(path.is_relative_to(root) for root in own_roots):
                found[name] = file_identity(path)
    return found


def _is_installed(file: str) -> bool:
    parts = Path(file).parts
    return "site-packages" in parts or "dist-packages" in parts or Path(file).is_relative_to(sys.base_prefix)


def _distribution_version(module: str) -> str:
    top = module.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(top, [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))


def _tensors_sha256(loaded: LoadedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in _tensors({"weights": loaded.module.state_dict(), "inputs": loaded.inputs}):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}\n".encode())
        digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors in nested containers, by path; other leaves as their text."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{name}.{number}")
    elif value is not None:
        yield f"{name}={value!r}", torch.zeros(0)


def _tensor_bytes(tensor: Any) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _is_file(text: str) -> bool:
    try:
        return len(text) < 4096 and Path(text).is_file()
    except (OSError, ValueError):
        return False
