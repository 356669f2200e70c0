"""The model before it was made smaller: what budgets are against, and what speed is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.pipeline.recipe_export import exported_as_wanted
from onnxsmith.pipeline.run_steps import RunSteps
from onnxsmith.pipeline.step_keys import step_key
from onnxsmith.pipeline.variant_making import Made, VariantMaker
from onnxsmith.progress import Progress

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.graph_passes.context import PassContext
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.package import ModelPackage
    from onnxsmith.pipeline.recipe import Recipe
    from onnxsmith.program import TorchProgram

__all__ = ["Original"]


@dataclasses.dataclass
class Original:
    """The original of a model that was trained.

    Attributes:
        programs: It in PyTorch; empty after it was asked, and its memory is free.
        package: Its files.
        made: It in ONNX, made with the passes of the recipe's first variant; None where nothing is timed.
        report: What is known of it.
    """

    programs: dict[str, TorchProgram]
    package: ModelPackage
    made: Made | None
    report: dict[str, Any]

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        recipe: Recipe,
        identity: str,
        steps: RunSteps,
        passes: Sequence[GraphPass],
        *,
        context: Callable[[ModelPackage], PassContext],
        provider: str,
        progress: Progress,
    ) -> Original:
        """Exports it.

        Args:
            loaded: The model.
            recipe: What it is measured by.
            identity: Of the model.
            steps: Where what is made of it is found and left.
            passes: Of the first variant.
            context: What passes need besides the graph.
            provider: What it will run on.
            progress: Who listens.

        Raises:
            OnnxsmithError: It cannot be exported.
        """
        from onnxsmith.exporters import torch_programs
        from onnxsmith.package import ModelPackage

        programs = torch_programs(loaded)
        package = ModelPackage({}, loaded.task, dict(loaded.files))
        made = None
        with progress.step("original") as step:
            if recipe.evaluation.benchmark is not None and len(programs) == 1:
                package, programs = exported_as_wanted(loaded, programs, recipe.export)
                key = step_key("export", original=identity, export=recipe.export.model_dump())
                maker = VariantMaker(package, key, steps, context=context(package), provider=provider)
                made = maker.make("original", passes)
            parameters = sum(p.numel() for p in loaded.module.parameters())
            step.note = f"{parameters / 1e6:.1f} M parameters"
        size = sum(p.numel() * p.element_size() for p in loaded.module.parameters()) / 1e6
        report = {
            "architecture": type(loaded.module).__name__, "parameters": parameters, "torch_size_mb": size,
            "size_mb": made.report.size_mb if made else None,
            "error": made.report.error if made else None,
            "passes": [p.name for p in passes] if made else [],
            "latency_ms": None, "decode_tokens_per_s": None, "task_metrics": None, "perplexity": None,
        }  # fmt: skip
        return cls(programs, dataclasses.replace(package, components={}), made, report)

    def ask(
        self, ask: Callable[[Mapping[str, TorchProgram], ModelPackage], Mapping[str, Any]], log: Progress
    ) -> None:
        """Has it scored once, and lets go of it."""
        if self.programs:
            with log.step("original scores"):
                self.report |= ask(self.programs, self.package)
            self.programs = {}

    def timed(self) -> None:
        """Takes over what was measured."""
        bench = self.made.report.bench if self.made is not None else None
        if bench is None:
            return
        for key in ("latency_ms", "decode_tokens_per_s"):
            self.report[key] = bench[key]["p50"] if bench.get(key) else None
