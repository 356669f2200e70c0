"""The part of a recipe that trains: steps between loading the model and exporting it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.recipe_base import RecipeModel, broken_rule
from onnxsmith.training.objectives import DistillationWeights
from onnxsmith.training.settings import TrainingSettings
from onnxsmith.training.sparsity import SparsitySettings
from onnxsmith.training.structured import PruningSettings

__all__ = [
    "DistillSpec",
    "FinetuneSpec",
    "FitSpec",
    "PruneSpec",
    "TrainingSpec",
    "TrainingStep",
    "VocabularySpec",
    "WeightsSpec",
]

Share = Annotated[float, pydantic.Field(ge=0, lt=1)]


class FitSpec(RecipeModel):
    """How a step trains. AdamW; weights and their gradients are float32."""

    epochs: float = pydantic.Field(default=3.0, gt=0)
    """Times that every example is seen."""
    steps: int | None = pydantic.Field(default=None, ge=1)
    """Updates of the weights, in place of epochs."""
    batch: int = pydantic.Field(default=32, ge=1)
    """Examples in one forward pass."""
    accumulate: int = pydantic.Field(default=1, ge=1)
    """Forward passes to one update."""
    learning_rate: float = pydantic.Field(default=5e-5, gt=0)
    """The highest."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up."""
    warmup_share: Share = 0.1
    """Share of all updates in which the rate rises."""
    weight_decay: float = pydantic.Field(default=0.01, ge=0)
    """Of matrices; biases and norms have none."""
    max_gradient_norm: float | None = pydantic.Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the arithmetic: autocast, for fp16 with loss scaling."""
    dropout: Share | None = None
    """In place of the model's own, while it is trained."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that keep their values."""
    evaluate_every: int | None = pydantic.Field(default=None, ge=1)
    """Updates between evaluations on held-out rows; each epoch where absent."""
    patience: int | None = pydantic.Field(default=None, ge=1)
    """Evaluations without a better value after which training stops; never where absent."""
    watch: str = "loss"
    """What is better on held-out rows: loss or perplexity (lower), accuracy, f1_macro or pearson (higher)."""
    keep_best: bool = True
    """Keep the weights of the best evaluation, not those of the last update."""
    max_minutes: float | None = pydantic.Field(default=None, gt=0)
    """Training stops after this time; the result then depends on the machine."""
    folds: int | None = pydantic.Field(default=None, ge=2)
    """Cross-validate with so many parts before the training itself: mean and spread go to the report."""
    quantization: Literal["int8"] | None = None
    """Train with fake quantization of weights and activations; what is exported has QuantizeLinear."""

    def settings(self, *, seed: int, device: str) -> TrainingSettings:
        """The same for the training itself."""
        names = {field.name for field in dataclasses.fields(TrainingSettings)}
        given = {name: value for name, value in self.model_dump().items() if name in names}
        return TrainingSettings(**given, seed=seed, device=device)


class FinetuneSpec(FitSpec):
    """Learn from labels."""

    task: Literal["text-classification", "token-classification"] | None = None
    """Give the model a new head for this task first; the one that it has where absent."""


class DistillSpec(FitSpec):
    """Learn from a teacher."""

    teacher: str | None = None
    """A source, or an ONNX model; the model before it was pruned or replaced where absent."""
    student: str | None = None
    """A Hugging Face directory of the model that goes on; the one that the steps before left where absent."""
    temperature: float = pydantic.Field(default=2.0, gt=0)
    """Of the soft targets: higher shows more of what the teacher thinks of wrong answers."""
    soft: float = pydantic.Field(default=1.0, ge=0)
    """Weight of the teacher's predictions; for models without a head, of its embeddings."""
    hard: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the labels."""
    hidden: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the hidden states, layer by layer."""
    cosine: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the direction of the last hidden state."""
    attention: float = pydantic.Field(default=0.0, ge=0)
    """Weight of attention, layer by layer."""
    layers: tuple[int, ...] | None = None
    """For each layer of the student the teacher's that it stands for, from 0; evenly spaced where absent."""

    def weights(self) -> DistillationWeights:
        """The same for the training itself."""
        names = {field.name for field in dataclasses.fields(DistillationWeights)}
        return DistillationWeights(**{n: v for n, v in self.model_dump().items() if n in names})


