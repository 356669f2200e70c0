"""Models of few positions: nothing is made up, measured or generated beyond them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from onnxsmith import Recipe, load_recipe, run_recipe
from onnxsmith.context_length import context_length, context_of_files
from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.calibration import CalibrationData
from onnxsmith.pipeline.cli import app
from onnxsmith.pipeline.generation import generate_text, generate_texts
from onnxsmith.pipeline.tuning import tune_recipe

POSITIONS = 24
TEXT = "a small text that is longer than the model can read at once " * 12


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A GPT-2, which has a table of positions that ends: 24 of them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tiny-gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def artifact(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `run` makes of it where a recipe says nothing of lengths."""
    place = tmp_path_factory.mktemp("gpt2") / "out"
    (place.parent / "text.txt").write_text(TEXT)
    report = run_recipe(recipe_of(gpt2_dir, place.parent), place, base=place.parent)
    assert report.passed, report.verdict
    return place


def recipe_of(source: Path, directory: Path, **more: Any) -> Recipe:
    plain: dict[str, Any] = {
        "schema_version": 1, "name": "tiny", "source": str(source),
        "variants": [{"name": "fp32", "preset": "cpu-fp32"}],
        "evaluation": {"perplexity": {"data": "text.txt"}}, "calibration": None, "prompt": "a small",
    }  # fmt: skip
    (directory / "recipe.json").write_text(json.dumps(plain | more))
    return load_recipe(directory / "recipe.json")


def test_configurations_say_it_by_several_names() -> None:
    assert context_length({"n_positions": 24}) == 24
    assert context_length({"max_position_embeddings": 64, "n_ctx": 24}) == 64
    assert context_length({"n_positions": 9, "text_config": {"max_position_embeddings": 77}}) == 77
    assert context_length({"max_position_embeddings": True}) is None
    # Relative positions have no end.
    assert context_length({"n_positions": 512, "relative_attention_num_buckets": 32}) is None
    assert context_length({"max_position_embeddings": 2048, "alibi": True}) is None
    assert context_length({"max_position_embeddings": 2048, "alibi": False}) == 2048
    # A base that grows with the length; one that was stretched once has an end.
    assert context_length({"max_position_embeddings": 12, "rope_scaling": {"rope_type": "dynamic"}}) is None
    assert context_length({"max_position_embeddings": 12, "rope_parameters": {"type": "dynamic"}}) is None
    assert context_length({"max_position_embeddings": 12, "rope_scaling": {"rope_type": "linear"}}) == 12
    for broken in (b"{", b"[]", b"null"):
        assert context_of_files({"config.json": broken}) is None
    assert context_of_files({}) is None


