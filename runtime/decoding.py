"""Token by token: the KV cache between calls, and generation."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError, FeedError
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.samples import decoder_feeds
from onnxsmith.runtime.session import Array, Session

__all__ = ["Decoder", "generate", "open_decoder"]

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
