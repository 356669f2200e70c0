"""The reference of the Python API, from docstrings: ``python docs/reference.py DIRECTORY [MODULE...]``."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxsmith
from onnxsmith.errors import CheckFailedError, require

__all__ = ["MODULES", "write_reference"]

# Named one by one: pdoc leaves out the submodules of a package that has an __all__.
MODULES: Sequence[str] = (
    "onnxsmith",
    *(
        f"onnxsmith.{name}"
        for name in ("errors", "exporters", "graph_passes", "runtime", "training", "pipeline")
    ),
)


def write_reference(directory: Path, modules: Sequence[str] = MODULES) -> None:
    """Writes one HTML page for each module.

    Args:
        directory: Where to; it is made.
        modules: What to document.

    Raises:
        MissingDependencyError: pdoc is not installed.
        CheckFailedError: A public name is not there, or has no page.
    """
    pdoc: Any = require("pdoc", purpose="the reference of the API")
    render: Any = importlib.import_module("pdoc.render")
    # Public names are imported when they are asked for, and pdoc does not ask.
    for name in onnxsmith.__all__:
        vars(onnxsmith)[name] = getattr(onnxsmith, name)
    render.configure(docformat="google")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pdoc.pdoc(*modules, output_directory=directory)
    lost = [str(one.message) for one in said if "does not resolve" in str(one.message)]
    page = (directory / "onnxsmith.html").read_text(encoding="utf-8")
    lost += [f"no entry for {name}" for name in onnxsmith.__all__ if f'id="{name}"' not in page]
    if lost:
        raise CheckFailedError("reference of the API", got="; ".join(lost), expected="every public name")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]), sys.argv[2:] or MODULES)
