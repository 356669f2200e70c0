"""Which token comes next: the most likely one, or one that is drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError
from onnxsmith.runtime.session import Array

__all__ = ["Sampler", "SamplingSettings", "next_token_distribution"]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. The defaults are greedy.

    The order is that of transformers: the penalty for repetition, then temperature, top-k, top-p.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it and a token is drawn.
        top_k: Draw from the so many most likely tokens; from all where None.
        top_p: Draw from the fewest tokens that have this probability together (nucleus sampling,
            https://arxiv.org/abs/1904.09751); from all at 1.
        repetition_penalty: Logits of tokens that were there are divided by it where positive and multiplied
            where negative (https://arxiv.org/abs/1909.05858); 1 does nothing.
        seed: Of the draws. Each row of a batch draws on its own, so its text does not depend on the others.

    Raises:
        BadInputError: A value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise BadInputError(f"generation: {name}", got=str(getattr(self, name)), expected=expected)
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            raise BadInputError(
                "generation: temperature",
                got="0, which takes the most likely token, with top_k or top_p",
                expected="more than 0 to draw from several tokens",
            )


class Sampler:
    """Chooses the tokens of one batch."""

    def __init__(self, settings: SamplingSettings, prompts: list[list[int]]) -> None:
        """Starts with the tokens of the prompts as those that were there."""
        self._settings = settings
        self._seen = [set(prompt) for prompt in prompts]
        # The same stream for a row whatever its place, or a text would change with its neighbours.
        self._random = [np.random.default_rng(settings.seed) for _ in prompts]

    def choose(self, logits: Array) -> npt.NDArray[np.int64]:
        """The next token of each row.

        Args:
            logits: (batch, vocabulary).
        """
        settings = self._settings
        if settings.temperature == 0 and settings.repetition_penalty == 1:
            greedy: npt.NDArray[np.int64] = logits.argmax(-1).astype(np.int64)
            return greedy
        chosen = np.array([self._row(row, number) for number, row in enumerate(logits)], np.int64)
        for seen, token in zip(self._seen, chosen, strict=True):
            seen.add(int(token))
        return chosen

    def margin(self, logits: Array) -> float:
        """How far the first row's choice is from the second best; infinite where tokens are drawn.

        Args:
            logits: (vocabulary,).
        """
        settings = self._settings
        if settings.temperature > 0 or len(logits) < 2:
            return math.inf
        scores = logits.copy()
        if settings.repetition_penalty != 1:
            scores = _penalised(logits.astype(np.float64), settings.repetition_penalty, self._seen[0])
        best = int(scores.argmax())
        highest = float(scores[best])
        scores[best] = -np.inf
        return highest - float(scores.max())

    def _row(self, logits: Array, number: int) -> int:
        settings = self._settings
        probabilities = next_token_distribution(logits, settings, self._seen[number])
        if settings.temperature == 0:
            return int(probabilities.argmax())
        return int(self._random[number].choice(len(probabilities), p=probabilities))


def next_token_distribution(
    logits: Array, settings: SamplingSettings, seen: Collection[int] = ()
) -> npt.NDArray[np.float64]:
    """The probabilities that the next token is drawn from.

    Args:
        logits: (vocabulary,).
        settings: The temperature 0 gives all to the most likely token.
        seen: Tokens that were there, for the penalty for repetition.

    Returns:
        (vocabulary,), with the sum 1.
    """
    scores = _penalised(logits.astype(np.float64), settings.repetition_penalty, seen)
    if settings.temperature == 0:
        certain = np.zeros_like(scores)
        certain[scores.argmax()] = 1.0
        return certain
    scores /= settings.temperature
    if settings.top_k is not None and settings.top_k < len(scores):
        least = np.partition(scores, -settings.top_k)[-settings.top_k]
        scores[scores < least] = -np.inf
    probabilities = _softmax(scores)
    if settings.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= settings.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def _penalised(
    scores: npt.NDArray[np.float64], penalty: float, seen: Collection[int]
) -> npt.NDArray[np.float64]:
    """Changes the scores of tokens that were there, in place."""
    if penalty != 1 and seen:
        index = np.fromiter(seen, np.int64)
        known = scores[index]
        scores[index] = np.where(known > 0, known / penalty, known * penalty)
    return scores


def _softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    result: npt.NDArray[np.float64] = powers / powers.sum()
    return result
