"""Generation and perplexity, against transformers and against torch's own cross entropy."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError, FeedError, ModelFileError
from onnxsmith.exporters import LoadedModel
from onnxsmith.package import ModelPackage
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import OrtBackend, OrtSession, TorchSession, generate, perplexity
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.scoring import ScoredWindow, score, score_texts

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

Make = Callable[..., ModelPackage]
PROMPTS = ([5], [1, 20, 9, 33], [60, 2, 2, 41, 7, 19, 3, 28, 11, 50, 13, 44])
NEW = 24


@pytest.fixture(scope="module")
def session(tiny_package: ModelPackage) -> Iterator[OrtSession]:
    with OrtSession(tiny_package, threads=1, name="tiny") as opened:
        yield opened


@pytest.fixture(scope="module")
def torch_session(tiny_program: TorchProgram) -> TorchSession:
    return TorchSession(tiny_program)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(7).integers(0, 64, 150, dtype=np.int64)


def greedy(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers generates, without a stop token."""
    ids = torch.tensor([prompt])
    model: Any = loaded.module
    with torch.inference_mode():
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            # Not None, which would take the configuration's.
            eos_token_id=-1,
            pad_token_id=3,
        )
    return [int(token) for token in result[0, len(prompt) :]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=[f"{len(p)}-tokens" for p in PROMPTS])
def test_greedy_tokens_are_those_of_transformers(
    session: OrtSession, torch_session: TorchSession, tiny_loaded: LoadedModel, prompt: list[int]
) -> None:
    expected = greedy(tiny_loaded, prompt, NEW)
    assert len(expected) == NEW
    # A model that says one thing for ever would not notice a wrong cache.
    assert len(set(expected)) > 4
    assert list(generate(session, prompt, max_new_tokens=NEW)) == expected
    assert list(generate(torch_session, prompt, max_new_tokens=NEW)) == expected


def test_a_generation_starts_from_an_empty_cache(session: OrtSession) -> None:
    first = list(generate(session, PROMPTS[1], max_new_tokens=8))
    list(generate(session, PROMPTS[2], max_new_tokens=8))
    assert list(generate(session, PROMPTS[1], max_new_tokens=8)) == first


def test_a_stop_token_ends_the_text_and_is_not_given(session: OrtSession) -> None:
    whole = list(generate(session, PROMPTS[1], max_new_tokens=NEW))
    stop = whole[5]
    until = whole.index(stop)
    assert list(generate(session, PROMPTS[1], max_new_tokens=NEW, stop={stop})) == whole[:until]
    assert list(generate(session, PROMPTS[1], max_new_tokens=NEW, stop=[whole[0]])) == []
    unsaid = next(token for token in range(64) if token not in whole)
    assert list(generate(session, PROMPTS[1], max_new_tokens=NEW, stop={unsaid})) == whole


def test_tokens_come_one_by_one(session: OrtSession) -> None:
    text = generate(session, PROMPTS[1], max_new_tokens=10**9)
    assert [next(text) for _ in range(3)] == list(generate(session, PROMPTS[1], max_new_tokens=3))
    assert list(generate(session, PROMPTS[1], max_new_tokens=0)) == []


def test_an_empty_prompt_is_refused(session: OrtSession) -> None:
    with pytest.raises(BadInputError, match="prompt: no tokens; expected at least one"):
        next(generate(session, [], max_new_tokens=1))


def test_a_token_that_is_not_in_the_vocabulary_is_reported(session: OrtSession) -> None:
    with pytest.raises(ModelFileError, match=r"tiny: ONNX Runtime fails.*Gather.*values do not fit"):
        next(generate(session, [64], max_new_tokens=1))


