"""PyTorch to ONNX.

``load_torch`` reads a model, ``torch_program`` gives it a flat signature of named tensors, and ``export``
traces that to a ``ModelPackage``. Every step can be called alone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from onnxsmith.errors import ExportError, UnknownNameError
from onnxsmith.exporters.loading import TASKS, LoadedModel, load_torch
from onnxsmith.package import TEXT_GENERATION, Component, ModelPackage, StepRecord

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram

__all__ = ["ATTENTION", "TASKS", "LoadedModel", "export", "load_torch", "torch_program"]

ATTENTION = ("auto", "fused", "standard")


def torch_program(loaded: LoadedModel) -> TorchProgram:
    """The model behind a flat signature: what is exported, and the reference for every comparison.

    Raises:
        ExportError: The model has no signature that can be exported.
    """
    from onnxsmith.exporters.decoder import decoder_program
    from onnxsmith.exporters.plain import plain_program

    return decoder_program(loaded) if loaded.task == TEXT_GENERATION else plain_program(loaded)


def export(
    loaded: LoadedModel,
    program: TorchProgram | None = None,
    *,
    attention: str = "auto",
    opset: int | None = None,
) -> ModelPackage:
    """Exports a loaded model. Weights are shared with the PyTorch model, not copied.

    Args:
        loaded: The model.
        program: Its signature, if it was made already.
        attention: How decoders attend: ``fused`` (GroupQueryAttention), ``standard`` (ONNX operators
            only) or ``auto`` (fused where possible).
        opset: Version of the ONNX operator set; torch's default where None.

    Raises:
        ExportError: torch cannot trace it, or its attention cannot be represented.
        UnknownNameError: No such attention.
    """
    from onnxsmith.exporters.decoder import trace_decoder
    from onnxsmith.exporters.tracing import trace

    if attention not in ATTENTION:
        raise UnknownNameError("export", name=attention, known=ATTENTION, kind="attention")
    if opset is not None and not 18 <= opset <= 25:
        raise ExportError("export: opset", got=str(opset), expected="18 to 25, which torch's exporter writes")
    began = time.perf_counter()
    program = program or torch_program(loaded)
    parameters = {"exporter": "torch", "attention": attention, "opset": opset}
    if loaded.task == TEXT_GENERATION:
        model, details = trace_decoder(loaded, program, attention=attention, opset=opset)
    else:
        model, details = trace(program, opset=opset), {}
    model.producer_name = "onnxsmith"
    step = StepRecord("export", parameters, time.perf_counter() - began, details)
    return ModelPackage(
        components={"model": Component(model)},
        task=loaded.task,
        files=dict(loaded.files),
        source=dict(loaded.provenance),
        steps=(step,),
    )
