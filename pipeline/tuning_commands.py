"""The command `tune`: a search under budgets, and what it found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxsmith.pipeline.arguments import Force, Json, command_line
from onnxsmith.pipeline.ending import FAILED, INTERRUPTED, guarded

__all__ = ["TUNING_COMMANDS"]

_SHOWN = 25


@guarded
def tune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe with a key tune.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Where the artifact is to be. [default: artifacts/NAME]"
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Points to try, in all; the recipe's by default.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds after which no point is begun any more.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes that make and score points.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="auto|tpe|random|grid|nsga2", help="How points are chosen.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where measurements are kept. [default: the artifact's name.tune]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be repeated."),
    ] = None,
    force: Force = False,
    json_target: Json = None,
) -> int:
    """Search passes, bits and threads under budgets; judge the best point on held-out data and pack it."""
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.recipe import load_recipe
    from onnxsmith.pipeline.tuning import tune_recipe

    overrides = list(settings or ())
    for key, value in (
        ("trials", trials),
        ("timeout_s", timeout),
        ("workers", workers),
        ("sampler", sampler),
    ):
        if value is not None:
            overrides.append(f"tune.{key}={value}")
    loaded = load_recipe(recipe, overrides=overrides)
    destination = output or Path("artifacts") / loaded.name
    result = tune_recipe(
        loaded,
        destination,
        base=recipe.resolve().parent,
        store=store,
        force=force,
        command=command_line(),
        progress=progress_for(),
    )
    if json_target:
        emit_json(json_target, "tune", result.to_json())
    if json_target != "-":
        _show(result.to_json())
    if result.interrupted:
        message(f"onnxsmith: {result.verdict}")
        return INTERRUPTED
    if not result.passed:
        message(f"onnxsmith: {result.verdict}. See {destination}.failed{os.sep}report.html")
        return FAILED
    return 0


def _show(result: Mapping[str, Any]) -> None:
    """The front and the best of the rest as a table, and where things are."""
    from onnxsmith.pipeline.console import print_table

    tuning = result["tuning"]
    names = list(dict.fromkeys([*tuning["axes"], *tuning["limits"]]))
    first = tuning["objectives"][0]

    def rank(trial: Mapping[str, Any]) -> tuple[Any, ...]:
        value = trial["values"].get(first)
        return (not trial["chosen"], not trial["feasible"], not trial["front"], value is None, value or 0.0)

    trials = sorted(tuning["trials"], key=rank)
    rows = [
        (
            f"{trial['name']} *" if trial["chosen"] else trial["name"],
            "front" if trial["front"] else "",
            _verdict(trial),
            *(f"{trial['values'][name]:.4g}" if name in trial["values"] else "" for name in names),
            ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in trial["parameters"].items()),
        )
        for trial in trials[:_SHOWN]
    ]
    print_table(
        "tune", ("point", "", "verdict", *names, "what it is"), rows, text=("", "verdict", "what it is")
    )
    if len(trials) > _SHOWN:
        sys.stdout.write(f"{len(trials) - _SHOWN} more points are in {result['directory']}/tune.json\n")
    made, known = result["measured"], tuning["reused"]
    sys.stdout.write(f"\n{result['verdict']}\n{made} measurements made, {known} known before\n")
    if result["report"] is not None:
        if result["passed"]:
            sys.stdout.write(f"artifact  {result['destination']}\n")
            sys.stdout.write(f"report    {result['destination']}{os.sep}report.html\n")
        if tuning["chosen"] is not None:
            sys.stdout.write(f"recipe    {result['directory']}{os.sep}recipe.yaml\n")


def _verdict(trial: Mapping[str, Any]) -> str:
    if trial["feasible"]:
        return "keeps the budgets"
    return "breaks a budget" if trial["state"] == "complete" else str(trial["state"])


TUNING_COMMANDS: Sequence[Callable[..., None]] = (tune,)