class WeightsSpec(RecipeModel):
    """Which single weights become zero; tensors keep their size."""

    ratio: Share = 0.5
    """Share of each matrix that goes; of each row with wanda."""
    pattern: str = "unstructured"
    """unstructured, or N:M such as 2:4: N of each M weights in a row stay, whatever the ratio."""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    """What goes: the smallest; the smallest products with activations; what can be made up for best."""
    scope: Literal["layer", "global"] = "layer"
    """Whether each matrix loses the same share, or all are ranked together (magnitude)."""
    threshold: float | None = pydantic.Field(default=None, ge=0)
    """Take what is smaller than this, in place of a ratio (magnitude)."""
    damping: float = pydantic.Field(default=0.01, gt=0)
    """Of sparsegpt; 0.1 is better with fewer than about ten tokens for each column of a matrix."""
    skip: tuple[str, ...] = ()
    """Patterns of names of modules that keep their weights."""

    def settings(self) -> SparsitySettings:
        """The same for the pruning itself."""
        return SparsitySettings(**self.model_dump())


class VocabularySpec(RecipeModel):
    """Which rows of the embedding stay: those of tokens in the training data, and of special tokens."""

    keep: tuple[int, ...] = ()
    """Ids that keep their row though the data have none of them."""


class PruneSpec(RecipeModel):
    """Remove what is needed least; tensors become smaller, but for single weights."""

    heads: Share = 0.0
    """Share of the attention heads to remove."""
    neurons: Share = 0.0
    """Share of the MLPs' neurons to remove."""
    layers: float = pydantic.Field(default=0.0, ge=0)
    """Layers to remove: a share below 1, or a number."""
    method: Literal["l1", "l2", "taylor", "wanda", "random"] = "taylor"
    """The score: size of the weights, or effect on the loss or the activations on the training data."""
    scope: Literal["layer", "global"] = "layer"
    """Whether each layer loses the same share, or all layers' units are ranked together."""
    threshold: float | None = pydantic.Field(default=None, ge=0)
    """Also remove what scores below this part of its layer's mean."""
    samples: int = pydantic.Field(default=256, ge=1)
    """Training rows that scores are measured on."""
    vocabulary: VocabularySpec | None = None
    """Remove rows of the embedding that the training data never use."""
    weights: WeightsSpec | None = None
    """Set single weights to zero, after everything else; they stay zero in later steps."""

    def settings(self, *, seed: int) -> PruningSettings:
        """The same for the pruning itself."""
        return PruningSettings(**self.model_dump(exclude={"samples", "vocabulary", "weights"}), seed=seed)

    @property
    def removes_units(self) -> bool:
        """Whether heads, neurons or layers go."""
        return bool(self.heads or self.neurons or self.layers or self.threshold is not None)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        # `vocabulary:` in YAML gives null, and means all defaults; so does `vocabulary: true`.
        if not isinstance(data, dict):
            return data
        return {
            key: {} if key in ("vocabulary", "weights") and value in (None, True) else value
            for key, value in data.items()
        }

    @pydantic.model_validator(mode="after")
    def _something(self) -> PruneSpec:
        if not (self.removes_units or self.vocabulary or self.weights):
            known = "heads, neurons, layers, threshold, vocabulary or weights"
            raise broken_rule((), "nothing to prune", known)
        if self.weights is not None:
            try:
                self.weights.settings()
            except BadInputError as error:
                raise broken_rule(("weights",), error.got, error.expected or "other values") from error
        return self


