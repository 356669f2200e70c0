"""Results as tables for people."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.pipeline.bench_tables import fallback_of, shares_on
from onnxsmith.pipeline.console import print_table, red

if TYPE_CHECKING:
    from onnxsmith.comparison import Comparison
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.package import ModelPackage, StepRecord
    from onnxsmith.pipeline.batch import BatchResult
    from onnxsmith.pipeline.report import Report

__all__ = [
    "describe_pass",
    "show_batch",
    "show_cache",
    "show_comparisons",
    "show_export",
    "show_inspect",
    "show_optimize",
    "show_passes",
    "show_presets",
    "show_report",
    "show_steps",
]


def show_report(report: Report, destination: Path) -> None:
    """The end of a run: a table of variants, where things are, and what the artifact says."""
    plain = report.to_json()
    reference = plain["reference"]
    decoder = any((v["bench"] or {}).get("decode_tokens_per_s") for v in plain["variants"])
    speed = "decode tok/s" if decoder else "calls/s"
    headers = ("variant", "checks", "MB", "perplexity", "KL", "prefill tok/s", speed, "peak MB")
    rows: list[tuple[str, ...]] = []
    if reference:
        rows.append(
            (
                "torch",
                "reference",
                _megabytes(reference.get("size_mb")),
                _number((reference.get("perplexity") or {}).get("value"), ".3f"),
                "",
                _speed(reference.get("prefill_tokens_per_s")),
                _speed(reference.get("decode_tokens_per_s") or _inverse(reference.get("latency_ms"))),
                "",
            )
        )
    for variant in plain["variants"]:
        bench = variant["bench"] or {}
        rows.append(
            (
                f"{variant['name']} *" if variant["chosen"] else variant["name"],
                "passed" if variant["passed"] else "FAILED",
                _megabytes(variant["size_mb"]),
                _number((variant["perplexity"] or {}).get("value"), ".3f"),
                _number(variant["kl_to_reference"], ".4f"),
                _speed(_median(bench.get("prefill_tokens_per_s"))),
                _speed(
                    _median(bench.get("decode_tokens_per_s")) or _inverse(_median(bench.get("latency_ms")))
                ),
                _number(bench.get("peak_rss_mb"), ".0f"),
            )
        )
    print_table(report.name, headers, rows, spare=("peak MB", "KL", "prefill tok/s"))
    for variant in report.variants:
        if not variant.passed:
            sys.stdout.write(f"{variant.name} failed: {variant.reason}\n")
    for variant in report.variants:
        for warning in variant.warnings:
            sys.stdout.write(red(f"WARNING  {variant.name}: {warning}") + "\n")
        for note in variant.notes:
            sys.stdout.write(f"note     {variant.name}: {note}\n")
    sys.stdout.write(f"\n{report.verdict}\n")
    if report.passed:
        sys.stdout.write(f"artifact  {destination}\nreport    {destination / 'report.html'}\n")
    else:
        sys.stdout.write(f"report    {destination}.failed/report.html\n")
    if report.generation:
        text = f"{report.generation['prompt']}{report.generation['text']}"
        sys.stdout.write(f"it says   {' '.join(text.split())}\n")


def show_batch(result: BatchResult) -> None:
    """The jobs of a batch with what came of each."""
    rows = [
        (
            job.name,
            job.status if job.status != "failed" else "FAILED",
            job.chosen or "",
            _megabytes(job.size_mb),
            f"{job.seconds:.1f}",
            str(job.attempts),
        )
        for job in result.jobs
    ]
    print_table("", ("job", "", "chosen", "MB", "s", "attempts"), rows, text=("", "chosen"))
    for job in result.jobs:
        if job.status == "failed":
            sys.stdout.write(f"{job.name} failed: {job.reason}\n")
            if job.log:
                sys.stdout.write(f"  log  {job.log}\n")
    statuses = [job.status for job in result.jobs]
    counts = ", ".join(f"{statuses.count(one)} {one}" for one in ("done", "kept", "failed"))
    if result.interrupted:
        counts += f", {statuses.count('interrupted')} interrupted"
    sys.stdout.write(f"\n{len(result.jobs)} job{'' if len(result.jobs) == 1 else 's'}: {counts}\n")


def show_cache(found: Mapping[str, Any]) -> None:
    """What is in the cache, by step, and what was removed."""
    for title, entries in (("", found["entries"]), ("removed", found["removed"])):
        rows = []
        for kind in sorted({entry["kind"] for entry in entries}):
            same = [entry for entry in entries if entry["kind"] == kind]
            size = sum(entry["bytes"] for entry in same) / 1e6
            rows.append((kind, str(len(same)), f"{size:.1f}", f"{max(e['unused_days'] for e in same):.1f}"))
        if rows:
            print_table(title, ("step", "entries", "MB", "longest unused, days"), rows)
    limit = found["limit_bytes"]
    allowed = f"of at most {limit / 1e6:.0f}" if limit else "and switched off"
    sys.stdout.write(
        f"\n{found['directory']}: {len(found['entries'])} entries, {found['bytes'] / 1e6:.1f} MB {allowed}\n"
    )


def show_kernels(found: Mapping[str, Any]) -> None:
    """What runs onnxsmith's own operators."""
    took = f", {found['seconds']:.1f} s" if found["seconds"] else ""
    lines = {
        "library": f"{found['library']} ({found['bytes'] / 1e6:.1f} MB)",
        "compiler": f"{found['compiler']}{took}" if found["compiler"] else "unknown: the library was given",
        "runs with": found["instruction_set"],
        "operators": ", ".join(found["operators"]),
    }
    sys.stdout.write("".join(f"{name:10} {value}\n" for name, value in lines.items()))


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
            f"compared   {len(comparison.tensors)} tensors with PyTorch; worst {worst.name} "
            f"in '{worst.case}': {worst.max_abs:.2g} of {worst.scale:.3g}\n"
        )


