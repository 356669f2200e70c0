"""Encoders, encoder-decoders, vision and sound for the parity table: small models with random weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["MODEL_GROUPS", "MODEL_HEAD", "ModelRow", "measure_model", "model_line", "model_notes"]


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One line of the table.

    Attributes:
        name: The architecture, and what it is used for.
        architecture: The class in transformers.
        task: A task of ``onnxsmith.exporters.TASKS``.
        options: Of its configuration.
        exporter: See ``onnxsmith.exporters.export_by``.
    """

    name: str
    architecture: str
    task: str
    options: Mapping[str, Any]
    exporter: str = "auto"


_LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_TEXT = {"vocab_size": 96, "max_position_embeddings": 160, **_LAYERS}
_DISTILBERT = {
    "vocab_size": 96,
    "max_position_embeddings": 160,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
}
_BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 1,
}
_T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_WHISPER = {
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    "max_source_positions": 30,
    "max_target_positions": 40,
    "num_mel_bins": 16,
    "pad_token_id": 94,
    "bos_token_id": 93,
    "eos_token_id": 93,
    "decoder_start_token_id": 92,
}
_CLIP = {
    "projection_dim": 24,
    "text_config": {
        "vocab_size": 96,
        "max_position_embeddings": 40,
        "bos_token_id": 1,
        "eos_token_id": 95,
        **_LAYERS,
    },
    "vision_config": {"image_size": 24, "patch_size": 8, **_LAYERS},
}
_WAV2VEC2 = {
    "vocab_size": 30,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    **_LAYERS,
}
_SPEECHT5 = {
    "vocab_size": 38,
    "hidden_size": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "speech_decoder_postnet_units": 16,
    "num_mel_bins": 16,
}
_VITS = {
    "vocab_size": 38,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 48,
    "flow_size": 32,
    "spectrogram_bins": 33,
    "upsample_initial_channel": 32,
    "upsample_rates": [4, 4],
    "upsample_kernel_sizes": [8, 8],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 2,
    "posterior_encoder_num_wavenet_layers": 2,
    "duration_predictor_num_flows": 2,
    "depth_separable_num_layers": 2,
}