# ONNX Runtime's GroupQueryAttention continues with several tokens at once for one row only.
@pytest.mark.parametrize(("batch", "ends"), [(1, (5, 6, 12)), (2, (9, 10, 11, 12))])
@pytest.mark.parametrize("backend", ["session", "torch_session"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(
    backend: str,
    batch: int,
    ends: tuple[int, ...],
    request: pytest.FixtureRequest,
    torch_session: TorchSession,
) -> None:
    ids = np.random.default_rng(1).integers(0, 64, (batch, 12), dtype=np.int64)
    whole = open_decoder(torch_session).step(ids)
    decoder = open_decoder(request.getfixturevalue(backend))
    pieces = [decoder.step(ids[:, begin:end]) for begin, end in itertools.pairwise((0, *ends))]
    assert decoder.length == 12
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-4)
    decoder.reset()
    assert decoder.length == 0
    np.testing.assert_allclose(decoder.step(ids[:1]), whole[:1], atol=1e-4)


@pytest.mark.parametrize("backend", ["session", "torch_session"])
def test_calls_of_all_kinds_may_follow_each_other(
    backend: str, request: pytest.FixtureRequest, torch_session: TorchSession
) -> None:
    """One token and several, with padding and without, and what was there before a step back."""
    ids = np.random.default_rng(2).integers(0, 64, (1, 90), dtype=np.int64)
    whole = open_decoder(torch_session).step(ids)[0]
    # The buffer of 64 positions grows on the way.
    decoder = open_decoder(request.getfixturevalue(backend), capacity=20)
    for begin, end in itertools.pairwise((0, 3, 4, 5, 9, 10, 11, 40, 41, 88, 89, 90)):
        logits = decoder.step(ids[:, begin:end], last_only=end - begin == 1)
        np.testing.assert_allclose(logits[0, -1], whole[end - 1], atol=1e-4)
    decoder.rewind(30)
    for position in (30, 31, 32):
        np.testing.assert_allclose(
            decoder.step(ids[:, position : position + 1])[0, 0], whole[position], atol=1e-4
        )
    decoder.reset()
    padded = np.array([[False, False, True, True], [True] * 4])
    rows = np.stack([np.r_[7, 7, ids[0, :2]], ids[0, :4]])
    decoder.step(rows, padded)
    for step in range(3):
        logits = decoder.step(ids[0, [[2 + step], [4 + step]]])
        np.testing.assert_allclose(logits[:, 0], whole[[2 + step, 4 + step]], atol=1e-4)
    with pytest.raises(FeedError, match="1 rows; expected 2, as in the cache"):
        decoder.step(ids[:, :1])
    # What has no position left may have any number of rows.
    decoder.rewind(0)
    np.testing.assert_allclose(decoder.step(ids[:, :3])[0], whole[:3], atol=1e-4)
    decoder.rewind(0)
    for position in range(3):
        both = decoder.step(np.repeat(ids[:, position : position + 1], 2, axis=0))
        np.testing.assert_allclose(both[:, 0], whole[[position, position]], atol=1e-4)


def test_a_model_without_a_cache_is_no_decoder(onnx_package: Make) -> None:
    text = "g (float[batch, n] x) => (float[batch, n] logits) { logits = Relu(x) }"
    with (
        OrtSession(onnx_package(text), name="plain") as plain,
        pytest.raises(
            FeedError, match=r"plain: a model with the outputs logits; expected a decoder with logits"
        ),
    ):
        next(generate(plain, [1], max_new_tokens=1))


def test_an_input_that_no_decoder_has_is_named(onnx_package: Make) -> None:
    text = """g (int64[b, s] input_ids, float[b] pixels, float[b, 1, p, 2] "past_key_values.0.key")
        => (float[b, s] logits, float[b, 1, p, 2] "present.0.key") {
        logits = Cast<to = 1>(input_ids)
        "present.0.key" = Identity("past_key_values.0.key")
    }"""
    with (
        OrtSession(onnx_package(text)) as other,
        pytest.raises(FeedError, match=r"input 'pixels': an input that decoders are not known to have"),
    ):
        next(generate(other, [1], max_new_tokens=1))


def torch_losses(loaded: LoadedModel, tokens: Any, window: int) -> list[Any]:
    """The losses of each window, by transformers and cross_entropy."""
    model: Any = loaded.module
    losses = []
    for part in torch.split(torch.from_numpy(tokens), window):
        if len(part) < 2:
            continue
        with torch.inference_mode():
            logits = model(input_ids=part[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1].double(), part[1:], reduction="none"))
    return losses


# 150 = 2 * 75: no rest. 150 = 4 * 32 + 22: a short rest. 150 = 149 + 1: a rest that predicts nothing.
@pytest.mark.parametrize(("window", "windows"), [(75, 2), (32, 5), (149, 1), (150, 1), (1000, 1), (2, 75)])
def test_perplexity_is_that_of_torch(
    session: OrtSession,
    torch_session: TorchSession,
    tiny_loaded: LoadedModel,
    tokens: Any,
    window: int,
    windows: int,
) -> None:
    losses = torch_losses(tiny_loaded, tokens, window)
    expected = math.exp(float(torch.cat(losses).mean()))
    seen: list[int] = []
    result = perplexity(session, tokens, window=window, on_window=seen.append)
    assert result.value == pytest.approx(expected, rel=1e-4)
    assert (result.windows, result.tokens) == (windows, sum(len(part) for part in losses))
    assert len(losses) == windows
    assert seen == list(range(1, windows + 1))
    assert result.low <= result.value <= result.high
    assert (result.kl_to_reference, result.top1_agreement) == (None, None)
    assert perplexity(torch_session, tokens, window=window).value == pytest.approx(expected, rel=1e-6)


