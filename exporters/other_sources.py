"""Models from torch's own archive (``.pt2``), and adapters of PEFT merged into their models."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import SourceError, require
from onnxsmith.source import ModelSource, SourceKind

if TYPE_CHECKING:
    import torch

__all__ = ["ADAPTER_CONFIG", "base_of_adapter", "load_exported_program", "merge_adapter", "with_adapter"]

ADAPTER_CONFIG = "adapter_config.json"


def load_exported_program(source: ModelSource) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The module of a program that ``torch.export.save`` wrote, and its example inputs by parameter.

    Tensors are read with ``weights_only``, and archives with other objects are refused. Axes that the
    program fixed stay fixed: it checks the sizes of its inputs itself.

    Raises:
        SourceError: It is no such archive, it holds more than tensors, or it has no example inputs.
    """
    import torch

    assert source.path is not None
    _refuse_objects(source, source.path)
    with _weights_only():
        try:
            program = torch.export.load(source.path)
        except MemoryError:
            raise
        # The reader raises anything on damaged archives.
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise SourceError(
                source.text,
                got=f"cannot be read: {type(error).__name__}: {text}",
                expected="an archive that torch.export.save of this version of torch wrote",
            ) from error
    if program.example_inputs is None:
        raise SourceError(source.text, got="a program without example inputs", expected="one that has them")
    module: Any = program.module()
    # It is as it was exported, and says so by raising.
    module.eval = lambda: module
    module.train = lambda mode=True: module
    args, kwargs = program.example_inputs
    names = list(inspect.signature(module.forward).parameters)[: len(args)]

    class ExportedModule(torch.nn.Module):
        """Takes by name what the program takes by place."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, **given: Any) -> Any:
            placed = [given.pop(name) for name in names]
            return self.inner(*placed, **given)

    return ExportedModule(), {**dict(zip(names, args, strict=True)), **kwargs}


def _refuse_objects(source: ModelSource, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(
            source.text, got=f"no archive: {error}", expected="what torch.export.save writes"
        ) from error
    for name in names:
        parts = Path(name).parts
        if "constants" in parts and not parts[-1].startswith(("tensor_", "model_constants_config")):
            raise SourceError(
                source.text,
                got=f"an archive with the object {parts[-1]}, which can run code when it is opened",
                expected="tensors only",
                remedy="Write a factory that loads it, and name that as package.module:factory",
            )


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Lets torch read no pickle but those of tensors, whatever its readers ask for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name)
        else:
            os.environ[name] = before


def base_of_adapter(source: ModelSource) -> ModelSource:
    """The model that an adapter of PEFT belongs to.

    Raises:
        SourceError: Its configuration cannot be read, or names no model that can be found.
    """
    assert source.path is not None
    try:
        config = json.loads((source.path / ADAPTER_CONFIG).read_bytes())
        name = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(
            source.text, got=f"{ADAPTER_CONFIG} cannot be read: {error}", expected="JSON"
        ) from error
    if not isinstance(name, str) or not name:
        raise SourceError(
            source.text,
            got=f"{ADAPTER_CONFIG} without base_model_name_or_path",
            expected="the model's directory or id",
        )
    base = ModelSource.parse(name, base=source.path)
    if base.kind not in (SourceKind.HUGGING_FACE_DIRECTORY, SourceKind.HUGGING_FACE_HUB):
        raise SourceError(source.text, got=f"an adapter of {name}", expected="one of a Hugging Face model")
    return base


def with_adapter(source: ModelSource, module: Any) -> Any:
    """PEFT's model: the module with an adapter beside its own weights.

    Raises:
        SourceError: The adapter does not fit the model, or changes more than weights.
    """
    peft = require("peft", purpose="reading an adapter")
    assert source.path is not None
    if not (source.path / "adapter_model.safetensors").is_file():
        raise SourceError(
            source.text,
            got="no adapter_model.safetensors",
            expected="weights as safetensors",
            remedy="Save the adapter again with a current PEFT; its .bin is a pickle",
        )
    with _fitting(source):
        return peft.PeftModel.from_pretrained(module, str(source.path))


def merge_adapter(source: ModelSource, module: Any) -> Any:
    """The model with an adapter's weights added to its own.

    Raises:
        SourceError: The adapter does not fit the model, or changes more than weights.
    """
    adapted = with_adapter(source, module)
    with _fitting(source):
        return adapted.merge_and_unload(safe_merge=True)


@contextlib.contextmanager
def _fitting(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:300]
        raise SourceError(
            source.text,
            got=f"the adapter cannot be merged: {type(error).__name__}: {text}",
            expected="an adapter that adds to weights, such as LoRA, of this model",
        ) from error
