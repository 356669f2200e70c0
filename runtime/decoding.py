"""Token by token: the KV cache between calls, generation, and the scoring of a text."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.comparison import kl_divergence
from onnxsmith.errors import BadInputError, FeedError
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.samples import decoder_feeds
from onnxsmith.runtime.session import Array, Session

__all__ = ["Decoder", "Perplexity", "ScoredWindow", "generate", "open_decoder", "perplexity", "score"]

Tokens = npt.NDArray[np.int64]


class Decoder(abc.ABC):
    """A decoder with its cache: give it tokens, get logits."""

    def __init__(self, session: Session) -> None:
        """Starts with an empty cache.

        Raises:
            FeedError: The model has no KV cache or no logits.
        """
        names = [spec.name for spec in session.outputs]
        if not session.cache or "logits" not in names:
            raise FeedError(
                session.name,
                got=f"a model with the outputs {', '.join(names[:4])}",
                expected="a decoder with logits, past_key_values.* and present.*",
            )
        self.session = session
        self.length = 0

    def reset(self) -> None:
        """Empties the cache."""
        self.length = 0

    @abc.abstractmethod
    def step(self, token_ids: Tokens) -> Array:
        """Takes tokens (batch, sequence) and gives their logits (batch, sequence, vocabulary)."""


class _ArrayDecoder(Decoder):
    """The cache as numpy arrays, for any backend."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._past: dict[str, Array] | None = None

    def reset(self) -> None:
        super().reset()
        self._past = None

    def step(self, token_ids: Tokens) -> Array:
        outputs = self.session.run(decoder_feeds(self.session.inputs, token_ids, past=self._past))
        self._past = {pair.past.name: outputs[pair.present.name] for pair in self.session.cache}
        self.length += token_ids.shape[1]
        return outputs["logits"]


class _OrtDecoder(Decoder):
    """The cache as ONNX Runtime's own values: what one call returns is given to the next without a copy."""

    def __init__(self, session: OrtSession) -> None:
        super().__init__(session)
        self._ort = session
        self._names = ["logits", *(pair.present.name for pair in session.cache)]
        self._value: Any = session.ort_value
        self._past: dict[str, Any] = {}

    def reset(self) -> None:
        super().reset()
        self._past = {}

    def step(self, token_ids: Tokens) -> Array:
        batch, sequence = token_ids.shape
        total = self.length + sequence
        feeds = dict(self._past)
        if not feeds:
            empty = decoder_feeds(self.session.inputs, token_ids)
            feeds = {pair.past.name: self._value(empty[pair.past.name]) for pair in self.session.cache}
        for spec in self.session.inputs:
            if spec.name == "input_ids":
                feeds[spec.name] = self._value(token_ids)
            elif spec.name == "attention_mask":
                feeds[spec.name] = self._value(np.ones((batch, total), spec.dtype))
            elif spec.name == "position_ids":
                positions = np.arange(self.length, total, dtype=spec.dtype)
                feeds[spec.name] = self._value(np.tile(positions, (batch, 1)))
            elif spec.name == "use_cache_branch":
                feeds[spec.name] = self._value(np.array([self.length > 0]))
            elif spec.name not in feeds:
                # Says which input it is and what to do.
                decoder_feeds(self.session.inputs, token_ids)
        values = self._ort.run_values(feeds, self._names)
        self._past = {
            pair.past.name: value for pair, value in zip(self.session.cache, values[1:], strict=True)
        }
        self.length = total
        logits: Array = values[0].numpy()
        return logits


def open_decoder(session: Session) -> Decoder:
    """The fastest decoder for a session.

    Raises:
        FeedError: The model has no KV cache or no logits.
    """
    return _OrtDecoder(session) if isinstance(session, OrtSession) else _ArrayDecoder(session)


def generate(
    session: Session, prompt: list[int], *, max_new_tokens: int, stop: Collection[int] = ()
) -> Iterator[int]:
    """Greedy continuation of a prompt, token by token.

    Args:
        session: An open decoder.
        prompt: Token ids; at least one.
        max_new_tokens: Upper bound of tokens.
        stop: Tokens that end the text; they are not given back.

    Raises:
        BadInputError: The prompt is empty.
    """
    if not prompt:
        raise BadInputError("prompt", got="no tokens", expected="at least one")
    decoder = open_decoder(session)
    tokens = np.array([prompt], np.int64)
    for _ in range(max_new_tokens):
        token = int(decoder.step(tokens)[0, -1].argmax())
        if token in stop:
            return
        yield token
        tokens = np.array([[token]], np.int64)


