"""Image, sound and paired encoders of transformers, and pooled text encoders: no code per architecture."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from onnxsmith import export_model
from onnxsmith.comparison import TOLERANCES, Comparison
from onnxsmith.errors import ExportError, SourceError
from onnxsmith.exporters import LoadedModel, export, torch_programs
from onnxsmith.package import ModelPackage
from onnxsmith.pipeline.references import compare_package, open_programs
from onnxsmith.runtime import OrtBackend
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def exported(model: Any, task: str, files: dict[str, bytes] | None = None) -> tuple[ModelPackage, Comparison]:
    """The package, and its comparison without any of ONNX Runtime's optimisations."""
    source = ModelSource(SourceKind.FACTORY, "test:make")
    loaded = LoadedModel(model.eval().requires_grad_(False), source, task, files or {}, {})
    programs = torch_programs(loaded)
    package = export(loaded, programs)
    with open_programs(programs) as reference:
        expected = reference.expected(candidates=[package])
        backend = OrtBackend(threads=1, optimize=False)
        tolerance = TOLERANCES["float32"]
        return package, compare_package(
            reference, expected, package, backend, tolerance=tolerance, name="test"
        )


def signature(package: ModelPackage, component: str = "model") -> list[str]:
    part = package.components[component]
    return [str(spec) for spec in (*part.inputs, *part.outputs)]


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    architecture, config = name.split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, architecture)(getattr(transformers, config)(**options))


def test_vit_keeps_its_image_size() -> None:
    model = made("ViTForImageClassification:ViTConfig", image_size=24, patch_size=8, num_labels=5, **LAYERS)
    package, comparison = exported(model, "image-classification")
    assert comparison.passed, comparison.reason
    assert signature(package) == ["pixel_values: float32[batch, 3, 24, 24]", "logits: float32[batch, 5]"]
    assert {t.case for t in comparison.tensors} == {"batch=1", "batch=2", "batch=3"}


def test_resnet_takes_images_of_any_size() -> None:
    model = made(
        "ResNetForImageClassification:ResNetConfig",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_labels=5,
        layer_type="basic",
    )
    files = {"preprocessor_config.json": json.dumps({"size": {"shortest_edge": 20}}).encode()}
    package, comparison = exported(model, "image-classification", files)
    assert comparison.passed, comparison.reason
    assert signature(package) == [
        "pixel_values: float32[batch, 3, height, width]",
        "logits: float32[batch, 5]",
    ]
    # No two axes of one size, or one taken for the other would go unnoticed.
    assert "batch=2 height=7 width=8" in {t.case for t in comparison.tensors}


CLIP = {
    "text_config": LAYERS | {"vocab_size": 99, "max_position_embeddings": 40, "eos_token_id": 98},
    "vision_config": LAYERS | {"image_size": 24, "patch_size": 8},
    "projection_dim": 16,
}


def test_clip_has_a_batch_of_texts_and_one_of_images() -> None:
    package, comparison = exported(made("CLIPModel:CLIPConfig", **CLIP), "zero-shot-image-classification")
    assert comparison.passed, comparison.reason
    assert signature(package) == [
        "input_ids: int64[text_batch, sequence]",
        "attention_mask: int64[text_batch, sequence]",
        "pixel_values: float32[image_batch, 3, 24, 24]",
        "logits_per_image: float32[image_batch, text_batch]",
        "logits_per_text: float32[text_batch, image_batch]",
        "text_embeds: float32[text_batch, 16]",
        "image_embeds: float32[image_batch, 16]",
    ]


@pytest.mark.slow
def test_the_features_of_clip_are_two_graphs() -> None:
    package, comparison = exported(made("CLIPModel:CLIPConfig", **CLIP), "feature-extraction")
    assert comparison.passed, comparison.reason
    assert list(package.components) == ["text_model", "vision_model"]
    assert signature(package, "text_model")[-1] == "text_embeds: float32[batch, 16]"
    assert signature(package, "vision_model") == [
        "pixel_values: float32[batch, 3, 24, 24]",
        "image_embeds: float32[batch, 16]",
    ]


