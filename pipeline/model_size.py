"""How large a model is, from the headers of its files: no weight is read."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.context_length import context_length
from onnxsmith.errors import OnnxsmithError, require
from onnxsmith.package import TEXT_GENERATION
from onnxsmith.source import ModelSource, SourceKind

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel

__all__ = ["ModelSize", "loaded_size", "model_size", "why_unknown"]

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
        width: Of the hidden state; 0 where the configuration does not say, as for the next ones.
        inner: Of the MLPs.
        layers: How many.
        lazy: Whether the weights are in files that can be read one by one.
        recurrent: Elements in recurrent layers, which ONNX Runtime copies; 0 where nobody knows.
        pair: Whether it is an encoder with a decoder, whose graphs have the decoder's weights twice.
        positions: How many a text model has; None where nothing says.
    """

    parameters: int
    stored_bytes: int
    largest: int
    embedding: int
    tied: bool
    vocabulary: int
    decoder: bool
    width: int = 0
    inner: int = 0
    layers: int = 0
    lazy: bool = True
    recurrent: int = 0
    pair: bool = False
    positions: int | None = None


def model_size(source: ModelSource, *, task: str | None = None) -> ModelSize | None:
    """Reads the headers of a model's files.

    Args:
        source: The model.
        task: As the recipe says.

    Returns:
        None where they do not say: a factory, a hub model, a pickle, damaged files.
    """
    try:
        if source.kind is SourceKind.HUGGING_FACE_HUB:
            return _of_directory(_cached(source), task)
        path = source.path
        if path is None:
            return None
        if source.kind is SourceKind.GGUF:
            return _of_gguf(path)
        if source.kind is SourceKind.HUGGING_FACE_DIRECTORY:
            return _of_directory(path, task)
        if source.kind is SourceKind.ADAPTER:
            return _of_adapter(source, task)
        if source.kind is SourceKind.EXPORTED_PROGRAM:
            return _of_archive(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, OnnxsmithError):
        # Whoever loads it says what is wrong with it.
        return None
    return None


def why_unknown(source: ModelSource) -> str:
    """Why ``model_size`` says nothing, in words that follow "because"."""
    if source.kind is SourceKind.FACTORY:
        return "a factory does not say how large its model is before it is called"
    if source.kind is SourceKind.HUGGING_FACE_HUB:
        return "the model is not in this machine's cache of the hub yet"
    if source.kind is SourceKind.ADAPTER:
        return "the model that the adapter belongs to is not on this machine"
    return "the headers of its files do not say how large it is"


def loaded_size(loaded: LoadedModel) -> ModelSize:
    """The size of a model that is in memory."""
    recurrent = require("torch", purpose="a forecast").nn.RNNBase
    parameters = list(loaded.module.parameters())
    buffers = [b for b in loaded.module.buffers() if b.is_floating_point()]
    config: Any = getattr(loaded.module, "config", None)
    plain = {} if config is None or not hasattr(config, "to_dict") else config.to_dict()
    return ModelSize(
        parameters=sum(t.numel() for t in (*parameters, *buffers)),
        stored_bytes=sum(t.numel() * t.element_size() for t in (*parameters, *buffers)),
        largest=max((p.numel() for p in parameters), default=0),
        embedding=0,
        tied=False,
        decoder=loaded.task == TEXT_GENERATION,
        lazy=loaded.weights is not None,
        recurrent=sum(
            p.numel()
            for m in loaded.module.modules()
            if isinstance(m, recurrent)
            for p in m.parameters(recurse=False)
        ),
        **_shape(plain),
    )


def _cached(source: ModelSource) -> Path:
    """Where the hub's client keeps a model; an error of its own where it does not have it."""
    import huggingface_hub

    where = huggingface_hub.snapshot_download(source.target, revision=source.revision, local_files_only=True)
    return Path(where)


