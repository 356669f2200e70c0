"""The main job: from a recipe to compared and measured variants, the chosen artifact and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith._version import __version__
from onnxsmith.comparison import tolerance_for
from onnxsmith.environment import describe_environment, peak_rss_mb, usable_cpus
from onnxsmith.errors import LackingError, OnnxsmithError, SourceError
from onnxsmith.package import TEXT_GENERATION, ModelPackage
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.artifact import file_entries, write_manifest
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.model_card import CARD_NAME, model_card
from onnxsmith.pipeline.recipe import PerplexitySpec, Recipe, Variant
from onnxsmith.pipeline.references import checked_placement, open_programs
from onnxsmith.pipeline.report import Budget, Report, StepTiming, VariantReport, write_report
from onnxsmith.pipeline.run_tasks import TaskMeasure, budget_values
from onnxsmith.pipeline.sbom import write_sbom
from onnxsmith.pipeline.staging import (
    check_destination,
    check_report_place,
    require_space,
    staged_directory,
)
from onnxsmith.pipeline.stepwise import StepVerifier
from onnxsmith.pipeline.texts import load_text, text_sha256
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.progress import Progress, Step
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.program import TorchProgram
    from onnxsmith.runtime import Perplexity

__all__ = ["run_recipe"]

_NEW_TOKENS = 24


def run_recipe(
    recipe: Recipe,
    destination: Path,
    *,
    base: Path | None = None,
    force: bool = False,
    command: str = "",
    verify_each: bool = False,
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
        progress: Who listens.

    Raises:
        OnnxsmithError: The job could not be done; see the classes in ``onnxsmith.errors``.
    """
    failed = destination.with_name(f"{destination.name or destination.resolve().name}.failed")
    check_destination(destination, force=force)
    check_report_place(failed)
    source = ModelSource.parse(recipe.source, base=base)
    if not source.is_torch:
        raise SourceError(
            recipe.source, got="an ONNX model", expected="a PyTorch model to compare with",
            remedy="Use `onnxsmith optimize` for ONNX models",
        )  # fmt: skip
    job = _Job(recipe, source, base, command, progress or Progress())
    job.verify = StepVerifier() if verify_each else None
    try:
        with staged_directory(destination, force=force) as staging:
            # Beside the artifact, so that packing is a rename and not a copy.
            work = staging.with_name("work")
            work.mkdir()
            job.pack(job.run(work), staging, destination)
    except _NothingChosenError:
        _write_failed(job.report, failed)
    else:
        # Else it would seem that this run failed.
        check_report_place(failed)
        shutil.rmtree(failed, ignore_errors=True)
    return job.report


class _NothingChosenError(Exception):
    """No variant passed; the report says why."""


