"""Random small decoders against PyTorch: heads, groups, windows, soft caps, biases, norms, tied heads."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from onnxsmith.comparison import TOLERANCES
from onnxsmith.exporters import LoadedModel, export, torch_program
from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

_WINDOWED = frozenset({"Mistral", "Qwen2", "Gemma2", "Gemma3Text"})


@st.composite
def decoders(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A configuration class and its options."""
    kind = draw(st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Olmo2"]))
    kv_heads = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    # GroupQueryAttention takes multiples of 8.
    size = 8 * draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    options: dict[str, Any] = {
        "vocab_size": draw(st.integers(20, 100)),
        "hidden_size": kv_heads * groups * size,
        "head_dim": size,
        "intermediate_size": draw(st.integers(8, 48)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if kind in ("Llama", "Olmo2", "Qwen3"):
        options["attention_bias"] = draw(st.booleans())
    if kind == "Llama":
        options["mlp_bias"] = draw(st.booleans())
    if kind in _WINDOWED:
        options["sliding_window"] = draw(st.integers(1, 20))
    if kind in ("Qwen2", "Gemma2", "Gemma3Text"):
        types = st.sampled_from(["sliding_attention", "full_attention"])
        options["layer_types"] = draw(st.lists(types, min_size=layers, max_size=layers))
        if kind == "Qwen2":
            options["use_sliding_window"] = True
    if kind == "Gemma2":
        caps = st.one_of(st.none(), st.floats(1.0, 60.0))
        options |= {"attn_logit_softcapping": draw(caps), "final_logit_softcapping": draw(caps)}
    if kind in ("Gemma2", "Gemma3Text"):
        options["query_pre_attn_scalar"] = draw(st.integers(4, 64))
    return kind, options


def made(kind: str, options: dict[str, Any], seed: int) -> LoadedModel:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return LoadedModel(model, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})


def check(kind: str, options: dict[str, Any], seed: int, attention: str) -> None:
    loaded = made(kind, options, seed)
    program = torch_program(loaded)
    package = export(loaded, program, attention=attention)
    fused = [node for node in package.main.model.graph if node.op_type == "GroupQueryAttention"]
    assert len(fused) == (options["num_hidden_layers"] if attention == "fused" else 0)
    reference = TorchSession(program)
    cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits, seed=seed)))
    with OrtSession(package, threads=1) as session:
        comparison = compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])
        assert comparison.passed, comparison.reason
    # The control: a weight that is off must be noticed, or the configuration tests nothing.
    name = "model.layers.0.self_attn.v_proj.weight"
    value = package.main.model.graph.initializers[name]
    assert value.const_value is not None
    import onnx_ir as ir

    value.const_value = ir.tensor(value.const_value.numpy() * 1.5 + 0.1, name=name)
    with OrtSession(package, threads=1) as session:
        assert not compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"]).passed


@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    # An export takes seconds: a failure is reported as it is found, not made smaller.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(decoder=decoders(), seed=st.integers(0, 999))
def test_any_small_decoder_equals_torch(decoder: tuple[str, dict[str, Any]], seed: int) -> None:
    check(*decoder, seed, "fused")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    decoder=decoders(), seed=st.integers(0, 999), attention=st.sampled_from(["fused", "fused", "standard"])
)
def test_many_small_decoders_equal_torch(
    decoder: tuple[str, dict[str, Any]], seed: int, attention: str
) -> None:
    check(*decoder, seed, attention)