def test_the_losses_of_a_window_are_those_of_torch(
    session: OrtSession, tiny_loaded: LoadedModel, tokens: Any
) -> None:
    windows = list(score(session, tokens, window=40))
    expected = torch_losses(tiny_loaded, tokens, 40)
    assert len(windows) == 4
    for window, losses in zip(windows, expected, strict=True):
        assert window.logits.shape == (len(losses), 64)
        np.testing.assert_allclose(window.losses(), losses.numpy(), atol=1e-4)


def test_windows_in_batches_are_the_same_windows(
    session: OrtSession, torch_session: TorchSession, tokens: Any
) -> None:
    one = perplexity(session, tokens, window=32)
    for batch in (2, 3, 64):
        many = perplexity(session, tokens, window=32, batch=batch)
        assert many.value == pytest.approx(one.value, rel=1e-6)
        assert (many.tokens, many.windows) == (one.tokens, one.windows) == (145, 5)
    kept = np.zeros((145, 64), np.float32)
    perplexity(torch_session, tokens, window=32, batch=4, keep_logits=kept)
    result = perplexity(session, tokens, window=32, batch=3, reference_logits=kept)
    assert result.kl_to_reference is not None
    assert result.kl_to_reference < 1e-8
    with pytest.raises(BadInputError, match="perplexity: batch: 0; expected at least 1"):
        perplexity(session, tokens, window=32, batch=0)


