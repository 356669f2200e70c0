"""Prompt lookup: the next tokens are guessed from the text so far, and one call of the model checks them all.

Texts repeat themselves: a summary its source, an edited file the file, code its names. What followed the last
occurrence of the present words is a guess of what follows now that costs nothing (prompt lookup decoding,
Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). A decoder reads all its weights in each
call, so a call for several positions takes little longer than one for a single token. Tokens are chosen
from the logits of each position as they would be one by one, and the first that is not the guess ends what
the call gives: the text is that of the model alone, drawn tokens included (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192, for a draft that is certain), up to what the runtime's kernels compute
differently for one row and for several (onnxsmith's own compute nothing differently).

How many guesses a call checks follows from what is seen here: how often guesses come true, which is learned
at each position whether it was guessed there or not, and how long calls take. Where guessing does not pay
there is none, so such a text costs a look into a table for each token.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from onnxsmith.errors import BadInputError
from onnxsmith.runtime.decoding import Decoder
from onnxsmith.runtime.sampling import Sampler
from onnxsmith.runtime.session import Array

__all__ = ["Lookup", "LookupSettings", "Speculator", "speculative_calls"]

# Words that a guess is found by. The longest that was there before counts.
_SIZES = (4, 2, 1)
# Longer matches are all alike.
_LONGEST_MATCH = 12
# The share of an observation in what is known: some twenty of them count.
_LEARNING = 0.05
_PRIOR_WEIGHT = 2.0
# A call with guesses has to be worth so much more than one without.
_LEAST_GAIN = 1.03
_REMEMBERED_CALLS = 5
# A time that was not measured again for so many calls is forgotten: it may have been a hiccup.
_FORGOTTEN_CALLS = 64
# Rounding differs between calls for one position and for several. A choice that twice the largest difference
# could turn is made by a call of its own, if rounding is all that differs: kernels that round activations to
# 8 bits do so differently for one row and for several, and what is in the cache differs by that as well.
_TIE_FACTOR = 2.0
_LARGEST_ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class LookupSettings:
    """How guesses are made.

    Attributes:
        tokens: The most guesses that one call checks.

    Raises:
        BadInputError: No guesses.
    """

    tokens: int = 7

    def __post_init__(self) -> None:
        """Refuses settings that guess nothing."""
        if self.tokens < 1:
            raise BadInputError("speculate: lookup", got=str(self.tokens), expected="at least 1 token")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Reads ``lookup``, ``lookup:5`` or ``off``.

        Raises:
            BadInputError: Anything else.
        """
        method, colon, count = text.partition(":")
        if text == "off":
            return None
        if method != "lookup" or (colon and not count.isdecimal()):
            raise BadInputError(
                "speculate", got=repr(text), expected="off, lookup or lookup:N, as in lookup:5"
            )
        return cls(int(count)) if colon else cls()


class Lookup:
    """The tokens of a text, and where the last ones were before."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        """Starts with some tokens."""
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Takes the next token."""
        tokens, end = self.tokens, len(self.tokens)
        for size in _SIZES:
            if end >= size:
                self._after[tuple(tokens[end - size :])] = end
        tokens.append(token)

    def find(self) -> tuple[int, int]:
        """Where the text went on the last time, and how many tokens before that place are the same.

        Returns:
            Both 0 where the last token is new.
        """
        tokens, end = self.tokens, len(self.tokens)
        for size in _SIZES:
            at = self._after.get(tuple(tokens[end - size :])) if end >= size else None
            if at is not None:
                length = size
                while (
                    length < min(at, _LONGEST_MATCH) and tokens[at - length - 1] == tokens[end - length - 1]
                ):
                    length += 1
                return at, length
        return 0, 0

    def guess(self, at: int, count: int) -> list[int]:
        """The tokens from a place on; a text that ends is taken to begin again there."""
        found = self.tokens[at : at + count]
        while found and len(found) < count:
            found += found[: count - len(found)]
        return found


class _Odds:
    """How often a guess comes true, by how many tokens before it are the same."""

    def __init__(self) -> None:
        # Before anything is known: what held so many times failed once.
        self._odds = [length / (length + 1) for length in range(_LONGEST_MATCH + 1)]
        self._weights = [_PRIOR_WEIGHT] * (_LONGEST_MATCH + 1)

    def learn(self, length: int, hit: bool) -> None:
        length = min(length, _LONGEST_MATCH)
        self._weights[length] += 1
        share = max(_LEARNING, 1 / self._weights[length])
        self._odds[length] += share * (hit - self._odds[length])

    def expected(self, length: int, count: int) -> Iterator[float]:
        """How many tokens a call is expected to give, for 1, 2, ... guesses."""
        total = right = 1.0
        for number in range(count):
            right *= self._odds[min(length + number, _LONGEST_MATCH)]
            total += right
            yield total


