"""Encoder-decoders of transformers: an encoder, a decoder for the first tokens, and one that has a cache.

The components and the names are those of optimum: ``encoder_model``, ``decoder_model`` and
``decoder_with_past_model``; ``past_key_values.{layer}.decoder.key`` is a decoder's own cache and
``.encoder.key`` that of its cross-attention, which the first decoder computes once. transformers' own cache
classes are filled from flat tensors, so there is no code per architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, require
from onnxsmith.exporters.hugging_face import example_inputs, static_axes
from onnxsmith.exporters.plain import flat_program
from onnxsmith.exporters.tracing import line_of
from onnxsmith.package import TensorSpec
from onnxsmith.program import AxisSizes, TorchProgram

if TYPE_CHECKING:
    import torch

    from onnxsmith.exporters.loading import LoadedModel

__all__ = ["is_encoder_decoder", "seq2seq_programs"]

_PARTS = ("key", "value")
# Different from each other, and from the sizes of the encoder's examples (2, 3 and 7).
_SEQUENCE, _PAST = 4, 5


def is_encoder_decoder(loaded: LoadedModel) -> bool:
    """Whether the task needs a decoder that runs token by token, after an encoder."""
    tasks = ("text2text-generation", "automatic-speech-recognition")
    return loaded.task in tasks and bool(getattr(loaded.module.config, "is_encoder_decoder", False))


def seq2seq_programs(loaded: LoadedModel) -> dict[str, TorchProgram]:
    """The three graphs of an encoder-decoder, by component name.

    Raises:
        ExportError: It does not run, or its cache is not one of key and value tensors.
    """
    model: Any = loaded.module
    encoder = _encoder_program(loaded)
    parts = _Parts.of(model, encoder)
    return {
        "encoder_model": encoder,
        "decoder_model": _decoder_program(model, parts, encoder, loaded.task, with_past=False),
        "decoder_with_past_model": _decoder_program(model, parts, encoder, loaded.task, with_past=True),
    }


def _encoder_program(loaded: LoadedModel) -> TorchProgram:
    model: Any = loaded.module
    encoder = model.get_encoder()
    # What the whole model takes says more than its encoder's signature, which may take anything.
    accepted = {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if name in inspect.signature(encoder.forward).parameters
    }
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids":
        accepted.pop("input_ids", None)
        if main == "input_features" and getattr(model.config, "max_source_positions", None):
            # Of a fixed length, so that nothing has to be masked.
            accepted.pop("attention_mask", None)

    def call(module: torch.nn.Module, tensors: dict[str, Any]) -> Any:
        return {"last_hidden_state": module(**tensors, return_dict=True).last_hidden_state}

    error: ExportError | None = None
    for examples, limits in example_inputs(model, accepted, loaded.files):
        try:
            program = flat_program(
                encoder,
                call,
                examples,
                name=type(encoder).__name__,
                task=loaded.task,
                static=static_axes(model, examples),
            )
        except ExportError as refused:
            error = error or refused
            continue
        program.limits = {key: value for key, value in limits.items() if key in examples}
        return program
    raise error or ExportError(
        type(model).__name__,
        got=f"an encoder that takes {', '.join(accepted) or 'nothing that is known'}",
        expected="input_ids, input_features, input_values or pixel_values",
    )


class _Parts:
    """What the decoder's signature consists of."""

    def __init__(self, layers: list[dict[str, tuple[int, int]]], hidden: torch.Tensor, masked: bool) -> None:
        self.layers = layers
        self.hidden = hidden
        self.masked = masked

    @staticmethod
    def of(model: Any, encoder: TorchProgram) -> _Parts:
        """Finds it by running the model on one token."""
        import torch

        hidden = encoder.outputs[0].shape or ()
        decoder = model.get_decoder()
        masked = "encoder_attention_mask" in inspect.signature(decoder.forward).parameters and (
            "attention_mask" in encoder.examples
        )
        try:
            with torch.no_grad():
                states = encoder.module(**encoder.examples)["last_hidden_state"]
                ids = torch.zeros((states.shape[0], 1), dtype=torch.int64)
                output = model(
                    encoder_outputs=_encoder_output(states),
                    decoder_input_ids=ids,
                    use_cache=True,
                    return_dict=True,
                )
        except Exception as error:
            raise ExportError(
                type(model).__name__,
                got=f"its decoder does not run on one token{line_of(error)}: {type(error).__name__}: {error}",
                expected="a model that takes encoder_outputs, decoder_input_ids and use_cache",
            ) from error
        cache: Any = getattr(output, "past_key_values", None)
        if not hasattr(cache, "self_attention_cache") or len(hidden) != 3:
            raise ExportError(
                type(model).__name__,
                got=f"a cache of type {type(cache).__name__}",
                expected="an EncoderDecoderCache with key and value tensors for each layer",
            )
        layers: list[dict[str, tuple[int, int]]] = []
        for own, cross in zip(
            cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True
        ):
            found = {}
            for side, layer in (("decoder", own), ("encoder", cross)):
                for part, tensor in (("key", layer.keys), ("value", layer.values)):
                    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4:
                        raise ExportError(
                            f"{type(model).__name__} layer {len(layers)}",
                            got=f"no {side} {part} of four axes in its cache",
                            expected="(batch, heads, length, size)",
                        )
                    found[f"{side}.{part}"] = (int(tensor.shape[1]), int(tensor.shape[3]))
            layers.append(found)
        return _Parts(layers, states, masked)


