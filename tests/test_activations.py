"""Gated activations in one node, and embedding tables that are stored scaled."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from generated_graphs import Array, Case, assert_same, cases, graph, run, serialized
from onnxsmith.graph_passes import operator_counts
from onnxsmith.graph_passes.activations import FuseSilu
from onnxsmith.graph_passes.embeddings import FoldEmbeddingScale

HEAD = '<ir_version: 9, opset_import: ["": 20]> '
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 3, 8)).astype(np.float32)
Z = RANDOM.standard_normal((2, 3, 8)).astype(np.float32)
SIGNATURE = "g (float[a, b, 8] x, float[a, b, 8] z) => (float[a, b, 8] y) "


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", 1.0),
        ("s = Sigmoid(x) y = Mul(s, x)", 1.0),
        ("s = Sigmoid(x) h = Mul(x, s) y = Mul(h, z)", 1.0),
        ("k = Constant<value = float {1.702}>() t = Mul(x, k) s = Sigmoid(t) y = Mul(x, s)", 1.702),
        ("k = Constant<value = float {1.702}>() t = Mul(k, x) s = Sigmoid(t) y = Mul(s, x)", 1.702),
    ],
)
def test_it_fuses_to_the_same_numbers(body: str, alpha: float) -> None:
    model = graph(f"{HEAD}{SIGNATURE}{{ {body} }}")
    feeds = {"x": X, "z": Z}
    before = run(model, feeds)
    outcome = FuseSilu()(model)
    assert outcome.changes.details == {"made": {"QuickGelu": 1}}
    counts = operator_counts(model)
    assert counts.pop("com.microsoft.QuickGelu") == 1
    assert counts in ({}, {"Mul": 1}, {"Constant": 1})
    onnx.checker.check_model(ir.to_proto(model))
    assert_same(before, run(model, feeds), rtol=1e-6)
    content = serialized(model)
    assert not FuseSilu()(model).modified
    assert serialized(model) == content
    # Control: the factor in the sigmoid matters.
    node = next(node for node in model.graph if node.op_type == "QuickGelu")
    assert node.attributes["alpha"].as_float() == pytest.approx(alpha)
    node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.1 * alpha)
    with pytest.raises(AssertionError):
        assert_same(before, run(model, feeds), rtol=1e-3)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[gate] s = Sigmoid(x) y = Mul(s, s)", "its result is multiplied with itself"),
        ("[gate] s = Sigmoid(x) y = Mul(s, z)", "it multiplies another value than the one that it is of"),
        ("[gate] s = Sigmoid(x) h = Mul(s, x) y = Add(h, s)", "its result is not read by one Mul alone"),
        ("[gate] y = Sigmoid(x)", "its result is not read by one Mul alone"),
        (
            "t = Mul(x, z) [gate] s = Sigmoid(t) y = Mul(x, s)",
            "it multiplies another value than the one that it is of",
        ),
    ],
)
def test_near_misses_stay_and_say_why(body: str, reason: str) -> None:
    model = graph(f"{HEAD}{SIGNATURE}{{ {body} }}")
    outcome = FuseSilu()(model)
    assert not outcome.modified
    assert outcome.changes.skipped == {"gate": reason}


@pytest.mark.parametrize(("kind", "shown"), [("double", "DOUBLE"), (None, "not known")])
def test_types_without_a_kernel_stay(kind: str | None, shown: str) -> None:
    model = graph(
        f"{HEAD}g ({kind or 'float'}[n] x) => ({kind or 'float'}[n] y) {{ s = Sigmoid(x) y = Mul(x, s) }}"
    )
    if kind is None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.type = None
    [reason] = FuseSilu()(model).changes.skipped.values()
    assert reason == f"QuickGelu has no kernel for its element type, which is {shown}"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_graph_computes_the_same(case: Case) -> None:
    before = case.expected()
    FoldEmbeddingScale()(case.model)
    FuseSilu()(case.model)
    assert_same(before, run(case.model, case.feeds))


TABLE = RANDOM.standard_normal((5, 8)).astype(np.float32)
IDS = np.array([[0, 4, 2], [1, 1, 3]])
LOOKUP = "g (int64[a, b] i) => (float[a, b, 8] y) "


@pytest.mark.parametrize("order", ["e, k", "k, e"])
@pytest.mark.parametrize("last", ["y = Mul({})", "h = Mul({}) y = Neg(h)"])
def test_a_scaled_embedding_is_stored_scaled(order: str, last: str) -> None:
    text = f"{HEAD}{LOOKUP}<float k = {{3.3}}> {{ e = Gather(w, i) {last.format(order)} }}"
    model = graph(text, w=TABLE)
    tensor = model.graph.initializers["w"].const_value
    before = run(model, {"i": IDS})
    assert FoldEmbeddingScale()(model).changes.details == {"folded": 1}
    assert "Mul" not in operator_counts(model)
    [weight] = model.graph.initializers.values()
    assert weight.name == "w" and isinstance(weight.const_value, ir.LazyTensor)
    assert tensor is not None and tensor.name == "w"
    np.testing.assert_array_equal(tensor.numpy(), TABLE)
    assert_same(before, run(model, {"i": IDS}))
    content = serialized(model)
    assert not FoldEmbeddingScale()(model).modified
    assert serialized(model) == content
    # Control: the scale matters.
    weight.const_value = ir.tensor(TABLE, name="w")
    with pytest.raises(AssertionError):
        assert_same(before, run(model, {"i": IDS}))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "e = Gather(w, i) t = Transpose(w) s = Mul(e, k) y = MatMul(s, r) z = Neg(t)",
            "the table 'w' is used elsewhere too",
        ),
        ("e = Gather(w, i) s = Mul(e, k) y = Add(e, s)", "the rows are also used without the scale"),
    ],
)
def test_tables_that_are_needed_as_they_are_stay(body: str, reason: str) -> None:
    text = f"{HEAD}{LOOKUP}<float k = {{3.3}}> {{ {body.replace('e = G', '[look_up] e = G')} }}"
    model = graph(text, w=TABLE, r=np.eye(8, dtype=np.float32))
    outcome = FoldEmbeddingScale()(model)
    assert not outcome.modified
    assert outcome.changes.skipped == {"look_up": reason}


def _exported(config: Any, task: str) -> dict[str, ir.Model]:
    """The graphs of a random model, cleaned up, by name."""
    import torch
    import transformers

    from onnxsmith.exporters import LoadedModel, export, torch_programs
    from onnxsmith.graph_passes import make_passes, run_passes
    from onnxsmith.source import ModelSource, SourceKind

    torch.manual_seed(0)
    kind = (
        transformers.AutoModelForCausalLM if task == "text-generation" else transformers.AutoModelForSeq2SeqLM
    )
    module = kind.from_config(config).eval().requires_grad_(False)
    loaded = LoadedModel(module, ModelSource(SourceKind.FACTORY, "test:make"), task, {}, {})
    package = run_passes(export(loaded, torch_programs(loaded)), make_passes([("cleanup", {})]))
    return {name: component.model for name, component in package.components.items()}


def _random_feeds(model: ir.Model) -> dict[str, Array]:
    sizes = {"batch": 2, "sequence": 3, "past_sequence": 0, "total_sequence": 3}
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape or ()]
        kind = np.float32 if value.dtype == ir.DataType.FLOAT else np.int64
        feeds[value.name or ""] = np.ones(shape, kind)
    ids = feeds["input_ids"]
    return feeds | {"input_ids": RANDOM.integers(2, 90, ids.shape)}


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gemma_scales_its_embeddings_once(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GemmaConfig(
        vocab_size=96, hidden_size=40, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    [model] = _exported(config, "text-generation").values()
    feeds = _random_feeds(model)
    before = run(model, feeds)
    outcome = FoldEmbeddingScale()(model)
    if tied:
        [reason] = outcome.changes.skipped.values()
        assert "used elsewhere too" in reason
        return
    assert outcome.changes.details == {"folded": 1}
    # To the bit: the product is the same one.
    assert_same(before, run(model, feeds))


@pytest.mark.slow
def test_marian_scales_its_encoders_embeddings_once() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MarianConfig(
        vocab_size=96, d_model=40, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        scale_embedding=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=1,
    )  # fmt: skip
    models = _exported(config, "text2text-generation")
    encoder = models["encoder_model"]
    feeds = _random_feeds(encoder)
    before = run(encoder, feeds)
    assert FoldEmbeddingScale()(encoder).changes.details == {"folded": 1}
    assert_same(before, run(encoder, feeds))
    # In the decoders the table is the output head too.
    for name in ("decoder_model", "decoder_with_past_model"):
        [reason] = FoldEmbeddingScale()(models[name]).changes.skipped.values()
        assert "used elsewhere too" in reason
