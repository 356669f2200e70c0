"""The main job on a real language model, measured: ``python benchmarks/main_job.py``, or ``make bench``.

Runs ``examples/smollm2.yaml`` in a process of its own, and prints what its report says: wall time and peak
memory of each step; size, perplexity and KL divergence of each variant; speeds, measured in turn, as medians
with their lowest and highest. Everything, machine and versions included, goes to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# What the child does: the main job, without a terminal, and its own peak memory at the end.
JOB = """
import json, sys
from pathlib import Path
from onnxsmith import load_recipe, run_recipe
from onnxsmith.environment import peak_rss_mb

path, destination, answer, *overrides = sys.argv[1:]
recipe = load_recipe(Path(path), overrides=overrides)
report = run_recipe(recipe, Path(destination), base=Path(path).parent)
Path(answer).write_text(json.dumps({"report": report.to_json(), "peak_rss_mb": peak_rss_mb()}))
"""


def run_job(recipe: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Runs the job and gives its report, its wall time and its peak memory."""
    with tempfile.TemporaryDirectory(prefix="onnxsmith-bench-") as directory:
        answer = Path(directory, "answer.json")
        command = [sys.executable, "-c", JOB, str(recipe), str(Path(directory, "artifact")), str(answer)]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, *overrides],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
            stdin=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"main_job: the job failed with exit status {done.returncode}")
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result | {"wall_s": seconds}


def show(result: Mapping[str, Any]) -> None:
    """Prints the tables."""
    report = result["report"]
    environment = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    print(f"{environment['cpu']}, {environment['logical_cpus']} processors, {environment['memory_gb']} GB")
    print(f"{environment['platform']}, Python {environment['python']}, onnxsmith {environment['onnxsmith']}")
    print(f"{versions}\nthreads {environment['threads']}, seed {environment['seed']}\n")
    _table(
        ("step", "s", "peak MB so far", ""),
        [
            (step["name"], f"{step['seconds']:.1f}", f"{step['peak_rss_mb']:.0f}", step["note"])
            for step in report["steps"]
        ]
        + [("whole process", f"{result['wall_s']:.1f}", f"{result['peak_rss_mb']:.0f}", "")],
    )
    print()
    reference = report["reference"]
    rows = [_row(reference["name"], reference, reference)]
    for variant in report["variants"]:
        name = f"{variant['name']}{' *' if variant['chosen'] else ''}"
        rows.append(_row(name, variant, variant["bench"] or {}))
    # An encoder has no perplexity, and a run without a benchmark no speeds.
    heads = [head for head in rows[-1] if any(row[head] for row in rows) or not head]
    _table(heads, [[row[head] for head in heads] for row in rows])
    for variant in report["variants"]:
        if not variant["passed"]:
            print(f"{variant['name']} failed: {variant['reason']}")
        if (variant["bench"] or {}).get("noisy"):
            print(
                f"{variant['name']}: spread {variant['bench']['spread_pct']:.0f} %: rerun on a quiet machine"
            )
    print(report["verdict"])


def _row(name: str, accuracy: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, str]:
    perplexity = accuracy["perplexity"]
    return {
        "": name,
        "MB": _number(accuracy["size_mb"], ".0f"),
        "perplexity": _number(perplexity and perplexity["value"], ".3f"),
        "+ %": _number(accuracy.get("perplexity_increase_pct"), "+.2f"),
        "KL nats": _number(accuracy.get("kl_to_reference"), ".2g"),
        "latency ms": _spread(speed.get("latency_ms")),
        "prefill tokens/s": _spread(speed.get("prefill_tokens_per_s")),
        "decode tokens/s": _spread(speed.get("decode_tokens_per_s")),
        "x torch": _number(speed.get("decode_vs_reference"), ".2f"),
        "peak MB": _number(speed.get("peak_rss_mb"), ".0f"),
    }


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if i == 0 or not heads[i] else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def _spread(measured: Mapping[str, float] | float | None) -> str:
    """Median with lowest and highest; of PyTorch the report has the median only."""
    if measured is None or isinstance(measured, int | float):
        return _number(measured)
    return f"{measured['p50']:.1f} ({measured['low']:.1f} to {measured['high']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "smollm2.yaml")
    parser.add_argument("--threads", type=int, help="for PyTorch and ONNX Runtime; all processors by default")
    parser.add_argument("--runs", type=int, help="rounds counted; as in the recipe by default")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("artifacts/bench/main_job.json"))
    arguments = parser.parse_args()
    overrides = list(arguments.settings)
    for name in ("threads", "runs"):
        if getattr(arguments, name) is not None:
            overrides.append(f"evaluation.benchmark.{name}={getattr(arguments, name)}")
    result = run_job(arguments.recipe.resolve(), overrides)
    show(result)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
