"""The road through ``optimum.exporters.onnx``, for what torch.export cannot trace, such as speech synthesis.

optimum records a run with TorchScript and has a description for each architecture. The result is a package as
from the other road: the same components, the same names, the same axes, judged by the same reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, require
from onnxsmith.onnx_file import load_model
from onnxsmith.package import TEXT_GENERATION, Component, ModelPackage, StepRecord

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxsmith.exporters.loading import LoadedModel
    from onnxsmith.package import TensorSpec
    from onnxsmith.program import TorchProgram

__all__ = ["export_with_optimum", "optimum_knows"]

# Tasks that optimum calls otherwise: those with a cache.
_WITH_PAST = frozenset({TEXT_GENERATION, "text2text-generation", "automatic-speech-recognition"})


def optimum_knows(loaded: LoadedModel) -> bool:
    """Whether optimum is installed and has a description of this model for its task."""
    if loaded.task is None or importlib.util.find_spec("optimum") is None:
        return False
    try:
        tasks: Any = importlib.import_module("optimum.exporters.tasks")
        importlib.import_module("optimum.exporters.onnx.model_configs")
        config: Any = loaded.module.config
        kind = config.model_type.replace("_", "-")
        manager = tasks.TasksManager
        known = manager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
        return _task(loaded) in known
    # A version of optimum that does not fit: then it knows nothing.
    except (ImportError, AttributeError, KeyError):
        return False


def export_with_optimum(
    loaded: LoadedModel, programs: Mapping[str, TorchProgram], *, opset: int | None = None
) -> tuple[ModelPackage, dict[str, TorchProgram]]:
    """Exports a model of transformers with ``optimum.exporters.onnx``.

    Args:
        loaded: The model.
        programs: Its signatures, by component.
        opset: Version of the ONNX operator set; what optimum takes for the architecture where None.

    Returns:
        The package, and the programs with the outputs that its graphs have.

    Raises:
        MissingDependencyError: optimum is not installed.
        ExportError: optimum has no description of the model, fails, or gives another signature.
    """
    exporter: Any = require("optimum.exporters.onnx", purpose="--exporter optimum")
    name = type(loaded.module).__name__
    if not optimum_knows(loaded):
        raise ExportError(
            name,
            got=f"optimum has no description of it for the task {loaded.task}"
            if loaded.task
            else "no model of transformers",
            expected="an architecture and a task that optimum.exporters.onnx lists",
            remedy="Export it with --exporter torch",
        )
    began = time.perf_counter()
    for program in programs.values():
        if program.prepare:
            program.prepare()
    with tempfile.TemporaryDirectory(prefix="onnxsmith-optimum-") as directory:
        try:
            with _silence(), _same_configurations(loaded.module):
                exporter.onnx_export_from_model(
                    model=loaded.module,
                    output=directory,
                    task=_task(loaded),
                    opset=opset,
                    # We compare ourselves, and keep the two decoders apart.
                    do_validation=False,
                    no_post_process=True,
                )
        except MemoryError:
            raise
        except Exception as error:
            text = str(error).strip().partition("\n")[0][:300]
            raise ExportError(
                name,
                got=f"optimum cannot export it: {type(error).__name__}: {text}",
                expected="a model that TorchScript can record",
                remedy="Export it with --exporter torch",
            ) from error
        models = {path.stem: _in_memory(path) for path in sorted(Path(directory).glob("*.onnx"))}
    if set(models) != set(programs):
        raise ExportError(
            name,
            got=f"optimum made the graphs {', '.join(models)}",
            expected=", ".join(programs),
            remedy="Export it with --exporter torch",
        )
    kept = {part: _shared(models[part], program) for part, program in programs.items()}
    parameters = {"exporter": "optimum", "opset": opset}
    package = ModelPackage(
        components={part: Component(models[part]) for part in programs},
        task=loaded.task,
        files=dict(loaded.files),
        source=dict(loaded.provenance),
        steps=(StepRecord("export", parameters, time.perf_counter() - began, {}),),
    )
    return package, kept


def _task(loaded: LoadedModel) -> str:
    task = loaded.task or ""
    cached = task in _WITH_PAST and (
        task == TEXT_GENERATION or bool(getattr(loaded.module.config, "is_encoder_decoder", False))
    )
    return f"{task}-with-past" if cached else task


def _in_memory(path: Path) -> ir.Model:
    """The graph with its weights, which do not depend on the file afterwards."""
    import onnx_ir as ir

    model = ir.external_data.load_to_model(load_model(path))
    model.producer_name = "onnxsmith"
    return model


def _shared(model: ir.Model, program: TorchProgram) -> TorchProgram:
    """Gives a graph the order and the axes of a program; returns the program with the graph's outputs.

    Raises:
        ExportError: The graph takes or gives something else.
    """
    graph = model.graph
    inputs = {value.name or "": value for value in graph.inputs}
    outputs = {value.name or "": value for value in graph.outputs}
    wanted = {spec.name for spec in program.inputs}
    known = {spec.name for spec in program.outputs}
    if set(inputs) != wanted or not set(outputs) <= known:
        raise ExportError(
            program.name,
            got=f"optimum's graph with inputs {', '.join(inputs)} and outputs {', '.join(outputs)}",
            expected=f"inputs {', '.join(sorted(wanted))} and outputs of {', '.join(sorted(known))}",
            remedy="Export it with --exporter torch",
        )
    kept = tuple(spec for spec in program.outputs if spec.name in outputs)
    names: dict[str, str] = {}
    for specs, values in ((program.inputs, inputs), (kept, outputs)):
        for spec in specs:
            for axis, dim in zip(spec.shape or (), values[spec.name].shape or (), strict=False):
                if isinstance(axis, str) and not isinstance(dim, int) and dim.value:
                    names.setdefault(dim.value, axis)
    for value in (*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)):
        if value.shape is not None and not value.shape.frozen:
            value.shape = _renamed(value.shape, names)
    for specs, values in ((program.inputs, inputs), (kept, outputs)):
        for spec in specs:
            value = values[spec.name]
            if spec.shape is not None and value.shape is not None and len(spec.shape) == len(value.shape):
                value.shape = _named(value.shape, spec)
    graph.inputs[:] = [inputs[spec.name] for spec in program.inputs]
    graph.outputs[:] = [outputs[spec.name] for spec in kept]
    return dataclasses.replace(program, outputs=kept)


def _renamed(shape: ir.Shape, names: Mapping[str, str]) -> ir.Shape:
    import onnx_ir as ir

    return ir.Shape([dim if isinstance(dim, int) else names.get(dim.value or "", dim.value) for dim in shape])


def _named(shape: ir.Shape, spec: TensorSpec) -> ir.Shape:
    """What is dynamic is known from the graph, what it is called from the signature."""
    import onnx_ir as ir

    return ir.Shape(
        [
            axis if isinstance(axis, str) and not isinstance(dim, int) else dim
            for axis, dim in zip(spec.shape or (), shape, strict=True)
        ]
    )


@contextlib.contextmanager
def _same_configurations(model: Any) -> Iterator[None]:
    """Undoes what optimum writes into a model's configurations; the model is what we compare with."""
    found = {id(config): config for part in model.modules() if (config := getattr(part, "config", None))}
    before = [(config, dict(vars(config))) for config in found.values()]
    try:
        yield
    finally:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps optimum's and TorchScript's chatter off the terminal; failures come as exceptions."""
    names = ("optimum", "torch.onnx", "transformers")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
