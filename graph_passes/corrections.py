"""What onnxscript does wrong or cannot do, taken out of it while it works for us."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir

__all__ = ["corrected_onnxscript"]

_LOCK = threading.RLock()
_ABSENT = object()


@contextlib.contextmanager
def corrected_onnxscript(model: ir.Model) -> Iterator[None]:
    """Corrects onnxscript for one model, in one thread at a time.

    - Its folding of SplitToSequence fails where the size of the parts is a number that is not known yet.
    - Its folding of ConcatFromSequence writes an Unsqueeze with axes as an input, which came with opset 13.
    - Its fusions into GroupQueryAttention drop the attention mask, on the assumption that it is all ones: a
      padded batch would silently compute something else. Where the mask allows it, the exporter writes
      GroupQueryAttention itself.
    - Those into MultiHeadAttention take a rotation of a part of each head for one of the whole.
    """
    from onnxscript.optimizer import _constant_folding
    from onnxscript.rewriter.ort_fusions import _core

    folded = ["SplitToSequence"] + ["ConcatFromSequence"] * (model.opset_imports.get("", 0) < 13)
    evaluators, own = _constant_folding.registry.op_evaluators, vars(_core)
    fusions = {
        "fuse_gqa": _fuse_nothing,
        "fuse_qkv_gqa": _fuse_nothing,
        "fuse_mha1": _unless_partly_rotated(own["fuse_mha1"]),
        "fuse_mha2": _unless_partly_rotated(own["fuse_mha2"]),
    }
    with _LOCK, contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(evaluators, {("", name): [] for name in folded}))
        stack.enter_context(_replaced(own, fusions))
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


def _fuse_nothing(model: ir.Model, *, debug: bool = False) -> int:
    del model, debug
    return 0


def _unless_partly_rotated(fuse: Callable[..., int]) -> Callable[..., int]:
    def guarded(model: ir.Model, *, debug: bool = False) -> int:
        for node in model.graph:
            size = node.attributes.get("rotary_embedding_dim")
            if node.op_type == "RotaryEmbedding" and size is not None and size.as_int():
                return 0
        return fuse(model, debug=debug)

    return guarded
