"""Decoder language models: their signature with a KV cache, the reference, and the export."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from onnxsmith.context_length import POSITIONS, context_length
from onnxsmith.errors import ExportError, require
from onnxsmith.exporters.attention import AttentionTrace, fused_attention, recorded_options
from onnxsmith.exporters.decomposition import without_memory_of_operators
from onnxsmith.exporters.known_values import experts_unrolled
from onnxsmith.exporters.layers import NotAlikeError, layer_kinds, on_meta, shortened
from onnxsmith.exporters.onnx_attention import FIRST_OPSET, onnx_attention, why_not_here
from onnxsmith.exporters.rotary import stateless_rotary
from onnxsmith.exporters.stitching import stitch, tidied
from onnxsmith.exporters.stored_weights import stand_ins
from onnxsmith.exporters.tracing import converted, line_of, trace, weight_tensor
from onnxsmith.package import TEXT_GENERATION, TensorSpec
from onnxsmith.program import TorchProgram

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxsmith.exporters.loading import LoadedModel

__all__ = ["decoder_program", "trace_decoder"]

# Different from each other, from 0 and 1, and unlikely to equal a size of the model: torch would
# otherwise take two axes for one, or an axis for a constant.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5
# What makes transformers' sdpa attention leave something out silently: two options that it ignores, and a
# mask of the model's own. For a prompt without padding transformers makes no mask, because sdpa is causal by
# itself; where it is given one all the same, it is not.
_DROPPED_BY_SDPA = frozenset({"softcap", "s_aux", "attention_mask"})


def decoder_program(loaded: LoadedModel) -> TorchProgram:
    """The model behind the signature that optimum and onnxruntime-genai use.

    Inputs are ``input_ids`` and, where the model takes them, ``position_ids`` (batch, sequence),
    ``attention_mask`` (batch, total_sequence) and ``past_key_values.{layer}.{key,value}``
    (batch, kv heads, past_sequence, head size); outputs are ``logits`` (batch, sequence, vocabulary) and
    ``present.{layer}.{key,value}`` (batch, kv heads, total_sequence, head size).

    Where transformers' default attention would leave out a part of the model's attention (soft-capping of
    scores, causality beside a mask of the model's own), the model is switched to the eager one: what comes
    from here is what others are judged by.

    Raises:
        ExportError: Its cache is not one of key and value tensors.
    """
    torch = require("torch", purpose="exporting")
    model: Any = loaded.module
    choose_experts = getattr(model, "set_experts_implementation", None)
    if choose_experts is not None and model._can_set_experts_implementation():
        # transformers 5 multiplies the experts in groups, by an operator that ONNX does not have.
        choose_experts("eager")
    with recorded_options() as options:
        shapes = _cache_shapes(loaded)
    if options & _DROPPED_BY_SDPA:
        model.set_attn_implementation("eager")
    names = [f"{layer}.{part}" for layer in range(len(shapes)) for part in ("key", "value")]
    flat_shapes = [shape for pair in shapes for shape in pair]
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    cache_type = _type_name(model.dtype)
    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "total_sequence")),
        *([TensorSpec("position_ids", "int64", ("batch", "sequence"))] if _takes_positions(model) else []),
        *(
            TensorSpec(f"past_key_values.{name}", cache_type, ("batch", heads, "past_sequence", size))
            for name, (heads, size) in zip(names, flat_shapes, strict=True)
        ),
    )
    limits = {"input_ids": vocabulary}
    positions = context_length(model.config.to_dict())
    if positions is not None:
        limits[POSITIONS] = positions
    head = model.get_output_embeddings()
    classes = vocabulary if head is None else int(head.weight.shape[0])
    outputs = (
        TensorSpec("logits", cache_type, ("batch", "sequence", classes)),
        *(
            TensorSpec(f"present.{name}", cache_type, ("batch", heads, "total_sequence", size))
            for name, (heads, size) in zip(names, flat_shapes, strict=True)
        ),
    )
    generator = torch.Generator().manual_seed(0)
    examples = {
        "input_ids": torch.randint(0, vocabulary, (_BATCH, _SEQUENCE), generator=generator),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64),
        **(
            {"position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).repeat(_BATCH, 1)}
            if _takes_positions(model)
            else {}
        ),
    } | {
        f"past_key_values.{name}": torch.randn(_BATCH, heads, _PAST, size, generator=generator).to(
            model.dtype
        )
        for name, (heads, size) in zip(names, flat_shapes, strict=True)
    }
    return TorchProgram(
        module=_reference_module(model, range(len(shapes))),
        inputs=inputs,
        outputs=outputs,
        examples=examples,
        task=TEXT_GENERATION,
        limits=limits,
        name=type(model).__name__,
        prepare=None if loaded.weights is None else partial(loaded.weights.fill, model),
        release=None if loaded.weights is None else loaded.weights.drop,
    )


def trace_decoder(
    loaded: LoadedModel,
    program: TorchProgram,
    *,
    attention: str = "auto",
    opset: int | None = None,
    tracing: str = "auto",
    tidy: Callable[[ir.Model], ir.Model] | None = None,
) -> tuple[ir.Model, dict[str, Any]]:
    """Exports a decoder.

    Args:
        loaded: The model.
        program: Its signature, from ``decoder_program``.
        attention: ``fused`` emits GroupQueryAttention; ``standard`` emits ONNX operators only, from operator
            set 23 on with ONNX's Attention; ``auto`` is ``fused`` where the model allows it, and says why not
            where it does not.
        opset: Version of the ONNX operator set.
        tracing: ``layers`` traces one layer of each kind and copies it, ``whole`` traces all of them;
            ``auto`` is ``layers`` where the model can be taken apart.
        tidy: Cleans the graph that has one layer of each kind.

    Returns:
        The graph, and what was decided, for the manifest.

    Raises:
        ExportError: It cannot be traced, or ``fused`` cannot represent its attention, or it cannot be taken
            apart for ``layers``.
    """
    options: dict[str, Any] = {"attention": attention, "opset": opset, "tracing": tracing, "tidy": tidy}
    if loaded.weights is None:
        return _trace_decoder(loaded, program, **options)
    with stand_ins(loaded.module):
        model, details = _trace_decoder(loaded, program, **options)
    loaded.weights.bind(model, loaded.module)
    return model, details


def _trace_decoder(
    loaded: LoadedModel,
    program: TorchProgram,
    *,
    attention: str,
    opset: int | None,
    tracing: str,
    tidy: Callable[[ir.Model], ir.Model] | None,
) -> tuple[ir.Model, dict[str, Any]]:
    with experts_unrolled(loaded.module.config):
        details: dict[str, Any] = {"attention": "standard"}
        if attention in ("auto", "fused"):
            try:
                with fused_attention(loaded.module) as traces:
                    road = _Road(loaded.module, program, opset, traces, tidy)
                    model, traced = road.trace(tracing)
            except ExportError as error:
                if attention == "fused":
                    raise
                # Without the remedy, which is what happens next.
                details["why_not_fused"] = error.reason
            else:
                return model, {"attention": "GroupQueryAttention"} | traced
        if opset is not None and opset >= FIRST_OPSET:
            # torch's exporter would use the operator wherever it sees attention, and not where it does not.
            why_not = why_not_here(opset)
            if not why_not:
                try:
                    with onnx_attention(loaded.module, opset):
                        model, traced = _Road(loaded.module, program, opset, None, tidy).trace(tracing)
                except ExportError as error:
                    why_not = str(error)
                else:
                    return model, details | {"attention": "Attention"} | traced
            details["why_no_operator"] = why_not
            model, traced = _Road(loaded.module, program, FIRST_OPSET - 1, None, tidy).trace(tracing)
            return converted(model, opset), details | traced
        model, traced = _Road(loaded.module, program, opset, None, tidy).trace(tracing)
        return model, details | traced


@dataclasses.dataclass(frozen=True)
class _Road:
    """One way to attend; ``traces`` is None for the standard one."""

    model: Any
    program: TorchProgram
    opset: int | None
    traces: list[AttentionTrace] | None
    tidy: Callable[[ir.Model], ir.Model] | None = None

    def trace(self, tracing: str) -> tuple[ir.Model, dict[str, Any]]:
        count = sum(spec.name.startswith("past_key_values.") for spec in self.program.inputs) // 2
        every = range(count)
        if tracing != "whole":
            try:
                return self.trace_layers(count)
            except NotAlikeError as error:
                why = str(error)
            if tracing == "layers":
                raise ExportError(
                    self.program.name, got=why, expected="layers that are alike", remedy="Trace it as a whole"
                )
        else:
            why = "as asked"
        model = trace(self.program, self.module(every), opset=self.opset, longest=self.positions())
        return model, {"tracing": "whole", "why_whole": why}

    def positions(self) -> int | None:
        """How many the model is made for."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def trace_layers(self, count: int) -> tuple[ir.Model, dict[str, Any]]:
        whole, program = self.module(range(count)), self.program
        kinds = layer_kinds(self.model, count, lambda tensors: whole(**tensors), program.examples)
        named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())

        def kept(spec: TensorSpec) -> bool:
            group, _, rest = spec.name.partition(".")
            layer = rest.partition(".")[0]
            return group not in ("past_key_values", "present") or int(layer) in kinds.distinct

        part = dataclasses.replace(
            program,
            inputs=tuple(filter(kept, program.inputs)),
            outputs=tuple(filter(kept, program.outputs)),
        )
        with shortened(self.model, kinds), without_memory_of_operators():
            model = trace(part, self.module(kinds.distinct), opset=self.opset, longest=self.positions())
        if self.tidy is not None:
            model = tidied(model, kinds, self.tidy)
        stitch(model, kinds, program.inputs, program.outputs, lambda name: weight_tensor(named[name], name))
        return model, {"tracing": "layers", "layers_traced": len(kinds.distinct), "layers": count}

    def module(self, layers: Sequence[int]) -> Any:
        if self.traces is None:
            return _reference_module(self.model, layers)
        return _fused_module(self.model, layers, self.traces)