class TrainingStep(RecipeModel):
    """One step: exactly one of its keys."""

    finetune: FinetuneSpec | None = None
    """Learn from labels."""
    prune: PruneSpec | None = None
    """Remove what is needed least."""
    distill: DistillSpec | None = None
    """Learn from a teacher."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        # `- distill:` in YAML gives null, and means all defaults.
        if isinstance(data, dict):
            return {
                key: {} if value is None and key in cls.model_fields else value for key, value in data.items()
            }
        return {data: {}} if isinstance(data, str) else data

    @pydantic.model_validator(mode="after")
    def _one(self) -> TrainingStep:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            got = f"a step with {' and '.join(given) or 'nothing'}"
            raise broken_rule((), got, "one of finetune, prune, distill")
        return self

    @property
    def name(self) -> str:
        """Which it is."""
        return next(n for n in type(self).model_fields if getattr(self, n) is not None)

    @property
    def spec(self) -> FinetuneSpec | PruneSpec | DistillSpec:
        """What it says."""
        found = self.finetune or self.prune or self.distill
        assert found is not None
        return found

    @property
    def compresses(self) -> bool:
        """Whether the model is smaller or coarser afterwards, and so has an original to be held against."""
        return self.finetune is None or self.finetune.quantization is not None


class TrainingSpec(RecipeModel):
    """Steps that change the model before it is exported, and what they learn from."""

    data: str
    """Labelled rows, as for evaluation.task; a text for decoders. Never the evaluation's."""
    columns: dict[str, str] = pydantic.Field(default={})
    """What a column is for to its name, where that is not the usual one."""
    split: str = "train"
    """Of a Hugging Face data set or a directory."""
    limit: int | None = pydantic.Field(default=None, ge=1)
    """Rows used, from the beginning; all where absent."""
    unlabelled: str | None = None
    """More texts, one a line, that `distill` learns from; for decoders one text."""
    validation: str | None = None
    """Held-out rows, or a text; drawn from the data where absent."""
    validation_share: Share = 0.1
    """Share of the labelled rows that is held out, where there is no validation; 0 holds nothing out."""
    max_length: int = pydantic.Field(default=128, ge=2)
    """Longest example, in tokens. A decoder's examples are pieces of this length."""
    steps: Annotated[tuple[TrainingStep, ...], pydantic.Field(min_length=1)]
    """In order."""
    threads: int | None = pydantic.Field(default=None, ge=1)
    """Threads of the training; torch's own number where absent."""
    device: str = "auto"
    """cpu, cuda, ...; a GPU where there is one."""

    def with_values(self, values: Mapping[str, Any]) -> TrainingSpec:
        """The same with other values.

        Args:
            values: ``STEP.KEY`` to a value. STEP is the name of a step, and a number where there are several
                of that name: ``prune.heads``, ``finetune2.epochs``, ``prune.weights.ratio``.

        Raises:
            BadInputError: There is no such step, or a value, or all of them together, make no sense.
        """
        plain = self.model_dump(exclude_unset=True, mode="json")
        for key, value in values.items():
            name, _, rest = key.partition(".")
            *keys, last = rest.split(".")
            found: Any = plain["steps"][self._step(name, key)]
            for part in [name.rstrip("0123456789"), *keys]:
                found[part] = dict(found[part]) if found.get(part) else {}
                found = found[part]
            found[last] = value
        try:
            return TrainingSpec.model_validate(plain)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"])
            told = ", ".join(f"{key} {value!r}" for key, value in values.items())
            raise BadInputError(
                f"training: {told}", got=f"{at}: {first['msg']}", expected="values that training takes"
            ) from error

    def _step(self, name: str, key: str) -> int:
        """The number of a step that a name means."""
        names = [step.name for step in self.steps]
        known = [
            f"{step}{names[:number].count(step) + 1}" if names.count(step) > 1 else step
            for number, step in enumerate(names)
        ]
        if name not in known or not key.partition(".")[2]:
            raise BadInputError(
                f"training: {key}", got="no such step and key",
                expected=f"STEP.KEY, with a step of {', '.join(known)}",
            )  # fmt: skip
        return known.index(name)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainingSpec:
        last = -1
        for number, step in enumerate(self.steps):
            quantized = getattr(step.spec, "quantization", None)
            if last >= 0:
                raise broken_rule(
                    ("steps", last), "a step with quantization before others", "it to be the last step"
                )
            if quantized:
                last = number
            if step.finetune is not None and step.finetune.task and number:
                raise broken_rule(
                    ("steps", number, "finetune", "task"), "a new head after other steps", "it in the first"
                )
        return self
