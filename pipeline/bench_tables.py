"""Measurements and providers as tables for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.pipeline.console import print_table, red
from onnxsmith.runtime.kernel_library import FUNCTIONS

if TYPE_CHECKING:
    from onnxsmith.runtime import BenchResult
    from onnxsmith.runtime.bench_result import Ratio, Spread

__all__ = ["fallback_of", "shares_on", "show_bench", "show_profiles", "show_providers"]

_TOP = 8


def show_bench(results: Sequence[BenchResult]) -> None:
    """Medians with their intervals, then all that a reader must not miss: fall-backs and noise."""
    decoder = any(r.decode_tokens_per_s for r in results)
    many = len({r.settings.thread_count for r in results}) > 1
    rows = []
    for r in results:
        speed = (
            (_spread(r.prefill_tokens_per_s), _spread(r.decode_tokens_per_s), _spread(r.first_token_ms))
            if decoder
            else (_spread(r.latency_ms), _spread(r.throughput), "")
        )
        rows.append(
            (
                r.name,
                f"{r.settings.batch} x {r.settings.prompt_tokens}",
                str(r.settings.thread_count) if many else "",
                _short(r.provider) + _share_of(r),
                *(speed if r.latency_ms else ("failed", "", "")),
                _ratio(r.to_first),
                *(_digits(getattr(r.latency_ms, name, None)) for name in ("p90", "p99")),
                "" if r.load_s is None else f"{r.load_s:.2f}",
                "" if r.peak_rss_mb is None else f"{r.peak_rss_mb:.0f}",
                "" if r.device_memory_mb is None else f"{r.device_memory_mb:.0f}",
                "" if r.size_mb is None else f"{r.size_mb:.3g}" if r.size_mb < 100 else f"{r.size_mb:.0f}",
            )
        )
    speeds = ("prefill tok/s", "decode tok/s", "first token ms") if decoder else ("latency ms", "rows/s", "")
    headers = (
        "model", "batch x length", "threads", "ran on", *speeds, "time / first's", "p90 ms", "p99 ms",
        "load s", "peak MB", "GPU MB", "MB",
    )  # fmt: skip
    print_table(
        "", headers, rows, spare=("load s", "p99 ms", "p90 ms", "first token ms", "rows/s", "MB"),
        text=("ran on",),
    )  # fmt: skip
    runs = max((r.latency_ms.runs for r in results if r.latency_ms), default=0)
    what = "p90 and p99 of one decoded token" if decoder else "p90 and p99 of one call"
    if runs == 1:
        sys.stdout.write(f"median of one round, without an interval: use more --runs; {what}\n")
    elif runs:
        sys.stdout.write(f"median [95 % interval] of {runs} rounds in turn; {what}\n")
    if any(r.to_first for r in results):
        sys.stdout.write("time / first's: round by round, so that what slows both down does not count\n")
    for r in results:
        if r.tokens_per_call:
            sys.stdout.write(f"GUESSES    {r.name}: {r.tokens_per_call.p50:.2f} tokens for each call\n")
        if fallback := fallback_of(r.placement, r.provider):
            sys.stdout.write(f"FALL-BACK  {r.name}: {fallback}\n")
        if r.model_placement and r.graph is not None and r.placement:
            shares = (("this graph", r.placement), ("all graphs", r.model_placement))
            said = "; ".join(f"{what} {shares_on(placement, r.provider)}" for what, placement in shares)
            sys.stdout.write(f"PLACEMENT  {r.name}: {said}\n")
        if r.own_kernels == FUNCTIONS:
            sys.stdout.write(
                f"KERNELS    {r.name}: {red('none of its own')}: standard operators in their place, slowly; "
                "`onnxsmith kernels` says why\n"
            )
        elif r.own_kernels:
            sys.stdout.write(f"KERNELS    {r.name}: its own, with {r.own_kernels}\n")
        if r.copies:
            size = f" of {(r.copied_bytes or 0) / 1e6:.2f} MB" if r.copied_bytes else ""
            sys.stdout.write(f"COPIES     {r.name}: {r.copies} copies between devices{size} in each call\n")
        if r.noise:
            sys.stdout.write(f"NOISE      {r.name}: {r.noise}: rerun on a quiet machine\n")


def show_profiles(results: Sequence[BenchResult]) -> None:
    """For each candidate that was profiled: the top operators and nodes, against the roofs."""
    for r in results:
        if r.profile is None:
            continue
        profile, roofs = r.profile, r.profile["roofs"]
        title = f"{r.name}, batch {r.settings.batch} x {r.settings.prompt_tokens}: {profile['run_ms']:.2f} ms"
        sys.stdout.write("\n")
        headers = (
            "operator", "calls", "ms", "share", "MB", "MFLOP", "GB/s", "GFLOP/s", "at best ms", "held by"
        )  # fmt: skip
        rows = [
            (e["op_type"], f"{e['calls']:.0f}", f"{e['time_ms']:.3f}", f"{e['share']:.1%}", *_roof_cells(e))
            for e in profile["operators"][:_TOP]
        ]
        print_table(title, headers, rows, text=("held by",))
        if profile["nodes"]:
            sys.stdout.write("\n")
            headers = ("slowest nodes", "operator", "ms", *headers[4:], "result")
            rows = [
                (
                    n["name"][-60:],
                    n["op_type"],
                    f"{n['time_ms']:.3f}",
                    *_roof_cells(n),
                    ", ".join(n["outputs"][:1]),
                )
                for n in profile["nodes"][:_TOP]
            ]
            print_table("", headers, rows, spare=("result",), text=("operator", "held by", "result"))
        if roofs:
            sys.stdout.write(
                f"roofs measured on {_short(r.provider)} with {r.settings.thread_count} threads: "
                f"{roofs['bytes_per_s'] / 1e9:.1f} GB/s, {roofs['operations_per_s'] / 1e9:.0f} GFLOP/s\n"
            )
        if profile["note"]:
            sys.stdout.write(f"{profile['note']}\n")


def fallback_of(placement: Mapping[str, Any] | None, provider: str) -> str:
    """What other providers than the wanted one ran, for a person; empty where there is nothing."""
    from onnxsmith.runtime import Placement

    return Placement.from_json(placement).fallback(provider) if placement else ""


def shares_on(placement: Mapping[str, Any], provider: str) -> str:
    """A provider's shares, for a person: ``100% of nodes, 98% of time, 99% of bytes``."""
    own = placement.get(provider, {})
    shares = [("nodes", own.get("share", 0.0))]
    for measure in ("time", "bytes"):
        if any(f"{measure}_share" in entry for entry in placement.values()):
            shares.append((measure, own.get(f"{measure}_share", 0.0)))
    return ", ".join(f"{share:.3g}% of {measure}" for measure, share in ((m, 100 * s) for m, s in shares))


