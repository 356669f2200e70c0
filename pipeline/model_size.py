"""How large a model is, from the headers of its files: no weight is read, and nothing heavy is imported."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith.errors import OnnxsmithError
from onnxsmith.source import ModelSource, SourceKind

__all__ = ["ModelSize", "model_size"]

# A header of the largest models that there are has a few MB.
_MAX_HEADER_BYTES = 64 * 1024 * 1024
_ELEMENT_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "token_embd.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What the headers of a model's files say.

    Attributes:
        parameters: Elements of all tensors.
        stored_bytes: What the files have.
        largest: Elements of the largest tensor.
        embedding: Elements of the embedding of tokens; 0 where none was recognised.
        tied: Whether the embedding is the last layer too, which ONNX has twice where it is turned.
        vocabulary: Tokens, as the configuration says; 0 where it does not.
        decoder: Whether it is a decoder, whose weights stay in their files until PyTorch runs it.
    """

    parameters: int
    stored_bytes: int
    largest: int
    embedding: int
    tied: bool
    vocabulary: int
    decoder: bool


def model_size(source: ModelSource, *, task: str | None = None) -> ModelSize | None:
    """Reads the headers of a model's files.

    Args:
        source: The model.
        task: As the recipe says.

    Returns:
        None where they do not say: a factory, a hub model, a pickle, damaged files.
    """
    path = source.path
    if path is None:
        return None
    try:
        if source.kind is SourceKind.GGUF:
            return _of_gguf(path)
        if source.kind is SourceKind.HUGGING_FACE_DIRECTORY:
            return _of_directory(path, task)
    except (OSError, ValueError, KeyError, TypeError, OnnxsmithError):
        # Whoever loads it says what is wrong with it.
        return None
    return None


def _of_gguf(path: Path) -> ModelSize:
    from onnxsmith.gguf_file import GgufFile

    gguf = GgufFile.open(path)
    shapes = {tensor.name: tensor.shape for tensor in gguf.tensors}
    stored = sum(tensor.nbytes for tensor in gguf.tensors)
    vocabulary = len(gguf.metadata.get("tokenizer.ggml.tokens") or ())
    return _of_shapes(shapes, stored, vocabulary, decoder=True)


def _of_directory(directory: Path, task: str | None) -> ModelSize | None:
    shapes: dict[str, Sequence[int]] = {}
    stored = 0
    for path in sorted(directory.glob("*.safetensors")):
        for name, shape, size in _safetensors(path):
            shapes[name] = shape
            stored += size
    if not shapes:
        return None
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    architectures = [str(name) for name in config.get("architectures") or ()]
    is_decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    decoder = task == "text-generation" or (task is None and is_decoder)
    return _of_shapes(shapes, stored, int(text.get("vocab_size") or 0), decoder=decoder)


def _safetensors(path: Path) -> Iterator[tuple[str, Sequence[int], int]]:
    """Name, shape and bytes of each tensor, from the header.

    It is JSON after its length in eight bytes.
    """
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError("the header is longer than the file")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            bits = _ELEMENT_BITS.get(entry["dtype"], 32)
            yield name, entry["shape"], math.prod(entry["shape"]) * bits // 8


def _of_shapes(
    shapes: Mapping[str, Sequence[int]], stored: int, vocabulary: int, *, decoder: bool
) -> ModelSize:
    sizes: dict[str, Any] = {name: math.prod(shape) for name, shape in shapes.items()}
    embedding = max((size for name, size in sizes.items() if name.endswith(_EMBEDDINGS)), default=0)
    return ModelSize(
        parameters=sum(sizes.values()),
        stored_bytes=stored,
        largest=max(sizes.values(), default=0),
        embedding=embedding,
        tied=decoder and not any(name.endswith(_HEADS) for name in sizes),
        vocabulary=vocabulary,
        decoder=decoder,
    )
