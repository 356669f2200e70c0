"""What every peer can be asked for."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Adapter", "Decoder", "Encoder", "SteppingDecoder", "mean_pooled", "tree_bytes"]

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Decoder(abc.ABC):
    """A language model that is open, with its cache."""

    @abc.abstractmethod
    def prefill(self, ids: list[int]) -> int:
        """Empties the cache, reads a prompt and gives the next token, greedily."""

    @abc.abstractmethod
    def decode(self, count: int) -> list[int]:
        """Continues by so many tokens, one after the other, greedily."""

    @abc.abstractmethod
    def logits(self, ids: list[int]) -> Floats:
        """(tokens, vocabulary) of a text, from an empty cache."""


class SteppingDecoder(Decoder):
    """One that is asked for the logits of further tokens, each time from Python."""

    _last = 0

    @abc.abstractmethod
    def _reset(self) -> None:
        """Empties the cache."""

    @abc.abstractmethod
    def _step(self, ids: list[int]) -> Floats:
        """(tokens, vocabulary) of tokens that follow; the likeliest next one becomes ``_last``."""

    def prefill(self, ids: list[int]) -> int:
        """As the contract says."""
        self._reset()
        self._step(ids)
        return self._last

    def decode(self, count: int) -> list[int]:
        """As the contract says."""
        tokens = []
        for _ in range(count):
            self._step([self._last])
            tokens.append(self._last)
        return tokens

    def logits(self, ids: list[int]) -> Floats:
        """As the contract says."""
        self._reset()
        return self._step(ids)


class Encoder(abc.ABC):
    """A model of sentences that is open."""

    @abc.abstractmethod
    def embed(self, ids: Tokens, mask: Tokens) -> Floats:
        """(batch, tokens) to (batch, hidden): the mean over the tokens, of length 1."""


class Adapter:
    """A converter, a runtime, or both. What it cannot do raises ``NotImplementedError`` with the reason."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        """Makes a model in a directory. The caller measures it."""
        raise NotImplementedError("it converts nothing")

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        """Opens a language model."""
        raise NotImplementedError("it runs no language models")

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        """Opens an encoder."""
        raise NotImplementedError("it runs no encoders")

    def versions(self) -> dict[str, Any]:
        """What the result depends on."""
        import importlib.metadata as metadata

        names = (
            "onnxruntime", "onnxruntime-genai", "llama_cpp_python", "optimum-onnx", "olive-ai", "onnxsim",
            "onnxslim", "openvino", "torch", "transformers", "numpy", "onnx",
        )  # fmt: skip
        found = {}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found


def mean_pooled(hidden: Any, mask: Any) -> Floats:
    """The mean over tokens that are not padding, of length 1."""
    weights = np.asarray(mask, np.float32)[..., None]
    mean = (np.asarray(hidden, np.float32) * weights).sum(1) / weights.sum(1)
    pooled: Floats = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    return pooled


def tree_bytes(path: Path) -> int:
    """Bytes of the model's own files: graphs and weights."""
    kinds = (".onnx", ".data", ".gguf", ".safetensors", ".bin", ".xml", ".onnx_data")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if file.name.endswith(kinds))
