"""The commands that measure models, and that show and bring what they can be measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.arguments import Json, Providers, RequireProvider
from onnxsmith.pipeline.ending import FAILED, INTERRUPTED, guarded

__all__ = ["MEASURING_COMMANDS"]


@guarded
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Artifacts, .onnx files, or sources of PyTorch models."),
    ],
    component: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Which graphs of models of several; all by default."),
    ] = None,
    provider: Providers = None,
    require_provider: RequireProvider = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Length of the prompt or sequence; several for a sweep.")
    ] = "128",
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text as the prompt of decoders, in place of random tokens."),
    ] = None,
    speculate: Annotated[
        str,
        typer.Option(
            metavar="lookup[:N]", help="Decoders: measure them with guessed tokens too (see generate)."
        ),
    ] = "off",
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate (decoders).")] = 32,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Rows; several for a sweep.")] = "1",
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Intra-op threads; all processors by default, several for a sweep."
        ),
    ] = None,
    affinity: Annotated[
        str | None, typer.Option(metavar="CPU,...", help="Processors that may be used; all by default.")
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", help="Rounds counted, after one that is not.")] = 5,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile operators and nodes, against the machine's roofs.")
    ] = False,
    io_binding: Annotated[
        bool | None,
        typer.Option(
            "--io-binding/--no-io-binding",
            help="Keep inputs and outputs on the device; by default where it has memory of its own.",
        ),
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Record and replay a CUDA graph (cuda, tensorrt).")
    ] = False,
    torch_compile: Annotated[
        bool, typer.Option("--torch-compile", help="PyTorch models: through torch.compile too.")
    ] = False,
    task: Annotated[str | None, typer.Option(metavar="T", help="Task of PyTorch models.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs.")] = 0,
    json_target: Json = None,
) -> int:
    """Measure models in turn, each in a process of its own."""
    from onnxsmith.pipeline.bench_tables import show_bench, show_profiles
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.measuring import bench_models, sweep
    from onnxsmith.runtime import BenchResult, BenchSettings

    settings = BenchSettings(
        new_tokens=new_tokens, runs=runs, seed=seed, affinity=tuple(_numbers("--affinity", affinity)),
        io_binding=io_binding, cuda_graph=cuda_graph,
    )  # fmt: skip
    points = sweep(
        settings,
        batch=_numbers("--batch", batch),
        prompt_tokens=_numbers("--prompt-tokens", prompt_tokens),
        threads=_numbers("--threads", threads),
    )
    results: list[BenchResult] = []
    interrupted = False
    try:
        bench_models(
            models,
            points,
            providers=provider or ["cpu"],
            components=component or (),
            requirements=require_provider or (),
            torch_compile=torch_compile,
            task=task,
            profile=profile,
            prompt=_text_of(prompt_file),
            speculate=speculate,
            on_results=results.extend,
            progress=progress_for(),
        )
    except KeyboardInterrupt:
        if not results:
            raise
        interrupted = True
    if json_target:
        body = {"results": [result.to_json() for result in results], "interrupted": interrupted}
        emit_json(json_target, "bench", body)
    if json_target != "-":
        show_bench(results)
        show_profiles(results)
    said: set[str] = set()
    for result in results:
        if result.error and result.error not in said:
            # Graphs of one model may fail as a whole, for one reason.
            said.add(result.error)
            message(f"onnxsmith: {result.error}")
    if interrupted:
        message("onnxsmith: interrupted; what was measured until then is above")
        return INTERRUPTED
    return max((result.exit_status for result in results), default=FAILED)


def _text_of(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"bench: --prompt-file {path}", got=f"cannot be read: {error}", expected="a text in UTF-8"
        ) from error
    if not text.strip():
        raise BadInputError(f"bench: --prompt-file {path}", got="no text", expected="a prompt")
    return text


def _numbers(option: str, text: str | None) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in (text or "").split(",") if part.strip() or text]
    except ValueError as error:
        raise BadInputError(f"bench: {option}", got=repr(text), expected="numbers, as in 1,8") from error


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
    from onnxsmith.pipeline.bench_tables import show_providers
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.provider_list import list_providers
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


MEASURING_COMMANDS: Sequence[Callable[..., Any]] = (bench, providers)
