"""Where a model comes from."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import re
from pathlib import Path

from onnxsmith.errors import SourceError

__all__ = ["ModelSource", "SourceKind", "resolve_path"]

_PACKAGE_SCHEME = "pkg:"
_FACTORY = re.compile(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", re.ASCII)


class SourceKind(enum.StrEnum):
    """The kinds of place that a model comes from."""

    HUGGING_FACE_DIRECTORY = "hf-directory"
    HUGGING_FACE_HUB = "hf-hub"
    GGUF = "gguf"
    FACTORY = "factory"
    ADAPTER = "peft-adapter"
    EXPORTED_PROGRAM = "pt2"
    ONNX = "onnx"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, before anything of it is read.

    Attributes:
        kind: How to read it.
        text: What the user wrote; quoted in messages and written to the manifest.
        path: The file or directory, for local kinds.
        revision: For hub ids, what followed ``@``: a branch, tag or commit.
    """

    kind: SourceKind
    text: str
    path: Path | None = None
    revision: str | None = None

    @property
    def is_torch(self) -> bool:
        """Whether this source yields a PyTorch model."""
        return self.kind is not SourceKind.ONNX

    @property
    def target(self) -> str:
        """The factory (``package.module:name``) or the hub id, without the revision."""
        return self.text.partition("@")[0]

    @staticmethod
    def parse(text: str, *, base: Path | None = None) -> ModelSource:
        """Decides what ``text`` means.

        An existing path wins; then ``package.module:factory``; then a hub id (``owner/name`` or
        ``name``, with ``@revision`` if wanted). ``pkg:package/file`` names a file inside an installed
        Python package, which is found without importing it.

        Args:
            text: What the user wrote.
            base: The directory that relative paths start from; the current one by default.

        Raises:
            SourceError: Nothing of these kinds.
        """
        expected = (
            "a Hugging Face directory or hub id, a .gguf or .pt2 file, package.module:factory, "
            "an .onnx file or an artifact directory"
        )
        if not text.strip():
            raise SourceError("model source", got="an empty string", expected=expected)
        path = resolve_path(text, base=base)
        if path.is_dir():
            return _from_directory(text, path)
        if path.exists():
            suffix = path.suffix.lower()
            if suffix == ".gguf":
                return ModelSource(SourceKind.GGUF, text, path)
            if suffix == ".pt2":
                return ModelSource(SourceKind.EXPORTED_PROGRAM, text, path)
            if suffix == ".onnx":
                return ModelSource(SourceKind.ONNX, text, path)
            if suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"}:
                raise SourceError(
                    text,
                    got="a pickle, which can run code when it is opened",
                    expected=expected,
                    remedy="Write a factory that builds the module and calls "
                    "torch.load(..., weights_only=True), and name it as package.module:factory",
                )
            raise SourceError(text, got=f"a file with the suffix {suffix!r}", expected=expected)
        if _FACTORY.fullmatch(text):
            return ModelSource(SourceKind.FACTORY, text)
        looks_like_path = (
            text.startswith((".", "/", "~", _PACKAGE_SCHEME))
            or text.partition("@")[0].count("/") > 1
            or path.suffix.lower() in {".gguf", ".onnx", ".safetensors", ".pt", ".pt2", ".pth", ".bin"}
        )
        if not looks_like_path and _HUB_ID.fullmatch(text):
            return ModelSource(SourceKind.HUGGING_FACE_HUB, text, revision=text.partition("@")[2] or None)
        raise SourceError(
            text,
            got="no such file or directory",
            expected=expected,
            remedy=f"Looked for {path}" if str(path) != text else None,
        )


def _from_directory(text: str, path: Path) -> ModelSource:
    if (path / "manifest.json").is_file():
        return ModelSource(SourceKind.ONNX, text, path)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return ModelSource(SourceKind.ADAPTER, text, path)
    if (path / "config.json").is_file() and not list(path.glob("*.onnx")):
        return ModelSource(SourceKind.HUGGING_FACE_DIRECTORY, text, path)
    for pattern, kind in (("*.onnx", SourceKind.ONNX), ("*.gguf", SourceKind.GGUF)):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return ModelSource(kind, text, path if kind is SourceKind.ONNX else found[0])
        if found:
            raise SourceError(
                text,
                got=f"{len(found)} {pattern} files ({', '.join(p.name for p in found[:4])}, ...)",
                expected="one model",
                remedy="Name the file itself",
            )
    raise SourceError(
        text,
        got="a directory without config.json, manifest.json, .onnx or .gguf",
        expected="a Hugging Face model directory, an onnxsmith artifact, or one ONNX or GGUF file",
    )


def resolve_path(text: str, *, base: Path | None = None) -> Path:
    """Turns a path as a user writes it into a path on disk.

    ``~`` is the home directory; relative paths start from ``base``; ``pkg:package/file`` is a file
    inside an installed Python package, which is found without importing it.

    Raises:
        SourceError: ``pkg:`` names a package that is not installed.
    """
    if text.startswith(_PACKAGE_SCHEME):
        name, _, inside = text[len(_PACKAGE_SCHEME) :].partition("/")
        try:
            spec = importlib.util.find_spec(name) if name.isidentifier() else None
        except (ImportError, ValueError):
            spec = None
        roots = list(spec.submodule_search_locations or []) if spec else []
        if not roots:
            raise SourceError(
                text,
                got=f"the Python package {name!r} is not installed",
                remedy=f"Run `pip install --no-deps {name.replace('_', '-')}`",
            )
        return Path(roots[0]) / inside
    path = Path(text).expanduser()
    return path if path.is_absolute() or base is None else base / path