MODEL_GROUPS: tuple[tuple[str, tuple[ModelRow, ...]], ...] = (
    (
        "Text encoders",
        (
            ModelRow("BERT, features", "BertModel", "feature-extraction", _TEXT),
            ModelRow("BERT, features, by optimum", "BertModel", "feature-extraction", _TEXT, "optimum"),
            ModelRow("BERT, question answering", "BertForQuestionAnswering", "question-answering", _TEXT),
            ModelRow("BERT, masked words", "BertForMaskedLM", "fill-mask", _TEXT),
            ModelRow(
                "RoBERTa, classification", "RobertaForSequenceClassification", "text-classification", _TEXT
            ),
            ModelRow(
                "DistilBERT, token classification",
                "DistilBertForTokenClassification",
                "token-classification",
                _DISTILBERT,
            ),
            ModelRow(
                "DeBERTa v2, features",
                "DebertaV2Model",
                "feature-extraction",
                {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
            ),
            ModelRow(
                "ModernBERT, features",
                "ModernBertModel",
                "feature-extraction",
                {**_TEXT, "pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 16},
            ),
        ),
    ),
    (
        "Encoder-decoders",
        (
            ModelRow("T5", "T5ForConditionalGeneration", "text2text-generation", _T5),
            ModelRow("T5, by optimum", "T5ForConditionalGeneration", "text2text-generation", _T5, "optimum"),
            ModelRow("BART", "BartForConditionalGeneration", "text2text-generation", _BART),
            ModelRow(
                "Marian",
                "MarianMTModel",
                "text2text-generation",
                {**_BART, "pad_token_id": 95, "decoder_start_token_id": 95},
            ),
            ModelRow("Whisper", "WhisperForConditionalGeneration", "automatic-speech-recognition", _WHISPER),
        ),
    ),
    (
        "Vision and sound",
        (
            ModelRow(
                "ViT, classification",
                "ViTForImageClassification",
                "image-classification",
                {"image_size": 24, "patch_size": 8, "num_labels": 5, **_LAYERS},
            ),
            ModelRow(
                "ResNet, classification",
                "ResNetForImageClassification",
                "image-classification",
                {
                    "embedding_size": 8,
                    "hidden_sizes": [8, 16],
                    "depths": [1, 1],
                    "layer_type": "basic",
                    "num_labels": 5,
                },
            ),
            ModelRow("CLIP, both sides in one graph", "CLIPModel", "zero-shot-image-classification", _CLIP),
            ModelRow("CLIP, a graph for each side", "CLIPModel", "feature-extraction", _CLIP),
            ModelRow(
                "Wav2Vec2, speech recognition", "Wav2Vec2ForCTC", "automatic-speech-recognition", _WAV2VEC2
            ),
            ModelRow(
                "AST, classification of sound",
                "ASTForAudioClassification",
                "audio-classification",
                {"max_length": 64, "num_mel_bins": 32, "num_labels": 5, **_LAYERS},
            ),
            ModelRow("VITS, speech synthesis", "VitsModel", "text-to-audio", _VITS),
            ModelRow("SpeechT5, speech synthesis", "SpeechT5ForTextToSpeech", "text-to-audio", _SPEECHT5),
        ),
    ),
)


def measure_model(row: ModelRow) -> dict[str, Any]:
    """Exports, cleans and compares one model; in a process of its own."""
    import torch
    import transformers

    from onnxsmith.comparison import tolerance_for
    from onnxsmith.environment import peak_rss_mb
    from onnxsmith.errors import OnnxsmithError
    from onnxsmith.exporters import LoadedModel, export_by, torch_programs
    from onnxsmith.exporters.randomness import without_randomness
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
    from onnxsmith.pipeline.references import compare_package, open_programs
    from onnxsmith.pipeline.silencing import draws_numbers, silenced
    from onnxsmith.runtime import OrtBackend
    from onnxsmith.source import ModelSource, SourceKind

    torch.manual_seed(0)
    kind = getattr(transformers, row.architecture)
    module = kind(kind.config_class(**row.options)).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
    source = ModelSource(SourceKind.FACTORY, f"parity:{row.architecture}")
    loaded = LoadedModel(module, source, row.task, {}, {})
    began, cpu = time.perf_counter(), time.process_time()
    try:
        package, programs = export_by(row.exporter, loaded, torch_programs(loaded))
    except OnnxsmithError as error:
        return {"name": row.name, "refused": str(error)}
    seconds, cpu, peak = time.perf_counter() - began, time.process_time() - cpu, peak_rss_mb()
    step = package.steps[0]
    package = run_passes(package, make_passes(PRESETS["clean"]))
    candidate, noisy = package, draws_numbers(package)
    if noisy:
        candidate = silenced(package)
        programs = {name: without_randomness(program) for name, program in programs.items()}
    with open_programs(programs) as reference:
        comparison = compare_package(
            reference,
            reference.expected(candidates=[candidate]),
            candidate,
            OrtBackend(),
            tolerance=tolerance_for("float32"),
            name=row.name,
        )
    return {
        "name": row.name,
        "road": step.parameters["exporter"],
        "details": step.details,
        "nodes": {name: sum(1 for _ in one.model.graph) for name, one in package.components.items()},
        "compared": len(comparison.tensors),
        "worst": max((tensor.max_abs / (tensor.scale or 1.0) for tensor in comparison.tensors), default=0.0),
        "where": "" if comparison.worst is None else comparison.worst.name,
        "noisy": noisy,
        "passed": comparison.passed,
        "reason": comparison.reason,
        "seconds": seconds,
        "cpu": cpu,
        "peak_mb": peak,
    }


MODEL_HEAD = (
    "| architecture | road | graphs | nodes | tensors compared | worst error | of | CPU s | peak MB |",
    "|---|---|---|---|---|---|---|---|---|",
)


def model_line(result: Mapping[str, Any]) -> str:
    """One row of the table in Markdown."""
    if "refused" in result:
        return f"| {result['name']} | refused | | | | | | | |"
    worst = f"{result['worst']:.0e}"
    nodes = result["nodes"]
    cells = [
        result["name"],
        result["road"],
        len(nodes),
        " + ".join(map(str, nodes.values())),
        result["compared"],
        worst if result["passed"] else f"**{worst}**",
        f"`{result['where']}`",
        f"{result['cpu']:.1f}",
        f"{result['peak_mb']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def model_notes(results: Any) -> list[str]:
    """What has to be said below a table."""
    return [
        *(f"- {r['name']}: refused. {r['refused']}" for r in results if "refused" in r),
        *(f"- **{r['name']} differs**: {r['reason']}." for r in results if not r.get("passed", True)),
        *(
            f"- {r['name']}: by optimum, because: {r['details']['why_not_torch']}"
            for r in results
            if r.get("details", {}).get("why_not_torch")
        ),
        *(
            f"- {r['name']}: {component}: fixed axes: {', '.join(told['fixed_axes'])}."
            for r in results
            for component, told in r.get("details", {}).items()
            if isinstance(told, dict) and "fixed_axes" in told
        ),
        *(
            f"- {r['name']}: draws random numbers, and is compared with their means in their place."
            for r in results
            if r.get("noisy")
        ),
    ]
