"""What came near a pattern of onnxscript and was not fused, and the condition that failed."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from onnxsmith.graph_passes.matching import label

__all__ = ["NearMisses"]

# A part of a pattern that is near: smaller ones are in any graph.
_LEAST_NODES, _LEAST_SHARE = 3, 0.6
_LONGEST_REASON = 200


@dataclasses.dataclass
class _Miss:
    fusion: str
    matched: int
    of: int
    reason: str
    place: ir.Node | None
    whole: bool = False

    @property
    def share(self) -> float:
        return 2.0 if self.whole else self.matched / self.of


class NearMisses:
    """Collects the best failed match at each node, as a tracer of onnxscript's rewriter.

    Attributes:
        fusion: The fusion that is being tried, which is how its misses are called. None: nothing is noted.
    """

    def __init__(self) -> None:
        self.fusion: str | None = None
        self._best: dict[ir.Node, _Miss] = {}
        # By identity; the pattern is kept so that no other takes its place.
        self._least: dict[int, tuple[Any, int]] = {}

    def _least_of(self, pattern: Any) -> int:
        known = self._least.get(id(pattern))
        if known is None:
            known = self._least[id(pattern)] = (pattern, max(_least_nodes(pattern), 1))
        return known[1]

    def log(self, rule: Any, graph: object, node: ir.Node, match: Any, status: Any) -> None:
        """Called by onnxscript for each rule and node, with what came of it."""
        del graph
        if self.fusion is None or status.name == "SUCCESS":
            return
        if status.name == "NO_MATCH":
            matched, reason, places = len(match.nodes), match.reason, match.failure_nodes_and_values
            deepest = getattr(match, _DEEPEST, None)
            if deepest is not None and deepest[0] > matched:
                matched, reason, places = deepest
            of = self._least_of(rule._target_pattern)
        else:
            # Each node of the pattern is there, and a condition on their operands is not met.
            matched = of = max(len(match.nodes), 1)
            reason, places = match.reason, match.failure_nodes_and_values
        if matched < _LEAST_NODES or matched / of < _LEAST_SHARE:
            return
        place = places[-1] if places else None
        whole = status.name != "NO_MATCH"
        self._keep(node, _Miss(self.fusion, matched, of, reason, _node_of(place), whole))

    def note(self, node: ir.Node, reason: str) -> None:
        """A match that is refused, although it is one."""
        if self.fusion is not None:
            self._keep(node, _Miss(self.fusion, 0, 1, reason, None, whole=True))

    def _keep(self, node: ir.Node, miss: _Miss) -> None:
        known = self._best.get(node)
        if known is None or (miss.share, miss.matched) > (known.share, known.matched):
            self._best[node] = miss

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Within, failed alternatives of a pattern are remembered, which onnxscript forgets."""
        from onnxscript.rewriter._basics import MatchResult

        abandon = MatchResult.abandon_current_match

        def remembering(self: Any) -> Any:
            matched, partial = self.num_matched_nodes(), self._partial_matches[-1]
            if matched > getattr(self, _DEEPEST, (0,))[0]:
                setattr(self, _DEEPEST, (matched, partial.reason, list(partial._failure_nodes_and_values)))
            return abandon(self)

        MatchResult.abandon_current_match = remembering  # type: ignore[method-assign]
        try:
            yield
        finally:
            MatchResult.abandon_current_match = abandon  # type: ignore[method-assign]

    def reasons(self) -> dict[str, str]:
        """Fusion and node to the reason, for the nodes that are still in a graph."""
        return {
            f"{miss.fusion} at {label(node)}": _sentence(miss)
            for node, miss in self._best.items()
            if node.graph is not None
        }


_DEEPEST = "_onnxsmith_deepest"
_NAMES = (
    (r"\b[Vv]alue \S+ (is|has)\b", r"a value \1"),
    (r'(?:ir\.)?%"[^"]*"', "a value"),
    (r"\{[^}]*\}?", ""),
    (r"\bunk__\d+\b", "?"),
)


def _sentence(miss: _Miss) -> str:
    text = " ".join(miss.reason.split()).rstrip(".").removeprefix("OpType mismatch: ")
    for pattern, plain in _NAMES:
        text = re.sub(pattern, plain, text)
    text = text[:1].lower() + text[1:_LONGEST_REASON] or "a condition on the operands is not met"
    if not miss.matched:
        return text
    where = f" at {miss.place.op_type}" if miss.place is not None else ""
    if miss.whole:
        return f"all {miss.matched} nodes are there, but{where}: {text}"
    return f"{miss.matched} nodes match, then{where}: {text}"


def _node_of(place: Any) -> ir.Node | None:
    return place.producer() if isinstance(place, ir.Value) else place


def _least_nodes(pattern: Any) -> int:
    """How many nodes a match takes at least: the smallest of alternatives counts."""
    counted: set[Any] = set()
    return sum(_nodes_of(value, counted) for value in pattern.outputs)


def _nodes_of(value: Any, counted: set[Any]) -> int:
    alternatives = getattr(value, "_values", None)
    if alternatives is None and hasattr(value, "_op_to_pattern"):
        alternatives = [pattern for _, pattern in value._op_to_pattern.values()]
    if alternatives is not None:
        tried = [(_nodes_of(one, seen), seen) for one in alternatives for seen in [set(counted)]]
        least, seen = min(tried, key=lambda pair: pair[0])
        counted |= seen
        return least
    if not hasattr(value, "producer"):
        return 0
    node = value.producer()
    if node is None or node in counted:
        return 0
    counted.add(node)
    return 1 + sum(_nodes_of(one, counted) for one in node.inputs if one is not None)
