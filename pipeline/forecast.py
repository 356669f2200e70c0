"""What a run is expected to need, before any weight is read, and whether this machine has it."""

from __future__ import annotations

from pathlib import Path

from onnxsmith.errors import ResourceError
from onnxsmith.free_memory import available_memory
from onnxsmith.pipeline.model_size import model_size
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.staging import require_space
from onnxsmith.source import ModelSource

__all__ = ["expected_peak_bytes", "require_resources"]

# Fitted to runs of three variants, which docs/cache.md lists: Python with its libraries; copies of the float
# weights that are resident together, PyTorch's and those of files that are mapped; predictions of a window.
_BASE = 520_000_000
_COPIES, _COPIES_CACHED = 2.3, 3.9
_WINDOWS = 7


def expected_peak_bytes(recipe: Recipe, source: ModelSource, *, cached: bool) -> int | None:
    """The peak of resident memory that a run's process is expected to reach; its workers come on top.

    Args:
        recipe: What is to be done.
        source: The model.
        cached: Whether the export is kept, and so mapped from a file.

    Returns:
        None where nothing is known: a source whose files do not say how large it is, or a recipe that trains.
    """
    size = model_size(source, task=recipe.task)
    if size is None or recipe.training is not None:
        return None
    width = 4 if recipe.export.dtype == "float32" else 2
    peak = _BASE + int((_COPIES_CACHED if cached else _COPIES) * size.parameters * width)
    spec = recipe.evaluation.perplexity
    if spec is not None:
        peak += (spec.max_tokens + _WINDOWS * min(spec.window, spec.max_tokens)) * size.vocabulary * 4
    return peak


def require_resources(
    recipe: Recipe, source: ModelSource, destination: Path, *, cached: bool, force: bool = False
) -> str:
    """Says what a run is expected to need.

    Args:
        recipe: What is to be done.
        source: The model.
        destination: Where the artifact is to be.
        cached: Whether steps are kept.
        force: Go on where it is not there.

    Raises:
        ResourceError: This machine has not as much.
    """
    peak, size = expected_peak_bytes(recipe, source, cached=cached), model_size(source, task=recipe.task)
    if peak is None or size is None:
        return "not known before the model is loaded"
    disk = size.parameters * 4 * (len(recipe.variants) + 2)
    free = available_memory()
    if not force:
        if free < peak:
            raise ResourceError(
                f"run of {recipe.name}", got=f"{free / 1e6:.0f} MB of memory available",
                expected=f"about {peak / 1e6:.0f} MB at the peak",
                remedy="Use a machine with more, fewer tokens of perplexity, or --ignore-forecast to go on",
            )  # fmt: skip
        require_space(destination.resolve().parent, disk, purpose=f"run of {recipe.name}")
    return f"about {peak / 1e6:.0f} MB of memory, at most {disk / 1e6:.0f} MB of disk"
