"""The error of each tensor over its depth in the model, as a self-contained HTML page."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith._version import __version__
from onnxsmith.errors import DestinationError, require
from onnxsmith.pipeline._report_charts import error_by_depth
from onnxsmith.pipeline.staging import write_beside

if TYPE_CHECKING:
    from onnxsmith.runtime import Divergence

__all__ = ["render_depth_page", "write_depth_page"]

_NODES = 12


def write_depth_page(path: Path, results: Sequence[Divergence]) -> None:
    """Writes the page.

    Raises:
        DestinationError: It cannot be written.
    """
    try:
        write_beside(path, render_depth_page(results))
    except OSError as error:
        raise DestinationError(f"--report {path}", got=f"cannot be written: {error.strerror}") from error


def render_depth_page(results: Sequence[Divergence]) -> str:
    """One section for each candidate: the verdict, the chart, and the nodes by the error that they make."""
    jinja2 = require("jinja2", purpose="HTML report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["error"] = _error
    source = importlib.resources.files(__package__).joinpath("depth.html.j2").read_text(encoding="utf-8")
    page: str = environment.from_string(source).render(
        version=__version__, sections=[_section(result) for result in results]
    )
    return page


def _section(result: Divergence) -> Mapping[str, Any]:
    first = result.first.name if result.first is not None else None
    worst = result.suspects[0].tensor if result.suspects else None
    points = [
        {
            "depth": trace.depth,
            "name": trace.name,
            "operator": trace.operator,
            "error": trace.error.size,
            "introduced": trace.own,
            "mark": "first" if trace.name == first else "worst" if trace.name == worst else "",
        }
        for trace in result.tensors
        # Of what is NaN in the reference nothing is known, and no error would look like agreement.
        if trace.error.comparable
    ]
    return {
        "result": result,
        "chart": error_by_depth(points),
        "blamed": [blame for blame in result.blamed if blame.introduced.size > 0][:_NODES],
        "provider": result.provider.removesuffix("ExecutionProvider"),
    }


def _error(value: float) -> str:
    return "inf or NaN" if not math.isfinite(value) else f"{value:.2g}"
