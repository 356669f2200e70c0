"""Instruction sets of the own kernels beside each other: ``python benchmarks/kernels.py``.

One operator at a time, on one thread, each instruction set that this processor has in a process of its
own, in turn. Prints the median of each in processor time, relative to the fastest set, with the lowest and
highest of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsmith.environment import describe_environment

SETS = ("avx512vnni", "avxvnni", "avx2", "dotprod", "generic")
CASES = {
    "a product of 1 row, 4 bits": ("product", 1, 4),
    "8 bits": ("product", 1, 8),
    "of 128 rows, 4 bits": ("product", 128, 4),
    "of 128 rows, 8 bits": ("product", 128, 8),
    "attention of 1 row": ("cache", 1, 500),
    "of 256 rows": ("cache", 256, 0),
    "of 128 rows without a cache": ("heads", 128, 0),
}
COLUMNS, ROWS = 576, 3072
SECONDS = 0.3


def product(count: int, bits: int) -> tuple[Any, dict[str, Any]]:
    """A weight of 3072 x 576 in blocks of 32 with minimums."""
    random = np.random.default_rng(0)
    blocks = (ROWS // 16, COLUMNS // 32, 16)
    feeds = {
        "A": random.standard_normal((count, COLUMNS)).astype(np.float32),
        "B": random.integers(0, 256, (ROWS // 16, COLUMNS * bits // 32, 64), dtype=np.uint8),
        "scales": random.uniform(0.01, 0.02, blocks).astype(np.float16),
        "offsets": random.uniform(-0.1, 0.0, blocks).astype(np.float16),
    }
    attributes = {"K": COLUMNS, "N": ROWS, "bits": bits, "block_size": 32}
    return helper.make_node("MatMulPacked", list(feeds), ["Y"], domain="onnxsmith", **attributes), feeds


def cache(count: int, past: int) -> tuple[Any, dict[str, Any]]:
    """Nine heads of 64, three of keys."""
    random = np.random.default_rng(0)
    feeds = {
        "query": random.standard_normal((1, count, 15 * 64)).astype(np.float32),
        "past_key": random.standard_normal((1, 3, past, 64)).astype(np.float32),
        "past_value": random.standard_normal((1, 3, past, 64)).astype(np.float32),
        "lengths": np.array([past + count - 1], np.int32),
        "total": np.array(past + count, np.int32),
    }
    inputs = ["query", "", "", "past_key", "past_value", "lengths", "total"]
    attributes = {"num_heads": 9, "kv_num_heads": 3}
    return helper.make_node(
        "GroupQueryAttention", inputs, list("YKV"), domain="onnxsmith", **attributes
    ), feeds


def heads(count: int, _: int) -> tuple[Any, dict[str, Any]]:
    """Twelve heads of 32 of one text."""
    query = np.random.default_rng(0).standard_normal((1, count, 36 * 32)).astype(np.float32)
    node = helper.make_node("MultiHeadAttention", ["query"], ["Y"], domain="onnxsmith", num_heads=12)
    return node, {"query": query}


MADE = {"product": product, "cache": cache, "heads": heads}


def measure() -> None:
    """Prints seconds of the processor for each case, with the instruction set that is set."""
    import onnxruntime

    from onnxsmith.runtime.kernel_library import register_kernels

    found = {}
    for name, (kind, *sizes) in CASES.items():
        node, feeds = MADE[kind](*sizes)
        # What a model keeps is given as what a model keeps.
        kept = {key: feeds.pop(key) for key in ("B", "scales", "offsets") if key in feeds}
        types = {key: helper.np_dtype_to_tensor_dtype(value.dtype) for key, value in feeds.items()}
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(key, types[key], value.shape) for key, value in feeds.items()],
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in node.output],
            [onnx.numpy_helper.from_array(value, key) for key, value in kept.items()],
        )
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("onnxsmith", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        register_kernels(options)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        times = []
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            begin = time.process_time()
            session.run(["Y"], feeds)
            times.append(time.process_time() - begin)
        found[name] = statistics.median(times)
    print(json.dumps(found))


def main() -> None:
    """Measures each instruction set and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure()
        return
    taken: dict[str, list[dict[str, float]]] = {}
    for _ in range(given.rounds):
        for name in SETS:
            done = subprocess.run(
                [sys.executable, __file__, "--measure"],
                env={**os.environ, "ONNXSMITH_KERNELS_ISA": name},
                capture_output=True, check=False, text=True,
            )  # fmt: skip
            if done.returncode == 0:
                taken.setdefault(name, []).append(json.loads(done.stdout))
            else:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    if not taken:
        sys.exit("no instruction set can be measured: see `onnxsmith kernels`")
    first = next(iter(taken))
    print("| instruction set | " + " | ".join(CASES) + " |\n|" + "---|" * (len(CASES) + 1))
    for name, rounds in taken.items():
        cells = []
        for case in CASES:
            ratios = [ours[case] / base[case] for ours, base in zip(rounds, taken[first], strict=False)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    milliseconds = {case: 1e3 * statistics.median(r[case] for r in taken[first]) for case in CASES}
    print(f"\n`{first}` in ms: " + ", ".join(f"{case} {value:.3f}" for case, value in milliseconds.items()))
    print(json.dumps(describe_environment()))


if __name__ == "__main__":
    main()