class _Times:
    """How long calls take, by their number of positions: the best of the last ones, free of what else ran."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}
        self._calls = 0
        # What a position more costs, before that was seen.
        self._slope = 0.0

    def saw_prompt(self, rows: int, seconds: float) -> None:
        self._slope = seconds / rows

    def saw(self, rows: int, seconds: float) -> None:
        self._calls += 1
        self._last[rows] = self._calls
        self._recent.setdefault(rows, deque(maxlen=_REMEMBERED_CALLS)).append(seconds)
        for old in [r for r, last in self._last.items() if r > 1 and last + _FORGOTTEN_CALLS < self._calls]:
            del self._last[old], self._recent[old]

    def of(self, rows: int) -> float | None:
        """None where not even a single position was seen."""
        if 1 not in self._recent:
            return None
        if rows in self._recent:
            return min(self._recent[rows])
        one = min(self._recent[1])
        nearest = min(self._recent, key=lambda known: (abs(known - rows), known))
        if nearest == 1:
            return one + self._slope * (rows - 1)
        # On the line through both.
        known = max(min(self._recent[nearest]), one)
        return one + (known - one) * (rows - 1) / (nearest - 1)


class Speculator:
    """Decides how many guesses the next call checks."""

    def __init__(self, settings: LookupSettings, prompt: Sequence[int], *, most: int | None = None) -> None:
        """Starts with a prompt.

        Args:
            settings: How guesses are made.
            prompt: The text so far.
            most: Positions that one call may have; any number where None.
        """
        self._most = settings.tokens if most is None else min(settings.tokens, most - 1)
        self._text = Lookup(prompt)
        self._found = self._text.find()
        self._odds = _Odds()
        self.times = _Times()

    def guesses(self, room: int) -> list[int]:
        """What the next call checks, besides giving the token that follows; nothing where it does not pay.

        Args:
            room: The most guesses that are of use.
        """
        at, length = self._found
        one = self.times.of(1)
        if not length or one is None:
            return []
        best, chosen = _LEAST_GAIN / one, 0
        for number, tokens in enumerate(self._odds.expected(length, min(room, self._most)), 1):
            seconds = self.times.of(number + 1)
            assert seconds is not None
            if tokens / seconds > best:
                best, chosen = tokens / seconds, number
        return self._text.guess(at, chosen)

    def add(self, token: int) -> None:
        """Takes the token that came, which shows whether the guess for it was or would have been right."""
        at, length = self._found
        if length:
            self._odds.learn(length, self._text.tokens[at] == token)
        self._text.add(token)
        self._found = self._text.find()


def speculative_calls(
    decoder: Decoder,
    prompt: Sequence[int],
    sampler: Sampler,
    settings: LookupSettings,
    *,
    max_new_tokens: int,
) -> Iterator[list[int]]:
    """Continues one prompt, call by call.

    Args:
        decoder: With an empty cache.
        prompt: Token ids; at least one.
        sampler: Chooses each token.
        settings: How guesses are made.
        max_new_tokens: Upper bound of tokens.

    Yields:
        The tokens that a call of the model gave, at least one.
    """
    if max_new_tokens < 1:
        return
    began = time.perf_counter()
    logits = decoder.step(np.array([prompt], np.int64), last_only=True)
    token = int(sampler.choose(logits[:, -1])[0])
    speculator = Speculator(settings, prompt, most=decoder.session.most_alike)
    speculator.times.saw_prompt(len(prompt), time.perf_counter() - began)
    speculator.add(token)
    yield [token]
    ties = _Ties()
    made = 1
    while made < max_new_tokens:
        guesses = speculator.guesses(max_new_tokens - made - 1)
        if guesses and not ties.known:
            # The same position alone, for the difference in rounding.
            alone = decoder.step(np.array([[token]], np.int64), last_only=True)[0, -1].copy()
            decoder.rewind(decoder.length - 1)
        began = time.perf_counter()
        logits = decoder.step(np.array([[token, *guesses]], np.int64), last_only=not guesses)
        if guesses and not ties.known:
            ties.saw(alone, logits[0, 0])
        tokens = _accepted(decoder, logits, token, guesses, sampler, ties)
        speculator.times.saw(1 + len(guesses), time.perf_counter() - began)
        for token in tokens:
            speculator.add(token)
        made += len(tokens)
        yield tokens


def _accepted(
    decoder: Decoder, logits: Array, token: int, guesses: Sequence[int], sampler: Sampler, ties: _Ties
) -> list[int]:
    """The tokens of a call; the cache is left as if there had been no others."""
    before = decoder.length - len(guesses) - 1
    tokens: list[int] = []
    for number, guess in enumerate([*guesses, None]):
        row = logits[:, number]
        if guesses and sampler.margin(row[0]) < ties.margin:
            decoder.rewind(before + number)
            last = tokens[-1] if tokens else token
            row = decoder.step(np.array([[last]], np.int64), last_only=True)[:, -1]
            guess = None
        tokens.append(int(sampler.choose(row)[0]))
        if tokens[-1] != guess:
            break
    decoder.rewind(before + len(tokens))
    return tokens


class _Ties:
    """Below which margin a choice is not certain to be that of a call for one position."""

    def __init__(self) -> None:
        self.margin = math.inf
        self.known = False

    def saw(self, alone: Array, together: Array) -> None:
        """Takes the same logits of two calls."""
        one = alone.astype(np.float64)
        difference = float(np.abs(one - together).max())
        self.margin = _TIE_FACTOR * difference if difference <= _LARGEST_ROUNDING * one.std() else 0.0
        self.known = True
