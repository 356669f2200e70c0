"""What a quantized variant has to own up to: slower than its source, far off, or results that cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.pipeline.report import VariantReport

if TYPE_CHECKING:
    from onnxsmith.graph_passes.contract import GraphPass

__all__ = ["add_warnings", "is_quantized", "source_among", "without_quantization"]

_QUANTIZING = frozenset({"keep_gguf_blocks"})
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
# Quantized weights move every output; from here on the result is another one.
_FAR_COSINE = 0.9
_FAR_DIVERGENCE = 0.5
_FAR_INCREASE_PCT = 25.0
_NAMES: Mapping[str, str] = {"latency_ms": "a step", "first_token_ms": "a prompt"}


def _quantizes(name: str) -> bool:
    return name.startswith("quantize_") or name in _QUANTIZING


def is_quantized(entry: VariantReport) -> bool:
    """Whether one of its passes quantized it."""
    return any(_quantizes(str(record.get("name"))) for record in entry.passes)


def without_quantization(entry: VariantReport) -> list[GraphPass]:
    """The passes of a variant but those that quantize: what its source is made with."""
    from onnxsmith.graph_passes import make_passes

    return make_passes(
        [(p["name"], p.get("parameters") or {}) for p in entry.passes if not _quantizes(str(p["name"]))]
    )


def source_among(entry: VariantReport, variants: Sequence[VariantReport]) -> VariantReport | None:
    """The float variant that a quantized one comes from: with the same other passes, or else any other."""
    floats = [v for v in variants if not is_quantized(v) and v.precision in _FLOATS and v.error is None]
    own = [str(p["name"]) for p in entry.passes if not _quantizes(str(p["name"]))]
    alike = [v for v in floats if [str(p["name"]) for p in v.passes] == own]
    return next(iter([*alike, *floats]), None)


def add_warnings(
    variants: Sequence[VariantReport], *, source: Mapping[str, Any] | None = None, strict: bool = False
) -> None:
    """Says of each quantized variant what is wrong with it.

    Args:
        variants: Checked and measured.
        source: The benchmark of the float model, where no variant is it.
        strict: Whether what is said makes a variant fail: where a budget was set.
    """
    for entry in variants:
        if not is_quantized(entry) or entry.error is not None:
            continue
        twin = source_among(entry, variants)
        bench = twin.bench if twin is not None and twin.bench else source
        name = twin.name if twin is not None and twin.bench else "its float source"
        slower, entry.notes = _slower(entry, bench, name)
        entry.warnings = [*slower, *_far_off(entry), *entry.suspicions]
        entry.warnings_fail = strict


def _slower(entry: VariantReport, source: Mapping[str, Any] | None, name: str) -> tuple[list[str], list[str]]:
    """What of a variant is slower than its source: as a whole, and in part only."""
    bench, other = entry.bench or {}, source or {}
    found, in_part = _slower_graph(bench, other, name)
    # A model of several graphs has the numbers of each.
    for graph, own in (bench.get("graphs") or {}).items():
        theirs = (other.get("graphs") or {}).get(graph) or {}
        for said, more in zip((found, in_part), _slower_graph(own, theirs, name), strict=True):
            said += [f"{graph}: {text}" for text in more]
    return found, in_part


def _slower_graph(
    bench: Mapping[str, Any], source: Mapping[str, Any], name: str
) -> tuple[list[str], list[str]]:
    """A decoder is as slow as a prompt of the recipe and its new tokens together."""
    parts = []
    for key, what in _NAMES.items():
        ours, theirs = bench.get(key), source.get(key)
        if ours and theirs and _low(ours) > _high(theirs):
            factor = ours["p50"] / theirs["p50"]
            times = f"{factor:.2f} times as long as {name} ({theirs['p50']:.3g} ms)"
            parts.append(f"{what} takes {ours['p50']:.3g} ms, {times}")
    ours, theirs = bench.get("throughput"), source.get("throughput")
    if not bench.get("first_token_ms") or not ours or not theirs:
        return parts, []
    settings = bench.get("settings") or {}
    whole = f"a prompt of {settings.get('prompt_tokens')} tokens and {settings.get('new_tokens')} new ones"
    factor = theirs["p50"] / ours["p50"]
    if _high(ours) < _low(theirs):
        return [f"{whole} take {factor:.2f} times as long as with {name}", *parts], []
    return [], [f"{part}; {whole} take {factor:.2f} times as long" for part in parts]


def _low(spread: Mapping[str, Any]) -> float:
    ends: Sequence[float] = (spread.get("ci95") or {}).get("p50") or (spread["low"], spread["high"])
    return float(ends[0])


def _high(spread: Mapping[str, Any]) -> float:
    ends: Sequence[float] = (spread.get("ci95") or {}).get("p50") or (spread["low"], spread["high"])
    return float(ends[1])


def _far_off(entry: VariantReport) -> list[str]:
    found = []
    tensors = (entry.comparison or {}).get("tensors") or []
    worst = min((t for t in tensors if t.get("count")), key=lambda t: t["cosine"], default=None)
    if worst is not None and worst["cosine"] < _FAR_COSINE:
        found.append(f"{worst['name']} is far off: cosine {worst['cosine']:.3f} to PyTorch")
    if (entry.kl_to_reference or 0.0) > _FAR_DIVERGENCE:
        found.append(f"its predictions are far off: KL divergence {entry.kl_to_reference:.3g} nats")
    if (entry.perplexity_increase_pct or 0.0) > _FAR_INCREASE_PCT:
        found.append(f"perplexity is {entry.perplexity_increase_pct:.0f} % higher than that of PyTorch")
    return found
