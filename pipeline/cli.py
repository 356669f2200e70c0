"""The command line. A command parses, calls one function of the library, shows the result, and exits.

Exit status: 0 it worked and every check held; 1 a check, comparison or budget failed; 2 bad usage or bad
input; 3 something that this environment lacks; 130 interrupted.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from onnxsmith._version import __version__
from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.arguments import (
    CalibrationSamples,
    CalibrationText,
    CalibrationTokens,
    Force,
    Json,
    Model,
    Output,
    Passes,
    Presets,
    RequireProvider,
    VerifyEach,
    command_line,
    known,
    pass_spec,
    preset_specs,
)
from onnxsmith.pipeline.artifact_commands import ARTIFACT_COMMANDS
from onnxsmith.pipeline.cache_commands import CACHE_COMMANDS
from onnxsmith.pipeline.doctor_command import DOCTOR_COMMANDS
from onnxsmith.pipeline.ending import FAILED, end_on_signals, guarded, run_and_leave
from onnxsmith.pipeline.judging_commands import JUDGING_COMMANDS
from onnxsmith.pipeline.kernel_commands import KERNEL_COMMANDS
from onnxsmith.pipeline.measuring_commands import MEASURING_COMMANDS
from onnxsmith.pipeline.tuning_commands import TUNING_COMMANDS

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.package import StepRecord
    from onnxsmith.pipeline.calibration import CalibrationData

__all__ = ["app", "main", "run_command"]

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
# An export or a list of passes makes millions of them once, in imports and graphs, and is over soon after.
_OBJECTS_OF_A_MODEL = 5_000_000

app = typer.Typer(
    name="onnxsmith",
    help="PyTorch models become fast, small, checked ONNX deployments.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 it worked; 1 a check failed; 2 bad input; 3 this environment lacks something.",
)


def main() -> NoReturn:
    """The entry point of the console script: it ends the process."""
    run_and_leave(run_command)


def run_command() -> None:
    """Does what the arguments of this process say, and raises SystemExit with the status."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    end_on_signals()
    # A command makes objects by the million and few of them in cycles: with Python's own threshold of 700,
    # one second in ten is spent on looking for those.
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 10, 10)
    app()


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"onnxsmith {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@guarded
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML or JSON recipe.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Where the artifact is to be. [default: artifacts/NAME]"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be repeated."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where a run of this recipe was ended, with the times it had measured."
        ),
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Use what earlier runs made of the same inputs.")
    ] = True,
    forecast: Annotated[
        bool,
        typer.Option(
            "--forecast", help="Only say what memory and disk it would need, and whether they are here."
        ),
    ] = False,
    ignore_forecast: Annotated[
        bool,
        typer.Option("--ignore-forecast", help="Go on where memory or disk is not expected to suffice."),
    ] = False,
    verify_each: VerifyEach = False,
    require_provider: RequireProvider = None,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="Also log the report to this tracking store of MLflow.")
    ] = None,
    force: Force = False,
    json_target: Json = None,
) -> int:
    """The main job: from a recipe to a checked artifact and a report."""
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.recipe import load_recipe
    from onnxsmith.pipeline.run import run_recipe
    from onnxsmith.pipeline.run_steps import user_cache

    kept = user_cache() if cache else None
    if resume and kept is None:
        got = "a cache that is switched off or cannot be written" if cache else "--no-cache"
        raise BadInputError("run: --resume", got=got, expected="the cache, where finished steps are")
    overrides = list(settings or ())
    if require_provider:
        overrides.append(f"require_provider={json.dumps(require_provider)}")
    loaded = load_recipe(recipe, overrides=overrides)
    destination = output or Path("artifacts") / loaded.name
    if forecast:
        from onnxsmith.pipeline.forecast import foresee

        told = foresee(loaded, destination, base=recipe.resolve().parent, cache=kept)
        if json_target:
            emit_json(json_target, "run", {"forecast": told.to_json()})
        if json_target != "-":
            sys.stdout.write(f"{told}\n")
        return 0
    if mlflow is not None:
        from onnxsmith.pipeline.mlflow_logging import check_store, log_to_mlflow

        check_store(mlflow)
    report = run_recipe(
        loaded,
        destination,
        base=recipe.resolve().parent,
        force=force,
        command=command_line(),
        verify_each=verify_each,
        cache=kept,
        resume=resume,
        ignore_forecast=ignore_forecast,
        progress=progress_for(),
    )
    if mlflow is not None:
        from onnxsmith.pipeline.staging import beside

        place = destination if report.passed else beside(destination, ".failed")
        log_to_mlflow(report, place, uri=mlflow)
    if json_target:
        emit_json(json_target, "run", {"report": report.to_json()})
    if json_target != "-":
        from onnxsmith.pipeline.tables import show_report

        show_report(report, destination)
    if not report.passed:
        message(f"onnxsmith: {report.verdict}. See {destination}.failed{os.sep}report.html")
        return FAILED
    return 0


