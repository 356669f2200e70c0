"""Models of transformers with one graph: text, image and audio encoders, and pairs of encoders.

There is no code per architecture. A model says by its ``forward`` which inputs it takes, by its
configuration of what size they are, and by running which of their axes may change.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, SourceError
from onnxsmith.exporters.plain import flat_program
from onnxsmith.program import TorchProgram

if TYPE_CHECKING:
    import torch

    from onnxsmith.exporters.loading import LoadedModel

__all__ = ["SENTENCE_SIMILARITY", "encoder_programs", "example_inputs", "static_axes"]

SENTENCE_SIMILARITY = "sentence-similarity"

# Different from each other, from 0 and 1, and unlikely to equal a size of the model.
_TEXT_BATCH, _OTHER_BATCH, _LENGTH = 2, 3, 7
_MAIN_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")


def encoder_programs(loaded: LoadedModel) -> dict[str, TorchProgram]:
    """The graphs of a model without a cache, by component name.

    That is one, ``model``, but for the features of a pair of encoders such as CLIP, whose ``text_model`` and
    ``vision_model`` are used apart.

    Raises:
        ExportError: It takes inputs that are not known, or does not run on them.
    """
    model: Any = loaded.module
    if loaded.task == "text-to-audio" and getattr(model.config, "is_encoder_decoder", False):
        raise ExportError(
            type(model).__name__,
            got="speech from a decoder that is called for each frame",
            expected="speech synthesis in one pass, such as VITS",
        )
    if loaded.task == "feature-extraction" and hasattr(model, "get_text_features"):
        pair = {
            name: part
            for name, part in (
                ("text_model", "get_text_features"),
                ("vision_model", "get_image_features"),
                ("audio_model", "get_audio_features"),
            )
            if hasattr(model, part)
        }
        return {name: _features_program(loaded, method) for name, method in pair.items()}
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"return_dict": True} if "return_dict" in accepted else {}
    # A decoder that is asked for features would give its cache as outputs.
    if "use_cache" in accepted:
        options["use_cache"] = False
    pooling = _pooling(loaded) if loaded.task == SENTENCE_SIMILARITY else None

    def call(module: torch.nn.Module, tensors: dict[str, Any]) -> Any:
        result = module(**tensors, **options)
        if pooling is not None:
            return {"last_hidden_state": result[0], "sentence_embedding": pooling(result[0], tensors)}
        # Of a pair of encoders, what each of them gave alone.
        return (
            {k: v for k, v in result.items() if not hasattr(v, "to_tuple")}
            if hasattr(result, "items")
            else result
        )

    return {"model": _program(loaded, model, call, accepted)}


def _features_program(loaded: LoadedModel, method: str) -> TorchProgram:
    model: Any = loaded.module
    output = {"get_text_features": "text_embeds", "get_image_features": "image_embeds"}.get(
        method, "audio_embeds"
    )

    def call(module: Any, tensors: dict[str, Any]) -> Any:
        result = getattr(module, method)(**tensors)
        # transformers 5 gives the output of the encoder, with the projected features as its pooled ones.
        return {output: getattr(result, "pooler_output", result)}

    return _program(loaded, model, call, inspect.signature(getattr(model, method)).parameters)


def _program(
    loaded: LoadedModel,
    model: Any,
    call: Callable[[Any, dict[str, Any]], Any],
    accepted: Mapping[str, Any],
) -> TorchProgram:
    name = type(model).__name__
    error: ExportError | None = None
    for examples, limits in example_inputs(model, accepted, loaded.files):
        try:
            program = flat_program(
                model, call, examples, name=name, task=loaded.task, static=static_axes(model, examples)
            )
        except ExportError as refused:
            error = error or refused
            continue
        program.limits = {key: value for key, value in limits.items() if key in examples}
        return program
    if error is not None:
        raise error
    raise ExportError(
        name,
        got=f"forward() takes {', '.join(list(accepted)[:5])}",
        expected=f"a model that takes {', '.join(_MAIN_INPUTS[:-1])} or {_MAIN_INPUTS[-1]}",
        remedy="Wrap it in a factory with example inputs and name that as package.module:factory",
    )


def example_inputs(
    model: Any, accepted: Mapping[str, Any], files: Mapping[str, bytes]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, int]]]:
    """Inputs that fit a model's parameters and configuration, the likeliest first.

    Yields:
        Tensors by name, and for integer inputs one above the highest valid value.
    """
    if not any(name in accepted for name in _MAIN_INPUTS):
        return
    config = model.config
    text, limits = _text_inputs(model, accepted, files)
    if "pixel_values" in accepted:
        others = [{"pixel_values": image} for image in _images(config, files)]
    elif "input_features" in accepted:
        others = [{"input_features": features} for features in _features(config)]
    elif "input_values" in accepted:
        others = [{"input_values": values} for values in _sounds(config)]
        # Of the raw sound only where the model was trained with it.
        if not _json(files, "preprocessor_config.json").get("return_attention_mask"):
            text.pop("attention_mask", None)
    else:
        others = [{}] if "input_ids" in text else []
    for other in others:
        if "input_ids" not in text and "attention_mask" in text:
            # Its axes are those of the text.
            text.pop("attention_mask")
        yield text | other, limits


def static_axes(model: Any, examples: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Axes that the configuration gives one size: those of images, where it says of what size they are.

    Some such models take other sizes too, and choose their windows or paddings by them, which no tracer can
    follow.
    """
    vision = getattr(model.config, "vision_config", model.config)
    if "pixel_values" in examples and getattr(vision, "image_size", None):
        return {("pixel_values", axis) for axis in (1, 2, 3)}
    return set()