class _Job:
    def __init__(
        self, recipe: Recipe, source: ModelSource, base: Path | None, command: str, progress: Progress
    ) -> None:
        from onnxsmith.graph_passes import make_passes
        from onnxsmith.runtime import OrtBackend, requirements_of

        self.recipe = recipe
        self.source = source
        self.progress = progress
        self.verify: StepVerifier | None = None
        # Everything that can be wrong with the recipe is found before the first minute of work.
        self.backend = OrtBackend(recipe.provider)
        self.requirements = requirements_of(recipe.require_provider, [recipe.provider])
        self.context = context_for(source)
        self.calibration = CalibrationData.of(recipe.calibration, base=base)
        self.passes: dict[str, list[GraphPass]] = {v.name: make_passes(_specs(v)) for v in recipe.variants}
        self.tasks = TaskMeasure(recipe, base) if recipe.evaluation.task else None
        spec = recipe.evaluation.perplexity
        self.text = load_text(spec.data, base=base) if spec else ""
        environment = describe_environment()
        benchmark = recipe.evaluation.benchmark
        environment |= {
            "threads": (benchmark.threads if benchmark else None) or usable_cpus(),
            "seed": recipe.seed,
        }
        self.report = Report(
            name=recipe.name,
            command=command,
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
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
        )
        self.paths: dict[str, Path] = {}
        self._packages: dict[str, ModelPackage] = {}
        self._prefixes: dict[tuple[str, ...], ModelPackage] = {}

    @contextlib.contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Step]:
        began = time.perf_counter()
        with self.progress.step(name, total) as step:
            yield step
        self.report.steps.append(StepTiming(name, time.perf_counter() - began, peak_rss_mb(), step.note))

    def run(self, work: Path) -> VariantReport:
        """Exports, makes and measures the variants, and chooses one."""
        from onnxsmith.exporters import export, load_torch, torch_programs

        recipe = self.recipe
        with self.step("load") as step:
            loaded = load_torch(self.source, task=recipe.task, dtype=recipe.export.dtype, lazy=True)
            provenance = loaded.provenance
            step.note = f"{provenance['architecture']}, {provenance['parameters'] / 1e6:.1f} M parameters"
        self.report.source |= {
            key: provenance[key] for key in ("files", "architecture", "parameters") if key in provenance
        }
        size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
        require_space(work, size * (len(recipe.variants) + 1), purpose=f"variants of {recipe.name}")
        if loaded.task != TEXT_GENERATION and recipe.evaluation.perplexity is not None:
            raise SourceError(
                recipe.source, got=f"a model for {loaded.task or 'no known task'}", expected="a decoder",
                remedy="Leave evaluation.perplexity out of the recipe",
            )  # fmt: skip
        with self.step("export") as step:
            programs = torch_programs(loaded)
            exported = export(loaded, programs, attention=recipe.export.attention, opset=recipe.export.opset)
            step.note = exported.steps[-1].details.get("attention", "")
        self.context = context_for(self.source, exported, self.calibration)
        for variant in recipe.variants:
            self.report.variants.append(VariantReport(variant.name, provider=self.backend.name))
        with self.step("variants", sum(len(p) for p in self.passes.values())) as step:
            for variant, entry in zip(recipe.variants, self.report.variants, strict=True):
                self._make(variant, entry, exported, work, step)
        self._check(programs, work)
        self._measure(programs)
        return self._choose()

    def pack(self, chosen: VariantReport, staging: Path, destination: Path) -> None:
        """Fills the artifact: the chosen variant, the report, and the manifest last."""
        with self.step("pack") as step:
            for path in self.paths[chosen.name].iterdir():
                shutil.move(path, staging / path.name)
            package = load_package(staging)
            self._annotate(package, chosen.name)
            if package.task == TEXT_GENERATION and self.recipe.prompt:
                self.report.generation = self._generate(package, self.recipe.prompt)
            step.note = str(destination)
        files = file_entries(staging)
        self.report.artifact = {
            "path": str(destination),
            "files": [{"name": name, **entry.model_dump()} for name, entry in files.items()],
            "bytes": sum(entry.bytes for entry in files.values()),
        }
        write_report(self.report, staging)
        plain = self.report.to_json()
        measured = next(v for v in plain["variants"] if v["chosen"])
        keys = (
            "size_mb",
            "perplexity",
            "perplexity_increase_pct",
            "kl_to_reference",
            "top1_agreement",
            "task_metrics",
            "bench",
            "placement",
        )
        measurements = {key: measured[key] for key in keys} | {"reference": plain["reference"]}
        card = model_card(
            package, name=self.recipe.name, measurements=measurements, environment=self.report.environment
        )
        (staging / CARD_NAME).write_text(card, encoding="utf-8")
        write_sbom(package, staging, name=self.recipe.name)
        write_manifest(package, staging, measurements=measurements, recipe=plain["recipe"])

    def _annotate(self, package: ModelPackage, name: str) -> None:
        made = self._packages[name]
        package.task, package.source, package.steps = made.task, made.source, made.steps

    def _make(
        self, variant: Variant, entry: VariantReport, exported: ModelPackage, work: Path, step: Step
    ) -> None:
        directory = work / variant.name
        directory.mkdir()
        try:
            package = self._transform(variant.name, exported, step)
            save_package(package, directory)
        except LackingError:
            raise
        except OnnxsmithError as error:
            # One variant that cannot be made is a result; the others go on.
            entry.error = _said(error, directory)
            return
        entry.passes = [dataclasses.asdict(record) for record in package.steps[len(exported.steps) :]]
        entry.precision = package.precision
        entry.size_mb = sum(p.stat().st_size for p in directory.iterdir() if ".onnx" in p.suffixes) / 1e6
        entry.operators = {
            "before": _operators(exported),
            "after": _operators(package),
        }
        # Kept without graphs: only what the manifest will say.
        self._packages[variant.name] = dataclasses.replace(package, components={}, files={})
        self.paths[variant.name] = directory

    def _transform(self, name: str, exported: ModelPackage, step: Step) -> ModelPackage:
        """Runs a variant's passes; what it begins with in common with another variant runs once."""
        from onnxsmith.graph_passes import run_passes

        package, keys = exported, self._pass_keys(name)
        others = [self._pass_keys(other) for other in self.passes if other != name]
        for number, one in enumerate(self.passes[name], 1):
            prefix = keys[:number]
            known = self._prefixes.get(prefix)
            package = known or run_passes(package, [one], context=self.context, verify=self.verify)
            if any(other[:number] == prefix for other in others):
                self._prefixes[prefix] = package
            step.advance(note=f"{name}: {one.name}")
        return package

    def _pass_keys(self, name: str) -> tuple[str, ...]:
        return tuple(f"{p.name} {json.dumps(p.arguments(), sort_keys=True)}" for p in self.passes[name])

    def _check(self, programs: Mapping[str, TorchProgram], work: Path) -> None:
        """Compares every variant with torch, and scores the text."""
        from onnxsmith.runtime import (
            compare_components,
            open_components,
            perplexity,
        )

        recipe, spec = self.recipe, self.recipe.evaluation.perplexity
        made = [v for v in self.report.variants if v.error is None]
        tokens = None
        # A text is scored by models of one graph.
        program, name = next(iter(programs.values())), next(iter(programs))
        with open_programs(programs) as reference:
            with self.step("reference") as step:
                expected = reference.expected(samples=recipe.evaluation.comparison.samples, seed=recipe.seed)
                step.note = f"{sum(map(len, expected.values()))} cases"
                keep = None
                self.report.reference = {
                    "name": f"torch {recipe.export.dtype}", "perplexity": None, "prefill_tokens_per_s": None,
                    "decode_tokens_per_s": None, "latency_ms": None, "size_mb": self._torch_mb(programs),
                }  # fmt: skip
                if spec is not None and made:
                    tokens = self._tokens(spec, self.paths[made[0].name], program.limits["input_ids"])
                    keep = _logits_file(work, spec, tokens, int(program.outputs[0].shape[-1]))  # type: ignore[index,arg-type]
                    scorer = reference.sessions[name]
                    result = perplexity(scorer, tokens, window=spec.window, keep_logits=keep)
                    self.report.reference["perplexity"] = dataclasses.asdict(result) | {
                        "data": spec.data, "data_sha256": text_sha256(self.text), "window": spec.window,
                    }  # fmt: skip
                    step.note += f", perplexity {result.value:.3f} on {result.tokens} tokens"
                if self.tasks is not None and made:
                    files = load_package(self.paths[made[0].name]).files
                    self.report.reference["task_metrics"] = self.tasks.reference(
                        program.task, reference.sessions[name], files
                    )
            with self.step("check", len(made)) as step:
                for entry in made:
                    package = load_package(self.paths[entry.name])
                    try:
                        parts = {part: package.only(part) for part in package.components}
                        with open_components(self.backend, parts, name=entry.name) as sessions:
                            entry.placement = checked_placement(
                                sessions, self.requirements, asked=self.backend.name
                            ).to_json()
                            entry.comparison = compare_components(
                                reference.sessions,
                                sessions,
                                expected,
                                tolerance=tolerance_for(entry.precision),
                                name=entry.name,
                            ).to_json()
                            if spec is not None and tokens is not None:
                                scored = perplexity(
                                    sessions[name], tokens, window=spec.window, reference_logits=keep
                                )
                                self._score(entry, scored)
                            if self.tasks is not None:
                                entry.task_metrics = self.tasks.variant(
                                    entry.name, sessions[name], package.files
                                )
                    except LackingError:
                        raise
                    except OnnxsmithError as error:
                        entry.error = _said(error, self.paths[entry.name])
                    agrees = entry.comparison is not None and entry.comparison["passed"]
                    step.advance(note=f"{entry.name}: {'agrees' if agrees else 'differs'}")

    def _score(self, entry: VariantReport, scored: Perplexity) -> None:
        entry.perplexity = dataclasses.asdict(scored)
        entry.kl_to_reference = scored.kl_to_reference
        entry.top1_agreement = scored.top1_agreement
        entry.perplexity_increase_pct = scored.increase_pct

    def _tokens(self, spec: PerplexitySpec, directory: Path, limit: int) -> Any:
        tokenizer = PackageTokenizer(load_package(directory))
        # A token is at least one byte of text, so this much text is enough, and a book is not tokenized.
        ids = np.array(tokenizer.encode(self.text[: spec.max_tokens * 16])[: spec.max_tokens], np.int64)
        if ids.size and int(ids.max()) >= limit:
            raise SourceError(
                self.recipe.source,
                got=f"its tokenizer gives id {ids.max()}",
                expected=f"below {limit}, the vocabulary",
            )
        return ids

    def _measure(self, programs: Mapping[str, TorchProgram]) -> None:
        from onnxsmith.runtime import BenchSettings, Candidate, benchmark

        spec = self.recipe.evaluation.benchmark
        made = [v for v in self.report.variants if v.error is None]
        if spec is None or not made:
            return
        if len(programs) > 1:
            with self.step("benchmark") as step:
                step.note = (
                    "not measured: a model of several graphs; see `onnxsmith bench`, which measures each"
                )
            return
        settings = BenchSettings(**spec.model_dump(exclude={"reference"}), seed=self.recipe.seed)
        candidates = [Candidate(v.name, self.paths[v.name], self.recipe.provider) for v in made]
        if spec.reference:
            candidates.append(Candidate("torch", program=next(iter(programs.values()))))
        with self.step("benchmark", (settings.runs + 1) * len(candidates)) as step:
            results = benchmark(
                candidates, settings, on_round=lambda name, n: step.advance(note=f"{name}: round {n}")
            )
            noisy = [r.name for r in results if r.noisy]
            step.note = f"{settings.runs} rounds each, in turn" + (
                f"; spread over 15 % for {', '.join(noisy)}: rerun on a quiet machine" if noisy else ""
            )
        # Not looked up by name: a variant may be called torch too.
        torch_result = results.pop() if spec.reference else None
        if torch_result is not None:
            plain = torch_result.to_json()
            for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "latency_ms"):
                self.report.reference[key] = plain[key]["p50"] if plain[key] else None
        for entry, result in zip(made, results, strict=True):
            if result.error:
                entry.error = result.error
                continue
            entry.bench = result.to_json()
            ratio = None
            if torch_result is not None and torch_result.latency_ms and result.latency_ms:
                ratio = torch_result.latency_ms.p50 / result.latency_ms.p50
            entry.bench["decode_vs_reference"] = ratio

    def _choose(self) -> VariantReport:
        budgets = self.recipe.budgets.limits()
        for entry in self.report.variants:
            values = budget_values(entry)
            entry.budgets = [
                Budget(name, limit, value := values.get(name), value is not None and value <= limit)
                for name, limit in budgets.items()
            ]
        passed = [v for v in self.report.variants if v.passed]
        if not passed:
            self.report.verdict = "no variant passes: " + "; ".join(
                f"{v.name}: {v.reason}" for v in self.report.variants
            )
            raise _NothingChosenError
        key = self.recipe.choose

        def measured(variant: VariantReport) -> float:
            value = budget_values(variant).get(key)
            return math.inf if value is None else value

        chosen = min(passed, key=measured)
        chosen.chosen = True
        self.report.chosen = chosen.name
        failed = [v.name for v in self.report.variants if not v.passed]
        least = {"size_mb": "smallest", "latency_ms": "fastest", "perplexity": "most accurate"}[key]
        kept = "keeps every budget" if budgets else "agrees with torch"
        self.report.verdict = f"{chosen.name} chosen: the {least} variant that {kept}" + (
            f" ({', '.join(failed)} {'does' if len(failed) == 1 else 'do'} not)" if failed else ""
        )
        return chosen

    def _generate(self, package: ModelPackage, prompt: str) -> dict[str, Any]:
        from onnxsmith.runtime import generate

        tokenizer = PackageTokenizer(package)
        with self.backend.open(package, name=self.recipe.name) as session:
            start = tokenizer.encode(prompt)
            ids = list(generate(session, start, max_new_tokens=_NEW_TOKENS, stop=tokenizer.stop_ids))
        return {"prompt": prompt, "text": tokenizer.continuation(start, ids), "tokens": len(ids)}

    @staticmethod
    def _torch_mb(programs: Mapping[str, TorchProgram]) -> float:
        # What components share counts once.
        parameters = {id(p): p for program in programs.values() for p in program.module.parameters()}
        return sum(p.numel() * p.element_size() for p in parameters.values()) / 1e6


