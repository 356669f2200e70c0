"""Checkpoints that lie inside Python packages, as PyTorch models: speech, grammar and voices.

Each function builds a module of transformers or torch and fills it from the package's own format.
`make models` brings the packages and the speech.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


def package_directory(package: str) -> Path | None:
    """Where an installed package lies, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


# Whisper, from CTranslate2


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 `model.bin` (binary version 6)."""
    kinds = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    with path.open("rb") as file:
        _numbers(file, "I")
        _text(file)
        _, count = _numbers(file, "II")
        found = {}
        for _ in range(count):
            name = _text(file)
            (rank,) = _numbers(file, "B")
            shape = _numbers(file, f"{rank}I") if rank else ()
            kind, size = _numbers(file, "BI")
            found[name] = np.frombuffer(file.read(size), kinds[kind]).reshape(shape)
    return found


def _numbers(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _text(file: BinaryIO) -> str:
    (length,) = _numbers(file, "H")
    return file.read(length)[:-1].decode()


def whisper(directory: Path) -> Any:
    """Whisper tiny.en, in float32, with the settings for generation."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    values = read_ctranslate2(directory / "model.bin")
    width = values["encoder/conv1/weight"].shape[0]
    vocabulary = values["decoder/embeddings/weight"].shape[0]
    layers = {
        side: len(
            {
                n.split("/")[1]
                for n in values
                if n.startswith(f"{side}/layer_") and "/layer_norm/" not in n[:20]
            }
        )
        for side in ("encoder", "decoder")
    }
    heads = int(values["encoder/num_heads"])
    # The English models have one token less before the special ones.
    start = 50257 if vocabulary == 51864 else 50258
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=values["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=start,
        bos_token_id=start - 1,
        eos_token_id=start - 1,
        pad_token_id=start - 1,
    )

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(values[name].astype(np.float32))

    state = {
        "model.encoder.embed_positions.weight": tensor("encoder/position_encodings/encodings"),
        "model.decoder.embed_positions.weight": tensor("decoder/position_encodings/encodings"),
        "model.decoder.embed_tokens.weight": tensor("decoder/embeddings/weight"),
        "proj_out.weight": tensor("decoder/embeddings/weight"),
    }
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"model.encoder.{name}.{part}"] = tensor(f"encoder/{name}/{part}")

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = tensor(f"{theirs}/gamma"), tensor(f"{theirs}/beta")

    def linear(ours: str, theirs: str, part: int = 0, parts: int = 1) -> None:
        state[f"{ours}.weight"] = tensor(f"{theirs}/weight").chunk(parts)[part].clone()
        # Keys have no bias.
        if not ours.endswith("k_proj"):
            state[f"{ours}.bias"] = tensor(f"{theirs}/bias").chunk(parts)[part].clone()

    for side, count in layers.items():
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for layer in range(count):
            ours, theirs = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            for number, kind in enumerate("qkv"):
                linear(f"{ours}.self_attn.{kind}_proj", f"{theirs}/self_attention/linear_0", number, 3)
            linear(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                linear(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                for number, kind in enumerate("kv"):
                    linear(f"{ours}.encoder_attn.{kind}_proj", f"{theirs}/attention/linear_1", number, 2)
                linear(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, strict=True)
    told = json.loads((directory / "config.json").read_text())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        bos_token_id=start - 1,
        eos_token_id=start - 1,
        pad_token_id=start - 1,
        max_length=448,
        suppress_tokens=told["suppress_ids"],
        begin_suppress_tokens=told["suppress_ids_begin"],
        is_multilingual=False,
        no_timestamps_token_id=50362,
    )
    return model.eval()


# A tagger of grammar, from a quantized ONNX graph


def grammar_tagger(directory: Path) -> tuple[Any, Any]:
    """A DistilBERT that tags tokens, and its tokenizer; the weights are dequantized."""
    import onnx
    from onnx import numpy_helper
    from transformers import DistilBertConfig, DistilBertForTokenClassification, PreTrainedTokenizerFast

    graph = onnx.load(directory / "tagger.onnx").graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    floats = {name: array for name, array in stored.items() if array.dtype == np.float32}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            floats[node.output[0]] = _dequantized(node, stored)

    def state_name(name: str) -> str:
        return name.replace("_DequantizeLinear_Output", "").removesuffix("_quantized")

    ours = ("distilbert.", "classifier.")
    state = {state_name(n): array for n, array in floats.items() if state_name(n).startswith(ours)}
    for node in graph.node:
        weight = floats.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.ndim != 2:
            continue
        # A weight without a name belongs to the bias that is added next.
        output = node.output[0]
        while users[output][0].op_type != "Add":
            output = users[output][0].output[0]
        bias = next(n for n in users[output][0].input if n in floats and floats[n].ndim == 1)
        name = state_name(bias)
        state[f"{name.removesuffix('bias')}weight"], state[name] = weight.T, floats[bias]
    tags = json.loads((directory / "tag_vocab.json").read_text())["tags"]
    config = DistilBertConfig(
        vocab_size=state["distilbert.embeddings.word_embeddings.weight"].shape[0], num_labels=len(tags)
    )
    model = DistilBertForTokenClassification(config)
    tensors = {name: torch.from_numpy(np.array(a, np.float32, order="C")) for name, a in state.items()}
    model.load_state_dict({n: t for n, t in tensors.items() if n in model.state_dict()}, strict=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
    return model.eval(), tokenizer


def _dequantized(node: Any, stored: dict[str, np.ndarray]) -> np.ndarray:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    values, scale = stored[node.input[0]].astype(np.float32), stored[node.input[1]]
    zero = stored.get(node.input[2], np.float32(0)) if len(node.input) > 2 else np.float32(0)
    zero = np.asarray(zero, np.float32)
    if scale.ndim:
        shape = [1] * values.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return (values - zero) * scale


# Voices


class SpeakerEncoder(torch.nn.Module):
    """Resemblyzer's: mel spectrograms (batch, frames, 40) to unit vectors (batch, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(mels)
        embedding = torch.relu(self.linear(hidden[-1]))
        return embedding / embedding.norm(dim=1, keepdim=True)


def speaker_encoder() -> tuple[torch.nn.Module, torch.Tensor]:
    """The LSTM with its weights, and example inputs."""
    directory = package_directory("resemblyzer")
    assert directory is not None, "run `make models`"
    saved = torch.load(directory / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    model = SpeakerEncoder()
    model.load_state_dict({n: t for n, t in saved.items() if not n.startswith("similarity")})
    return model.eval(), torch.rand(2, 160, 40)