def _takes_positions(model: Any) -> bool:
    """Not all do: models with ALiBi find the distances themselves."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _cache_shapes(loaded: LoadedModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Per layer, heads and head size of key and value, found by running one token through the model."""
    import torch

    model: Any = loaded.module
    output = None
    if loaded.weights is not None:
        # Shapes do not need weights; but some models ask for values, and then it has to be the real thing.
        with contextlib.suppress(Exception), on_meta(model), torch.no_grad():
            output = model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=True)
        if output is None:
            loaded.weights.fill(model)
    try:
        if output is None:
            with torch.no_grad():
                output = model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=True)
    except Exception as error:
        raise ExportError(
            type(model).__name__,
            got=f"it does not run on two tokens{line_of(error)}: {type(error).__name__}: {error}",
            expected="a decoder that takes input_ids and use_cache",
        ) from error
    cache = _own_cache(getattr(output, "past_key_values", None))
    layers = getattr(cache, "layers", None)
    if not layers or not all(hasattr(layer, "keys") and hasattr(layer, "values") for layer in layers):
        raise ExportError(
            type(model).__name__,
            got=f"a cache of type {type(cache).__name__}",
            expected="key and value tensors for each layer",
            remedy="Hybrid and state-space models are not supported yet",
        )
    found = []
    for index, layer in enumerate(layers):
        pair = (layer.keys, layer.values)
        if any(not isinstance(t, torch.Tensor) or t.ndim != 4 for t in pair):
            raise ExportError(
                f"{type(model).__name__} layer {index}",
                got="no key and value of four axes in its cache",
                expected="(batch, heads, length, size)",
                remedy="Hybrid and state-space models are not supported yet",
            )
        found.append(tuple((int(t.shape[1]), int(t.shape[3])) for t in pair))
    return found  # type: ignore[return-value]  # pairs by construction


