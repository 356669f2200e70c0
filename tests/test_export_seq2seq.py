"""Encoder-decoders: three graphs with optimum's names, each compared on what the others give it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith import compare_models, export_model, optimize_model
from onnxsmith.comparison import TOLERANCES
from onnxsmith.errors import BadInputError, FeedError
from onnxsmith.exporters import LoadedModel, torch_program, torch_programs
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.artifact import verify_artifact
from onnxsmith.pipeline.references import compare_package, open_programs
from onnxsmith.runtime import OrtBackend, Seq2SeqDecoder, generate_sequences, open_components
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

COMPONENTS = ["encoder_model", "decoder_model", "decoder_with_past_model"]
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    # Large, or every prediction is nearly the same and no comparison says anything.
    "init_std": 0.3,
}
FAMILIES = {
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "initializer_factor": 2.0,
            "tie_word_embeddings": False,
        },
    ),
    "Bart": ("BartForConditionalGeneration", BART | {"max_position_embeddings": 80}),
    "Marian": ("MarianMTModel", BART | {"max_position_embeddings": 80, "pad_token_id": 98}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        BART
        | {
            "max_source_positions": 30,
            "max_target_positions": 40,
            "num_mel_bins": 16,
            "pad_token_id": 98,
            "bos_token_id": 97,
            "eos_token_id": 97,
            "decoder_start_token_id": 96,
        },
    ),
}


def model_of(family: str) -> Any:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**options)).eval()


def directory_of(family: str, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_of(family).save_pretrained(path)
    return path


def loaded(family: str) -> LoadedModel:
    task = "automatic-speech-recognition" if family == "Whisper" else "text2text-generation"
    module = model_of(family).requires_grad_(False)
    return LoadedModel(module, ModelSource(SourceKind.FACTORY, "test:make"), task, {}, {})


def signature(package: ModelPackage, component: str) -> tuple[dict[str, Any], dict[str, Any]]:
    part = package.components[component]
    return {s.name: s.shape for s in part.inputs}, {s.name: s.shape for s in part.outputs}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A directory of a random T5, and its artifact."""
    root = tmp_path_factory.mktemp("t5")
    source = directory_of("T5", root / "t5")
    _, comparison = export_model(str(source), root / "artifact")
    assert comparison is not None and comparison.passed
    # Every graph, on five shapes: rows 1 to 3, one token and many, padding.
    parts = {tensor.case.partition(": ")[0] for tensor in comparison.tensors}
    assert parts == set(COMPONENTS)
    assert len({tensor.case for tensor in comparison.tensors}) == 15
    return source, root / "artifact"


def test_the_names_are_those_of_optimum(t5: tuple[Path, Path]) -> None:
    package = load_package(t5[1])
    assert list(package.components) == COMPONENTS
    assert package.task == "text2text-generation"
    assert signature(package, "encoder_model") == (
        {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")},
        {"last_hidden_state": ("batch", "sequence", 32)},
    )
    inputs, outputs = signature(package, "decoder_model")
    assert inputs == {
        "input_ids": ("batch", "sequence"),
        "encoder_attention_mask": ("batch", "encoder_sequence"),
        "encoder_hidden_states": ("batch", "encoder_sequence", 32),
    }
    caches = [
        f"{layer}.{side}.{part}"
        for layer in (0, 1)
        for side in ("decoder", "encoder")
        for part in ("key", "value")
    ]
    assert list(outputs) == ["logits", *(f"present.{name}" for name in caches)]
    assert outputs["present.1.encoder.key"] == ("batch", 4, "encoder_sequence", 8)
    inputs, outputs = signature(package, "decoder_with_past_model")
    # The hidden states are not needed any more: what came of them is in the cache.
    assert list(inputs) == [
        "input_ids",
        "encoder_attention_mask",
        *(f"past_key_values.{name}" for name in caches),
    ]
    assert inputs["past_key_values.0.decoder.value"] == ("batch", 4, "past_sequence", 8)
    assert list(outputs) == ["logits", *(f"present.{name}" for name in caches if "decoder" in name)]
    assert outputs["present.0.decoder.key"] == ("batch", 4, "total_sequence", 8)


def test_the_graphs_go_on_together(t5: tuple[Path, Path], tmp_path: Path) -> None:
    """Verified, optimised and compared as one model; a changed weight in any graph is found."""
    source, artifact = t5
    assert verify_artifact(artifact) == []
    optimize_model(
        artifact, tmp_path / "fused", [("cleanup", {}), ("quantize_weights", {"bits": 8, "block_size": 32})]
    )
    [small] = compare_models(str(source), [tmp_path / "fused"], samples=2)
    assert small.passed, small.reason
    assert {tensor.case.partition(": ")[0] for tensor in small.tensors} == set(COMPONENTS)
    [same] = compare_models(str(artifact), [artifact], samples=2)
    assert same.passed
    with pytest.raises(
        BadInputError, match=r"one file of inputs for the components encoder_model, decoder_model"
    ):
        np.savez(tmp_path / "in.npz", x=np.zeros(1))
        compare_models(str(artifact), [artifact], inputs=tmp_path / "in.npz")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_changed_weight_in_any_graph_is_found(t5: tuple[Path, Path], component: str) -> None:
    import onnx_ir as ir

    model = loaded("T5")
    package = load_package(t5[1]).derive()
    graph = package.components[component].model.graph
    weight = next(v for v in graph.initializers.values() if "DenseReluDense.wo" in (v.name or ""))
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01), name=weight.name)
    package.components[component].path = None
    with open_programs(torch_programs(model)) as reference:
        comparison = compare_package(
            reference,
            reference.expected(samples=2),
            package,
            OrtBackend(threads=1),
            tolerance=TOLERANCES["float32"],
            name="changed",
        )
    assert not comparison.passed
    assert component in comparison.reason


