"""bisect on one graph of an encoder-decoder, against PyTorch: a fault in the decoder is found at its node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.bisecting import bisect_models
from onnxsmith.runtime.tensor_errors import ErrorSum

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_a_fault_in_a_decoder_is_found_at_its_node(tmp_path: Path) -> None:
    from onnxsmith import export_model

    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    model.eval().save_pretrained(tmp_path / "source")
    export_model(str(tmp_path / "source"), tmp_path / "artifact")
    source, artifact = str(tmp_path / "source"), tmp_path / "artifact"
    healthy = bisect_models(source, artifact, component="decoder_model", samples=2)
    assert healthy.passed, healthy.verdict
    assert len(healthy.tensors) > 30
    path = artifact / "decoder_model.onnx"
    graph = onnx.load(path)
    products = [n for n in graph.graph.node if n.op_type in ("MatMul", "Gemm")]
    weights = {t.name: t for t in graph.graph.initializer}
    [node] = [n for n in products if any("1" in name and "fc2" in name for name in n.input)]
    [name] = [one for one in node.input if one in weights and len(weights[one].dims) == 2]
    array = onnx.numpy_helper.to_array(weights[name]).copy()
    array[5, 7] += 4
    weights[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(graph, path)
    found = bisect_models(source, artifact, component="decoder_model", samples=2, output=tmp_path / "fault")
    assert not found.passed
    assert found.suspects[0].node == node.name, found.verdict
    assert found.suspects[0].introduced.worst_channel == 7
    assert (tmp_path / "fault" / "reproduce.py").is_file()
    # The other graphs are as they were.
    assert bisect_models(source, artifact, component="encoder_model", samples=1).passed
    with pytest.raises(BadInputError, match="Name one: --component encoder_model"):
        bisect_models(source, artifact)


@pytest.mark.slow
def test_masked_scores_do_not_hide_which_layer_is_which(tmp_path: Path) -> None:
    """T5 adds its mask to scores: beside -3.4e38 those of two layers differ by nothing."""
    from onnxsmith import export_model

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).eval().save_pretrained(tmp_path / "source")
    source, artifact = str(tmp_path / "source"), tmp_path / "artifact"
    export_model(source, artifact)
    healthy = bisect_models(source, artifact, component="decoder_model", samples=2)
    assert healthy.passed, healthy.verdict
    assert len(healthy.tensors) > 115
    path = artifact / "decoder_model.onnx"
    graph = onnx.load(path)
    weights = {t.name: t for t in graph.graph.initializer}
    [node] = [n for n in graph.graph.node if any("1.layer.1.EncDecAttention.o" in name for name in n.input)]
    [name] = [one for one in node.input if one in weights]
    array = onnx.numpy_helper.to_array(weights[name]).copy()
    array[5, 7] += 4
    weights[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(graph, path)
    found = bisect_models(source, artifact, component="decoder_model", samples=2)
    assert not found.passed
    assert found.suspects[0].node in [node.name, node.output[0]], found.verdict


def test_what_a_mask_hides_does_not_count() -> None:
    lowest = np.finfo(np.float32).min
    right = np.array([[1.0, 2.0, lowest]], np.float32)
    total = ErrorSum()
    total.add(right, np.array([[1.0, 3.0, lowest]], np.float32))
    assert total.total().relative == pytest.approx(1 / np.sqrt(5))
    unmasked = ErrorSum()
    unmasked.add(right, np.array([[1.0, 2.0, 0.0]], np.float32))
    assert unmasked.total().relative == pytest.approx(1.0)
