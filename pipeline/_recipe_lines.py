"""Where a key of a recipe stands in its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["line_of", "line_of_toml", "stands"]


def stands(data: Any, location: Sequence[int | str]) -> bool:
    """Whether keys and indices lead to something."""
    for part in location:
        is_key = isinstance(data, Mapping) and part in data
        if not is_key and not (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            return False
        data = data[part]
    return True


def line_of(tree: Any, location: Sequence[int | str]) -> int:
    """The line of a key in the YAML tree, or of the nearest mapping that encloses it."""
    import yaml

    node, line = tree, tree.start_mark.line + 1
    for part in location:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line, node = found.start_mark.line + 1, found
        if found is None:
            break
    return int(line)


def line_of_toml(text: str, location: Sequence[int | str]) -> int:
    """The line of a key in a text of TOML, or of the nearest table that encloses it.

    tomllib does not say where what it read stands. But no key is there before the statement that sets it.
    """
    import tomllib

    while not stands(tomllib.loads(text), location):
        location = location[:-1]
    lines = text.splitlines(keepends=True)

    def read(count: int) -> tuple[int, dict[str, Any]]:
        """What the first lines say, with those that end the last statement."""
        while True:
            try:
                return count, tomllib.loads("".join(lines[:count]))
            except tomllib.TOMLDecodeError:
                count += 1

    first, last = 1, max(len(lines), 1)
    while first < last:
        middle = (first + last) // 2
        end, data = read(middle)
        first, last = (first, middle) if stands(data, location) else (end + 1, last)
    return first
