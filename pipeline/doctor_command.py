"""The command that says what makes a model slow or wrong on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxsmith.pipeline.arguments import Force, Json
from onnxsmith.pipeline.ending import FAILED, guarded

if TYPE_CHECKING:
    from onnxsmith.pipeline.doctor import Diagnosed, Diagnosis
    from onnxsmith.pipeline.doctor_gains import Gain

__all__ = ["DOCTOR_COMMANDS"]

_COLOURS: Mapping[str, str] = {"wrong": "31", "slow": "33", "large": "33", "note": "36"}


@guarded
def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="An artifact or an .onnx file; without it the machine alone is looked at."
        ),
    ] = None,
    provider: Annotated[
        str, typer.Option(metavar="P", help="Execution provider: NAME[:KEY=VALUE,...] or NAME@LIBRARY.")
    ] = "cpu",
    fix: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write the model with every remedy that helps, compared with it."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE", help="Only this rule, its remedy even if it is a choice; may be repeated."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure the machine and what each remedy gains.")
    ] = True,
    static: Annotated[
        bool, typer.Option("--static", help="Only look at the graph, for a provider that need not be here.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of what is measured.")] = 64,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate (decoders).")] = 16,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Rows.")] = 1,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Intra-op threads; all processors by default.")
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=2, help="Rounds counted, after one that is not.")] = 5,
    force: Force = False,
    json_target: Json = None,
) -> int:
    """Say what makes a model slow or wrong on this machine, what each remedy gains, and apply them."""
    from onnxsmith.pipeline.console import emit_json, progress_for
    from onnxsmith.pipeline.doctor import diagnose
    from onnxsmith.runtime import BenchSettings

    result = diagnose(
        model,
        provider=provider,
        fix=fix,
        rules=rule or (),
        measure=measure,
        static=static,
        settings=BenchSettings(
            prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, threads=threads, runs=runs
        ),
        force=force,
        progress=progress_for(),
    )
    if json_target:
        emit_json(json_target, "doctor", result.to_json())
    if json_target != "-":
        _show(result)
    return 0 if result.is_well else FAILED


def _show(result: Diagnosis) -> None:
    write = sys.stdout.write
    machine = result.machine
    features = ", ".join(sorted(machine.features)) or "not known"
    cores = "" if machine.physical_cores is None else f" of {machine.physical_cores} cores"
    write(f"machine    {machine.cpu}, {machine.usable_cpus} processors{cores}")
    write("" if machine.cpu_quota is None else f", {machine.cpu_quota:g} granted")
    write(f", {machine.available_bytes / 1e9:.1f} of {machine.memory_bytes / 1e9:.1f} GB free\n")
    write(f"kernels    {features}\n")
    if machine.own_kernels:
        write(f"its own    {machine.own_kernels}\n")
    if machine.runtimes:
        write("runtime    " + ", ".join(f"{name} {version}" for name, version in machine.runtimes.items()))
        write(f": {', '.join(name.removesuffix('ExecutionProvider') for name in machine.providers)}\n")
    if result.roofs is not None:
        write(
            f"measured   {result.roofs.bytes_per_s / 1e9:.1f} GB/s from memory, "
            f"{result.roofs.operations_per_s / 1e9:.0f} GFLOP/s in float32, {result.threads} threads\n"
        )
    if result.model:
        write(f"model      {result.model} on {result.provider}\n")
    for one in result.found:
        write("\n")
        _show_one(one)
    if not result.found:
        write("nothing found\n")
    if result.fixed is not None:
        write(
            f"\nfixed      {result.fixed}: {', '.join(o.finding.rule for o in result.found if o.applied)}\n"
        )
        for gain in result.gains:
            write(f"           {_gain(gain)}\n")
        worst = result.comparison.worst if result.comparison is not None else None
        if worst is not None:
            write(f"           agrees with the source: cosine {worst.cosine:.6f} at worst ({worst.name})\n")


def _show_one(one: Diagnosed) -> None:
    finding, write = one.finding, sys.stdout.write
    where = f" ({finding.component})" if finding.component else ""
    kind = _coloured(f"{finding.kind.upper():<10}", _COLOURS[finding.kind])
    write(f"{kind} {finding.rule}{where}: {finding.what}\n")
    write(f"           {finding.why}\n")
    if finding.nodes:
        more = f" and {finding.count - len(finding.nodes)} more" if finding.count > len(finding.nodes) else ""
        write(f"           {', '.join(finding.nodes)}{more}\n")
    choice = f" (a choice: --rule {finding.rule})" if finding.optional else ""
    write(f"  remedy   {finding.remedy}{choice}\n")
    for gain in one.gains:
        write(f"  gain     {_gain(gain)}\n")
    worst = one.comparison.worst if one.comparison is not None else None
    if worst is not None:
        write(f"  results  cosine {worst.cosine:.6f} at worst ({worst.name})\n")
    if one.verdict:
        write(f"  verdict  {one.verdict}{'; applied' if one.applied else ''}\n")


def _gain(gain: Gain) -> str:
    if gain.error:
        return gain.error
    parts = [
        f"{name} {gain.before_ms[name]:.3g} -> {gain.after_ms[name]:.3g} ms ({ratio:.2f}x)"
        for name, ratio in gain.ratios.items()
    ]
    if gain.before_mb and gain.after_mb and abs(gain.before_mb - gain.after_mb) > 0.001 * gain.before_mb:
        parts.append(f"{gain.before_mb:.3g} -> {gain.after_mb:.3g} MB")
    name = f"{gain.component}: " if gain.component else ""
    return name + ", ".join(parts) + (f" [{gain.noise}]" if gain.noise else "")


def _coloured(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if sys.stdout.isatty() else text


DOCTOR_COMMANDS: Sequence[Callable[..., Any]] = (doctor,)
