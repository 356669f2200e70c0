"""What each command does, as functions: anything that the command line can do, two lines of Python can do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.comparison import Comparison, Tolerance, tolerance_for
from onnxsmith.errors import BadInputError
from onnxsmith.onnx_file import weight_bytes
from onnxsmith.package import ModelPackage, cache_pairs
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.artifact import write_manifest
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.references import compare_package, open_reference
from onnxsmith.pipeline.staging import check_destination, require_space, staged_directory
from onnxsmith.pipeline.stepwise import StepVerifier
from onnxsmith.progress import Progress

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec

__all__ = [
    "compare_models",
    "inspect_model",
    "optimize_model",
]


def optimize_model(
    model: Path,
    destination: Path,
    specs: Sequence[PassSpec],
    *,
    verify_each: bool = False,
    calibration: CalibrationData | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[ModelPackage, ModelPackage]:
    """Runs passes on an ONNX model of any origin and writes an artifact.

    Args:
        model: An artifact, a directory with one ONNX model, or an ONNX file.
        destination: Where the artifact is to be.
        specs: Names and parameters of the passes.
        verify_each: Whether to run the checker and compare outputs after each pass, which names the pass that
            broke the model. It costs as much as writing and running the model that often.
        calibration: What passes that look at activations run the model on.
        force: Whether an artifact that is there may be replaced.
        progress: Who listens.

    Returns:
        The package before and after.

    Raises:
        CheckFailedError: With ``verify_each``, a pass broke the model; nothing was written.
        OnnxsmithError: It could not be done; nothing was written.
    """
    from onnxsmith.graph_passes import make_passes, run_passes

    progress = progress or Progress()
    if not specs:
        raise BadInputError("optimize", got="no pass", expected="at least one --preset or --pass")
    passes = make_passes(specs)
    check_destination(destination, force=force)
    before = load_package(model)
    size = sum(weight_bytes(c.model) for c in before.components.values())
    require_space(destination.resolve().parent, size, purpose=f"optimisation of {model}")
    verify = StepVerifier() if verify_each else None
    with progress.step("optimize", len(passes)) as step:
        context = context_for(None, before, calibration)
        after = run_passes(
            before,
            passes,
            on_step=lambda record: step.advance(note=record.name),
            context=context,
            verify=verify,
        )
    if not after.source:
        after.source = {"kind": "onnx", "text": str(model)}
    with staged_directory(destination, force=force) as staging:
        hashes: dict[Path, str] = {}
        save_package(after, staging, hashes=hashes)
        write_manifest(after, staging, hashes=hashes)
    return before, after


def compare_models(
    reference: str,
    candidates: Sequence[Path],
    *,
    providers: Sequence[str] = ("cpu",),
    inputs: Path | None = None,
    samples: int | None = None,
    tolerance: Tolerance | None = None,
    precision: str | None = None,
    task: str | None = None,
    seed: int = 0,
    requirements: Sequence[str] = (),
    on_result: Callable[[Comparison], None] = lambda _: None,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Compares ONNX models with a reference, on the same inputs.

    Args:
        reference: A source of a PyTorch model, or an ONNX model, which then runs on the CPU.
        candidates: Artifacts or ONNX files.
        providers: Execution providers; each candidate runs on each of them.
        inputs: An ``.npz`` file with one array for each input; made-up inputs of several shapes where None.
        samples: How many cases of made-up inputs; all kinds where None.
        tolerance: Bounds; by the candidate's precision where None.
        precision: Take the bounds of this precision instead of the candidate's own.
        task: For a PyTorch reference.
        seed: Of the made-up inputs.
        requirements: See ``requirements_of``. A candidate that breaks one does not pass.
        on_result: Called with each comparison as soon as it is there.
        progress: Who listens.

    Raises:
        OnnxsmithError: The reference cannot be run, or a candidate cannot be read.
    """
    from onnxsmith.runtime import OrtBackend, requirements_of

    progress = progress or Progress()
    if not candidates:
        raise BadInputError("compare", got="no candidate", expected="at least one")
    if samples is not None and samples < 1:
        raise BadInputError("compare: --samples", got=str(samples), expected="at least 1")
    backends = [OrtBackend(provider) for provider in providers]
    wanted = requirements_of(requirements, providers)
    packages = [(path, load_package(path)) for path in candidates]
    for _, package in packages:
        tolerance_for(precision or package.precision)
    results = []
    with contextlib.ExitStack() as stack:
        with progress.step("reference"):
            opened = stack.enter_context(open_reference(reference, task=task))
        expected = opened.expected(
            samples=samples, seed=seed, inputs=inputs, candidates=[package for _, package in packages]
        )
        with progress.step("compare", len(packages) * len(providers)) as step:
            for path, package in packages:
                bounds = tolerance or tolerance_for(precision or package.precision)
                for backend in backends:
                    results.append(
                        compare_package(
                            opened, expected, package, backend, tolerance=bounds, name=str(path),
                            requirements=wanted,
                        )
                    )  # fmt: skip
                    on_result(results[-1])
                    step.advance(note=str(path))
    return results


