"""PyTorch to ONNX.

``load_torch`` reads a model, ``torch_program`` gives it a flat signature of named tensors, and ``export``
traces that to a ``ModelPackage``. Every step can be called alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, UnknownNameError
from onnxsmith.exporters.loading import TASKS, LoadedModel, load_torch
from onnxsmith.package import MAIN, TEXT_GENERATION, Component, ModelPackage, StepRecord
from onnxsmith.program import TorchProgram

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "ATTENTION",
    "EXPORTERS",
    "TASKS",
    "TRACING",
    "LoadedModel",
    "export",
    "export_by",
    "load_torch",
    "torch_program",
    "torch_programs",
]

EXPORTERS = ("auto", "torch", "optimum")
ATTENTION = ("auto", "fused", "standard")
TRACING = ("auto", "layers", "whole")


def torch_programs(loaded: LoadedModel) -> dict[str, TorchProgram]:
    """The model behind flat signatures: what is exported, and the reference for every comparison.

    Returns:
        A program for each component: ``model`` where the model is one graph; ``encoder_model``,
        ``decoder_model`` and ``decoder_with_past_model`` for an encoder-decoder.

    Raises:
        ExportError: The model has no signature that can be exported.
    """
    from onnxsmith.exporters.decoder import decoder_program
    from onnxsmith.exporters.hugging_face import encoder_programs
    from onnxsmith.exporters.plain import module_program
    from onnxsmith.exporters.seq2seq import is_encoder_decoder, seq2seq_programs

    if loaded.task == TEXT_GENERATION:
        return {MAIN: decoder_program(loaded)}
    if loaded.task is None:
        return {MAIN: module_program(loaded)}
    return seq2seq_programs(loaded) if is_encoder_decoder(loaded) else encoder_programs(loaded)


def torch_program(loaded: LoadedModel) -> TorchProgram:
    """The program of a model that is one graph; see ``torch_programs``.

    Raises:
        ExportError: It has several, or no signature that can be exported.
    """
    programs = torch_programs(loaded)
    if len(programs) > 1:
        raise ExportError(
            loaded.source.text, got=f"the components {', '.join(programs)}", expected="a model of one graph"
        )
    return next(iter(programs.values()))


def export(
    loaded: LoadedModel,
    program: TorchProgram | Mapping[str, TorchProgram] | None = None,
    *,
    attention: str = "auto",
    opset: int | None = None,
    tracing: str = "auto",
    tidy: Callable[[ir.Model], ir.Model] | None = None,
) -> ModelPackage:
    """Exports a loaded model. Weights are shared with the PyTorch model, not copied.

    Args:
        loaded: The model.
        program: Its signature, or its signatures by component, if they were made already. An axis that was
            found to be dynamic and cannot be traced so becomes a size in it.
        attention: How decoders attend: ``fused`` (GroupQueryAttention), ``standard`` (ONNX operators
            only) or ``auto`` (fused where possible).
        opset: Version of the ONNX operator set; torch's default where None.
        tracing: How decoders are traced: ``layers`` (one layer of each kind, copied), ``whole`` or ``auto``
            (layers where possible).
        tidy: Cleans a graph. Called with a decoder's graph while it has one layer of each kind, whose weights
            look like inputs then; not called where a decoder is traced as a whole.

    Raises:
        ExportError: torch cannot trace it, or its attention cannot be represented.
        UnknownNameError: No such attention or tracing.
    """
    from onnxsmith.exporters.adapters import weights_as_inputs
    from onnxsmith.exporters.decoder import trace_decoder

    if attention not in ATTENTION:
        raise UnknownNameError("export", name=attention, known=ATTENTION, kind="attention")
    if tracing not in TRACING:
        raise UnknownNameError("export", name=tracing, known=TRACING, kind="tracing")
    if opset is not None and not 18 <= opset <= 25:
        raise ExportError("export: opset", got=str(opset), expected="18 to 25, which torch's exporter writes")
    began = time.perf_counter()
    given = {MAIN: program} if isinstance(program, TorchProgram) else program
    programs = dict(given) if given else torch_programs(loaded)
    parameters = {"exporter": "torch", "attention": attention, "opset": opset, "tracing": tracing}
    components: dict[str, Component] = {}
    details: dict[str, Any] = {}
    for name, one in programs.items():
        if loaded.task == TEXT_GENERATION:
            model, details = trace_decoder(
                loaded, one, attention=attention, opset=opset, tracing=tracing, tidy=tidy
            )
        else:
            model = _trace_plain(one, opset)
            if one.details:
                details[name] = dict(one.details)
        if loaded.adapter == "inputs":
            details["adapter_inputs"] = weights_as_inputs(model)
        model.producer_name = "onnxsmith"
        components[name] = Component(model)
    step = StepRecord("export", parameters, time.perf_counter() - began, details)
    return ModelPackage(
        components=components,
        task=loaded.task,
        files=dict(loaded.files),
        source=dict(loaded.provenance),
        steps=(step,),
    )


def export_by(
    exporter: str,
    loaded: LoadedModel,
    programs: Mapping[str, TorchProgram],
    *,
    attention: str = "auto",
    opset: int | None = None,
    tracing: str = "auto",
    tidy: Callable[[ir.Model], ir.Model] | None = None,
) -> tuple[ModelPackage, dict[str, TorchProgram]]:
    """Exports a loaded model by one of the two roads.

    Args:
        exporter: ``torch``, ``optimum``, or ``auto``: torch, and optimum for what torch cannot trace and
            optimum has a description of.
        loaded: The model.
        programs: Its signatures, by component.
        attention: See ``export``; optimum takes its own.
        opset: See ``export``.
        tracing: See ``export``; optimum takes its own.
        tidy: See ``export``.

    Returns:
        The package, and the programs that it is to be compared with: those that were given, without outputs
        that optimum leaves out.

    Raises:
        ExportError: It cannot be exported.
        MissingDependencyError: optimum is asked for and not installed.
        UnknownNameError: No such exporter, attention or tracing.
    """
    from onnxsmith.exporters.optimum_road import export_with_optimum, optimum_knows

    if exporter not in EXPORTERS:
        raise UnknownNameError("export", name=exporter, known=EXPORTERS, kind="exporter")
    if exporter == "optimum" and loaded.adapter == "inputs":
        raise ExportError(
            "export: optimum",
            got="an adapter that is to be kept as inputs",
            expected="--adapter merge, or --exporter torch",
        )
    if exporter == "optimum":
        if attention != "auto" or tracing != "auto":
            raise ExportError(
                "export: optimum",
                got=f"attention {attention}, tracing {tracing}",
                expected="auto: optimum has its own",
                remedy="Leave them out, or export with --exporter torch",
            )
        return export_with_optimum(loaded, programs, opset=opset)
    # An axis that torch cannot keep dynamic becomes a size in the program; in a copy, so that optimum has it.
    tried = {
        name: dataclasses.replace(program, examples=dict(program.examples), details=dict(program.details))
        for name, program in programs.items()
    }
    try:
        package = export(loaded, tried, attention=attention, opset=opset, tracing=tracing, tidy=tidy)
    except ExportError as error:
        as_asked = (attention, tracing, loaded.adapter) != ("auto", "auto", "merge")
        if exporter == "torch" or as_asked or not optimum_knows(loaded):
            raise
        try:
            package, kept = export_with_optimum(loaded, programs, opset=opset)
        except ExportError:
            raise error from None
        step = dataclasses.replace(package.steps[-1], details={"why_not_torch": str(error)})
        return dataclasses.replace(package, steps=(step,)), kept
    return package, tried


def _trace_plain(program: TorchProgram, opset: int | None) -> ir.Model:
    """Traces a program; fixes an axis that was only found to be dynamic, where torch cannot keep it so."""
    from onnxsmith.exporters.plain import fix_axes
    from onnxsmith.exporters.tracing import FixedAxisError, trace

    first: ExportError | None = None
    while True:
        try:
            return trace(program, opset=opset)
        except ExportError as error:
            found = program.natural_sizes.keys() & program.axis_limits.keys() - {"batch"}
            to_fix = {error.axis} if isinstance(error, FixedAxisError) else found
            if not to_fix or not to_fix <= found:
                # What is wrong is what was wrong before any size was fixed.
                raise first or error from None
            first = first or error
            program.details.setdefault("fixed_axes", {}).update(dict.fromkeys(sorted(to_fix), str(error)))
            fix_axes(program, to_fix)
