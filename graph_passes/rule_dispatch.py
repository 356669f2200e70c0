"""Rules of onnxscript, each tried on those nodes alone in which its pattern can end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxsmith.graph_passes.matching import reads_dequantized

if TYPE_CHECKING:
    from onnxsmith.graph_passes.near_misses import NearMisses

__all__ = ["rules_by_operator"]

_PRODUCTS = frozenset({"FusedMatMul", "Gemm", "MatMul"})
_LOCK = threading.RLock()
_IN_INTEGERS = "a product of dequantized values stays, which runtimes compute in integers"


@contextlib.contextmanager
def rules_by_operator(near: NearMisses | None = None) -> Iterator[None]:
    """Within, in one thread at a time, each set of rules looks up by operator which to try on a node.

    The matcher sets up a match for each pair of rule and node before it looks at the operator, and indexes
    the whole graph for a rule with several ends: most of the time of the clean-up, and of fusion.

    Args:
        near: Told of each rule that does not match; None: nobody is.
    """
    from onnxscript.rewriter._rewrite_rule import RewriteRuleSet

    with _LOCK:
        yield from _looked_up(RewriteRuleSet, near)


def _looked_up(sets: Any, near: NearMisses | None) -> Iterator[None]:
    apply = sets._apply_to_graph_or_function

    def looked_up(self: Any, model: ir.Model, graph: Any, **options: Any) -> Any:
        if isinstance(self.rules[0], _ByOperator):
            return apply(self, model, graph, **options)
        return apply(sets([_ByOperator(self.rules, near)]), model, graph, **options)

    sets._apply_to_graph_or_function = looked_up
    try:
        yield
    finally:
        sets._apply_to_graph_or_function = apply


class _ByOperator:
    """Many rules as one. What is asked of a rule after a match is answered by the one that matched."""

    def __init__(self, rules: Sequence[Any], near: NearMisses | None) -> None:
        self._all = rules
        self._near = near
        self._matched = rules[0]
        self._by_operator: dict[tuple[str, str], list[Any]] = {}

    @property
    def name(self) -> str | None:
        """Of the rule that matched last: it is noted at the nodes that the rule made."""
        return self._matched.name  # type: ignore[no-any-return]

    @property
    def remove_nodes(self) -> bool:
        """Whether the rule that matched last takes the matched nodes away."""
        return bool(self._matched.remove_nodes)

    @property
    def as_function(self) -> bool:
        """Whether the rule that matched last keeps the matched nodes as a function."""
        return bool(self._matched.as_function)

    def graph_pre_visitor(self) -> None:
        for rule in self._all:
            if rule.graph_pre_visitor:
                rule.graph_pre_visitor()

    def graph_post_visitor(self) -> None:
        for rule in self._all:
            if rule.graph_post_visitor:
                rule.graph_post_visitor()

    def try_rewrite(
        self, model: ir.Model, graph: Any, node: ir.Node, *, verbose: int | None = None, tracer: Any = None
    ) -> Any:
        operator = node.domain, node.op_type
        rules = self._by_operator.get(operator)
        if rules is None:
            rules = [rule for rule in self._all if _ends_in(rule, node)]
            self._by_operator[operator] = rules
        for rule in rules:
            found = rule.try_rewrite(model, graph, node, verbose=verbose, tracer=tracer or self._near)
            if found is None:
                continue
            if self._near is not None and any(_is_in_integers(one) for one in found.match.nodes):
                self._near.note(node, _IN_INTEGERS)
                continue
            self._matched = rule
            return found
        return None


def _ends_in(rule: Any, node: ir.Node) -> bool:
    last = rule._target_pattern.output_nodes[0]
    return bool(last.op.matches(node.op_type) and last.domain.matches(node.domain))


def _is_in_integers(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS and reads_dequantized(node)
