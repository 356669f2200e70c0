"""Recipes that train: from a checkpoint to a smaller model that is held against the one before it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith import load_package, load_recipe, run_recipe, verify_artifact
from onnxsmith.errors import BadInputError, RecipeError, SourceError
from onnxsmith.exporters import LoadedModel, load_torch
from onnxsmith.exporters.replacing import with_new_head
from onnxsmith.pipeline._training_charts import training_table
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.report import Report
from onnxsmith.pipeline.training_data import TrainingData
from onnxsmith.pipeline.training_run import Trained, TrainingRun
from onnxsmith.progress import Progress, Step
from onnxsmith.source import ModelSource

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

HOT, WILD = ("fire", "iron", "hammer", "anvil", "coal"), ("fox", "dog", "lazy", "brown", "quick")


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Whether a sentence has more words of the smithy than of the forest."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        hot = int(random.integers(0, 6))
        words = [*random.choice(HOT, hot), *random.choice(WILD, 5 - hot)]
        random.shuffle(words)
        text = " ".join(words) + f" {' '.join(random.choice(['the', 'is', 'and'], 3))}"
        rows.append({"text": text, "label": "smithy" if hot > 2 else "forest"})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, save_tiny_bert: Callable[..., None]) -> Path:
    """A body without a head, and data."""
    directory = tmp_path_factory.mktemp("training")
    save_tiny_bert(directory / "body", positions=128)
    write(directory / "train.jsonl", sentences(400, 1))
    write(directory / "test.jsonl", sentences(150, 2))
    (directory / "more.txt").write_text("\n".join(row["text"] for row in sentences(200, 3)))
    return directory


def recipe_of(bench: Path, steps: list[Any], **changes: Any) -> Recipe:
    training = {"data": "train.jsonl", "steps": steps, "max_length": 64} | changes.pop("training", {})
    return Recipe.model_validate({
        "schema_version": 1, "name": "small", "source": str(bench / "body"), "training": training,
        "variants": [{"name": "fp32", "preset": "cpu-fp32"}],
        "evaluation": {"benchmark": None, "task": {"data": "test.jsonl", "metrics": ["accuracy"]}},
    } | changes)  # fmt: skip


LEARN: Mapping[str, Any] = {"learning_rate": 3e-3, "dropout": 0.0, "batch": 16}
STEPS: list[Any] = [
    {"finetune": {**LEARN, "task": "text-classification", "epochs": 6}},
    {"prune": {"heads": 0.5, "neurons": 0.5}},
    {"distill": {**LEARN, "epochs": 3, "hidden": 1.0, "precision": "bf16"}},
]


class Listening(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = {}

    def step(self, name: str, total: int | None = None) -> Any:
        import contextlib

        @contextlib.contextmanager
        def opened() -> Any:
            notes = self.said.setdefault(name, [])

            class Heard(Step):
                def advance(self, count: int = 1, note: str | None = None) -> None:
                    notes.append(f"{note} of {total}")

            yield Heard(name)

        return opened()


@pytest.fixture(scope="module")
def ran(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, Listening]:
    """Fine-tuned, halved, taught; held against what was fine-tuned."""
    destination = tmp_path_factory.mktemp("made") / "small"
    recipe = recipe_of(
        bench, STEPS,
        training={"unlabelled": "more.txt"},
        evaluation={
            "task": {"data": "test.jsonl", "metrics": ["accuracy"]},
            "benchmark": {"runs": 1, "prompt_tokens": 16, "threads": 1, "reference": False},
            "comparison": {"samples": 2},
        },
        budgets={"metric_drop_points": {"accuracy": 10}, "latency_vs_original": 5},
    )  # fmt: skip
    listening = Listening()
    report = run_recipe(recipe, destination, base=bench, progress=listening)
    assert report.passed, report.verdict
    return report, destination, listening


def test_the_artifact_is_the_trained_model(ran: tuple[Report, Path, Listening], bench: Path) -> None:
    report, destination, _ = ran
    assert verify_artifact(destination) == []
    package = load_package(destination)
    assert package.task == "text-classification"
    config = json.loads(package.files["config.json"])
    assert config["id2label"] == {"0": "forest", "1": "smithy"}
    assert report.source["architecture"] == "BertForSequenceClassification"
    assert not destination.with_name("small.training").exists()
    manifest = json.loads((destination / "manifest.json").read_text())
    names = [step["name"] for step in manifest["steps"]]
    assert names[:4] == ["finetune", "prune", "distill", "export"]
    lesson = manifest["steps"][2]["details"]
    assert lesson["data"]["rows"] == 400 and len(lesson["data"]["sha256"]) == 64
    assert lesson["seed"] == 0 and lesson["versions"]["torch"] == torch.__version__
    assert lesson["updates"] == 3 * 35 and not {"curve", "seconds", "resumed_at"} & set(lesson)
    assert 0 < lesson["loss"] < 1 and lesson["after"]["update"] == lesson["kept"]
    assert lesson["objective"]["teacher"] == "the original"


def test_variants_agree_with_the_trained_model_and_are_judged_by_the_original(
    ran: tuple[Report, Path, Listening],
) -> None:
    report, _, _ = ran
    plain = report.to_json()
    original = plain["original"]
    assert plain["reference"]["name"] == "torch float32, trained"
    # Half of the heads and neurons of a tiny model whose embedding stays.
    assert report.source["parameters"] < original["parameters"]
    assert plain["reference"]["size_mb"] < original["torch_size_mb"]
    before = original["task_metrics"]["accuracy"]["value"]
    assert before > 0.85
    trained = plain["reference"]["task_metrics"]["accuracy"]
    assert trained["difference"]["drop_points"] == pytest.approx(100 * (before - trained["value"]))
    for variant in plain["variants"]:
        assert variant["comparison"]["passed"]
        metric = variant["task_metrics"]["accuracy"]
        assert metric["difference"]["drop_points"] == pytest.approx(100 * (before - metric["value"]))
        budgets = {budget["name"]: budget for budget in variant["budgets"]}
        assert budgets["accuracy_drop_points"]["value"] == pytest.approx(metric["difference"]["drop_points"])
        ratio = variant["bench"]["latency_ms"]["p50"] / original["latency_ms"]
        assert budgets["latency_vs_original"]["value"] == pytest.approx(ratio)
    assert original["size_mb"] > plain["variants"][0]["size_mb"]


def test_the_report_has_loss_curves(ran: tuple[Report, Path, Listening]) -> None:
    report, destination, listening = ran
    steps = {step["name"]: step for step in report.to_json()["training"]["steps"]}
    assert list(steps) == ["finetune", "prune", "distill"]
    curve = steps["distill"]["curve"]
    assert curve[-1]["update"] == 105 and curve[-1]["loss"] < curve[0]["loss"]
    assert {"soft", "hidden"} <= curve[0].keys()
    assert len(steps["finetune"]["evaluations"]) == 6
    assert steps["distill"]["before"].keys() == {"accuracy", "f1_macro"}
    assert steps["prune"]["parameters_after"] < steps["prune"]["parameters_before"]
    assert listening.said["distill"][-1].startswith("loss ") and len(listening.said["distill"]) == 105
    page = (destination / "report.html").read_text(encoding="utf-8")
    assert "Training" in page and page.count('class="curve') >= 2
    assert "the original" in page


def train(recipe: Recipe, base: Path, checkpoints: Path | None = None, listening: Any = None) -> Trained:
    source = ModelSource.parse(recipe.source, base=base)
    loaded = load_torch(source, task=recipe.task)
    return TrainingRun(recipe, base=base, checkpoints=checkpoints).apply(loaded, listening or Progress())


def test_a_run_that_is_killed_goes_on(bench: Path, tmp_path: Path) -> None:
    """The state lies beside the artifact, and a finished step is not trained again."""

    class Interrupting(Listening):
        def step(self, name: str, total: int | None = None) -> Any:
            if name == "export":
                raise KeyboardInterrupt
            return super().step(name, total)

    recipe = recipe_of(bench, STEPS[:1])
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "small", base=bench, progress=Interrupting())
    checkpoints = tmp_path / "small.training"
    assert [p.name for p in checkpoints.iterdir()] == ["0-finetune.pt"]
    listening = Listening()
    trained = train(recipe, bench, checkpoints, listening)
    assert listening.said["finetune"] == []
    assert trained.report["steps"][0]["resumed_at"] == 138
    # What a manifest says of it is what it says of one that was never killed.
    fresh = train(recipe, bench)
    assert fresh.report["steps"][0]["resumed_at"] is None
    assert trained.records[0].details == fresh.records[0].details
    assert trained.original is None
    # Of other settings it is not what was begun.
    with pytest.raises(BadInputError, match="the state of another training"):
        train(recipe_of(bench, [{"finetune": {**LEARN, "task": "text-classification"}}]), bench, checkpoints)


def test_onnx_teaches_and_folds_are_judged(
    ran: tuple[Report, Path, Listening], bench: Path, tmp_path: Path
) -> None:
    _, teacher, _ = ran
    steps = [
        {"finetune": {**LEARN, "task": "text-classification", "epochs": 1, "folds": 2, "watch": "f1_macro"}},
        {"distill": {**LEARN, "epochs": 2, "teacher": str(teacher)}},
    ]
    trained = train(recipe_of(bench, steps), bench)
    first, second = trained.report["steps"]
    assert len(first["cross_validation"]["folds"]) == 2
    assert 0.3 < first["cross_validation"]["mean"]["f1_macro"] <= 1
    assert second["objective"]["teacher"] == str(teacher)
    # What it learns is what the artifact says, and that is right more often than what it said before.
    kept = next(e for e in second["evaluations"] if e["update"] == second["kept"])
    assert kept["f1_macro"] > second["before"]["f1_macro"]


def test_an_onnx_decoder_teaches_what_its_source_does(
    tiny_llama_dir: Path, tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    """An artifact with a cache; texts of other lengths than a whole piece are padded."""
    (tmp_path / "text.txt").write_text("\n".join(row["text"] for row in sentences(80, 4)))
    learned = {}
    for name, teacher in (("torch", None), ("onnx", tiny_artifact_dir)):
        named = {} if teacher is None else {"teacher": str(teacher)}
        steps = [
            {"prune": {"layers": 1, "method": "random"}},
            {"distill": {**LEARN, "epochs": 1, "batch": 4, **named}},
        ]
        recipe = Recipe.model_validate({
            "schema_version": 1, "name": "taught", "source": str(tiny_llama_dir),
            "training": {"data": "text.txt", "max_length": 24, "steps": steps},
            "variants": [{"name": "fp32", "preset": "cpu-fp32"}],
        })  # fmt: skip
        trained = train(recipe, tmp_path)
        learned[name] = trained.model.module.state_dict()
        [_, taught] = trained.report["steps"]
        assert taught["objective"]["teacher"] == ("the original" if teacher is None else str(teacher))
        assert taught["before"]["perplexity"] > 1 and taught["after"]["perplexity"] > 1
    moved = 0.0
    original = load_torch(ModelSource.parse(str(tiny_llama_dir))).module.state_dict()
    for key, tensor in learned["torch"].items():
        torch.testing.assert_close(learned["onnx"][key], tensor, atol=5e-4, rtol=1e-2)
        if key in original and original[key].shape == tensor.shape:
            moved = max(moved, float((original[key] - tensor).abs().max()))
    assert moved > 5e-3


def test_what_is_held_out_of_a_text_is_not_taught(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Drawn from the text, or a text of its own; what else is read is learned."""
    for name, seed in (("text", 1), ("held", 2), ("more", 3)):
        (tmp_path / f"{name}.txt").write_text("\n".join(row["text"] for row in sentences(60, seed)))
    loaded = load_torch(ModelSource.parse(str(tiny_llama_dir)))

    def lessons(**training: Any) -> Any:
        recipe = Recipe.model_validate({
            "schema_version": 1, "name": "taught", "source": str(tiny_llama_dir), "task": loaded.task,
            "training": {"data": "text.txt", "max_length": 24, "steps": [{"distill": {}}], **training},
            "variants": [{"name": "fp32", "preset": "cpu-fp32"}],
        })  # fmt: skip
        return TrainingData(recipe, base=tmp_path).lessons(loaded)

    def seen(examples: Any) -> set[tuple[int, ...]]:
        return {tuple(row.ids) for row in examples.rows}

    drawn = lessons()
    assert 0 < len(drawn.held) < len(drawn.train) / 4
    assert not seen(drawn.held) & seen(drawn.extra) and seen(drawn.extra) == seen(drawn.train)
    given = lessons(validation="held.txt", unlabelled="more.txt", limit=10)
    assert len(given.train) == 10 and len(given.held) > 10
    assert not seen(given.held) & seen(given.extra)
    assert seen(given.train) < seen(given.extra) and len(given.extra) > 20


