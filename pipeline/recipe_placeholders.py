"""Placeholders in recipes: ``${env:NAME}``, an environment variable; ``${matrix:KEY}``, a value of a matrix.

Nothing else is replaced, so a prompt may have dollars and braces; ``$${env:NAME}`` stands for itself.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["PlaceholderError", "combinations", "fill_environment", "fill_matrix", "matrix_keys", "slug"]

_ENV = re.compile(r"(\$?)\$\{env:([^}]*)\}")
_NAME_AND_DEFAULT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_MATRIX = re.compile(r"\$\{matrix:([^}]*)\}")


class PlaceholderError(Exception):
    """A placeholder that cannot be filled.

    Attributes:
        place: Keys and numbers that lead to its value.
        got: What is wrong.
        expected: What would be right.
        remedy: What to do.
    """

    def __init__(self, place: Sequence[int | str], *, got: str, expected: str, remedy: str | None) -> None:
        """Takes what the message is made of."""
        super().__init__(got)
        self.place, self.got, self.expected, self.remedy = tuple(place), got, expected, remedy


def fill_environment(data: Any, place: tuple[int | str, ...] = ()) -> Any:
    """Plain data with ``${env:NAME}`` and ``${env:NAME:-default}`` in its texts replaced.

    Raises:
        PlaceholderError: A variable without a default is not set, or the placeholder names none.
    """
    if isinstance(data, dict):
        return {key: fill_environment(value, (*place, key)) for key, value in data.items()}
    if isinstance(data, list):
        return [fill_environment(value, (*place, number)) for number, value in enumerate(data)]
    if not isinstance(data, str):
        return data

    def filled(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        named = _NAME_AND_DEFAULT.fullmatch(match[2])
        if named is None:
            raise PlaceholderError(
                place, got=match[0], expected="${env:NAME} or ${env:NAME:-default}", remedy=None
            )
        value = os.environ.get(named[1], named[2])
        if value is None:
            raise PlaceholderError(
                place,
                got=f"the environment variable {named[1]} is not set",
                expected="a value",
                remedy=f"Set it, or give a default: ${{env:{named[1]}:-...}}",
            )
        return value

    return _ENV.sub(filled, data)


def matrix_keys(data: Any) -> Iterator[str]:
    """The keys that ``${matrix:KEY}`` stand for in plain data, in order, each as often as it is there."""
    if isinstance(data, Mapping):
        for value in data.values():
            yield from matrix_keys(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from matrix_keys(value)
    elif isinstance(data, str):
        yield from _MATRIX.findall(data)


def fill_matrix(data: Any, values: Mapping[str, Any]) -> Any:
    """Plain data with ``${matrix:KEY}`` replaced; a text that is nothing else becomes the value itself."""
    if isinstance(data, Mapping):
        return {key: fill_matrix(value, values) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [fill_matrix(value, values) for value in data]
    if not isinstance(data, str):
        return data
    alone = _MATRIX.fullmatch(data)
    if alone is not None:
        return values[alone[1]]
    return _MATRIX.sub(lambda match: str(values[match[1]]), data)


def combinations(matrix: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each key; the last key changes fastest."""
    for values in itertools.product(*matrix.values()):
        yield dict(zip(matrix, values, strict=True))


def slug(value: Any) -> str:
    """A value as a part of a name."""
    text = re.sub(r"[^A-Za-z0-9.]+", "_", str(value)).strip("_.")
    return text[-24:] or "x"
