"""How good a training is on examples that it has not seen, without giving any away for good."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from onnxsmith.training.examples import Examples

__all__ = ["CrossValidation", "cross_validate"]


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """Results of each fold, and their means.

    Attributes:
        folds: Metrics of each fold.
        mean: Name of a metric to its mean.
        spread: Name of a metric to the standard deviation between folds.
    """

    folds: Sequence[Mapping[str, float]]
    mean: Mapping[str, float]
    spread: Mapping[str, float]


def cross_validate(
    train: Callable[[Examples, Examples, int], Mapping[str, float]],
    examples: Examples,
    *,
    folds: int,
    seed: int,
) -> CrossValidation:
    """Trains once for each fold on the others, and judges on it.

    Folds have equal shares of each class (Kohavi 1995, "A Study of Cross-Validation and Bootstrap for
    Accuracy Estimation and Model Selection"). The standard deviation between folds understates the
    uncertainty of the mean a little, because their training sets overlap (Bengio and Grandvalet 2004).

    Args:
        train: From training examples, held-out ones and the number of the fold to metrics; it begins with
            a fresh model each time.
        examples: All of them. Those without a label are trained on in each fold and never judged.
        folds: How many.
        seed: Of the draw.

    Raises:
        BadInputError: Fewer examples than folds.
    """
    parts = examples.folds(folds, seed=seed)
    found: list[Mapping[str, float]] = []
    for number, part in enumerate(parts):
        held = set(part)
        rest = [n for n in range(len(examples)) if n not in held]
        found.append(dict(train(examples.take(rest), examples.take(part), number)))
    names = [name for name in found[0] if all(math.isfinite(result.get(name, math.nan)) for result in found)]
    mean = {name: statistics.fmean(result[name] for result in found) for name in names}
    spread = {name: statistics.stdev([result[name] for result in found]) for name in names}
    return CrossValidation(found, mean, spread)
