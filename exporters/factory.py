"""Modules of the user's own: ``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, OnnxsmithError, SourceError, UnknownNameError, require
from onnxsmith.exporters.flattening import flatten
from onnxsmith.exporters.tracing import line_of
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    import torch

__all__ = ["first_line", "load_factory", "name_inputs", "unwrapped"]


def load_factory(source: ModelSource) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The module that a factory makes, and its example inputs by parameter of ``forward``.

    Raises:
        SourceError: There is no such factory, it fails, or what it gives is no module with example inputs.
    """
    torch = require("torch", purpose=f"loading {source.text}")
    module_name, _, attribute = source.text.partition(":")
    # A console script, unlike `python -m`, does not see the modules of the current directory.
    with _importable(Path.cwd()):
        with _users_code(source, f"importing {module_name}"):
            try:
                factory: Any = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                own = f"{module_name}.".startswith(f"{error.name}.")
                raise SourceError(
                    source.text,
                    got=f"no module named {error.name!r}",
                    expected="an importable package.module:factory",
                    remedy="Run from the directory that holds it, or install it"
                    if own
                    else f"{module_name} needs it: install it",
                ) from error
        for part in attribute.split("."):
            if not hasattr(factory, part):
                public = [n for n in dir(factory) if not n.startswith("_")]
                raise UnknownNameError(source.text, name=part, known=public, kind="attribute")
            factory = getattr(factory, part)
        if not callable(factory):
            raise SourceError(
                source.text,
                got=f"a {type(factory).__name__}",
                expected="a function that returns a torch.nn.Module",
            )
        with _users_code(source, f"{attribute}()"):
            made = factory if isinstance(factory, torch.nn.Module) else factory()
            module, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
            if given is None:
                given = _own_examples(module)
    module = unwrapped(module)
    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise SourceError(
            source.text,
            got=f"a {type(module).__name__}",
            expected="a torch.nn.Module, or a pair (module, example inputs)",
            remedy="Return the module that was scripted"
            if isinstance(module, torch.jit.ScriptModule)
            else None,
        )
    if given is None:
        raise SourceError(
            source.text,
            got="a module without example inputs",
            expected="a pair (module, example inputs)",
            remedy="Return (module, inputs) from the factory, inputs a tensor, a tuple or a dict by name, "
            "or give the module an attribute example_inputs",
        )
    return module, name_inputs(module, given, where=source.text)


def unwrapped(module: Any) -> Any:
    """The module inside those of ``torch.compile`` and of training in parallel, which compute the same."""
    import torch

    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while isinstance(module, torch.nn.Module):
        inner = module.module if isinstance(module, parallel) else getattr(module, "_orig_mod", None)
        if inner is None:
            break
        module = inner
    return module


def _own_examples(module: Any) -> Any:
    """The example inputs that a module carries (``example_input_array`` is Lightning's name)."""
    for name in ("example_inputs", "example_input_array"):
        given = getattr(module, name, None)
        if given is not None:
            return given() if callable(given) else given
    return None


def name_inputs(module: torch.nn.Module, given: Any, *, where: str) -> dict[str, Any]:
    """Gives each example input the name of the ``forward`` parameter that takes it.

    Values may be nested; tensors are found in tuples, lists, dicts, named tuples and dataclasses. Numbers,
    strings and None are constants of the exported model.

    Raises:
        ExportError: An input holds something that is neither, no input is a tensor, or there are more inputs
            than parameters.
    """
    torch = require("torch", purpose="exporting")
    parameters = list(inspect.signature(module.forward).parameters.values())
    if isinstance(given, torch.Tensor):
        given = (given,)
    if isinstance(given, Mapping):
        named = dict(given)
    elif not isinstance(given, (tuple, list)):
        raise ExportError(
            where,
            got=f"example inputs are a {type(given).__name__}",
            expected="a tensor, a tuple of inputs or a dict by name",
        )
    else:
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        if len(given) > len(positional) and rest is None:
            raise ExportError(
                where, got=f"{len(given)} example inputs", expected=f"at most {len(positional)} for forward()"
            )
        named = dict(zip(positional, given, strict=False))
        if rest is not None and len(given) > len(positional):
            named[rest] = tuple(given[len(positional) :])
    found = [t for name, value in named.items() for t in flatten(name, value, where=where, kind="input")]
    if not found:
        raise ExportError(where, got="example inputs without a tensor", expected="at least one tensor")
    return named


@contextlib.contextmanager
def _importable(directory: Path) -> Iterator[None]:
    entry = str(directory)
    added = entry not in sys.path
    if added:
        sys.path.insert(0, entry)
    try:
        yield
    finally:
        if added and entry in sys.path:
            sys.path.remove(entry)


@contextlib.contextmanager
def _users_code(source: ModelSource, doing: str) -> Iterator[None]:
    """Turns what the user's own code raises into one error that names the line.

    ``SystemExit`` too: importing a script without a main guard would otherwise end this process silently.
    """
    try:
        yield
    except (OnnxsmithError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        place = line_of(error)
        if isinstance(error, SyntaxError) and error.filename:
            place = f" at {Path(error.filename).name}:{error.lineno}"
        raise SourceError(
            source.text,
            got=f"{doing} fails{place}: {type(error).__name__}: {first_line(error)}",
            expected="code that runs and gives a torch.nn.Module",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
