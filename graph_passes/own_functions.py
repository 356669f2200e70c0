"""Functions of this project's operators, kept from passes that would put their bodies into the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir

from onnxsmith.own_operators import OWN_DOMAIN

__all__ = ["own_functions_aside"]


@contextlib.contextmanager
def own_functions_aside(model: ir.Model) -> Iterator[None]:
    """While open, the model has no functions of this project's operators; those that are used come back.

    onnxscript's optimizer inlines every function, and a runtime would not find what it has a kernel for.
    """
    aside = {key: one for key, one in model.functions.items() if one.domain == OWN_DOMAIN}
    for key in aside:
        del model.functions[key]
    yield
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    model.functions.update({key: one for key, one in aside.items() if key in used})