def test_a_missing_component_is_a_difference(t5: tuple[Path, Path]) -> None:
    package = load_package(t5[1])
    less = package.only("encoder_model")
    parts = {name: package.only(name) for name in ("encoder_model", "decoder_model")}
    with open_programs(torch_programs(loaded("T5"))) as reference:
        expected = reference.expected(samples=1)
        comparison = compare_package(
            reference, expected, less, OrtBackend(threads=1), tolerance=TOLERANCES["float32"], name="less"
        )
    assert not comparison.passed
    assert "the candidate lacks the component decoder_model" in comparison.reason
    with (
        open_components(OrtBackend(threads=1), parts) as sessions,
        pytest.raises(FeedError, match="no component decoder_with_past_model"),
    ):
        Seq2SeqDecoder(sessions)


def test_text_is_the_same_as_that_of_transformers(t5: tuple[Path, Path]) -> None:
    source, artifact = t5
    model = transformers.T5ForConditionalGeneration.from_pretrained(source)
    ids = np.array([[5, 17, 3, 88, 41], [9, 2, 60, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=12, do_sample=False, num_beams=1
    )
    package = load_package(artifact)
    parts = {name: package.only(name) for name in package.components}
    with open_components(OrtBackend(threads=1), parts) as sessions:
        tokens = list(
            generate_sequences(
                Seq2SeqDecoder(sessions),
                {"input_ids": ids, "attention_mask": mask},
                np.zeros((2, 1), np.int64),
                max_new_tokens=12,
                stop=[1],
            )
        )
    got = np.stack(tokens, 1)
    for row in range(2):
        wanted = expected[row, 1:].tolist()
        end = wanted.index(1) + 1 if 1 in wanted else len(wanted)
        assert got[row, :end].tolist() == wanted[:end]
    assert got[0].tolist() != got[1].tolist()


def test_a_program_of_one_graph_is_refused_where_there_are_three() -> None:
    with pytest.raises(
        Exception, match=r"the components encoder_model, decoder_model, decoder_with_past_model"
    ):
        torch_program(loaded("T5"))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "T5"])
def test_other_families(family: str, tmp_path: Path) -> None:
    source = directory_of(family, tmp_path / family)
    package, comparison = export_model(str(source), tmp_path / "artifact")
    assert comparison is not None and comparison.passed
    assert list(package.components) == COMPONENTS
    assert len({tensor.case for tensor in comparison.tensors}) >= 13
    inputs, _ = signature(package, "decoder_model")
    if family == "Whisper":
        assert package.task == "automatic-speech-recognition"
        assert signature(package, "encoder_model") == (
            {"input_features": ("batch", 16, 60)},
            {"last_hidden_state": ("batch", 30, 32)},
        )
        assert inputs["encoder_hidden_states"] == ("batch", 30, 32)
    else:
        assert inputs["encoder_hidden_states"] == ("batch", "encoder_sequence", 32)


@pytest.mark.slow
def test_optimum_runs_it(t5: tuple[Path, Path], tmp_path: Path) -> None:
    """The names are right if the program that made them so finds its way through them."""
    onnxruntime = pytest.importorskip("optimum.onnxruntime")
    source, artifact = t5
    ids = torch.tensor([[5, 17, 3, 88, 41]])
    model = transformers.T5ForConditionalGeneration.from_pretrained(source)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = onnxruntime.ORTModelForSeq2SeqLM.from_pretrained(artifact, use_merged=False)
        got = ours.generate(ids, max_new_tokens=12, do_sample=False)
    assert got.tolist() == expected.tolist()


def test_the_manifest_names_the_components(t5: tuple[Path, Path]) -> None:
    manifest = json.loads((t5[1] / "manifest.json").read_text())
    assert manifest["components"] == {name: f"{name}.onnx" for name in COMPONENTS}
    worst = manifest["measurements"]["comparison"]["worst"]
    assert worst["case"].partition(": ")[0] in COMPONENTS and worst["name"]


def test_generate_writes_what_pytorch_generates(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The command on an encoder-decoder: encoder, first step, later steps, forced first token, end."""
    from onnxsmith import generate_text, generate_texts

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    options = {
        **BART,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 80,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": None,
    }
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**options)).eval()
    model.generation_config.forced_bos_token_id = 20
    model.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    export_model(str(tmp_path / "bart"), tmp_path / "onnx", verify=False)
    texts = ["the quick brown fox", "a smith forges"]
    wanted = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            made = model.generate(**ids, max_new_tokens=12, num_beams=1, do_sample=False)
        wanted.append(tokenizer.decode(made[0], skip_special_tokens=True))
    assert "".join(generate_text(tmp_path / "onnx", texts[0], max_new_tokens=12)) == wanted[0]
    assert [one.text for one in generate_texts(tmp_path / "onnx", texts, max_new_tokens=12)] == wanted
    assert wanted[0] and wanted[0] != wanted[1]
    with pytest.raises(BadInputError, match="--chat or --system for an encoder-decoder"):
        list(generate_text(tmp_path / "onnx", "x", chat=True))