def _of_adapter(source: ModelSource, task: str | None) -> ModelSize | None:
    from onnxsmith.exporters.other_sources import base_of_adapter

    base = model_size(base_of_adapter(source), task=task)
    # It is merged into weights that are in memory.
    return None if base is None else dataclasses.replace(base, lazy=False)


def _of_archive(path: Path) -> ModelSize:
    """Of torch's archive, whose tensors are stored one by one; as if all were float32."""
    with zipfile.ZipFile(path) as archive:
        sizes = [
            entry.file_size
            for entry in archive.infolist()
            if not entry.is_dir() and ("/weights/" in entry.filename or "/constants/" in entry.filename)
            and not entry.filename.endswith((".json", ".pt"))
        ]  # fmt: skip
    if not sizes:
        raise ValueError("no weights in the archive")
    return ModelSize(
        parameters=sum(sizes) // 4,
        stored_bytes=sum(sizes),
        largest=max(sizes) // 4,
        embedding=0,
        tied=False,
        vocabulary=0,
        decoder=False,
        lazy=False,
    )


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of a model's shape, by the names of several architectures."""
    inner: Any = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config

    def first(*names: str) -> int:
        return next((int(text[name]) for name in names if isinstance(text.get(name), int)), 0)

    width = first("hidden_size", "d_model", "n_embd", "dim")
    return {
        "vocabulary": first("vocab_size"),
        "width": width,
        "inner": first("intermediate_size", "d_ff", "encoder_ffn_dim", "n_inner", "hidden_dim") or 4 * width,
        "layers": first("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
        "positions": context_length(config),
    }


def _of_gguf(path: Path) -> ModelSize:
    from onnxsmith.gguf_file import GgufFile

    gguf = GgufFile.open(path)
    shapes = {tensor.name: tensor.shape for tensor in gguf.tensors}
    stored = sum(tensor.nbytes for tensor in gguf.tensors)
    vocabulary = len(gguf.metadata.get("tokenizer.ggml.tokens") or ())
    told = gguf.metadata.get(f"{gguf.metadata.get('general.architecture')}.context_length")
    shape = _shape({}) | {"vocabulary": vocabulary, "positions": told if isinstance(told, int) else None}
    return _of_shapes(shapes, stored, shape, decoder=True)


def _of_directory(directory: Path, task: str | None) -> ModelSize | None:
    shapes: dict[str, Sequence[int]] = {}
    stored = 0
    for path in sorted(directory.glob("*.safetensors")):
        for name, shape, size in _safetensors(path):
            shapes[name] = shape
            stored += size
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    pickled = not shapes
    if pickled:
        width = 2 if "16" in str(config.get("torch_dtype") or config.get("dtype")) else 4
        for path in sorted(directory.glob("pytorch_model*.bin")):
            with zipfile.ZipFile(path) as archive:
                entries = [e for e in archive.infolist() if "/data/" in e.filename]
            shapes |= {f"{path.name}:{e.filename}": (e.file_size // width,) for e in entries}
            stored += sum(e.file_size for e in entries)
    if not shapes:
        return None
    architectures = [str(name) for name in config.get("architectures") or ()]
    is_decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    decoder = task == "text-generation" or (task is None and is_decoder)
    found = _of_shapes(shapes, stored, _shape(config), decoder=decoder)
    pair = any("ForConditionalGeneration" in name or "ForSpeechSeq2Seq" in name for name in architectures)
    return dataclasses.replace(found, lazy=not pickled, pair=pair)


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
    shapes: Mapping[str, Sequence[int]], stored: int, shape: Mapping[str, Any], *, decoder: bool
) -> ModelSize:
    sizes: dict[str, Any] = {name: math.prod(shape) for name, shape in shapes.items()}
    embedding = max((size for name, size in sizes.items() if name.endswith(_EMBEDDINGS)), default=0)
    return ModelSize(
        parameters=sum(sizes.values()),
        stored_bytes=stored,
        largest=max(sizes.values(), default=0),
        embedding=embedding,
        tied=decoder and not any(name.endswith(_HEADS) for name in sizes),
        decoder=decoder,
        **shape,
    )
