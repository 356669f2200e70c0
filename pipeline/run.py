"""The main job: from a recipe to compared and measured variants, the chosen artifact and a report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith._version import __version__
from onnxsmith.environment import describe_environment, usable_cpus
from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.artifact_filling import fill_artifact
from onnxsmith.pipeline.choosing import choose
from onnxsmith.pipeline.context_fitting import fit_context
from onnxsmith.pipeline.forecast import Forecast, forecast_run, require_resources
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.records import created_at
from onnxsmith.pipeline.report import Report, StepTiming, write_report
from onnxsmith.pipeline.staging import beside, check_destination, check_report_place, staged_directory
from onnxsmith.pipeline.step_cache import StepCache
from onnxsmith.pipeline.training_run import checkpoint_directory
from onnxsmith.pipeline.variant_making import Made, passes_of
from onnxsmith.pipeline.workbench import Workbench
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel

__all__ = ["report_nothing", "run_recipe"]

_UNMEASURED: Mapping[str, None] = dict.fromkeys(
    ("perplexity", "prefill_tokens_per_s", "decode_tokens_per_s", "latency_ms", "size_mb")
)


def run_recipe(
    recipe: Recipe,
    destination: Path,
    *,
    base: Path | None = None,
    force: bool = False,
    command: str = "",
    verify_each: bool = False,
    tuning: dict[str, Any] | None = None,
    cache: StepCache | None = None,
    resume: bool = False,
    ignore_forecast: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Does everything that a recipe asks for.

    The artifact appears at ``destination`` whole or not at all. Where no variant passes, nothing is
    packed and the report goes to ``<destination>.failed``.

    Args:
        recipe: What to do.
        destination: Where the artifact is to be.
        base: The directory that relative paths of the recipe start from.
        force: Whether an artifact that is there may be replaced.
        command: The command line, for the report.
        verify_each: Check the model after each pass; a pass that breaks it fails its variant, by name.
        tuning: For the report, what a search did that led to this recipe.
        cache: What earlier runs left, and later ones find; see ``user_cache``.
        resume: Go on where an earlier run was ended: what it had finished is taken from the cache, with the
            times that it had measured. An artifact that is there may be the one that this run makes.
        ignore_forecast: Go on where memory or disk is not expected to suffice.
        progress: Who listens.

    Raises:
        OnnxsmithError: The job could not be done; see the classes in ``onnxsmith.errors``.
    """
    if not recipe.variants:
        raise BadInputError(
            f"recipe {recipe.name}: variants", got="none", expected="at least one",
            remedy="`onnxsmith tune` finds one for recipes with a key tune",
        )  # fmt: skip
    failed = beside(destination, ".failed")
    # The last thing that a run did before it was ended may have been to put its artifact there.
    check_destination(destination, force=force or resume)
    check_report_place(failed)
    source = ModelSource.parse(recipe.source, base=base)
    recipe = fit_context(recipe, source)
    with Workbench(
        recipe,
        source,
        base=base,
        cache=cache,
        resume=resume,
        verify_each=verify_each,
        progress=progress,
        checkpoints=checkpoint_directory(destination),
    ) as bench:
        report = _new_report(recipe, source, bench.log.steps, command)
        report.tuning = tuning

        def expect(loaded: LoadedModel | None) -> Forecast:
            told = forecast_run(recipe, source, cache=cache, base=base, loaded=loaded)
            report.forecast = told.to_json()
            require_resources(told, recipe, destination, force=ignore_forecast)
            return told

        with bench.log.step("forecast") as step:
            told = expect(None)
            step.note = str(told)
        # What only the model itself can say is known once it is loaded.
        later = expect if told.peak is None else None
        try:
            with staged_directory(destination, force=force, same=resume) as staging:
                # Beside the artifact, so that packing is a rename and not a copy.
                work = staging.with_name("work")
                work.mkdir()
                chosen = _judge_all(bench, report, work, on_loaded=later)
                if chosen is None:
                    raise _NothingChosenError
                fill_artifact(
                    chosen,
                    staging,
                    recipe=recipe,
                    report=report,
                    backend=bench.backend,
                    destination=destination,
                    progress=bench.log,
                )
        except _NothingChosenError:
            _write_failed(report, failed)
        else:
            # Else it would seem that this run failed.
            check_report_place(failed)
            shutil.rmtree(failed, ignore_errors=True)
            bench.finish()
    return report


def report_nothing(
    recipe: Recipe,
    source: ModelSource,
    destination: Path,
    *,
    tuning: dict[str, Any],
    verdict: str,
    command: str = "",
) -> Report:
    """Leaves the report of a search that found nothing to run in ``<destination>.failed``."""
    report = _new_report(recipe, source, [], command)
    report.tuning, report.verdict = tuning, verdict
    report.reference = {"name": "torch", **_UNMEASURED, **(tuning["reference"] or {})}
    _write_failed(report, beside(destination, ".failed"))
    return report


class _NothingChosenError(Exception):
    """No variant passed; the report says why."""


def _new_report(recipe: Recipe, source: ModelSource, steps: list[StepTiming], command: str) -> Report:
    benchmark = recipe.evaluation.benchmark
    environment = describe_environment() | {
        "threads": (benchmark.threads if benchmark else None) or usable_cpus(),
        "seed": recipe.seed,
    }
    return Report(
        name=recipe.name,
        command=command,
        created=created_at(),
        onnxsmith=__version__,
        source={
            "kind": str(source.kind),
            "text": source.text,
            "files": [],
            "architecture": None,
            "parameters": None,
        },
        environment=environment,
        recipe=recipe.model_dump(mode="json"),
        steps=steps,
    )


def _judge_all(
    bench: Workbench, report: Report, work: Path, *, on_loaded: Callable[[LoadedModel], object] | None
) -> Made | None:
    """Exports, makes, checks and measures the variants of a recipe, and chooses one."""
    recipe = bench.recipe
    # Everything that can be wrong with the recipe is found before the first minute of work.
    plans = {variant.name: passes_of(variant.specs()) for variant in recipe.variants}
    bench.load(work, variants=len(plans), on_loaded=on_loaded)
    report.source |= {
        key: bench.provenance[key]
        for key in ("files", "architecture", "parameters")
        if key in bench.provenance
    }
    variants: list[Made] = []
    with bench.log.step("variants", sum(map(len, plans.values()))) as step:
        names = list(plans)
        for number, name in enumerate(names, 1):
            later = [plans[other] for other in names[number:]]
            variants.append(bench.make(name, plans[name], later=later, step=step))
            report.variants.append(variants[-1].report)
    made = [variant for variant in variants if not variant.failed]
    report.reference = bench.described()
    if made:
        report.reference |= bench.reference().described
        with bench.log.step("check", len(made)) as step:
            for variant in made:
                bench.check(variant)
                comparison = variant.report.comparison
                agrees = comparison is not None and comparison["passed"]
                step.advance(note=f"{variant.report.name}: {'agrees' if agrees else 'differs'}")
        report.reference |= bench.time(made, beside_source=True)
    report.training = bench.training
    report.original = bench.original.report if bench.original is not None else None
    entry, report.verdict = choose(report.variants, recipe, source=bench.source_bench)
    if entry is None:
        return None
    report.chosen = entry.name
    found = next(variant for variant in variants if variant.report is entry)
    if recipe.evaluation.error_by_layer:
        bench.trace(found)
    return found


def _write_failed(report: Report, directory: Path) -> None:
    """Leaves the report of a run in which nothing passed, beside the destination that was not touched."""
    check_report_place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_report(report, directory)
