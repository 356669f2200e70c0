"""The recipe: what to make of which model, and what must hold.

A recipe is YAML, JSON or TOML. Its schema is exported with ``python -m onnxsmith.pipeline.schema`` and stands
in ``docs/recipe.schema.json``, for editors.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline._recipe_text import RecipeText
from onnxsmith.pipeline.recipe_base import RecipeModel as _Model
from onnxsmith.pipeline.recipe_base import broken_rule as _broken_rule
from onnxsmith.pipeline.recipe_names import check_names
from onnxsmith.pipeline.recipe_placeholders import combinations, fill_matrix, matrix_keys, slug
from onnxsmith.pipeline.training_recipe import TrainingSpec
from onnxsmith.pipeline.tuning_space import TuneSpec, alternatives

__all__ = [
    "BenchmarkSpec",
    "Budgets",
    "CalibrationSpec",
    "ComparisonSpec",
    "Evaluation",
    "ExportSpec",
    "PerplexitySpec",
    "Recipe",
    "TaskSpec",
    "Variant",
    "load_recipe",
]


_MOST_VARIANTS = 100
# What a budget or a choice is measured by.
_MEASURED_BY: Mapping[str, str] = {
    "perplexity": "perplexity",
    "perplexity_increase_pct": "perplexity",
    "kl_to_reference": "perplexity",
    "f1_drop_points": "task",
    "metric_drop_points": "task",
    "metric_drop_pct": "task",
    "latency_ms": "benchmark",
    "p50_ms": "benchmark",
    "latency_vs_original": "benchmark",
    "peak_rss_mb": "benchmark",
}


class ExportSpec(_Model):
    """How the model becomes ONNX."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Element type that the weights are loaded and exported in."""
    attention: Literal["auto", "fused", "standard"] = "auto"
    """Decoders: fused is GroupQueryAttention, standard ONNX operators only, auto is fused where possible."""
    opset: int | None = pydantic.Field(default=None, ge=18, le=25)
    """Version of the ONNX operator set; the exporter's default where absent."""
    exporter: Literal["auto", "torch", "optimum"] = "auto"
    """auto is torch, and optimum for what torch cannot trace and optimum has a description of."""
    tracing: Literal["auto", "layers", "whole"] = "auto"
    """Decoders: one layer of each kind, copied, or all layers; auto is layers where possible."""
    adapter: Literal["merge", "inputs"] = "merge"
    """A LoRA adapter as source: added to the weights, or inputs of the graph with defaults."""

    @pydantic.model_validator(mode="after")
    def _one_road(self) -> ExportSpec:
        if self.exporter == "optimum":
            for key, usual in (("attention", "auto"), ("tracing", "auto"), ("adapter", "merge")):
                if getattr(self, key) != usual:
                    raise _broken_rule((key,), f"{getattr(self, key)} with exporter: optimum", usual)
        return self


PassEntry = Annotated[
    str | dict[str, dict[str, Any]],
    pydantic.Field(description="The name of a pass, or {name: {parameter: value}}"),
]


