"""The report of a run as one self-contained HTML page: verdict first, evidence after it."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxsmith.errors import BadInputError, require
from onnxsmith.pipeline._report_charts import bars, timeline
from onnxsmith.pipeline._report_layers import (
    bits_table,
    error_chart,
    precision_strip,
    profile_rows,
    task_table,
)
from onnxsmith.pipeline._report_numbers import (
    DASH,
    FILTERS,
    MINUS,
    TIMES,
    as_given,
    factor,
    finite,
    megabytes,
    number,
    part,
    percent,
    setting,
)
from onnxsmith.pipeline._report_pareto import tuning_charts
from onnxsmith.pipeline._report_tradeoffs import tradeoffs
from onnxsmith.pipeline._training_charts import loss_curves, training_table

__all__ = ["render_html"]

_FAILED_TENSORS_SHOWN = 20

# What HTML must not contain (C0 controls) or UTF-8 cannot encode (lone surrogates, which JSON can spell).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def render_html(report: Mapping[str, Any]) -> str:
    """Renders a report as one HTML file that needs no script, no network and no other file.

    Args:
        report: The report as plain data, ``schema_version`` 1. Every key is present; parts that a run did
            not produce are None, and their section is left out or shows a dash.

    Returns:
        The page, to be written as UTF-8. Everything that came from the report is escaped.

    Raises:
        BadInputError: The report lacks a key.
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", purpose="HTML report")
    folder = importlib.resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters.update(FILTERS)
    try:
        page: str = environment.get_template("report.html.j2").render(report=report, **_view(report))
    except jinja2.UndefinedError as error:
        raise _incomplete(str(error)) from error
    except KeyError as error:
        raise _incomplete(f"no key {error}") from error
    return _UNPRINTABLE.sub("\ufffd", page)


def _incomplete(got: str) -> BadInputError:
    return BadInputError(
        "HTML report",
        got=f"the report is incomplete ({got})",
        expected="every key of schema_version 1",
        remedy="Write the report again with this version of onnxsmith.",
    )


@dataclasses.dataclass(frozen=True)
class _Headline:
    """One large number of the banner.

    Attributes:
        label: What is measured.
        value: The number, mostly a ratio to the reference.
        word: What the ratio says, such as ``smaller``; may be empty.
        note: The two numbers behind the ratio.
    """

    label: str
    value: str
    word: str
    note: str


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    variants: Sequence[Mapping[str, Any]] = report["variants"]
    chosen = next((v for v in variants if v["chosen"]), None)
    return {
        "headlines": [] if chosen is None else _headlines(report["reference"], chosen),
        "failures": [(v["name"], _reasons(v)) for v in variants if not v["passed"]],
        "variants": [_variant_view(v) for v in variants],
        "tradeoffs": tradeoffs(report["reference"], variants),
        "bars": bars(report["reference"], variants),
        "timeline": timeline(report["steps"]),
        "expected": _expected(report["forecast"], report["steps"]),
        "tasks": task_table(report["reference"], variants),
        "training": training_table(report.get("training")),
        "taught": (report.get("training") or {}).get("data"),
        "curves": loss_curves(report.get("training")),
        "original": report.get("original"),
        "tuning": None if report["tuning"] is None else _tuning_view(report["tuning"]),
        "dash": DASH,
        **_columns(report["reference"], variants),
    }


