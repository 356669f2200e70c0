"""Results as tables for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.pipeline.console import print_table

if TYPE_CHECKING:
    from onnxsmith.comparison import Comparison
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.package import ModelPackage
    from onnxsmith.pipeline.report import Report
    from onnxsmith.runtime import BenchResult

__all__ = [
    "describe_pass",
    "show_bench",
    "show_comparisons",
    "show_export",
    "show_inspect",
    "show_optimize",
    "show_passes",
    "show_presets",
    "show_report",
]


def show_report(report: Report, destination: Path) -> None:
    """The end of a run: a table of variants, where things are, and what the artifact says."""
    plain = report.to_json()
    reference = plain["reference"]
    rows: list[tuple[str, ...]] = [
        (
            "torch",
            "reference",
            _number(reference.get("size_mb"), ".0f"),
            _number((reference.get("perplexity") or {}).get("value"), ".3f"),
            "",
            _number(reference.get("prefill_tokens_per_s"), ".0f"),
            _number(reference.get("decode_tokens_per_s") or _inverse(reference.get("latency_ms")), ".1f"),
            "",
        )
    ]
    for variant in plain["variants"]:
        bench = variant["bench"] or {}
        rows.append(
            (
                f"{variant['name']} *" if variant["chosen"] else variant["name"],
                "passed" if variant["passed"] else "FAILED",
                _number(variant["size_mb"], ".0f"),
                _number((variant["perplexity"] or {}).get("value"), ".3f"),
                _number(variant["kl_to_reference"], ".4f"),
                _number(_median(bench.get("prefill_tokens_per_s")), ".0f"),
                _number(_median(bench.get("decode_tokens_per_s") or bench.get("throughput")), ".1f"),
                _number(bench.get("peak_rss_mb"), ".0f"),
            )
        )
    decoder = any(v["perplexity"] for v in plain["variants"])
    headers: tuple[str, ...] = ("variant", "checks", "MB", "perplexity", "KL", "prefill tok/s", "decode tok/s", "peak MB")
    if not decoder:
        keep = (0, 1, 2, 6, 7)
        headers = tuple("rows/s" if i == 6 else headers[i] for i in keep)
        rows = [tuple(row[i] for i in keep) for row in rows]
    print_table(report.name, headers, rows)
    for variant in report.variants:
        if not variant.passed:
            sys.stdout.write(f"{variant.name} failed: {variant.reason}\n")
    sys.stdout.write(f"\n{report.verdict}\n")
    if report.passed:
        sys.stdout.write(f"artifact  {destination}\nreport    {destination / 'report.html'}\n")
    else:
        sys.stdout.write(f"report    {destination}.failed/report.html\n")
    if report.generation:
        text = f"{report.generation['prompt']}{report.generation['text']}"
        sys.stdout.write(f"it says   {' '.join(text.split())}\n")


def show_export(package: ModelPackage, comparison: Comparison | None, output: Path) -> None:
    """Where the artifact is and how well it agrees."""
    details = package.steps[0].details
    sys.stdout.write(f"artifact   {output}\ntask       {package.task or 'none'}\n")
    if "attention" in details:
        sys.stdout.write(f"attention  {details['attention']}\n")
    if "why_not_fused" in details:
        sys.stdout.write(f"not fused  {details['why_not_fused']}\n")
    if comparison is None:
        sys.stdout.write("compared   not compared with PyTorch (--no-verify)\n")
    elif comparison.worst is not None:
        worst = comparison.worst
        sys.stdout.write(
            f"compared   {len(comparison.tensors)} tensors with PyTorch; worst {worst.name} in '{worst.case}': "
            f"{worst.max_abs:.2g} of {worst.scale:.3g}\n"
        )


def show_optimize(before: ModelPackage, after: ModelPackage, output: Path) -> None:
    """What each pass did, and the nodes before and after."""
    from onnxsmith.graph_passes import operator_counts

    rows = []
    for step in after.steps[len(before.steps) :]:
        details = {k: v for k, v in step.details.items() if k not in ("changes", "skipped")}
        rows.append((step.name, str(step.details.get("changes", "")), f"{step.seconds:.1f}", _plain(details)))
    print_table("", ("pass", "changes", "s", "what"), rows)
    for step in after.steps[len(before.steps) :]:
        for name, reason in dict(step.details.get("skipped") or {}).items():
            if step.name != "fuse_transformer":
                sys.stdout.write(f"{step.name} left out {name}: {reason}\n")
    for name, component in after.components.items():
        nodes = [sum(operator_counts(p.components[name].model).values()) for p in (before, after)]
        sys.stdout.write(f"nodes      {nodes[0]} -> {nodes[1]}\n")
    sys.stdout.write(f"artifact   {output}\n")


def show_comparisons(results: Sequence[Comparison]) -> None:
    """For each candidate, the worst tensor of each case, then the verdict."""
    for result in results:
        rows = []
        cases: dict[str, list[Any]] = {}
        for tensor in result.tensors:
            cases.setdefault(tensor.case, []).append(tensor)
        for case, tensors in cases.items():
            worst = max(tensors, key=lambda t: (not t.passed, t.max_abs / (t.scale or 1.0)))
            logits = next((t for t in tensors if t.kl is not None), None)
            rows.append(
                (
                    case,
                    str(len(tensors)),
                    worst.name,
                    f"{worst.max_abs:.2g}",
                    f"{worst.scale:.3g}",
                    f"{worst.cosine:.6f}",
                    _number(logits.kl if logits else None, ".2g"),
                    _number(logits.top1_agreement if logits else None, ".3f"),
                    "ok" if all(t.passed for t in tensors) else "DIFFERS",
                )
            )
        headers = ("case", "tensors", "worst", "max abs", "of", "cosine", "KL", "top-1", "")
        print_table(f"{result.candidate} on {result.provider}, against {result.reference}", headers, rows)
        verdict = "agrees" if result.passed else f"DIFFERS: {result.reason}"
        sys.stdout.write(f"{result.candidate}: {verdict}\n")


def show_bench(results: Sequence[BenchResult]) -> None:
    """Medians with their range."""
    decoder = any(r.decode_tokens_per_s for r in results)
    rows = []
    for r in results:
        speed = (
            (_spread(r.prefill_tokens_per_s), _spread(r.decode_tokens_per_s), _spread(r.first_token_ms))
            if decoder
            else (_spread(r.latency_ms), _spread(r.throughput))
        )
        rows.append(
            (
                r.name,
                r.provider.removesuffix("ExecutionProvider"),
                *(("failed",) + ("",) * (len(speed) - 1) if r.error else speed),
                _number(r.load_s, ".2f"),
                _number(r.peak_rss_mb, ".0f"),
                _number(r.size_mb, ".1f"),
            )
        )
    speeds = ("prefill tok/s", "decode tok/s", "first token ms") if decoder else ("latency ms", "rows/s")
    print_table("", ("model", "provider", *speeds, "load s", "peak MB", "MB"), rows)
    sys.stdout.write("median (lowest to highest); rounds in turn\n")


def show_inspect(result: Mapping[str, Any]) -> None:
    """Signature, operators, types and the largest tensors."""
    lines = [f"{result['path']}: {result['precision']}, {result['task'] or 'no known task'}"]
    if result["steps"]:
        lines.append(f"steps      {' > '.join(result['steps'])}")
    sys.stdout.write("\n".join(lines) + "\n")
    for name, part in result["components"].items():
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in part["opsets"].items())
        sys.stdout.write(
            f"\n{name}: {part['nodes']} nodes, {part['weight_bytes'] / 1e6:.1f} MB of weights, "
            f"IR {part['ir_version']}, opsets {opsets}\n"
        )
        if part["cache_bytes_per_token"]:
            sys.stdout.write(
                f"KV cache   {part['cache_bytes_per_token'] / 1e3:.1f} kB for each token of a row\n"
            )
        for side in ("inputs", "outputs"):
            listed = part[side]
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            sys.stdout.write(f"{side:<10} {'; '.join(listed[:5])}{more}\n")
        print_table(
            "", ("operator", "nodes"), [(op, str(n)) for op, n in list(part["operators"].items())[:15]]
        )
        print_table("", ("type", "MB"), [(t, f"{b / 1e6:.2f}") for t, b in part["bytes_by_type"].items()])
        print_table(
            "",
            ("largest tensors", "type", "shape", "MB"),
            [(t["name"], t["type"], str(t["shape"]), f"{t['bytes'] / 1e6:.2f}") for t in part["largest"]],
        )


def describe_pass(one: type[GraphPass]) -> dict[str, Any]:
    """Name, summary and parameters of a pass, as plain data."""
    return {
        "name": one.name,
        "summary": one.summary,
        "parameters": {
            name: {"default": parameter.default, "type": str(parameter.annotation).replace("typing.", "")}
            for name, parameter in one.parameters().items()
        },
    }


def show_passes(described: Sequence[Mapping[str, Any]]) -> None:
    """Each pass with its parameters."""
    for one in described:
        sys.stdout.write(f"{one['name']}\n    {one['summary']}\n")
        for name, parameter in one["parameters"].items():
            kind = parameter["type"]
            kind = kind.removeprefix("<class '").removesuffix("'>")
            sys.stdout.write(f"    {name}={parameter['default']}  ({kind})\n")


def show_presets() -> None:
    """Each preset with its passes."""
    from onnxsmith.graph_passes.presets import PRESETS

    for name, specs in PRESETS.items():
        sys.stdout.write(f"{name}\n")
        for one, arguments in specs:
            shown = ",".join(f"{k}={v}" for k, v in arguments.items())
            sys.stdout.write(f"    {one}{':' + shown if shown else ''}\n")


def _median(spread: Any) -> float | None:
    return spread["p50"] if spread else None


def _inverse(milliseconds: float | None) -> float | None:
    return 1e3 / milliseconds if milliseconds else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spread(spread: Any) -> str:
    return "" if spread is None else f"{spread.p50:.1f} ({spread.low:.1f} to {spread.high:.1f})"


def _plain(details: Mapping[str, Any]) -> str:
    parts = []
    for key, value in details.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        parts.append(f"{key} {value}")
    return "; ".join(parts)
