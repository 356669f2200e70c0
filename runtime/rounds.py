"""One round of a measurement, the same whoever runs it."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from onnxsmith.package import ModelPackage
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.samples import cases_for, value_limits
from onnxsmith.runtime.session import Session

__all__ = ["LlmRound", "PlainRound", "Round"]


class Round(abc.ABC):
    """A measurement that can be repeated. Times are in seconds."""

    @classmethod
    @abc.abstractmethod
    def prepare(
        cls,
        session: Session,
        package: ModelPackage | None,
        settings: Mapping[str, Any],
        limits: Mapping[str, int] | None = None,
    ) -> Self:
        """Makes the inputs: the same ones for the same settings."""

    @abc.abstractmethod
    def run(self) -> dict[str, float]:
        """Measures once: name of the time to seconds."""


class LlmRound(Round):
    """A prompt, then tokens one by one: ``first_token`` and ``decode`` (all further tokens together)."""

    def __init__(self, session: Session, prompt: Any, new_tokens: int) -> None:
        """See ``prepare``."""
        self._decoder = open_decoder(session)
        self._prompt = prompt
        self._new_tokens = new_tokens

    @classmethod
    def prepare(
        cls,
        session: Session,
        package: ModelPackage | None,
        settings: Mapping[str, Any],
        limits: Mapping[str, int] | None = None,
    ) -> Self:
        """Makes a prompt of random tokens."""
        known = limits if limits is not None else value_limits(package) if package else {}
        random = np.random.default_rng(settings["seed"])
        shape = (settings["batch"], settings["prompt_tokens"])
        prompt = random.integers(0, known.get("input_ids", 2), shape, dtype=np.int64)
        return cls(session, prompt, settings["new_tokens"])

    def run(self) -> dict[str, float]:
        """Measures one prompt and its continuation, from an empty cache."""
        decoder = self._decoder
        decoder.reset()
        began = time.perf_counter()
        tokens = decoder.step(self._prompt)[:, -1].argmax(-1)[:, None]
        first = time.perf_counter()
        for _ in range(self._new_tokens - 1):
            tokens = decoder.step(tokens)[:, -1].argmax(-1)[:, None]
        return {"first_token": first - began, "decode": time.perf_counter() - first}


class PlainRound(Round):
    """One call: ``latency``."""

    def __init__(self, session: Session, feeds: Mapping[str, Any]) -> None:
        """See ``prepare``."""
        self._session = session
        self._feeds = feeds

    @classmethod
    def prepare(
        cls,
        session: Session,
        package: ModelPackage | None,
        settings: Mapping[str, Any],
        limits: Mapping[str, int] | None = None,
    ) -> Self:
        """Makes inputs of the wanted batch and length."""
        known = limits if limits is not None else value_limits(package) if package else {}
        case = next(
            cases_for(
                session,
                limits=known,
                samples=1,
                seed=settings["seed"],
                sizes=(settings["batch"], settings["prompt_tokens"]),
            )
        )
        return cls(session, case.feeds)

    def run(self) -> dict[str, float]:
        """Measures one call."""
        began = time.perf_counter()
        self._session.run(self._feeds)
        return {"latency": time.perf_counter() - began}