@pytest.mark.slow
def test_sound_as_samples() -> None:
    model = made(
        "Wav2Vec2ForCTC:Wav2Vec2Config",
        vocab_size=32,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **LAYERS,
    )
    package, comparison = exported(model, "automatic-speech-recognition")
    assert comparison.passed, comparison.reason
    name, logits = signature(package)
    assert name == "input_values: float32[batch, length]"
    # How many frames there are is computed from the samples.
    assert logits.startswith("logits: float32[batch, ") and "length" in logits and logits.endswith(", 32]")


@pytest.mark.slow
def test_sound_as_a_spectrogram() -> None:
    model = made(
        "ASTForAudioClassification:ASTConfig", max_length=64, num_mel_bins=32, num_labels=5, **LAYERS
    )
    package, comparison = exported(model, "audio-classification")
    assert comparison.passed, comparison.reason
    assert signature(package) == ["input_values: float32[batch, 64, 32]", "logits: float32[batch, 5]"]


def sentence_transformer(path: Path, **pooling: bool) -> Path:
    model = made("BertModel:BertConfig", vocab_size=64, max_position_embeddings=80, **LAYERS)
    model.save_pretrained(path)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"}
        for i, k in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return path


@pytest.mark.parametrize(
    "mode",
    [
        "mean_tokens",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("cls_token", "max_tokens", "mean_sqrt_len_tokens")
        ),
    ],
)
def test_pooling_is_in_the_graph(mode: str, tmp_path: Path) -> None:
    source = sentence_transformer(
        tmp_path / "model", **{f"pooling_mode_{mode}": True, "pooling_mode_other": False}
    )
    package, comparison = export_model(str(source), tmp_path / "artifact", task="sentence-similarity")
    assert comparison is not None and comparison.passed
    # Padding is where pooling goes wrong.
    assert any("padding" in t.case and t.name == "sentence_embedding" for t in comparison.tensors)
    assert signature(package)[-2:] == [
        "last_hidden_state: float32[batch, sequence, 32]",
        "sentence_embedding: float32[batch, 32]",
    ]


def test_pooling_is_what_sentence_transformers_does(tmp_path: Path) -> None:
    from onnxsmith.exporters import load_torch, torch_program

    source = sentence_transformer(tmp_path / "model", pooling_mode_mean_tokens=True)
    program = torch_program(load_torch(ModelSource.parse(str(source)), task="sentence-similarity"))
    ids, mask = torch.randint(1, 64, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    given = {"input_ids": ids, "attention_mask": mask}
    got = program.module(
        **given, **({"token_type_ids": ids * 0} if "token_type_ids" in program.examples else {})
    )
    short = program.module.inner(input_ids=ids[1:, :2]).last_hidden_state.mean(1)
    expected = torch.nn.functional.normalize(short, dim=-1)
    torch.testing.assert_close(got["sentence_embedding"][1:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({}, r"no 1_Pooling/config\.json, as sentence-transformers writes; expected one of cls_token"),
        ({"pooling_mode_lasttoken": True}, r"pooling lasttoken; expected one of"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            r"pooling max_tokens, mean_tokens",
        ),
    ],
)
def test_pooling_that_is_not_known_is_refused(pooling: dict[str, bool], message: str, tmp_path: Path) -> None:
    source = sentence_transformer(tmp_path / "model", **pooling)
    if not pooling:
        (source / "modules.json").unlink()
    with pytest.raises(SourceError, match=message):
        export_model(str(source), tmp_path / "artifact", task="sentence-similarity")


def test_speech_from_a_decoder_is_refused() -> None:
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    options = {"hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 30, **sizes}
    config = transformers.SpeechT5Config(speech_decoder_postnet_units=16, num_mel_bins=8, **options)
    module = transformers.SpeechT5ForTextToSpeech(config).eval()
    model = LoadedModel(module, ModelSource(SourceKind.FACTORY, "test:make"), "text-to-audio", {}, {})
    with pytest.raises(ExportError, match=r"SpeechT5ForTextToSpeech: speech from a decoder.*such as VITS"):
        torch_programs(model)
