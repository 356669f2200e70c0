"""Timing variants: all of them and PyTorch, in turn, as a recipe wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.variant_making import Made
from onnxsmith.progress import Progress

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram

__all__ = ["time_variants"]


def time_variants(
    variants: Sequence[Made],
    programs: Mapping[str, TorchProgram],
    recipe: Recipe,
    *,
    progress: Progress,
    original: Made | None = None,
    source: Made | None = None,
) -> dict[str, Any]:
    """Adds to the reports of variants how fast they are. One that cannot be measured gets an error.

    Args:
        variants: What to measure; those that failed are left out.
        programs: PyTorch, measured beside them if the recipe wants it.
        recipe: How.
        progress: Who listens.
        original: The model before it was made smaller, to which the variants' latency is compared.
        source: The float model that the variants were quantized from; measured beside them.

    Returns:
        Medians of PyTorch, for the report; empty where it was not measured.
    """
    from onnxsmith.runtime import BenchSettings, Candidate, benchmark

    spec = recipe.evaluation.benchmark
    made = [variant for variant in variants if not variant.failed]
    if spec is None or not made:
        return {}
    if len(programs) > 1:
        with progress.step("benchmark") as step:
            step.note = "not measured: a model of several graphs; see `onnxsmith bench`, which measures each"
        return {}
    settings = BenchSettings(**spec.model_dump(exclude={"reference", "profile"}), seed=recipe.seed)
    candidates = [Candidate(v.report.name, v.directory, recipe.provider) for v in made]
    if original is not None:
        candidates.append(Candidate("original", original.directory, recipe.provider))
    if source is not None:
        candidates.append(Candidate("float source", source.directory, recipe.provider))
    if spec.reference:
        candidates.append(Candidate("torch", program=next(iter(programs.values()))))
    with progress.step("benchmark", (settings.runs + 1) * len(candidates)) as step:
        results = benchmark(
            candidates,
            settings,
            profile=spec.profile,
            on_round=lambda name, n: step.advance(note=f"{name}: round {n}"),
        )
        noisy = [r.name for r in results if r.noisy]
        step.note = f"{settings.runs} rounds each, in turn" + (
            f"; spread over 15 % for {', '.join(noisy)}: rerun on a quiet machine" if noisy else ""
        )
    # Not looked up by name: a variant may be called torch too.
    torch_result = results.pop() if spec.reference else None
    source_result = results.pop() if source is not None else None
    if source is not None and source_result is not None and not source_result.error:
        source.report.bench = source_result.to_json()
    original_result = results.pop() if original is not None else None
    base_ms = None
    if original is not None and original_result is not None and not original_result.error:
        original.report.bench = original_result.to_json()
        base_ms = original_result.latency_ms.p50 if original_result.latency_ms else None
    for variant, result in zip(made, results, strict=True):
        if result.error:
            variant.report.error = result.error
            continue
        variant.report.bench = result.to_json()
        ratio = None
        if torch_result is not None and torch_result.latency_ms and result.latency_ms:
            ratio = torch_result.latency_ms.p50 / result.latency_ms.p50
        variant.report.bench["decode_vs_reference"] = ratio
        if base_ms and result.latency_ms:
            variant.report.bench["latency_vs_original"] = result.latency_ms.p50 / base_ms
    if torch_result is None:
        return {}
    plain = torch_result.to_json()
    keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "latency_ms")
    return {key: plain[key]["p50"] if plain[key] else None for key in keys}
