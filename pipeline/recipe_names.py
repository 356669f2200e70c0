"""Whether what a recipe names exists: passes and their parameters, a provider, a task, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError, LackingError, RecipeError, UnknownNameError

if TYPE_CHECKING:
    from onnxsmith.pipeline._recipe_text import RecipeText
    from onnxsmith.pipeline.recipe import Recipe, Variant

__all__ = ["check_names"]

_Place = Sequence[int | str]


def check_names(text: RecipeText, recipe: Recipe, variants: Sequence[Variant]) -> None:
    """Looks up every name, so that a slip costs no work and is found with its line.

    Args:
        text: The recipe as it was written.
        recipe: What it says.
        variants: Its variants as they were written, one for each entry of ``variants``.

    Raises:
        RecipeError: There is no such thing, or a parameter of a pass cannot have its value.
    """
    from onnxsmith.exporters import TASKS
    from onnxsmith.runtime.metrics import require_metric
    from onnxsmith.runtime.providers import choose_provider

    if recipe.task is not None and recipe.task not in TASKS:
        unknown = UnknownNameError("task", name=recipe.task, known=TASKS, kind="task")
        raise _at(text, ["task"], unknown)
    try:
        choose_provider(recipe.provider)
    except UnknownNameError as error:
        raise _at(text, ["provider"], error) from error
    except (BadInputError, LackingError):
        # Whether it can be had, and where its library is, is seen where the recipe is run.
        pass
    spec = recipe.evaluation.task
    metrics: list[tuple[str, _Place]] = []
    for number, name in enumerate(spec.metrics if spec else ()):
        metrics.append((name, ["evaluation", "task", "metrics", number]))
    for key in ("metric_drop_points", "metric_drop_pct"):
        metrics += [(name, ["budgets", key, name]) for name in getattr(recipe.budgets, key)]
    for name, place in metrics:
        try:
            require_metric(name)
        except UnknownNameError as error:
            raise _at(text, place, error) from error
    _check_passes(text, variants)


def _check_passes(text: RecipeText, variants: Sequence[Variant]) -> None:
    """Makes the passes of every variant, with all values of its matrix, and throws them away."""
    from onnxsmith.graph_passes import make_passes

    for number, written in enumerate(variants):
        entries = written.passes
        place: list[int | str] = ["variants", number, "preset" if entries is None else "passes"]
        for variant in written.expanded():
            try:
                specs = variant.specs()
            except UnknownNameError as error:
                raise _at(text, place, error) from error
            for position, spec in enumerate(specs):
                try:
                    make_passes([spec])
                except BadInputError as error:
                    # A preset is as it is: only what was written can be wrong.
                    if entries is not None:
                        place += [position, *_blamed(entries[position], error)]
                    raise _at(text, place, error) from error


def _blamed(entry: Any, error: BadInputError) -> list[str]:
    """The pass below its entry, and the parameter where the error is about one that was given."""
    if not isinstance(entry, Mapping):
        return []
    ((name, arguments),) = entry.items()
    for key in arguments:
        if error.where.endswith(f": {key}") or error.got == f"unknown parameter {key!r}":
            return [name, key]
    return [name]


def _at(text: RecipeText, place: _Place, error: BadInputError) -> RecipeError:
    return RecipeError(
        f"{text.where(place)}: {'.'.join(map(str, place))}",
        got=error.got, expected=error.expected, remedy=error.remedy,
    )  # fmt: skip
