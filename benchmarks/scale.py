"""What large models and many of them need: ``python benchmarks/scale.py curve|queue|page``.

``curve`` converts random Llamas of 0.13, 0.5 and 1.1 billion parameters from float32 safetensors to 4
bits, each in a process of its own without checks, and with ``--peer PYTHON`` does the same with
onnxruntime-genai's model builder in turn. ``queue`` gives a hundred small jobs to the batch executor, on
Ray or on this machine, and measures how much of the time its workers had something to do. ``page`` fits
lines to the curve and writes ``docs/scale.md``. Results are in ``artifacts/bench/scale``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from export_cost import run  # noqa: E402

from onnxsmith.environment import describe_environment  # noqa: E402

# Name: hidden, inner, layers, heads, heads of the cache, vocabulary: those of SmolLM2-135M, Qwen2-0.5B and
# TinyLlama.
SHAPES: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "0.13B": (576, 1536, 30, 9, 3, 49152),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.1B": (2048, 5632, 22, 32, 4, 32000),
}
LARGER: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
OURS = """
import sys
sys.path[:0] = sys.argv[4:5]
from pathlib import Path
from peer_adapters import adapter
Path(sys.argv[2]).mkdir()
adapter("onnxsmith").convert(sys.argv[3], Path(sys.argv[1]), Path(sys.argv[2]))
"""


def tensors(shape: Sequence[int]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the weights, a shard for each layer."""
    size, inner, layers, heads, kv_heads, vocabulary = shape
    kv = size // heads * kv_heads
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, size)},
        {"lm_head.weight": (vocabulary, size), "model.norm.weight": (size,)},
    ]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shards.append({
            f"{prefix}self_attn.q_proj.weight": (size, size), f"{prefix}self_attn.k_proj.weight": (kv, size),
            f"{prefix}self_attn.v_proj.weight": (kv, size), f"{prefix}self_attn.o_proj.weight": (size, size),
            f"{prefix}mlp.gate_proj.weight": (inner, size), f"{prefix}mlp.up_proj.weight": (inner, size),
            f"{prefix}mlp.down_proj.weight": (size, inner), f"{prefix}input_layernorm.weight": (size,),
            f"{prefix}post_attention_layernorm.weight": (size,),
        })  # fmt: skip
    return shards


def parameters(shape: Sequence[int]) -> int:
    """How many weights."""
    return sum(int(np.prod(one)) for shard in tensors(shape) for one in shard.values())


def write_model(directory: Path, shape: Sequence[int]) -> None:
    """A random model, never in memory as a whole."""
    from safetensors.numpy import save_file

    size, inner, layers, heads, kv_heads, vocabulary = shape
    # One random block, repeated: making a thousand million normal numbers takes longer than the conversion.
    block = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32) * np.float32(0.02)
    names: dict[str, str] = {}
    shards = tensors(shape)
    directory.mkdir(parents=True)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {n: np.resize(block, s) for n, s in shard.items()}, directory / file, metadata={"format": "pt"}
        )
        names |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    _write_tokenizer(directory)


def _write_tokenizer(directory: Path) -> None:
    """The smallest that the builder reads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2}, []))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def curve(output: Path, peer: str | None, names: Sequence[str], preset: str) -> None:
    """Cost of each size, ours and the builder's."""
    path = output / "curve.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="onnxsmith-scale-", dir=output) as folder:
            model = Path(folder) / "model"
            write_model(model, SHAPES[name])
            commands = {
                "onnxsmith": [sys.executable, "-c", OURS, str(model), f"{folder}/ours", preset, str(HERE)]
            }
            if peer:
                commands["genai builder"] = [
                    peer, "-m", "onnxruntime_genai.models.builder", "-m", "x", "-i", str(model),
                    "-o", f"{folder}/peer", "-c", f"{folder}/cache",
                    "-p", "int4", "-e", "cpu", "--extra_options", "hf_token=false",
                ]  # fmt: skip
            for tool, command in commands.items():
                cpu, wall, peak = run(command)
                made = Path(folder) / ("ours" if tool == "onnxsmith" else "peer")
                size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file()) / 1e6
                known.setdefault(tool, {})[name] = {
                    "parameters": parameters(SHAPES[name]), "cpu_s": cpu, "wall_s": wall, "peak_mb": peak,
                    "size_mb": size, "preset": preset if tool == "onnxsmith" else "int4",
                }  # fmt: skip
                print(
                    f"{name} {tool}: {cpu:.1f} CPU s, {wall:.1f} s, peak {peak:.0f} MB, {size:.0f} MB",
                    flush=True,
                )
                known["environment"] = describe_environment()
                path.write_text(json.dumps(known, indent=1) + "\n")


