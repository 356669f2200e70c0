"""A recipe for a model of few positions: what it leaves open is made to fit, what it says has to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.model_size import model_size
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.pipeline.recipe import Recipe
    from onnxsmith.pipeline.recipe_base import RecipeModel

__all__ = ["fit_context"]


def fit_context(recipe: Recipe, source: ModelSource) -> Recipe:
    """The recipe with lengths that the model can read.

    Windows of a text, prompts of the benchmark and pieces of calibration data are longer than some models by
    default; these are shortened. Only headers of the source are read; where they do not say how many
    positions there are, the recipe stays as it is.

    Args:
        recipe: What is to be done.
        source: The model.

    Raises:
        BadInputError: The recipe itself asks for more.
    """
    size = model_size(source, task=recipe.task)
    if size is None or size.positions is None:
        return recipe
    positions, evaluation = size.positions, recipe.evaluation
    where = f"recipe {recipe.name}: evaluation"
    changed: dict[str, Any] = {}
    if evaluation.perplexity is not None:
        changed["perplexity"] = _fitting(evaluation.perplexity, f"{where}.perplexity", {"window": positions})
    benchmark = evaluation.benchmark
    if benchmark is not None:
        # Prompt and answer share the positions; most of them are for the prompt.
        asked = "prompt_tokens" in benchmark.model_fields_set
        most = positions - benchmark.prompt_tokens if asked else positions // 4
        room = {"new_tokens": max(most, 2)} if size.decoder else {}
        fitted = _fitting(benchmark, f"{where}.benchmark", room, most=positions - 1)
        left = positions - (fitted.new_tokens if size.decoder else 0)
        changed["benchmark"] = _fitting(fitted, f"{where}.benchmark", {"prompt_tokens": left})
    if size.decoder and evaluation.task is not None and (evaluation.task.max_length or 0) > positions:
        changed["task"] = _fitting(evaluation.task, f"{where}.task", {"max_length": positions})
    made: dict[str, Any] = {"evaluation": _updated(evaluation, changed)}
    if recipe.calibration is not None:
        at = f"recipe {recipe.name}: calibration"
        made["calibration"] = _fitting(recipe.calibration, at, {"tokens": positions})
    fitted_recipe: Recipe = _updated(recipe, made)
    return fitted_recipe


def _fitting(spec: Any, where: str, limits: dict[str, int], *, most: int | None = None) -> Any:
    """A part of a recipe whose defaults keep limits; ``most`` is what a value that was given may be."""
    changed: dict[str, Any] = {}
    for key, limit in limits.items():
        value = getattr(spec, key)
        if value <= limit:
            continue
        if key not in spec.model_fields_set:
            changed[key] = limit
        elif value > (limit if most is None else most):
            raise BadInputError(
                f"{where}.{key}", got=str(value), expected=f"at most {limit if most is None else most}",
                remedy="The model has no more positions, says its configuration: take less",
            )  # fmt: skip
    return _updated(spec, changed)


def _updated(model: RecipeModel, changed: dict[str, Any]) -> Any:
    """The same object where nothing changes, so that what was left open stays open."""
    different = {key: value for key, value in changed.items() if value is not getattr(model, key)}
    return model.model_copy(update=different) if different else model
