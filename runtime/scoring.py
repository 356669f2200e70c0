"""How well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from onnxsmith.comparison import kl_divergence
from onnxsmith.errors import BadInputError
from onnxsmith.runtime.samples import decoder_feeds
from onnxsmith.runtime.session import Array, Session

__all__ = ["Perplexity", "ScoredWindow", "perplexity", "score", "score_texts"]

Floats = npt.NDArray[np.float64]
# The number of a text, and tokens of it.
_Window = tuple[int, npt.NDArray[np.int64]]

# Positions that are worked on at a time: float64 copies of a whole window's logits would take gigabytes
# for a large vocabulary.
_CHUNK_POSITIONS = 32
# Short windows share a call until it has so many tokens. A matrix product of more rows is no faster on a
# CPU: see docs/evaluating.md for what was measured.
_CALL_TOKENS = 512
# Of one call, whoever asks: logits are the largest tensor of a decoder by far.
_LOGITS_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class ScoredWindow:
    """One window of a text under teacher forcing.

    Attributes:
        logits: (window - 1, vocabulary), float32: each position's prediction of the next token.
        targets: (window - 1,): the tokens that really come next.
        text: Which of several texts it is of.
    """

    logits: Array
    targets: npt.NDArray[np.int64]
    text: int = 0

    def losses(self) -> Floats:
        """(window - 1,): negative log-likelihood of each next token, in nats."""
        return _losses(self.logits, self.targets)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    The 95 % intervals take tokens as independent, as llama.cpp's ``perplexity`` does. That of the increase
    is of paired differences, token by token, and so is far narrower than that of the value.

    Attributes:
        value: exp of the mean loss.
        low: Lower end of its interval.
        high: Upper end.
        tokens: Tokens predicted.
        windows: Windows scored.
        increase_pct: Increase over the reference, in percent; None without a reference, like all below.
        increase_low_pct: Lower end of its interval.
        increase_high_pct: Upper end.
        kl_to_reference: Mean KL(reference || model) over the positions, in nats.
        top1_agreement: Share of positions with the reference's most likely token.
    """

    value: float
    low: float
    high: float
    tokens: int
    windows: int
    increase_pct: float | None = None
    increase_low_pct: float | None = None
    increase_high_pct: float | None = None
    kl_to_reference: float | None = None
    top1_agreement: float | None = None


def score(
    session: Session, tokens: npt.NDArray[np.int64], *, window: int, batch: int | None = None
) -> Iterator[ScoredWindow]:
    """Runs a text through a decoder in windows that do not overlap, each from an empty cache.

    Every backend is given the same tokens in the same windows, so results can be compared position by
    position. A rest of fewer than two tokens is left out. Only the logits are asked for, so that a cache
    which nobody reads is not copied.

    Args:
        session: An open decoder.
        tokens: (length,).
        window: Tokens in a window.
        batch: Windows in one call, at the most; see ``score_texts``.

    Yields:
        The windows, in their order.
    """
    yield from score_texts(session, [tokens], window=window, batch=batch)


def score_texts(
    session: Session,
    texts: Sequence[npt.NDArray[np.int64]],
    *,
    window: int,
    batch: int | None = None,
) -> Iterator[ScoredWindow]:
    """Runs texts through a decoder in windows, several of them in one call; see ``score``.

    Windows of about the same length share a call, and the shorter ones are padded on the right, where
    nothing that counts can see it. What a window gives does not depend on what it is batched with, but for
    rounding. Where it would, because the graph quantizes activations by their range, each window has a call
    of its own.

    Args:
        session: An open decoder.
        texts: (length,) each.
        window: Tokens in a window.
        batch: Windows in one call, at the most; as many as gain something where None. The logits of a call
            are bounded in any case.

    Yields:
        The windows, the longest first; those of a text in their order.

    Raises:
        BadInputError: A window is longer than the model can read.
    """
    windows = [
        (number, part)
        for number, tokens in enumerate(texts)
        for part in (tokens[begin : begin + window] for begin in range(0, len(tokens), window))
        if len(part) >= 2
    ]
    longest = max((len(part) for _, part in windows), default=0)
    if session.positions is not None and longest > session.positions:
        raise BadInputError(
            session.name,
            got=f"a window of {longest} tokens",
            expected=f"at most {session.positions}, its positions",
            remedy="Take a shorter window",
        )
    windows.sort(key=lambda item: -len(item[1]))
    for group in _calls(session, windows, batch):
        ids, mask = _padded([part for _, part in group], rows=_fixed_rows(session) or len(group))
        logits = session.run(decoder_feeds(session.inputs, ids, mask=mask), ["logits"])["logits"]
        for row, (number, part) in zip(logits, group, strict=False):
            yield ScoredWindow(row[: len(part) - 1].astype(np.float32, copy=False), part[1:], number)


