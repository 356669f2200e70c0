"""ONNX's own operator Attention while tracing: for runtimes without ONNX Runtime's contrib operators.

The operator came with operator set 23 (https://onnx.ai/onnx/operators/onnx__Attention.html). It is given keys
and values with the cache in front, and a mask that is added to the scores. It is never told that attention is
causal: runtimes have read that differently where there are more keys than queries. The mask is whatever
transformers would have masked, so padding, windows and chunks need no code here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, MissingDependencyError, require
from onnxsmith.exporters.attention import IGNORED_OPTIONS, MASKED_SCORE, replaced_attention

if TYPE_CHECKING:
    import torch

__all__ = ["FIRST_OPSET", "onnx_attention", "why_not_here"]

FIRST_OPSET = 23


@contextlib.contextmanager
def onnx_attention(model: Any, opset: int) -> Iterator[None]:
    """Makes ``model`` emit ``Attention`` while the context is open.

    Raises:
        ExportError: The model does not use the attention interface.
    """
    masking = require("transformers.masking_utils", purpose="exporting a decoder")

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        return _emit(module, query, key, value, attention_mask, options, opset=opset), None

    def mask(*args: Any, **options: Any) -> Any:
        options |= {"allow_is_causal_skip": False, "allow_torch_fix": False}
        return _added(masking.sdpa_mask(*args, **options), options.get("dtype"))

    with replaced_attention(model, attention, mask):
        yield


def _added(mask: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """What is added to the scores for a mask that is True where a key is seen."""
    import torch

    return torch.zeros_like(mask, dtype=dtype or torch.float32).masked_fill(~mask, MASKED_SCORE)


def _emit(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    options: dict[str, Any],
    *,
    opset: int,
) -> torch.Tensor:
    import torch

    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', None)})"
    rest = {
        name: option
        for name, option in options.items()
        if option is not None
        and name not in IGNORED_OPTIONS
        # The mask says both.
        and name not in ("is_causal", "sliding_window")
    }
    scale, softcap = rest.pop("scaling", None), rest.pop("softcap", None)
    if rest.pop("dropout", 0.0):
        raise ExportError(where, got="dropout while exporting", expected="a model in eval mode")
    if rest:
        raise ExportError(
            where,
            got=f"attention takes {', '.join(sorted(rest))}",
            expected="only what the operator Attention can represent",
        )
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise ExportError(where, got="attention without a mask of four axes", expected="a mask to be added")
    if mask.dtype == torch.bool:
        mask = _added(mask, query.dtype)
    batch, heads, sequence, size = query.shape
    attributes: dict[str, Any] = {"scale": float(size**-0.5 if scale is None else scale)}
    if softcap:
        attributes["softcap"] = float(softcap)
    result = torch.onnx.ops.symbolic(
        "Attention",
        [query, key, value, mask.to(query.dtype)],
        attributes,
        dtype=query.dtype,
        shape=[batch, heads, sequence, value.shape[-1]],
        version=opset,
    )
    if query.is_meta:
        # Of a run without data: the operator's stand-in makes its result on the CPU.
        result = result.to("meta")
    return result.transpose(1, 2).contiguous()


def why_not_here(opset: int) -> str:
    """Why the installed ONNX Runtime cannot run the operator as we use it; empty if it can, or there is none.

    Grouped heads, a mask and a soft cap of scores that is applied before the mask, as the specification says
    since its correction: earlier kernels cap what is masked, too.
    """
    import numpy as np
    from onnx import TensorProto, helper

    try:
        runtime: Any = require("onnxruntime", purpose="trying the operator Attention")
    except MissingDependencyError:
        return ""
    shapes = {"q": (1, 2, 2, 4), "k": (1, 1, 3, 4), "v": (1, 1, 3, 4), "m": (1, 1, 2, 3)}
    cap = 2.0
    node = helper.make_node("Attention", list(shapes), ["y"], scale=0.5, softcap=cap)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    # That of the first operator set with Attention: runtimes that have the operator may refuse newer ones.
    model.ir_version = 11
    random = np.random.default_rng(0)
    feeds = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    feeds["m"] = np.array([[[[0, MASKED_SCORE, MASKED_SCORE], [0, 0, MASKED_SCORE]]]], np.float32)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (got,) = session.run(None, feeds)
    except Exception as error:  # ONNX Runtime's errors have no common base
        return f"ONNX Runtime {runtime.__version__}: {str(error).partition(chr(10))[0][:200]}"
    scores = cap * np.tanh(feeds["q"] @ feeds["k"].swapaxes(-1, -2) * 0.5 / cap) + feeds["m"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ feeds["v"]
    if np.abs(got - wanted).max() > 1e-4:
        return f"ONNX Runtime {runtime.__version__} caps scores after the mask, and not before it"
    return ""
