"""A recipe's model on the bench: loaded and exported once, then made into variants that are judged alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onnxsmith.errors import LackingError, OnnxsmithError, SourceError, require
from onnxsmith.package import TEXT_GENERATION, ModelPackage
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.choosing import hold_budgets
from onnxsmith.pipeline.honesty import is_quantized, source_among, without_quantization
from onnxsmith.pipeline.layer_errors import layer_errors
from onnxsmith.pipeline.originals import Original
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.recipe_export import exported_as_wanted, with_outputs_of
from onnxsmith.pipeline.references import open_programs
from onnxsmith.pipeline.report import VariantReport
from onnxsmith.pipeline.run_steps import RunSteps
from onnxsmith.pipeline.staging import require_space
from onnxsmith.pipeline.step_cache import OpenStep, StepCache
from onnxsmith.pipeline.step_keys import (
    StepKey,
    file_identity,
    loaded_identity,
    machine,
    provider_identity,
    source_identity,
    step_key,
    trained_identity,
)
from onnxsmith.pipeline.step_log import StepLog
from onnxsmith.pipeline.stepwise import StepVerifier
from onnxsmith.pipeline.training_run import Trained, TrainingRun
from onnxsmith.pipeline.variant_checking import AskedReference, VariantChecker
from onnxsmith.pipeline.variant_making import Made, VariantMaker, keep_package, kept_package, passes_of
from onnxsmith.pipeline.variant_timing import time_variants
from onnxsmith.progress import Progress, Step
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.graph_passes import PassSpec
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.program import TorchProgram

__all__ = ["Workbench"]

_SCRATCH = ".steps"


class Workbench:
    """Everything that is needed to make, check and measure variants of a recipe's model.

    Making one finds what is wrong with a recipe, and costs no minute of work. ``load`` exports the model.
    PyTorch is asked once, when the first variant is checked. What an earlier run left in the cache is not
    done again; then PyTorch may not be needed at all.

        with Workbench(recipe, source, base=base, cache=user_cache()) as bench:
            bench.load(work)
            report = bench.judge("int4", [("cleanup", {}), ("quantize_weights", {"bits": 4})])

    Attributes:
        recipe: What is wanted.
        source: The model.
        backend: What the variants run on.
        log: The steps so far, with their times.
        provenance: Files with hashes, architecture, parameters; empty before ``load``.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        *,
        base: Path | None = None,
        cache: StepCache | None = None,
        resume: bool = False,
        verify_each: bool = False,
        progress: Progress | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """Reads the data that the recipe names.

        Args:
            recipe: What is wanted.
            source: The model.
            base: The directory that relative paths of the recipe start from.
            cache: What earlier runs left, and later ones find; it is closed with the bench.
            resume: Whether times that an earlier run measured are taken as they are.
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
        self._trained: Trained | None = None
        self._original_identity: str | None = None
        self._checker = VariantChecker(recipe, self.backend, base=base)
        self._calibration = CalibrationData.of(recipe.calibration, base=base)
        self._verify = StepVerifier() if verify_each else None
        self._cache, self._resume = cache, resume
        self._steps = RunSteps(cache, Path())
        self._size = 0
        self._loaded: LoadedModel | None = None
        self._programs: dict[str, TorchProgram] | None = None
        self._exported: ModelPackage | None = None
        self._export_key: StepKey | None = None
        self._maker: VariantMaker | None = None
        self._asked: AskedReference | None = None

    def __enter__(self) -> Self:
        """Does nothing yet; see ``load``."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets go of the cache."""
        self._steps.close()

    def load(
        self,
        work: Path,
        *,
        variants: int = 1,
        on_loaded: Callable[[LoadedModel], object] | None = None,
    ) -> None:
        """Loads and exports the model, or finds it in the cache.

        Args:
            work: A directory for what the cache does not take.
            variants: How many there will be at the same time, to see whether the disk has room for them.
            on_loaded: Called with the model, if it is not found in the cache, before anything is made of it.

        Raises:
            ResourceError: It has not.
            OnnxsmithError: The model cannot be loaded or exported.
        """
        recipe = self.recipe
        with self.log.step("load") as step:
            if self._training is None:
                found = self._find_export(work)
            else:
                self.provenance = self._load().provenance
            step.note = (
                f"{self.provenance['architecture']}, {self.provenance['parameters'] / 1e6:.1f} M parameters"
            )
        if on_loaded is not None and self._loaded is not None:
            on_loaded(self._loaded)
        if self._training is not None:
            self._trained = self._train(self._training)
            found = self._find_export(work)
        size = _module_bytes(self._load()) if found is None else found.facts["bytes"]
        task = self._load().task if found is None else found.facts["task"]
        self._size = size
        require_space(work, size * (variants + 1), purpose=f"variants of {recipe.name}")
        if task != TEXT_GENERATION and recipe.evaluation.perplexity is not None:
            raise SourceError(
                recipe.source, got=f"a model for {task or 'no known task'}", expected="a decoder",
                remedy="Leave evaluation.perplexity out of the recipe",
            )  # fmt: skip
        with self.log.step("export") as step:
            if found is None:
                self._exported = self._export(size)
            else:
                self._exported = kept_package(found.directory, found.facts)
            told = str(self._exported.steps[-1].details.get("attention", ""))
            step.note = told if found is None else ", ".join(filter(None, (told, "from the cache")))
        assert self._export_key is not None
        if self._trained is not None:
            self._keep_original(self._trained)
        gguf = self.source.path if self.source.path and self.source.path.suffix == ".gguf" else None
        self._maker = VariantMaker(
            self._exported,
            self._export_key,
            self._steps,
            context=context_for(self.source, self._exported, self._calibration),
            gguf=file_identity(gguf) if gguf else None,
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
        return {
            "name": f"torch {self.recipe.export.dtype}{', trained' if self.recipe.training else ''}",
            "perplexity": None,
            "prefill_tokens_per_s": None,
            "decode_tokens_per_s": None,
            "latency_ms": None,
            "size_mb": self._size / 1e6,
        }

    def reference(self) -> AskedReference:
        """What PyTorch said of what the variants will be asked; it is asked at the first call."""
        assert self._exported is not None and self._export_key is not None, "the model was not loaded"
        if self._asked is None:
            if self.original is not None:
                self.original.ask(self._checker.ask_original, self.log)
            with self.log.step("reference") as step:
                self._asked = self._checker.ask(
                    self.programs,
                    self._exported,
                    self._export_key,
                    self._steps,
                    original=self._original_identity,
                )
                step.note = self._asked.note + (", from the cache" if self._asked.hit else "")
        return self._asked

    def check(self, made: Made) -> None:
        """Compares a variant with PyTorch and scores it; see ``VariantChecker.check``."""
        self._checker.check(made, self.reference(), self._steps)

    def time(self, variants: Sequence[Made], *, beside_source: bool = False) -> dict[str, Any]:
        """Measures how fast variants are, in turn, and PyTorch beside them; see ``time_variants``.

        Args:
            variants: Those that were made.
            beside_source: Whether to measure the float model too where only quantized ones are there: what is
                slower than its source is worth nothing.
        """
        assert self._exported is not None, "the model was not loaded"
        original = self.original
        made = original.made if original is not None and original.made and not original.made.failed else None
        source = self._float_source(variants) if beside_source else None
        found = time_variants(
            variants,
            self.programs,
            self.recipe,
            backend=self.backend,
            components=tuple(self._exported.components),
            steps=self._steps,
            resume=self._resume,
            progress=self.log,
            original=made,
            source=source,
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
        timed = self.recipe.evaluation.benchmark is not None
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
        assert self._exported is not None and made.key is not None, "the variant was not made"
        if len(self._exported.components) > 1:
            # The graphs of a model of several are traced one by one, by `onnxsmith bisect`.
            return
        key = step_key(
            "layers",
            variant=made.key.digest,
            seed=self.recipe.seed,
            provider=provider_identity(self.backend),
            machine=machine(),
            summary=made.key.made_from["summary"],
        )
        with self.log.step("error by layer") as step:
            try:
                found = self._steps.result(key, lambda _: self._traced(made))
            except LackingError:
                raise
            except OnnxsmithError as error:
                # It says more about a variant, and is no reason to lose it.
                step.note = f"not measured: {error}"
                return
            made.report.layer_errors = dict(found.facts)
            step.note = str(found.facts["verdict"]) + (", from the cache" if found.hit else "")

    def _traced(self, made: Made) -> dict[str, Any]:
        name, program = next(iter(self.programs().items()))
        with open_programs({name: program}) as reference:
            return layer_errors(
                program,
                reference.sessions[name],
                made.directory,
                self.backend,
                seed=self.recipe.seed,
            )

    def judge(self, name: str, specs: Iterable[PassSpec], *, timed: bool = True) -> VariantReport:
        """Makes, checks and measures one variant, and holds the budgets against it.

        Args:
            name: What to call it.
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

    def _find_export(self, work: Path) -> OpenStep | None:
        """Says where the export is to be found, and looks whether it is there."""
        recipe = self.recipe
        if self._trained is not None:
            identity: dict[str, Any] | None = trained_identity(self._load())
        else:
            identity = source_identity(self.source) or loaded_identity(self._load())
        # What cannot be told apart from another is never taken from a cache, nor put there.
        self._steps = RunSteps(self._cache if identity is not None else None, work / _SCRATCH)
        self._export_key = step_key(
            "export",
            source=identity or {"run": uuid.uuid4().hex},
            task=recipe.task,
            export=recipe.export.model_dump(),
            summary=recipe.source,
        )
        found = self._steps.open(self._export_key)
        self.provenance = self._load().provenance if found is None else dict(found.facts["source"])
        return found

    def programs(self) -> Mapping[str, TorchProgram]:
        """The PyTorch model behind flat signatures; loaded at the first call, if it was not before."""
        from onnxsmith.exporters import torch_programs
        from onnxsmith.exporters.plain import fix_axes

        if self._programs is None:
            self._programs = torch_programs(self._load())
            # The export found that these cannot stay dynamic.
            steps = self._exported.steps if self._exported is not None else ()
            details = next((step.details for step in steps if step.name == "export"), {})
            for part, program in self._programs.items():
                told = details.get(part)
                fixed = told.get("fixed_axes") if isinstance(told, Mapping) else None
                if fixed:
                    fix_axes(program, set(fixed))
            if self._exported is not None:
                self._programs = with_outputs_of(self._exported, self._programs)
        return self._programs

    def _load(self) -> LoadedModel:
        from onnxsmith.exporters import load_torch

        if self._loaded is None:
            recipe, plain = self.recipe, self._training is None
            dtype = recipe.export.dtype if plain else "float32"
            self._loaded = load_torch(
                self.source, task=recipe.task, dtype=dtype, lazy=plain, adapter=recipe.export.adapter
            )
        return self._loaded

    def _train(self, training: TrainingRun) -> Trained:
        trained = training.apply(self._load(), self.log)
        self._loaded, self.training = trained.model, trained.report
        dtype = getattr(require("torch", purpose="training"), self.recipe.export.dtype)
        self._loaded.module.to(dtype)
        return trained

    def _keep_original(self, trained: Trained) -> None:
        """Says what was trained, and makes what the variants are held against."""
        assert self._exported is not None
        self._exported = dataclasses.replace(self._exported, steps=(*trained.records, *self._exported.steps))
        if trained.original is None:
            return
        told = json.dumps(trained_identity(trained.original), sort_keys=True, default=str)
        self._original_identity = hashlib.sha256(told.encode()).hexdigest()
        self.original = Original.of(
            trained.original, self.recipe, self._original_identity, self._steps,
            passes_of(self.recipe.variants[0].specs()),
            context=lambda package: context_for(self.source, package, self._calibration),
            provider=self.backend.name, progress=self.log,
        )  # fmt: skip

    def _export(self, size: int) -> ModelPackage:
        assert self._export_key is not None
        exported, self._programs = exported_as_wanted(self._load(), self.programs(), self.recipe.export)
        if not self._steps.keeps(size):
            return exported
        found = self._steps.result(
            self._export_key,
            lambda place: keep_package(exported, place) | {"bytes": size},
            expected_bytes=size,
        )
        return kept_package(found.directory, found.facts)


def _module_bytes(loaded: LoadedModel) -> int:
    return sum(p.numel() * p.element_size() for p in loaded.module.parameters())
