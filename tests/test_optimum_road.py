"""The road through optimum: the same package, the same names, the same check."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith import export_model
from onnxsmith.comparison import tolerance_for
from onnxsmith.errors import ExportError, MissingDependencyError, UnknownNameError
from onnxsmith.exporters import export_by, load_torch, torch_programs
from onnxsmith.exporters.randomness import without_randomness
from onnxsmith.package import ModelPackage
from onnxsmith.pipeline.references import compare_package, open_programs
from onnxsmith.pipeline.silencing import draws_numbers, silenced
from onnxsmith.runtime import OrtBackend
from onnxsmith.source import ModelSource

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum.exporters.onnx")

# Of torch, about TorchScript, which both transformers' model and optimum use.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def saved(directory: Path, kind: str, options: Mapping[str, Any], architecture: str) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, architecture)(config).eval()
    model.save_pretrained(directory / kind)
    return directory / kind


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech synthesis that draws its durations and its noise."""
    options = {
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
    return saved(tmp_path_factory.mktemp("voice"), "Vits", options, "VitsModel")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return saved(tmp_path_factory.mktemp("bert"), "Bert", {**options, "intermediate_size": 48}, "BertModel")


def test_speech_synthesis_by_the_road_that_can(voice: Path, tmp_path: Path) -> None:
    package, comparison = export_model(str(voice), tmp_path / "voice")
    step = package.steps[0]
    assert step.parameters["exporter"] == "optimum"
    assert "torch cannot trace it" in step.details["why_not_torch"]
    assert comparison is not None and comparison.passed
    shapes = {tensor.shape for tensor in comparison.tensors if tensor.name == "waveform"}
    # Sound of several lengths, for texts of several lengths, alone and in batches.
    assert len(shapes) >= 4
    assert {shape[0] for shape in shapes} >= {1, 2}
    assert [str(spec) for spec in package.main.inputs] == [
        "input_ids: int64[batch, sequence]",
        "attention_mask: int64[batch, sequence]",
    ]
    assert [spec.name for spec in package.main.outputs] == ["waveform", "spectrogram"]
    manifest = json.loads((tmp_path / "voice" / "manifest.json").read_text())
    assert (
        manifest["measurements"]["comparison"]["random_numbers"] == "compared with their means in their place"
    )
    # What was written still draws.
    assert draws_numbers(package)


def test_a_wrong_weight_of_speech_synthesis_is_found(voice: Path) -> None:
    loaded = load_torch(ModelSource.parse(str(voice)))
    package, programs = export_by("optimum", loaded, torch_programs(loaded))
    quiet = {name: without_randomness(program) for name, program in programs.items()}
    found = []
    with open_programs(quiet) as reference:
        for factor in (1.0, 1.05):
            candidate = silenced(package)
            weight = next(
                value
                for name, value in candidate.main.model.graph.initializers.items()
                if "decoder.conv_pre.weight" in name
            )
            scaled(weight, factor)
            found.append(compared(reference, candidate))
    assert found == [True, False]


def scaled(value: Any, factor: float) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)


def compared(reference: Any, candidate: ModelPackage) -> bool:
    expected = reference.expected(samples=3, candidates=[candidate])
    bounds = tolerance_for("float32")
    return compare_package(
        reference, expected, candidate, OrtBackend(), tolerance=bounds, name="voice"
    ).passed


@pytest.mark.parametrize(
    ("kind", "architecture", "options"),
    [
        (
            "T5",
            "T5ForConditionalGeneration",
            {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        ),
        pytest.param(
            "Llama",
            "LlamaForCausalLM",
            {
                "vocab_size": 60,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_same_signature_as_from_torch(
    tmp_path: Path, kind: str, architecture: str, options: dict[str, Any]
) -> None:
    source = saved(tmp_path, kind, options, architecture)
    package, comparison = export_model(str(source), tmp_path / "optimum", exporter="optimum")
    assert comparison is not None and comparison.passed
    assert package.steps[0].parameters["exporter"] == "optimum"
    other, _ = export_model(str(source), tmp_path / "torch", exporter="torch", verify=False)
    assert list(package.components) == list(other.components)
    for name, component in package.components.items():
        for mine, theirs in (
            (component.inputs, other.components[name].inputs),
            (component.outputs, other.components[name].outputs),
        ):
            assert [str(spec) for spec in mine] == [str(spec) for spec in theirs]


def test_text_encoders_by_optimum(bert: Path, tmp_path: Path) -> None:
    package, comparison = export_model(str(bert), tmp_path / "bert", exporter="optimum")
    assert comparison is not None and comparison.passed and len(comparison.tensors) > 2
    assert [str(spec) for spec in package.main.outputs] == ["last_hidden_state: float32[batch, sequence, 32]"]
    assert "float32" in package.precision


def test_without_optimum_the_command_that_brings_it_is_named(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'onnxsmith\[optimum\]'"):
        export_model(str(bert), tmp_path / "bert", exporter="optimum")
    assert not (tmp_path / "bert").exists()


def test_what_optimum_cannot_do_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_torch(ModelSource.parse(str(bert)))
    programs = torch_programs(loaded)
    with pytest.raises(ExportError, match=r"attention fused, tracing auto; expected auto"):
        export_by("optimum", loaded, programs, attention="fused")
    with pytest.raises(UnknownNameError, match="magic"):
        export_by("magic", loaded, programs)
    loaded.task = "sentence-similarity"
    with pytest.raises(ExportError, match="no description of it for the task sentence-similarity"):
        export_by("optimum", loaded, programs)
    loaded.task = None
    with pytest.raises(ExportError, match="no model of transformers"):
        export_by("optimum", loaded, programs)