@app.command()
@guarded
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face directory or hub id, a .gguf file, pkg:package/file, "
            "or package.module:factory.",
        ),
    ],
    output: Output,
    task: Annotated[
        str | None, typer.Option(metavar="T", help="The task; found from the model by default.")
    ] = None,
    exporter: Annotated[
        str, typer.Option(metavar="auto|torch|optimum", help="auto is torch where it can.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(metavar="D", help="float32, float16 or bfloat16.")] = "float32",
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="Operator set, 18 to 25; torch's default.")
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            metavar="auto|fused|standard", help="Decoders: GroupQueryAttention or ONNX operators only."
        ),
    ] = "auto",
    adapter: Annotated[
        str,
        typer.Option(
            metavar="merge|inputs", help="A LoRA adapter: added to the weights, or inputs with defaults."
        ),
    ] = "merge",
    tracing: Annotated[
        str,
        typer.Option(
            metavar="auto|layers|whole", help="Decoders: one layer of each kind, copied, or all layers."
        ),
    ] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch before accepting.")
    ] = True,
    preset: Presets = None,
    passes: Passes = None,
    calibration_data: CalibrationText = None,
    calibration_samples: CalibrationSamples = 128,
    calibration_tokens: CalibrationTokens = 512,
    force: Force = False,
    json_target: Json = None,
) -> None:
    """Export a PyTorch model to ONNX, compared with PyTorch before it is accepted; then run passes on it."""
    from onnxsmith.pipeline.console import emit_json, progress_for
    from onnxsmith.pipeline.exporting import export_model
    from onnxsmith.pipeline.tables import show_export, show_steps

    gc.set_threshold(_OBJECTS_OF_A_MODEL, 10, 10)
    known("--exporter", exporter, ("auto", "torch", "optimum"), kind="exporter")
    known("--dtype", dtype, ("float32", "float16", "bfloat16"), kind="type")
    known("--attention", attention, ("auto", "fused", "standard"), kind="attention")
    known("--adapter", adapter, ("merge", "inputs"), kind="way")
    known("--tracing", tracing, ("auto", "layers", "whole"), kind="tracing")
    calibration = _calibration(calibration_data, calibration_samples, calibration_tokens)
    specs = _specs(preset, passes)
    package, comparison = export_model(
        source,
        output,
        task=task,
        dtype=dtype,
        attention=attention,
        opset=opset,
        tracing=tracing,
        exporter=exporter,
        adapter=adapter,
        specs=specs,
        calibration=calibration,
        verify=verify,
        force=force,
        progress=progress_for(),
    )
    if json_target:
        result: dict[str, Any] = {
            "artifact": str(output),
            "task": package.task,
            "precision": package.precision,
        }
        result["comparison"] = comparison.to_json() if comparison else None
        emit_json(json_target, "export", result | {"steps": _plain_steps(package.steps)})
    if json_target != "-":
        show_export(package, comparison, output)
        if specs:
            show_steps(package.steps[-len(specs) :])


def _specs(presets: list[str] | None, passes: list[str] | None) -> list[PassSpec]:
    return [*preset_specs(presets or []), *(pass_spec(text) for text in passes or [])]


