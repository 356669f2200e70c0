"""The key ``export`` of a recipe, carried out; the same roads as the command ``export`` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.package import ModelPackage
    from onnxsmith.pipeline.recipe import ExportSpec
    from onnxsmith.program import TorchProgram

__all__ = ["exported_as_wanted", "with_outputs_of"]


def exported_as_wanted(
    loaded: LoadedModel, programs: Mapping[str, TorchProgram], wanted: ExportSpec
) -> tuple[ModelPackage, dict[str, TorchProgram]]:
    """The package, and the programs that it is to be compared with; see ``onnxsmith.exporters.export_by``.

    Raises:
        OnnxsmithError: It cannot be exported so.
    """
    from onnxsmith.exporters import export_by

    return export_by(
        wanted.exporter,
        loaded,
        programs,
        attention=wanted.attention,
        opset=wanted.opset,
        tracing=wanted.tracing,
    )


def with_outputs_of(package: ModelPackage, programs: Mapping[str, TorchProgram]) -> dict[str, TorchProgram]:
    """Programs without the outputs that a package lacks: optimum leaves some out."""
    found = {}
    for part, program in programs.items():
        have = {spec.name for spec in package.components[part].outputs}
        kept = tuple(spec for spec in program.outputs if spec.name in have)
        found[part] = dataclasses.replace(program, outputs=kept)
    return found
