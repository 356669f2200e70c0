"""Sizes that a model branches on: the graph is right for all sizes that it takes, or does not take them."""

from __future__ import annotations

from typing import Any

import pytest

from onnxsmith.comparison import TOLERANCES
from onnxsmith.errors import ExportError
from onnxsmith.exporters import LoadedModel, export, torch_program
from onnxsmith.package import ModelPackage
from onnxsmith.program import AxisSizes, TorchProgram
from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs
from onnxsmith.source import ModelSource, SourceKind
from test_export_decoder import compared
from test_export_plain import loaded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
nn = torch.nn


class Branches(nn.Module):
    """Doubles short rows or long ones, and triples the others."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Any) -> Any:
        return x * 2 if x.shape[1] > self.size else x * 3


class Positions(nn.Module):
    """Runs with at most as many positions as its table has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(40, 4))

    def forward(self, x: Any) -> Any:
        if x.shape[1] > 40:
            raise ValueError("too long")
        return x + self.table[: x.shape[1]]


def compared_within_limits(program: TorchProgram, package: ModelPackage) -> int:
    """How many cases were compared and equal."""
    reference = TorchSession(program)
    made = cases_for(reference, limits=program.limits, axis_limits=program.axis_limits)
    cases = list(reference_outputs(reference, list(made)))
    with OrtSession(package, threads=1) as session:
        comparison = compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])
    assert comparison.passed, comparison.reason
    return len(cases)


@pytest.mark.parametrize(("limit", "said"), [(5, "from 6 on"), (100, "up to 100")])
def test_an_axis_that_a_model_branches_on_is_a_size_and_said(limit: int, said: str) -> None:
    """Found to be dynamic, and traced for one of the branches: the other sizes would be silently wrong."""
    model = loaded(Branches(limit), torch.rand(2, 8))
    program = torch_program(model)
    assert program.inputs[0].shape == ("batch", "length")
    package = export(model, program)
    assert package.main.inputs[0].shape == ("batch", 8) == program.inputs[0].shape
    fixed = package.steps[0].details["model"]["fixed_axes"]
    assert f"torch traced it for sizes {said} only" in fixed["length"]


def test_the_end_of_what_a_model_takes_is_no_branch() -> None:
    model = loaded(Positions(), torch.rand(2, 8, 4))
    program = torch_program(model)
    package = export(model, program)
    assert package.main.inputs[0].shape == ("batch", "sequence", 4)
    assert "model" not in package.steps[0].details
    assert program.axis_limits["sequence"] == AxisSizes(1, 40)
    assert compared_within_limits(program, package) > 1


class Strided(nn.Module):
    """Halves an image and joins it with what it was, as a U-Net: it takes even sizes only."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    def forward(self, x: Any) -> Any:
        return torch.cat([self.up(self.down(x)), x], 1)


def test_sizes_that_must_be_multiples_are_dynamic() -> None:
    model = loaded(Strided(), torch.rand(2, 3, 16, 16))
    program = torch_program(model)
    assert program.inputs[0].shape == ("batch", 3, "height", "width")
    assert program.outputs[0].shape == ("batch", 6, "height", "width")
    assert program.axis_limits["height"] == AxisSizes(2, None, 2)
    assert compared_within_limits(program, export(model, program)) > 1


@pytest.mark.parametrize(
    ("sizes", "wanted", "nearest"),
    [
        (AxisSizes(), 5, 5),
        (AxisSizes(3), 1, 3),
        (AxisSizes(1, 4), 9, 4),
        (AxisSizes(8, None, 8), 9, 16),
        (AxisSizes(8, 30, 8), 40, 24),
    ],
)
def test_the_nearest_size_that_runs(sizes: AxisSizes, wanted: int, nearest: int) -> None:
    assert sizes.nearest(wanted) == nearest


def doge(window: int) -> LoadedModel:
    """Its layers make a mask from their values: the best of them if there are more than ``window``."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        keep_window_size=window,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return LoadedModel(model, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})


def test_a_mask_of_the_models_own_is_causal_too() -> None:
    """transformers 4 makes no mask for sdpa, which is causal without one; with the model's own it is not."""
    model = doge(256)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        seen = [model.module(ids[:, :length]).logits[:, :5] for length in (8, 12)]
    blind = int(transformers.__version__.partition(".")[0]) >= 5
    assert torch.allclose(*seen, atol=1e-3) is blind, "transformers looks into the future no more, or again"
    program = torch_program(model)
    assert model.module.config._attn_implementation == "eager"
    with torch.no_grad():
        seen = [model.module(ids[:, :length]).logits[:, :5] for length in (8, 12)]
    assert torch.allclose(*seen, atol=1e-5)
    comparison = compared(program, export(model, program))
    assert comparison.passed, comparison.reason


def test_a_branch_inside_the_context_is_refused() -> None:
    with pytest.raises(
        ExportError, match=r"DogeForCausalLM: axis sequence: torch traced it for sizes up to 14"
    ):
        export(doge(16))
