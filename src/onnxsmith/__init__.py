"""onnxsmith: PyTorch models become fast, small, checked ONNX deployments.

The names below are the public interface; each is imported when it is first used, so that importing
onnxsmith costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith._version import __version__

if TYPE_CHECKING:
    from onnxsmith.comparison import Comparison, Tolerance
    from onnxsmith.errors import OnnxsmithError
    from onnxsmith.exporters import export, load_torch, torch_program
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
    from onnxsmith.package import ModelPackage
    from onnxsmith.package_io import load_package, save_package
    from onnxsmith.pipeline.artifact import verify_artifact
    from onnxsmith.pipeline.batch import run_batch
    from onnxsmith.pipeline.bisecting import bisect_models
    from onnxsmith.pipeline.doctor import diagnose
    from onnxsmith.pipeline.evaluation import evaluate_model
    from onnxsmith.pipeline.exporting import export_model
    from onnxsmith.pipeline.generation import generate_text, generate_texts
    from onnxsmith.pipeline.measuring import bench_models, sweep
    from onnxsmith.pipeline.operations import compare_models, inspect_model, optimize_model
    from onnxsmith.pipeline.packing import package_model
    from onnxsmith.pipeline.recipe import Recipe, load_recipe
    from onnxsmith.pipeline.run import run_recipe
    from onnxsmith.pipeline.tuning import tune_recipe
    from onnxsmith.runtime import BenchSettings, OrtSession, SamplingSettings, TorchSession
    from onnxsmith.source import ModelSource

__all__ = [
    "PRESETS",
    "BenchSettings",
    "Comparison",
    "ModelPackage",
    "ModelSource",
    "OnnxsmithError",
    "OrtSession",
    "Recipe",
    "SamplingSettings",
    "Tolerance",
    "TorchSession",
    "__version__",
    "bench_models",
    "bisect_models",
    "compare_models",
    "diagnose",
    "evaluate_model",
    "export",
    "export_model",
    "generate_text",
    "generate_texts",
    "inspect_model",
    "load_package",
    "load_recipe",
    "load_torch",
    "make_passes",
    "optimize_model",
    "package_model",
    "run_batch",
    "run_passes",
    "run_recipe",
    "save_package",
    "sweep",
    "torch_program",
    "tune_recipe",
    "verify_artifact",
]

_HOMES: Mapping[str, str] = {
    "PRESETS": "onnxsmith.graph_passes",
    "BenchSettings": "onnxsmith.runtime",
    "Comparison": "onnxsmith.comparison",
    "ModelPackage": "onnxsmith.package",
    "ModelSource": "onnxsmith.source",
    "OnnxsmithError": "onnxsmith.errors",
    "OrtSession": "onnxsmith.runtime",
    "Recipe": "onnxsmith.pipeline.recipe",
    "SamplingSettings": "onnxsmith.runtime",
    "Tolerance": "onnxsmith.comparison",
    "TorchSession": "onnxsmith.runtime",
    "bench_models": "onnxsmith.pipeline.measuring",
    "bisect_models": "onnxsmith.pipeline.bisecting",
    "evaluate_model": "onnxsmith.pipeline.evaluation",
    "compare_models": "onnxsmith.pipeline.operations",
    "diagnose": "onnxsmith.pipeline.doctor",
    "export": "onnxsmith.exporters",
    "export_model": "onnxsmith.pipeline.exporting",
    "generate_text": "onnxsmith.pipeline.generation",
    "generate_texts": "onnxsmith.pipeline.generation",
    "inspect_model": "onnxsmith.pipeline.operations",
    "load_package": "onnxsmith.package_io",
    "load_recipe": "onnxsmith.pipeline.recipe",
    "load_torch": "onnxsmith.exporters",
    "make_passes": "onnxsmith.graph_passes",
    "optimize_model": "onnxsmith.pipeline.operations",
    "package_model": "onnxsmith.pipeline.packing",
    "run_batch": "onnxsmith.pipeline.batch",
    "run_passes": "onnxsmith.graph_passes",
    "run_recipe": "onnxsmith.pipeline.run",
    "save_package": "onnxsmith.package_io",
    "sweep": "onnxsmith.pipeline.measuring",
    "torch_program": "onnxsmith.exporters",
    "tune_recipe": "onnxsmith.pipeline.tuning",
    "verify_artifact": "onnxsmith.pipeline.artifact",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'onnxsmith' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
