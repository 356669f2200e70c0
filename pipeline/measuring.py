"""Measuring models of all kinds side by side: PyTorch and ONNX, on every provider, over a sweep."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.package import ModelPackage, cache_pairs
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram
    from onnxsmith.runtime import BenchResult, BenchSettings, Candidate

__all__ = ["bench_models", "sweep", "torch_program_of"]


def bench_models(
    models: Sequence[Path | str],
    settings: BenchSettings | Sequence[BenchSettings],
    *,
    providers: Sequence[str] = ("cpu",),
    components: Sequence[str] = (),
    requirements: Sequence[str] = (),
    torch_compile: bool = False,
    task: str | None = None,
    profile: bool = False,
    prompt: str = "",
    speculate: str = "off",
    on_results: Callable[[list[BenchResult]], None] | None = None,
    progress: Progress | None = None,
) -> list[BenchResult]:
    """Measures models in turn, each in a process of its own: ONNX models on each provider, others in PyTorch.

    Args:
        models: ONNX models, and sources of PyTorch models; see ``ModelSource.parse``.
        settings: How; several, such as ``sweep`` makes, are measured one after the other.
        providers: See ``choose_provider``.
        components: Of models of several graphs, which ones; all where empty.
        requirements: See ``requirements_of``. A candidate that breaks one gets an error.
        torch_compile: Whether PyTorch models run through ``torch.compile`` too.
        task: Of PyTorch models; found from the model where None.
        profile: Whether to profile ONNX candidates by operators and nodes.
        prompt: For ONNX decoders with a tokenizer, the text of the prompt, in place of random tokens.
        speculate: How ONNX decoders guess tokens; see ``LookupSettings.parse``. Unless it is ``off``, each is
            measured without it too, in turn.
        on_results: See ``benchmark``.
        progress: Who listens.

    Raises:
        OnnxsmithError: A provider is not there, or a model cannot be read.
    """
    from onnxsmith.runtime import BenchSettings, LookupSettings, benchmark, choose_provider, requirements_of

    progress = progress or Progress()
    wanted = requirements_of(requirements, providers)
    LookupSettings.parse(speculate)
    for provider in providers:
        choose_provider(provider)
    sources = [ModelSource.parse(str(model)) for model in models]
    packages = {
        model: load_package(Path(model))
        for model, source in zip(models, sources, strict=True)
        if not source.is_torch
    }
    found = {model: list(package.components) for model, package in packages.items()}
    # What a PyTorch model of several graphs consists of is asked of the ONNX models beside it.
    known = list(dict.fromkeys(name for names in found.values() for name in names))
    for name in components:
        if name not in known:
            raise UnknownNameError("bench: --component", name=name, known=known, kind="graph")
    candidates: list[Candidate] = []
    for model, source in zip(models, sources, strict=True):
        if source.is_torch:
            candidates += _torch_candidates(
                str(model), known, components, torch_compile=torch_compile, task=task
            )
        else:
            plain = _onnx_candidates(Path(model), found[model], components, providers)
            candidates += _with_prompts(plain, packages[model], prompt, speculate)
    points = [settings] if isinstance(settings, BenchSettings) else list(settings)
    rounds = sum(point.runs + 1 for point in points) * len(candidates)
    with progress.step("benchmark", rounds) as step:
        return benchmark(
            candidates,
            points,
            profile=profile,
            requirements=wanted,
            on_round=lambda name, number: step.advance(note=f"{name}: round {number}"),
            on_results=on_results,
        )


def _parts(model: str, names: Sequence[str], chosen: Sequence[str]) -> dict[str, str | None]:
    """What is measured of a model, with the name of the graph: each graph of several alone."""
    if len(names) < 2:
        return {model: None}
    return {f"{model}: {name}": name for name in names if not chosen or name in chosen}


def _onnx_candidates(
    path: Path, names: Sequence[str], chosen: Sequence[str], providers: Sequence[str]
) -> list[Candidate]:
    from onnxsmith.runtime import Candidate

    parts = _parts(str(path), names, chosen)
    return [
        Candidate(name if len(providers) == 1 else f"{name} [{provider}]", path, provider, component=part)
        for name, part in parts.items()
        for provider in providers
    ]


def _with_prompts(
    candidates: Sequence[Candidate], package: ModelPackage, prompt: str, speculate: str
) -> list[Candidate]:
    """The candidates with their prompt, and each with speculation beside it, where they are decoders."""
    decodes = len(package.components) == 1 and cache_pairs(package.main.inputs, package.main.outputs)
    if not decodes:
        return list(candidates)
    if prompt:
        ids = tuple(PackageTokenizer(package).encode(prompt))
        candidates = [dataclasses.replace(one, prompt=ids) for one in candidates]
    if speculate == "off":
        return list(candidates)
    return [
        one
        for plain in candidates
        for one in (
            plain,
            dataclasses.replace(plain, name=f"{plain.name} [{speculate}]", speculate=speculate),
        )
    ]


def _torch_candidates(
    source: str, names: Sequence[str], chosen: Sequence[str], *, torch_compile: bool, task: str | None
) -> list[Candidate]:
    from onnxsmith.runtime import Candidate

    parts = _parts(source, names, chosen)
    return [
        Candidate(
            f"{name} [{'torch.compile' if compiled else 'torch'}]",
            loader=f"{__name__}:{torch_program_of.__name__}",
            arguments={"source": source, "task": task, "component": part},
            compiled=compiled,
            component=part,
        )
        for name, part in parts.items()
        for compiled in ((False, True) if torch_compile else (False,))
    ]


def torch_program_of(source: str, task: str | None = None, component: str | None = None) -> TorchProgram:
    """The program of a PyTorch source; called by name in the process that measures it.

    Raises:
        UnknownNameError: It has no such component.
        BadInputError: It has several, and none was named.
        OnnxsmithError: It cannot be loaded.
    """
    from onnxsmith.exporters import load_torch, torch_programs

    programs = torch_programs(load_torch(ModelSource.parse(source), task=task))
    if component is None and len(programs) > 1:
        raise BadInputError(
            source, got=f"a model of {', '.join(programs)}", expected="an ONNX model of these beside it"
        )
    if component is not None and component not in programs:
        raise UnknownNameError(source, name=component, known=programs, kind="component")
    return programs[component] if component else next(iter(programs.values()))


def sweep(
    settings: BenchSettings,
    *,
    batch: Sequence[int] = (),
    prompt_tokens: Sequence[int] = (),
    threads: Sequence[int] = (),
) -> list[BenchSettings]:
    """Every combination of the given values.

    Those of one number of threads come together, because another number means that all models are opened
    again.

    Args:
        settings: All that stays the same.
        batch: Numbers of rows.
        prompt_tokens: Lengths.
        threads: Numbers of threads.

    Raises:
        BadInputError: A value that measures nothing.
    """
    counts: Sequence[int | None] = threads or (settings.threads,)
    return [
        dataclasses.replace(settings, threads=count, batch=rows, prompt_tokens=length)
        for count, rows, length in itertools.product(
            counts, batch or (settings.batch,), prompt_tokens or (settings.prompt_tokens,)
        )
    ]