def _own_cache(cache: Any) -> Any:
    """Of a decoder that may have an encoder: the part that is its own."""
    return getattr(cache, "self_attention_cache", cache)


def _reference_module(model: Any, layers: Sequence[int]) -> Any:
    import torch
    from transformers import DynamicCache

    class Reference(torch.nn.Module):
        """transformers' own attention and cache, behind flat tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.rotary = stateless_rotary(model)

        def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            # Made without the configuration: that would give layers with a sliding window a cache that
            # forgets, where the graph's cache keeps everything and masks.
            cache = DynamicCache()
            for layer in layers:
                _fill(
                    cache,
                    layer,
                    tensors[f"past_key_values.{layer}.key"],
                    tensors[f"past_key_values.{layer}.value"],
                )
            # A copy: some models (XGLM) add to what they are given.
            positions = {name: tensors[name].clone() for name in ("position_ids",) if name in tensors}
            with self.rotary():
                output = self.inner(
                    input_ids=tensors["input_ids"],
                    attention_mask=tensors["attention_mask"],
                    past_key_values=cache,
                    **positions,
                    use_cache=True,
                )
            result = {"logits": output.logits}
            for layer in layers:
                filled = _own_cache(output.past_key_values).layers[layer]
                result[f"present.{layer}.key"] = filled.keys
                result[f"present.{layer}.value"] = filled.values
            return result

    return Reference().eval()


def _fill(cache: Any, layer: int, key: Any, value: Any) -> None:
    """Puts tensors into a cache as they are: ``update`` would concatenate them with nothing first."""
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    filled = cache.layers[layer]
    filled.keys, filled.values = key, value
    filled.dtype, filled.device = key.dtype, key.device
    filled.is_initialized = True


def _fused_module(model: Any, layers: Sequence[int], traces: list[AttentionTrace]) -> Any:
    import torch

    takes_cache_position = "cache_position" in inspect.signature(model.forward).parameters

    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.rotary = stateless_rotary(model)

        def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            past = {
                layer: (tensors[f"past_key_values.{layer}.key"], tensors[f"past_key_values.{layer}.value"])
                for layer in layers
            }
            state = AttentionTrace.begin(
                tensors["attention_mask"], tensors["input_ids"].shape[1], past, self.inner.dtype
            )
            traces.append(state)
            # A copy: some models (XGLM) add to what they are given.
            positions = {name: tensors[name].clone() for name in ("position_ids",) if name in tensors}
            if takes_cache_position:
                # Without a cache the model would count from zero.
                past_length, new = past[0][0].shape[2], tensors["input_ids"].shape[1]
                device = tensors["input_ids"].device
                positions["cache_position"] = torch.arange(past_length, past_length + new, device=device)
            with self.rotary():
                logits = self.inner(
                    input_ids=tensors["input_ids"],
                    attention_mask=tensors["attention_mask"],
                    use_cache=False,
                    **positions,
                ).logits
            missing = sorted(set(layers) - set(state.present))
            if missing:
                raise ExportError(
                    type(self.inner).__name__,
                    got=f"layers {missing} did not use the attention interface",
                    expected="every layer with a cache",
                    remedy="Export it with --attention standard",
                )
            result = {"logits": logits}
            for layer in layers:
                result[f"present.{layer}.key"], result[f"present.{layer}.value"] = state.present[layer]
            return result

    return Fused().eval()


def _type_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
