"""The command ``export``: from any source to an artifact that was checked before it was accepted."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.comparison import Comparison, tolerance_for
from onnxsmith.errors import BadInputError, CheckFailedError
from onnxsmith.onnx_file import check_model, weight_bytes
from onnxsmith.package import MAIN, Component, ModelPackage, StepRecord
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.artifact import write_manifest
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.references import compare_package, open_programs, open_reference
from onnxsmith.pipeline.silencing import draws_numbers, silenced
from onnxsmith.pipeline.staging import check_destination, require_space, staged_directory
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource, SourceKind

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.graph_passes.rounded_ahead import RoundedAhead
    from onnxsmith.program import TorchProgram

__all__ = ["LayerCleanup", "export_model"]

# 4 bits and a scale, of 32: less is hardly made of weights.
_SMALLEST_SHARE = 0.15


class LayerCleanup:
    """Cleans the layers of a decoder that were traced, before the others are copied from them.

    What takes seconds for a whole decoder takes a tenth of that for one layer.
    """

    def __init__(self) -> None:
        self.steps: tuple[StepRecord, ...] = ()

    def __call__(self, model: ir.Model) -> ir.Model:
        """All of the preset but what turns weights, which are each layer's own."""
        from onnxsmith.graph_passes import PRESETS, make_passes, run_passes

        wanted = [spec for spec in PRESETS["clean"] if spec[0] != "transpose_weights"]
        part = run_passes(ModelPackage({MAIN: Component(model)}), make_passes(wanted))
        self.steps = tuple(
            dataclasses.replace(step, details={**step.details, "of": "one layer of each kind"})
            for step in part.steps
        )
        return part.main.model

    def finish(self, package: ModelPackage) -> ModelPackage:
        """What is left to do of the preset; all of it where the decoder was traced as a whole."""
        from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
        from onnxsmith.graph_passes.cleanup import folds_anything

        if not self.steps:
            return run_passes(package, make_passes(PRESETS["clean"]))
        package.steps = (*package.steps, *self.steps)
        package = run_passes(package, make_passes([("transpose_weights", {})]))
        if any(folds_anything(component.model) for component in package.components.values()):
            package = run_passes(package, make_passes([("cleanup", {})]))
        return package


