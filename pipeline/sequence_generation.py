"""From a text to another text, with the three graphs of an encoder-decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError, FeedError
from onnxsmith.package import ModelPackage
from onnxsmith.pipeline.tokenization import PackageTokenizer

if TYPE_CHECKING:
    from onnxsmith.runtime import SamplingSettings
    from onnxsmith.runtime.session import Array

__all__ = ["configuration", "is_encoder_decoder", "sequence_tokens", "start_token"]


def is_encoder_decoder(package: ModelPackage) -> bool:
    """Whether the package has an encoder and the decoders that go with it."""
    return {"encoder_model", "decoder_model", "decoder_with_past_model"} <= package.components.keys()


def sequence_tokens(
    package: ModelPackage,
    tokenizer: PackageTokenizer,
    text: str,
    *,
    max_new_tokens: int,
    provider: str,
    sampling: SamplingSettings | None,
) -> Iterator[int]:
    """The most likely tokens for a text, greedily, as the model's configuration says that they begin.

    Yields:
        Tokens, the one that ends the text included.

    Raises:
        BadInputError: Tokens are to be drawn.
        FeedError: The encoder reads no text, or nothing says how the decoder begins.
    """
    import numpy as np

    from onnxsmith.runtime import OrtBackend, Seq2SeqDecoder, generate_sequences, open_components

    if sampling is not None and (sampling.temperature > 0 or sampling.repetition_penalty != 1.0):
        raise BadInputError(
            "generate",
            got="a temperature or a repetition penalty for an encoder-decoder",
            expected="neither: they are decoded greedily",
        )
    names = {spec.name for spec in package.components["encoder_model"].inputs}
    if "input_ids" not in names:
        raise FeedError(
            "generate",
            got=f"an encoder that takes {', '.join(sorted(names))}",
            expected="one that takes text",
        )
    told = configuration(package)
    start = start_token(told)
    forced = told.get("forced_bos_token_id")
    banned = [ids[0] for ids in told.get("bad_words_ids") or () if len(ids) == 1]

    def choose(number: int, logits: Array) -> Array:
        changed = np.array(logits)
        if banned:
            changed[:, banned] = -np.inf
        if number == 0 and isinstance(forced, int):
            changed[:] = -np.inf
            changed[:, forced] = 0.0
        return changed

    ids = np.array([tokenizer.encode(text)], np.int64)
    feeds: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in names:
        feeds["attention_mask"] = np.ones_like(ids)
    parts = {name: package.only(name) for name in package.components}
    with open_components(OrtBackend(provider), parts, name="generate") as sessions:
        for tokens in generate_sequences(
            Seq2SeqDecoder(sessions),
            feeds,
            np.array([[start]], np.int64),
            max_new_tokens=max_new_tokens,
            stop=tokenizer.stop_ids,
            choose=choose,
        ):
            yield int(tokens[0])


def start_token(told: Mapping[str, Any]) -> int:
    """The token that the decoder begins with, by the model's configuration.

    Raises:
        FeedError: The configuration names none.
    """
    start = told.get("decoder_start_token_id")
    if not isinstance(start, int):
        raise FeedError(
            "generate",
            got="no decoder_start_token_id in generation_config.json or config.json",
            expected="the token that the decoder begins with",
        )
    return start


def configuration(package: ModelPackage) -> dict[str, Any]:
    """What the package says of its generation, from both of its files."""
    told: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        try:
            found = json.loads(package.files.get(name, b"{}"))
        except ValueError:
            continue
        if isinstance(found, dict):
            told |= {key: value for key, value in found.items() if value is not None}
    return told
