"""Timing variants: all of them and PyTorch, in turn, as a recipe wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.run_steps import RunSteps
from onnxsmith.pipeline.step_keys import machine, provider_identity, step_key
from onnxsmith.pipeline.variant_making import Made
from onnxsmith.progress import Progress, Step

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram
    from onnxsmith.runtime import OrtBackend

__all__ = ["time_variants"]


def time_variants(
    variants: Sequence[Made],
    programs: Callable[[], Mapping[str, TorchProgram]],
    recipe: Recipe,
    *,
    backend: OrtBackend,
    components: int,
    steps: RunSteps,
    resume: bool = False,
    progress: Progress,
    original: Made | None = None,
    source: Made | None = None,
) -> dict[str, Any]:
    """Adds to the reports of variants how fast they are. One that cannot be measured gets an error.

    Times are measured anew by every run, unless it resumes one that was killed after it had measured.

    Args:
        variants: What to measure; those that failed are left out.
        programs: Loads PyTorch, which is measured beside them if the recipe wants it.
        recipe: How.
        backend: What the variants run on.
        components: Of how many graphs the model is.
        steps: Where the times are left.
        resume: Whether to take times that were measured before.
        progress: Who listens.
        original: The model before it was made smaller, to which the variants' latency is compared.
        source: The float model that the variants were quantized from; measured beside them.

    Returns:
        Medians of PyTorch, for the report; empty where it was not measured.
    """
    spec = recipe.evaluation.benchmark
    made = [variant for variant in variants if not variant.failed]
    if spec is None or not made:
        return {}
    if components > 1:
        with progress.step("benchmark") as step:
            step.note = "not measured: a model of several graphs; see `onnxsmith bench`, which measures each"
        return {}
    key = step_key(
        "times",
        variants=[variant.key.digest for variant in made if variant.key is not None],
        original=original.key.digest if original is not None and original.key is not None else None,
        source=source.key.digest if source is not None and source.key is not None else None,
        benchmark=spec.model_dump(),
        seed=recipe.seed,
        provider=provider_identity(backend),
        machine=machine(),
        summary=", ".join(variant.report.name for variant in made),
    )
    beside = sum([original is not None, source is not None, spec.reference])
    with progress.step("benchmark", (spec.runs + 1) * (len(made) + beside)) as step:
        before = steps.open(key) if resume else None
        sound = before is not None and not any(error for _, error in before.facts["variants"])
        found = steps.result(
            key, lambda _: _times(made, programs, recipe, step, original, source), renew=not sound
        )
        step.note = str(found.facts["note"]) + (": measured before" if found.hit else "")
    facts = found.facts
    if original is not None:
        original.report.bench = facts["original"]
    if source is not None:
        source.report.bench = facts["source"]
    for variant, (bench, error) in zip(made, facts["variants"], strict=True):
        if error:
            variant.report.error = error
            continue
        variant.report.bench = bench | {"name": variant.report.name}
        if found.hit:
            variant.report.from_cache.append("timed")
    return dict(facts["reference"])


def _times(
    made: Sequence[Made],
    programs: Callable[[], Mapping[str, TorchProgram]],
    recipe: Recipe,
    step: Step,
    original: Made | None,
    source: Made | None,
) -> dict[str, Any]:
    from onnxsmith.runtime import BenchSettings, Candidate, benchmark

    spec = recipe.evaluation.benchmark
    assert spec is not None
    settings = BenchSettings(**spec.model_dump(exclude={"reference", "profile"}), seed=recipe.seed)
    candidates = [Candidate(v.report.name, v.directory, recipe.provider) for v in made]
    if original is not None:
        candidates.append(Candidate("original", original.directory, recipe.provider))
    if source is not None:
        candidates.append(Candidate("float source", source.directory, recipe.provider))
    if spec.reference:
        candidates.append(Candidate("torch", program=next(iter(programs().values()))))
    results = benchmark(
        candidates,
        settings,
        profile=spec.profile,
        on_round=lambda name, n: step.advance(note=f"{name}: round {n}"),
    )
    noisy = [r.name for r in results if r.noisy]
    note = f"{settings.runs} rounds each, in turn" + (
        f"; spread over 15 % for {', '.join(noisy)}: rerun on a quiet machine" if noisy else ""
    )
    # Not looked up by name: a variant may be called torch too.
    torch_result = results.pop() if spec.reference else None
    source_result = results.pop() if source is not None else None
    original_result = results.pop() if original is not None else None
    if original_result is not None and original_result.error:
        original_result = None
    base_ms = original_result.latency_ms.p50 if original_result and original_result.latency_ms else None
    times: list[tuple[dict[str, Any] | None, str | None]] = []
    for result in results:
        if result.error:
            times.append((None, result.error))
            continue
        ratio = None
        if torch_result is not None and torch_result.latency_ms and result.latency_ms:
            ratio = torch_result.latency_ms.p50 / result.latency_ms.p50
        told = result.to_json() | {"decode_vs_reference": ratio}
        if base_ms and result.latency_ms:
            told["latency_vs_original"] = result.latency_ms.p50 / base_ms
        times.append((told, None))
    reference: dict[str, Any] = {}
    if torch_result is not None:
        plain = torch_result.to_json()
        keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "latency_ms")
        reference = {key: plain[key]["p50"] if plain[key] else None for key in keys}
    return {
        "variants": times,
        "original": original_result.to_json() if original_result else None,
        "source": source_result.to_json() if source_result and not source_result.error else None,
        "reference": reference,
        "note": note,
    }
