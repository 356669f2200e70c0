"""What a reference gave, on disk: candidates are compared with it while it is not even loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.errors import FeedError
from onnxsmith.package import TensorSpec
from onnxsmith.runtime.session import Array, Feeds, Session

if TYPE_CHECKING:
    from onnxsmith.runtime.components import Expected

__all__ = ["RecordedSession", "load_expected", "save_expected"]

_ARRAYS = "expected.npz"


class RecordedSession(Session):
    """The name and signature of a model that was run before. It cannot be run."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Takes what ``save_expected`` said of it."""
        self.inputs, self.outputs = _specs(facts["inputs"]), _specs(facts["outputs"])
        self.provider, self.name = facts["provider"], facts["name"]

    def _run(self, feeds: Feeds, outputs: Sequence[str]) -> dict[str, Array]:
        raise FeedError(self.name, got="a record of what it gave", expected="a model that is open")


def save_expected(
    sessions: Mapping[str, Session], expected: Expected, directory: Path
) -> dict[str, dict[str, Any]]:
    """Writes what references gave.

    Args:
        sessions: The references by component.
        expected: What they were fed and what they gave.
        directory: Where the arrays go.

    Returns:
        The rest, as plain data.
    """
    arrays: list[Array] = []
    found = {}
    for part, session in sessions.items():
        cases = [
            {
                "name": case.name,
                "feeds": {name: _keep(arrays, value) for name, value in case.feeds.items()},
                "tokens": None if case.tokens is None else _keep(arrays, case.tokens),
                "outputs": {name: _keep(arrays, value) for name, value in outputs.items()},
            }
            for case, outputs in expected[part]
        ]
        found[part] = {
            "name": session.name,
            "provider": session.provider,
            "inputs": [dataclasses.asdict(spec) for spec in session.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in session.outputs],
            "cases": cases,
        }
    named: dict[str, Any] = {str(number): array for number, array in enumerate(arrays)}
    np.savez(directory / _ARRAYS, **named)
    return found


def load_expected(
    directory: Path, facts: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Session], Expected]:
    """The opposite of ``save_expected``."""
    from onnxsmith.runtime.samples import Case

    sessions: dict[str, Session] = {part: RecordedSession(told) for part, told in facts.items()}
    with np.load(directory / _ARRAYS, allow_pickle=False) as stored:
        expected: Expected = {
            part: [
                (
                    Case(
                        case["name"],
                        {name: _kept(stored, place) for name, place in case["feeds"].items()},
                        None if case["tokens"] is None else _kept(stored, case["tokens"]),
                    ),
                    {name: _kept(stored, place) for name, place in case["outputs"].items()},
                )
                for case in told["cases"]
            ]
            for part, told in facts.items()
        }
    return sessions, expected


def _keep(arrays: list[Array], value: Array) -> list[Any]:
    """Remembers an array; the types that numpy does not know are stored as integers of their size."""
    name = str(value.dtype)
    plain = np.ascontiguousarray(value)
    arrays.append(plain.view(f"u{value.dtype.itemsize}") if value.dtype.kind == "V" else plain)
    return [len(arrays) - 1, name, list(value.shape)]


def _kept(stored: Mapping[str, Array], place: Sequence[Any]) -> Array:
    number, name, shape = place
    array = stored[str(number)].reshape(shape)
    if str(array.dtype) == name:
        return array
    import ml_dtypes

    return array.view(getattr(ml_dtypes, name))


def _specs(facts: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(s["name"], s["dtype"], None if s["shape"] is None else tuple(s["shape"])) for s in facts
    )
