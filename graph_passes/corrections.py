"""What onnxscript does wrong or cannot do, taken out of it while it works for us."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir

from onnxsmith.graph_passes.attention_guards import guard_biases, guard_results
from onnxsmith.graph_passes.matching import constant_integers
from onnxsmith.graph_passes.near_misses import NearMisses
from onnxsmith.graph_passes.rule_dispatch import rules_by_operator

__all__ = ["corrected_onnxscript"]

_LOCK = threading.RLock()
_ABSENT = object()


@contextlib.contextmanager
def corrected_onnxscript(model: ir.Model, near: NearMisses | None = None) -> Iterator[None]:
    """Corrects onnxscript for one model, in one thread at a time.

    - Its folding of SplitToSequence fails where the size of the parts is a number that is not known yet,
      writes forms of Split that came with operator sets 13 and 18, and drops axes where ONNX does not.
    - Its folding of ConcatFromSequence writes an Unsqueeze with axes as an input, which came with opset 13.
    - Its fusions into GroupQueryAttention drop the attention mask, on the assumption that it is all ones: a
      padded batch would silently compute something else. Where the mask allows it, the exporter writes
      GroupQueryAttention itself.
    - Those into MultiHeadAttention take a rotation of a part of each head for one of the whole, whatever
      Reshape comes after attention for one to rows, and whatever is added to a projection for a bias.
    - It asks every rule about every node: see ``rules_by_operator``.
    - Its fusions begin with the same clean-up twice, also where the first has found nothing to do.

    Args:
        model: The model.
        near: Told of what was nearly fused, and of fusions that are not made.
    """
    from onnxscript.optimizer import _constant_folding
    from onnxscript.rewriter.ort_fusions import _core

    evaluators, own = _constant_folding.registry.op_evaluators, vars(_core)
    opset = model.opset_imports.get("", 0)
    folded = {
        ("", "SplitToSequence"): [
            dataclasses.replace(one, function=_where_splits_are_known(one.function, opset))
            for one in evaluators["", "SplitToSequence"]
        ]
    }
    if opset < 13:
        folded["", "ConcatFromSequence"] = []
    fusions = {name: function for name, function in own.items() if name.startswith("fuse_")} | {
        "fuse_gqa": _fuse_nothing,
        "fuse_qkv_gqa": _fuse_nothing,
        "fuse_mha1": _after(guard_results, _unless_partly_rotated(own["fuse_mha1"])),
        "fuse_mha2": _unless_partly_rotated(own["fuse_mha2"]),
        "fuse_mha_bias": _after(guard_biases, own["fuse_mha_bias"]),
    }
    del fusions["fuse_xformers"]
    if near is not None:
        fusions = {
            name: _watched(function, near, name.removeprefix("fuse_")) for name, function in fusions.items()
        }
        fusions["rewrite"] = _watched(own["rewrite"], near, "other_rules")
    fusions["optimize"] = _unless_it_did_nothing(own["optimize"])
    with _LOCK, contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(evaluators, folded))
        stack.enter_context(_replaced(own, fusions))
        stack.enter_context(rules_by_operator(near))
        yield


@contextlib.contextmanager
def _replaced(mapping: Any, entries: Mapping[Any, Any]) -> Iterator[None]:
    kept = {key: mapping.get(key, _ABSENT) for key in entries}
    mapping.update(entries)
    try:
        yield
    finally:
        for key, value in kept.items():
            if value is _ABSENT:
                del mapping[key]
            else:
                mapping[key] = value


def _where_splits_are_known(fold: Callable[..., Any], opset: int) -> Callable[..., Any]:
    def guarded(node: ir.Node, op: Any, state: Any) -> Any:
        data, sizes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        if sizes is None or data is None or data.shape is None or opset < 13:
            return None
        # ONNX ignores keepdims where sizes are given; ONNX Runtime and the folding do not.
        if node.attributes.get_int("keepdims", 1) == 0:
            return None
        if sizes.shape is not None and sizes.shape.rank() == 1:
            return fold(node, op, state)
        axis, known = node.attributes.get_int("axis", 0), constant_integers(sizes)
        length = data.shape[axis] if -len(data.shape) <= axis < len(data.shape) else None
        if known is None or len(known) != 1 or known[0] < 1 or not isinstance(length, int) or not length:
            return None
        return None if opset < 18 and length % known[0] == 0 else fold(node, op, state)

    return guarded


def _watched(function: Callable[..., Any], near: NearMisses, name: str) -> Callable[..., Any]:
    def watched(*arguments: Any, **options: Any) -> Any:
        near.fusion = name
        try:
            return function(*arguments, **options)
        finally:
            near.fusion = None

    return watched


def _unless_it_did_nothing(optimize: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves a clean-up out where the one before it changed no node, and nothing else has since."""
    clean: list[Any] | None = None

    def guarded(model: ir.Model, **options: Any) -> Any:
        nonlocal clean
        before = _nodes(model)
        if before == clean:
            return model
        made = optimize(model, **options)
        clean = before if _nodes(model) == before else None
        return made

    return guarded


def _nodes(model: ir.Model) -> list[Any]:
    """What tells whether nodes were added, removed or connected differently.

    It holds the nodes, so that none is taken for another that has come to its address.
    """
    roots = (model.graph, *(function.graph for function in model.functions.values()))
    graphs = [one for root in roots for one in (root, *root.subgraphs())]
    return [(node, node.op_type, node.inputs, node.outputs) for graph in graphs for node in graph]


def _fuse_nothing(model: ir.Model, *, debug: bool = False) -> int:
    del model, debug
    return 0


def _after(guard: Callable[[ir.Model], None], fuse: Callable[..., int]) -> Callable[..., int]:
    def guarded(model: ir.Model, *, debug: bool = False) -> int:
        guard(model)
        return fuse(model, debug=debug)

    return guarded


def _unless_partly_rotated(fuse: Callable[..., int]) -> Callable[..., int]:
    def guarded(model: ir.Model, *, debug: bool = False) -> int:
        for node in model.graph:
            size = node.attributes.get("rotary_embedding_dim")
            if node.op_type == "RotaryEmbedding" and size is not None and size.as_int():
                return 0
        return fuse(model, debug=debug)

    return guarded
