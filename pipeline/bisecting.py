"""Where a model leaves its reference, which node is to blame, and a small model that shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsmith.errors import BadInputError
from onnxsmith.package import reads_lengths
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.staging import check_destination, staged_directory
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.comparison import Tolerance
    from onnxsmith.package import ModelPackage
    from onnxsmith.runtime import Case, Divergence, Reference

__all__ = ["bisect_models", "decisive_cases", "open_traceable"]

# Which of the made-up cases tell most: padding, a cache, a cache with padding, several new tokens.
_DECODER_ORDER = (3, 5, 1, 6, 2, 4, 0, 7)
_PLAIN_ORDER = (1, 4, 0, 3, 2)
_SAMPLES = 4


def bisect_models(
    reference: str,
    candidate: Path,
    *,
    component: str | None = None,
    provider: str = "cpu",
    samples: int | None = None,
    inputs: Path | None = None,
    output: Path | None = None,
    tolerance: Tolerance | None = None,
    task: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    on_interrupt: Callable[[], None] | None = None,
) -> Divergence:
    """Finds the first tensors that diverge, and the nodes that make the error rather than pass it on.

    Args:
        reference: A source of a PyTorch model, or an ONNX model, which then runs on the CPU.
        candidate: An artifact or ONNX file.
        component: Which graph, where the candidate has several; that of the same name of the reference.
        provider: Execution provider of the candidate.
        samples: Number of made-up cases; 4 where None.
        inputs: An ``.npz`` file with one array for each input, in place of made-up cases.
        output: A directory for the smallest model and inputs that show the worst node's error, with a
            script; it must not exist, or be
            empty. Nothing is written where None, or where nothing diverges.
        tolerance: Bounds; by the candidate's precision where None.
        task: For a PyTorch reference.
        seed: Of the made-up inputs.
        threads: Threads of an operator.
        progress: Who listens.
        on_interrupt: Called where Ctrl-C ended the search; see ``find_divergence``. Nothing is written to
            ``output`` then.

    Raises:
        OnnxsmithError: A side cannot be read or run.
    """
    from onnxsmith.runtime import OrtBackend, find_divergence

    progress = progress or Progress()
    if samples is not None and samples < 1:
        raise BadInputError("bisect: --samples", got=str(samples), expected="at least 1")
    if output is not None:
        check_destination(output, force=False)
    backend = OrtBackend(provider, threads=threads, record=True)
    package = load_package(candidate)
    package = _one_graph(package, component, candidate)
    with progress.step("bisect") as step, open_traceable(reference, task, component) as (right, limits):
        _require_inputs(right, package, candidate, reference)
        lengths = right.session.reads_lengths or reads_lengths(package.main.model)
        cases = _cases(right, limits, samples or _SAMPLES, inputs, seed, lengths=lengths)
        right.release()

        def run(directory: Path | None) -> Divergence:
            return find_divergence(
                right,
                package,
                backend,
                cases,
                name=str(candidate),
                tolerance=tolerance,
                unoptimized=OrtBackend(provider, threads=threads, optimize=False),
                reproduce_in=directory,
                on_progress=lambda note: step.advance(0, note=note),
                on_interrupt=on_interrupt,
            )

        if output is None:
            return run(None)
        with _kept_if_filled(output) as directory:
            found = run(directory)
            if found.interrupted:
                for path in directory.iterdir():
                    path.unlink()
            return found


def _require_inputs(right: Reference, package: ModelPackage, candidate: Path, reference: str) -> None:
    """Two models of other inputs are no two forms of one model."""
    theirs = [spec.name for spec in right.session.inputs]
    missing = [spec.name for spec in package.main.inputs if spec.name not in theirs]
    if missing:
        raise BadInputError(
            f"bisect: {candidate}",
            got=f"the inputs {', '.join(missing[:4])}, which {reference} does not take",
            expected=f"two forms of one model: {', '.join(theirs[:4])}",
        )


def _one_graph(package: ModelPackage, component: str | None, path: Path | str) -> ModelPackage:
    """The package with the graph that is meant.

    Raises:
        BadInputError: It has several and none is named, or none of that name.
    """
    names = ", ".join(package.components)
    if component is None:
        if len(package.components) == 1:
            return package
        raise BadInputError(
            f"bisect: {path}",
            got=f"a package with the graphs {names}",
            expected="one graph",
            remedy=f"Name one: --component {next(iter(package.components))}",
        )
    if component not in package.components:
        raise BadInputError(f"bisect: {path}: --component", got=repr(component), expected=f"one of {names}")
    return package.only(component)


@contextlib.contextmanager
def _kept_if_filled(output: Path) -> Iterator[Path]:
    """A directory that takes the place of ``output`` where something was written to it."""
    with contextlib.suppress(_NothingWrittenError), staged_directory(output, force=False) as staging:
        yield staging
        if not any(staging.iterdir()):
            raise _NothingWrittenError


class _NothingWrittenError(Exception):
    """Nothing diverges, so there is nothing to show."""


@contextlib.contextmanager
def open_traceable(
    reference: str, task: str | None, component: str | None = None
) -> Iterator[tuple[Reference, Mapping[str, int]]]:
    """Opens a reference so that its intermediate tensors can be had; with the limits of its inputs.

    Where it has several graphs, ``component`` names one.

    Raises:
        OnnxsmithError: It cannot be read.
    """
    from onnxsmith.runtime import GraphReference, OrtBackend, TorchBackend, TorchReference, value_limits

    source = ModelSource.parse(reference)
    if source.is_torch:
        from onnxsmith.exporters import load_torch, torch_program, torch_programs

        loaded = load_torch(source, task=task)
        if component is None:
            program = torch_program(loaded)
        else:
            programs = torch_programs(loaded)
            if component not in programs:
                raise BadInputError(
                    f"bisect: {reference}: --component", got=repr(component),
                    expected=f"one of {', '.join(programs)}",
                )  # fmt: skip
            program = programs[component]
        with TorchBackend().open(program, name=reference) as session:
            yield TorchReference(session, program), program.limits
        return
    assert source.path is not None
    package = load_package(source.path)
    if component is not None and len(package.components) > 1:
        package = _one_graph(package, component, reference)
    with OrtBackend().open(package, name=reference) as opened:
        yield GraphReference(opened, package, OrtBackend()), value_limits(package)


def _cases(
    reference: Reference,
    limits: Mapping[str, int],
    samples: int,
    inputs: Path | None,
    seed: int,
    *,
    lengths: bool,
) -> Sequence[Case]:
    from onnxsmith.runtime import load_cases
    from onnxsmith.runtime.row_lengths import fits_lengths

    if inputs is None:
        return decisive_cases(reference, limits, samples, seed, left_padding=not lengths)
    cases = load_cases(inputs, reference.session.inputs)
    for case in cases:
        reference.session.check(case.feeds)
    for case in cases if lengths else ():
        mask, ids = case.feeds.get("attention_mask"), case.feeds.get("input_ids")
        if mask is not None and ids is not None and not fits_lengths(mask.astype(bool), ids.shape[1]):
            raise BadInputError(
                f"bisect: {inputs}: attention_mask",
                got="padding that is not at the end of a prompt",
                expected="none, because attention takes lengths of rows in one of the two",
            )
    return cases


def decisive_cases(
    reference: Reference, limits: Mapping[str, int], samples: int, seed: int, *, left_padding: bool = True
) -> Sequence[Case]:
    """The made-up cases that tell most, those first that do so by themselves; see ``cases_for``."""
    from onnxsmith.runtime import cases_for

    made = list(cases_for(reference.session, limits=limits, seed=seed, left_padding=left_padding))
    order = _DECODER_ORDER if reference.session.cache else _PLAIN_ORDER
    return [made[number] for number in order if number < len(made)][:samples]
