"""Exports of decoders: every family on both roads, compared with torch in prefill, decode and padded."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.comparison import TOLERANCES, Comparison
from onnxsmith.errors import ExportError
from onnxsmith.exporters import LoadedModel, export, torch_program
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.package import ModelPackage, cache_pairs
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

FUSED, STANDARD = "GroupQueryAttention", "standard"
_BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MULTI_HEAD = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, tiny.

    Attributes:
        config: The name of its configuration class.
        options: For the configuration.
        why_standard: Why it has no fused attention; empty where it has.
        why_not: Why it cannot be exported at all; empty where it can.
        quick: Whether it is compared in the normal suite.
    """

    config: str
    options: dict[str, Any]
    why_standard: str = ""
    why_not: str = ""
    quick: bool = False


_NO_INTERFACE = "its transformers code has no attention interface"
_OWN_MASK = "a mask that the model builds itself"

# Windows are shorter than the longest case, so that they matter.
FAMILIES = {
    "llama": Family("Llama", _BASE | {"tie_word_embeddings": True}, quick=True),
    "mistral": Family("Mistral", _BASE | {"sliding_window": 8}, quick=True),
    "gemma2": Family(
        "Gemma2", _BASE | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}, quick=True
    ),
    "gpt2": Family("GPT2", _GPT, quick=True),
    "gemma": Family("Gemma", _BASE | {"head_dim": 16}),
    "gemma3": Family(
        "Gemma3Text",
        _BASE
        | {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2": Family("Qwen2", _BASE),
    "qwen2 with windows": Family(
        "Qwen2",
        _BASE
        | {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": Family("Qwen3", _BASE | {"head_dim": 16}),
    "phi": Family("Phi", _BASE),
    "phi3": Family("Phi3", _BASE),
    "olmo2": Family("Olmo2", _BASE),
    "gptneox": Family("GPTNeoX", _MULTI_HEAD | {"rotary_pct": 0.5}),
    "granite": Family("Granite", _BASE | {"logits_scaling": 2.0, "attention_multiplier": 0.2}),
    "cohere": Family("Cohere", _BASE),
    "cohere2": Family(
        "Cohere2", _BASE | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "starcoder2": Family("Starcoder2", _BASE | {"sliding_window": 8}),
    "smollm3": Family("SmolLM3", _BASE | {"no_rope_layers": [1, 0]}),
    "opt": Family("OPT", _MULTI_HEAD | {"ffn_dim": 48, "word_embed_proj_dim": 32}, why_standard=_OWN_MASK),
    "bloom": Family("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _NO_INTERFACE),
    "falcon": Family("Falcon", _MULTI_HEAD | {"alibi": False}, _NO_INTERFACE),
    "gptj": Family("GPTJ", _GPT | {"rotary_dim": 4}, _NO_INTERFACE),
    "gptneo": Family(
        "GPTNeo",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 256,
        },
        _NO_INTERFACE,
    ),
    "stablelm": Family("StableLm", _BASE, _NO_INTERFACE),
    "phi3 longrope": Family(
        "Phi3",
        _BASE
        | {
            "original_max_position_embeddings": 12,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
            },
        },
    ),
    "phi3 partial rotary": Family("Phi3", _BASE | {"partial_rotary_factor": 0.5}),
    "llama dynamic ntk": Family(
        "Llama",
        _BASE | {"max_position_embeddings": 12, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "mixtral": Family(
        "Mixtral", _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    ),
    "qwen3moe": Family(
        "Qwen3Moe",
        _BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "qwen2moe": Family(
        "Qwen2Moe",
        _BASE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        _NO_INTERFACE,
    ),
    "gpt-oss": Family(
        "GptOss",
        _BASE
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rope_scaling": None,
            "sliding_window": 8,
        },
    ),
    "mamba": Family(
        "Mamba",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
        why_not=r"a cache of type NoneType.*state-space models are not supported yet",
    ),
}
EXPORTABLE = [name for name, family in FAMILIES.items() if not family.why_not]
FUSABLE = [name for name in EXPORTABLE if not FAMILIES[name].why_standard]


def slow_unless_quick(names: list[str]) -> list[Any]:
    return [n if FAMILIES[n].quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def made(name: str) -> LoadedModel:
    """The family with weights that make every part matter: norms off one, biases off zero, logits spread."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.config}Config")(**family.options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.shape[0] == 96 else 0.15))
    return LoadedModel(model, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})


@functools.lru_cache(maxsize=2)
def fused(name: str) -> tuple[LoadedModel, TorchProgram, ModelPackage]:
    loaded = made(name)
    program = torch_program(loaded)
    return loaded, program, export(loaded, program, attention="fused")


def compared(program: TorchProgram, package: ModelPackage) -> Comparison:
    reference = TorchSession(program)
    cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits)))
    with OrtSession(package, threads=1) as session:
        return compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])


def assert_equal(program: TorchProgram, package: ModelPackage, preset: str) -> None:
    """The exported graph, and the same after a preset, against torch."""
    for candidate in (package, run_passes(package, make_passes(PRESETS[preset]))):
        comparison = compared(program, candidate)
        assert comparison.passed, comparison.reason
        cases = {tensor.case for tensor in comparison.tensors}
        for wanted in ("prefill batch=1 length=1", "length=160", "decode batch=2", "left-padding"):
            assert any(wanted in case for case in cases), wanted


@pytest.mark.parametrize("name", slow_unless_quick(FUSABLE))
def test_fused_attention_equals_torch(name: str) -> None:
    _, program, package = fused(name)
    assert package.steps[0].details["attention"] == FUSED
    layers = FAMILIES[name].options.get("num_hidden_layers", 2)
    nodes = [n for n in package.main.model.graph if n.op_type == "GroupQueryAttention"]
    assert len(nodes) == layers
    windows = [n.attributes.get_int("local_window_size", -1) for n in nodes]
    assert (8 in windows) == (FAMILIES[name].options.get("sliding_window") == 8)
    assert_equal(program, package, "cpu-fp32")


@pytest.mark.parametrize(
    "name", [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in EXPORTABLE]
)
def test_standard_attention_equals_torch(name: str) -> None:
    loaded = made(name)
    program = torch_program(loaded)
    package = export(loaded, program, attention="standard")
    assert package.steps[0].details["attention"] == STANDARD
    domains = {node.domain for node in package.main.model.graph.all_nodes()}
    assert domains <= {"", "ai.onnx"}
    assert_equal(program, package, "clean")
    comparison = compared(program, run_passes(package, make_passes(PRESETS["cpu-fp32"])))
    assert comparison.passed, comparison.reason


@pytest.mark.parametrize("name", [n for n in EXPORTABLE if n not in FUSABLE])
def test_what_cannot_be_fused_is_refused(name: str) -> None:
    with pytest.raises(
        ExportError, match=rf"{FAMILIES[name].why_standard}.*Export it with --attention standard"
    ):
        export(made(name), attention="fused")


@pytest.mark.parametrize(
    "name", [pytest.param("gptneo", marks=()), pytest.param("opt", marks=pytest.mark.slow)]
)
def test_auto_falls_back_and_says_why(name: str) -> None:
    details = export(made(name), attention="auto").steps[0].details
    assert details["attention"] == STANDARD
    assert FAMILIES[name].why_standard in details["why_not_fused"]
    # The remedy was followed.
    assert "--attention standard" not in details["why_not_fused"]


@pytest.mark.parametrize("name", slow_unless_quick([name for name in FAMILIES if FAMILIES[name].why_not]))
def test_what_cannot_be_exported_is_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match=FAMILIES[name].why_not) as caught:
        export(made(name))
    assert "\n" not in str(caught.value)
    # torch prints the whole graph so far to standard error.
    assert "aten" not in capfd.readouterr().err


def test_soft_capping_is_in_the_reference() -> None:
    """transformers' default attention drops it: the reference, and the standard road, would be wrong."""
    loaded = made("gemma2")
    assert loaded.module.config._attn_implementation == "sdpa"
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        dropped = loaded.module(ids).logits
        program = torch_program(loaded)
        assert loaded.module.config._attn_implementation == "eager"
        kept = loaded.module(ids).logits
    assert not torch.allclose(dropped, kept, atol=1e-4)
    assert program.name == "Gemma2ForCausalLM"
    # A model without soft-capping keeps the faster one.
    other = made("llama")
    torch_program(other)
    assert other.module.config._attn_implementation == "sdpa"


def test_the_signature_is_the_documented_one() -> None:
    package = fused("llama")[2]
    past = "float32[batch, 2, past_sequence, 8]"
    present = "float32[batch, 2, total_sequence, 8]"
    names = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert [str(spec) for spec in package.main.inputs] == [
        "input_ids: int64[batch, sequence]",
        "attention_mask: int64[batch, total_sequence]",
        "position_ids: int64[batch, sequence]",
        *(f"past_key_values.{name}: {past}" for name in names),
    ]
    assert [str(spec) for spec in package.main.outputs] == [
        "logits: float32[batch, sequence, 96]",
        *(f"present.{name}: {present}" for name in names),
    ]
    assert len(cache_pairs(package.main.inputs, package.main.outputs)) == 4
    assert (package.task, package.main.model.producer_name) == ("text-generation", "onnxsmith")


def test_a_model_without_positions_has_no_such_input() -> None:
    program = torch_program(made("bloom"))
    assert [spec.name for spec in program.inputs][:3] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
    ]
    assert "position_ids" not in program.examples


def test_tied_weights_are_one_initializer() -> None:
    loaded, _, package = fused("llama")
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight
    tables = [n for n, v in package.main.model.graph.initializers.items() if list(v.shape or ()) == [96, 32]]
    assert tables == ["model.embed_tokens.weight"]


def test_weights_have_the_names_of_the_state_dict_and_are_not_copied() -> None:
    loaded, _, package = fused("mistral")
    weights = package.main.model.graph.initializers
    state = loaded.module.state_dict()
    assert state.keys() <= set(weights)
    for name, value in state.items():
        array = weights[name].const_value.numpy()
        assert array.ctypes.data == value.data_ptr(), name


def test_no_path_of_this_machine_is_left_after_the_passes(tmp_path: Path) -> None:
    import onnx_ir as ir

    package = run_passes(fused("llama")[2], make_passes(PRESETS["cpu-fp32"]))
    ir.save(package.main.model, tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    here = {
        str(Path(__file__).parents[1]),
        str(Path(torch.__file__).parents[1]),
        os.getcwd(),
        "site-packages",
        ".py",
    }
    assert not [text for text in here if text.encode() in content]


def test_the_model_is_left_as_it_was() -> None:
    loaded = made("mistral")
    ids = torch.arange(1, 20)[None]
    before = dict(transformers.AttentionInterface._global_mapping)
    with torch.no_grad():
        expected = loaded.module(ids).logits
    export(loaded)
    assert loaded.module.config._attn_implementation == "sdpa"
    assert dict(transformers.AttentionInterface._global_mapping) == before
    with torch.no_grad():
        assert torch.equal(loaded.module(ids).logits, expected)


@pytest.mark.parametrize(
    "weight", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"]
)
def test_a_changed_weight_is_noticed(weight: str) -> None:
    """The control: with one number of one weight changed, the comparison must fail."""
    import onnx_ir as ir

    _, program, exported = fused("llama")
    package = exported.derive()
    value = package.main.model.graph.initializers[weight]
    changed = value.const_value.numpy().copy()
    changed[3, 4] += 0.05
    value.const_value = ir.tensor(changed, name=weight)
    comparison = compared(program, package)
    assert not comparison.passed
    assert "differs by" in comparison.reason
    assert compared(program, exported).passed


# What the attention function refuses, without tracing a whole model


def refused(**changes: Any) -> str:
    from onnxsmith.exporters.attention import AttentionTrace, _emit

    class Attention(torch.nn.Module):
        is_causal = True
        layer_idx = changes.pop("layer_idx", 0)

    size = changes.pop("value_size", 8)
    past = {0: (torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8))}
    trace = AttentionTrace.begin(torch.ones(1, 3, dtype=torch.int64), 3, past, torch.float32)
    if changes.pop("twice", False):
        trace.present[0] = past[0]
    mask = changes.pop("mask", None)
    width = changes.pop("width", 8)
    query, key = torch.zeros(1, 4, 3, width), torch.zeros(1, 2, 3, width)
    value = torch.zeros(1, 2, 3, size)
    with pytest.raises(ExportError) as caught:
        _emit(trace, Attention(), query, key, value, mask, changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "dropout while exporting; expected a model in eval mode"),
        ({"is_causal": False}, "bidirectional attention; expected causal attention"),
        (
            {"head_mask": 1, "alibi": 2},
            "attention takes alibi, head_mask; expected only what GroupQueryAttention",
        ),
        ({"layer_idx": 1}, "layer index 1; expected 0 to 0"),
        ({"layer_idx": None}, "layer index None; expected 0 to 0"),
        ({"twice": True}, "attention runs twice in one layer"),
        ({"width": 12, "value_size": 12}, "heads of size 12; expected a multiple of 8"),
        ({"value_size": 4}, "values of size 4 under keys of size 8; expected equal sizes"),
        ({"mask": torch.zeros(1, 1, 3, 3)}, "a mask that the model builds itself"),
        (
            {"sliding_window": 4},
            "a mask with window None, and sliding_window=4 in the call; expected the same",
        ),
    ],
)
def test_attention_that_cannot_be_represented_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refused(**changes)


def test_a_mask_of_another_kind_is_refused() -> None:
    from transformers import masking_utils

    from onnxsmith.exporters.attention import _mask, _Window

    assert _mask(mask_function=masking_utils.causal_mask_function) is None
    assert _mask(mask_function=masking_utils.sliding_window_causal_mask_function(7), local_size=7) == _Window(
        7
    )
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    both = masking_utils.or_masks(masking_utils.causal_mask_function, lambda *_: True)
    for function in (chunked, both, lambda *_: True):
        with pytest.raises(ExportError, match=r"attention mask: a mask made of .*; expected a causal mask"):
            _mask(mask_function=function, local_size=4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "DeepseekV3",
            {
                "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
            },
        ),
        pytest.param(
            "GPTBigCode", _GPT,
            marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")],
        ),
        pytest.param(
            "XGLM",
            {
                "vocab_size": 96, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
                "max_position_embeddings": 256, "n_embd": 32,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param("Falcon", _MULTI_HEAD | {"alibi": True, "num_kv_heads": 4}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_was_refused_before(kind: str, options: dict[str, Any]) -> None:
    """Experts that are asked whether they have tokens, a cache in a cache, positions written to, bfloat16."""
    FAMILIES[kind] = Family(kind, options if "n_embd" in options else _BASE | options)
    try:
        loaded = made(kind)
    finally:
        del FAMILIES[kind]
    program = torch_program(loaded)
    assert_equal(program, export(loaded, program), "cpu-fp32")
