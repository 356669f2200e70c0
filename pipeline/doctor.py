"""Diagnosis: what makes a model slow or wrong on this machine, and what each remedy really gains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from onnxsmith.comparison import Comparison, tolerance_for
from onnxsmith.errors import BadInputError, CheckFailedError, OnnxsmithError, UnknownNameError
from onnxsmith.finding import Finding
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.artifact import write_manifest
from onnxsmith.pipeline.doctor_gains import Gain, measure_gains, thread_finding
from onnxsmith.pipeline.references import compare_package, open_reference
from onnxsmith.pipeline.staging import check_destination, staged_directory
from onnxsmith.progress import Progress

if TYPE_CHECKING:
    from onnxsmith.pipeline.references import Reference
    from onnxsmith.runtime import BenchSettings
    from onnxsmith.runtime.machine import Machine
    from onnxsmith.runtime.roofline import Roofs

__all__ = ["Diagnosed", "Diagnosis", "diagnose"]

# The bounds of a remedy that rounds.
_ROUNDED = "int8"


@dataclasses.dataclass
class Diagnosed:
    """A finding, with what its remedy was measured to do.

    Attributes:
        finding: What was found.
        gains: Of the remedy alone, for each graph; empty where there is none or nothing was measured.
        comparison: Of the remedied model with the model; None likewise.
        verdict: What follows of it, in a few words.
        applied: Whether ``--fix`` applied it.
    """

    finding: Finding
    gains: Sequence[Gain] = ()
    comparison: Comparison | None = None
    verdict: str = ""
    applied: bool = False

    @property
    def speedup(self) -> float | None:
        """The geometric mean over what was measured: above 1 it is faster."""
        ratios = [ratio for gain in self.gains for ratio in gain.ratios.values()]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    @property
    def helps(self) -> bool:
        """Whether the remedy may be applied: it was compared, and costs nothing for nothing."""
        if self.comparison is not None and not self.comparison.passed:
            return False
        speedup = self.speedup
        certain = any(gain.certain for gain in self.gains)
        if speedup is None:
            return self.finding.exact
        if certain and speedup < 1:
            return False
        return self.finding.exact or (certain and speedup > 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        worst = self.comparison.worst if self.comparison is not None else None
        return {
            **self.finding.to_json(),
            "speedup": self.speedup,
            "gains": [gain.to_json() for gain in self.gains],
            "agrees": None if self.comparison is None else self.comparison.passed,
            "worst_cosine": None if worst is None else worst.cosine,
            "verdict": self.verdict,
            "applied": self.applied,
        }


@dataclasses.dataclass
class Diagnosis:
    """Everything that was found.

    Attributes:
        machine: What this process has.
        roofs: What the provider can do at best; None where it was not measured.
        threads: That the roofs and gains were measured with.
        model: The model; empty for the machine alone.
        provider: ONNX Runtime's name.
        found: Findings about the machine, then about the model.
        fixed: Where the remedied model was written; None where it was not.
        gains: Of all remedies together.
        comparison: Of the remedied model with the model.
    """

    machine: Machine
    threads: int
    provider: str
    model: str = ""
    roofs: Roofs | None = None
    found: list[Diagnosed] = dataclasses.field(default_factory=list)
    fixed: Path | None = None
    gains: Sequence[Gain] = ()
    comparison: Comparison | None = None

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong; what is merely slow is not wrong."""
        return not any(one.finding.kind == "wrong" and not one.applied for one in self.found)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "machine": self.machine.to_json(),
            "roofs": None if self.roofs is None else dataclasses.asdict(self.roofs),
            "threads": self.threads,
            "model": self.model,
            "provider": self.provider,
            "well": self.is_well,
            "findings": [one.to_json() for one in self.found],
            "fixed": None if self.fixed is None else str(self.fixed),
            "gains": [gain.to_json() for gain in self.gains],
            "comparison": None if self.comparison is None else self.comparison.to_json(),
        }


