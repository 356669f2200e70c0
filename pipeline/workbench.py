"""A recipe's model on the bench: loaded and exported once, then made into variants that are judged alike."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onnxsmith.errors import LackingError, OnnxsmithError, SourceError, require
from onnxsmith.package import TEXT_GENERATION
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.choosing import hold_budgets
from onnxsmith.pipeline.honesty import is_quantized, source_among, without_quantization
from onnxsmith.pipeline.layer_errors import layer_errors
from onnxsmith.pipeline.originals import Original
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.report import VariantReport
from onnxsmith.pipeline.staging import require_space
from onnxsmith.pipeline.step_log import StepLog
from onnxsmith.pipeline.stepwise import StepVerifier
from onnxsmith.pipeline.training_run import TrainingRun
from onnxsmith.pipeline.variant_checking import OpenReference, VariantChecker, described
from onnxsmith.pipeline.variant_making import Made, VariantMaker, passes_of
from onnxsmith.pipeline.variant_timing import time_variants
from onnxsmith.progress import Progress, Step
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.program import TorchProgram

__all__ = ["Workbench"]


class Workbench:
    """Everything that is needed to make, check and measure variants of a recipe's model.

    Making one finds what is wrong with a recipe, and costs no minute of work. ``load`` exports the model.
    PyTorch is opened, and asked once, when the first variant is checked; it is closed with the bench.

        with Workbench(recipe, source, base=base) as bench:
            bench.load(work)
            report = bench.judge("int4", [("cleanup", {}), ("quantize_weights", {"bits": 4})])

    Attributes:
        recipe: What is wanted.
        source: The model.
        backend: What the variants run on.
        log: The steps so far, with their times.
        provenance: Files with hashes, architecture, parameters; empty before ``load``.
        training: What the steps of training did; None where the recipe has none.
        original: The model before it was made smaller; None where no step did that.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        *,
        base: Path | None = None,
        verify_each: bool = False,
        progress: Progress | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """Reads the data that the recipe names.

        Args:
            recipe: What is wanted.
            source: The model.
            base: The directory that relative paths of the recipe start from.
            verify_each: Check the model after each pass; a pass that breaks it fails its variant, by name.
            progress: Who listens.
            checkpoints: Where training keeps its state, so that it goes on if it is killed.

        Raises:
            SourceError: A source that is no PyTorch model.
            OnnxsmithError: Something else that is wrong with the recipe.
        """
        from onnxsmith.runtime import OrtBackend

        if not source.is_torch:
            raise SourceError(
                recipe.source, got="an ONNX model", expected="a PyTorch model to compare with",
                remedy="Use `onnxsmith optimize` for ONNX models",
            )  # fmt: skip
        self.recipe, self.source = recipe, source
        self.log = StepLog(progress)
        self.backend = OrtBackend(recipe.provider)
        self.provenance: dict[str, Any] = {}
        self.training: dict[str, Any] | None = None
        self.original: Original | None = None
        self.source_bench: dict[str, Any] | None = None
        self._training = TrainingRun(recipe, base=base, checkpoints=checkpoints) if recipe.training else None
        self._checker = VariantChecker(recipe, self.backend, base=base)
        self._calibration = CalibrationData.of(recipe.calibration, base=base)
        self._verify = StepVerifier() if verify_each else None
        self._stack = contextlib.ExitStack()
        self._programs: dict[str, TorchProgram] = {}
        self._maker: VariantMaker | None = None
        self._work: Path | None = None
        self._reference: OpenReference | None = None

    def __enter__(self) -> Self:
        """Does nothing yet; see ``load``."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes PyTorch, where it was opened."""
        self._reference = None
        self._stack.close()

    def load(self, work: Path, *, variants: int = 1) -> None:
        """Loads and exports the model.

        Args:
            work: An empty directory where variants get directories of their names. Predictions of PyTorch
                go beside it.
            variants: How many there will be at the same time, to see whether the disk has room for them.

        Raises:
            ResourceError: It has not.
            OnnxsmithError: The model cannot be loaded or exported.
        """
        from onnxsmith.exporters import export, load_torch, torch_programs

        recipe = self.recipe
        with self.log.step("load") as step:
            dtype = recipe.export.dtype if self._training is None else "float32"
            loaded = load_torch(self.source, task=recipe.task, dtype=dtype, lazy=self._training is None)
            self.provenance = loaded.provenance
            step.note = (
                f"{self.provenance['architecture']}, {self.provenance['parameters'] / 1e6:.1f} M parameters"
            )
        trained = None
        if self._training is not None:
            trained = self._training.apply(loaded, self.log)
            loaded, self.training = trained.model, trained.report
            self.provenance = loaded.provenance
            loaded.module.to(getattr(require("torch", purpose="training"), recipe.export.dtype))
        size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
        require_space(work, size * (variants + 1), purpose=f"variants of {recipe.name}")
        if loaded.task != TEXT_GENERATION and recipe.evaluation.perplexity is not None:
            raise SourceError(
                recipe.source, got=f"a model for {loaded.task or 'no known task'}", expected="a decoder",
                remedy="Leave evaluation.perplexity out of the recipe",
            )  # fmt: skip
        with self.log.step("export") as step:
            self._programs = torch_programs(loaded)
            exported = export(
                loaded, self._programs, attention=recipe.export.attention, opset=recipe.export.opset
            )
            step.note = exported.steps[-1].details.get("attention", "")
        if trained is not None:
            exported = dataclasses.replace(exported, steps=(*trained.records, *exported.steps))
            if trained.original is not None:
                first = passes_of(recipe.variants[0].specs())
                self.original = Original.of(
                    trained.original, recipe, work.with_name("original"), first,
                    context=lambda package: context_for(self.source, package, self._calibration),
                    provider=self.backend.name, progress=self.log,
                )  # fmt: skip
        self._work, self._exported = work, exported
        self._maker = VariantMaker(
            exported,
            work,
            context=context_for(self.source, exported, self._calibration),
            provider=self.backend.name,
            verify=self._verify,
        )

    def make(
        self,
        name: str,
        passes: Sequence[GraphPass],
        *,
        later: Iterable[Sequence[GraphPass]] = (),
        step: Step | None = None,
    ) -> Made:
        """Makes a variant; see ``VariantMaker.make``."""
        assert self._maker is not None, "the model was not loaded"
        return self._maker.make(name, passes, later=later, step=step)

    def described(self) -> dict[str, Any]:
        """What the report says of PyTorch before it was asked anything."""
        return described(self.recipe, self._programs)

    def reference(self) -> OpenReference:
        """PyTorch, open until the bench is closed, and what it said; asked at the first call."""
        assert self._work is not None, "the model was not loaded"
        if self._reference is None:
            if self.original is not None:
                self.original.ask(self._checker.ask_original, self.log)
            self._reference = self._stack.enter_context(
                self._checker.open(self._programs, self._exported, self._work, self.log)
            )
        return self._reference

    def check(self, made: Made) -> None:
        """Compares a variant with PyTorch and scores it; see ``VariantChecker.check``."""
        self._checker.check(made, self.reference())

    def time(self, variants: Sequence[Made], *, beside_source: bool = False) -> dict[str, Any]:
        """Measures how fast variants are, in turn, and PyTorch beside them; see ``time_variants``.

        Args:
            variants: Those that were made.
            beside_source: Whether to measure the float model too where only quantized ones are there: what is
                slower than its source is worth nothing.
        """
        original = self.original
        made = original.made if original is not None and original.made and not original.made.failed else None
        source = self._float_source(variants) if beside_source else None
        found = time_variants(
            variants, self._programs, self.recipe, progress=self.log, original=made, source=source
        )
        if source is not None:
            self.source_bench = source.report.bench
        if original is not None:
            original.timed()
        return found

    def _float_source(self, variants: Sequence[Made]) -> Made | None:
        """The float model that quantized variants come from, where none of the variants is it."""
        reports = [one.report for one in variants if not one.failed]
        quantized = [one for one in reports if is_quantized(one)]
        timed = self.recipe.evaluation.benchmark is not None and len(self._programs) == 1
        if not timed or not quantized or all(source_among(one, reports) for one in quantized):
            return None
        made = self.make("_float-source", without_quantization(quantized[0]))
        return None if made.failed else made

    def finish(self) -> None:
        """Lets go of what a run that is killed would go on with: the artifact is there."""
        if self._training is not None:
            self._training.finish()

    def trace(self, made: Made) -> None:
        """Adds to a variant's report how far its inner tensors are from PyTorch's; see ``layer_errors``."""
        if len(self._programs) > 1:
            # The graphs of a model of several are traced one by one, by `onnxsmith bisect`.
            return
        name, program = next(iter(self._programs.items()))
        with self.log.step("error by layer") as step:
            try:
                made.report.layer_errors = layer_errors(
                    program,
                    self.reference().reference.sessions[name],
                    made.directory,
                    self.backend,
                    seed=self.recipe.seed,
                )
                step.note = made.report.layer_errors["verdict"]
            except LackingError:
                raise
            except OnnxsmithError as error:
                # It says more about a variant, and is no reason to lose it.
                step.note = f"not measured: {error}"

    def judge(self, name: str, specs: Iterable[PassSpec], *, timed: bool = True) -> VariantReport:
        """Makes, checks and measures one variant, and holds the budgets against it.

        Args:
            name: What to call it; unique on this bench.
            specs: Names and parameters of passes.
            timed: Whether to measure how fast it is, where the recipe has a benchmark.

        Raises:
            UnknownNameError: An unknown pass or parameter.
            BadInputError: A parameter of the wrong type or outside its range.
            LackingError: No other variant would do better.
        """
        made = self.make(name, passes_of(specs))
        if not made.failed:
            self.check(made)
        if timed and not made.failed:
            self.time([made])
        hold_budgets(made.report, self.recipe.budgets)
        return made.report
