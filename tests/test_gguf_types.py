"""GGUF models with every block type that the gguf package can dequantise, through the whole loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.source import ModelSource

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

SIZE, LAYERS, VOCABULARY = 256, 6, 258
# transformers' name, GGUF's name; those whose rows are not put in another order.
PLACES = [
    (f"model.layers.{layer}.{theirs}.weight", f"blk.{layer}.{ours}.weight")
    for layer in range(LAYERS)
    for theirs, ours in (
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    )
]


def types() -> list[str]:
    """All that the installed gguf package dequantises, and the plain ones."""
    quantised = [kind.name for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]
    return ["F16", *quantised]


def blocks(kind: Any, seed: int) -> np.ndarray[Any, Any]:
    """Rows of random blocks; small bytes, so that no scale is infinite or not a number."""
    block, size = gguf.constants.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    return random.integers(0, 60, (SIZE, SIZE // block * size)).astype(np.uint8)


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """One model with a weight of each type, and what the gguf package makes of each weight."""
    kinds = types()
    assert len(kinds) <= len(PLACES)
    path = tmp_path_factory.mktemp("types") / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(SIZE)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*alphabet, "th", "<|end|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(0)

    def plain(name: str, *shape: int) -> None:
        values = random.standard_normal(shape) * (0.02 if len(shape) > 1 else 0.1) + (len(shape) == 1)
        writer.add_tensor(name, values.astype(np.float32))

    plain("token_embd.weight", VOCABULARY, SIZE)
    plain("output_norm.weight", SIZE)
    plain("output.weight", VOCABULARY, SIZE)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k"):
            plain(f"blk.{layer}.{name}.weight", SIZE, SIZE)
        plain(f"blk.{layer}.attn_norm.weight", SIZE)
        plain(f"blk.{layer}.ffn_norm.weight", SIZE)
    expected = {}
    for number, (theirs, ours) in enumerate(PLACES):
        if number >= len(kinds):
            plain(ours, SIZE, SIZE)
            continue
        kind = gguf.GGMLQuantizationType[kinds[number]]
        raw = blocks(kind, number)
        if kinds[number] == "F16":
            writer.add_tensor(ours, raw.view(np.float16))
        else:
            writer.add_tensor(ours, raw, raw_dtype=kind)
        values = raw.view(np.float16) if kinds[number] == "F16" else gguf.quants.dequantize(raw, kind)
        expected[theirs] = np.asarray(values, np.float32).reshape(SIZE, SIZE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


def test_every_block_type_is_read(every_type: tuple[Path, dict[str, np.ndarray[Any, Any]]]) -> None:
    path, expected = every_type
    assert len(expected) > 20
    source = ModelSource.parse(str(path))
    lazy = load_torch(source, lazy=True)
    assert lazy.weights is not None
    told = lazy.provenance["quantization"]
    assert set(types()) <= set(told)
    # What the graph will hold, read one weight at a time; and what PyTorch holds.
    package = export(lazy, torch_program(lazy))
    initializers = package.main.model.graph.initializers
    eager = load_torch(source).module.state_dict()
    for name, values in expected.items():
        assert np.isfinite(values).all() and np.ptp(values) > 0, name
        np.testing.assert_array_equal(eager[name].numpy(), values, err_msg=name)
        tensor = initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), values, err_msg=name)
