"""Leaves out what torch.onnx does in vain: a second and a third tracing, and reading its own source code.

torch.onnx decomposes what torch.export traced by tracing it again, which takes longer than the first time.
It is needed for operators without an ONNX form and for operators that change their arguments. Most decoders
have neither, apart from conversions that are simple to write down. Then it runs the program once more to find
operators that mix element types, which can be seen without running it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

__all__ = [
    "decomposed_where_needed",
    "operators_listed_quickly",
    "without_autocast",
    "without_memory_of_operators",
]


@contextlib.contextmanager
def decomposed_where_needed() -> Iterator[list[Any]]:
    """While open, torch.onnx decomposes only the programs that need it.

    Yields:
        What decompositions took for granted about sizes, as SymPy's relations. Pooling to a given size, say,
        is another sum where that divides the size of an image; torch.export does not come to know of it.
    """
    assumed: list[Any] = []
    _fx_passes: Any = importlib.import_module("torch.onnx._internal.exporter._fx_passes")
    original = _fx_passes.decompose_with_registry
    original_promotion = _fx_passes.insert_type_promotion_nodes

    def decompose(exported: Any, registry: Any) -> Any:
        ready = _is_ready(exported, registry)
        for module in exported.graph_module.modules():
            # Before a decomposition those without effect: torch goes round in circles on a constant's.
            _write_conversions(module, all_of_them=ready)
        if ready:
            return exported
        guards = _guards(exported)
        known = len(guards)
        decomposed = original(exported, registry)
        assumed.extend(guard.expr for guard in guards[known:])
        return decomposed

    def promote(module: Any) -> None:
        if any(_needs_promotion(one) for one in module.modules()):
            original_promotion(module)

    _fx_passes.decompose_with_registry = decompose
    _fx_passes.insert_type_promotion_nodes = promote
    try:
        yield assumed
    finally:
        _fx_passes.decompose_with_registry = original
        _fx_passes.insert_type_promotion_nodes = original_promotion


@contextlib.contextmanager
def operators_listed_quickly() -> Iterator[None]:
    """While open, torch.onnx's list of operators is made without parsing the source of each of them.

    onnxscript parses a function when it is asked for its domain, which torch.onnx does not use.
    """
    listing: Any = importlib.import_module("onnxscript._framework_apis.torch_2_5")
    registration: Any = importlib.import_module("onnxscript.function_libs.torch_lib.registration")

    def get_torchlib_ops() -> list[Any]:
        importlib.import_module("onnxscript.function_libs.torch_lib.ops")
        return [
            listing._OnnxFunctionMeta(
                qualified_name=name, function=function, domain="", name=function.name, is_complex=is_complex
            )
            for name, overloads in registration.default_registry.items()
            if not name.startswith("internal::")
            for functions, is_complex in ((overloads.overloads, False), (overloads.complex, True))
            for function in functions
        ]

    # A stand-in of torch's for the module, which imports it at first use: what is set here goes before.
    registering: Any = importlib.import_module("torch.onnx._internal.exporter._registration")
    apis = registering.onnxscript_apis
    apis.get_torchlib_ops = get_torchlib_ops
    try:
        yield
    finally:
        del apis.get_torchlib_ops


@contextlib.contextmanager
def without_memory_of_operators() -> Iterator[None]:
    """While open, torch.export does not keep what operators gave for arguments of some sizes.

    Keeping it takes longer than computing it again, unless a model repeats itself: a single layer does not.
    """
    config: Any = importlib.import_module("torch._dynamo.config")
    with config.patch(fake_tensor_cache_enabled=False):
        yield


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


def _guards(exported: Any) -> Any:
    """The list to which torch adds what it takes for granted about the sizes of a program."""
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env.guards
    return []


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


def _needs_promotion(module: Any) -> bool:
    """Whether an operator of the program mixes element types, by the rules that torch.onnx goes by."""
    import torch

    if not isinstance(module, torch.fx.GraphModule):
        return False
    promotion: Any = importlib.import_module("torch.onnx._internal.fx.passes.type_promotion")
    types: Any = importlib.import_module("torch.onnx._internal.fx.type_utils")
    table = promotion.TypePromotionTable()

    def differs(value: Any, dtype: Any) -> bool:
        if dtype is None:
            return False
        if isinstance(value, (tuple, list)):
            return any(differs(one, dtype) for one in value)
        if isinstance(value, torch.Tensor):
            return bool(value.dtype != dtype)
        known = types.from_scalar_type_to_torch_dtype(type(value))
        return known is None or bool(known != dtype)

    for node in module.graph.nodes:
        rule = promotion.get_type_promotion_rule(node, table) if node.op == "call_function" else None
        if rule is None:
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
        wanted = rule.preview_type_promotion(args, kwargs)
        if any(differs(value, wanted.args_dtypes.get(i)) for i, value in enumerate(args)):
            return True
        if any(differs(value, wanted.kwargs_dtypes.get(name)) for name, value in kwargs.items()):
            return True
    return False


def _write_conversions(module: Any, *, all_of_them: bool) -> None:
    """``to()`` of any form as a conversion of the element type, or as nothing."""
    import torch

    if not isinstance(module, torch.fx.GraphModule):
        return
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _is_conversion(node.target):
            continue
        source, dtype = node.args[0], node.meta["val"].dtype
        # The program's signature has the name of what it returns.
        returned = any(user.op == "output" for user in node.users)
        if "val" in source.meta and source.meta["val"].dtype == dtype and not returned:
            new = source
        elif not all_of_them:
            continue
        else:
            with module.graph.inserting_before(node):
                new = module.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": dtype})
                new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        if any(user.op == "output" for user in new.users):
            new.name = node.name
    module.recompile()