def _calibration(data: str | None, samples: int, tokens: int) -> CalibrationData | None:
    from onnxsmith.pipeline.calibration import CalibrationData

    return None if data is None else CalibrationData(data, samples, tokens)


def _plain_steps(steps: Sequence[StepRecord]) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "parameters": s.parameters, "seconds": s.seconds, "details": s.details}
        for s in steps
    ]


@app.command()
@guarded
def optimize(
    model: Model,
    output: Output,
    preset: Presets = None,
    passes: Passes = None,
    verify_each: VerifyEach = False,
    calibration_data: CalibrationText = None,
    calibration_samples: CalibrationSamples = 128,
    calibration_tokens: CalibrationTokens = 512,
    force: Force = False,
    json_target: Json = None,
) -> None:
    """Run passes on an ONNX model: presets first, then single passes, each in the order given."""
    from onnxsmith.pipeline.console import emit_json, progress_for
    from onnxsmith.pipeline.operations import inspect_model, optimize_model
    from onnxsmith.pipeline.tables import show_optimize

    gc.set_threshold(_OBJECTS_OF_A_MODEL, 10, 10)
    specs = _specs(preset, passes)
    calibration = _calibration(calibration_data, calibration_samples, calibration_tokens)
    before, after = optimize_model(
        model,
        output,
        specs,
        verify_each=verify_each,
        calibration=calibration,
        force=force,
        progress=progress_for(),
    )
    if json_target:
        body = {"artifact": str(output), "steps": _plain_steps(after.steps[len(before.steps) :])}
        emit_json(json_target, "optimize", body | {"model": inspect_model(output)})
    if json_target != "-":
        show_optimize(before, after, output)


@app.command()
@guarded
def inspect(
    model: Model,
    top: Annotated[int, typer.Option(metavar="N", help="How many of the largest tensors to list.")] = 10,
    fusions: Annotated[
        bool, typer.Option("--fusions/--no-fusions", help="Try on a copy what passes could still do.")
    ] = True,
    json_target: Json = None,
) -> None:
    """Show what a model is made of and what passes could still do, without reading its weights."""
    from onnxsmith.pipeline.console import emit_json
    from onnxsmith.pipeline.operations import inspect_model
    from onnxsmith.pipeline.tables import show_inspect

    result = inspect_model(model, top=top, fusions=fusions)
    if json_target:
        emit_json(json_target, "inspect", result)
    if json_target != "-":
        show_inspect(result)


@app.command()
@guarded
def passes(json_target: Json = None) -> None:
    """List the passes with their parameters and defaults."""
    from onnxsmith.graph_passes.registry import load_pass, pass_names
    from onnxsmith.pipeline.console import emit_json
    from onnxsmith.pipeline.tables import describe_pass, show_passes

    described = [describe_pass(load_pass(name)) for name in pass_names()]
    if json_target:
        emit_json(json_target, "passes", {"passes": described})
    if json_target != "-":
        show_passes(described)


@app.command()
@guarded
def presets(json_target: Json = None) -> None:
    """List the ready-made lists of passes: what each is for, and why each pass stands where it does."""
    from onnxsmith.graph_passes.presets import PRESETS, PURPOSES, REASONS
    from onnxsmith.pipeline.console import emit_json
    from onnxsmith.pipeline.tables import show_presets

    if json_target:
        plain = {
            name: [{"name": p, "parameters": dict(a), "why": REASONS[p]} for p, a in specs]
            for name, specs in PRESETS.items()
        }
        emit_json(json_target, "presets", {"presets": plain, "purposes": dict(PURPOSES)})
    if json_target != "-":
        show_presets()


for _command in (
    *JUDGING_COMMANDS,
    *MEASURING_COMMANDS,
    *DOCTOR_COMMANDS,
    *TUNING_COMMANDS,
    *ARTIFACT_COMMANDS,
    *CACHE_COMMANDS,
    *KERNEL_COMMANDS,
):
    app.command()(_command)
