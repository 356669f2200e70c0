"""Encoder-decoders token by token: the encoder once, the first decoder once, then the one with a cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import FeedError
from onnxsmith.runtime.session import Array, Session

__all__ = ["Seq2SeqDecoder", "generate_sequences"]

_ENCODER, _FIRST, _LATER = "encoder_model", "decoder_model", "decoder_with_past_model"


class Seq2SeqDecoder:
    """The three graphs of an encoder-decoder, with the cache between its steps."""

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        """Takes the open graphs by component.

        Raises:
            FeedError: One of the three is missing.
        """
        missing = [name for name in (_ENCODER, _FIRST, _LATER) if name not in sessions]
        if missing:
            raise FeedError(
                "encoder-decoder",
                got=f"no component {', '.join(missing)}",
                expected=f"{_ENCODER}, {_FIRST}, {_LATER}",
            )
        self._encoder, self._first, self._later = (sessions[name] for name in (_ENCODER, _FIRST, _LATER))
        self._states: dict[str, Array] = {}
        self._cache: dict[str, Array] = {}

    @property
    def encoder(self) -> Session:
        """The encoder, for its signature."""
        return self._encoder

    def encode(self, feeds: Mapping[str, Array]) -> None:
        """Reads an input, and forgets the one before."""
        self._states = {"encoder_hidden_states": self._encoder.run(feeds)["last_hidden_state"]}
        if "attention_mask" in feeds:
            self._states["encoder_attention_mask"] = feeds["attention_mask"]
        self._cache = {}

    def step(self, token_ids: npt.NDArray[np.int64]) -> Array:
        """Decodes tokens, (batch, sequence); gives logits, (batch, sequence, vocabulary)."""
        session = self._later if self._cache else self._first
        known = self._states | self._cache | {"input_ids": token_ids}
        outputs = session.run({spec.name: known[spec.name] for spec in session.inputs})
        self._cache |= {
            f"past_key_values.{name.removeprefix('present.')}": value
            for name, value in outputs.items()
            if name.startswith("present.")
        }
        return outputs["logits"]


def generate_sequences(
    decoder: Seq2SeqDecoder,
    feeds: Mapping[str, Array],
    start: npt.NDArray[np.int64],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    choose: Callable[[int, Array], Array] | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """The most likely tokens, greedily, for each row.

    Args:
        decoder: The model.
        feeds: What the encoder takes.
        start: The first tokens of the decoder, (batch, length).
        max_new_tokens: Upper bound.
        stop: Ids that end a row; it goes on with the first of them.
        choose: Changes the last logits (batch, vocabulary) of a step, by number, before the largest is taken.

    Yields:
        One token for each row, (batch,).
    """
    decoder.encode(feeds)
    ids = start
    done = np.zeros(len(start), np.bool_)
    for number in range(max_new_tokens):
        logits = decoder.step(ids)[:, -1]
        tokens = (logits if choose is None else choose(number, logits)).argmax(-1)
        if stop:
            tokens = np.where(done, next(iter(stop)), tokens)
            done |= np.isin(tokens, list(stop))
        yield tokens
        if done.all():
            return
        ids = tokens[:, None]
