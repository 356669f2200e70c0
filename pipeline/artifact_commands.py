"""The commands about whole artifacts: batch, package and verify."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from onnxsmith.pipeline.arguments import Force, Json, Models, Output
from onnxsmith.pipeline.ending import FAILED, INTERRUPTED, guarded

__all__ = ["ARTIFACT_COMMANDS"]


@guarded
def batch(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS", help="A YAML or JSON list of jobs.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Where the artifacts are to be; the list says."),
    ] = None,
    executor: Annotated[str, typer.Option(metavar="local|ray", help="What runs the jobs.")] = "local",
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Jobs at a time; one for two processors by default.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="A Ray cluster; this machine by default.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace artifacts that no earlier batch made, too.")
    ] = False,
    json_target: Json = None,
) -> int:
    """Run many recipes, each in a process of its own; what an earlier batch has made is kept."""
    from onnxsmith.pipeline.batch import run_batch
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.tables import show_batch

    result = run_batch(
        jobs,
        output=output,
        executor=executor,
        workers=workers,
        address=address,
        force=force,
        progress=progress_for(),
        on_interrupt=lambda: None,
    )
    if json_target:
        emit_json(json_target, "batch", result.to_json())
    if json_target != "-":
        show_batch(result)
    if result.interrupted:
        message("onnxsmith: interrupted; the same command goes on with the jobs that are left")
        return INTERRUPTED
    return 0 if result.passed else FAILED


@guarded
def package(
    models: Models,
    output: Output,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ort|optimum|genai|transformers-js|sentence-transformers|all",
            help="For which runtime; may be repeated. All that the model can have by default.",
        ),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option(metavar="KEY.pem", help="Sign the manifest with this Ed25519 private key."),
    ] = None,
    force: Force = False,
    json_target: Json = None,
) -> None:
    """Lay a model out so that other runtimes load it; several models are its variants in other precisions."""
    from onnxsmith.pipeline.console import emit_json
    from onnxsmith.pipeline.packing import package_model

    packed = package_model(models, output, layouts=layout or ["all"], sign_key=sign_key, force=force)
    if json_target:
        body = {
            "artifact": str(output),
            "layouts": list(packed.layouts),
            "refused": dict(packed.refused),
            "graphs": list(packed.graphs),
            "signed_by": packed.signed_by,
        }
        emit_json(json_target, "package", body)
    if json_target == "-":
        return
    for name in packed.layouts:
        sys.stdout.write(f"{name:<22} ready\n")
    for name, reason in packed.refused.items():
        sys.stdout.write(f"{name:<22} left out: {reason}\n")
    for graph in packed.graphs:
        sys.stdout.write(f"graph      {output / graph}\n")
    if packed.signed_by:
        sys.stdout.write(f"signed by  {packed.signed_by}\n")
    sys.stdout.write(f"artifact   {output}\n")


@guarded
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory made by onnxsmith.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC.pem", help="The Ed25519 public key that must have signed it."),
    ] = None,
    json_target: Json = None,
) -> int:
    """Check every byte of an artifact against its manifest, and the manifest against the graphs."""
    from onnxsmith.pipeline.artifact import verify_artifact
    from onnxsmith.pipeline.console import emit_json, message
    from onnxsmith.pipeline.signing import check_signature

    findings = verify_artifact(artifact, key=key)
    signed_by = None if findings else check_signature(artifact, key)[0]
    if json_target:
        body = {
            "passed": not findings,
            "findings": [{"where": f.where, "problem": f.problem} for f in findings],
            "signed_by": signed_by,
        }
        emit_json(json_target, "verify", body)
    for finding in findings:
        message(f"{artifact / finding.where}: {finding.problem}")
    if json_target != "-":
        count = f"{len(findings)} problem{'' if len(findings) == 1 else 's'}"
        whose = f", signed by {signed_by}" if signed_by else ""
        sys.stdout.write(
            f"{artifact}: {count if findings else 'everything is as the manifest says'}{whose}\n"
        )
    return FAILED if findings else 0


ARTIFACT_COMMANDS: Sequence[Callable[..., None]] = (batch, package, verify)
