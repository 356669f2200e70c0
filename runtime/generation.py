"""Continuing prompts: one or a batch, greedy or drawn, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from onnxsmith.errors import BadInputError
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.sampling import Sampler, SamplingSettings
from onnxsmith.runtime.session import Session
from onnxsmith.runtime.speculation import LookupSettings, speculative_calls

__all__ = ["generate", "generate_batch", "room_for"]

# The cache is made for at most so many tokens at once; it grows where a text gets longer.
_MAX_RESERVED_TOKENS = 4096


def generate(
    session: Session,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: SamplingSettings | None = None,
    speculation: LookupSettings | None = None,
) -> Iterator[int]:
    """Continues one prompt, token by token.

    Args:
        session: An open decoder.
        prompt: Token ids; at least one.
        max_new_tokens: Upper bound of tokens; the text ends too where the model has no more positions.
        stop: Tokens that end the text; they are not given back.
        sampling: How tokens are chosen; greedy where None.
        speculation: Whether calls of the model check guesses of several tokens, and how those are made; see
            ``runtime.speculation``. The text stays the same.

    Raises:
        BadInputError: The prompt is empty, or longer than the model can read.
    """
    if speculation is not None:
        max_new_tokens = room_for(session, [prompt], max_new_tokens)
        room = len(prompt) + min(max_new_tokens, _MAX_RESERVED_TOKENS) + speculation.tokens
        decoder = open_decoder(session, capacity=room)
        sampler = Sampler(sampling or SamplingSettings(), [prompt])
        calls = speculative_calls(decoder, prompt, sampler, speculation, max_new_tokens=max_new_tokens)
        for token in itertools.chain.from_iterable(calls):
            if token in stop:
                return
            yield token
        return
    for tokens in generate_batch(
        session, [prompt], max_new_tokens=max_new_tokens, stop=stop, sampling=sampling
    ):
        if tokens[0] is not None:
            yield tokens[0]


def generate_batch(
    session: Session,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: SamplingSettings | None = None,
) -> Iterator[list[int | None]]:
    """Continues several prompts at once.

    Shorter ones are padded on the left, or on the right where attention takes lengths of rows. A row's text
    is the one that it would have alone, up to rounding in kernels that depend on the batch.

    Args:
        session: An open decoder.
        prompts: Token ids; at least one for each row.
        max_new_tokens: Upper bound of tokens for each row; all rows end where the longest one has no more
            positions.
        stop: Tokens that end a row; they are not given back.
        sampling: How tokens are chosen; greedy where None.

    Yields:
        The next token of each row; None for rows that have ended.

    Raises:
        BadInputError: A prompt is empty, or longer than the model can read.
    """
    max_new_tokens = room_for(session, prompts, max_new_tokens)
    longest = max(len(prompt) for prompt in prompts)
    decoder = open_decoder(session, capacity=longest + min(max_new_tokens, _MAX_RESERVED_TOKENS))
    sampler = Sampler(sampling or SamplingSettings(), list(prompts))
    # Padding is hidden, so any token will do that the model knows.
    missing = [(longest - len(p)) * [p[0]] for p in prompts]
    if session.reads_lengths:
        rows = [list(p) + pad for p, pad in zip(prompts, missing, strict=True)]
    else:
        rows = [pad + list(p) for p, pad in zip(prompts, missing, strict=True)]
    tokens = np.array(rows, np.int64)
    counts = np.array([[len(p)] for p in prompts])
    places = np.arange(longest)[None]
    mask = places < counts if session.reads_lengths else places >= longest - counts
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        ends = bool(mask[:, -1].all())
        logits = decoder.step(tokens, mask, last_only=ends)
        chosen = sampler.choose(logits[:, -1] if ends else logits[np.arange(len(rows)), counts[:, 0] - 1])
        ended = [done or int(token) in stop for done, token in zip(ended, chosen, strict=True)]
        if all(ended):
            return
        yield [None if done else int(token) for done, token in zip(ended, chosen, strict=True)]
        tokens, mask = chosen[:, None], np.ones((len(prompts), 1), np.bool_)


def room_for(session: Session, prompts: Sequence[list[int]], max_new_tokens: int) -> int:
    """How many tokens may follow the prompts of a batch: no more than the model has positions for.

    Args:
        session: An open decoder.
        prompts: Token ids of each row.
        max_new_tokens: Upper bound.

    Raises:
        BadInputError: There is no prompt, or one is empty, or longer than the model can read.
    """
    _require_tokens(prompts)
    if session.positions is None:
        return max_new_tokens
    longest = max(len(prompt) for prompt in prompts)
    if longest >= session.positions:
        raise BadInputError(
            session.name,
            got=f"a prompt of {longest} tokens",
            expected=f"at most {session.positions - 1}: it has {session.positions} positions for prompt and "
            "answer together",
            remedy="Shorten the prompt",
        )
    return min(max_new_tokens, session.positions - longest)


def _require_tokens(prompts: Sequence[list[int]]) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            where = "prompt" if len(prompts) == 1 else f"prompt {number + 1}"
            raise BadInputError(where, got="no tokens", expected="at least one")
    if not prompts:
        raise BadInputError("prompts", got="none", expected="at least one")
