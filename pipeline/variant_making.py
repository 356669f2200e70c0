"""Making variants: an exported model, a list of passes, and a directory with what comes of it."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import LackingError, OnnxsmithError
from onnxsmith.onnx_file import weight_bytes
from onnxsmith.package import ModelPackage, StepRecord
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.artifact import to_plain
from onnxsmith.pipeline.report import VariantReport
from onnxsmith.pipeline.run_steps import RunSteps
from onnxsmith.pipeline.step_keys import StepKey, machine, pass_identity, step_key
from onnxsmith.progress import Step

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.graph_passes.context import PassContext
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.pipeline.stepwise import StepVerifier

__all__ = ["Made", "VariantMaker", "error_text", "keep_package", "kept_package", "passes_of"]

# The run may be killed, and another variant begin in the same way: what a pass made is worth its disk space
# if it took longer than this, and than to write, read and hash it, at so many bytes a second.
WORTH_KEEPING_S, KEPT_BYTES_PER_S = 2.0, 100e6


@dataclasses.dataclass
class Made:
    """A variant, and what is known of it so far.

    Attributes:
        report: What was done to it; whoever checks and measures it adds what was found.
        directory: Its files; nothing of use is there where ``report.error`` is set.
        package: Task, source and steps, without graphs; None where it could not be made.
        key: Its address in the cache.
        ours: Whether the files go with this run; others may be using them where not.
    """

    report: VariantReport
    directory: Path
    package: ModelPackage | None = None
    key: StepKey | None = None
    ours: bool = False

    @property
    def failed(self) -> bool:
        """Whether it could not be made, checked or measured."""
        return self.report.error is not None

    def files(self) -> list[Path]:
        """What belongs into an artifact."""
        return [path for path in sorted(self.directory.iterdir()) if not path.name.startswith(".")]


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


def keep_package(package: ModelPackage, directory: Path) -> dict[str, Any]:
    """Writes a package, which stays as it is, to a directory that will have another name later.

    Returns:
        What the files do not say, as plain data.
    """
    save_package(package.derive(), directory)
    return {
        "task": package.task,
        "source": dict(package.source),
        "steps": [dataclasses.asdict(step) for step in package.steps],
        "files": sorted(package.files),
    }


def kept_package(directory: Path, facts: Mapping[str, Any]) -> ModelPackage:
    """The package that ``keep_package`` wrote."""
    package = load_package(directory)
    package.task, package.source = facts["task"], facts["source"]
    package.steps = tuple(
        StepRecord(s["name"], s["parameters"], s["seconds"], s["details"]) for s in facts["steps"]
    )
    package.files = {name: (directory / name).read_bytes() for name in facts["files"]}
    return package


class VariantMaker:
    """Makes variants of one exported model; what several of them begin with runs once."""

    def __init__(
        self,
        exported: ModelPackage,
        export_key: StepKey,
        steps: RunSteps,
        *,
        context: PassContext,
        gguf: str | None = None,
        provider: str,
        verify: StepVerifier | None = None,
    ) -> None:
        """Takes what all variants have in common.

        Args:
            exported: What the passes start from; it is not changed.
            export_key: Its address.
            steps: Where variants are found and left.
            context: What passes need besides the graph.
            gguf: The hash of the GGUF file in the context.
            provider: What the variants will run on, for their reports.
            verify: Checks the model after each pass.
        """
        self._exported, self._steps = exported, steps
        self._context, self._provider, self._verify = context, provider, verify
        self._from = {
            "export": export_key.digest,
            "gguf": gguf,
            "calibration": dict(context.calibration),
            # Activations are computed here.
            "machine": machine() if context.activations is not None else None,
            "verified": verify is not None,
        }
        self._prefixes: dict[str, ModelPackage] = {}

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
            name: What to call it.
            passes: What to do, see ``passes_of``.
            later: Passes of variants that are still to be made: what they begin with in common is kept.
            step: Advanced by one for each pass.

        Raises:
            LackingError: Memory, disk or a package is missing; no other variant would do better.
        """
        from onnxsmith.graph_passes.weight_bits import weight_bits

        step = step or Step(name)
        entry = VariantReport(name, provider=self._provider)
        prefixes, key = self._keys(passes)
        place = Path()

        def fill(directory: Path) -> dict[str, Any]:
            nonlocal place
            place = directory
            package = self._transform(name, passes, prefixes, step)
            facts = keep_package(package, directory)
            own = facts["steps"][len(self._exported.steps) :]
            size = sum(p.stat().st_size for p in directory.iterdir() if ".onnx" in p.suffixes)
            operators = {"before": _operators(self._exported), "after": _operators(package)}
            weights = [
                {"component": part, **weight}
                for part, component in package.components.items()
                for weight in weight_bits(component.model)
            ]
            return facts | {
                "passes": own, "precision": package.precision, "size_mb": size / 1e6, "operators": operators,
                "weights": weights,
            }  # fmt: skip

        try:
            found = self._steps.result(key, fill, expected_bytes=_package_bytes(self._exported))
        except LackingError:
            raise
        except OnnxsmithError as error:
            entry.error = error_text(error, place)
            return Made(entry, place)
        finally:
            self._forget(later)
        if found.hit:
            step.advance(len(passes), note=f"{name}: from the cache")
            entry.from_cache.append("made")
        facts = found.facts
        entry.passes, entry.precision = list(facts["passes"]), facts["precision"]
        entry.size_mb, entry.operators = facts["size_mb"], dict(facts["operators"])
        entry.weights = list(facts["weights"])
        # Kept without graphs: only what the manifest will say.
        package = dataclasses.replace(kept_package(found.directory, facts), components={}, files={})
        return Made(entry, found.directory, package, key, self._steps.is_ours(found))

    def _keys(self, passes: Sequence[GraphPass]) -> tuple[list[StepKey], StepKey]:
        """The addresses of what comes of the first pass, the first two, and so on, and of the variant."""
        told = [to_plain(pass_identity(one)) for one in passes]

        def key(kind: str, count: int) -> StepKey:
            names = " > ".join(one.name for one in passes[:count])
            summary = f"{self._exported.source.get('text', '?')}: {names}"
            return step_key(kind, **self._from, passes=told[:count], summary=summary)

        return [key("passes", count) for count in range(1, len(passes))], key("variant", len(passes))

    def _transform(
        self, name: str, passes: Sequence[GraphPass], keys: Sequence[StepKey], step: Step
    ) -> ModelPackage:
        from onnxsmith.graph_passes import run_passes

        package, done = self._longest_prefix(keys)
        step.advance(done)
        for number, one in enumerate(passes[done:], done + 1):
            package = run_passes(package, [one], context=self._context, verify=self._verify)
            if number < len(passes):
                package = self._kept_prefix(keys[number - 1], package)
                self._prefixes[keys[number - 1].digest] = package
            step.advance(note=f"{name}: {one.name}")
        return package

    def _longest_prefix(self, keys: Sequence[StepKey]) -> tuple[ModelPackage, int]:
        """What is known of the first passes: the result of as many as possible, and how many these are."""
        for number, key in reversed(list(enumerate(keys, 1))):
            known = self._prefixes.get(key.digest)
            if known is not None:
                return known, number
            found = self._steps.open(key)
            if found is not None:
                package = kept_package(found.directory, found.facts)
                self._prefixes[key.digest] = package
                return package, number
        return self._exported, 0

    def _kept_prefix(self, key: StepKey, package: ModelPackage) -> ModelPackage:
        size = _package_bytes(package)
        worth = package.steps[-1].seconds >= max(WORTH_KEEPING_S, size / KEPT_BYTES_PER_S)
        if not worth or not self._steps.keeps(size):
            return package
        found = self._steps.result(key, lambda place: keep_package(package, place), expected_bytes=size)
        return kept_package(found.directory, found.facts)

    def _forget(self, later: Iterable[Sequence[GraphPass]]) -> None:
        wanted = {key.digest for passes in later for key in self._keys(passes)[0]}
        self._prefixes = {key: package for key, package in self._prefixes.items() if key in wanted}


def error_text(error: OnnxsmithError, directory: Path) -> str:
    """An error without the directory of the work, which nobody finds later."""
    return str(error).replace(f"{directory}{os.sep}", "").replace(str(directory), directory.name)


def _package_bytes(package: ModelPackage) -> int:
    return sum(weight_bytes(component.model) for component in package.components.values())


def _operators(package: ModelPackage) -> dict[str, int]:
    from onnxsmith.graph_passes import operator_counts

    counts: Counter[str] = Counter()
    for component in package.components.values():
        counts.update(operator_counts(component.model))
    return dict(counts.most_common())
