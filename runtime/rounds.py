"""One round of a measurement, the same whoever runs it."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from onnxsmith.errors import BadInputError
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.samples import cases_for, decoder_feeds
from onnxsmith.runtime.sampling import Sampler, SamplingSettings
from onnxsmith.runtime.session import Array, Session
from onnxsmith.runtime.speculation import LookupSettings, speculative_calls

__all__ = ["LlmRound", "PlainRound", "Round", "round_of"]

# A round of a fast model is several calls, so that one hiccup of the machine is not the whole round.
_ROUND_S = 0.1
_MAX_CALLS = 200


class Round(abc.ABC):
    """A measurement that can be repeated. Times are in seconds.

    Attributes:
        kind: ``plain`` or ``llm``.
    """

    kind: ClassVar[str]

    @abc.abstractmethod
    def run(self) -> dict[str, list[float]]:
        """Measures once: name of the time to seconds, one for each call or token."""

    @abc.abstractmethod
    def feeds(self) -> Mapping[str, Array]:
        """Inputs of one call like those that are measured."""


def round_of(session: Session, settings: Mapping[str, Any], limits: Mapping[str, int]) -> Round:
    """Makes the inputs: the same ones for the same settings.

    Args:
        session: What is measured.
        settings: Those of ``BenchSettings``.
        limits: For integer inputs, one above the highest valid value.

    Raises:
        BadInputError: CUDA graphs of a decoder; or more tokens than the model can read.
    """
    _require_positions(session, settings)
    if session.cache:
        if settings.get("cuda_graph"):
            raise BadInputError(
                session.name,
                got="CUDA graphs for a decoder, whose cache grows",
                expected="a model whose shapes stay the same",
                remedy="Measure it without --cuda-graph",
            )
        return LlmRound(session, settings, limits)
    return PlainRound(session, settings, limits)


def _require_positions(session: Session, settings: Mapping[str, Any]) -> None:
    if session.positions is None:
        return
    prompt = len(settings.get("prompt") or ()) or settings["prompt_tokens"]
    more = settings["new_tokens"] if session.cache else 0
    if prompt + more > session.positions:
        raise BadInputError(
            session.name,
            got=f"{prompt} tokens" + (f" and {more} new ones" if more else ""),
            expected=f"at most {session.positions} together, its positions",
            remedy=f"Measure it with {max(session.positions - more, 1)} prompt tokens or fewer",
        )


class LlmRound(Round):
    """A prompt, then tokens one by one: ``first_token``, and ``token`` for each further one.

    With speculation a call gives several tokens, and each has its share of the call's time; ``token_calls``
    says how many calls there were.
    """

    kind = "llm"

    def __init__(self, session: Session, settings: Mapping[str, Any], limits: Mapping[str, int]) -> None:
        """Takes the prompt of the settings, or makes one of random tokens; see ``round_of``."""
        random = np.random.default_rng(settings["seed"])
        shape = (settings["batch"], settings["prompt_tokens"])
        self._session = session
        self._prompt = random.integers(0, limits.get("input_ids", 2), shape, dtype=np.int64)
        if settings.get("prompt"):
            self._prompt = np.repeat(np.array([settings["prompt"]], np.int64), settings["batch"], axis=0)
        self._speculation = LookupSettings.parse(settings.get("speculate") or "off")
        if self._speculation is not None and settings["batch"] > 1:
            raise BadInputError(
                f"{session.name}: speculation", got=f"{settings['batch']} rows", expected="one",
                remedy="Measure it with --batch 1",
            )  # fmt: skip
        self._decoder = open_decoder(session)
        self._new_tokens = settings["new_tokens"]

    def run(self) -> dict[str, list[float]]:
        """Measures one prompt and its continuation, from an empty cache."""
        decoder = self._decoder
        decoder.reset()
        if self._speculation is not None:
            return self._speculated(self._speculation) | {"prompt_tokens": [self._prompt.shape[1]]}
        times = []
        began = time.perf_counter()
        tokens = decoder.step(self._prompt, last_only=True)[:, -1].argmax(-1)[:, None]
        first = time.perf_counter()
        for _ in range(self._new_tokens - 1):
            before = time.perf_counter()
            tokens = decoder.step(tokens, last_only=True)[:, -1].argmax(-1)[:, None]
            times.append(time.perf_counter() - before)
        return {"first_token": [first - began], "token": times, "prompt_tokens": [self._prompt.shape[1]]}

    def _speculated(self, speculation: LookupSettings) -> dict[str, list[float]]:
        prompt = self._prompt[0].tolist()
        calls = speculative_calls(
            self._decoder, prompt, Sampler(SamplingSettings(), [prompt]), speculation,
            max_new_tokens=self._new_tokens,
        )  # fmt: skip
        began = time.perf_counter()
        next(calls)
        first = before = time.perf_counter()
        times: list[float] = []
        count = 0
        for tokens in calls:
            now = time.perf_counter()
            times += [(now - before) / len(tokens)] * len(tokens)
            before = now
            count += 1
        return {"first_token": [first - began], "token": times, "token_calls": [count]}

    def feeds(self) -> Mapping[str, Array]:
        """One decoded token behind the prompt: where a decoder spends its time."""
        empty = decoder_feeds(self._session.inputs, self._prompt)
        names = [pair.present.name for pair in self._session.cache]
        filled = self._session.run(empty, names)
        past = {pair.past.name: filled[pair.present.name] for pair in self._session.cache}
        return decoder_feeds(self._session.inputs, self._prompt[:, -1:], past=past)


class PlainRound(Round):
    """Some calls: ``latency`` of each."""

    kind = "plain"

    def __init__(self, session: Session, settings: Mapping[str, Any], limits: Mapping[str, int]) -> None:
        """Makes inputs of the wanted batch and length; see ``round_of``."""
        sizes = (settings["batch"], settings["prompt_tokens"])
        case = next(cases_for(session, limits=limits, samples=1, seed=settings["seed"], sizes=sizes))
        self._feeds = case.feeds
        self._call: Callable[[], object] = lambda: session.run(case.feeds)
        bind = settings.get("io_binding")
        if isinstance(session, OrtSession) and (session.device != "cpu" if bind is None else bind):
            self._call = session.bind(case.feeds).run
        self._calls = 0

    def run(self) -> dict[str, list[float]]:
        """Measures some calls: as many as the first round showed to take a tenth of a second."""
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < (self._calls or _MAX_CALLS):
            before = time.perf_counter()
            self._call()
            now = time.perf_counter()
            times.append(now - before)
            if not self._calls and now - began >= _ROUND_S:
                break
        self._calls = self._calls or len(times)
        return {"latency": times}

    def feeds(self) -> Mapping[str, Array]:
        """What is measured."""
        return self._feeds
