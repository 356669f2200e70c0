"""What a run is expected to need, before the first minute of work, and whether this machine has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import OnnxsmithError, ResourceError
from onnxsmith.free_memory import available_memory
from onnxsmith.pipeline.context_fitting import fit_context
from onnxsmith.pipeline.datasets import load_dataset
from onnxsmith.pipeline.model_size import ModelSize, loaded_size, model_size, why_unknown
from onnxsmith.pipeline.recipe import Recipe, TaskSpec
from onnxsmith.pipeline.run_steps import RunSteps, cache_directory, on_one_disk
from onnxsmith.pipeline.staging import require_space
from onnxsmith.pipeline.training_recipe import FitSpec, TrainingSpec
from onnxsmith.source import ModelSource, SourceKind

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.pipeline.step_cache import StepCache

__all__ = ["Forecast", "forecast_run", "foresee", "require_resources", "running_bytes"]

# Fitted to the runs that docs/cache.md names. Python with torch, transformers, ONNX and ONNX Runtime:
_BASE = 560_000_000
# What ONNX Runtime holds of a variant, as a part of its file: it packs the matrices of float weights; of
# quantized ones it keeps both forms; of recurrent layers it makes several copies.
_OPENED, _OPENED_QUANTIZED, _OPENED_RECURRENT = 1.0, 1.5, 3.4
# While variants are made: what is read of the export and its copies, without and with a cache.
_MAKING, _MAKING_CACHED = 1.25, 1.55
# A decoder is compared on so many tokens in all and in the longest case, whose logits ONNX Runtime holds, and
# a copy of them.
_COMPARED_ROWS, _LONGEST_CASE = 217, 160
# A decoder's weights are read from their files one by one: while variants are made there are so many copies
# of the largest. Python with everything after that, when PyTorch maps them, and lets go of them again.
_COPIES, _MADE = 3.5, 660_000_000
# What ONNX Runtime holds of a decoder of floats, whose file it maps: it packs none of its matrices.
_OPENED_DECODER = 0.5
# An encoder with its decoder: what its graphs have of the weights, what stays of it after making variants.
_TWICE, _KEPT = 1.9, 0.87
# Predictions of a text: rows of the vocabulary for each token, and some windows of them at work in PyTorch,
# and in ONNX Runtime, whose arena grows by doubling.
_WINDOWS_TORCH, _WINDOWS = 5, 13
# What measures labelled data, and how many of the largest layer's values are there for each token of a batch.
_METRICS, _LAYERS = 80_000_000, 3
# A process that runs a model for the benchmark, before it has one.
_WORKER = 95_000_000
# What it holds of float weights, which are mapped: of embeddings little is touched. And of quantized ones.
_WORKER_FLOAT, _WORKER_DECODER, _WORKER_QUANTIZED = 0.8, 0.45, 0.8
# A prompt's logits: ONNX Runtime's arena, and copies.
_WORKER_LOGITS = 6
# Passes that make weights smaller, and their bits where they have no parameter of this name.
_QUANTIZED: Mapping[str, float] = {
    "quantize_weights": 4,
    "keep_gguf_blocks": 5,
    "quantize_mixed": 6,
    "quantize_dynamic": 8,
    "quantize_static": 8,
}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run is expected to need, in bytes.

    Attributes:
        peak: Of resident memory of the run's process; None where nothing is known.
        workers: Of the processes together that a benchmark opens beside it.
        disk: At the destination; what is there at the same time.
        cache: In the cache, if that is another disk or not.
        phases: The peak of each part of a run.
        reason: Why nothing is known; empty where something is.
    """

    peak: int | None
    workers: int = 0
    disk: int = 0
    cache: int = 0
    phases: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reason: str = ""

    @property
    def together(self) -> int:
        """What the machine has to have: the peak, or the benchmark with its processes."""
        return max(self.peak or 0, self.phases.get("benchmark", 0) + self.workers)

    def __str__(self) -> str:
        """In a line."""
        if self.peak is None:
            return f"no forecast because {self.reason}"
        more = f", and {self.workers / 1e6:.0f} MB in the processes of the benchmark" if self.workers else ""
        disk = f"about {(self.disk + self.cache) / 1e6:.0f} MB of disk"
        return f"about {self.peak / 1e6:.0f} MB of memory{more}; {disk}"

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data, in MB."""
        return {
            "peak_mb": None if self.peak is None else self.peak / 1e6,
            "workers_mb": self.workers / 1e6,
            "together_mb": None if self.peak is None else self.together / 1e6,
            "disk_mb": None if self.peak is None else (self.disk + self.cache) / 1e6,
            "cache_mb": self.cache / 1e6,
            "phases_mb": {name: size / 1e6 for name, size in self.phases.items()},
            "reason": self.reason,
        }


def forecast_run(
    recipe: Recipe,
    source: ModelSource,
    *,
    cache: StepCache | None,
    base: Path | None = None,
    loaded: LoadedModel | None = None,
) -> Forecast:
    """What a run of a recipe is expected to need.

    Args:
        recipe: What is to be done.
        source: The model. Only headers of its files are read.
        cache: Where steps are kept.
        base: The directory that relative paths of the recipe start from.
        loaded: The model in memory, where the source does not say how large it is.
    """
    size = loaded_size(loaded) if loaded is not None else model_size(source, task=recipe.task)
    if size is None:
        return Forecast(None, reason=why_unknown(source))
    width = 4 if recipe.export.dtype == "float32" or loaded is not None else 2
    exported = size.parameters * width
    cached = RunSteps(cache, Path()).keeps(exported)
    # The state of a training: weights and two moments.
    states = 3 * size.parameters * 4 if recipe.training is not None else 0
    twice = _TWICE if size.pair else 1.0
    written = [_variant_bytes(variant.specs(), size, twice, width) for variant in recipe.variants]
    phases = _phases(recipe, size, exported, written, cached=cached, base=base)
    calibrated = [
        one for one, variant in zip(written, recipe.variants, strict=True) if _is_quantized(variant.specs())
    ]
    begun = sum(calibrated) if recipe.calibration is not None else 0
    text = _text_bytes(recipe, size)
    benchmark = recipe.evaluation.benchmark
    if (
        benchmark is not None
        and written
        and all(_is_quantized(variant.specs()) for variant in recipe.variants)
    ):
        # They are timed beside the float model that they come from, which is made for that.
        written.append(int(twice * exported))
    return Forecast(
        peak=max(phases.values()),
        workers=_workers_bytes(size, written, exported, benchmark.prompt_tokens) if benchmark else 0,
        # Without a cache the export is written nowhere; with one, what passes made of calibration data is
        # kept as well, because it takes long, and the chosen variant is there twice.
        disk=states + (min(written, default=0) if cached else sum(written) + text),
        cache=exported + sum(written) + begun + text if cached else 0,
        phases=phases,
    )


def _phases(
    recipe: Recipe, size: ModelSize, exported: int, written: Sequence[int], *, cached: bool, base: Path | None
) -> dict[str, int]:
    """The peak of each part of a run."""
    # PyTorch's weights; a decoder's are read when it is first asked.
    held = (_MADE if size.decoder else _BASE) + exported
    making = int((_MAKING_CACHED if cached else _MAKING) * exported)
    if size.decoder and size.lazy:
        making = min(making, int(_COPIES * size.largest * exported / max(size.parameters, 1)))
    opened = max(_opened(size, written, exported), default=0)
    phases = {"export": _BASE + exported, "variants": _BASE + making}
    spec = recipe.evaluation.perplexity
    if size.decoder:
        logits = (_COMPARED_ROWS + 2 * _LONGEST_CASE) * size.vocabulary * 4
        asked, checked = (
            0 if spec is None
            else (spec.max_tokens + windows * min(spec.window, spec.max_tokens)) * size.vocabulary * 4
            for windows in (_WINDOWS_TORCH, _WINDOWS)
        )  # fmt: skip
        phases["reference"] = held + max(logits, asked)
        phases["check"] = _MADE + opened + max(logits, checked)
    else:
        phases["check"] = held + opened + int((_KEPT * _TWICE if size.pair else 0.0) * exported)
    if recipe.evaluation.task is not None:
        phases["reference"] = phases.get("reference", held)
        for phase in ("reference", "check"):
            phases[phase] += _labelled_bytes(recipe.evaluation.task, size, base)
    if recipe.evaluation.benchmark is not None:
        phases["benchmark"] = held
    if recipe.training is not None:
        phases["training"] = _training_bytes(recipe, size, base)
    return phases


def running_bytes(weights: int, *, quantized: bool, decoder: bool, recurrent: int = 0) -> int:
    """What a process holds that runs a model on the CPU and does nothing else.

    Args:
        weights: Bytes of all weights.
        quantized: Whether most of them are integers.
        decoder: Whether it has a KV cache, whose own bytes are not counted.
        recurrent: Bytes of those in recurrent layers.
    """
    each = _WORKER_QUANTIZED if quantized else _WORKER_DECODER if decoder else _WORKER_FLOAT
    return _WORKER + int(each * (weights - recurrent) + _OPENED_RECURRENT * recurrent)


def _workers_bytes(size: ModelSize, written: Sequence[int], exported: int, prompt: int) -> int:
    """The processes of the benchmark together: all variants are open at the same time."""
    recurrent = int(exported * size.recurrent / max(size.parameters, 1))
    logits = _WORKER_LOGITS * prompt * size.vocabulary * 4 if size.decoder else 0
    # An embedding that is the head too is read in whole, and packed for that.
    head = size.embedding * exported // max(size.parameters, 1) if size.tied else 0
    return sum(
        running_bytes(one, quantized=one < exported, decoder=size.decoder, recurrent=recurrent)
        + logits + (head if one >= exported else 0)
        for one in written
    )  # fmt: skip


def _opened(size: ModelSize, written: Sequence[int], exported: int) -> list[int]:
    """What ONNX Runtime holds of each variant."""
    recurrent = int(exported * size.recurrent / max(size.parameters, 1))
    floats = _OPENED_DECODER if size.decoder else _OPENED
    return [
        int((floats if one >= exported else _OPENED_QUANTIZED) * (one - recurrent))
        + int(_OPENED_RECURRENT * recurrent)
        for one in written
    ]


def _training_bytes(recipe: Recipe, size: ModelSize, base: Path | None) -> int:
    """Weights, their gradients, moments and copies, and what a batch leaves for the gradients."""
    spec = recipe.training
    assert spec is not None
    weights = size.parameters * 4
    rows = max((step.spec.batch for step in spec.steps if isinstance(step.spec, FitSpec)), default=16)
    tokens = rows * (spec.max_length if size.decoder else min(spec.max_length, _longest_row(spec, base)))
    left = tokens * (size.layers * (14 * size.width + 3 * size.inner)) * 4
    if size.decoder:
        left += 4 * tokens * size.vocabulary * 4
    return _BASE + 6 * weights + left


def _labelled_bytes(spec: TaskSpec, size: ModelSize, base: Path | None) -> int:
    """What measures labelled data, and what a batch of texts is while it goes through an encoder's layers."""
    if size.decoder or size.pair or not size.vocabulary:
        return _METRICS
    longest = min(spec.max_length or size.positions or 512, _longest_row(spec, base) or 512)
    return _METRICS + _LAYERS * spec.batch * longest * (4 * size.width + size.inner) * 4


