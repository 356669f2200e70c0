"""The main job on a tiny Llama: what is measured, what is chosen, what is packed, and what an end leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pydantic
import pytest
from tests.conftest import TINY_TEXT, heed_interrupts

from onnxsmith import Recipe, generate_text, load_package, run_recipe, verify_artifact
from onnxsmith.errors import OnnxsmithError, SourceError
from onnxsmith.pipeline.report import Report, VariantReport
from onnxsmith.pipeline.workbench import Workbench
from onnxsmith.source import ModelSource

pytest.importorskip("torch")
pytest.importorskip("transformers")


def recipe_of(directory: Path, **changes: Any) -> Recipe:
    """Three variants of a decoder; a text to predict; short measurements."""
    plain: dict[str, Any] = {
        "schema_version": 1,
        "name": "tiny",
        "source": str(directory),
        "variants": [
            {"name": "fp32", "preset": "cpu-fp32"},
            {"name": "int8", "preset": "cpu-int8"},
            {"name": "int4", "preset": "cpu-int4"},
        ],
        "evaluation": {
            "perplexity": {"data": "text.txt", "window": 32},
            "benchmark": {"prompt_tokens": 8, "new_tokens": 4, "runs": 2},
        },
        "prompt": "the smith",
    }
    return Recipe.model_validate(plain | changes)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    (directory / "text.txt").write_text(TINY_TEXT * 3)
    return directory


@pytest.fixture(scope="module")
def report(tiny_llama_dir: Path, work: Path) -> Report:
    return run_recipe(recipe_of(tiny_llama_dir), work / "out", base=work, command="onnxsmith run tiny.yaml")


def test_the_inside_of_variants_is_looked_into(tiny_llama_dir: Path, work: Path, tmp_path: Path) -> None:
    plain = recipe_of(tiny_llama_dir).model_dump(mode="json")
    plain["variants"] = plain["variants"][1:2]
    plain["evaluation"]["error_by_layer"] = plain["evaluation"]["benchmark"]["profile"] = True
    plain["evaluation"]["benchmark"]["reference"] = False
    report = run_recipe(Recipe.model_validate(plain), tmp_path / "out", base=work)
    (int8,) = report.variants
    # Seven products in each of two layers, and the head; the embedding; and norms, too small to be listed.
    bits = {weight["name"]: weight["bits"] for weight in int8.weights}
    assert list(bits.values()).count(8) >= 15 and set(bits.values()) <= {8, 32}
    assert sum(weight["bytes"] for weight in int8.weights) < 1e6 * (int8.size_mb or 0)
    assert int8.layer_errors is not None
    tensors = int8.layer_errors["tensors"]
    depths = [tensor["depth"] for tensor in tensors]
    assert len(tensors) > 10 and depths == sorted(depths)
    # Rounded weights make errors, and what comes later inherits them.
    assert all(0 < tensor["error"] < 1 for tensor in tensors[-3:])
    assert int8.bench and int8.bench["profile"]["operators"] and int8.bench["profile"]["nodes"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(
        title in page for title in ("Precision, weight by weight", "Error by layer", "Where the time goes")
    )


def chosen_of(report: Report) -> VariantReport:
    return next(variant for variant in report.variants if variant.chosen)


def test_every_variant_is_compared_scored_and_measured(report: Report) -> None:
    assert report.passed
    fp32, int8, int4 = report.variants
    for variant in report.variants:
        assert variant.passed, variant.reason
        assert variant.comparison and variant.comparison["tensors"]
        assert variant.bench and variant.bench["decode_tokens_per_s"]["p50"] > 0
        assert variant.bench["decode_vs_reference"] > 0
        assert variant.placement
    assert abs(fp32.perplexity_increase_pct or 1) < 1e-3
    assert fp32.kl_to_reference is not None and int8.kl_to_reference and int4.kl_to_reference
    assert fp32.kl_to_reference < 1e-6 < int8.kl_to_reference < int4.kl_to_reference
    assert [v.precision for v in report.variants] == ["float32", "int8", "int4"]


def test_the_smallest_is_chosen_and_packed(report: Report, work: Path) -> None:
    sizes = {variant.name: variant.size_mb or 0 for variant in report.variants}
    assert report.chosen == min(sizes, key=lambda name: sizes[name])
    assert verify_artifact(work / "out") == []
    package = load_package(work / "out")
    assert package.precision == chosen_of(report).precision
    assert package.precision in ("int8", "int4")
    assert package.steps[0].name == "export"
    assert "quantize_weights" in [step.name for step in package.steps]
    assert sorted(path.name for path in work.iterdir()) == ["out", "text.txt"]


def test_the_manifest_has_the_measurements_and_the_recipe(report: Report, work: Path) -> None:
    manifest = json.loads((work / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["name"] == "tiny"
    measured = manifest["measurements"]
    perplexity = chosen_of(report).perplexity
    assert perplexity is not None
    assert measured["perplexity"]["value"] == pytest.approx(perplexity["value"], rel=1e-5)
    assert measured["reference"]["perplexity"]["data_sha256"]
    assert manifest["source"]["files"] and all(file["sha256"] for file in manifest["source"]["files"])


def test_the_card_and_the_bill_of_materials_are_there(report: Report, work: Path) -> None:
    perplexity = chosen_of(report).perplexity
    assert perplexity is not None
    card = (work / "out" / "README.md").read_text()
    assert f"{perplexity['value']:.3f}" in card
    bill = json.loads((work / "out" / "sbom.cdx.json").read_text())
    assert {"model.onnx", "README.md"} <= {
        file["name"] for file in bill["metadata"]["component"]["components"]
    }


def test_the_artifact_says_what_the_report_says(report: Report, work: Path) -> None:
    assert report.generation is not None and report.generation["tokens"] > 0
    said = "".join(generate_text(work / "out", "the smith", max_new_tokens=report.generation["tokens"]))
    assert said == report.generation["text"]


def test_the_page_and_the_json_have_the_same_content(report: Report, work: Path) -> None:
    plain = json.loads((work / "out" / "report.json").read_text())
    assert plain == report.to_json()
    page = (work / "out" / "report.html").read_text()
    assert report.verdict in page
    assert not re.search(r"(src|href)=[\"']https?:", page)


def test_budgets_decide(tiny_llama_dir: Path, work: Path) -> None:
    report = run_recipe(
        recipe_of(
            tiny_llama_dir,
            variants=[{"name": "int4", "preset": "cpu-int4"}, {"name": "fp32", "preset": "cpu-fp32"}],
            evaluation={"perplexity": {"data": "text.txt", "window": 32}, "benchmark": None},
            budgets={"kl_to_reference": 1e-6},
        ),
        work / "exact",
        base=work,
    )
    assert report.chosen == "fp32"
    assert re.search(r"kl_to_reference is [\d.e-]+; expected at most 1e-06", report.variants[0].reason)
    assert report.verdict == "fp32 chosen: the smallest variant that keeps every budget (int4 does not)"


def test_nothing_is_packed_where_nothing_passes(tiny_llama_dir: Path, work: Path) -> None:
    recipe = recipe_of(
        tiny_llama_dir,
        variants=[
            {"name": "fp32", "preset": "cpu-fp32"},
            {"name": "wrong", "passes": [{"quantize_weights": {"bits": 4, "skip_nodes": ["*"]}}]},
        ],
        evaluation={"benchmark": None},
        budgets={"size_mb": 1e-6},
        prompt=None,
    )
    report = run_recipe(recipe, work / "none", base=work)
    assert not report.passed
    assert report.verdict.startswith("no variant passes: fp32: size_mb is ")
    assert not (work / "none").exists()
    failed = work / "none.failed"
    assert sorted(path.name for path in failed.iterdir()) == ["report.html", "report.json"]
    assert not [path for path in work.iterdir() if path.name.startswith(".")]
    # A run that passes takes the old failure away, or it would seem to be its own.
    assert run_recipe(recipe.model_copy(update={"budgets": type(recipe.budgets)()}), work / "none", base=work)
    assert not failed.exists()


def test_a_run_in_which_nothing_can_be_made_says_why(tiny_llama_dir: Path, work: Path) -> None:
    recipe = recipe_of(tiny_llama_dir, variants=[{"name": "blocks", "passes": ["keep_gguf_blocks"]}])
    report = run_recipe(recipe, work / "unmade", base=work)
    assert not report.passed
    assert re.search("no variant passes: blocks: .*keep_gguf_blocks.*GGUF", report.verdict)
    assert "keep_gguf_blocks" in (work / "unmade.failed" / "report.html").read_text()
    shutil.rmtree(work / "unmade.failed")


def test_variants_are_judged_one_by_one(tiny_llama_dir: Path, work: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_llama_dir, budgets={"kl_to_reference": 1e-4})
    source = ModelSource.parse(recipe.source)
    with Workbench(recipe, source, base=work) as bench:
        (tmp_path / "work").mkdir()
        bench.load(tmp_path / "work")
        exact = bench.judge("exact", [("cleanup", {})])
        coarse = bench.judge("coarse", [("cleanup", {}), ("quantize_weights", {"bits": 4})], timed=False)
        unmade = bench.judge("unmade", [("keep_gguf_blocks", {})])
    assert exact.passed and exact.bench and exact.bench["decode_tokens_per_s"]["p50"] > 0
    assert not coarse.passed and coarse.bench is None and "kl_to_reference is" in coarse.reason
    assert unmade.error and not unmade.passed and unmade.perplexity is None
    assert [step.name for step in bench.log.steps].count("reference") == 1


def test_what_is_asked_of_a_model_without_a_cache_is_refused(work: Path) -> None:
    pytest.importorskip("torch")
    (work / "plain_module.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(4, 4), torch.randn(2, 4)\n"
    )
    sys.path.insert(0, str(work))
    try:
        recipe = recipe_of(work, source="plain_module:make")
        with pytest.raises(SourceError, match=r"expected a decoder.*Leave evaluation\.perplexity out"):
            run_recipe(recipe, work / "plain", base=work)
    finally:
        sys.path.remove(str(work))
        sys.modules.pop("plain_module", None)
        (work / "plain_module.py").unlink()
    assert not (work / "plain").exists()


def test_everything_that_can_be_wrong_is_found_before_the_model_is_read(work: Path) -> None:
    """The source does not exist, and the mistake is found first."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"provider": "cdua"}, "Did you mean 'cuda'"),
        ({"variants": [{"name": "a", "passes": ["clenaup"]}]}, "Did you mean 'cleanup'"),
        ({"variants": [{"name": "a", "passes": [{"cleanup": {"max_elements": 1}}]}]}, "unknown parameter"),
        ({"evaluation": {"perplexity": {"data": "gone.txt"}}}, "gone.txt: cannot be read"),
    ]
    for changes, message in cases:
        with pytest.raises(OnnxsmithError, match=message):
            run_recipe(recipe_of(Path("owner/name"), **changes), work / "early", base=work)
        assert not (work / "early").exists()


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGINT, "export"),
        (signal.SIGTERM, "benchmark"),
        pytest.param(signal.SIGINT, "load", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "export", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "benchmark", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_leaves_what_was_there(
    tiny_llama_dir: Path, tmp_path: Path, number: signal.Signals, after: str
) -> None:
    (tmp_path / "text.txt").write_text(TINY_TEXT)
    recipe = recipe_of(tiny_llama_dir).model_dump(mode="json")
    recipe["evaluation"]["benchmark"]["runs"] = 1000
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    # Says on standard output which step begins: a signal at a known point, not after a guess of seconds.
    code = (
        "import contextlib, sys\n"
        "from onnxsmith.pipeline import cli, console\n"
        "from onnxsmith.progress import Progress\n"
        "class Spoken(Progress):\n"
        "    @contextlib.contextmanager\n"
        "    def step(self, name, total=None):\n"
        "        print('step', name, flush=True)\n"
        "        with super().step(name, total) as step:\n"
        "            yield step\n"
        "console.progress_for = lambda stream=None: Spoken()\n"
        "sys.argv = ['onnxsmith', 'run', 'recipe.json', '-o', 'out']\n"
        "cli.main()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == f"step {after}":
            break
    time.sleep(0.3)
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    del out
    assert child.returncode == 130, err
    assert err.strip().endswith("onnxsmith: interrupted; nothing was changed")
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json", "text.txt"]


def test_a_task_is_measured_and_its_budget_held(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for package in ("sklearn", "sacrebleu", "rouge_score", "jiwer"):
        pytest.importorskip(package)
    from onnxsmith.exporters import load_torch, torch_program
    from onnxsmith.pipeline.tokenization import PackageTokenizer
    from onnxsmith.runtime import TorchBackend, generate
    from onnxsmith.source import ModelSource

    # The targets are what torch says, so torch is right in all of them.
    loaded = load_torch(ModelSource.parse(str(tiny_llama_dir)))
    tokenizer = PackageTokenizer(load_package_files(loaded.files))
    rows = []
    with TorchBackend().open(torch_program(loaded)) as session:
        for text in ("the quick", "a smith forges", "the fire is", "jumps over the"):
            ids = tokenizer.encode(text)
            said = list(generate(session, ids, max_new_tokens=8, stop=tokenizer.stop_ids))
            rows.append({"text": text, "target": tokenizer.continuation(ids, said)})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {
        "task": {"data": "data.jsonl", "metrics": ["exact_match", "wer"], "max_new_tokens": 8},
        "benchmark": None,
    }
    variants = [{"name": "fp32", "preset": "cpu-fp32"}, {"name": "int4", "preset": "cpu-int4"}]
    recipe = recipe_of(
        tiny_llama_dir, evaluation=evaluation, variants=variants, prompt=None,
        budgets={"metric_drop_points": {"exact_match": 10}},
    )  # fmt: skip
    report = run_recipe(recipe, tmp_path / "out", base=tmp_path)
    fp32, int4 = report.variants
    assert report.reference["task_metrics"]["exact_match"]["value"] == 1.0
    assert fp32.task_metrics is not None
    assert int4.task_metrics is not None
    assert fp32.task_metrics["exact_match"]["value"] == 1.0
    # Four bits of a random model change what it says.
    assert int4.task_metrics["exact_match"]["value"] < 0.9
    assert report.chosen == "fp32"
    assert "exact_match_drop_points is" in int4.reason
    assert {b.name: b.passed for b in fp32.budgets} == {"exact_match_drop_points": True}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["measurements"]["task_metrics"]["wer"]["value"] == 0.0


def load_package_files(files: dict[str, bytes]) -> Any:
    from onnxsmith.package import ModelPackage

    return ModelPackage({}, files=dict(files))


def test_a_recipe_exports_as_the_command_does(tiny_llama_dir: Path, work: Path, tmp_path: Path) -> None:
    """An adapter that stays beside its model, all layers traced."""
    peft = pytest.importorskip("peft")
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    recipe = recipe_of(
        tmp_path / "adapter",
        export={"adapter": "inputs", "tracing": "whole", "exporter": "torch"},
        variants=[{"name": "fp32", "preset": "clean"}],
        evaluation={"benchmark": None},
        prompt=None,
    )
    report = run_recipe(recipe, tmp_path / "out", base=work, command="onnxsmith run adapter.yaml")
    assert report.passed, report.verdict
    package = load_package(tmp_path / "out")
    assert package.steps[0].parameters["tracing"] == "whole"
    assert package.steps[0].details["why_whole"] == "as asked"
    assert sum(".lora_" in (value.name or "") for value in package.main.model.graph.inputs) == 4
    with pytest.raises(pydantic.ValidationError, match="whole with exporter: optimum"):
        recipe_of(tiny_llama_dir, export={"exporter": "optimum", "tracing": "whole"})


def test_a_recipe_takes_the_road_through_optimum(tiny_llama_dir: Path, work: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    recipe = recipe_of(
        tiny_llama_dir,
        export={"exporter": "optimum"},
        variants=[{"name": "fp32", "preset": "clean"}],
        evaluation={"benchmark": None},
        prompt=None,
    )
    report = run_recipe(recipe, tmp_path / "out", base=work, command="onnxsmith run tiny.yaml")
    assert report.passed, report.verdict
    assert load_package(tmp_path / "out").steps[0].parameters["exporter"] == "optimum"