def _calls(session: Session, windows: Sequence[_Window], batch: int | None) -> Iterator[Sequence[_Window]]:
    """Windows that share a call. They come sorted by length, the longest first."""
    most = min(_fixed_rows(session) or len(windows), batch or len(windows))
    if session.rows_interact:
        most = 1
    vocabulary = next(s.shape[-1] for s in session.outputs if s.name == "logits" and s.shape)
    # A vocabulary that the graph does not tell is taken for a large one.
    row_bytes = 4 * (vocabulary if isinstance(vocabulary, int) else 1 << 18)
    tokens = _LOGITS_BYTES // row_bytes
    if batch is None:
        tokens = min(tokens, _CALL_TOKENS)
    pads = any(spec.name == "attention_mask" for spec in session.inputs)
    begin = 0
    while begin < len(windows):
        length = len(windows[begin][1])
        count = max(1, min(most, tokens // length))
        group = windows[begin : begin + count]
        if not pads:
            group = [item for item in group if len(item[1]) == length]
        alike = session.most_alike
        if alike is not None:
            # What is padded to more positions than it has must not go through another branch.
            group = [item for item in group if (len(item[1]) > alike) == (length > alike)]
        yield group
        begin += len(group)


def _fixed_rows(session: Session) -> int | None:
    """How many rows the graph takes, where it takes no others."""
    for spec in session.inputs:
        if spec.name == "input_ids" and spec.shape and isinstance(spec.shape[0], int):
            return spec.shape[0]
    return None


def _padded(
    parts: Sequence[npt.NDArray[np.int64]], *, rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Token ids and mask, (rows, longest); the last part fills the rows that are left."""
    length = max(map(len, parts))
    ids = np.zeros((rows, length), np.int64)
    mask = np.zeros((rows, length), np.bool_)
    for row in range(rows):
        part = parts[min(row, len(parts) - 1)]
        ids[row, : len(part)], mask[row, : len(part)] = part, True
    return ids, mask


def perplexity(
    session: Session,
    tokens: npt.NDArray[np.int64],
    *,
    window: int,
    batch: int | None = None,
    reference_logits: Array | None = None,
    keep_logits: Array | None = None,
    on_window: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a text.

    Args:
        session: An open decoder.
        tokens: (length,).
        window: Tokens in a window.
        batch: Windows in one call, at the most; see ``score_texts``.
        reference_logits: (tokens predicted, vocabulary), as ``keep_logits`` of the reference was filled.
        keep_logits: Filled with this model's logits; usually a memory-mapped file.
        on_window: Called with the number of windows done.

    Raises:
        BadInputError: The text or the window is shorter than two tokens, the window is longer than the model
            can read, or the result is not a number.
    """
    if window < 2:
        raise BadInputError("perplexity: window", got=str(window), expected="at least two tokens")
    if batch is not None and batch < 1:
        raise BadInputError("perplexity: batch", got=str(batch), expected="at least 1")
    losses: list[Floats] = []
    differences: list[Floats] = []
    divergence = 0.0
    agreements = position = 0
    for number, scored in enumerate(score(session, tokens, window=window, batch=batch), 1):
        count = len(scored.targets)
        losses.append(scored.losses())
        if keep_logits is not None:
            keep_logits[position : position + count] = scored.logits
        if reference_logits is not None:
            expected = reference_logits[position : position + count]
            differences.append(losses[-1] - _losses(expected, scored.targets))
            for part in _chunks(count):
                ours, theirs = scored.logits[part], np.asarray(expected[part])
                divergence += float(kl_divergence(theirs.astype(np.float64), ours.astype(np.float64)).sum())
                agreements += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        position += count
        if on_window is not None:
            on_window(number)
    if not losses:
        raise BadInputError("perplexity", got=f"a text of {len(tokens)} tokens", expected="at least two")
    mean, low, high = _interval(np.concatenate(losses))
    # exp of more than 700 is beyond what a float holds, and a model that guesses has the logarithm of its
    # vocabulary.
    if not mean < 700:
        raise BadInputError(
            session.name,
            got=f"a mean loss of {mean:g} nats",
            expected="a perplexity that is a number",
            remedy="The model is broken",
        )
    result = Perplexity(math.exp(mean), math.exp(low), math.exp(min(high, 700.0)), position, len(losses))
    if reference_logits is None:
        return result
    increases = [100 * math.expm1(min(end, 700.0)) for end in _interval(np.concatenate(differences))]
    return dataclasses.replace(
        result,
        increase_pct=increases[0],
        increase_low_pct=increases[1],
        increase_high_pct=increases[2],
        kl_to_reference=divergence / position,
        top1_agreement=agreements / position,
    )


def _losses(logits: Array, targets: npt.NDArray[np.int64]) -> Floats:
    losses = np.empty(len(targets), np.float64)
    for part in _chunks(len(targets)):
        shifted = np.asarray(logits[part]).astype(np.float64)
        shifted -= shifted.max(axis=-1, keepdims=True)
        wanted = shifted[np.arange(len(shifted)), targets[part]]
        losses[part] = np.log(np.exp(shifted).sum(axis=-1)) - wanted
    return losses


def _chunks(count: int) -> Iterator[slice]:
    for begin in range(0, count, _CHUNK_POSITIONS):
        yield slice(begin, min(begin + _CHUNK_POSITIONS, count))


def _interval(values: Floats) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval from the standard error."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean, mean
    error = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - error, mean + error
