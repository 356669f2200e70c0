"""Lengths instead of an attention bias: exact, refused where it says more, never fed padding on the left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generated_graphs import graph, run
from onnxsmith.comparison import tolerance_for
from onnxsmith.errors import FeedError
from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.attention_lengths import LengthsInAttention
from onnxsmith.graph_passes.findings import Target, examine
from onnxsmith.onnx_file import check_model, save_model
from onnxsmith.package import ModelPackage, TensorSpec, reads_lengths
from onnxsmith.pipeline.model_card import model_card
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import (
    OrtSession,
    Session,
    TorchSession,
    cases_for,
    compare_sessions,
    generate,
    generate_batch,
    reference_outputs,
)
from onnxsmith.runtime.decoding import _OrtDecoder, _SharedDecoder, open_decoder
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.samples import decoder_feeds
from onnxsmith.runtime.scoring import score_texts
from onnxsmith.source import ModelSource

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HEAD = '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> '
ATTENTION = """
    size = Shape<start = 1, end = 2>(attention_mask) total = Cast<to = 6>(size)
    minus = Sub(size, one) last = Cast<to = 6>(minus) rows = Shape<start = 0, end = 1>(attention_mask)
    lengths = Expand(last, rows)
    y, present_key, present_value = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1>
        (q, k, v, past_key, past_value, lengths, total, , , , bias)
"""
# What torch's exporter makes of onnxsmith's own attention.
PADDING = """
    less = Sub(attention_mask, one) wide = Unsqueeze(less, axes) real = Cast<to = 1>(wide)
    hidden = Mul(real, ten_thousand) tokens = Shape<start = 1, end = 2>(q)
    shape = Concat<axis = 0>(rows, one, tokens, size) bias = Expand(hidden, shape)
