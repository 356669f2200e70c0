"""Searches over what a training does: ratios of pruning and how the smaller model is taught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from onnxsmith import Recipe, load_recipe, tune_recipe
from onnxsmith.errors import RecipeError
from onnxsmith.pipeline.recipe_base import RecipeModel
from onnxsmith.pipeline.training_recipe import TrainingSpec
from onnxsmith.pipeline.tuning import TuneResult

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("optuna")
pytest.importorskip("onnxruntime")

HOT, WILD = ("fire", "iron", "hammer", "anvil", "coal"), ("fox", "dog", "lazy", "brown", "quick")


def rows(count: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        hot = int(random.integers(0, 6))
        words = [*random.choice(HOT, hot), *random.choice(WILD, 5 - hot)]
        random.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": "smithy" if hot > 2 else "forest"}))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_tiny_bert: Callable[..., None]) -> Path:
    directory = tmp_path_factory.mktemp("search")
    save_tiny_bert(directory / "body", positions=64)
    (directory / "train.jsonl").write_text(rows(240, 1))
    (directory / "test.jsonl").write_text(rows(160, 2))
    return directory


def plain(**changes: Any) -> dict[str, Any]:
    learn = {"learning_rate": 3e-3, "dropout": 0.0, "batch": 16}
    tune = {
        "training": {"prune.neurons": {"choices": [0.25, 0.75]}},
        "passes": [{"preset": "cpu-fp32"}], "objectives": ["size_mb"], "prune": False,
    } | changes.pop("tune", {})  # fmt: skip
    return {
        "schema_version": 1, "name": "ratios", "source": "body",
        "training": {
            "data": "train.jsonl", "max_length": 32,
            "steps": [
                {"finetune": {**learn, "task": "text-classification", "epochs": 3}},
                {"prune": {"neurons": 0.5, "heads": 0.5, "samples": 64}},
                {"distill": {**learn, "hidden": 1.0}},
            ],
        },
        "tune": tune,
        "evaluation": {
            "comparison": {"samples": 1}, "benchmark": None,
            "task": {"data": "test.jsonl", "metrics": ["f1_macro"]},
        },
        "budgets": {"f1_drop_points": 40},
    } | changes  # fmt: skip


def write(place: Path, recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
    (place / name).write_text(yaml.safe_dump(recipe))
    return place / name


def search(place: Path, recipe: dict[str, Any], store: str) -> TuneResult:
    loaded = load_recipe(write(place, recipe))
    return tune_recipe(loaded, place / "made" / store, base=place, store=place / store)


@pytest.fixture(scope="module")
def found(place: Path) -> TuneResult:
    return search(place, plain(), "first")


@pytest.mark.slow
def test_each_choice_is_trained_and_the_smallest_that_is_good_enough_is_packed(
    found: TuneResult, place: Path
) -> None:
    trials = found.tuning["trials"]
    assert found.passed, found.verdict
    assert [trial["parameters"] for trial in trials] == [
        {"training prune.neurons": 0.25},
        {"training prune.neurons": 0.75},
    ]
    whole, small = trials
    assert {whole["state"], small["state"]} == {"complete"} and small["chosen"]
    # Half of 64 neurons in two layers, each with a row of 32, a column of 32 and a bias; and a little graph.
    weights = 2 * 32 * (2 * 32 + 1) * 4 / 1e6
    assert weights <= whole["values"]["size_mb"] - small["values"]["size_mb"] < 1.3 * weights
    # The toy task may be solved by both.
    assert all(abs(trial["values"]["f1_drop_points"]) <= 40 for trial in trials)
    assert found.tuning["reference"]["name"].startswith("the original")
    # The recipe that is left makes it again.
    left = load_recipe(place / "first" / "recipe.yaml")
    assert left.training is not None and left.training.steps[1].prune is not None
    assert left.training.steps[1].prune.neurons == 0.75 and left.training.steps[1].prune.heads == 0.5
    assert Path(place / "first" / left.training.data).resolve() == (place / "train.jsonl").resolve()
    assert found.report is not None and found.report["training"]["steps"][1]["name"] == "prune"
    assert found.report["variants"][0]["size_mb"] == small["values"]["size_mb"]


@pytest.mark.slow
def test_fine_tuning_is_done_once_and_a_second_search_trains_nothing(
    found: TuneResult, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [path.name for path in (place / "first" / "training").iterdir()]
    assert sum("finetune" in name for name in states) == 1
    assert sum("distill" in name for name in states) == 2

    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("onnxsmith.training.fit", no)
    again = search(place, plain(), "first")
    assert again.measured == 0 and again.tuning["chosen"] == found.tuning["chosen"]
    # Other budgets judge what is known.
    strict = search(place, plain(budgets={"f1_drop_points": -200}), "first")
    assert not strict.passed and strict.measured == 0
    least = min(trial["values"]["f1_drop_points"] for trial in found.tuning["trials"])
    assert f"f1_drop_points is at least {least:.4g}" in strict.verdict


@pytest.mark.slow
def test_latency_is_against_the_original_and_passes_are_searched_too(place: Path) -> None:
    one_of = {"one_of": {"float": [], "int8": ["quantize_dynamic"]}}
    recipe = plain(
        tune={
            "training": {"prune.heads": {"choices": [0.5]}, "distill.temperature": {"choices": [1.0, 4.0]}},
            "passes": ["transpose_weights", "cleanup", one_of],
        },
        budgets={"f1_drop_points": 40, "latency_vs_original": 50},
    )
    recipe["evaluation"]["benchmark"] = {"prompt_tokens": 8, "runs": 2, "reference": False}
    result = search(place, recipe, "timed")
    # A model this small may be slower in integers, which a verdict says; nothing else may be wrong.
    assert result.passed or "times as long as its float source" in result.verdict, result.verdict
    trials = result.tuning["trials"]
    assert len(trials) == 4
    for trial in trials:
        assert 0 < trial["values"]["latency_vs_original"] < 50 and trial["values"]["latency_ms"] > 0
    # Two temperatures, of which each was trained once and packed twice.
    assert len(list((place / "timed" / "training").iterdir())) == 3
    assert result.report is not None
    assert result.report["variants"][0]["bench"]["latency_vs_original"] > 0


@pytest.mark.slow
def test_one_fixed_training_is_searched_for_passes(place: Path) -> None:
    one_of = {"one_of": {"float": [], "int8": ["quantize_dynamic"]}}
    recipe = plain(tune={"training": {}, "passes": ["transpose_weights", "cleanup", one_of]})
    result = search(place, recipe, "fixed")
    assert result.passed, result.verdict
    assert [trial["parameters"] for trial in result.tuning["trials"]] == [
        {"one_of": "float"},
        {"one_of": "int8"},
    ]
    assert len(list((place / "fixed" / "training").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": {"training": {"prune.neuron": {"choices": [0.5]}}}}, r"0.5: .*neuron: Extra inputs"),
        (
            {"tune": {"training": {"quantize.bits": {"choices": [8]}}}},
            "no such step and key; expected STEP",
        ),
        ({"tune": {"training": {"prune.neurons": {"low": 0.2, "high": 1.5}}}}, "1.5: .*less than 1"),
        ({"training": None}, r"tune\.training: a recipe without training; expected the key training"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_runs(
    place: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = plain(**changes)
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(place, recipe, "wrong.yaml"))


def test_steps_of_one_name_have_numbers() -> None:
    spec = TrainingSpec.model_validate(
        {
            "data": "a.jsonl",
            "steps": [{"distill": {}}, {"prune": {"weights": {}}}, {"distill": {"epochs": 2}}],
        }
    )
    made = spec.with_values({"distill2.epochs": 5, "prune.weights.ratio": 0.7, "distill1.temperature": 4})
    assert isinstance(made, RecipeModel)
    assert made.steps[0].distill is not None and made.steps[2].distill is not None
    assert (made.steps[0].distill.epochs, made.steps[0].distill.temperature) == (3.0, 4.0)
    assert made.steps[2].distill.epochs == 5.0
    assert made.steps[1].prune is not None and made.steps[1].prune.weights is not None
    assert made.steps[1].prune.weights.ratio == 0.7
    assert spec.steps[1].prune is not None and spec.steps[1].prune.weights is not None
    assert spec.steps[1].prune.weights.ratio == 0.5
    assert Recipe.model_fields["training"].annotation is not None
