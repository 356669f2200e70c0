"""The steps that train: from the loaded model to the one that is exported, and to what it is held against."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.errors import BadInputError, require
from onnxsmith.package import StepRecord
from onnxsmith.pipeline.staging import beside
from onnxsmith.pipeline.training_data import Lessons, TrainingData
from onnxsmith.pipeline.training_metrics import held_out_metrics
from onnxsmith.pipeline.training_recipe import (
    DistillSpec,
    FinetuneSpec,
    FitSpec,
    PruneSpec,
    TrainingSpec,
    TrainingStep,
)
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.pipeline.recipe import Recipe
    from onnxsmith.training import Examples, FitResult, Objective, Teacher

__all__ = ["Trained", "TrainingRun", "checkpoint_directory"]

# What the report says and the manifest does not: curves, and what is of one run alone, so that the same
# training has the same bytes.
_OF_ONE_RUN = ("curve", "evaluations", "seconds", "resumed_at")
# Examples that the first steps of a quantization are found on.
_ROUNDED = 128


def checkpoint_directory(destination: Path) -> Path:
    """Where the trainings of a run keep their states: beside the artifact, until it is there."""
    return beside(destination, ".training")


@dataclasses.dataclass
class Trained:
    """What came of the training.

    Attributes:
        model: What is exported.
        original: What it is held against: the model before the first step that made it smaller or coarser;
            None where no step did.
        records: What was done, for the manifest.
        report: What was done, with curves, for the report.
    """

    model: LoadedModel
    original: LoadedModel | None
    records: tuple[StepRecord, ...]
    report: dict[str, Any]


class TrainingRun:
    """The training of a recipe. What is wrong with its data is found when it is made."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        base: Path | None,
        checkpoints: Path | None = None,
        shared_by: str | None = None,
    ) -> None:
        """Reads the data, and checks the settings of every step.

        Args:
            recipe: With a training.
            base: The directory that relative paths of the recipe start from.
            checkpoints: Where states are kept, so that a run that was killed goes on; nowhere where None.
            shared_by: What trainings that keep their states there have in common: those that begin with
                the same steps then find these done.

        Raises:
            BadInputError: Data cannot be read, or settings make no sense.
            MissingDependencyError: torch is not installed.
        """
        assert recipe.training is not None
        require("torch", purpose="training")
        self.spec, self.seed = recipe.training, recipe.seed
        for step in self.spec.steps:
            if isinstance(step.spec, PruneSpec):
                step.spec.settings(seed=self.seed)
            else:
                step.spec.settings(seed=self.seed, device=self.spec.device)
            if isinstance(step.spec, DistillSpec):
                step.spec.weights()
        self._base, self._checkpoints, self._shared_by = base, checkpoints, shared_by
        self._data = TrainingData(recipe, base=base)

    def apply(self, loaded: LoadedModel, progress: Progress) -> Trained:
        """Takes the steps.

        Args:
            loaded: The model, in float32, with its weights in memory. It is changed.
            progress: Who listens.

        Raises:
            OnnxsmithError: A step cannot be taken.
        """
        original: LoadedModel | None = None
        records: list[StepRecord] = []
        steps: list[dict[str, Any]] = []
        with _threads(self.spec.threads):
            for number, step in enumerate(self.spec.steps):
                if step.compresses and original is None:
                    original = dataclasses.replace(loaded, module=copy.deepcopy(loaded.module))
                began = time.perf_counter()
                loaded, found = self._take(step, number, loaded, original, progress)
                seconds = time.perf_counter() - began
                given = step.spec.model_dump(mode="json", exclude_defaults=True)
                details = {name: value for name, value in found.items() if name not in _OF_ONE_RUN}
                records.append(StepRecord(step.name, given, seconds, details | self._lineage(step)))
                steps.append({"name": step.name, "parameters": given, "seconds": seconds, **found})
        report = {"data": self._data.described(), "seed": self.seed, "steps": steps}
        return Trained(loaded, original, tuple(records), report)

    def finish(self) -> None:
        """Removes the states: the artifact is there."""
        if self._checkpoints is not None:
            shutil.rmtree(self._checkpoints, ignore_errors=True)

    def _take(
        self,
        step: TrainingStep,
        number: int,
        loaded: LoadedModel,
        original: LoadedModel | None,
        progress: Progress,
    ) -> tuple[LoadedModel, dict[str, Any]]:
        spec = step.spec
        if isinstance(spec, PruneSpec):
            return self._prune(spec, loaded, progress)
        if isinstance(spec, DistillSpec):
            assert original is not None
            return self._distill(spec, number, loaded, original, progress)
        return self._finetune(spec, number, loaded, progress)

    def _prune(
        self, spec: PruneSpec, loaded: LoadedModel, progress: Progress
    ) -> tuple[LoadedModel, dict[str, Any]]:
        from onnxsmith.exporters.replacing import replace_module
        from onnxsmith.training import prune_vocabulary, sparsify
        from onnxsmith.training.teachers import forward

        module, before = loaded.module, _parameters(loaded.module)
        found: dict[str, Any] = {}
        with progress.step("prune") as step:
            lessons = self._data.lessons(loaded)
            train = lessons.train
            count = min(spec.samples, len(train))
            # Drawn by chance: rows may be sorted by their labels.
            numbers = [int(n) for n in np.random.default_rng(self.seed).permutation(len(train))[:count]]
            batches = [train.batch(numbers[i : i + 16]) for i in range(0, count, 16)]
            if spec.removes_units:
                found |= self._remove_units(spec, module, train.kind, batches)
            if spec.vocabulary is not None:
                used = lessons.token_ids() | self._data.special_ids(loaded) | {*spec.vocabulary.keep}
                found["vocabulary"] = prune_vocabulary(module, used)
            if spec.weights is not None:
                inputs = [_inputs(batch) for batch in batches]
                report = sparsify(module, spec.weights.settings(), batches=inputs, call=forward)
                found["weights"] = report.to_json()
            after = _parameters(module)
            step.note = f"{before / 1e6:.1f} to {after / 1e6:.1f} M parameters"
            if spec.removes_units:
                step.note += f", by {spec.method}"
            if spec.weights is not None:
                step.note += (
                    f", {found['weights']['zeros']:.0%} of the weights zero, by {spec.weights.method}"
                )
        sizes = {"parameters_before": before, "parameters_after": after, "ratio": after / before}
        return replace_module(loaded, module), found | sizes

    def _remove_units(
        self, spec: PruneSpec, module: Any, kind: str, batches: list[dict[str, Any]]
    ) -> dict[str, Any]:
        from onnxsmith.training import prune
        from onnxsmith.training.teachers import forward

        settings = spec.settings(seed=self.seed)
        inputs = [_inputs(batch) for batch in batches]
        result = prune(
            module, settings, batches=batches if settings.method == "taylor" else inputs,
            loss=_loss_of(kind), run=lambda: forward(module, inputs[0]),
        )  # fmt: skip
        found = result.to_json()
        # Thousands of numbers that nobody reads: the plan follows from them.
        found.pop("scores")
        return found

    def _finetune(
        self, spec: FinetuneSpec, number: int, loaded: LoadedModel, progress: Progress
    ) -> tuple[LoadedModel, dict[str, Any]]:
        from onnxsmith.exporters.replacing import with_new_head
        from onnxsmith.training import Supervision

        if spec.task is not None:
            loaded = with_new_head(loaded, spec.task, self._data.label_names(), seed=self.seed)
        lessons = self._data.lessons(loaded)
        return self._fit("finetune", spec, number, loaded, lessons, lessons.train, Supervision(), progress)

    def _distill(
        self,
        spec: DistillSpec,
        number: int,
        loaded: LoadedModel,
        original: LoadedModel,
        progress: Progress,
    ) -> tuple[LoadedModel, dict[str, Any]]:
        from onnxsmith.exporters import load_torch
        from onnxsmith.exporters.replacing import replace_module
        from onnxsmith.training import Distillation

        if spec.student is not None:
            source = ModelSource.parse(spec.student, base=self._base)
            student = load_torch(source, task=loaded.task)
            loaded = dataclasses.replace(
                student, provenance=student.provenance | {"student_of": loaded.provenance}
            )
        weights = spec.weights()
        with self._teacher(spec, original) as teacher:
            if weights.attention:
                _show_attention(loaded, teacher)
            lessons = self._data.lessons(loaded)
            objective = Distillation(teacher, weights, layers=spec.layers)
            made, found = self._fit(
                "distill", spec, number, loaded, lessons, lessons.extra, objective, progress
            )
        # Integers are no parameters, and are not counted as such.
        return made if spec.quantization else replace_module(made, made.module), found

    @contextlib.contextmanager
    def _teacher(self, spec: DistillSpec, original: LoadedModel) -> Iterator[Teacher]:
        """The original; or what the recipe names, in PyTorch or ONNX Runtime."""
        from onnxsmith.exporters import load_torch
        from onnxsmith.package_io import load_package
        from onnxsmith.runtime import OrtBackend
        from onnxsmith.runtime.samples import decoder_feeds
        from onnxsmith.training import RuntimeTeacher, TorchTeacher

        if spec.teacher is None:
            yield TorchTeacher(original.module, name="the original")
            return
        source = ModelSource.parse(spec.teacher, base=self._base)
        if source.is_torch:
            yield TorchTeacher(load_torch(source, task=original.task).module, name=spec.teacher)
            return
        assert source.path is not None
        with OrtBackend().open(load_package(source.path), name=spec.teacher) as session:
            # A decoder is asked with an empty cache: each example is a prompt.
            decodes = bool(session.cache)

            def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
                if not decodes:
                    return session.run(feeds)
                mask = feeds["attention_mask"] != 0
                given = decoder_feeds(session.inputs, feeds["input_ids"], mask=mask)
                return session.run(given, ["logits"])

            inputs = ["input_ids", "attention_mask"] if decodes else [one.name for one in session.inputs]
            outputs = [one.name for one in session.outputs]
            yield RuntimeTeacher(run, inputs=inputs, outputs=outputs, name=spec.teacher)

    def _fit(
        self,
        name: str,
        spec: FitSpec,
        number: int,
        loaded: LoadedModel,
        lessons: Lessons,
        examples: Examples,
        objective: Objective,
        progress: Progress,
    ) -> tuple[LoadedModel, dict[str, Any]]:
        from onnxsmith.training import FitProgress, fit
        from onnxsmith.training.fake_quantization import fix_quantization

        settings = spec.settings(seed=self.seed, device=self.spec.device)
        found: dict[str, Any] = {}
        if spec.quantization is not None:
            found["quantized_layers"] = _round(loaded, lessons.train, self.seed)
        if spec.folds is not None:
            found["cross_validation"] = self._cross_validate(spec, loaded, lessons, objective, progress)
        module = loaded.module
        held = lessons.held
        with progress.step(name, settings.updates(len(examples))) as step:

            def on_update(done: FitProgress) -> None:
                step.advance(note=f"loss {done.loss:.4g}")

            before = held_out_metrics(module, held, batch=spec.batch) if held is not None else {}
            result = fit(
                module, examples, objective, settings,
                validation=held,
                metrics=(lambda model: held_out_metrics(model, held, batch=spec.batch)) if held else None,
                checkpoint=self._state_file(number, name),
                on_update=on_update,
            )  # fmt: skip
            step.note = _said(result, before)
        if spec.quantization is not None:
            fix_quantization(module)
        plain = dataclasses.asdict(result)
        plain |= {"examples": len(examples), "held_out": len(held) if held is not None else 0}
        plain |= {"before": before, "objective": objective.described(), "loss": result.curve[-1]["loss"]}
        plain["after"] = next((e for e in result.evaluations if e["update"] == result.kept), {})
        return loaded, found | plain

    def _state_file(self, number: int, name: str) -> Path | None:
        if self._checkpoints is None:
            return None
        if self._shared_by is None:
            return self._checkpoints / f"{number}-{name}.pt"
        steps = [step.model_dump(mode="json") for step in self.spec.steps[: number + 1]]
        rest = self.spec.model_dump(mode="json", exclude={"steps", "threads"})
        told = json.dumps([self._shared_by, self.seed, rest, steps], sort_keys=True)
        return self._checkpoints / f"{number}-{name}-{hashlib.sha256(told.encode()).hexdigest()[:20]}.pt"

    def identity(self, spec: TrainingSpec) -> dict[str, Any]:
        """What decides what a training of these data learns, besides the model: values, seed, and hashes."""
        from onnxsmith.pipeline.tuning_store import source_sha256

        named = ("data", "unlabelled", "validation")
        told = {**spec.model_dump(mode="json", exclude={*named, "threads"}), "seed": self.seed}
        models = {
            text: source_sha256(ModelSource.parse(text, base=self._base))
            for step in spec.steps
            for key in ("teacher", "student")
            if (text := getattr(step.spec, key, None)) is not None
        }
        described = {k: v for k, v in self._data.described().items() if k not in named}
        return told | {"rows": described, "held": self._data.held_sha256(), "models": models}

    def _cross_validate(
        self,
        spec: FitSpec,
        loaded: LoadedModel,
        lessons: Lessons,
        objective: Objective,
        progress: Progress,
    ) -> dict[str, Any]:
        from onnxsmith.training import cross_validate, fit

        assert spec.folds is not None
        settings = spec.settings(seed=self.seed, device=self.spec.device)
        with progress.step("folds", spec.folds) as step:

            def train(rest: Examples, part: Examples, fold: int) -> Mapping[str, float]:
                def judged(one: Any) -> Mapping[str, float]:
                    return held_out_metrics(one, part, batch=spec.batch)

                model = copy.deepcopy(loaded.module)
                fit(model, rest, objective, settings, validation=part, metrics=judged)
                step.advance(note=f"fold {fold + 1}")
                return judged(model)

            result = cross_validate(train, lessons.train, folds=spec.folds, seed=self.seed)
            step.note = ", ".join(
                f"{name} {value:.4f} ± {result.spread[name]:.4f}" for name, value in result.mean.items()
            )
        return dataclasses.asdict(result)

    def _lineage(self, step: TrainingStep) -> dict[str, Any]:
        import torch
        import transformers

        return {
            "data": self._data.described(), "seed": self.seed,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what is right."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _round(loaded: LoadedModel, examples: Examples, seed: int) -> int:
    """Fake quantization, with first steps from some of the examples."""
    from onnxsmith.training.fake_quantization import prepare_quantization

    numbers = [int(n) for n in np.random.default_rng(seed).permutation(len(examples))[:_ROUNDED]]
    parts = [examples.batch(numbers[i : i + 16]) for i in range(0, len(numbers), 16)]
    return len(prepare_quantization(loaded.module, parts))


def _said(result: FitResult, before: Mapping[str, float]) -> str:
    text = f"loss {result.curve[-1]['loss']:.4g} after {result.updates} updates"
    if result.evaluations:
        kept = next(e for e in result.evaluations if e["update"] == result.kept)
        metrics = [
            f"{name} {before[name]:.3f} to {value:.3f}" for name, value in kept.items() if name in before
        ]
        text += "".join(f", {metric}" for metric in metrics[:1])
    if result.ended != "finished":
        text += f", ended by {result.ended}"
    if result.resumed_at:
        text += f", went on at {result.resumed_at}"
    return text


def _show_attention(loaded: LoadedModel, teacher: Teacher) -> None:
    """Only the plain implementation gives attention back."""
    for model in (loaded.module, getattr(teacher, "model", None)):
        switch = getattr(model, "set_attn_implementation", None)
        if switch is not None:
            switch("eager")


def _loss_of(kind: str) -> Any:
    """The loss that Taylor scores are about: that of the task; of a model that embeds, its embeddings'."""
    from onnxsmith.training.objectives import supervised_loss
    from onnxsmith.training.teachers import forward

    def loss(model: Any, batch: Mapping[str, Any]) -> Any:
        if kind != "embedding":
            return supervised_loss(forward(model, batch), batch, kind)
        raise BadInputError(
            "prune: method taylor", got="a model that embeds, which has no loss", expected="labels",
            remedy="Use wanda or l2, or give it a head first",
        )  # fmt: skip

    return loss


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