def _text_inputs(
    model: Any, accepted: Mapping[str, Any], files: Mapping[str, bytes]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    import torch

    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
    wanted = _json(files, "tokenizer_config.json").get("model_input_names")
    if wanted:
        names = [name for name in names if name in wanted]
    config = getattr(model.config, "text_config", model.config)
    types = int(getattr(config, "type_vocab_size", 0) or 0)
    if "token_type_ids" in names and types < 2:
        names.remove("token_type_ids")
    if "input_ids" not in names:
        return ({"attention_mask": _padded(_TEXT_BATCH, _LENGTH)} if names else {}), {}
    vocabulary = int(getattr(config, "vocab_size", 0) or model.get_input_embeddings().num_embeddings)
    shape = (_TEXT_BATCH, _LENGTH)
    generator = torch.Generator().manual_seed(0)
    makers: Mapping[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: torch.randint(0, vocabulary, shape, generator=generator),
        "attention_mask": lambda: _padded(*shape),
        "token_type_ids": lambda: torch.zeros(shape, dtype=torch.int64),
    }
    return {name: makers[name]() for name in names}, {"input_ids": vocabulary, "token_type_ids": types}


def _images(config: Any, files: Mapping[str, bytes]) -> Iterator[torch.Tensor]:
    vision = getattr(config, "vision_config", config)
    channels = int(getattr(vision, "num_channels", 3) or 3)
    size = getattr(vision, "image_size", None)
    if not size:
        told = _json(files, "preprocessor_config.json")
        size = told.get("crop_size") or told.get("size") or 224
        if isinstance(size, dict):
            size = [size.get(k) or size.get("shortest_edge", 224) for k in ("height", "width")]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    yield _normal(_OTHER_BATCH, channels, int(height), int(width))


def _features(config: Any) -> Iterator[torch.Tensor]:
    bins = next(
        (
            int(value)
            for key in (
                "num_mel_bins",
                "input_feat_per_channel",
                "feature_projection_input_dim",
                "feature_size",
            )
            if (value := getattr(config, key, None))
        ),
        80,
    )
    # The encoder of Whisper takes exactly this length; others take any.
    frames = 2 * int(getattr(config, "max_source_positions", 0) or 0)
    if frames:
        yield _normal(_OTHER_BATCH, bins, frames)
    yield _normal(_OTHER_BATCH, 50, bins)


def _sounds(config: Any) -> Iterator[torch.Tensor]:
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if bins and frames and int(frames) > 20:
        # A spectrogram as an image.
        yield _normal(_OTHER_BATCH, int(frames), int(bins))
    yield _normal(_OTHER_BATCH, 1600)


def _padded(rows: int, length: int) -> torch.Tensor:
    """A mask that hides something: models leave a mask out that hides nothing, whatever its size."""
    import torch

    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, -1] = 0
    return mask


def _normal(*shape: int) -> torch.Tensor:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _pooling(loaded: LoadedModel) -> Callable[[Any, Mapping[str, Any]], Any]:
    """What makes one vector of a text's hidden states, as the files of sentence-transformers say.

    Raises:
        SourceError: There are none, or they ask for something else than the first token, the mean or the
            maximum.
    """
    import torch

    told = _json(loaded.files, "pooling.json")
    modes = [
        key.removeprefix("pooling_mode_")
        for key, on in told.items()
        if key.startswith("pooling_mode_") and on
    ]
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    if len(modes) != 1 or modes[0] not in known:
        raise SourceError(
            loaded.source.text,
            got=f"pooling {', '.join(modes)}"
            if modes
            else "no 1_Pooling/config.json, as sentence-transformers writes",
            expected=f"one of {', '.join(known)}",
            remedy="Export it with --task feature-extraction",
        )
    normalize = bool(told.get("normalize"))

    def pool(hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mask = tensors["attention_mask"][..., None].to(hidden.dtype)
        if modes[0] == "cls_token":
            pooled = hidden[:, 0]
        elif modes[0] == "max_tokens":
            pooled = hidden.masked_fill(mask == 0, -1e9).max(1).values
        else:
            count = mask.sum(1).clamp(min=1e-9)
            pooled = (hidden * mask).sum(1) / (count if modes[0] == "mean_tokens" else count.sqrt())
        return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled

    return pool


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    found = json.loads(files.get(name, b"{}"))
    return found if isinstance(found, dict) else {}
