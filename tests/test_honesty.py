"""A quantized variant owns up: slower than its source, far off, or the same whatever goes in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.pipeline.choosing import choose
from onnxsmith.pipeline.honesty import add_warnings, source_among
from onnxsmith.pipeline.recipe import load_recipe
from onnxsmith.pipeline.report import VariantReport


def spread(value: float) -> dict[str, Any]:
    return {
        "p50": value,
        "low": value * 0.98,
        "high": value * 1.02,
        "ci95": {"p50": [value * 0.98, value * 1.02]},
    }


def variant(name: str, step_ms: float, *, passes: tuple[str, ...] = (), **changes: Any) -> VariantReport:
    quantized = any(p.startswith("quantize_") for p in passes)
    entry = VariantReport(
        name,
        precision="int4" if quantized else "float32",
        size_mb=10.0,
        passes=[{"name": p, "parameters": {}} for p in ("cleanup", *passes)],
        comparison={
            "passed": True, "reason": "",
            "tensors": [
                {"name": "logits", "count": 9, "cosine": 0.99},
                {"name": "lacking", "count": 0, "cosine": 0},
            ],
        },
        bench={"latency_ms": spread(step_ms), "first_token_ms": None},
    )  # fmt: skip
    return dataclasses.replace(entry, **changes)


def recipe_of(tmp_path: Path, budgets: dict[str, float]) -> Any:
    path = tmp_path / "recipe.json"
    path.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "name": "model",
                "source": "my:make",
                "variants": [{"name": "a", "preset": "clean"}],
                "budgets": budgets,
            }
        )
    )
    return load_recipe(path)


def test_slower_than_the_float_variant_is_said() -> None:
    slow = variant("small", 30.0, passes=("quantize_weights",))
    add_warnings([variant("float", 20.0), slow])
    assert slow.warnings == ["a step takes 30 ms, 1.50 times as long as float (20 ms)"]
    assert slow.passed
    fast = variant("small", 15.0, passes=("quantize_weights",))
    near = variant("near", 20.5, passes=("quantize_weights",))
    add_warnings([variant("float", 20.0), fast, near])
    assert not fast.warnings and not near.warnings


def decoder(step_ms: float, prompt_ms: float, *, new_tokens: int = 32) -> dict[str, Any]:
    """A benchmark of a prompt of 128 tokens."""
    whole_s = (prompt_ms + (new_tokens - 1) * step_ms) / 1e3
    return {
        "latency_ms": spread(step_ms), "first_token_ms": spread(prompt_ms),
        "throughput": spread(new_tokens / whole_s),
        "settings": {"prompt_tokens": 128, "new_tokens": new_tokens},
    }  # fmt: skip


def test_a_decoder_is_judged_by_prompt_and_new_tokens_together(tmp_path: Path) -> None:
    """A prompt that takes a third longer is no fault where a text is there sooner."""
    source = variant("float", 0.0, bench=decoder(16.0, 300.0))
    mixed = variant("small", 0.0, passes=("quantize_weights",), bench=decoder(7.0, 400.0), size_mb=1.0)
    chosen, _ = choose([source, mixed], recipe_of(tmp_path, {"size_mb": 100.0}))
    assert chosen is mixed and mixed.passed and not mixed.warnings
    assert mixed.notes == [
        "a prompt takes 400 ms, 1.33 times as long as float (300 ms); a prompt of 128 tokens and 32 new ones "
        "take 0.78 times as long"
    ]
    # With few new tokens the prompt is most of it.
    source.bench, mixed.bench = decoder(16.0, 300.0, new_tokens=4), decoder(7.0, 400.0, new_tokens=4)
    chosen, _ = choose([source, mixed], recipe_of(tmp_path, {"size_mb": 100.0}))
    assert chosen is source and not mixed.passed and not mixed.notes
    assert mixed.warnings == [
        "a prompt of 128 tokens and 4 new ones take 1.21 times as long as with float",
        "a prompt takes 400 ms, 1.33 times as long as float (300 ms)",
    ]


def test_the_source_is_the_float_variant_with_the_same_other_passes() -> None:
    quantized = variant("small", 30.0, passes=("fuse_attention", "quantize_weights"))
    plain, alike = variant("plain", 40.0), variant("alike", 20.0, passes=("fuse_attention",))
    found = source_among(quantized, [plain, alike, quantized])
    assert found is alike
    assert source_among(quantized, [plain, quantized]) is plain
    assert source_among(quantized, [quantized]) is None


def test_without_a_float_variant_the_source_is_measured_apart() -> None:
    slow = variant("small", 30.0, passes=("quantize_weights",))
    add_warnings([slow], source={"latency_ms": spread(10.0), "first_token_ms": None})
    assert slow.warnings == ["a step takes 30 ms, 3.00 times as long as its float source (10 ms)"]


def test_each_graph_of_several_is_held_against_its_own_source() -> None:
    def timed(encoder: float, decoder: float) -> dict[str, Any]:
        parts = {"encoder_model": encoder, "decoder_model": decoder}
        graphs = {name: {"latency_ms": spread(ms), "first_token_ms": None} for name, ms in parts.items()}
        return {"latency_ms": None, "first_token_ms": None, "graphs": graphs}

    slow = variant("small", 0.0, passes=("quantize_weights",), bench=timed(30.0, 4.0))
    add_warnings([variant("float", 0.0, bench=timed(20.0, 5.0)), slow])
    assert slow.warnings == ["encoder_model: a step takes 30 ms, 1.50 times as long as float (20 ms)"]
    apart = variant("small", 0.0, passes=("quantize_weights",), bench=timed(20.0, 6.0))
    add_warnings([apart], source=timed(20.0, 3.0))
    assert apart.warnings == [
        "decoder_model: a step takes 6 ms, 2.00 times as long as its float source (3 ms)"
    ]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {
                "comparison": {
                    "passed": True,
                    "reason": "",
                    "tensors": [{"name": "y", "count": 3, "cosine": 0.6}],
                }
            },
            "y is far off: cosine 0.600 to PyTorch",
        ),
        ({"kl_to_reference": 1.25}, "its predictions are far off: KL divergence 1.25 nats"),
        ({"perplexity_increase_pct": 60.0}, "perplexity is 60 % higher than that of PyTorch"),
        ({"suspicions": ["y do not depend on the inputs"]}, "y do not depend on the inputs"),
    ],
)
def test_what_is_far_off_is_said(changes: dict[str, Any], warning: str) -> None:
    bad = variant("small", 5.0, passes=("quantize_weights",), **changes)
    good = variant(
        "other", 5.0, passes=("quantize_weights",), kl_to_reference=0.05, perplexity_increase_pct=5.0
    )
    add_warnings([variant("float", 20.0), bad, good])
    assert bad.warnings == [warning]
    assert not good.warnings
    # A float variant is compared within its own bounds already.
    untouched = variant("float", 20.0, **changes)
    add_warnings([untouched])
    assert not untouched.warnings


@pytest.mark.parametrize("budget", [True, False])
def test_where_a_budget_was_set_it_fails(tmp_path: Path, budget: bool) -> None:
    slow = variant("small", 30.0, passes=("quantize_weights",), size_mb=1.0)
    variants = [variant("float", 20.0), slow]
    chosen, verdict = choose(variants, recipe_of(tmp_path, {"size_mb": 100.0} if budget else {}))
    assert slow.passed != budget
    assert chosen is not None and chosen.name == ("float" if budget else "small")
    assert ("small does not" in verdict) == budget
    if budget:
        assert slow.reason == "a step takes 30 ms, 1.50 times as long as float (20 ms)"
        assert (
            choose([slow], recipe_of(tmp_path, {"size_mb": 100.0}), source=variant("f", 20.0).bench)[0]
            is None
        )


def test_it_is_red_in_the_report() -> None:
    from onnxsmith.pipeline.report_html import _reasons

    slow = variant("small", 30.0, passes=("quantize_weights",))
    add_warnings([variant("float", 20.0), slow])
    slow.notes.append("its prompts take longer")
    plain = dataclasses.asdict(slow) | {"passed": slow.passed, "reason": slow.reason}
    assert _reasons(plain) == [
        "warning: a step takes 30 ms, 1.50 times as long as float (20 ms)",
        "note: its prompts take longer",
    ]


@pytest.mark.slow
def test_a_recipe_measures_each_graph_of_several(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from onnxsmith import run_recipe

    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps(
            {
                "schema_version": 1, "name": "t5", "source": str(tmp_path / "t5"),
                "variants": [{"name": "float", "preset": "cpu-fp32"}, {"name": "int8", "preset": "cpu-int8"}],
                "evaluation": {"benchmark": {"runs": 2, "prompt_tokens": 8, "new_tokens": 4, "threads": 1}},
            }
        )
    )  # fmt: skip
    report = run_recipe(load_recipe(recipe), tmp_path / "artifact")
    for entry in report.variants:
        assert entry.error is None and entry.bench is not None
        assert set(entry.bench["graphs"]) == {"encoder_model", "decoder_model", "decoder_with_past_model"}
        assert all(graph["latency_ms"]["p50"] > 0 for graph in entry.bench["graphs"].values())
    made = json.loads((tmp_path / "artifact" / "report.json").read_text())
    assert made["variants"][1]["bench"]["graphs"]
