"""The tokenizer of a package, without PyTorch or transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from onnxsmith.errors import BadInputError, TokenizerError, require
from onnxsmith.package import ModelPackage

__all__ = ["PackageTokenizer"]


class PackageTokenizer:
    """Text to token ids and back, from the ``tokenizer.json`` of a package."""

    def __init__(self, package: ModelPackage) -> None:
        """Reads the tokenizer.

        Raises:
            TokenizerError: The package has none, or it cannot be read.
        """
        tokenizers = require("tokenizers", purpose="tokenizing")
        content = package.files.get("tokenizer.json")
        if content is None:
            raise TokenizerError(
                "tokenizer",
                got="the model has no tokenizer.json",
                expected="a tokenizer beside the model",
                remedy="Export from a source that has one, or save it there with tokenizer.save_pretrained",
            )
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the Rust side raises bare Exception
            raise TokenizerError(
                "tokenizer.json", got=f"cannot be read: {error}", expected="a tokenizer"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.stop_ids = _stop_ids(package, self._tokenizer)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with what the tokenizer adds at its ends unless told not to.

        Raises:
            BadInputError: The text holds half of a surrogate pair: arguments that are not UTF-8 do.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(
                "prompt", got=f"a character that is no text at {error.start}", expected="UTF-8"
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def encode_batch(
        self, texts: Sequence[Any], *, max_length: int | None = None, words: bool = False
    ) -> list[Any]:
        """Encodings of texts, of pairs of texts, or of lists of words, cut to a length.

        Args:
            texts: A text, a tuple of two texts, or with ``words`` a list of words, for each row.
            max_length: Tokens that a row may have, special ones included; all where None. Of a pair the
                longer text is cut.
            words: Whether rows are split into words already.

        Returns:
            For each row an object with ``ids``, ``type_ids``, ``offsets``, ``word_ids`` and
            ``sequence_ids``.
        """
        if max_length is not None:
            self._tokenizer.enable_truncation(max_length)
        try:
            encodings: list[Any] = self._tokenizer.encode_batch(list(texts), is_pretokenized=words)
        finally:
            self._tokenizer.no_truncation()
        return encodings

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def continuation(self, prompt: list[int], ids: list[int]) -> str:
        """The text that ``ids`` add to a prompt.

        Decoded together with the end of the prompt, because some tokenizers drop the space before the
        first word of a text.
        """
        tail = prompt[-4:]
        return self.decode([*tail, *ids])[len(self.decode(tail)) :]


def _stop_ids(package: ModelPackage, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, from the generation configuration, the configuration or the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        try:
            value = json.loads(package.files.get(name, b"{}")).get("eos_token_id")
        except (ValueError, AttributeError):
            continue
        if isinstance(value, int):
            return frozenset({value})
        if isinstance(value, list) and value:
            return frozenset(v for v in value if isinstance(v, int))
    try:
        token = json.loads(package.files.get("tokenizer_config.json", b"{}")).get("eos_token")
    except (ValueError, AttributeError):
        return frozenset()
    text = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return frozenset() if found is None else frozenset({found})