def _longest_row(spec: TrainingSpec | TaskSpec, base: Path | None) -> int:
    """About how many tokens the longest row has: a token is three letters or more; 0 where nobody knows."""
    try:
        data = load_dataset(spec.data, columns=spec.columns, split=spec.split, limit=spec.limit, base=base)
    except OnnxsmithError:
        # The run says what is wrong with them.
        return spec.max_length or 0
    return (
        max((sum(len(v) for v in row.values() if isinstance(v, str)) for row in data.rows), default=0) // 3
        + 2
    )


def _text_bytes(recipe: Recipe, size: ModelSize) -> int:
    """The files of what PyTorch predicted: of a text, and of the inputs of the comparison."""
    spec = recipe.evaluation.perplexity
    rows = (0 if spec is None else spec.max_tokens) + (_COMPARED_ROWS if size.decoder else 0)
    return rows * size.vocabulary * 4


def _is_quantized(specs: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    return any(name in _QUANTIZED for name, _ in specs)


def _variant_bytes(
    specs: Sequence[tuple[str, Mapping[str, Any]]], size: ModelSize, twice: float, width: int
) -> int:
    """About what a variant's file has, as if all weights were quantized but those of recurrent layers."""
    each = float(width)
    for name, given in specs:
        if name == "to_float16":
            each = min(each, 2.0)
        elif name in _QUANTIZED:
            bits = given.get("bits", _QUANTIZED[name])
            # A scale for each block, and a zero point or a minimum.
            each = (bits if isinstance(bits, int) else _QUANTIZED[name]) / 8 + 4 / int(
                given.get("block_size") or 32
            )
        elif name == "fast_prompts":
            each += 1
    return int(twice * (size.parameters - size.recurrent) * each) + size.recurrent * width


def require_resources(forecast: Forecast, recipe: Recipe, destination: Path, *, force: bool = False) -> None:
    """Refuses what this machine cannot do.

    Args:
        forecast: What is needed.
        recipe: What is to be done.
        destination: Where the artifact is to be.
        force: Go on where it is not there.

    Raises:
        ResourceError: This machine has not as much.
    """
    if forecast.peak is None or force:
        return
    free = available_memory()
    if free < forecast.together:
        raise ResourceError(
            f"run of {recipe.name}", got=f"{free / 1e6:.0f} MB of memory available",
            expected=f"about {forecast.together / 1e6:.0f} MB at the peak",
            remedy="Use a machine with more, or fewer variants or tokens, or --ignore-forecast to go on",
        )  # fmt: skip
    place, needed = destination.resolve().parent, forecast.disk
    if forecast.cache:
        kept = cache_directory()
        try:
            if not on_one_disk(place, kept):
                require_space(kept, forecast.cache, purpose=f"run of {recipe.name}")
            else:
                needed += forecast.cache
        except ResourceError:
            # What the cache does not take is made beside the artifact.
            needed += forecast.cache
    require_space(place, needed, purpose=f"run of {recipe.name}")


def foresee(
    recipe: Recipe, destination: Path, *, base: Path | None = None, cache: StepCache | None
) -> Forecast:
    """What a run would need, without running it; a factory is called for it.

    Args:
        recipe: What is to be done.
        destination: Where the artifact would be.
        base: The directory that relative paths of the recipe start from.
        cache: Where steps would be kept.

    Raises:
        ResourceError: This machine has not as much.
        OnnxsmithError: A factory cannot be called.
    """
    source = ModelSource.parse(recipe.source, base=base)
    recipe = fit_context(recipe, source)
    found = forecast_run(recipe, source, cache=cache, base=base)
    if found.peak is None and source.kind is SourceKind.FACTORY:
        from onnxsmith.exporters import load_torch

        found = forecast_run(
            recipe, source, cache=cache, base=base, loaded=load_torch(source, task=recipe.task)
        )
    require_resources(found, recipe, destination)
    return found
