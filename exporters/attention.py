"""Attention while tracing: every transformers model that uses the attention interface, no per-model code.

transformers looks its attention up by name in ``AttentionInterface``. While a decoder is traced, the name
leads to a function that emits ONNX Runtime's ``GroupQueryAttention`` with the KV cache as plain tensors
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, require

if TYPE_CHECKING:
    import torch

__all__ = ["IGNORED_OPTIONS", "MASKED_SCORE", "AttentionTrace", "fused_attention", "recorded_options"]

# Arguments of an attention call that say nothing about the result here: positions are already in the
# rotated query and key, causality and the cache are the operator's own.
IGNORED_OPTIONS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "training",
        "use_cache",
    }
)

# A masked score. exp() of it is 0 in every float type, it is finite in float16, and unlike the lowest
# finite number it does not blow up the range that a later calibration sees.
MASKED_SCORE = -1e4

_names = itertools.count()


@dataclasses.dataclass(frozen=True)
class _Window:
    """Stands in for a sliding-window mask on its way from the mask interface to the attention function."""

    size: int


@dataclasses.dataclass
class AttentionTrace:
    """What the attention function needs and leaves while one forward pass is traced.

    Attributes:
        past: Per layer, key and value of shape (batch, kv heads, past length, head size).
        last_index: Index of the newest position in the cache, shape (batch,), int32.
        total_length: Length of the cache after this pass, a scalar tensor, int32.
        total_size: The same as a symbolic size.
        bias: Added to the scores, shape (batch, 1, sequence, total): 0 or very negative where the
            attention mask hides padding.
        present: Filled by the attention function: per layer, key and value including the past.
    """

    past: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    last_index: torch.Tensor
    total_length: torch.Tensor
    total_size: Any
    bias: torch.Tensor
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    @staticmethod
    def begin(
        attention_mask: torch.Tensor,
        sequence: Any,
        past: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        dtype: torch.dtype,
    ) -> AttentionTrace:
        """Prepares a pass.

        GroupQueryAttention takes one length per row and reads rows as padded on the right. Decoders are
        batched with padding on the left, which would be silently wrong; so each row is given its full
        length, and padding on either side is hidden by a bias on the scores, which is exact.

        Args:
            attention_mask: (batch, total length), 1 where there is a token and 0 for padding.
            sequence: Number of new positions.
            past: Per layer, key and value.
            dtype: The element type of the scores.
        """
        import torch

        batch, total = attention_mask.shape
        device = attention_mask.device
        hidden = (attention_mask - 1)[:, None, None, :].to(dtype) * -MASKED_SCORE
        return AttentionTrace(
            past=past,
            last_index=torch.full((batch,), total - 1, dtype=torch.int32, device=device),
            total_length=torch.scalar_tensor(total, dtype=torch.int32, device=device),
            total_size=total,
            bias=hidden.expand(batch, 1, sequence, total),
        )


@contextlib.contextmanager
def fused_attention(model: Any) -> Iterator[list[AttentionTrace]]:
    """Makes ``model`` emit ``GroupQueryAttention`` while the context is open.

    Yields:
        A list; the trace at its end is the one that the attention function uses.

    Raises:
        ExportError: The model does not use the attention interface.
    """
    traces: list[AttentionTrace] = []

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        return _emit(traces[-1], module, query, key, value, attention_mask, options), None

    with replaced_attention(model, attention, _mask, remedy="Export it with --attention standard"):
        yield traces


@contextlib.contextmanager
def replaced_attention(
    model: Any, attention: Callable[..., Any], mask: Callable[..., Any], *, remedy: str | None = None
) -> Iterator[None]:
    """Lets a model of transformers call another attention, and another mask, while the context is open.

    Args:
        model: It is as it was afterwards.
        attention: As transformers' AttentionInterface calls it.
        mask: As its AttentionMaskInterface calls it.
        remedy: For the message, where the model does not use these interfaces.

    Raises:
        ExportError: It does not.
    """
    transformers = require("transformers", purpose="exporting a decoder")
    masks = require("transformers.masking_utils", purpose="exporting a decoder").AttentionMaskInterface
    interface = transformers.AttentionInterface
    if not getattr(model, "_supports_attention_backend", False):
        raise ExportError(
            type(model).__name__,
            got="its transformers code has no attention interface",
            expected="a model whose attention can be replaced",
            remedy=remedy,
        )
    name = f"onnxsmith_attention_{next(_names)}"
    previous = model.config._attn_implementation
    interface.register(name, attention)
    masks.register(name, mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(previous)
        interface._global_mapping.pop(name, None)
        masks._global_mapping.pop(name, None)


@contextlib.contextmanager
def recorded_options() -> Iterator[set[str]]:
    """Notes which options models pass to ``sdpa`` attention while the context is open.

    Yields:
        The names of the options that were not None, ``attention_mask`` among them.
    """
    interface = require("transformers", purpose="exporting a decoder").AttentionInterface
    original = interface._global_mapping["sdpa"]
    seen: set[str] = set()

    def record(*tensors: Any, **options: Any) -> Any:
        seen.update(name for name, value in options.items() if value is not None)
        if len(tensors) > 4 and tensors[4] is not None:
            seen.add("attention_mask")
        return original(*tensors, **options)

    interface.register("sdpa", record)
    try:
        yield seen
    finally:
        interface.register("sdpa", original)


def _mask(*_: Any, mask_function: Any, **options: Any) -> _Window | None:
    """Builds no mask: the operator is causal and the bias hides padding. Refuses masks of other kinds."""
    masking = require("transformers.masking_utils", purpose="exporting a decoder")
    if mask_function is masking.causal_mask_function:
        return None
    # transformers composes masks from closures; the names of the parts are all that tells them apart.
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    flat = [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
    names = {getattr(part, "__qualname__", "?").partition(".")[0] for part in flat}
    if names == {"sliding_window_overlay", "causal_mask_function"}:
        return _Window(int(options["local_size"]))
    raise ExportError(
        "attention mask",
        got=f"a mask made of {', '.join(sorted(names)) or 'an unknown function'}",
        expected="a causal mask, with or without a sliding window, which GroupQueryAttention computes",
        remedy="Export it with --attention standard",
    )


def _emit(
    trace: AttentionTrace,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    options: dict[str, Any],
) -> torch.Tensor:
    import torch

    layer = getattr(module, "layer_idx", None)
    where = f"{type(module).__name__} (layer {layer})"
    attributes, head_sink = _attributes(where, module, options)
    _check_mask(where, mask, attributes.get("local_window_size"))
    if not isinstance(layer, int) or layer not in trace.past:
        raise ExportError(where, got=f"layer index {layer}", expected=f"0 to {max(trace.past)}")
    if layer in trace.present:
        raise ExportError(where, got="attention runs twice in one layer", expected="one call for each layer")
    batch, heads, sequence, size = query.shape
    kv_heads = key.shape[1]
    if value.shape[-1] != size:
        raise ExportError(
            where,
            got=f"values of size {value.shape[-1]} under keys of size {size}",
            expected="equal sizes, which GroupQueryAttention requires",
            remedy="Export it with --attention standard",
        )
    if size % 8:
        raise ExportError(
            where,
            got=f"heads of size {size}",
            expected="a multiple of 8, which GroupQueryAttention requires",
            remedy="Export it with --attention standard",
        )
    scale = options.get("scaling")
    attributes |= {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(size**-0.5 if scale is None else scale),
    }
    past_key, past_value = trace.past[layer]
    inputs: list[Any] = [
        _flat(query), _flat(key), _flat(value), past_key, past_value, trace.last_index, trace.total_length,
        None, None, None, trace.bias.to(query.dtype),
    ]  # fmt: skip
    if head_sink is not None:
        inputs.append(head_sink.to(query.dtype))
    cache = [batch, kv_heads, trace.total_size, size]
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attributes,
        dtypes=[query.dtype] * 3,
        shapes=[[batch, sequence, heads * size], cache, cache],
        version=1,
    )
    if query.is_meta:
        # Of a run without data: the operator's stand-in makes its results on the CPU.
        output, present_key, present_value = (x.to("meta") for x in (output, present_key, present_value))
    trace.present[layer] = (present_key, present_value)
    return output.view(batch, sequence, heads, size)


def _check_mask(where: str, mask: Any, window: int | None) -> None:
    """The mask decides in transformers' own attention, the option in other kernels: both must agree."""
    masked = mask.size if isinstance(mask, _Window) else None
    if mask is not None and masked is None:
        raise ExportError(
            where,
            got="a mask that the model builds itself",
            expected="one from transformers' mask interface",
            remedy="Export it with --attention standard",
        )
    if masked != window:
        raise ExportError(
            where,
            got=f"a mask with window {masked}, and sliding_window={window} in the call",
            expected="the same window",
            remedy="Export it with --attention standard",
        )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, sequence, size) to (batch, sequence, heads * size)."""
    batch, heads, sequence, size = tensor.shape
    return tensor.transpose(1, 2).reshape(batch, sequence, heads * size)


def _attributes(where: str, module: Any, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Forwards what GroupQueryAttention can represent and refuses all else: nothing is dropped."""
    rest = {
        name: value for name, value in options.items() if value is not None and name not in IGNORED_OPTIONS
    }
    rest.pop("scaling", None)
    if rest.pop("dropout", 0.0):
        raise ExportError(where, got="dropout while exporting", expected="a model in eval mode")
    causal = rest.pop("is_causal", getattr(module, "is_causal", True))
    if not causal:
        raise ExportError(
            where,
            got="bidirectional attention",
            expected="causal attention, which GroupQueryAttention computes",
        )
    attributes: dict[str, Any] = {}
    window = rest.pop("sliding_window", None)
    if window:
        attributes["local_window_size"] = int(window)
    softcap = rest.pop("softcap", None)
    if softcap:
        attributes["softcap"] = float(softcap)
    head_sink = rest.pop("s_aux", None)
    if rest:
        raise ExportError(
            where,
            got=f"attention takes {', '.join(sorted(rest))}",
            expected="only what GroupQueryAttention can represent",
            remedy="Export it with --attention standard",
        )
    return attributes, head_sink