def show_steps(steps: Sequence[StepRecord]) -> None:
    """What each pass did, and what it left out and why."""
    rows = []
    for step in steps:
        details = {k: v for k, v in step.details.items() if k not in ("changes", "skipped")}
        rows.append((step.name, str(step.details.get("changes", "")), f"{step.seconds:.1f}", _plain(details)))
    print_table("", ("pass", "changes", "s", "what"), rows)
    for step in steps:
        parts = [step.details, *(part for part in step.details.values() if isinstance(part, dict))]
        reasons: dict[str, list[str]] = {}
        for part in parts:
            for name, reason in dict(part.get("skipped") or {}).items():
                reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            sys.stdout.write(f"{step.name} left out {shown}: {reason}\n")


def show_optimize(before: ModelPackage, after: ModelPackage, output: Path) -> None:
    """``show_steps``, and the nodes before and after by type."""
    from onnxsmith.graph_passes import operator_counts

    show_steps(after.steps[len(before.steps) :])
    for name in after.components:
        old, new = (operator_counts(p.components[name].model) for p in (before, after))
        changed = [op for op in {**old, **new} if old.get(op, 0) != new.get(op, 0)]
        changed.sort(key=lambda op: -abs(old.get(op, 0) - new.get(op, 0)))
        moves = ", ".join(f"{op} {old.get(op, 0)} -> {new.get(op, 0)}" for op in changed[:12])
        more = f", and {len(changed) - 12} more operators" if len(changed) > 12 else ""
        sys.stdout.write(f"nodes      {sum(old.values())} -> {sum(new.values())}\n")
        if moves:
            sys.stdout.write(f"           {moves}{more}\n")
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
                    _short_case(case),
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
        headers = ("case", "tensors", "worst", "max abs", "of", "cosine", "KL", "top-1", "verdict")
        title = f"{result.candidate} on {result.provider}, against {result.reference}"
        print_table(title, headers, rows, spare=("tensors", "cosine", "top-1"), text=("worst", "verdict"))
        if fallback := fallback_of(result.placement, result.provider):
            sys.stdout.write(f"FALL-BACK  {result.candidate}: {fallback}\n")
        if result.placement and result.placement_by_graph:
            parts = {**result.placement_by_graph, "all graphs": result.placement}
            said = "; ".join(f"{name} {shares_on(part, result.provider)}" for name, part in parts.items())
            sys.stdout.write(f"PLACEMENT  {result.candidate}: {said}\n")
        verdict = "agrees" if result.passed else f"DIFFERS: {result.reason}"
        sys.stdout.write(f"{result.candidate}: {verdict}\n")