def inspect_model(model: Path, *, top: int = 10, fusions: bool = False) -> dict[str, Any]:
    """What a model is made of, without reading its weights.

    Args:
        model: An artifact, a directory with one ONNX model, or an ONNX file.
        top: How many of the largest tensors to list.
        fusions: Whether to try, on a copy, what passes could still do; takes seconds for large graphs.

    Raises:
        OnnxsmithError: It cannot be read.
    """
    from onnxsmith.graph_passes import operator_counts
    from onnxsmith.graph_passes.potential import still_to_do
    from onnxsmith.graph_passes.precision import precision_map
    from onnxsmith.pipeline.forecast import running_bytes

    if top < 0:
        raise BadInputError("inspect: --top", got=str(top), expected="at least 0")
    package = load_package(model)
    components: dict[str, dict[str, Any]] = {}
    running = 0
    for name, component in package.components.items():
        graph = component.model.graph
        tensors = [
            (value.name or "?", value.const_value)
            for inner in component.model.graphs()
            for value in inner.initializers.values()
            if value.const_value is not None
        ]
        by_type: dict[str, int] = {}
        for _, tensor in tensors:
            by_type[_type_name(tensor)] = by_type.get(_type_name(tensor), 0) + tensor.nbytes
        largest = sorted(tensors, key=lambda item: -item[1].nbytes)[:top]
        pairs = cache_pairs(component.inputs, component.outputs)
        weights = weight_bytes(component.model)
        # Floats that are left beside integers are scales, norms and tables.
        integers = sum(size for kind, size in by_type.items() if "int" in kind)
        own = running_bytes(
            weights,
            quantized=2 * integers > weights,
            decoder=bool(pairs),
            recurrent=_recurrent(component.model),
        )
        # The process itself is there once.
        running += own if not components else own - running_bytes(0, quantized=False, decoder=False)
        components[name] = {
            "file": component.path.name if component.path else None,
            "ir_version": component.model.ir_version,
            "opsets": dict(component.model.opset_imports),
            "producer": component.model.producer_name,
            "inputs": [str(spec) for spec in component.inputs],
            "outputs": [str(spec) for spec in component.outputs],
            "nodes": len(graph),
            "operators": operator_counts(component.model),
            "weight_bytes": weights,
            "bytes_by_type": dict(sorted(by_type.items(), key=lambda item: -item[1])),
            "largest": [
                {"name": n, "type": _type_name(t), "shape": list(t.shape.numpy()), "bytes": t.nbytes}
                for n, t in largest
            ],
            "cache_bytes_per_token": _cache_bytes(pairs),
            "precision_map": precision_map(component.model),
            **({"still_to_do": still_to_do(component.model)} if fusions else {}),
        }
    return {
        "path": str(model),
        "task": package.task,
        "precision": package.precision,
        "source": dict(package.source),
        "steps": [step.name for step in package.steps],
        "memory": {"running_mb": running / 1e6},
        "components": components,
    }


def _recurrent(model: Any) -> int:
    """Bytes of the weights in recurrent layers."""
    return sum(
        value.const_value.nbytes
        for node in model.graph
        if node.op_type in ("LSTM", "GRU", "RNN")
        for value in node.inputs[1:3]
        if value is not None and value.const_value is not None
    )


def _type_name(tensor: Any) -> str:
    """A numpy name, as signatures have them; ONNX calls float32 just FLOAT."""
    name = str(tensor.dtype.name).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _cache_bytes(pairs: Sequence[Any]) -> int:
    """Bytes that one token of one row adds to the KV cache."""
    import ml_dtypes
    import numpy as np

    total = 0
    for pair in pairs:
        heads, size = (a for i, a in enumerate(pair.past.shape or ()) if i in (1, 3))
        if isinstance(heads, int) and isinstance(size, int):
            dtype = getattr(ml_dtypes, pair.past.dtype, None) or pair.past.dtype
            total += heads * size * np.dtype(dtype).itemsize
    return total
