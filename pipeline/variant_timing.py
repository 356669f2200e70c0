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
    components: Sequence[str],
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
        components: Names of the model's graphs. Where there are several, each is measured by itself, and a
            variant's numbers are in ``graphs``, by these names.
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
    graphs = list(components) if len(components) > 1 else [""]
    key = step_key(
        "times",
        graphs=graphs,
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
    with progress.step("benchmark", (spec.runs + 1) * (len(made) + beside) * len(graphs)) as step:
        before = steps.open(key) if resume else None
        sound = before is not None and not any(
            error for facts in before.facts["graphs"].values() for _, error in facts["variants"]
        )

        def measured(_: object) -> dict[str, Any]:
            return {
                "graphs": {
                    name: _times(made, programs, recipe, step, original, source, name) for name in graphs
                }
            }

        found = steps.result(key, measured, renew=not sound)
        facts = dict(found.facts["graphs"])
        step.note = "; ".join(
            f"{name}: {part['note']}" if name else str(part["note"]) for name, part in facts.items()
        ) + (": measured before" if found.hit else "")
    _into_reports(made, facts, original, source, hit=found.hit)
    return dict(facts[""]["reference"]) if "" in facts else {}


def _into_reports(
    made: Sequence[Made],
    facts: Mapping[str, Mapping[str, Any]],
    original: Made | None,
    source: Made | None,
    *,
    hit: bool,
) -> None:
    """Where there are several graphs a report has the numbers of each, by its name."""
    for beside, key in ((original, "original"), (source, "source")):
        if beside is not None:
            beside.report.bench = _joined({name: part[key] for name, part in facts.items()})
    for number, variant in enumerate(made):
        found = {name: part["variants"][number] for name, part in facts.items()}
        error = next((error for _, error in found.values() if error), None)
        if error:
            variant.report.error = error
            continue
        bench = _joined({name: bench for name, (bench, _) in found.items()})
        assert bench is not None
        variant.report.bench = bench | {"name": variant.report.name}
        if hit:
            variant.report.from_cache.append("timed")


def _joined(graphs: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    if "" in graphs:
        return graphs[""]
    found = {name: bench for name, bench in graphs.items() if bench}
    if len(found) < len(graphs):
        return None
    # The keys of one, for who reads a report; what they say is said of each graph.
    return {**dict.fromkeys(next(iter(found.values()))), "graphs": found}


def _times(
    made: Sequence[Made],
    programs: Callable[[], Mapping[str, TorchProgram]],
    recipe: Recipe,
    step: Step,
    original: Made | None,
    source: Made | None,
    graph: str,
) -> dict[str, Any]:
    from onnxsmith.runtime import BenchSettings, Candidate, benchmark

    spec = recipe.evaluation.benchmark
    assert spec is not None
    settings = BenchSettings(**spec.model_dump(exclude={"reference", "profile"}), seed=recipe.seed)
    part = graph or None

    def candidate(name: str, made: Made) -> Candidate:
        return Candidate(name, made.directory, recipe.provider, component=part)

    candidates = [candidate(v.report.name, v) for v in made]
    if original is not None:
        candidates.append(candidate("original", original))
    if source is not None:
        candidates.append(candidate("float source", source))
    if spec.reference:
        known = programs()
        candidates.append(Candidate("torch", program=known[graph] if graph else next(iter(known.values()))))
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