def test_a_given_student_takes_the_place_of_the_model(bench: Path) -> None:
    """A body that embeds teaches another one, of another width, its embeddings; nothing is labelled."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, pad_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.BertModel(config).save_pretrained(bench / "student")
    transformers.AutoTokenizer.from_pretrained(bench / "body").save_pretrained(bench / "student")
    recipe = recipe_of(
        bench, [{"distill": {**LEARN, "student": str(bench / "student"), "attention": 0.1}}],
        training={"data": "more.txt"}, evaluation={"benchmark": None},
    )  # fmt: skip
    trained = train(recipe, bench)
    assert trained.model.module.config.num_hidden_layers == 1
    assert trained.original is not None and trained.original.module.config.num_hidden_layers == 2
    losses = [point["loss"] for point in trained.report["steps"][0]["evaluations"]]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads(trained.model.files["config.json"])["num_hidden_layers"] == 1


def test_a_step_with_quantization_leaves_integers(bench: Path, tmp_path: Path) -> None:
    """What goes on after a kill has the same first steps; the original is what was not rounded."""
    steps = [
        {"finetune": {**LEARN, "task": "text-classification", "epochs": 4}},
        {"distill": {**LEARN, "epochs": 1, "quantization": "int8"}},
    ]
    recipe = recipe_of(bench, steps)
    trained = train(recipe, bench, tmp_path / "states")
    last = trained.report["steps"][1]
    assert last["quantized_layers"] == 14
    # Judged while it rounded: hardly worse than before, which is what it was taught by.
    assert last["evaluations"][-1]["accuracy"] > last["before"]["accuracy"] - 0.1
    kinds = [type(part).__name__ for part in trained.model.module.modules()]
    assert kinds.count("QuantizedLinear") == 14 and "FakeQuantizedLinear" not in kinds
    assert trained.original is not None
    assert not any("Quantized" in type(part).__name__ for part in trained.original.module.modules())
    again = train(recipe, bench, tmp_path / "states")
    assert again.report["steps"][1]["resumed_at"] == last["updates"]
    for (name, tensor), (_, other) in zip(
        again.model.module.state_dict().items(), trained.model.module.state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, other), name


def test_zeros_and_rows_of_the_embedding_reach_the_graph(bench: Path, tmp_path: Path) -> None:
    steps = [
        {"finetune": {**LEARN, "task": "text-classification", "epochs": 4}},
        {"prune": {"vocabulary": None, "weights": {"pattern": "2:4", "method": "wanda"}, "samples": 64}},
        {"distill": {**LEARN, "epochs": 2}},
    ]
    report = run_recipe(recipe_of(bench, steps), tmp_path / "made", base=bench)
    assert report.passed, report.verdict
    assert report.training is not None
    pruned = report.training["steps"][1]
    assert pruned["weights"]["zeros"] == pytest.approx(0.5, abs=0.01)
    rows = pruned["vocabulary"]
    # Words of the sentences, and what the tokenizer adds by itself.
    assert 10 < rows["rows_left"] < rows["rows_before"]
    assert pruned["parameters_after"] < pruned["parameters_before"]
    said = training_table(report.training)[1]["said"]
    assert "not smaller and not faster" in said and f"to {rows['rows_left']:,} rows" in said
    package = load_package(tmp_path / "made")
    arrays = {
        name: value.const_value.numpy()
        for name, value in package.main.model.graph.initializers.items()
        if value.const_value is not None
    }
    assert any(array.shape == (rows["rows_left"], 32) for array in arrays.values())
    ups = [array for array in arrays.values() if array.shape == (32, 64)]
    assert len(ups) == 2
    for matrix in ups:
        # What a column of the graph's matrix is, is a row of PyTorch's.
        groups = matrix.T.reshape(64, -1, 4)
        assert ((groups != 0).sum(-1) <= 2).all()


def test_what_is_evaluated_on_is_not_learned(bench: Path, tmp_path: Path) -> None:
    rows = sentences(50, 7)
    write(tmp_path / "train.jsonl", [*rows, *sentences(50, 8)])
    write(tmp_path / "test.jsonl", rows)
    recipe = recipe_of(bench, STEPS[:1])
    data = TrainingData(recipe, base=tmp_path)
    assert data.rows is not None
    texts = {row["text"] for row in rows}
    assert not texts & {row["text"] for row in data.rows.rows}
    assert data.left_out >= 50 and data.described()["left_out"] == data.left_out
    # Rows of words, and rows that choose the best weights.
    tagged = [{"tokens": row["text"].split(), "tags": ["O"] * len(row["text"].split())} for row in rows]
    others = [{"tokens": ["iron", str(n)], "tags": ["O", "O"]} for n in range(20)]
    for name, some in (("train", tagged + others), ("held", [*tagged[:5], *others[:3]]), ("test", tagged)):
        write(tmp_path / f"{name}.jsonl", some)
    recipe = recipe_of(bench, STEPS[:1], training={"validation": "held.jsonl"})
    data = TrainingData(recipe, base=tmp_path)
    assert data.rows is not None and data.held is not None
    assert len(data.rows) == 20 and len(data.held) == 3 and data.left_out == 55
    with pytest.raises(RecipeError, match=r"training\.data: what is evaluated on; expected other data"):
        path = tmp_path / "recipe.json"
        path.write_text(
            json.dumps(recipe.model_dump(mode="json", exclude_none=True) | {
                "training": {"data": "test.jsonl", "steps": [{"distill": {}}]}
            })
        )  # fmt: skip
        load_recipe(path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"prune": {}}],
            "nothing to prune; expected heads, neurons, layers, threshold, vocabulary",
        ),
        (
            [{"prune": {"weights": {"method": "wanda", "scope": "global"}}}],
            "scope global or a threshold with method wanda and pattern unstructured; expected method",
        ),
        ([{"prune": {"weights": {"pattern": "1:3"}}}], "1:3; expected unstructured, or N:M such as 2:4"),
        ([{"prune": {"heads": 0.5}, "distill": {}}], "a step with prune and distill; expected one of"),
        ([{"quantize": {}}], "quantize"),
        ([{"distill": {"temperature": 0}}], "temperature"),
        (
            [{"prune": {"heads": 0.5}}, {"finetune": {"task": "text-classification"}}],
            "a new head after other steps; expected it in the first",
        ),
        (
            [{"finetune": {"quantization": "int8"}}, {"distill": {}}],
            "a step with quantization before others; expected it to be the last step",
        ),
    ],
)
def test_steps_are_checked(bench: Path, tmp_path: Path, steps: list[Any], message: str) -> None:
    recipe = recipe_of(bench, ["distill"]).model_dump(mode="json", exclude_none=True)
    recipe["training"]["steps"] = steps
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_what_cannot_be_trained_is_said(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="latency_vs_original: no step that compresses"):
        path = tmp_path / "recipe.json"
        plain = recipe_of(bench, STEPS[:1]).model_dump(mode="json", exclude_none=True)
        path.write_text(json.dumps(plain | {"budgets": {"latency_vs_original": 0.5}}))
        load_recipe(path)
    write(tmp_path / "train.jsonl", [{"text": "a fox", "label": "cat"}] * 20)
    write(tmp_path / "test.jsonl", sentences(10, 1))
    headed = tmp_path / "headed"
    transformers.BertForSequenceClassification.from_pretrained(
        bench / "body", id2label={0: "forest", 1: "smithy"}, label2id={"forest": 0, "smithy": 1}
    ).save_pretrained(headed)
    transformers.AutoTokenizer.from_pretrained(bench / "body").save_pretrained(headed)
    with pytest.raises(BadInputError, match="the label 'cat'; expected one of forest, smithy"):
        train(recipe_of(bench, [{"finetune": {}}], source=str(headed)), tmp_path)
    with pytest.raises(BadInputError, match=r"a model that embeds, which has no loss; .* wanda"):
        train(recipe_of(bench, [{"prune": {"heads": 0.5}}]), bench)
    with pytest.raises(BadInputError, match="a model that embeds; expected one that predicts labels"):
        train(recipe_of(bench, [{"finetune": {}}]), bench)
    with pytest.raises(SourceError, match="a plain module; expected a model of transformers"):
        loaded = LoadedModel(torch.nn.Linear(2, 2), ModelSource.parse(str(bench / "body")), None, {}, {})
        with_new_head(dataclasses.replace(loaded), "text-classification", ["a"], seed=0)
