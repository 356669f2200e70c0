"""One layer of each kind is traced and copied; the result is that of tracing all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnxsmith.comparison import TOLERANCES
from onnxsmith.errors import ExportError, UnknownNameError
from onnxsmith.exporters import LoadedModel, export, torch_program
from onnxsmith.graph_passes import PRESETS, make_passes, operator_counts, run_passes
from onnxsmith.package import ModelPackage
from onnxsmith.pipeline.exporting import LayerCleanup
from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def loaded(kind: str, **options: Any) -> LoadedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_SMALL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return LoadedModel(model, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})


@pytest.fixture(scope="module")
def windows() -> Iterator[LoadedModel]:
    """Five layers of two kinds, not in turn; a tied head."""
    types = [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ]
    yield loaded(
        "Gemma3Text",
        num_hidden_layers=5,
        head_dim=8,
        sliding_window=6,
        layer_types=types,
        num_key_value_heads=1,
    )


def weights(package: ModelPackage) -> dict[str, bytes]:
    return {
        name: value.const_value.numpy().tobytes()
        for name, value in package.main.model.graph.initializers.items()
        if value.const_value is not None and "." in name
    }


@pytest.mark.parametrize("attention", ["fused", pytest.param("standard", marks=pytest.mark.slow)])
def test_copied_layers_equal_layers_that_were_traced(windows: LoadedModel, attention: str) -> None:
    program = torch_program(windows)
    copied = export(windows, program, attention=attention, tracing="layers")
    whole = export(windows, program, attention=attention, tracing="whole")
    details = copied.steps[0].details
    assert (details["tracing"], details["layers_traced"], details["layers"]) == ("layers", 2, 5)
    assert whole.steps[0].details["tracing"] == "whole"
    # To the bit, with the same names, in the same signature.
    assert weights(copied) == weights(whole)
    assert len(weights(copied)) > 50
    assert [str(spec) for spec in copied.main.inputs] == [str(spec) for spec in whole.main.inputs]
    assert [str(spec) for spec in copied.main.outputs] == [str(spec) for spec in whole.main.outputs]
    assert "onnxsmith" not in copied.main.model.opset_imports
    presets = "cpu-fp32" if attention == "fused" else "clean"
    tolerance = TOLERANCES["float32"]
    with OrtSession(run_passes(whole, make_passes(PRESETS[presets])), threads=1) as reference:
        cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits)))
        with OrtSession(run_passes(copied, make_passes(PRESETS[presets])), threads=1) as candidate:
            comparison = compare_sessions(reference, candidate, cases, tolerance=tolerance)
    assert comparison.passed, comparison.reason


@pytest.mark.parametrize(("kind", "folds"), [("Gemma3Text", True), ("Llama", False)])
def test_layers_that_are_cleaned_before_they_are_copied(windows: LoadedModel, kind: str, folds: bool) -> None:
    """Gemma adds one to the weights of its norms, which is folded: layer by layer, not once for all."""
    model = windows if folds else loaded(kind, num_hidden_layers=3)
    program = torch_program(model)
    cleanup = LayerCleanup()
    package = cleanup.finish(export(model, program, attention="fused", tidy=cleanup))
    names = [step.name for step in package.steps]
    assert names[:2] == ["export", "cleanup"]
    assert names.count("cleanup") == 1 + folds
    whole = run_passes(
        export(model, program, attention="fused", tracing="whole"), make_passes(PRESETS["clean"])
    )
    assert weights(package) == weights(whole)
    assert operator_counts(package.main.model) == operator_counts(whole.main.model)
    reference = TorchSession(program)
    cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits, samples=4)))
    with OrtSession(package, threads=1) as session:
        comparison = compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])
    assert comparison.passed, comparison.reason


def test_each_layer_has_its_own_weights_cache_and_window(windows: LoadedModel) -> None:
    """The control: a copy with another layer's weight, or another window, would be found by torch."""
    program = torch_program(windows)
    package = export(windows, program, attention="fused")
    nodes = {}
    for node in package.main.model.graph:
        if node.op_type == "GroupQueryAttention":
            layer = int((node.outputs[1].name or "").split(".")[1])
            assert (node.inputs[3].name, node.outputs[2].name) == (
                f"past_key_values.{layer}.key",
                f"present.{layer}.value",
            )
            nodes[layer] = node
    assert list(nodes) == [0, 1, 2, 3, 4]
    found = [nodes[layer].attributes.get_int("local_window_size", -1) for layer in range(5)]
    assert found == [6, 6, -1, 6, -1]
    reference = TorchSession(program)
    cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits)))
    graph = package.main.model.graph
    one, other = (graph.initializers[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (1, 3))
    for swap in (False, True):
        if swap:
            one.const_value, other.const_value = other.const_value, one.const_value
        with OrtSession(package, threads=1) as session:
            comparison = compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])
        assert comparison.passed != swap, comparison.reason


