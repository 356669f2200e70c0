"""Imports transformers without what an export does not need.

That is scikit-learn and SciPy, of which it takes two functions that we never call, and reading the source of
all its models a second time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from onnxsmith.errors import require

__all__ = ["import_transformers"]

# Modules of transformers, with what they take of which heavy module: assisted generation asks for a receiver
# operating characteristic, losses of object detectors for an assignment. Together 1.5 s of an export.
_TAKEN: Mapping[str, tuple[str, str]] = {
    "transformers.loss.loss_utils": ("scipy.optimize", "linear_sum_assignment"),
    "transformers.generation.candidate_generator": ("sklearn.metrics", "roc_curve"),
}


def import_transformers(*, purpose: str) -> Any:
    """The module transformers, with its classes of models.

    Raises:
        MissingDependencyError: It is not installed.
    """
    transformers = require("transformers", purpose=purpose)
    with _models_read_once():
        importlib.import_module("transformers.models")
    for module, (heavy, function) in _TAKEN.items():
        if module not in sys.modules:
            # Another series of transformers may not have the module.
            with _in_the_place_of(heavy, function), contextlib.suppress(ImportError):
                importlib.import_module(module)
    return transformers


@contextlib.contextmanager
def _models_read_once() -> Iterator[None]:
    """While open, what transformers found in the folder of its models is found again without reading it.

    It reads the source of every model to learn which classes there are, first under the path of the folder
    and, for the package ``transformers.models``, under the path of that folder's ``__init__.py``, and
    remembers by path what it found. Where it does so in another way nothing is changed.
    """
    utilities: Any = importlib.import_module("transformers.utils.import_utils")
    found: Any = getattr(utilities, "create_import_structure_from_path", None)
    if not hasattr(found, "cache_info") or "transformers.models" in sys.modules:
        yield
        return

    def find(path: Any) -> Any:
        place = Path(path)
        return found(place.parent if place.is_file() else place)

    utilities.create_import_structure_from_path = find
    try:
        yield
    finally:
        utilities.create_import_structure_from_path = found


@contextlib.contextmanager
def _in_the_place_of(heavy: str, function: str) -> Iterator[None]:
    """While open, imports of a module get one whose function imports the real one when it is called."""
    if heavy in sys.modules or importlib.util.find_spec(heavy.partition(".")[0]) is None:
        yield
        return
    stand_in = types.ModuleType(heavy)
    vars(stand_in)[function] = _imported_later(heavy, function)
    sys.modules[heavy] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(heavy) is stand_in:
            del sys.modules[heavy]


def _imported_later(heavy: str, function: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(heavy), function)(*args, **options)

    return call