class Variant(_Model):
    """One thing to make of the exported model."""

    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64)]
    """Unique among the variants; a file name."""
    preset: str | None = None
    """A ready-made list of passes; see `onnxsmith presets`."""
    passes: tuple[PassEntry, ...] | None = None
    """Passes in order, in place of a preset."""
    matrix: dict[str, Annotated[tuple[Any, ...], pydantic.Field(min_length=1)]] = pydantic.Field({})
    """Key to values: one variant for each combination, ``${matrix:KEY}`` in preset or passes replaced."""

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> Variant:
        if (self.preset is None) == (self.passes is None):
            got = "neither preset nor passes" if self.preset is None else "both preset and passes"
            raise _broken_rule((), got, "one of them")
        for number, entry in enumerate(self.passes or ()):
            if isinstance(entry, dict) and len(entry) != 1:
                got = f"an entry with {len(entry)} names"
                raise _broken_rule(("passes", number), got, "a name, or one name with its parameters")
        self._check_matrix()
        return self

    def _check_matrix(self) -> None:
        part = "preset" if self.passes is None else "passes"
        used = set(matrix_keys(getattr(self, part)))
        for key in sorted(used - self.matrix.keys()):
            near = difflib.get_close_matches(key, self.matrix, n=1)
            meant = f"a key of matrix; did you mean {near[0]!r}?" if near else "a key of matrix"
            raise _broken_rule((part,), f"${{matrix:{key}}}", meant)
        for key in self.matrix:
            if key not in used:
                raise _broken_rule(
                    ("matrix", key), f"no ${{matrix:{key}}} in {part}", "one, or all variants are the same"
                )
        count = math.prod(map(len, self.matrix.values()))
        if count > _MOST_VARIANTS:
            raise _broken_rule(("matrix",), f"{count} combinations", f"at most {_MOST_VARIANTS}")

    def expanded(self) -> list[Variant]:
        """One variant for each combination of the matrix: its values are in the name, after dashes."""
        if not self.matrix:
            return [self]
        found = []
        for values in combinations(self.matrix):
            filled = fill_matrix({"preset": self.preset, "passes": self.passes}, values)
            name = "-".join([self.name, *map(slug, values.values())])
            try:
                found.append(Variant.model_validate({"name": name, **filled}))
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                at = ".".join(str(part) for part in first["loc"][:1])
                raise _broken_rule(("matrix",), f"{name}: {at}: {first['msg']}", "a variant") from error
        return found

    def specs(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The passes as names and parameters.

        Raises:
            UnknownNameError: No such preset.
        """
        from onnxsmith.errors import UnknownNameError
        from onnxsmith.graph_passes import PRESETS

        if self.preset is not None:
            if self.preset not in PRESETS:
                raise UnknownNameError(f"variant {self.name}", name=self.preset, known=PRESETS, kind="preset")
            return list(PRESETS[self.preset])
        entries = self.passes or ()
        return [(e, {}) if isinstance(e, str) else next(iter(e.items())) for e in entries]


def _check_share(share: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= share[0] < share[1] <= 1:
        got = f"from {share[0]:g} to {share[1]:g}"
        raise _broken_rule((), got, "two numbers from 0 to 1 that increase")
    return share


Share = Annotated[tuple[float, float], pydantic.AfterValidator(_check_share)]


class ComparisonSpec(_Model):
    """Every variant against torch, output by output."""

    samples: int | None = pydantic.Field(default=None, ge=1)
    """Number of cases; all kinds (lengths, batches, padding, cache) where absent."""


class PerplexitySpec(_Model):
    """How well the variants predict a text (decoders)."""

    data: str
    """A text file, relative to the recipe; or package.module:attribute with a text or texts."""
    max_tokens: int = pydantic.Field(default=2048, ge=2)
    """Tokens used, from the beginning."""
    window: int = pydantic.Field(default=512, ge=2)
    """Tokens in a window, each from an empty cache; by default the model's positions where it has fewer."""
    share: Share = (0.0, 1.0)
    """Part of these tokens that is used, from and to, as shares of the whole; cut between windows."""


class BenchmarkSpec(_Model):
    """How fast the variants are."""

    prompt_tokens: int = pydantic.Field(default=128, ge=1)
    """Tokens of the prompt, or of the text; by default less where the model has fewer positions."""
    new_tokens: int = pydantic.Field(default=32, ge=2)
    """Tokens generated after it (decoders); by default less where the model has fewer positions."""
    batch: int = pydantic.Field(default=1, ge=1)
    runs: int = pydantic.Field(default=5, ge=1)
    threads: int | None = pydantic.Field(default=None, ge=1)
    """Intra-op threads; all usable processors where absent."""
    reference: bool = True
    """Also measure torch."""
    profile: bool = False
    """Also time the operators and nodes of each variant, beside what the machine could do at best."""


class TaskSpec(_Model):
    """How good the variants are at what the model is for, on labelled data."""

    data: str
    """A file or data set, as for `onnxsmith evaluate`; relative to the recipe."""
    metrics: tuple[str, ...] = ()
    """Names of metrics; the usual ones of the task where empty."""
    columns: dict[str, str] = pydantic.Field(default={})
    """What a column is for to its name, where that is not the usual one."""
    split: str = "test"
    """Of a Hugging Face data set or a directory."""
    limit: int | None = pydantic.Field(default=None, ge=1)
    """Rows used, from the beginning; all where absent."""
    share: Share = (0.0, 1.0)
    """Part of these rows that is used, from and to, as shares of the whole; shuffled first if not all."""
    batch: int = pydantic.Field(default=16, ge=1)
    """Rows at once."""
    max_length: int | None = pydantic.Field(default=None, ge=2)
    """Tokens of a row; what the model allows, at most 512, where absent."""
    max_new_tokens: int = pydantic.Field(default=64, ge=1)
    """Tokens generated for a row with a target."""
    train_share: float = pydantic.Field(default=0.75, gt=0, lt=1)
    """Rows that a probe on features is trained on."""


class Evaluation(_Model):
    """What is measured of each variant."""

    comparison: ComparisonSpec = ComparisonSpec()
    perplexity: PerplexitySpec | None = None
    task: TaskSpec | None = None
    benchmark: BenchmarkSpec | None = BenchmarkSpec()
    error_by_layer: bool = False
    """Also compare the inner tensors of the chosen variant with torch's, from the first to the last."""


class CalibrationSpec(_Model):
    """What passes that look at activations run the model on."""

    data: str
    """A text, as for perplexity, or an .npz file with one array for each input. Never the evaluation's."""
    samples: int = pydantic.Field(default=128, ge=1)
    """Samples used, from the beginning."""
    tokens: int = pydantic.Field(default=512, ge=2)
    """Longest sample of a text (pieces for decoders, else lines); less where there are fewer positions."""


class Budgets(_Model):
    """What a variant must keep to be chosen."""

    perplexity_increase_pct: float | None = None
    """Highest increase of perplexity over torch, or the original, in percent."""
    kl_to_reference: float | None = pydantic.Field(default=None, ge=0)
    """Highest mean KL divergence from torch's predictions, in nats."""
    size_mb: float | None = pydantic.Field(default=None, gt=0)
    """Largest size of graph and weights, in MB (10**6 bytes)."""
    latency_ms: float | None = pydantic.Field(default=None, gt=0)
    """Highest median of one call; for decoders of one decoded token."""
    p50_ms: float | None = pydantic.Field(default=None, gt=0)
    """Another name of `latency_ms`; one of the two."""
    peak_rss_mb: float | None = pydantic.Field(default=None, gt=0)
    """Highest peak of resident memory of a process that runs the variant."""
    latency_vs_original: float | None = pydantic.Field(default=None, gt=0)
    """Highest latency as a part of that of the original, which is made with the first variant's passes."""
    f1_drop_points: float | None = None
    """Points of F1 (macro average, or of answers) that may be lost against torch, or the original."""
    metric_drop_points: dict[str, float] = pydantic.Field(default={})
    """Name of a metric to the points that may be lost against torch, or the original."""
    metric_drop_pct: dict[str, float] = pydantic.Field(default={})
    """Name of a metric to the percents of its value that may be lost against torch, or the original."""

    @pydantic.model_validator(mode="after")
    def _one_latency(self) -> Budgets:
        if self.p50_ms is not None and self.latency_ms is not None:
            raise _broken_rule(("p50_ms",), "latency_ms too", "one of them: they are the same")
        return self

    def limits(self) -> dict[str, float]:
        """The budgets that are set, with one for each metric: ``accuracy_drop_points``."""
        found: dict[str, float] = {}
        for key, value in self.model_dump(exclude_none=True).items():
            # `metric_drop_points: {accuracy: 1}` is `accuracy_drop_points`.
            suffix = key.removeprefix("metric")
            if suffix == key:
                found["latency_ms" if key == "p50_ms" else key] = value
            else:
                found |= {f"{name}{suffix}": limit for name, limit in value.items()}
        return found


class Recipe(_Model):
    """A source, what to make of it, and what must hold."""

    schema_version: Literal[1]
    extends: str | None = None
    """A recipe that this one adds to, relative to this one. Filled in when a recipe is read."""
    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64)]
    source: str
    """A Hugging Face directory or hub id, a .gguf file, package.module:factory, or pkg:package/file."""
    task: str | None = None
    """The task; found from the model where absent."""
    training: TrainingSpec | None = None
    """Steps between loading and exporting: fine-tune, prune, distil."""
    export: ExportSpec = ExportSpec()
    variants: tuple[Variant, ...] = ()
    """What to make, each by itself. At least one, but for recipes that are only tuned."""
    tune: TuneSpec | None = None
    """What `onnxsmith tune` searches; `onnxsmith run` does not look at it."""
    calibration: CalibrationSpec | None = None
    provider: str = "cpu"
    """The execution provider that the variants run on: a name, with options ``name:key=value,...`` too."""
    require_provider: tuple[str, ...] = ()
    """Shares that the provider must have, such as ``cuda>=95%``, or a variant fails."""
    evaluation: Evaluation = Evaluation()
    budgets: Budgets = Budgets()
    choose: Literal["size_mb", "latency_ms", "perplexity"] = "size_mb"
    """Of the variants that keep the budgets, the one with the least of this is packed."""
    prompt: str | None = None
    """Decoders: the packed artifact continues this text, as the last check."""
    seed: int = pydantic.Field(default=0, ge=0)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not self.variants and self.tune is None:
            raise _broken_rule(("variants",), "no variant", "at least one, or a key tune")
        if self.tune is not None and self.tune.training:
            self._check_open_training(self.tune)
        names: set[str] = set()
        expanded = [variant.expanded() for variant in self.variants]
        for number, variants in enumerate(expanded):
            for variant in variants:
                if variant.name in names:
                    raise _broken_rule(
                        ("variants", number, "name"),
                        f"a second variant named {variant.name!r}",
                        "unique names",
                    )
                names.add(variant.name)
        # Whoever reads the recipe sees what is made.
        object.__setattr__(self, "variants", tuple(itertools.chain.from_iterable(expanded)))
        scored = self.evaluation.perplexity
        if self.calibration and scored and self.calibration.data == scored.data:
            raise _broken_rule(
                ("calibration", "data"),
                "the text of evaluation.perplexity",
                "another one, or nothing is measured",
            )
        self._check_training()
        budgets = self.budgets.model_dump(exclude_none=True, exclude_defaults=True)
        needs: list[tuple[str, tuple[str | int, ...]]] = [(name, ("budgets", name)) for name in budgets]
        needs.append((self.choose, ("choose",)))
        for number, name in enumerate(self.tune.objectives if self.tune else ()):
            needs.append((name, ("tune", "objectives", number)))
        for measured, at in needs:
            suffix = measured.rpartition("_drop_")[2]
            part = _MEASURED_BY.get(measured, "task" if suffix in ("points", "pct") else None)
            if part and getattr(self.evaluation, part) is None:
                raise _broken_rule(at, f"no evaluation.{part}", "one, to measure this by")
        return self

    def _check_open_training(self, tune: TuneSpec) -> None:
        """Each value that a search may choose is one that the training takes."""
        if self.training is None:
            raise _broken_rule(("tune", "training"), "a recipe without training", "the key training")
        for key, value in tune.training.items():
            for one in alternatives(value, ("tune", "training", key)):
                try:
                    self.training.with_values({key: one})
                except BadInputError as error:
                    got = f"{one!r}: {error.got}"
                    raise _broken_rule(("tune", "training", key), got, error.expected or "") from error

    def _check_training(self) -> None:
        scored = self.evaluation
        if self.training is None:
            if self.budgets.latency_vs_original is not None:
                raise _broken_rule(("budgets", "latency_vs_original"), "no training", "steps that compress")
            return
        tested = [part.data for part in (scored.task, scored.perplexity) if part is not None]
        for name in ("data", "validation", "unlabelled"):
            if getattr(self.training, name) in tested:
                raise _broken_rule(
                    ("training", name), "what is evaluated on", "other data, or nothing is measured"
                )
        quantized = any(getattr(step.spec, "quantization", None) for step in self.training.steps)
        if quantized and self.export.dtype != "float32":
            raise _broken_rule(
                ("export", "dtype"), self.export.dtype, "float32, in which quantization is trained"
            )
        compresses = any(step.compresses for step in self.training.steps)
        if self.budgets.latency_vs_original is not None and not compresses:
            raise _broken_rule(
                ("budgets", "latency_vs_original"),
                "no step that compresses",
                "prune, distill or quantization",
            )


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: A YAML, JSON or TOML file.
        overrides: ``key=value`` with dotted keys (``budgets.size_mb=100``); values are YAML.

    Raises:
        RecipeError: It cannot be read, or does not validate. The message names the line and the key.
    """
    text = RecipeText.read(path, extends=True)
    for override in overrides:
        text.override(override)
    try:
        recipe = Recipe.model_validate(text.data)
    except pydantic.ValidationError as error:
        raise text.explain(error, Recipe) from error
    # A matrix is many variants of one entry.
    check_names(text, recipe, [Variant.model_validate(entry) for entry in text.data.get("variants", ())])
    return recipe
