"""What a diagnosis finds: what is there, what it costs, and what remedies it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["Finding", "Kind"]

Kind = Literal["wrong", "slow", "large", "note"]
"""``wrong``: results are not what they should be; the others cost time or bytes, or are good to know."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a rule found.

    Attributes:
        rule: The rule's name.
        kind: See ``Kind``.
        what: What is there, in a sentence without its full stop.
        why: What it costs, and why.
        remedy: What to do about it.
        nodes: Names of nodes or weights, the first few.
        count: How many there are.
        passes: Passes with parameters that remedy it; empty where a pass cannot.
        exact: Whether what the passes make computes the same but for the rounding of its own type.
        optional: Whether the remedy is a choice and not a repair: it is measured, but applied only if asked
            for.
        component: The graph, in a model of several.
    """

    rule: str
    kind: Kind
    what: str
    why: str
    remedy: str
    nodes: tuple[str, ...] = ()
    count: int = 0
    passes: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    exact: bool = True
    optional: bool = False
    component: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = dataclasses.asdict(self)
        plain["passes"] = [{"name": name, "parameters": dict(values)} for name, values in self.passes]
        return plain
