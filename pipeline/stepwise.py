"""A check after each pass: which one broke the model."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.comparison import TOLERANCES, tolerance_for
from onnxsmith.errors import CheckFailedError, LackingError, OnnxsmithError
from onnxsmith.own_operators import uses_own_operators
from onnxsmith.package import ModelPackage, StepRecord

if TYPE_CHECKING:
    from onnxsmith.comparison import Comparison, Tolerance
    from onnxsmith.runtime.graph_file import GraphFile

__all__ = ["StepVerifier"]


@dataclasses.dataclass(frozen=True)
class StepVerifier:
    """Compares the model before and after each pass, on the CPU, and runs the checker on it.

    The bounds are those of the less precise of the two, as for a comparison with PyTorch. Own operators are
    computed by their functions, in float32.

    Attributes:
        samples: How many cases of made-up inputs.
        tolerance: Bounds instead of those of the precision.
        seed: Of the inputs.
    """

    samples: int = 4
    tolerance: Tolerance | None = None
    seed: int = 0

    def __call__(self, before: ModelPackage, after: ModelPackage, step: StepRecord) -> Mapping[str, Any]:
        """Checks one step.

        Returns:
            What was compared, for the manifest.

        Raises:
            CheckFailedError: The pass broke the model; the message names it.
        """
        from onnxsmith.graph_passes.names import with_unique_names
        from onnxsmith.onnx_file import check_model
        from onnxsmith.package_io import save_package

        with tempfile.TemporaryDirectory(prefix="onnxsmith-verify-") as directory:
            written = after.derive()
            for name, component in before.components.items():
                # ONNX Runtime refuses two nodes of one name. A model may come with them: no pass is to blame.
                if with_unique_names(component.model):
                    component.path = None
                    with_unique_names(written.components[name].model)
            try:
                save_package(written, Path(directory))
                for component in written.components.values():
                    assert component.path is not None
                    check_model(component.path)
                results = {name: self._compare(before, written, name) for name in written.components}
            except LackingError:
                raise
            except CheckFailedError:
                raise
            except OnnxsmithError as error:
                raise self._broken(step, f"the model after it is broken: {error}") from error
        parts: dict[str, Any] = {}
        for name, comparison in results.items():
            if comparison is None:
                parts[name] = {"compared": False, "why": "the pass changed the outputs"}
                continue
            if not comparison.passed:
                raise self._broken(
                    step, f"the model after it differs from the one before: {comparison.reason}"
                )
            worst = comparison.worst
            parts[name] = {
                "compared": True,
                "tensors": len(comparison.tensors),
                "max_abs": None if worst is None else worst.max_abs,
            }
        return parts if len(parts) > 1 else next(iter(parts.values()), {})

    def _broken(self, step: StepRecord, what: str) -> CheckFailedError:
        return CheckFailedError(
            f"pass {step.name}",
            got=what,
            expected="the same as before it",
            remedy="Nothing was written. Leave the pass out, or report this with the model",
        )

    def _compare(self, before: ModelPackage, after: ModelPackage, name: str) -> Comparison | None:
        from onnxsmith.runtime import OrtSession, cases_for, compare_sessions, reference_outputs, value_limits

        known = {spec.name for spec in before.components[name].outputs}
        if not known & {spec.name for spec in after.components[name].outputs}:
            return None
        bounds = self.tolerance or tolerance_for(_precision(before, after))
        limits = value_limits(before)
        graphs = (before, after)
        if uses_own_operators(after.components[name].model):
            # Kernels round activations in ways of their own, and a rounded number may tip over for nothing:
            # only in float arithmetic can it be seen whether weights and graph are the same.
            graphs = (_in_floats(before, name), _in_floats(after, name))
            bounds = self.tolerance or tolerance_for("float16" if _has_halves(after, name) else "float32")
        with (
            _graph_of(graphs[0], name) as one,
            _graph_of(graphs[1], name) as two,
            OrtSession(one, name="before") as reference,
            OrtSession(two, name="after") as candidate,
        ):
            # A pass may have fixed axes: cases of the other signature would not fit. One that removed inputs
            # takes fewer than the cases have.
            narrowed = {spec.name for spec in candidate.inputs} == {spec.name for spec in reference.inputs}
            cases = cases_for(
                candidate if narrowed else reference, limits=limits, samples=self.samples, seed=self.seed
            )
            return compare_sessions(
                reference, candidate, reference_outputs(reference, cases), tolerance=bounds
            )


def _in_floats(package: ModelPackage, name: str) -> ModelPackage:
    """One graph whose products with weights in blocks do not round activations, those of kernels apart."""
    from onnxsmith.graph_passes.block_repairs import SetAccuracyLevel

    found = package.only(name).derive()
    if SetAccuracyLevel(level=1)(found.components[name].model).modified:
        found.components[name].path = None
    return found


def _has_halves(package: ModelPackage, name: str) -> bool:
    """Whether a graph computes something in float16."""
    nodes = package.components[name].model.graph.all_nodes()
    return any(
        value.dtype is not None and value.dtype.name == "FLOAT16" for n in nodes for value in n.outputs
    )


def _graph_of(package: ModelPackage, name: str) -> GraphFile:
    """A graph to run; its functions compute what it has for own operators."""
    from onnxsmith.runtime.graph_file import GraphFile

    graph = GraphFile.of(package, component=name)
    return dataclasses.replace(graph, own_operators=False) if graph.brings_operators else graph


def _precision(before: ModelPackage, after: ModelPackage) -> str:
    """Whose bounds apply: those of the less precise one."""
    order = list(TOLERANCES)
    precisions = {package.precision for package in (before, after)}
    if len(precisions) == 1 and not precisions & {"float64", "float32"}:
        # Nothing was rounded by this pass; but what is rounded in both may tip over to the next number.
        return "float16"
    return max(precisions, key=order.index)