def export_model(
    source: str,
    destination: Path,
    *,
    task: str | None = None,
    dtype: str = "float32",
    attention: str = "auto",
    opset: int | None = None,
    tracing: str = "auto",
    exporter: str = "auto",
    adapter: str = "merge",
    specs: Sequence[PassSpec] = (),
    calibration: CalibrationData | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[ModelPackage, Comparison | None]:
    """Exports a PyTorch model to an artifact, and compares it with the PyTorch model before it is accepted.

    With passes, what is compared is the graph before them, and the artifact holds what they make of it. What
    they cost in accuracy is for ``evaluate`` and recipes to measure.

    Args:
        source: See ``ModelSource.parse``. An ONNX model is cleaned, and compared with what it was.
        destination: Where the artifact is to be.
        task: A task of ``onnxsmith.exporters.TASKS``; found from the model where None.
        dtype: The element type of the weights.
        attention: See ``onnxsmith.exporters.export``.
        opset: Version of the ONNX operator set; torch's default where None.
        tracing: How decoders are traced; see ``onnxsmith.exporters.export``.
        exporter: See ``onnxsmith.exporters.export_by``.
        adapter: See ``onnxsmith.exporters.load_torch``.
        specs: Names and parameters of passes to run on the exported graph.
        calibration: What passes that look at activations run the model on.
        verify: Whether to compare. Without, the manifest says that nothing was compared.
        force: Whether an artifact that is there may be replaced.
        progress: Who listens.

    Raises:
        CheckFailedError: The ONNX model does not compute what the PyTorch model does; nothing was written.
        OnnxsmithError: It could not be done.
    """
    from onnxsmith.exporters import export_by, load_torch, torch_programs
    from onnxsmith.graph_passes import make_passes, run_passes

    progress = progress or Progress()
    passes = make_passes(specs)
    check_destination(destination, force=force)
    parsed = ModelSource.parse(source)
    if not parsed.is_torch:
        if passes:
            raise BadInputError(
                "export: --preset and --pass",
                got=f"{source}, which is an ONNX model",
                expected="a PyTorch model",
                remedy="Use `onnxsmith optimize`",
            )
        return _adopt_onnx(parsed, destination, verify=verify, force=force, progress=progress)
    with contextlib.ExitStack() as stack:
        # What is compared is written and mapped from there, and no longer known by its place in the source.
        foreseen = () if verify or dtype != "float32" else passes
        ahead = stack.enter_context(_rounding_ahead(parsed, foreseen, destination.resolve().parent))
        with progress.step("load"):
            loaded = load_torch(parsed, task=task, dtype=dtype, lazy=True, adapter=adapter)
        size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
        if passes and not verify:
            # Only what the passes make of it is written.
            size = int(size * _SMALLEST_SHARE)
        require_space(destination.resolve().parent, size, purpose=f"export of {source}")
        with progress.step("export"):
            programs = torch_programs(loaded)
            cleanup = LayerCleanup()
            package, programs = export_by(
                exporter, loaded, programs, attention=attention, opset=opset, tracing=tracing, tidy=cleanup
            )
        with progress.step("clean up"):
            package = cleanup.finish(package)
        comparison, noisy = None, draws_numbers(package)
        staging = stack.enter_context(staged_directory(destination, force=force))
        hashes: dict[Path, str] = {}
        if verify or not passes:
            written = staging
            if passes:
                beside = tempfile.TemporaryDirectory(dir=staging.parent, prefix=f"{staging.name}-before-")
                written = Path(stack.enter_context(beside))
            save_package(package, written, hashes=hashes)
            _check_structure(package)
        if verify:
            with progress.step("compare"):
                comparison = _compare(programs, package, source, noisy=noisy)
        if passes:
            with progress.step("optimize", len(passes)) as step:
                package = run_passes(
                    package,
                    passes,
                    on_step=lambda record: step.advance(note=record.name),
                    context=dataclasses.replace(context_for(parsed, package, calibration), ahead=ahead),
                )
            hashes = {}
            save_package(package, staging, hashes=hashes)
            _check_structure(package)
        summary = _summary(comparison)
        if noisy:
            summary["random_numbers"] = "compared with their means in their place"
        if passes and verify:
            summary["of"] = "the graph before the passes"
        write_manifest(package, staging, measurements={"comparison": summary}, hashes=hashes)
    return package, comparison


def _rounding_ahead(
    source: ModelSource, passes: Sequence[GraphPass], directory: Path
) -> contextlib.AbstractContextManager[RoundedAhead | None]:
    """Rounds the weights of a directory while it is exported, if passes will ask for it."""
    from onnxsmith.exporters.stored_weights import stored_matrices
    from onnxsmith.graph_passes.rounded_ahead import rounding_ahead

    known = passes and source.kind is SourceKind.HUGGING_FACE_DIRECTORY and source.path is not None
    matrices = stored_matrices(source.path) if known and source.path else []
    return rounding_ahead(matrices, passes, directory=directory)


def _compare(
    programs: Mapping[str, TorchProgram], package: ModelPackage, source: str, *, noisy: bool
) -> Comparison:
    """Compares a package on disk with PyTorch.

    Raises:
        CheckFailedError: They differ.
    """
    from onnxsmith.exporters.randomness import without_randomness
    from onnxsmith.runtime import OrtBackend

    if noisy:
        programs = {name: without_randomness(program) for name, program in programs.items()}
    candidate = silenced(package) if noisy else package
    with open_programs(programs, name=source) as reference:
        expected = reference.expected(candidates=[candidate])
    # PyTorch has answered and lets go of its weights before ONNX Runtime reads them.
    comparison = compare_package(
        reference, expected, candidate, OrtBackend(), tolerance=tolerance_for(package.precision), name=source
    )
    if not comparison.passed:
        raise CheckFailedError(
            f"export of {source}",
            got=comparison.reason,
            expected="what PyTorch computes",
            remedy="Nothing was written. Keep it all the same with --no-verify, and look at it with "
            "`onnxsmith compare`",
        )
    return comparison


def _adopt_onnx(
    source: ModelSource, destination: Path, *, verify: bool, force: bool, progress: Progress
) -> tuple[ModelPackage, Comparison | None]:
    """Makes an artifact of an ONNX model of any origin, compared with that model."""
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
    from onnxsmith.runtime import OrtBackend

    assert source.path is not None
    with progress.step("load"):
        before = load_package(source.path)
    size = sum(weight_bytes(c.model) for c in before.components.values())
    require_space(destination.resolve().parent, size, purpose=f"export of {source.text}")
    with progress.step("clean up"):
        package = run_passes(before, make_passes(PRESETS["clean"]))
    package.source = package.source or {"kind": str(source.kind), "text": source.text}
    comparison = None
    with staged_directory(destination, force=force) as staging:
        hashes: dict[Path, str] = {}
        save_package(package, staging, hashes=hashes)
        _check_structure(package)
        if verify:
            with progress.step("compare"), open_reference(str(source.path)) as reference:
                comparison = compare_package(
                    reference,
                    reference.expected(candidates=[package]),
                    package,
                    OrtBackend(),
                    tolerance=tolerance_for(package.precision),
                    name=source.text,
                )
            if not comparison.passed:
                raise CheckFailedError(
                    f"export of {source.text}",
                    got=comparison.reason,
                    expected="what the given model computes",
                )
        summary = _summary(comparison)
        write_manifest(package, staging, measurements={"comparison": summary}, hashes=hashes)
    return package, comparison


def _check_structure(package: ModelPackage) -> None:
    """``onnx.checker`` on what was written; works for models of any size."""
    for component in package.components.values():
        assert component.path is not None
        check_model(component.path)


def _summary(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return {"verified": False}
    worst = comparison.worst
    return {
        "verified": True,
        "passed": comparison.passed,
        "tensors": len(comparison.tensors),
        "tolerance": dataclasses.asdict(comparison.tolerance),
        "worst": None if worst is None else dataclasses.asdict(worst),
    }
