"""What candidates are compared with: a PyTorch or ONNX model, open, with inputs that fit it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsmith.comparison import Comparison, Tolerance
from onnxsmith.errors import BadInputError, CheckFailedError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.program import AxisSizes, TorchProgram
    from onnxsmith.runtime import Case, OrtBackend, Placement, Requirement, Session
    from onnxsmith.runtime.components import Expected

__all__ = [
    "Reference",
    "checked_placement",
    "compare_package",
    "fixed_sizes",
    "open_programs",
    "open_reference",
]


@dataclasses.dataclass
class Reference:
    """A model that is right, open.

    Attributes:
        sessions: By component, in the order in which they run.
        limits: By component, for integer inputs, one above the highest valid value.
        axis_limits: By component, for dynamic axes, the sizes that run.
    """

    sessions: Mapping[str, Session]
    limits: Mapping[str, Mapping[str, int]]
    axis_limits: Mapping[str, Mapping[str, AxisSizes]] = dataclasses.field(default_factory=dict)

    def expected(
        self,
        *,
        samples: int | None = None,
        seed: int = 0,
        inputs: Path | None = None,
        candidates: Sequence[ModelPackage] = (),
    ) -> Expected:
        """Runs the model on made-up inputs of several shapes, or on those of a file.

        Args:
            samples: How many made-up cases; all kinds where None.
            seed: Of the made-up inputs.
            inputs: An ``.npz`` file with one array for each input.
            candidates: Axes that these have fixed have their sizes in the made-up inputs.

        Raises:
            BadInputError: A file of inputs for a model of several graphs.
            FeedError: The file does not fit the model.
        """
        from onnxsmith.runtime import expected_outputs, load_cases, reference_outputs

        if inputs is None:
            return expected_outputs(
                self.sessions,
                limits=self.limits,
                samples=samples,
                seed=seed,
                axis_limits=self.axis_limits,
                fixed=fixed_sizes(candidates),
                on_refused=_say_refused if not self.axis_limits else None,
            )
        if len(self.sessions) > 1:
            raise BadInputError(
                str(inputs),
                got=f"one file of inputs for the components {', '.join(self.sessions)}",
                expected="a model of one graph",
                remedy="Leave it out, and inputs are made up",
            )
        ((name, session),) = self.sessions.items()
        return {name: reference_outputs(session, load_cases(inputs, session.inputs))}


def _say_refused(case: Case, why: str) -> None:
    from onnxsmith.pipeline.console import message

    message(f"onnxsmith: inputs of {case.name} are left out, because the reference does not run them: {why}")


@contextlib.contextmanager
def open_programs(programs: Mapping[str, TorchProgram], *, name: str = "") -> Iterator[Reference]:
    """Opens a PyTorch model."""
    from onnxsmith.runtime import TorchBackend, open_components

    with open_components(TorchBackend(), programs, name=name) as sessions:
        yield Reference(
            sessions,
            {key: program.limits for key, program in programs.items()},
            {key: program.axis_limits for key, program in programs.items()},
        )


@contextlib.contextmanager
def open_reference(text: str, *, task: str | None = None) -> Iterator[Reference]:
    """Opens what a user named: a source of a PyTorch model, or an ONNX model, which runs on the CPU."""
    from onnxsmith.exporters import load_torch, torch_programs
    from onnxsmith.runtime import OrtBackend, open_components, value_limits

    source = ModelSource.parse(text)
    if source.is_torch:
        with open_programs(torch_programs(load_torch(source, task=task)), name=text) as reference:
            yield reference
        return
    assert source.path is not None
    package = load_package(source.path)
    parts = {name: package.only(name) for name in package.components}
    with open_components(OrtBackend(), parts, name=text) as sessions:
        yield Reference(sessions, {name: value_limits(part) for name, part in parts.items()})


def compare_package(
    reference: Reference,
    expected: Expected,
    package: ModelPackage,
    backend: OrtBackend,
    *,
    tolerance: Tolerance,
    name: str,
    requirements: Sequence[Requirement] = (),
) -> Comparison:
    """Compares a package on one execution provider.

    A provider that got no node of one of its graphs, or breaks a requirement, and a process that dies are a
    comparison that failed, and nobody else's.
    """
    from onnxsmith.runtime import compare_components, open_components

    parts = {part: package.only(part) for part in package.components}
    result: Comparison | None = None
    placement: Placement | None = None
    error = ""
    try:
        with open_components(backend, parts, name=name) as sessions:
            placement = checked_placement(sessions, requirements, asked=backend.name)
            result = compare_components(
                reference.sessions, sessions, expected, tolerance=tolerance, name=name
            )
    except CheckFailedError as problem:
        error = str(problem)
    if result is None:
        first = next(iter(reference.sessions.values())).name.partition(": ")[0]
        result = Comparison(first, name, backend.name, tolerance, (), error)
    if placement is None:
        return result
    return dataclasses.replace(
        result, placement=placement.to_json(), placement_by_graph=placement.graphs_to_json()
    )


def checked_placement(
    sessions: Mapping[str, Session], requirements: Sequence[Requirement] = (), *, asked: str = ""
) -> Placement:
    """Where the graphs of a model run, if their provider got nodes of each and keeps what is required of it.

    Args:
        sessions: By component.
        requirements: What must hold of all graphs taken together.
        asked: What the user called the provider; see ``check_requirements``.

    Raises:
        CheckFailedError: It does not.
    """
    from onnxsmith.runtime import OrtSession, Placement, WorkerSession, check_requirements

    measured = any(requirement.measure != "nodes" for requirement in requirements)
    opened = {n: s for n, s in sessions.items() if isinstance(s, OrtSession | WorkerSession)}
    graphs = {name: session.check_placement(measured=measured) for name, session in opened.items()}
    placement = next(iter(graphs.values())) if len(graphs) == 1 else Placement.merged(graphs)
    for session in list(opened.values())[:1]:
        name = session.name if len(opened) == 1 else session.name.rpartition(": ")[0] or session.name
        check_requirements(placement, requirements, name=name, provider=session.provider, asked=asked)
    return placement


def fixed_sizes(packages: Sequence[ModelPackage]) -> dict[str, dict[str, tuple[int | None, ...]]]:
    """By component and input, the sizes of axes that one of the packages has fixed; None for the others."""
    found: dict[str, dict[str, tuple[int | None, ...]]] = {}
    for package in packages:
        for part, component in package.components.items():
            table = found.setdefault(part, {})
            for spec in component.inputs:
                axes = tuple(axis if isinstance(axis, int) else None for axis in spec.shape or ())
                known = table.get(spec.name, axes)
                table[spec.name] = tuple(a if a is not None else b for a, b in zip(known, axes, strict=False))
    return found