def counted(session: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the token ids of each call from now on."""
    shapes: list[tuple[int, ...]] = []
    run = session._run

    def noted(feeds: dict[str, Any], outputs: list[str]) -> Any:
        shapes.append(feeds["input_ids"].shape)
        return run(feeds, outputs)

    monkeypatch.setattr(session, "_run", noted)
    return shapes


def test_texts_of_all_lengths_share_calls(
    session: OrtSession, torch_session: TorchSession, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [tokens[a:b] for a, b in ((0, 40), (40, 47), (47, 48), (50, 58), (60, 62), (70, 150))]
    alone = [losses for t in texts for losses in [list(score(session, t, window=32, batch=1))]]
    for one in (session, torch_session):
        shapes = counted(one, monkeypatch)
        found: list[list[ScoredWindow]] = [[] for _ in texts]
        for scored in score_texts(one, texts, window=32):
            found[scored.text].append(scored)
        # Eight windows, of 32 down to 2 tokens, padded to the longest.
        assert shapes == [(8, 32)]
        for ours, expected in zip(found, alone, strict=True):
            assert [len(w.targets) for w in ours] == [len(w.targets) for w in expected]
            for a, b in zip(ours, expected, strict=True):
                np.testing.assert_array_equal(a.targets, b.targets)
                np.testing.assert_allclose(a.logits, b.logits, atol=2e-5)


def test_a_call_has_so_many_logits_at_the_most(
    session: OrtSession, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith.runtime import scoring

    whole = perplexity(session, tokens, window=20)
    shapes = counted(session, monkeypatch)
    # 64 logits of 4 bytes for each token: three windows of 20 tokens.
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 4 * 64 * 65)
    assert perplexity(session, tokens, window=20).value == pytest.approx(whole.value, rel=1e-6)
    assert shapes == [(3, 20), (3, 20), (2, 20)]
    shapes.clear()
    # Not even one window: one at a time.
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 1)
    assert perplexity(session, tokens, window=75).value > 0
    assert shapes == [(1, 75), (1, 75)]
    shapes.clear()
    # Where a row's result depends on the others, each is alone.
    monkeypatch.undo()
    shapes = counted(session, monkeypatch)
    monkeypatch.setattr(session, "rows_interact", True)
    perplexity(session, tokens, window=50)
    assert shapes == [(1, 50)] * 3


def test_dynamically_quantized_rows_are_scored_alone(
    tiny_package: ModelPackage, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith.graph_passes import make_passes, run_passes

    quantized = run_passes(tiny_package, make_passes([("quantize_dynamic", {})]))
    with OrtBackend().open(tiny_package) as plain, OrtBackend().open(quantized) as dynamic:
        assert (plain.rows_interact, dynamic.rows_interact) == (False, True)
        shapes = counted(dynamic, monkeypatch)
        automatic = perplexity(dynamic, tokens, window=32)
        assert set(shapes) == {(1, 32), (1, 22)}
        assert automatic == perplexity(dynamic, tokens, window=32, batch=1)
    with OrtBackend(apart=True).open(quantized) as there:
        assert there.rows_interact


def test_a_model_that_knows_its_text_has_a_lower_perplexity(session: OrtSession, tokens: Any) -> None:
    own = [9, *generate(session, [9], max_new_tokens=100)]
    known = perplexity(session, np.array(own, np.int64), window=64)
    assert 1.0 <= known.value < 0.5 * perplexity(session, tokens, window=64).value


def test_the_interval_is_that_of_the_mean_loss(
    session: OrtSession, tiny_loaded: LoadedModel, tokens: Any
) -> None:
    result = perplexity(session, tokens, window=32)
    losses = torch.cat(torch_losses(tiny_loaded, tokens, 32))
    half = 1.96 * float(losses.std(correction=1)) / math.sqrt(len(losses))
    assert half > 0.01
    assert math.log(result.low) == pytest.approx(float(losses.mean()) - half, abs=1e-4)
    assert math.log(result.high) == pytest.approx(float(losses.mean()) + half, abs=1e-4)


def test_one_token_has_no_spread(session: OrtSession, tokens: Any) -> None:
    result = perplexity(session, tokens[:2], window=200)
    assert result.tokens == 1
    assert result.low == result.value == result.high


class Changed(torch.nn.Module):  # type: ignore[misc,name-defined]
    """The tiny model with other logits."""

    def __init__(self, program: TorchProgram, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner = program.module
        self.change = change

    def forward(self, **tensors: Any) -> dict[str, Any]:
        results: dict[str, Any] = self.inner(**tensors)
        return {**results, "logits": self.change(results["logits"])}


def changed(program: TorchProgram, change: Callable[[Any], Any]) -> TorchSession:
    return TorchSession(dataclasses.replace(program, module=Changed(program, change), name="changed"))


def kept_logits(session: TorchSession, tokens: Any) -> Any:
    """The logits of the reference, and its perplexity."""
    kept = np.full((150 - 5, 64), np.nan, np.float32)
    reference = perplexity(session, tokens, window=32, keep_logits=kept)
    assert reference.tokens == len(kept)
    assert np.isfinite(kept).all()
    return kept, reference


def test_an_equal_model_has_the_predictions_of_the_reference(
    session: OrtSession, torch_session: TorchSession, tokens: Any
) -> None:
    kept, reference = kept_logits(torch_session, tokens)
    result = perplexity(session, tokens, window=32, reference_logits=kept)
    assert result.kl_to_reference is not None
    assert 0 <= result.kl_to_reference < 1e-8
    assert result.top1_agreement == 1.0
    assert result.increase_pct == pytest.approx(100 * (result.value / reference.value - 1), abs=1e-6)
    assert result.increase_pct == pytest.approx(0.0, abs=0.01)


def test_another_model_is_measured_against_the_reference(
    tiny_program: TorchProgram, torch_session: TorchSession, tokens: Any
) -> None:
    kept, reference = kept_logits(torch_session, tokens)
    # A higher temperature: flatter, with the same most likely tokens.
    with changed(tiny_program, lambda logits: logits * 0.8) as session:
        result = perplexity(session, tokens, window=32, reference_logits=kept)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(kept).double() * f, -1) for f in (1.0, 0.8))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert result.kl_to_reference == pytest.approx(divergence, rel=1e-4)
    assert divergence > 0.01
    assert result.top1_agreement == 1.0
    increase = 100 * (result.value / reference.value - 1)
    assert abs(increase) > 1
    assert result.increase_pct == pytest.approx(increase, rel=1e-6)
    assert result.increase_low_pct is not None
    assert result.increase_high_pct is not None
    assert result.increase_low_pct < increase < result.increase_high_pct
    # Paired, so narrower than the spread of the value itself.
    width = 100 * (result.high - result.low) / result.value
    assert result.increase_high_pct - result.increase_low_pct < width


def test_predictions_in_the_wrong_places_do_not_agree(
    session: OrtSession, torch_session: TorchSession, tokens: Any
) -> None:
    kept, _ = kept_logits(torch_session, tokens)
    result = perplexity(session, tokens, window=32, reference_logits=kept[::-1])
    assert result.kl_to_reference is not None
    assert result.kl_to_reference > 0.1
    assert result.top1_agreement is not None
    assert result.top1_agreement < 0.9


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_that_is_too_short_is_refused(session: OrtSession, length: int) -> None:
    with pytest.raises(BadInputError, match=f"perplexity: a text of {length} tokens; expected at least two"):
        perplexity(session, np.zeros(length, np.int64), window=32)


@pytest.mark.parametrize("window", [-1, 0, 1])
def test_a_window_that_is_too_short_is_refused(session: OrtSession, tokens: Any, window: int) -> None:
    with pytest.raises(BadInputError, match=f"window: {window}; expected at least two tokens"):
        perplexity(session, tokens, window=window)


@pytest.mark.parametrize(("factor", "loss"), [(math.nan, "nan"), (1e6, r"\d+\S*")])
def test_a_broken_model_is_reported(
    tiny_program: TorchProgram, tokens: Any, factor: float, loss: str
) -> None:
    with (
        changed(tiny_program, lambda logits: logits * factor) as broken,
        pytest.raises(BadInputError, match=f"changed: a mean loss of {loss} nats; expected a perplexity"),
    ):
        perplexity(broken, tokens, window=64)