def _operators(package: ModelPackage) -> dict[str, int]:
    from onnxsmith.graph_passes import operator_counts

    counts: Counter[str] = Counter()
    for component in package.components.values():
        counts.update(operator_counts(component.model))
    return dict(counts.most_common())


def _specs(variant: Variant) -> list[tuple[str, Mapping[str, Any]]]:
    """The passes of a variant, and one that keeps this machine's paths out of the artifact."""
    specs = variant.specs()
    return specs if any(name == "strip_metadata" for name, _ in specs) else [*specs, ("strip_metadata", {})]


def _said(error: OnnxsmithError, directory: Path) -> str:
    """An error without the directory of the work, which nobody finds later."""
    return str(error).replace(f"{directory}{os.sep}", "").replace(str(directory), directory.name)


def _logits_file(work: Path, spec: PerplexitySpec, tokens: Any, vocabulary: int) -> Any:
    """A file for the reference's logits: computed once, compared with every variant, not held in memory."""
    windows = -(-len(tokens) // spec.window)
    shape = (max(len(tokens) - windows, 1), vocabulary)
    require_space(work, shape[0] * shape[1] * 4, purpose="the reference's predictions")
    # Not in the directory of the variants, one of which may have this name.
    path = work.with_name("reference-logits.npy")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _write_failed(report: Report, directory: Path) -> None:
    """Leaves the report of a run in which nothing passed, beside the destination that was not touched."""
    check_report_place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_report(report, directory)