"""


def attention(bias: str, extra: str = "", **weights: Any) -> ir.Model:
    lines = ATTENTION.split("\n    y,")
    return graph(
        HEAD + "g (float[b, s, 16] q, float[b, s, 8] k, float[b, s, 8] v, float[b, 1, p, 8] past_key, "
        f"float[b, 1, p, 8] past_value, int64[b, t] attention_mask{extra}) "
        "=> (float[b, s, 16] y, float[b, 1, t, 8] present_key, float[b, 1, t, 8] present_value) "
        f"{{ {lines[0]} {bias} y,{lines[1]} }}",
        one=np.array([1]),
        axes=np.array([1, 2]),
        **{"ten_thousand": np.array(10000, np.float32), **weights},
    )


def feeds(batch: int, new: int, past: int, right: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(batch + new + past)

    def values(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    mask = np.ones((batch, past + new), np.int64)
    mask[-1, mask.shape[1] - right :] = 0
    return {
        "q": values(batch, new, 16), "k": values(batch, new, 8), "v": values(batch, new, 8),
        "past_key": values(batch, 1, past, 8), "past_value": values(batch, 1, past, 8),
        "attention_mask": mask,
    }  # fmt: skip


def test_it_fires_once_and_is_exact(tmp_path: Path) -> None:
    model = attention(PADDING)
    cases = [feeds(1, 5, 0), feeds(3, 1, 4), feeds(1, 3, 6), feeds(2, 6, 0)]
    before = [run(model, one) for one in cases]
    assert not reads_lengths(model)
    outcome = LengthsInAttention()(model)
    assert outcome.changes.count == 1 and outcome.changes.details == {"attention": 1, "padding": "right"}
    assert reads_lengths(model) and not {n.op_type for n in model.graph} & {"Mul", "Concat"}
    save_model(model, tmp_path / "model.onnx")
    check_model(tmp_path / "model.onnx")
    for one, expected in zip(cases, before, strict=True):
        got = run(model, one)
        for name, array in expected.items():
            np.testing.assert_allclose(got[name], array, atol=1e-6)
    assert not LengthsInAttention()(model).modified


def test_padding_on_the_right_gives_the_tokens_what_the_bias_gave() -> None:
    model, padded = attention(PADDING), feeds(2, 6, 0, right=2)
    expected = run(model, padded)["y"]
    assert LengthsInAttention()(model).modified
    got = run(model, padded)["y"]
    np.testing.assert_allclose(got[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(got[1, :4], expected[1, :4], atol=1e-6)
    # Control: the padding does count where nobody hides it.
    whole = run(model, padded | {"attention_mask": np.ones((2, 6), np.int64)})["present_key"]
    assert whole.shape == (2, 1, 6, 8)


@pytest.mark.parametrize(
    ("bias", "extra", "weights", "reason"),
    [
        ("bias = Identity(given)", ", float[b, 1, s, t] given", {}, "follows from the input 'given'"),
        # ALiBi: a slope for each head.
        (
            PADDING.replace("bias = Expand", "flat = Expand") + "bias = Add(flat, slopes)", "",
            {"slopes": np.array([[[[0.5]], [[0.25]]]], np.float32)[0]}, "has several values",
        ),
        (
            PADDING.replace("bias = Expand", "flat = Expand") + "bias = Add(flat, shift)", "",
            {"shift": np.array(0.5, np.float32)}, "is 0.5, and not 0, where nothing is padded",
        ),
        (PADDING, "", {"ten_thousand": np.array(1, np.float32)}, "is -1 at padding, which does not hide it"),
        (PADDING + "", "", {}, ""),
        (
            PADDING.replace("bias = Expand", "flat = Expand") + "bias = Trilu<upper = 1>(flat)", "", {},
            "computed by Trilu, and may hold more than padding",
        ),
        (
            PADDING.replace("bias = Expand", "flat = Expand") + "bias = com.microsoft.Gelu(flat)", "", {},
            "computed by com.microsoft.Gelu",
        ),
    ],
)  # fmt: skip
def test_a_bias_that_says_more_stays(bias: str, extra: str, weights: dict[str, Any], reason: str) -> None:
    model = attention(bias, extra, **weights)
    outcome = LengthsInAttention()(model)
    assert outcome.modified is not bool(reason)
    if reason:
        assert reason in "".join(outcome.changes.skipped.values()) and not reads_lengths(model)


def test_without_a_mask_of_two_axes_nothing_happens() -> None:
    model = attention(PADDING)
    next(v for v in model.graph.inputs if v.name == "attention_mask").name = "mask"
    assert "no input attention_mask" in "".join(LengthsInAttention()(model).changes.skipped.values())


# Steps on the way from a mask to a bias; what comes out is whatever it is.
STEPS = {
    "Sub({x}, unit)": 0, "Mul({x}, big)": 0, "Mul({x}, negative)": 0, "Add({x}, unit)": 0, "Neg({x})": 0,
    "Sub(unit, {x})": 0, "Identity({x})": 0, "Div({x}, big)": 0, "Min({x}, unit)": 0,
}  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=4))
def test_the_verdict_is_what_running_shows(steps: list[str]) -> None:
    names = ["real", *(f"x{number}" for number in range(len(steps)))]
    chain = " ".join(
        f"{new} = {s.format(x=old)}" for s, old, new in zip(steps, names, names[1:], strict=False)
    )
    lines = (
        "wide = Unsqueeze(attention_mask, axes) real = Cast<to = 1>(wide) "
        "tokens = Shape<start = 1, end = 2>(q) "
        f"shape = Concat<axis = 0>(rows, one, tokens, size) {chain} bias = Expand({names[-1]}, shape)"
    )
    weights = {
        "unit": np.array(1, np.float32), "big": np.array(1e4, np.float32),
        "negative": np.array(-1e4, np.float32),
    }  # fmt: skip
    model = attention(lines, **weights)
    shown = graph(
        HEAD + f"g (int64[b, t] attention_mask) => (float[b, one_, two_, t] {names[-1]}) {{ "
        f"wide = Unsqueeze(attention_mask, axes) real = Cast<to = 1>(wide) {chain} }}",
        axes=np.array([1, 2]),
        **weights,
    )  # fmt: skip
    got = [run(shown, {"attention_mask": np.full((1, 3), c, np.int64)})[names[-1]] for c in (1, 0)]
    says_padding = bool((got[0] == 0).all() and (got[1] <= -1e3).all())
    assert LengthsInAttention()(model).modified is says_padding


def decoder(kind: str, directory: Path) -> tuple[ModelPackage, TorchProgram]:
    common = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "pad_token_id": 0,
    }  # fmt: skip
    made = {
        "mistral": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**common, sliding_window=6)
        ),
        # Soft caps, and a window on every other layer.
        "gemma2": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**common, sliding_window=6, query_pre_attn_scalar=16)
        ),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made().save_pretrained(directory)
    loaded = load_torch(ModelSource.parse(str(directory)))
    program = torch_program(loaded)
    return export(loaded, program), program


@pytest.fixture(scope="module", params=["mistral", "gemma2"])
def windowed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelPackage, TorchProgram]:
    package, program = decoder(request.param, tmp_path_factory.mktemp(request.param))
    converted = run_passes(package, make_passes([("cleanup", {}), ("lengths_in_attention", {})]))
    assert converted.steps[-1].details | {"skipped": {}} == converted.steps[-1].details
    assert (converted.steps[-1].details["attention"], converted.steps[-1].details["padding"]) == (2, "right")
    windows = [
        node.attributes["local_window_size"].as_int()
        for node in converted.main.model.graph
        if node.op_type == "GroupQueryAttention" and "local_window_size" in node.attributes
    ]
    assert windows and set(windows) <= {6, -1}
    return converted, program


@pytest.fixture
def sessions(windowed: tuple[ModelPackage, TorchProgram]) -> Iterator[tuple[OrtSession, TorchSession]]:
    package, program = windowed
    with OrtSession(package) as ours, TorchSession(program) as theirs:
        assert ours.reads_lengths and not theirs.reads_lengths
        yield ours, theirs


@pytest.mark.parametrize("left_padding", [True, False])
def test_it_agrees_with_torch_past_the_window(
    sessions: tuple[OrtSession, TorchSession], left_padding: bool
) -> None:
    """With padding on the left the session runs rows without it; on the right the graph itself does it."""
    ours, theirs = sessions
    cases = list(cases_for(theirs, limits={"input_ids": 64}, left_padding=left_padding))
    names = [case.name for case in cases]
    assert ("decode batch=2 length=1 past=9 left-padding=4" in names) is left_padding
    assert ("prefill batch=2 length=9 right-padding=4" in names) is not left_padding
    result = compare_sessions(
        theirs, ours, reference_outputs(theirs, cases), tolerance=tolerance_for("float32")
    )
    assert result.passed, result.reason
    assert len(result.tensors) == len(cases) * 5


def test_padding_on_the_left_is_not_fed_to_the_graph(sessions: tuple[OrtSession, TorchSession]) -> None:
    ours, theirs = sessions
    ids = np.random.default_rng(0).integers(0, 64, (3, 9))
    mask = np.ones(ids.shape, bool)
    mask[1, :4], mask[2, 7:] = False, False
    fed = decoder_feeds(theirs.inputs, ids, mask=mask)
    expected, got = theirs.run(fed)["logits"], ours.run(fed)["logits"]
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-5)
    # Control: what the graph itself makes of it is wrong, and it does not say so.
    misread = ours._run(fed, ["logits"])["logits"]
    assert np.abs(misread[1, 4:] - expected[1, 4:]).max() > 1e-2
    with pytest.raises(FeedError, match="a row without new tokens"):
        ours.run(decoder_feeds(theirs.inputs, ids, mask=mask & np.array([[True], [False], [True]])))
    mask[0, 3] = False
    with pytest.raises(FeedError, match="padding between tokens of a row; expected padding on one side"):
        ours.run(decoder_feeds(theirs.inputs, ids, mask=mask))


@pytest.mark.parametrize("kind", [_SharedDecoder, _OrtDecoder])
def test_prompts_of_different_lengths_are_padded_on_the_right(
    sessions: tuple[OrtSession, TorchSession], kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = sessions
    if kind is _OrtDecoder:
        monkeypatch.setattr("onnxsmith.runtime.decoding._shares", lambda session: False)
    assert isinstance(open_decoder(ours), kind)
    prompts = [[5, 9, 33], [7, 21, 2, 40, 11, 3, 18, 4, 60], [12]]
    together = [row for row in zip(*generate_batch(ours, prompts, max_new_tokens=12), strict=True)]
    for prompt, row in zip(prompts, together, strict=True):
        assert list(row) == list(generate(theirs, prompt, max_new_tokens=12))


def test_a_decoder_refuses_what_lengths_cannot_say(sessions: tuple[OrtSession, TorchSession]) -> None:
    ours, _ = sessions
    ids = np.zeros((2, 3), np.int64)
    stepwise = open_decoder(ours)
    with pytest.raises(
        FeedError, match=r"padding on the left; expected prompts that are padded on the right"
    ):
        stepwise.step(ids, np.array([[True] * 3, [False, True, True]]))
    stepwise.step(ids, np.array([[True] * 3, [True, True, False]]))
    with pytest.raises(FeedError, match="padding among tokens that continue a text"):
        stepwise.step(ids[:, :2], np.array([[True, True], [True, False]]))


def test_texts_are_scored_alike_alone_and_together(sessions: tuple[OrtSession, TorchSession]) -> None:
    ours, theirs = sessions
    random = np.random.default_rng(0)
    texts = [random.integers(0, 64, length) for length in (5, 17, 30)]

    def losses(session: Session, batch: int | None) -> list[float]:
        found = sorted(
            score_texts(session, texts, window=16, batch=batch), key=lambda w: (w.text, len(w.targets))
        )
        return [float(one.losses().sum()) for one in found]

    np.testing.assert_allclose(losses(ours, None), losses(theirs, 1), rtol=1e-5)


def test_another_process_is_told(windowed: tuple[ModelPackage, TorchProgram]) -> None:
    with GraphFile.of(windowed[0]) as file:
        assert file.reads_lengths and GraphFile.from_json(file.to_json()).reads_lengths


def test_attention_in_a_branch(tiny_package: ModelPackage) -> None:
    passes = [("quantize_weights", {"bits": 4}), ("fast_prompts", {}), ("lengths_in_attention", {})]
    package = run_passes(tiny_package.derive(), make_passes(passes))
    assert package.steps[-1].details["attention"] == 4 and reads_lengths(package.main.model)
    with OrtSession(tiny_package) as reference, OrtSession(package) as ours:
        cases = cases_for(reference, limits={"input_ids": 64}, samples=4)
        result = compare_sessions(
            reference, ours, reference_outputs(reference, cases), tolerance=tolerance_for("int4")
        )
        assert result.passed, result.reason


@pytest.mark.parametrize("preset", ["gpu-fp16", "gpu-int4"])
def test_presets_for_gpus_keep_what_cuda_wants(tiny_package: ModelPackage, preset: str) -> None:
    """By the published constraints of its kernels: no GPU is needed, and none is seen."""
    package = run_passes(tiny_package.derive(), make_passes(PRESETS[preset]))
    model = package.main.model
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert attentions
    for node in attentions:
        assert len(node.inputs) == 7
        assert {v.dtype for v in node.inputs[:5] if v is not None} == {ir.DataType.FLOAT16}
        assert {v.dtype for v in node.inputs[5:] if v is not None} == {ir.DataType.INT32}
    cuda = Target("CUDAExecutionProvider")
    assert list(examine(model, cuda, rules=["cuda_kernels"])) == []
    # Control: the same preset without the pass would fail on CUDA, and the rule says so and what helps.
    without = [spec for spec in PRESETS[preset] if spec[0] != "lengths_in_attention"]
    biased = run_passes(tiny_package.derive(), make_passes(without)).main.model
    (found,) = examine(biased, cuda, rules=["cuda_kernels"])
    assert (found.kind, found.count) == ("wrong", len(attentions))
    assert [name for name, _ in found.passes] == ["lengths_in_attention"]
    assert list(examine(biased, Target(), rules=["cuda_kernels"])) == []


def test_a_cache_without_sizes_as_in_graphs_of_genai(tiny_package: ModelPackage) -> None:
    """Its builder gives the size of a head a name; attention's operands tell it."""
    package = run_passes(tiny_package.derive(), make_passes([("lengths_in_attention", {})]))
    graph_ = package.main.model.graph
    caches = [v for v in (*graph_.inputs, *graph_.outputs) if v.shape is not None and len(v.shape) == 4]
    for value in caches:
        assert value.shape is not None
        value.shape = ir.Shape([*value.shape[:3], "kv_cache_dim"])
    with OrtSession(tiny_package) as reference, OrtSession(package) as ours:
        assert ours.cache == reference.cache and len(caches) == 2 * len(ours.cache)
        assert isinstance(open_decoder(ours), _SharedDecoder)
        expected = list(generate(reference, [5, 9], max_new_tokens=8))
        assert list(generate(ours, [5, 9], max_new_tokens=8)) == expected
    # Control: what no operand tells is asked for, and not taken for 0.
    spec = TensorSpec("past_key_values.0.key", "float32", ("batch", 2, "past", "size"))
    with pytest.raises(
        FeedError, match=r"expected \(batch, heads, length, size of a head\) with fixed heads"
    ):
        decoder_feeds((spec,), np.zeros((1, 1), np.int64))


def test_the_model_card_says_on_which_side_to_pad(tiny_package: ModelPackage) -> None:
    package = run_passes(tiny_package.derive(), make_passes([("lengths_in_attention", {})]))
    cards = [model_card(p, name="m", measurements={}, environment={}) for p in (tiny_package, package)]
    assert ["Pad prompts of a batch on the right" in card for card in cards] == [False, True]
