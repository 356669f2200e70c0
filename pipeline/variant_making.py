"""Making variants: an exported model, a list of passes, and a directory with what comes of it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsmith.errors import LackingError, OnnxsmithError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import save_package
from onnxsmith.pipeline.report import VariantReport
from onnxsmith.progress import Step

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.graph_passes.context import PassContext
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.pipeline.stepwise import StepVerifier

__all__ = ["Made", "VariantMaker", "error_text", "passes_of"]


@dataclasses.dataclass
class Made:
    """A variant, and what is known of it so far.

    Attributes:
        report: What was done to it; whoever checks and measures it adds what was found.
        directory: Its files; nothing of use is there where ``report.error`` is set.
        package: Task, source and steps, without graphs; None where it could not be made.
    """

    report: VariantReport
    directory: Path
    package: ModelPackage | None = None

    @property
    def failed(self) -> bool:
        """Whether it could not be made, checked or measured."""
        return self.report.error is not None


def passes_of(specs: Iterable[PassSpec]) -> list[GraphPass]:
    """The passes of a variant, and one that keeps this machine's paths out of the artifact.

    Raises:
        UnknownNameError: An unknown pass or parameter.
        BadInputError: A parameter of the wrong type or outside its range.
    """
    from onnxsmith.graph_passes import make_passes

    wanted = list(specs)
    if not any(name == "strip_metadata" for name, _ in wanted):
        wanted.append(("strip_metadata", {}))
    return make_passes(wanted)


class VariantMaker:
    """Makes variants of one exported model; what several of them begin with runs once."""

    def __init__(
        self,
        exported: ModelPackage,
        work: Path,
        *,
        context: PassContext,
        provider: str,
        verify: StepVerifier | None = None,
    ) -> None:
        """Takes what all variants have in common.

        Args:
            exported: What the passes start from; it is not changed.
            work: Where each variant gets a directory of its name.
            context: What passes need besides the graph.
            provider: What the variants will run on, for their reports.
            verify: Checks the model after each pass.
        """
        self._exported, self._work = exported, work
        self._context, self._provider, self._verify = context, provider, verify
        self._prefixes: dict[tuple[str, ...], ModelPackage] = {}

    def make(
        self,
        name: str,
        passes: Sequence[GraphPass],
        *,
        later: Iterable[Sequence[GraphPass]] = (),
        step: Step | None = None,
    ) -> Made:
        """Runs passes and writes the result. One that cannot be made is a result too.

        Args:
            name: What to call it; a file name.
            passes: What to do, see ``passes_of``.
            later: Passes of variants that are still to be made: what they begin with in common is kept.
            step: Advanced by one for each pass.

        Raises:
            LackingError: Memory, disk or a package is missing; no other variant would do better.
        """
        made = Made(VariantReport(name, provider=self._provider), self._work / name)
        made.directory.mkdir()
        from onnxsmith.graph_passes.weight_bits import weight_bits

        try:
            package = self._transform(name, passes, [_keys(other) for other in later], step or Step(name))
            save_package(package, made.directory)
        except LackingError:
            raise
        except OnnxsmithError as error:
            made.report.error = error_text(error, made.directory)
            return made
        entry = made.report
        entry.passes = [dataclasses.asdict(record) for record in package.steps[len(self._exported.steps) :]]
        entry.precision = package.precision
        entry.size_mb = sum(p.stat().st_size for p in made.directory.iterdir() if ".onnx" in p.suffixes) / 1e6
        entry.weights = [
            {"component": part, **weight}
            for part, component in package.components.items()
            for weight in weight_bits(component.model)
        ]
        entry.operators = {"before": _operators(self._exported), "after": _operators(package)}
        # Kept without graphs: only what the manifest will say.
        made.package = dataclasses.replace(package, components={}, files={})
        return made

    def _transform(
        self, name: str, passes: Sequence[GraphPass], later: Sequence[tuple[str, ...]], step: Step
    ) -> ModelPackage:
        from onnxsmith.graph_passes import run_passes

        package, keys = self._exported, _keys(passes)
        for number, one in enumerate(passes, 1):
            prefix = keys[:number]
            known = self._prefixes.get(prefix)
            package = known or run_passes(package, [one], context=self._context, verify=self._verify)
            self._prefixes[prefix] = package
            step.advance(note=f"{name}: {one.name}")
        self._prefixes = {
            prefix: package
            for prefix, package in self._prefixes.items()
            if any(other[: len(prefix)] == prefix for other in later)
        }
        return package


def error_text(error: OnnxsmithError, directory: Path) -> str:
    """An error without the directory of the work, which nobody finds later."""
    return str(error).replace(f"{directory}{os.sep}", "").replace(str(directory), directory.name)


def _keys(passes: Sequence[GraphPass]) -> tuple[str, ...]:
    return tuple(f"{p.name} {json.dumps(p.arguments(), sort_keys=True)}" for p in passes)


def _operators(package: ModelPackage) -> dict[str, int]:
    from onnxsmith.graph_passes import operator_counts

    counts: Counter[str] = Counter()
    for component in package.components.values():
        counts.update(operator_counts(component.model))
    return dict(counts.most_common())
