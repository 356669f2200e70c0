"""What the points of a search are made from and judged by: an exported model, and what PyTorch said of it."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError, require
from onnxsmith.package import TEXT_GENERATION, ModelPackage, TensorSpec
from onnxsmith.package_io import save_package
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.recipe_export import exported_as_wanted
from onnxsmith.pipeline.references import open_programs
from onnxsmith.pipeline.run_tasks import TaskMeasure
from onnxsmith.pipeline.staging import require_space
from onnxsmith.pipeline.texts import load_text, share_bounds
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.pipeline.training_run import TrainingRun
from onnxsmith.pipeline.tuning_space import TuneSpec
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.runtime.components import Expected
    from onnxsmith.runtime.metrics import Outcome

__all__ = ["Part", "Prepared", "of_seen", "parts_of", "prepare", "task_of"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the data that a search may see.

    Attributes:
        name: What to call it.
        share: From and to, of all evaluation data.
        fold: The part of the calibration data that is left out; None for none.
        provisional: Whether it is only a first look: its numbers do not count.
    """

    name: str
    share: tuple[float, float]
    fold: int | None = None
    provisional: bool = False


def parts_of(spec: TuneSpec) -> list[Part]:
    """The parts that a point is scored on, one after the other, until it is clear that it will not do."""
    seen = round(1 - spec.held_out, 12)
    if spec.folds == 1:
        look = [Part("first look", (0.0, seen / 4), provisional=True)] if spec.prune else []
        return [*look, Part("all", (0.0, seen))]
    return [
        Part(f"fold {i + 1}", (seen * i / spec.folds, seen * (i + 1) / spec.folds), fold=i)
        for i in range(spec.folds)
    ]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What points are made from and judged by; other processes load it.

    Attributes:
        exported: The directory of the exported model.
        origin: Its task and source.
        signatures: Component to name, inputs and outputs of the reference.
        expected: What PyTorch gave for inputs of several shapes.
        tokens: The text, without what is held out; None where none is scored.
        logits: The file of PyTorch's predictions of it.
        outcomes: Part to task, what PyTorch said of its rows, and what the original said.
        reference: PyTorch's own numbers, for the report.
        original: The directory of the model before training made it smaller; None where that was not
            exported, or there is none.
        original_perplexity: Part to the perplexity of the original; empty where there is none.
    """

    exported: Path
    origin: Mapping[str, Any]
    signatures: Mapping[str, tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]
    expected: Expected
    tokens: npt.NDArray[np.int64] | None
    logits: Path | None
    outcomes: Mapping[str, tuple[str, Outcome, Outcome | None]]
    reference: Mapping[str, Any]
    original: Path | None = None
    original_perplexity: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Writes it for the processes of this search, and for nobody else: it is a pickle."""
        path.write_bytes(pickle.dumps(self))
        return path

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Reads what this search wrote."""
        found = pickle.loads(path.read_bytes())
        assert isinstance(found, cls)
        return found


def prepare(
    recipe: Recipe,
    source: ModelSource,
    work: Path,
    *,
    base: Path | None,
    progress: Progress,
    training: TrainingRun | None = None,
) -> Prepared:
    """Trains and exports the model, and asks PyTorch what every point will be asked.

    Args:
        recipe: With a key ``tune``.
        source: The model.
        work: An empty directory.
        base: The directory that relative paths of the recipe start from.
        progress: Who listens.
        training: What the recipe's training becomes for these points.

    Raises:
        OnnxsmithError: The model cannot be trained or exported, or there are too few data to hold some out.
    """
    from onnxsmith.exporters import load_torch, torch_programs
    from onnxsmith.runtime import perplexity

    assert recipe.tune is not None
    spec, parts = recipe.evaluation.perplexity, parts_of(recipe.tune)
    tasks = {part.name: task_of(recipe, part, base) for part in parts if recipe.evaluation.task}
    text = load_text(spec.data, base=base) if spec else ""
    with progress.step("load") as step:
        plain = training is None
        dtype = recipe.export.dtype if plain else "float32"
        loaded = load_torch(source, task=recipe.task, dtype=dtype, lazy=plain, adapter=recipe.export.adapter)
        step.note = f"{loaded.provenance['architecture']}, {loaded.provenance['parameters'] / 1e6:.1f} M"
    original: LoadedModel | None = None
    if training is not None:
        trained = training.apply(loaded, progress)
        loaded, original = trained.model, trained.original
        loaded.module.to(getattr(require("torch", purpose="training"), recipe.export.dtype))
    size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    require_space(work, size * (2 + recipe.tune.workers), purpose=f"points of {recipe.name}")
    if loaded.task != TEXT_GENERATION and spec is not None:
        raise BadInputError(
            f"recipe {recipe.name}: evaluation.perplexity",
            got=f"a model for {loaded.task or 'no known task'}", expected="a decoder",
        )  # fmt: skip
    with progress.step("export"):
        programs = torch_programs(loaded)
        exported, programs = exported_as_wanted(loaded, programs, recipe.export)
        directory = work / "exported"
        directory.mkdir()
        save_package(exported, directory)
    name, program = next(iter(programs.items()))
    tokens, logits, outcomes = None, None, {}
    found: dict[str, Any] = {"name": f"torch {recipe.export.dtype}", "size_mb": size / 1e6}
    before = None
    if original is not None:
        before = _ask_original(recipe, original, work, parts, tasks, text, progress)
        found |= before.facts
    with open_programs(programs) as reference, progress.step("reference") as step:
        expected = reference.expected(samples=recipe.evaluation.comparison.samples, seed=recipe.seed)
        if spec is not None:
            tokens = _tokens_of(recipe, exported, text)
            for part in parts:
                share_bounds(len(tokens), of_seen(part, recipe.tune), spec.window)
            windows = -(-len(tokens) // spec.window)
            shape = (len(tokens) - windows, int(program.outputs[0].shape[-1]))  # type: ignore[index,arg-type]
            require_space(work, shape[0] * shape[1] * 4, purpose="the reference's predictions")
            logits = work / "logits.npy"
            kept = np.lib.format.open_memmap(logits, mode="w+", dtype=np.float32, shape=shape)
            scored = perplexity(reference.sessions[name], tokens, window=spec.window, keep_logits=kept)
            kept.flush()
            found.setdefault("perplexity", dataclasses.asdict(scored))
            step.note = f"perplexity {scored.value:.3f} on {scored.tokens} tokens"
        for which, task in tasks.items():
            said = task.reference(program.task, reference.sessions[name], exported.files)
            if before is None:
                found["task_metrics"] = said
            outcomes[which] = (*task.expected, task.original_outcome)
        signatures = {
            key: (session.name, session.inputs, session.outputs)
            for key, session in reference.sessions.items()
        }
    origin = {"task": exported.task, "source": dict(exported.source)}
    return Prepared(
        directory, origin, signatures, expected, tokens, logits, outcomes, found,
        original=before.exported if before is not None else None,
        original_perplexity=before.perplexity if before is not None else {},
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Original:
    """What is known of the model before training made it smaller."""

    exported: Path | None
    perplexity: Mapping[str, float]
    facts: Mapping[str, Any]


def _ask_original(
    recipe: Recipe,
    original: LoadedModel,
    work: Path,
    parts: Sequence[Part],
    tasks: Mapping[str, TaskMeasure],
    text: str,
    progress: Progress,
) -> _Original:
    """Exports it where latency is compared with it, and asks it what the points will be asked."""
    from onnxsmith.exporters import torch_programs
    from onnxsmith.runtime import perplexity

    assert recipe.tune is not None
    spec, programs = recipe.evaluation.perplexity, torch_programs(original)
    name, program = next(iter(programs.items()))
    exported: Path | None = None
    package = ModelPackage({}, original.task, dict(original.files))
    with progress.step("original"):
        if recipe.evaluation.benchmark is not None and len(programs) == 1:
            package, programs = exported_as_wanted(original, programs, recipe.export)
            exported = work / "original"
            exported.mkdir()
            save_package(package, exported)
        size = sum(p.numel() * p.element_size() for p in original.module.parameters())
        facts: dict[str, Any] = {"name": "the original, torch float32", "size_mb": size / 1e6}
        found: dict[str, float] = {}
        with open_programs(programs) as reference:
            session = reference.sessions[name]
            for task in tasks.values():
                facts["task_metrics"] = task.original(program.task, session, package.files)
            if spec is not None:
                tokens = _tokens_of(recipe, package, text)
                for part in parts:
                    bounds = share_bounds(len(tokens), of_seen(part, recipe.tune), spec.window)
                    scored = perplexity(session, tokens[slice(*bounds)], window=spec.window)
                    found[part.name], facts["perplexity"] = scored.value, dataclasses.asdict(scored)
    return _Original(exported, found, facts)


def _tokens_of(recipe: Recipe, package: ModelPackage, text: str) -> npt.NDArray[np.int64]:
    """The tokens of the text that the search may see."""
    spec = recipe.evaluation.perplexity
    assert spec is not None and recipe.tune is not None
    ids = PackageTokenizer(package).encode(text[: spec.max_tokens * 16])[: spec.max_tokens]
    begin, end = share_bounds(len(ids), spec.share, spec.window)
    seen = share_bounds(end - begin, (0.0, 1 - recipe.tune.held_out), spec.window)
    return np.array(ids[begin:end], np.int64)[slice(*seen)]


def of_seen(part: Part, spec: TuneSpec) -> tuple[float, float]:
    """A part's share of what the search may see."""
    seen = 1 - spec.held_out
    return part.share[0] / seen, min(part.share[1] / seen, 1.0)


def task_of(recipe: Recipe, part: Part, base: Path | None) -> TaskMeasure:
    """What measures a task on a part of the data."""
    spec = recipe.evaluation.task
    assert spec is not None
    # A part of the part that the recipe itself takes.
    begin, width = spec.share[0], spec.share[1] - spec.share[0]
    share = (begin + part.share[0] * width, begin + part.share[1] * width)
    evaluation = recipe.evaluation.model_copy(update={"task": spec.model_copy(update={"share": share})})
    return TaskMeasure(recipe.model_copy(update={"evaluation": evaluation}), base)
