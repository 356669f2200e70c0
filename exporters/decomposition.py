"""Leaves out torch.onnx's second tracing where a program needs none.

torch.onnx decomposes what torch.export traced by tracing it again, which takes longer than the first time.
It is needed for operators without an ONNX form and for operators that change their arguments. Most decoders
have neither, apart from conversions that are simple to write down.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

__all__ = ["decomposed_where_needed", "without_autocast"]


@contextlib.contextmanager
def decomposed_where_needed() -> Iterator[None]:
    """While open, torch.onnx decomposes only the programs that need it."""
    _fx_passes: Any = importlib.import_module("torch.onnx._internal.exporter._fx_passes")
    original = _fx_passes.decompose_with_registry

    def decompose(exported: Any, registry: Any) -> Any:
        if not _is_ready(exported, registry):
            return original(exported, registry)
        for module in exported.graph_module.modules():
            _write_conversions(module)
        return exported

    _fx_passes.decompose_with_registry = decompose
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = original


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Makes turning autocast off do nothing while open, where it is off anyway.

    torch.export would make it a graph of its own, which only a decomposition takes away.
    """
    import torch

    original: Any = torch.autocast

    def autocast(*args: Any, **options: Any) -> Any:
        if options.get("enabled") is False and not torch.is_autocast_enabled("cpu"):
            return contextlib.nullcontext()
        return original(*args, **options)

    vars(torch)["autocast"] = autocast
    try:
        yield
    finally:
        vars(torch)["autocast"] = original


def _is_conversion(target: Any) -> bool:
    """Also ``detach_``, which changes nothing but what autograd knows."""
    import torch

    packets = (torch.ops.aten.to, torch.ops.aten.detach_)
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in packets


def _is_ready(exported: Any, registry: Any) -> bool:
    import torch

    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return False
    ignored = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default}
    for module in exported.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            target = node.target
            if node.op != "call_function" or target in ignored or _is_conversion(target):
                continue
            if not isinstance(target, torch._ops.OpOverload):
                # Arithmetic on sizes, and picking one of several results.
                if getattr(target, "__module__", "") not in ("_operator", "builtins", "math"):
                    return False
            elif target._schema.is_mutable or not registry.is_registered(target):
                return False
    return True


def _write_conversions(module: Any) -> None:
    """``to()`` of any form as a conversion of the element type, or as nothing."""
    import torch

    if not isinstance(module, torch.fx.GraphModule):
        return
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _is_conversion(node.target):
            continue
        source, dtype = node.args[0], node.meta["val"].dtype
        if source.meta["val"].dtype == dtype:
            new = source
        else:
            with module.graph.inserting_before(node):
                new = module.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": dtype})
                new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.recompile()