def show_inspect(result: Mapping[str, Any]) -> None:
    """Signature, operators, types and the largest tensors."""
    lines = [f"{result['path']}: {result['precision']}, {result['task'] or 'no known task'}"]
    if result["steps"]:
        lines.append(f"steps      {' > '.join(result['steps'])}")
    lines.append(
        f"memory     about {result['memory']['running_mb']:.0f} MB for a process that only "
        "runs it on the CPU; `onnxsmith run RECIPE --forecast` says what making it takes"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    for name, part in result["components"].items():
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in part["opsets"].items())
        sys.stdout.write(
            f"\n{name}: {part['nodes']} nodes, {_megabytes(part['weight_bytes'] / 1e6)} MB of weights, "
            f"IR {part['ir_version']}, opsets {opsets}\n"
        )
        if part["cache_bytes_per_token"]:
            sys.stdout.write(
                f"KV cache   {part['cache_bytes_per_token'] / 1e3:.1f} kB for each token of a row\n"
            )
        for side in ("inputs", "outputs"):
            listed = part[side]
            shown = [*listed[:5], f"and {len(listed) - 5} more"] if len(listed) > 6 else listed
            for number, text in enumerate(shown):
                sys.stdout.write(f"{side if number == 0 else '':<10} {text}\n")
        sys.stdout.write("\n")
        print_table(
            "", ("operator", "nodes"), [(op, str(n)) for op, n in list(part["operators"].items())[:15]]
        )
        sys.stdout.write("\n")
        print_table("", ("type", "MB"), [(t, _megabytes(b / 1e6)) for t, b in part["bytes_by_type"].items()])
        if part["largest"]:
            sys.stdout.write("\n")
            print_table(
                "",
                ("largest tensors", "type", "shape", "MB"),
                [
                    (t["name"], t["type"], str(t["shape"]), _megabytes(t["bytes"] / 1e6))
                    for t in part["largest"]
                ],
            )
        if part["precision_map"]:
            sys.stdout.write("\nstays in float32\n")
            _show_reasons(part["precision_map"])
        if "still_to_do" in part:
            _show_potential(part["still_to_do"])


def _show_potential(found: Mapping[str, Mapping[str, Any]]) -> None:
    sys.stdout.write("\nwhat passes could still do\n" if found else "\nnothing is left to fuse or clean up\n")
    for name, part in found.items():
        if "error" in part:
            sys.stdout.write(f"  {name}: {part['error']}\n")
            continue
        details = {k: v for k, v in part.items() if k not in ("changes", "skipped")}
        sys.stdout.write(f"  {name}: {part['changes']} changes{'; ' if details else ''}{_plain(details)}\n")
        _show_reasons(part["skipped"])


def _show_reasons(reasons: Mapping[str, str]) -> None:
    """Names by reason, the first few of each."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    for reason, names in grouped.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        sys.stdout.write(f"  {shown}: {reason}\n")


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
    """Each preset: what it is for, its passes, and why each stands where it does."""
    from onnxsmith.graph_passes.presets import PRESETS, PURPOSES, REASONS

    for name, specs in PRESETS.items():
        sys.stdout.write(f"{name}: {PURPOSES[name]}\n")
        for one, arguments in specs:
            shown = ",".join(f"{k}={v}" for k, v in arguments.items())
            sys.stdout.write(f"    {one + (':' + shown if shown else ''):<40} {REASONS[one]}\n")


def _median(spread: Any) -> float | None:
    return spread["p50"] if spread else None


def _inverse(milliseconds: float | None) -> float | None:
    return 1e3 / milliseconds if milliseconds else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _speed(value: float | None) -> str:
    """Three digits that count, and never fewer than stand before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _megabytes(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _short_case(name: str) -> str:
    """``decode batch=2 length=1 past=9 left-padding=4`` as ``decode 2x1 past 9 pad 4``."""
    for pattern, form in (
        (r"batch=(\d+) length=(\d+)", r"\1x\2"),
        ("past=", "past "),
        ("left-padding=", "pad "),
        ("right-padding=", "pad right "),
    ):
        name = re.sub(pattern, form, name)
    return name


def _plain(details: Mapping[str, Any]) -> str:
    parts = []
    for key, value in details.items():
        if key in ("ranges", "factors"):
            continue
        if key == "layers":
            value = _layers(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        parts.append(f"{key} {value}")
    return "; ".join(parts)


def _layers(layers: Mapping[str, Any]) -> str:
    """How many layers got what, and the one that lost most; each of them is in the manifest."""
    kinds = Counter(
        " ".join(str(part) for part in (entry.get("method"), entry.get("bits"), "bit") if part is not None)
        for entry in layers.values()
    )
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    errors = {
        name: error
        for name, entry in layers.items()
        if (error := entry.get("output_error", entry.get("weight_error"))) is not None
    }
    if errors:
        worst = max(errors, key=errors.__getitem__)
        text += f" (largest error {errors[worst]:.2g}, relative squared, of {worst})"
    return text
