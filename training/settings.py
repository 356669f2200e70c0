"""How a model is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from onnxsmith.errors import BadInputError

__all__ = ["LESS_IS_BETTER", "PRECISIONS", "SCHEDULES", "TrainingSettings"]

# Of what can be watched.
LESS_IS_BETTER = frozenset({"loss", "perplexity"})
SCHEDULES = ("linear", "cosine", "constant")
# Name -> the element type of autocast; weights, their gradients and the optimizer's state stay in float32.
PRECISIONS: Mapping[str, str | None] = {"float32": None, "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The settings of one training.

    The optimizer is AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"): weight decay
    on matrices only, not on biases, norms and step sizes.

    Attributes:
        epochs: Times that every example is seen.
        steps: Updates of the weights, in place of ``epochs``.
        batch: Examples in one forward pass.
        accumulate: Forward passes to one update, whose gradients are averaged.
        learning_rate: The highest.
        schedule: How it falls after the warm-up: ``linear`` or ``cosine`` to zero, or ``constant``.
        warmup_share: Of all updates, in which the rate rises from zero.
        weight_decay: Of AdamW.
        max_gradient_norm: Gradients are scaled down to this norm; not where None.
        precision: ``float32``; or autocast with ``bf16``, or ``fp16`` with loss scaling.
        dropout: In place of the model's own, while it is trained; the model's own where None.
        freeze: Patterns of parameter names that keep their values.
        evaluate_every: Updates between evaluations; each epoch where None.
        patience: Evaluations in a row without a better value after which training stops; never where None.
        watch: What is better: ``loss`` or ``perplexity`` (lower) on held-out examples, or the name of another
            metric (higher).
        keep_best: Whether the weights of the best evaluation are kept, and not those of the last update.
        max_minutes: Training stops after this time. Its result then depends on how fast the machine is.
        checkpoint_seconds: Time between checkpoints.
        seed: Of the order of the examples and of dropout.
        device: ``cpu``, ``cuda``, ...; ``auto`` is a GPU where there is one.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    max_gradient_norm: float | None = 1.0
    precision: str = "float32"
    dropout: float | None = None
    freeze: tuple[str, ...] = ()
    evaluate_every: int | None = None
    patience: int | None = None
    watch: str = "loss"
    keep_best: bool = True
    max_minutes: float | None = None
    checkpoint_seconds: float = 60.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            BadInputError: One of them makes no sense.
        """
        least: Mapping[str, tuple[Any, float]] = {
            "steps": (self.steps, 1),
            "batch": (self.batch, 1),
            "accumulate": (self.accumulate, 1),
            "evaluate_every": (self.evaluate_every, 1),
            "patience": (self.patience, 1),
            "checkpoint_seconds": (self.checkpoint_seconds, 0),
            "weight_decay": (self.weight_decay, 0),
        }
        for name, (value, bound) in least.items():
            if value is not None and not value >= bound:
                raise BadInputError(f"training: {name}", got=str(value), expected=f"at least {bound:g}")
        above: Mapping[str, float | None] = {
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "max_gradient_norm": self.max_gradient_norm,
            "max_minutes": self.max_minutes,
        }
        for name, value in above.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise BadInputError(f"training: {name}", got=str(value), expected="a number above 0")
        for name, value, below in (
            ("warmup_share", self.warmup_share, 1.0),
            ("dropout", self.dropout, 1.0),
        ):
            if value is not None and not 0 <= value < below:
                raise BadInputError(
                    f"training: {name}", got=str(value), expected=f"from 0 to below {below:g}"
                )
        for name, choice, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, tuple(PRECISIONS)),
        ):
            if choice not in known:
                raise BadInputError(
                    f"training: {name}", got=repr(choice), expected=f"one of {', '.join(known)}"
                )

    def updates(self, examples: int) -> int:
        """Updates of the weights in the whole training."""
        return self.steps or max(1, math.ceil(self.epochs * self.updates_per_epoch(examples)))

    def updates_per_epoch(self, examples: int) -> int:
        """Updates in which every example is seen once."""
        return math.ceil(math.ceil(examples / self.batch) / self.accumulate)

    def learning_rate_at(self, update: int, updates: int) -> float:
        """The rate of an update, counted from 0; it depends on nothing else, so it needs no checkpoint."""
        warmup = round(self.warmup_share * updates)
        if update < warmup:
            return self.learning_rate * (update + 1) / warmup
        share = (update - warmup) / max(updates - warmup, 1)
        if self.schedule == "linear":
            return self.learning_rate * (1 - share)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        return self.learning_rate