def test_a_run_takes_windows_and_prompts_that_fit(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    asked = report["recipe"]["evaluation"]
    assert asked["perplexity"]["window"] == POSITIONS
    # A quarter for new tokens, the rest for the prompt.
    assert (asked["benchmark"]["prompt_tokens"], asked["benchmark"]["new_tokens"]) == (18, 6)
    assert report["reference"]["perplexity"]["window"] == POSITIONS
    assert report["variants"][0]["bench"]["decode_tokens_per_s"]["p50"] > 0


@pytest.mark.parametrize(
    ("evaluation", "match"),
    [
        ({"perplexity": {"data": "text.txt", "window": 25}}, r"perplexity\.window.*25; expected at most 24"),
        ({"benchmark": {"prompt_tokens": 21, "new_tokens": 4}}, r"prompt_tokens.*21; expected at most 20"),
        ({"benchmark": {"new_tokens": 24}}, r"new_tokens.*24; expected at most 23"),
    ],
)
def test_a_recipe_that_asks_for_more_is_refused_before_anything_is_done(
    gpt2_dir: Path, tmp_path: Path, evaluation: dict[str, Any], match: str
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = recipe_of(gpt2_dir, tmp_path, evaluation=evaluation)
    with pytest.raises(BadInputError, match=match):
        run_recipe(recipe, tmp_path / "out", base=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_says_is_kept_where_it_fits(gpt2_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    told = {"perplexity": {"data": "text.txt", "window": 16}, "benchmark": {"prompt_tokens": 20, "runs": 1}}
    report = run_recipe(recipe_of(gpt2_dir, tmp_path, evaluation=told), tmp_path / "out", base=tmp_path)
    assert report.passed
    assert report.recipe["evaluation"]["perplexity"]["window"] == 16
    assert report.recipe["evaluation"]["benchmark"]["prompt_tokens"] == 20
    assert report.recipe["evaluation"]["benchmark"]["new_tokens"] == 4


def test_a_search_and_its_calibration_fit_too(gpt2_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text("the words of another text say other things " * 20)
    tune = {"trials": 2, "passes": [{"one_of": {
        "plain": ["cleanup"], "gptq": [{"quantize_weights": {"bits": 8, "method": "gptq"}}],
    }}]}  # fmt: skip
    recipe = recipe_of(
        gpt2_dir, tmp_path, variants=[], tune=tune, calibration={"data": "other.txt", "samples": 4}
    )
    result = tune_recipe(recipe, tmp_path / "out", base=tmp_path)
    assert result.passed, result.verdict
    assert not [one["reason"] for one in result.tuning["trials"] if one["state"] == "failed"]


def test_calibration_data_are_cut_to_what_the_model_reads(artifact: Path, tmp_path: Path) -> None:
    from onnxsmith.package_io import load_package

    (tmp_path / "text.txt").write_text(TEXT)
    package = load_package(artifact)
    made = list(CalibrationData("text.txt", samples=3, base=tmp_path).feeds(package)(package.main.inputs))
    assert [feeds["input_ids"].shape for feeds in made] == [(1, POSITIONS)] * 3


def test_a_text_ends_where_the_positions_do(artifact: Path) -> None:
    from onnxsmith.package_io import load_package
    from onnxsmith.runtime import OrtBackend, generate, generate_batch

    with OrtBackend("cpu").open(load_package(artifact)) as session:
        for prompt in ([5], [5, 6, 7], list(range(4, 27))):
            assert len(list(generate(session, prompt, max_new_tokens=100))) == POSITIONS - len(prompt)
        # The longest prompt of a batch decides.
        assert len(list(generate_batch(session, [[5], [5, 6, 7]], max_new_tokens=100))) == POSITIONS - 3
    said = "".join(generate_text(artifact, "a small", max_new_tokens=100))
    (one,) = generate_texts(artifact, ["a small"], max_new_tokens=100)
    assert one.text == said
    with pytest.raises(BadInputError, match=r"a prompt of \d+ tokens; expected at most 23"):
        list(generate_text(artifact, TEXT))


def test_speculation_ends_there_too(artifact: Path) -> None:
    from onnxsmith.runtime import LookupSettings

    prompt = "a small text that"
    plain = "".join(generate_text(artifact, prompt, max_new_tokens=100))
    guessed = generate_text(artifact, prompt, max_new_tokens=100, speculation=LookupSettings())
    assert "".join(guessed) == plain


def test_commands_say_what_to_do(artifact: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["bench", str(artifact), "--prompt-tokens", "30"])
    assert done.exit_code == 2, done.output
    assert "30 tokens and 32 new ones; expected at most 24 together" in done.output
    fitting = ["--prompt-tokens", "9", "--new-tokens", "4", "--runs", "1"]
    done = runner.invoke(app, ["bench", str(artifact), *fitting])
    assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["generate", str(artifact), TEXT])
    assert done.exit_code == 2 and "Shorten the prompt" in done.output
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    done = runner.invoke(
        app, ["evaluate", str(artifact), "--task", "text-generation", "--data", str(tmp_path / "rows.jsonl")]
    )
    assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["compare", str(artifact), str(artifact)])
    assert done.exit_code == 0, done.output


def test_scoring_refuses_windows_that_are_too_long(artifact: Path) -> None:
    from onnxsmith.package_io import load_package
    from onnxsmith.runtime import OrtBackend, perplexity

    tokens = np.arange(60, dtype=np.int64) % 40
    with OrtBackend("cpu").open(load_package(artifact)) as session:
        assert session.positions == POSITIONS
        with pytest.raises(BadInputError, match="a window of 25 tokens; expected at most 24, its positions"):
            perplexity(session, tokens, window=25)
        assert perplexity(session, tokens, window=24).tokens == 57


def test_an_encoder_of_few_positions_is_compared_within_them(save_tiny_bert: Any, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "bert", positions=16)
    recipe = Recipe.model_validate(
        {"schema_version": 1, "name": "tiny", "source": str(tmp_path / "bert"),
         "variants": [{"name": "fp32", "preset": "cpu-fp32"}]}
    )  # fmt: skip
    report = run_recipe(recipe, tmp_path / "out")
    assert report.passed, report.verdict
    assert report.recipe["evaluation"]["benchmark"]["prompt_tokens"] == 16
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "out"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
