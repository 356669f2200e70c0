"""The plain recipe of a point: what `onnxsmith run` makes again, judged on the data that were held out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.tuning_trial import Trial

__all__ = ["plain_recipe"]

_NAME = "tuned"


def plain_recipe(recipe: Recipe, trial: Trial, *, base: Path | None, target: Path, why: str) -> str:
    """The recipe as YAML.

    Args:
        recipe: With a key ``tune``.
        trial: The point.
        base: The directory that relative paths of the recipe start from.
        target: The directory that the text will be in: relative paths start from there then.
        why: For the comment at its top.
    """
    import yaml

    assert recipe.tune is not None
    given = recipe.model_dump(
        mode="json", exclude_unset=True, exclude={"tune", "variants", "extends", "training"}
    )
    given |= {"schema_version": 1, "seed": recipe.seed, "source": _moved(recipe.source, base, target)}
    point = trial.point
    passes = [name if not arguments else {name: _plain(arguments)} for name, arguments in point.passes]
    given["variants"] = [{"name": point.name or _NAME, "passes": passes}]
    if recipe.training is not None:
        training = recipe.training.with_values(point.training).model_dump(mode="json", exclude_unset=True)
        for key in ("data", "unlabelled", "validation"):
            if training.get(key):
                training[key] = _moved(training[key], base, target)
        for step in training["steps"]:
            for model in ("teacher", "student"):
                if (step.get("distill") or {}).get(model):
                    step["distill"][model] = _moved(step["distill"][model], base, target)
        given["training"] = training
    evaluation = given.setdefault("evaluation", {})
    for key in ("perplexity", "task"):
        part = getattr(recipe.evaluation, key)
        if part is None:
            continue
        begin, width = part.share[0], part.share[1] - part.share[0]
        evaluation[key]["share"] = [begin + width * (1 - recipe.tune.held_out), part.share[1]]
        evaluation[key]["data"] = _moved(part.data, base, target)
    if recipe.calibration is not None:
        given["calibration"]["data"] = _moved(recipe.calibration.data, base, target)
    if point.threads is not None and recipe.evaluation.benchmark is not None:
        evaluation.setdefault("benchmark", {})["threads"] = point.threads
    if point.provider is not None:
        given["provider"] = point.provider
    first = ["schema_version", "name", "source", "task"]
    ordered = {key: given[key] for key in (*first, *given) if given.get(key) is not None}
    comment = "".join(f"# {line}\n" for line in (
        f"Found by onnxsmith tune: {why}.",
        "What is measured here was held out: the search did not see it.",
    ))  # fmt: skip
    text: str = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)
    return comment + text


def _moved(text: str, base: Path | None, target: Path) -> str:
    """A path for a recipe in another directory; what is no path stays."""
    if text.startswith(("pkg:", "hf:", "~")) or Path(text).is_absolute():
        return text
    path = (base or Path()) / text
    return Path(os.path.relpath(path, target)).as_posix() if path.exists() else text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