@dataclasses.dataclass(frozen=True)
class ScoredWindow:
    """One window of a text under teacher forcing.

    Attributes:
        logits: (window - 1, vocabulary): each position's prediction of the next token.
        losses: (window - 1,): negative log-likelihood of the next token, in nats.
    """

    logits: Array
    losses: npt.NDArray[np.float64]


def score(session: Session, tokens: Tokens, *, window: int) -> Iterator[ScoredWindow]:
    """Scores a text in windows that do not overlap, each from an empty cache.

    Every backend is given the same tokens in the same windows, so results can be compared position by
    position. A rest of fewer than two tokens is left out.

    Args:
        session: An open decoder.
        tokens: (length,).
        window: Tokens in a window.
    """
    for begin in range(0, len(tokens), window):
        part = tokens[begin : begin + window]
        if len(part) < 2:
            return
        feeds = decoder_feeds(session.inputs, part[None])
        logits = session.run(feeds, ["logits"])["logits"][0, :-1].astype(np.float32)
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=-1, keepdims=True)
        normaliser = np.log(np.exp(shifted).sum(axis=-1))
        yield ScoredWindow(logits, normaliser - shifted[np.arange(len(part) - 1), part[1:]])


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text, and how far its predictions are from a reference's.

    Attributes:
        value: exp of the mean loss.
        low: Lower end of the 95 % confidence interval.
        high: Upper end. The interval takes windows as independent; it says how much another text of the
            same kind would move the value, and is wide for short texts. Differences between variants on
            the same text are much better known than that.
        tokens: Tokens predicted.
        windows: Windows scored.
        kl_to_reference: Mean KL(reference || model) over the positions, in nats; None without reference.
        top1_agreement: Share of positions with the reference's most likely token; None without reference.
    """

    value: float
    low: float
    high: float
    tokens: int
    windows: int
    kl_to_reference: float | None = None
    top1_agreement: float | None = None


def perplexity(
    session: Session,
    tokens: Tokens,
    *,
    window: int,
    reference_logits: Array | None = None,
    keep_logits: Array | None = None,
    on_window: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a text.

    Args:
        session: An open decoder.
        tokens: (length,).
        window: Tokens in a window.
        reference_logits: (tokens predicted, vocabulary), as ``keep_logits`` of the reference was filled.
        keep_logits: Filled with this model's logits; usually a memory-mapped file.
        on_window: Called with the number of windows done.

    Raises:
        BadInputError: The text or the window is shorter than two tokens, or the result is not a number.
    """
    if window < 2:
        raise BadInputError("perplexity: window", got=str(window), expected="at least two tokens")
    losses: list[npt.NDArray[np.float64]] = []
    divergences: list[float] = []
    agreements = position = 0
    for number, scored in enumerate(score(session, tokens, window=window), 1):
        count = len(scored.losses)
        losses.append(scored.losses)
        if keep_logits is not None:
            keep_logits[position : position + count] = scored.logits
        if reference_logits is not None:
            expected = np.asarray(reference_logits[position : position + count])
            ours = scored.logits.astype(np.float64)
            divergences += kl_divergence(expected.astype(np.float64), ours).tolist()
            agreements += int((expected.argmax(-1) == scored.logits.argmax(-1)).sum())
        position += count
        if on_window is not None:
            on_window(number)
    if not losses:
        raise BadInputError("perplexity", got=f"a text of {len(tokens)} tokens", expected="at least two")
    means = np.array([part.mean() for part in losses])
    weights = np.array([len(part) for part in losses])
    mean = float(np.average(means, weights=weights))
    # exp of more than 700 is beyond what a float holds, and a model that guesses has the logarithm of its
    # vocabulary.
    if not mean < 700:
        raise BadInputError(
            session.name,
            got=f"a mean loss of {mean:g} nats",
            expected="a perplexity that is a number",
            remedy="The model is broken",
        )
    error = 0.0
    if len(losses) > 1:
        variance = float(np.average((means - mean) ** 2, weights=weights)) / (len(losses) - 1)
        error = _t_quantile(len(losses) - 1) * math.sqrt(variance)
    return Perplexity(
        value=math.exp(mean),
        low=math.exp(mean - error),
        high=math.exp(min(mean + error, 700.0)),
        tokens=position,
        windows=len(losses),
        kl_to_reference=float(np.mean(divergences)) if divergences else None,
        top1_agreement=agreements / position if reference_logits is not None else None,
    )


def _t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution, from the usual table."""
    table = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.5 / freedom