def diagnose(
    model: Path | None = None,
    *,
    provider: str = "cpu",
    fix: Path | None = None,
    rules: Sequence[str] = (),
    measure: bool = True,
    static: bool = False,
    settings: BenchSettings | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Diagnosis:
    """Finds out what makes a model, or any model, slow or wrong on this machine.

    Each remedy that passes can apply is applied alone, compared with the model, and measured against it in
    turn, each in a process of its own.

    Args:
        model: An artifact, a directory with one ONNX model, or an ONNX file; None for the machine alone.
        provider: See ``choose_provider``.
        fix: Where to write the model with all remedies that help.
        rules: Names of rules about graphs: only these are applied, remedies that are a choice among them.
        measure: Whether to measure roofs and gains; it takes a while.
        static: Only look at the graphs, and run nothing. The provider need not be here then.
        settings: How to measure.
        force: Whether an artifact that is there may be replaced.
        progress: Who listens.

    Raises:
        BadInputError: Something to fix without a model.
        UnknownNameError: No such rule or provider.
        CheckFailedError: The remedied model does not agree with the model; nothing was written.
        OnnxsmithError: The model cannot be read.
    """
    from onnxsmith.graph_passes.findings import RULES
    from onnxsmith.runtime import BenchSettings, choose_provider
    from onnxsmith.runtime.machine import machine_findings, read_machine
    from onnxsmith.runtime.machine_load import MachineLoad
    from onnxsmith.runtime.roofs import measure_roofs

    progress = progress or Progress()
    for rule in rules:
        if rule not in RULES:
            raise UnknownNameError("doctor: --rule", name=rule, known=RULES, kind="rule")
    if model is None and (fix is not None or rules):
        what = "--fix" if fix is not None else "--rule"
        raise BadInputError(f"doctor: {what}", got="no model", expected="a model to look at")
    if fix is not None:
        check_destination(fix, force=force)
    settings = settings or BenchSettings()
    package = load_package(model) if model is not None else None
    if static:
        if package is None or fix is not None:
            what = "no model" if package is None else "--fix too"
            raise BadInputError("doctor: --static", got=what, expected="a model to look at, and no more")
        return _looked_at(package, str(model), provider, settings, rules)
    load = MachineLoad()
    roofs: Roofs | None = None
    try:
        choice = choose_provider(provider)
    except OnnxsmithError:
        if model is not None or provider != "cpu":
            raise
        # Without ONNX Runtime the machine can be looked at all the same.
        return _machine_alone(settings)
    if measure:
        with progress.step("roofs"):
            roofs = measure_roofs(choice, threads=settings.thread_count)
    machine = read_machine(load_pct=load.other_pct())
    result = Diagnosis(machine, settings.thread_count, choice.ort_name, roofs=roofs)
    result.found = [Diagnosed(finding) for finding in machine_findings(machine)]
    if package is None or model is None:
        return result
    result.model = str(model)
    with progress.step("examine"):
        found = _examine(package, provider, machine, rules)
    case = _Case(model, package, provider, settings, measure)
    runs = not any(one.rule == "does_not_run" for one in found)
    groups = _by_rule(found)
    with TemporaryDirectory(prefix="onnxsmith-doctor-") as directory:
        case.directory = Path(directory)
        with progress.step("measure", len(groups) + 1) as step:
            if runs:
                with open_reference(str(model)) as reference:
                    for group in groups:
                        result.found += case.tried(group, reference)
                        step.advance(note=group[0].rule)
            else:
                result.found += [Diagnosed(one) for group in groups for one in group]
            if runs and measure and not rules:
                threads = thread_finding(model, provider, settings)
                if threads is not None:
                    result.found.append(Diagnosed(threads[0], threads[1], verdict="measured"))
            step.advance(note="threads")
    if fix is not None:
        chosen = [
            one
            for one in result.found
            if one.finding.passes and one.helps and (not one.finding.optional or one.finding.rule in rules)
        ]
        if chosen:
            _write_fixed(result, case, chosen, fix, force=force, progress=progress)
    return result


def _machine_alone(settings: BenchSettings) -> Diagnosis:
    from onnxsmith.runtime.machine import machine_findings, read_machine

    machine = read_machine()
    found = [Diagnosed(finding) for finding in machine_findings(machine)]
    return Diagnosis(machine, settings.thread_count, "", found=found)


def _looked_at(
    package: ModelPackage, model: str, provider: str, settings: BenchSettings, rules: Sequence[str]
) -> Diagnosis:
    """What the rules say of the graphs, for a provider that may not be here."""
    from onnxsmith.graph_passes.findings import Target, examine
    from onnxsmith.runtime.machine import read_machine
    from onnxsmith.runtime.providers import PROVIDERS, provider_named

    known = provider_named(provider.partition(":")[0])
    if known is None:
        raise UnknownNameError("--provider", name=provider, known=PROVIDERS, kind="execution provider")
    machine = read_machine()
    result = Diagnosis(machine, settings.thread_count, known.ort_name, model)
    for name, component in package.components.items():
        for one in examine(component.model, Target(result.provider, machine.features), rules=rules):
            where = name if len(package.components) > 1 else ""
            result.found.append(Diagnosed(dataclasses.replace(one, component=where)))
    return result


def _examine(package: ModelPackage, provider: str, machine: Machine, rules: Sequence[str]) -> list[Finding]:
    """What is seen when each graph runs, and what the rules say of it."""
    from onnxsmith.graph_passes.findings import Target, examine
    from onnxsmith.runtime import OrtBackend, choose_provider
    from onnxsmith.runtime.behaviour import observe

    backend = OrtBackend(provider)
    found: list[Finding] = []
    several = len(package.components) > 1
    for name, component in package.components.items():
        seen = observe(package.only(name), backend, name=name)
        target = Target(choose_provider(provider).ort_name, machine.features, seen.executed)
        both = [*(() if rules else seen.findings), *examine(component.model, target, rules=rules)]
        found += [dataclasses.replace(one, component=name) if several else one for one in both]
    return found


def _by_rule(found: Sequence[Finding]) -> list[list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for one in found:
        groups.setdefault(one.rule, []).append(one)
    return list(groups.values())


@dataclasses.dataclass
class _Case:
    """The model that is treated, and how remedies are tried on it."""

    path: Path
    package: ModelPackage
    provider: str
    settings: BenchSettings
    measure: bool
    directory: Path = Path()

    def remedied(self, findings: Sequence[Finding]) -> ModelPackage:
        """The model with the passes of some findings, each on its own graph."""
        from onnxsmith.graph_passes import make_passes, run_passes

        result = self.package.derive()
        for finding in findings:
            for name in [finding.component] if finding.component else list(result.components):
                part = run_passes(result.only(name), make_passes(finding.passes))
                result.components[name] = part.components[name]
                result.steps = part.steps
        return result

    def tolerance_name(self, findings: Sequence[Finding]) -> str:
        """The precision whose bounds a remedied model has to keep."""
        own = self.package.precision
        if own in ("int4", _ROUNDED) or all(one.exact for one in findings):
            return own
        return _ROUNDED

    def tried(self, group: Sequence[Finding], reference: Reference) -> list[Diagnosed]:
        """The findings of one rule, with what their remedy does."""
        found = [Diagnosed(one) for one in group]
        curable = [one for one in group if one.passes]
        if not curable:
            return found
        try:
            remedied = self.remedied(curable)
            place = self.directory / group[0].rule
            place.mkdir()
            save_package(remedied, place)
        except OnnxsmithError as error:
            for one in found:
                one.verdict = f"the remedy cannot be applied: {error}"
            return found
        comparison = self.compared(remedied, reference, curable)
        gains = measure_gains(self.path, place, self.provider, self.settings) if self.measure else ()
        for one in found:
            own = one.finding.component
            one.comparison = comparison
            one.gains = [gain for gain in gains if not own or gain.component == own]
            one.verdict = _verdict(one)
        return found

    def compared(
        self, remedied: ModelPackage, reference: Reference, findings: Sequence[Finding]
    ) -> Comparison:
        from onnxsmith.runtime import OrtBackend

        return compare_package(
            reference,
            reference.expected(candidates=[remedied]),
            remedied,
            OrtBackend(self.provider),
            tolerance=tolerance_for(self.tolerance_name(findings)),
            name="the remedied model",
        )


def _verdict(one: Diagnosed) -> str:
    if one.comparison is not None and not one.comparison.passed:
        return f"the remedy does not help: results differ ({one.comparison.reason})"
    speedup = one.speedup
    if speedup is None:
        return "not measured"
    if any(gain.error for gain in one.gains):
        return next(gain.error for gain in one.gains if gain.error)
    certain = any(gain.certain for gain in one.gains)
    if not certain:
        return "no difference that is larger than the spread"
    return "faster" if speedup > 1 else "slower: left alone"


def _write_fixed(
    result: Diagnosis,
    case: _Case,
    chosen: Sequence[Diagnosed],
    fix: Path,
    *,
    force: bool,
    progress: Progress,
) -> None:
    """Applies all remedies together, compares, measures, and writes."""
    findings = [one.finding for one in chosen]
    with progress.step("fix"):
        remedied = case.remedied(findings)
        if not remedied.source:
            remedied.source = {"kind": "onnx", "text": str(case.path)}
    with staged_directory(fix, force=force) as staging:
        save_package(remedied, staging)
        with progress.step("compare"), open_reference(str(case.path)) as reference:
            comparison = case.compared(remedied, reference, findings)
        if not comparison.passed:
            raise CheckFailedError(
                f"doctor --fix {fix}",
                got=f"with all remedies together {comparison.reason}",
                expected=f"what {case.path} computes",
                remedy="Nothing was written. Apply some of them, with --rule",
            )
        if case.measure:
            with progress.step("measure"):
                result.gains = measure_gains(case.path, staging, case.provider, case.settings)
        for one in chosen:
            one.applied = True
        measured: Mapping[str, Any] = {
            "comparison": comparison.to_json(),
            "gains": [gain.to_json() for gain in result.gains],
            "remedies": [one.to_json() for one in chosen],
        }
        write_manifest(remedied, staging, measurements={"doctor": measured})
    result.fixed, result.comparison = fix, comparison
