"""The commands that measure models, and that show and bring what they can be measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from onnxsmith.pipeline.arguments import Json
from onnxsmith.pipeline.ending import FAILED, guarded

__all__ = ["MEASURING_COMMANDS"]


@guarded
def providers(
    install: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[==VERSION]",
            help="Put the package of a provider into an environment of its own; may be repeated.",
        ),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Remove the environment of a provider.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run a small model on each that is installed.")
    ] = False,
    json_target: Json = None,
) -> int:
    """List the execution providers: installed, devices, and what brings the others; or bring them."""
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.provider_list import list_providers
    from onnxsmith.pipeline.tables import show_providers
    from onnxsmith.runtime import choose_provider
    from onnxsmith.runtime.provider_install import install_provider, problem_of, uninstall_provider

    for name in remove or ():
        found = uninstall_provider(name)
        message(f"{name}: {'removed' if found else 'it had no environment of its own'}")
    for text in install or ():
        with progress_for().step(f"install {text}", 4) as step:
            environment = install_provider(text, on_step=partial(step.advance, 1))
        name = text.partition("==")[0]
        problem = problem_of(choose_provider(name))
        version = environment.versions.get(environment.package, "")
        message(f"{name}: {environment.package} {version} in {environment.directory}")
        message(f"{name}: " + (f"it does not run on this machine: {problem}" if problem else "it runs"))
    if (install or remove) and not json_target and not check:
        return 0
    rows = list_providers(check=check)
    if json_target:
        emit_json(json_target, "providers", {"providers": rows})
    if json_target != "-":
        show_providers(rows)
    return FAILED if check and any(row["problem"] for row in rows) else 0


MEASURING_COMMANDS: Sequence[Callable[..., Any]] = (providers,)