def show_providers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Each provider: where it is, what it sees, and what would bring it."""
    print_table(
        "",
        ("provider", "installed", "version", "devices", "runs", "it needs", "brought by"),
        [
            (
                row["name"],
                row["where"] or "no",
                row["version"],
                ", ".join(row["devices"]),
                {None: "", "": "yes"}.get(row["problem"], "NO"),
                row["needs"],
                "" if row["installed"] else row["command"],
            )
            for row in rows
        ],
        spare=("it needs", "devices"),
        text=("installed", "version", "devices", "runs", "it needs", "brought by"),
    )
    for row in rows:
        if row["problem"]:
            sys.stdout.write(f"{row['name']} does not run: {row['problem']}\n")


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _share_of(result: BenchResult) -> str:
    """`` 82/103`` where not every node ran there."""
    if not result.placement:
        return ""
    total = sum(entry["nodes"] for entry in result.placement.values())
    own = result.placement.get(result.provider, {}).get("nodes", 0)
    return "" if own == total else f" {own}/{total}"


def _roof_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    best = entry.get("best_ms")
    return (
        f"{entry['bytes'] / 1e6:.2f}",
        f"{entry['operations'] / 1e6:.1f}",
        _digits(entry["gb_per_s"]),
        _digits(entry["gflop_per_s"]),
        "" if best is None else f"{best:.3f}",
        entry.get("limit", ""),
    )


def _digits(value: float | None) -> str:
    """Three digits that count, and never fewer than stand before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if "p50" not in spread.ci95:
        return _digits(spread.p50)
    low, high = spread.ci95["p50"]
    return f"{_digits(spread.p50)} [{_digits(low)}, {_digits(high)}]"
