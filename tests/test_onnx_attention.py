"""ONNX's operator Attention in place of plain operators; and arithmetic in bfloat16 that no kernel does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxsmith.comparison import TOLERANCES, Comparison
from onnxsmith.exporters import LoadedModel, export, onnx_attention, torch_program
from onnxsmith.exporters.bfloat16 import widen_bfloat16
from onnxsmith.exporters.onnx_attention import why_not_here
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.package import ModelPackage
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
SOFT_CAPS = {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0, **WINDOWS}


def made(kind: str, **options: Any) -> LoadedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.3))
    return LoadedModel(model, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})


def compared(program: TorchProgram, package: ModelPackage) -> Comparison:
    reference = TorchSession(program)
    cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits)))
    with OrtSession(package, threads=1) as session:
        return compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])


@pytest.mark.parametrize(
    ("kind", "options", "opset"),
    [
        ("Gemma2", SOFT_CAPS, 23),
        pytest.param("Gemma2", SOFT_CAPS, 24, marks=pytest.mark.slow),
        pytest.param("Llama", {}, 24, marks=pytest.mark.slow),
        pytest.param("Qwen3", {}, 23, marks=pytest.mark.slow),
        pytest.param("Mistral", {"sliding_window": 8}, 23, marks=pytest.mark.slow),
    ],
)
def test_the_operator_equals_torch(kind: str, options: dict[str, Any], opset: int) -> None:
    """Grouped queries, caches, padding on the left, past the window, soft caps."""
    assert why_not_here(opset) == ""
    loaded = made(kind, **options)
    program = torch_program(loaded)
    before = loaded.module.config._attn_implementation
    package = export(loaded, program, attention="standard", opset=opset)
    assert loaded.module.config._attn_implementation == before
    assert package.steps[0].details["attention"] == "Attention"
    model = package.main.model
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    assert len(nodes) == BASE["num_hidden_layers"]
    assert {node.domain for node in model.graph} == {""} and model.opset_imports[""] == opset
    assert [node.attributes.get_float("softcap", 0.0) for node in nodes] == [
        options.get("attn_logit_softcapping", 0.0)
    ] * 2
    comparison = compared(program, package)
    assert comparison.passed, comparison.reason
    assert any("left-padding" in tensor.case for tensor in comparison.tensors)
    cleaned = compared(program, run_passes(package, make_passes(PRESETS["clean"])))
    assert cleaned.passed, cleaned.reason
    # The control: attention without its window, or with another cap, is another model.
    name = "softcap" if "attn_logit_softcapping" in options else "scale"
    for node in nodes:
        node.attributes[name] = ir.AttrFloat32(name, 0.2)
    assert not compared(program, package).passed


def test_without_a_runtime_for_it_there_are_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "onnxsmith.exporters.decoder.why_not_here", lambda opset: "ONNX Runtime 1.20: too old"
    )
    loaded = made("Llama")
    program = torch_program(loaded)
    package = export(loaded, program, attention="standard", opset=23)
    details = package.steps[0].details
    assert (details["attention"], details["why_no_operator"]) == ("standard", "ONNX Runtime 1.20: too old")
    model = package.main.model
    assert "Attention" not in {node.op_type for node in model.graph} and model.opset_imports[""] == 23
    assert compared(program, package).passed


def test_what_the_operator_cannot_represent_has_plain_operators() -> None:
    """Sinks: a score that takes attention away and gives no value."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None, "head_dim": 16}
    details = export(made("GptOss", **experts), attention="standard", opset=23).steps[0].details
    assert details["attention"] == "standard"
    assert "attention takes s_aux; expected only what the operator Attention" in details["why_no_operator"]


def test_a_runtime_that_caps_masked_scores_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            scores = feeds["q"] @ feeds["k"].swapaxes(-1, -2) * 0.5 + feeds["m"]
            weights = np.exp(2.0 * np.tanh(scores / 2.0))
            return [weights / weights.sum(-1, keepdims=True) @ feeds["v"]]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert "caps scores after the mask" in why_not_here(23)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("NOT_IMPLEMENTED : Attention(23)\nand more")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    assert why_not_here(23).endswith("NOT_IMPLEMENTED : Attention(23)")
    assert onnx_attention.FIRST_OPSET == 23


def test_arithmetic_in_bfloat16_is_done_in_float32_and_rounded() -> None:
    """As PyTorch does it on CPUs; ONNX Runtime has no kernel for it."""

    class Rounded(torch.nn.Module):  # type: ignore[misc]  # torch is imported by pytest
        def forward(self, x: Any, y: Any) -> Any:
            narrow = x.bfloat16() * y.bfloat16()
            return (narrow + x.bfloat16()).float().transpose(0, 1), narrow.float()

    x, y = torch.randn(3, 5), torch.randn(3, 5)
    module = Rounded()
    loaded = LoadedModel(module, ModelSource(SourceKind.FACTORY, "test:make"), None, {}, {}, {"x": x, "y": y})
    package = export(loaded)
    kinds = {
        (node.op_type, value.dtype)
        for node in package.main.model.graph
        for value in node.inputs
        if value is not None and value.dtype == ir.DataType.BFLOAT16
    }
    assert kinds == {("Cast", ir.DataType.BFLOAT16)}
    with OrtSession(package) as session:
        found = session.run({"x": x.numpy(), "y": y.numpy()})
    for got, expected in zip(found.values(), module(x, y), strict=True):
        np.testing.assert_array_equal(got, expected.numpy())
    # It rounds: float32 gives something else.
    assert not np.array_equal(list(found.values())[1], (x * y).numpy())
    assert widen_bfloat16(package.main.model) == 0


def test_a_result_in_bfloat16_keeps_its_name() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        "g (bfloat16[n] x) => (bfloat16[n] y) { a = Abs(x)\n y = Add(a, x) }"
    )
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
    assert widen_bfloat16(model) == 2
    assert model.graph.outputs[0].name == "y" and model.graph.outputs[0].dtype == ir.DataType.BFLOAT16
    assert [node.op_type for node in model.graph] == ["Cast", "Abs", "Cast", "Cast", "Add", "Cast"]