RECIPE = """schema_version: 1
name: small
source: quick_model:make
variants:
  - {name: fp32, preset: cpu-fp32}
"""
MODEL = """import torch


def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    return net, {"input": torch.randn(2, 64)}
"""


def queue(output: Path, executor: str, workers: int, jobs: int) -> None:
    """How busy workers are with many small jobs."""
    from onnxsmith.pipeline.batch import run_batch

    with tempfile.TemporaryDirectory(prefix="onnxsmith-queue-") as name:
        folder = Path(name)
        (folder / "small.yaml").write_text(RECIPE)
        (folder / "quick_model.py").write_text(MODEL)
        lines = ["schema_version: 1", f"output: {folder / 'artifacts'}", "jobs:"]
        for number in range(jobs):
            lines += [f"  - name: job{number:03}", "    recipe: small.yaml", "    memory_gb: 1"]
        (folder / "jobs.yaml").write_text("\n".join(lines) + "\n")
        began = time.perf_counter()
        result = run_batch(folder / "jobs.yaml", executor=executor, workers=workers)
        wall = time.perf_counter() - began
        busy = sum(job.seconds for job in result.jobs)
        body = {
            "executor": executor, "workers": workers, "jobs": jobs,
            "passed": sum(one.status == "done" for one in result.jobs), "wall_s": wall, "busy_s": busy,
            "utilisation": busy / (wall * workers), "seconds_per_job": busy / jobs,
            "load_average": os.getloadavg()[0], "environment": describe_environment(),
        }  # fmt: skip
    for one in result.jobs:
        if one.status != "done":
            print(f"{one.name}: {one.reason}")
            break
    (output / f"queue-{executor}.json").write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps({k: v for k, v in body.items() if k != "environment"}))


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["curve", "queue", "page"])
    parser.add_argument("--output", type=Path, default=Path("artifacts/bench/scale"))
    parser.add_argument("--peer", help="an interpreter with onnxruntime-genai and its builder")
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--preset", default="cpu-int4-newest")
    parser.add_argument("--executor", default="ray", choices=["ray", "local"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.what == "curve":
        curve(arguments.output.absolute(), arguments.peer, arguments.sizes, arguments.preset)
    elif arguments.what == "queue":
        queue(arguments.output, arguments.executor, arguments.workers, arguments.jobs)
    else:
        page(arguments.output, arguments.page)


def _line(points: Mapping[str, Mapping[str, float]], key: str) -> tuple[float, float]:
    """Intercept, and slope for each billion parameters, by least squares."""
    x = [point["parameters"] / 1e9 for point in points.values()]
    slope, intercept = np.polyfit(x, [point[key] for point in points.values()], 1)
    return float(intercept), float(slope)


def page(output: Path, target: Path) -> None:
    """What follows from the measurements."""
    known = json.loads((output / "curve.json").read_text())
    queues = [json.loads(path.read_text()) for path in sorted(output.glob("queue-*.json"))]
    machine = known.pop("environment")
    text = f"""
# Scale

Generated by `python benchmarks/scale.py page` from what `curve` and `queue` of that script measured on
{machine["cpu"]}, {machine["threads"]} threads. Other programs ran at the same time: processor seconds and
peak memory are sound, wall times are upper bounds. Extrapolations are straight lines through the measured
points; nothing larger than 1.1 billion parameters was run.

## Measured

Random Llamas, float32 safetensors to 4 bits, without checks. A process of its own each.

| model | tool | parameters | processor s | wall s | peak MB | MB |
|---|---|---|---|---|---|---|
""".strip().splitlines()
    for tool, points in known.items():
        for name, one in points.items():
            text.append(
                f"| {name} | {tool} ({one['preset']}) | {one['parameters'] / 1e9:.2f} B | "
                f"{one['cpu_s']:.0f} | "
                f"{one['wall_s']:.0f} | {one['peak_mb']:.0f} | {one['size_mb']:.0f} |"
            )
    ours = known["onnxsmith"]
    text += ["", "## Extrapolated", "", *_extrapolated(ours), "", "## A queue of small jobs", ""]
    for one in queues:
        said = f"""
{one["jobs"]} jobs of `onnxsmith batch --executor {one["executor"]} --workers {one["workers"]}`, each a small
network exported, optimised and checked in a process of its own: {one["passed"]} made, {one["wall_s"]:.0f} s,
{one["seconds_per_job"]:.1f} s for each. A worker had a job {100 * one["utilisation"]:.1f} % of the time.
"""
        text += [*said.strip().splitlines(), ""]
    text += _fleet(ours, queues)
    target.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    print(target)


def _extrapolated(ours: Mapping[str, Mapping[str, float]]) -> list[str]:
    (cpu0, cpu1), (size0, size1), (peak0, peak1) = (
        _line(ours, key) for key in ("cpu_s", "size_mb", "peak_mb")
    )
    rows = []
    for name, shape in LARGER.items():
        billions = parameters(shape) / 1e9
        largest = 4e-9 * max(int(np.prod(one)) for shard in tensors(shape) for one in shard.values())
        rows.append(
            f"| {name} | {2 * billions:.0f} GB | {largest:.1f} GB | "
            f"{(size0 + size1 * billions) / 1e3:.1f} GB | "
            f"{(cpu0 + cpu1 * billions) / 60:.0f} min | {(peak0 + peak1 * billions) / 1e3:.1f} GB |"
        )
    head = f"""
Processor seconds: {cpu0:.0f} + {cpu1:.0f} for each billion parameters. Peak memory: {peak0:.0f} MB +
{peak1:.0f} MB for each billion. Size: {size1:.0f} MB for each billion. What memory follows is the largest
tensor, which is read, quantized and written by itself; a line through the measured peaks contains it.

| model | source, bfloat16 | largest tensor, float32 | artifact | processor time | peak memory |
|---|---|---|---|---|---|
"""
    tail = """
On disk a conversion needs the source, the artifact, and once more the artifact while it is written. Checking
against PyTorch needs the weights in memory as PyTorch holds them: 4 bytes a parameter in float32, 28 GB for
7B. Without that memory, convert with `--no-verify` and check a smaller model of the same architecture.
"""
    return [*head.strip().splitlines(), *rows, *tail.rstrip().splitlines()]


def _fleet(ours: Mapping[str, Mapping[str, float]], queues: Sequence[Mapping[str, Any]]) -> list[str]:
    busy = min((one["utilisation"] for one in queues), default=1.0)
    rows = []
    for name, one in ours.items():
        hours = one["cpu_s"] * 10_000 / 3600
        rows.append(
            f"| {name} | {hours:.0f} | {hours / 16 / 24 / busy:.1f} | "
            f"{one['size_mb'] * 10_000 / 1e6:.1f} TB | "
            f"{16 * one['peak_mb'] / 1e3:.0f} GB |"
        )
    head = """
## Ten thousand conversions

| model | processor hours | days on 16 workers | disk for the artifacts | memory of 16 workers |
|---|---|---|---|---|
"""
    tail = f"""
A worker is one processor here; the share of time that workers were idle ({100 * (1 - busy):.0f} %) is
counted. The list of jobs, their logs and their records are files below the output, a few kilobytes for each
job, so a batch that was interrupted goes on where it was. Sources are not copied. Checks and evaluation are
not included.
"""
    return [*head.strip().splitlines(), *rows, *tail.rstrip().splitlines()]


if __name__ == "__main__":
    main()