def _columns(reference: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Which columns of the table of variants say anything: of a text, and of decoding."""
    text = [reference["perplexity"], *(v[key] for v in variants for key in ("perplexity", "kl_to_reference"))]
    decodes = [reference["decode_tokens_per_s"], *(part(v["bench"], "decode_tokens_per_s") for v in variants)]
    timed = [reference.get("latency_ms"), *(v["bench"] for v in variants)]
    return {
        "text": any(value is not None for value in text) or not variants,
        "decodes": any(value is not None for value in decodes) or not any(timed),
    }


def _expected(forecast: Mapping[str, Any] | None, steps: Sequence[Mapping[str, Any]]) -> str:
    """What the run had said that it would need, beside what it needed; empty where it said nothing."""
    if forecast is None:
        return ""
    peak, disk = finite(forecast["peak_mb"]), megabytes(forecast["disk_mb"])
    measured = [size for step in steps if (size := finite(step["peak_rss_mb"])) is not None]
    if peak is None or not measured:
        return ""
    said = f"{megabytes(peak)} expected, {megabytes(max(measured))} measured"
    return f"Peak memory of the run: {said}. Disk: {disk} expected."


def _tuning_view(tuning: Mapping[str, Any]) -> dict[str, Any]:
    """A search with its best points first."""
    trials: Sequence[Mapping[str, Any]] = tuning["trials"]
    first = tuning["objectives"][0]

    def rank(trial: Mapping[str, Any]) -> tuple[Any, ...]:
        value = trial["values"].get(first)
        return (not trial["chosen"], not trial["feasible"], trial["state"] != "complete",
                not trial["front"], math.inf if value is None else value)  # fmt: skip

    states = [trial["state"] for trial in trials]
    return {
        "charts": tuning_charts(tuning),
        "names": list(dict.fromkeys([*tuning["axes"], *tuning["limits"]])),
        "trials": sorted(trials, key=rank),
        **{state: states.count(state) for state in ("complete", "stopped", "failed")},
    }


def _headlines(reference: Mapping[str, Any], variant: Mapping[str, Any]) -> list[_Headline]:
    """The chosen variant's numbers, each as a ratio to the reference where there are both."""
    found: list[_Headline] = []
    size, full_size = finite(variant["size_mb"]), finite(reference["size_mb"])
    if size and full_size:
        ratio, word = _compared(full_size / size, "smaller", "larger")
        found.append(_Headline("Size", ratio, word, f"{megabytes(size)} against {megabytes(full_size)}"))
    elif size:
        found.append(_Headline("Size", megabytes(size), "", "reference not measured"))
    perplexity = finite(part(variant["perplexity"], "value"))
    full_perplexity = finite(part(reference["perplexity"], "value"))
    if perplexity and full_perplexity:
        ratio = f"{perplexity / full_perplexity:.2f}{TIMES}"
        note = f"{number(perplexity, 4)} against {number(full_perplexity, 4)}"
        found.append(_Headline("Perplexity", ratio, "the reference’s", note))
    elif perplexity:
        found.append(_Headline("Perplexity", number(perplexity, 4), "", "reference not measured"))
    decode = finite(part(part(variant["bench"], "decode_tokens_per_s"), "p50"))
    full_decode = finite(reference["decode_tokens_per_s"])
    speedup = finite(part(variant["bench"], "decode_vs_reference"))
    if speedup is None and decode and full_decode:
        speedup = decode / full_decode
    if decode and speedup:
        ratio, word = _compared(speedup, "faster", "slower")
        note = f"{number(decode)} against {number(full_decode)} tokens/s" if full_decode else ""
        found.append(_Headline("Decoding", ratio, word, note or f"{number(decode)} tokens/s"))
    elif decode:
        found.append(_Headline("Decoding", number(decode), "tokens/s", "reference not measured"))
    else:
        found += _call_headline(reference, variant)
    found += _metric_headline(reference, variant)
    if finite(variant["top1_agreement"]) is not None:
        divergence = variant["kl_to_reference"]
        note = "" if finite(divergence) is None else f"KL divergence {number(divergence)} nats"
        found.append(_Headline("Same next token", percent(variant["top1_agreement"]), "", note))
    return found


def _call_headline(reference: Mapping[str, Any], variant: Mapping[str, Any]) -> list[_Headline]:
    """How fast one call is, of a model that does not decode."""
    time = finite(part(part(variant["bench"], "latency_ms"), "p50"))
    full = finite(reference.get("latency_ms"))
    if not time or time <= 0:
        return []
    if not full or full <= 0:
        return [_Headline("One call", number(time), "ms", "reference not measured")]
    ratio, word = _compared(full / time, "faster", "slower")
    return [_Headline("One call", ratio, word, f"{number(time)} against {number(full)} ms")]


def _metric_headline(reference: Mapping[str, Any], variant: Mapping[str, Any]) -> list[_Headline]:
    """The first metric on labelled data."""
    for name, values in (variant["task_metrics"] or {}).items():
        full = finite(part((reference.get("task_metrics") or {}).get(name), "value"))
        note = "" if full is None else f"{number(full)} is the reference’s"
        return [_Headline(name.replace("_", " ").capitalize(), number(values["value"]), "", note)]
    return []


def _compared(ratio: float, above: str, below: str) -> tuple[str, str]:
    return (factor(ratio), above) if ratio >= 1 else (factor(1 / ratio), below)


def _reasons(variant: Mapping[str, Any]) -> list[str]:
    """Why a variant failed, and what a quantized one that passed has to own up to."""
    warnings = [f"{kind}: {text}" for kind in ("warning", "note") for text in variant.get(f"{kind}s") or []]
    if variant["passed"]:
        return warnings
    found: list[str] = [variant["error"]] if variant["error"] else []
    comparison = variant["comparison"]
    if comparison is not None and not comparison["passed"]:
        found.append(f"comparison: {comparison['reason'] or 'failed'}")
    found += [
        f"budget {b['name']}: {'not measured' if b['value'] is None else as_given(b['value'], 4)}, "
        f"limit {as_given(b['limit'])}"
        for b in variant["budgets"]
        if not b["passed"]
    ]
    return [*found, *warnings] or ["failed, and the run recorded no reason"]


def _variant_view(variant: Mapping[str, Any]) -> dict[str, Any]:
    """A variant with what its row and its details need."""
    tensors: Sequence[Mapping[str, Any]] = part(variant["comparison"], "tensors") or []
    failed = [t for t in tensors if not t["passed"]]
    before: Mapping[str, int] = part(variant["operators"], "before") or {}
    after: Mapping[str, int] = part(variant["operators"], "after") or {}
    names = sorted({*before, *after}, key=lambda n: (-abs(after.get(n, 0) - before.get(n, 0)), n))
    changes = [(n, before.get(n, 0), after.get(n, 0)) for n in names]
    return {
        "data": variant,
        "reasons": _reasons(variant),
        "tensors": len(tensors),
        "groups": _comparison_groups(tensors),
        "failed": failed[:_FAILED_TENSORS_SHOWN],
        "failed_count": len(failed),
        "cosine": _worst(min, (t["cosine"] for t in tensors)),
        "operators": [(n, b, a, _signed(a - b)) for n, b, a in changes if a != b],
        "operators_unchanged": sum(a == b for _, b, a in changes),
        "operators_before": sum(before.values()),
        "operators_after": sum(after.values()),
        "budgets_kept": sum(bool(b["passed"]) for b in variant["budgets"]),
        "passes": [_pass_view(p) for p in variant["passes"]],
        "strip": precision_strip(variant["weights"]),
        "bits": bits_table(variant["weights"]),
        "errors": error_chart(variant["layer_errors"]),
        "profile": profile_rows(variant["bench"]),
    }


def _signed(change: int) -> str:
    return f"{'+' if change > 0 else MINUS}{abs(change):,}"


def _pass_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """A pass with what it did apart from what it skipped and why."""
    details = dict(record["details"])
    skipped = details.pop("skipped", None) or {}
    if isinstance(skipped, Mapping):
        reasons = [(str(name), setting(reason)) for name, reason in skipped.items()]
    else:
        entries = skipped if isinstance(skipped, list | tuple) else [skipped]
        reasons = [("", setting(entry)) for entry in entries]
    return {"data": record, "details": details, "skipped": reasons}


def _comparison_groups(tensors: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per case and family of outputs (``present.0.key`` ... are one): the worst of each number."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        family = re.split(r"[._/]\d+", tensor["name"], maxsplit=1)[0]
        groups.setdefault((tensor["case"], family), []).append(tensor)
    rows = []
    for (case, family), members in groups.items():
        rows.append(
            {
                "case": case,
                "family": family,
                "count": len(members),
                "failed": sum(not t["passed"] for t in members),
                "worst": max(members, key=_badness)["name"],
                "max_abs": _worst(max, (t["max_abs"] for t in members)),
                "max_rel": _worst(max, (t["max_rel"] for t in members)),
                "cosine": _worst(min, (t["cosine"] for t in members)),
                "kl": _worst(max, (t["kl"] for t in members)),
                "top1": _worst(min, (t["top1_agreement"] for t in members)),
            }
        )
    return rows


def _badness(tensor: Mapping[str, Any]) -> tuple[bool, float]:
    """Failed before passed, then by difference relative to the tensor's scale; not comparable is worst."""
    difference, scale = finite(tensor["max_abs"]), finite(tensor["scale"])
    return not tensor["passed"], math.inf if difference is None else difference / (scale or 1.0)


def _worst(choose: Any, values: Iterable[Any]) -> float | None:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return choose(known) if known else None