def _decoder_program(
    model: Any, parts: _Parts, encoder: TorchProgram, task: str | None, *, with_past: bool
) -> TorchProgram:
    torch = require("torch", purpose="exporting")
    dtype = str(model.dtype).removeprefix("torch.")
    length = (encoder.outputs[0].shape or ())[1]
    # The encoder may shorten what it is given: its output has a length of its own.
    encoder_length: int | str = length if isinstance(length, int) else "encoder_sequence"
    batch, encoder_size, width = parts.hidden.shape
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_decoder().get_input_embeddings().num_embeddings)
    head = model.get_output_embeddings()
    classes = vocabulary if head is None else int(head.weight.shape[0])
    examples = {"input_ids": torch.randint(0, vocabulary, (batch, _SEQUENCE), generator=generator)}
    inputs = [TensorSpec("input_ids", "int64", ("batch", "sequence"))]
    if parts.masked:
        examples["encoder_attention_mask"] = torch.ones((batch, encoder_size), dtype=torch.int64)
        inputs.append(TensorSpec("encoder_attention_mask", "int64", ("batch", encoder_length)))
    total = "total_sequence" if with_past else "sequence"
    outputs = [TensorSpec("logits", dtype, ("batch", "sequence", classes))]
    if not with_past:
        examples["encoder_hidden_states"] = parts.hidden.clone()
        inputs.append(TensorSpec("encoder_hidden_states", dtype, ("batch", encoder_length, int(width))))
    for layer, shapes in enumerate(parts.layers):
        for name, (heads, size) in shapes.items():
            cross = name.startswith("encoder")
            if with_past:
                past = encoder_length if cross else "past_sequence"
                inputs.append(
                    TensorSpec(f"past_key_values.{layer}.{name}", dtype, ("batch", heads, past, size))
                )
                examples[inputs[-1].name] = torch.randn(
                    (batch, heads, encoder_size if cross else _PAST, size), generator=generator
                ).to(model.dtype)
            if not (with_past and cross):
                present = encoder_length if cross else total
                outputs.append(TensorSpec(f"present.{layer}.{name}", dtype, ("batch", heads, present, size)))
    return TorchProgram(
        module=_decoder_module(model, len(parts.layers), int(width), with_past=with_past),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        examples=examples,
        task=task,
        limits={"input_ids": vocabulary},
        name=type(model).__name__,
        axis_limits=_position_limits(model),
    )


def _position_limits(model: Any) -> dict[str, AxisSizes]:
    config = model.config
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    most = next((int(v) for name in names if (v := getattr(config, name, None))), None)
    # Relative positions have no end, and the configuration's number is only what it was trained with.
    return {"sequence": AxisSizes(1, most), "past_sequence": AxisSizes(1, most)} if most else {}


def _decoder_module(model: Any, layers: int, width: int, *, with_past: bool) -> Any:
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    class Decoder(torch.nn.Module):
        """transformers' own decoder and caches, behind flat tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            own, cross = DynamicCache(), DynamicCache()
            if with_past:
                for layer in range(layers):
                    for side, cache in (("decoder", own), ("encoder", cross)):
                        key, value = (tensors[f"past_key_values.{layer}.{side}.{part}"] for part in _PARTS)
                        cache.update(key, value, layer)
                key = tensors["past_key_values.0.encoder.key"]
                # Only its length is used: the keys and values that would come from it are in the cache.
                states = torch.zeros((key.shape[0], key.shape[2], width), dtype=key.dtype)
            else:
                states = tensors["encoder_hidden_states"]
            caches = EncoderDecoderCache(own, cross)
            caches.is_updated = {layer: with_past for layer in range(layers)}
            masks = (
                {"attention_mask": tensors["encoder_attention_mask"]}
                if "encoder_attention_mask" in tensors
                else {}
            )
            output = self.inner(
                encoder_outputs=_encoder_output(states),
                decoder_input_ids=tensors["input_ids"],
                past_key_values=caches,
                use_cache=True,
                return_dict=True,
                **masks,
            )
            result = {"logits": output.logits}
            given: Mapping[str, Any] = {
                "decoder": output.past_key_values.self_attention_cache,
                **({} if with_past else {"encoder": output.past_key_values.cross_attention_cache}),
            }
            for layer in range(layers):
                for side, cache in given.items():
                    result[f"present.{layer}.{side}.key"] = cache.layers[layer].keys
                    result[f"present.{layer}.{side}.value"] = cache.layers[layer].values
            return result

    return Decoder().eval()


def _encoder_output(states: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)
