"""What an export costs: with depth, with size, and beside onnxruntime-genai's model builder.

``depth`` traces random Llamas of 16 and 32 layers. ``large`` exports a random float32 model of TinyLlama's
shape (1.1 billion parameters), whose weights are written shard by shard. ``peer MODEL`` exports a Hugging
Face directory in turn with ``onnxruntime_genai.models.builder -p fp32``, run by the interpreter that is named
with ``--python``, because the builder needs another transformers. Prints CPU seconds, wall seconds and peak
memory of whole processes, without the comparison with PyTorch, which the builder does not make.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

DEPTH = """
import gc, sys, time
import torch, transformers
from onnxsmith.exporters import LoadedModel, export, torch_program
from onnxsmith.pipeline.exporting import LayerCleanup
from onnxsmith.source import ModelSource, SourceKind

# As the command line sets it.
gc.set_threshold(100_000, 10, 10)

def cost(layers):
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    loaded = LoadedModel(model, ModelSource(SourceKind.FACTORY, "depth"), "text-generation", {}, {})
    program = torch_program(loaded)
    began = time.process_time()
    export(loaded, program, tidy=LayerCleanup())
    return time.process_time() - began

cost(2)
print([[cost(int(layers)) for layers in sys.argv[2:]] for _ in range(int(sys.argv[1]))])
"""


def run(command: Sequence[str]) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak MB of a process."""
    began = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)}\n{output.read().decode(errors='replace')[-2000:]}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6


def depth(runs: int) -> None:
    """Prints what twice the layers cost."""
    done = subprocess.run(
        [sys.executable, "-c", DEPTH, str(runs), "16", "32"], check=True, capture_output=True, text=True
    )
    pairs = json.loads(done.stdout)
    small, large = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    ratios = sorted(pair[1] / pair[0] for pair in pairs)
    print(f"16 layers {small:.2f} CPU s, 32 layers {large:.2f} CPU s, ratio {statistics.median(ratios):.3f}")


def write_large(directory: Path) -> None:
    """A random model of TinyLlama's shape, never in memory as a whole."""
    import numpy as np
    from safetensors.numpy import save_file

    size, inner, vocabulary, kv = 2048, 5632, 32000, 256
    shapes: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, size)},
        {"lm_head.weight": (vocabulary, size), "model.norm.weight": (size,)},
    ]
    for layer in range(22):
        prefix = f"model.layers.{layer}."
        shapes.append(
            {
                f"{prefix}self_attn.q_proj.weight": (size, size),
                f"{prefix}self_attn.k_proj.weight": (kv, size),
                f"{prefix}self_attn.v_proj.weight": (kv, size),
                f"{prefix}self_attn.o_proj.weight": (size, size),
                f"{prefix}mlp.gate_proj.weight": (inner, size),
                f"{prefix}mlp.up_proj.weight": (inner, size),
                f"{prefix}mlp.down_proj.weight": (size, inner),
                f"{prefix}input_layernorm.weight": (size,),
                f"{prefix}post_attention_layernorm.weight": (size,),
            }
        )
    # One random block, repeated: making a thousand million normal numbers takes longer than the export.
    block = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32) * np.float32(0.02)
    names: dict[str, str] = {}
    for number, shard in enumerate(shapes, 1):
        file = f"model-{number:05}-of-{len(shapes):05}.safetensors"
        tensors = {name: np.resize(block, shape) for name, shape in shard.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))


def ours(source: str, destination: Path) -> list[str]:
    """The command that exports without comparing."""
    command = str(Path(sys.executable).with_name("onnxsmith"))
    return [command, "export", source, "-o", str(destination), "--force", "--no-verify"]


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["depth", "large", "peer"])
    parser.add_argument("model", nargs="?", help="for peer: a Hugging Face directory")
    parser.add_argument("--python", help="for peer: an interpreter with onnxruntime-genai and its builder")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "depth":
        depth(arguments.runs)
        return
    with tempfile.TemporaryDirectory(prefix="onnxsmith-bench-") as name:
        directory = Path(name)
        if arguments.what == "large":
            (directory / "model").mkdir()
            write_large(directory / "model")
            cpu, wall, peak = run(ours(str(directory / "model"), directory / "out"))
            print(f"1.1 B float32: {cpu:.1f} CPU s, {wall:.1f} s, peak {peak:.0f} MB")
            return
        if not arguments.model or not arguments.python:
            parser.error("peer needs MODEL and --python")
        builder = [arguments.python, "-m", "onnxruntime_genai.models.builder", "-m", "x"]
        builder += [
            "-i",
            arguments.model,
            "-o",
            str(directory / "peer"),
            "-c",
            str(directory / "cache"),
            "-p",
            "fp32",
            "-e",
            "cpu",
        ]
        builder += ["--extra_options", "hf_token=false"]
        for _ in range(arguments.runs):
            for label, command in (
                ("onnxsmith", ours(arguments.model, directory / "out")),
                ("builder", builder),
            ):
                cpu, wall, peak = run(command)
                print(f"{label:10} {cpu:6.1f} CPU s {wall:6.1f} s {peak:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