def test_names_of_modules_follow_the_layer(windows: LoadedModel) -> None:
    graph = export(windows, attention="fused").main.model.graph
    scopes = [
        text
        for node in graph
        for key, text in node.metadata_props.items()
        if key == "pkg.torch.onnx.name_scopes" and "model.layers.3" in text
    ]
    assert len(scopes) > 10
    assert not any("layers.1" in text for text in scopes)
    names = [value.name for node in graph for value in node.outputs]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_tracing_costs_the_same_for_twice_the_layers() -> None:
    """CPU time; the bound is loose here because machines are noisy, the benchmark states the figure."""

    def cost(layers: int) -> float:
        model = loaded("Llama", num_hidden_layers=layers)
        program = torch_program(model)
        began = time.process_time()
        package = export(model, program, attention="fused", tracing="layers")
        spent = time.process_time() - began
        assert package.steps[0].details["layers_traced"] == 1
        return spent

    cost(2)
    assert cost(24) < 2 * cost(2)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("Llama", {"num_hidden_layers": 1}, "0 lists of 1 layers"),
        pytest.param(
            "Gemma2",
            {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 8},
            "no two layers are alike",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_taken_apart_is_traced_as_a_whole(
    kind: str, options: dict[str, Any], reason: str
) -> None:
    model = loaded(kind, **options)
    with pytest.raises(ExportError, match=rf"{kind}ForCausalLM: {reason}; expected layers that are alike"):
        export(model, attention="fused", tracing="layers")
    details = export(model, attention="fused").steps[0].details
    assert details == {"attention": "GroupQueryAttention", "tracing": "whole", "why_whole": reason}


def kinds_of(model: Any, count: int = 3) -> Any:
    from onnxsmith.exporters.layers import layer_kinds

    def run(tensors: Any) -> dict[str, Any]:
        return {"logits": model(tensors["x"])}

    return layer_kinds(model, count, run, {"x": torch.zeros(2, 4)})


class Block(torch.nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor, extra: Any = None) -> torch.Tensor:
        result = self.linear(hidden_states) * self.scale
        return result if extra is None else result + extra


class Stack(torch.nn.Module):
    """Blocks, and one of the ways in which more than the hidden state can pass between them."""

    def __init__(self, flow: str, scales: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(scale) for scale in scales])
        self.flow = flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, extras = None, torch.ones(3, 4)
        shared = extras[0] + 1
        for index, layer in enumerate(self.layers):
            if self.flow == "skip" and index == 2:
                x = layer(x, first)
            elif self.flow == "between":
                x = layer(x) + 1
            elif self.flow == "each its own":
                x = layer(x, extras[index])
            elif self.flow == "shared":
                x = layer(x, shared)
            else:
                x = layer(x)
            first = x if first is None else first
        return x + first if self.flow == "end" else x * 2


def test_layers_are_alike_only_if_they_do_the_same() -> None:
    assert kinds_of(Stack("")).first == (0, 0, 0)
    assert kinds_of(Stack("shared")).first == (0, 0, 0)
    assert kinds_of(Stack("", scales=(1.0, 2.0, 1.0))).first == (0, 1, 0)


@pytest.mark.parametrize(
    ("flow", "reason"),
    [
        ("skip", "layer 2 uses a tensor of layer 0"),
        ("end", "the rest of the model uses a tensor of layer 0"),
        ("between", "the rest of the model uses a tensor of layer 0"),
        ("each its own", "no two layers are alike"),
    ],
)
def test_what_else_flows_between_layers_is_noticed(flow: str, reason: str) -> None:
    from onnxsmith.exporters.layers import NotAlikeError

    with pytest.raises(NotAlikeError, match=reason):
        kinds_of(Stack(flow))


def test_weights_that_layers_share_are_noticed() -> None:
    from onnxsmith.exporters.layers import NotAlikeError

    model = Stack("")
    model.layers[2].linear.weight = model.layers[0].linear.weight
    with pytest.raises(NotAlikeError, match=r"layers\.2\.linear\.weight is shared between layers"):
        kinds_of(model)


def test_an_unknown_way_of_tracing_is_refused(windows: LoadedModel) -> None:
    with pytest.raises(UnknownNameError, match=r"tracing.*auto.*layers.*whole"):
        export(windows, tracing="some")


def test_the_model_is_put_together_again(windows: LoadedModel) -> None:
    ids = torch.arange(1, 20)[None]
    before = list(windows.module.model.layers)
    with torch.no_grad():
        expected = windows.module(ids).logits
        export(windows)
        np.testing.assert_array_equal(windows.module(ids).logits.numpy(), expected.numpy())
    assert list(windows.module.model.layers) == before
    assert not any("forward" in vars(module) for module in windows.module.modules())
