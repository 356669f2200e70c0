"""The errors that onnxsmith raises.

::

    OnnxsmithError
    ├── BadInputError              exit status 2: what was given cannot be used
    │   ├── SourceError            a model source that does not exist or cannot be read
    │   ├── ModelFileError         an ONNX or GGUF file that is damaged, invalid or hostile
    │   ├── TokenizerError         a tokenizer that does not survive its checks
    │   ├── ExportError            a model that the exporter cannot represent
    │   ├── RecipeError            a recipe that does not validate
    │   ├── UnknownNameError       a pass, provider, task or key that nobody registered
    │   ├── FeedError              inputs that do not fit the model's signature
    │   └── DestinationError       an output path that cannot or must not be written
    ├── PassError                  exit status 1: a pass failed; the model is as it was before
    ├── CheckFailedError           exit status 1: a comparison, check or budget did not hold
    │   └── WorkerError            a process that ran a candidate died; the others are not touched by it
    └── LackingError               exit status 3: something this environment does not have
        ├── MissingDependencyError a Python package; the message names the pip command
        ├── ProviderUnavailableError
        ├── KernelsUnavailableError onnxsmith's own operators, which are compiled where they run
        └── ResourceError          memory or disk

Every message says where, what was got, what was expected, and the remedy, in that order.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType

__all__ = [
    "BadInputError",
    "CheckFailedError",
    "DestinationError",
    "ExportError",
    "FeedError",
    "KernelsUnavailableError",
    "LackingError",
    "MissingDependencyError",
    "ModelFileError",
    "OnnxsmithError",
    "PassError",
    "ProviderUnavailableError",
    "RecipeError",
    "ResourceError",
    "SourceError",
    "TokenizerError",
    "UnknownNameError",
    "WorkerError",
    "require",
]


class OnnxsmithError(Exception):
    """Base of all errors of this package.

    Args:
        where: The file, node, key or step at fault.
        got: What was found there.
        expected: What would have been right (optional where ``got`` says it all).
        remedy: What the reader can do about it (optional).
    """

    exit_status = 1

    def __init__(
        self, where: str, *, got: str, expected: str | None = None, remedy: str | None = None
    ) -> None:
        self.where = where
        self.got = got
        self.expected = expected
        self.remedy = remedy
        message = self.reason
        if remedy:
            message += f" {remedy}"
            message += "." if not message.endswith((".", "?", "!", "`")) else ""
        super().__init__(message)

    @property
    def reason(self) -> str:
        """The message without the remedy, for a fallback that has followed it."""
        message = f"{self.where}: {self.got}"
        if self.expected:
            message += f"; expected {self.expected}"
        return message if message.endswith((".", "?", "!")) else f"{message}."

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.where, self.got, self.expected, self.remedy))


def _rebuild(
    kind: type[OnnxsmithError], where: str, got: str, expected: str | None, remedy: str | None
) -> OnnxsmithError:
    """Recreates an error that crossed a process boundary."""
    error = kind.__new__(kind)
    OnnxsmithError.__init__(error, where, got=got, expected=expected, remedy=remedy)
    return error


class BadInputError(OnnxsmithError):
    """What was given cannot be used."""

    exit_status = 2


class SourceError(BadInputError):
    """A model source that does not exist or cannot be read."""


class ModelFileError(BadInputError):
    """An ONNX or GGUF file that is damaged, invalid or hostile."""


class TokenizerError(BadInputError):
    """A tokenizer that does not survive its checks."""


class ExportError(BadInputError):
    """A model that the exporter cannot represent."""


class RecipeError(BadInputError):
    """A recipe that does not validate."""


class UnknownNameError(BadInputError):
    """A name that nobody registered; the message lists the nearest and all known names."""

    def __init__(self, where: str, *, name: str, known: Iterable[str], kind: str = "name") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        super().__init__(
            where,
            got=f"unknown {kind} {name!r}",
            expected=f"one of {', '.join(names)}" if names else f"no {kind} at all",
            remedy=f"Did you mean {near[0]!r}?" if near else None,
        )


class FeedError(BadInputError):
    """Inputs that do not fit the model's signature."""


class DestinationError(BadInputError):
    """An output path that cannot or must not be written."""


class PassError(OnnxsmithError):
    """A pass failed; the model is as it was before the pass."""


class CheckFailedError(OnnxsmithError):
    """A comparison, check or budget did not hold."""


class WorkerError(CheckFailedError):
    """A process that ran a candidate died; the others are not touched by it."""


class LackingError(OnnxsmithError):
    """Something that this environment does not have."""

    exit_status = 3


class MissingDependencyError(LackingError):
    """A Python package that is not installed; the message names the pip command."""


class ProviderUnavailableError(LackingError):
    """An execution provider that the installed onnxruntime does not offer."""


class KernelsUnavailableError(LackingError):
    """The library with onnxsmith's own operators, which cannot be compiled or loaded here."""


class ResourceError(LackingError):
    """Memory or disk that is not there."""


# Import name -> what brings it. onnxruntime's provider packages exclude each other in one environment,
# so onnxsmith cannot choose one by an extra: the user does.
_INSTALL: Mapping[str, str] = {
    "torch": "pip install 'onnxsmith[torch]'",
    "transformers": "pip install 'onnxsmith[torch]'",
    "gguf": "pip install 'onnxsmith[torch]'",
    "accelerate": "pip install 'onnxsmith[torch]'",
    "cryptography": "pip install 'onnxsmith[sign]'",
    "datasets": "pip install 'onnxsmith[eval]'",
    "optuna": "pip install 'onnxsmith[tune]'",
    "ray": "pip install 'onnxsmith[ray]'",
    "mlflow": "pip install 'onnxsmith[mlflow]'",
    "peft": "pip install 'onnxsmith[train]'",
    "soundfile": "pip install 'onnxsmith[speech]'",
    "jiwer": "pip install 'onnxsmith[eval]'",
    "pyarrow": "pip install 'onnxsmith[eval]'",
    "rouge_score": "pip install 'onnxsmith[eval]'",
    "sacrebleu": "pip install 'onnxsmith[eval]'",
    "scipy": "pip install 'onnxsmith[eval]'",
    "sklearn": "pip install 'onnxsmith[eval]'",
    "onnxruntime": "pip install onnxruntime",
    "optimum": "pip install 'onnxsmith[optimum]'",
}


def require(module: str, *, purpose: str) -> ModuleType:
    """Imports a module that not every installation has.

    Args:
        module: The module's import name, dotted names allowed.
        purpose: What needs it, for the message.

    Raises:
        MissingDependencyError: It is not installed. The message names the exact pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        command = _INSTALL.get(missing, f"pip install {missing}")
        if missing == "onnxruntime":
            command += "` (CPU) or one of its provider packages, such as `pip install onnxruntime-gpu"
        raise MissingDependencyError(
            purpose, got=f"the Python package {missing!r} is not installed", remedy=f"Run `{command}`"
        ) from error
