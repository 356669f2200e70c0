"""What training makes smaller: the error on right answers, and the distance to a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from onnxsmith.errors import BadInputError
from onnxsmith.training.distillation_losses import (
    attention_loss,
    cosine_loss,
    hidden_loss,
    layer_map,
    pooled,
    soft_target_loss,
    value_loss,
)
from onnxsmith.training.examples import IGNORED, Examples
from onnxsmith.training.teachers import Answers, Teacher, forward, lessons

if TYPE_CHECKING:
    import torch

__all__ = ["Distillation", "DistillationWeights", "Objective", "Supervision", "supervised_loss"]


class Objective(Protocol):
    """A loss of a model on a batch."""

    def described(self) -> dict[str, Any]:
        """What it is, for reports and to recognise a checkpoint by."""
        ...

    def learned(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """What is trained together with the model and thrown away afterwards; None where nothing is."""
        ...

    def loss(
        self, model: torch.nn.Module, examples: Examples, numbers: Sequence[int], device: str
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The loss on some of the examples, and its parts by name."""
        ...


def supervised_loss(answers: Answers, batch: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The error on the labels, in float32; 0 where the batch has none.

    Cross entropy for classes and tokens, squared error for values, and for texts the mean negative log
    likelihood of each next token, whose exponential is the perplexity:
    exp(-1/N sum_i log p(x_i | x_<i)) (Jelinek et al. 1977).

    Raises:
        BadInputError: The model has no logits, or there is nothing that labels could be.
    """
    import torch

    functional = torch.nn.functional
    if answers.logits is None or kind == "embedding":
        raise BadInputError(
            "training: labels", got="a model that embeds", expected="one that predicts labels",
            remedy="Distil it, or name the task that it should learn",
        )  # fmt: skip
    logits, labels = answers.logits.float(), batch["labels"]
    if kind == "value":
        said = logits[:, 0]
        known = ~torch.isnan(labels)
        difference = torch.where(known, said - torch.nan_to_num(labels), torch.zeros_like(said))
        return difference.pow(2).sum() / known.sum().clamp(min=1)
    if kind == "next":
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = logits.shape[-1]
    highest = int(labels.max())
    if highest >= classes:
        raise BadInputError(
            "training: labels", got=f"class {highest}", expected=f"below {classes}, the model's classes"
        )
    flat = labels.reshape(-1)
    total = functional.cross_entropy(logits.reshape(-1, classes), flat, ignore_index=IGNORED, reduction="sum")
    return total / (flat != IGNORED).sum().clamp(min=1)


class Supervision:
    """Learning from labels."""

    def described(self) -> dict[str, Any]:
        """That it is."""
        return {"objective": "labels"}

    def learned(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """Nothing else is trained."""
        return None

    def loss(
        self, model: torch.nn.Module, examples: Examples, numbers: Sequence[int], device: str
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The error on the labels."""
        batch = examples.batch(numbers, device=device)
        loss = supervised_loss(forward(model, batch), batch, examples.kind)
        return loss, {}


@dataclasses.dataclass(frozen=True)
class DistillationWeights:
    """What a student learns from.

    Attributes:
        temperature: Of the soft targets; see ``soft_target_loss``.
        soft: Weight of the teacher's predictions.
        hard: Weight of the labels, where there are some.
        hidden: Weight of the hidden states, layer by layer; see ``hidden_loss``.
        cosine: Weight of the direction of the last hidden state; see ``cosine_loss``.
        attention: Weight of attention, layer by layer; see ``attention_loss``.
    """

    temperature: float = 2.0
    soft: float = 1.0
    hard: float = 0.0
    hidden: float = 0.0
    cosine: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            BadInputError: A weight below 0, or nothing to learn from.
        """
        if not self.temperature > 0:
            raise BadInputError("distillation: temperature", got=str(self.temperature), expected="above 0")
        weights = {k: v for k, v in dataclasses.asdict(self).items() if k != "temperature"}
        for name, value in weights.items():
            if not value >= 0:
                raise BadInputError(f"distillation: {name}", got=str(value), expected="at least 0")
        if not any(weights.values()):
            raise BadInputError(
                "distillation", got="all weights are 0", expected=f"one of {', '.join(weights)} above 0"
            )


class Distillation:
    """Learning from a teacher.

    Args:
        teacher: Whom to ask.
        weights: What of its answers counts how much.
        layers: For each layer of the student, which of the teacher's it stands for, both counted from 0;
            evenly spaced where None.
    """

    def __init__(
        self,
        teacher: Teacher,
        weights: DistillationWeights | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.teacher, self.weights = teacher, weights or DistillationWeights()
        self.layers = tuple(layers) if layers is not None else None
        self._projections: Any = None
        self._lessons: dict[int, tuple[Examples, torch.Tensor]] = {}

    def described(self) -> dict[str, Any]:
        """Teacher and weights."""
        return {
            "objective": "distillation", "teacher": self.teacher.name,
            **dataclasses.asdict(self.weights), "layers": self.layers,
        }  # fmt: skip

    def learned(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """Projections from the student's width to the teacher's, where they differ and are needed."""
        import torch

        self._projections = None
        if not self.weights.hidden and not self.weights.cosine:
            return None
        theirs = getattr(getattr(self.teacher, "model", None), "config", None)
        ours: Any = model.config
        if theirs is None or theirs.hidden_size == ours.hidden_size:
            return None
        count = len(self.layers) if self.layers is not None else ours.num_hidden_layers
        self._projections = torch.nn.ModuleList(
            torch.nn.Linear(ours.hidden_size, theirs.hidden_size, bias=False) for _ in range(count)
        )
        made: torch.nn.Module = self._projections
        return made

    def loss(
        self, model: torch.nn.Module, examples: Examples, numbers: Sequence[int], device: str
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The weighted sum of what differs from the teacher and from the labels."""
        weights = self.weights
        states = bool(weights.hidden or weights.cosine)
        attends = bool(weights.attention)
        batch = examples.batch(numbers, device=device)
        ours = forward(model, batch, hidden=states, attentions=attends)
        theirs = self._answers(batch, examples, numbers, states, attends)
        parts: dict[str, torch.Tensor] = {}
        if weights.soft:
            parts["soft"] = weights.soft * self._soft(ours, theirs, batch, examples.kind)
        if weights.hard and examples.kind != "embedding":
            parts["hard"] = weights.hard * supervised_loss(ours, batch, examples.kind)
        mask = batch["attention_mask"]
        if states:
            said, wanted = self._paired(ours.hidden[1:], theirs.hidden[1:])
            if weights.hidden:
                parts["hidden"] = weights.hidden * hidden_loss(
                    said, wanted, mask=mask, projections=self._projections
                )
            if weights.cosine:
                last = said[-1] if self._projections is None else self._projections[-1](said[-1])
                parts["cosine"] = weights.cosine * cosine_loss(last, wanted[-1], mask=mask)
        if attends:
            said, wanted = self._paired(ours.attentions, theirs.attentions)
            parts["attention"] = weights.attention * attention_loss(said, wanted, mask=mask)
        return sum(parts.values(), start=mask.new_zeros((), dtype=next(iter(parts.values())).dtype)), parts

    def _answers(
        self,
        batch: Mapping[str, torch.Tensor],
        examples: Examples,
        numbers: Sequence[int],
        states: bool,
        attends: bool,
    ) -> Answers:
        if states or attends or examples.kind not in ("class", "value"):
            return self.teacher.ask(batch, hidden=states, attentions=attends)
        device = batch["input_ids"].device
        known = self._lessons.get(id(examples))
        if known is None:
            # The examples are kept with their lessons, or another object could get their id.
            known = (examples, lessons(self.teacher, examples, device=str(device)))
            self._lessons[id(examples)] = known
        return Answers(known[1][list(numbers)].to(device))

    def _soft(
        self, ours: Answers, theirs: Answers, batch: Mapping[str, torch.Tensor], kind: str
    ) -> torch.Tensor:
        mask = batch["attention_mask"]
        if kind == "embedding":
            return value_loss(pooled(ours.hidden[-1], mask), pooled(theirs.hidden[-1], mask))
        if ours.logits is None or theirs.logits is None:
            raise BadInputError(
                f"distillation from {self.teacher.name}", got="a model without logits",
                expected="two that predict the same classes",
            )  # fmt: skip
        said, wanted, where = ours.logits, theirs.logits, None
        if kind == "value":
            return value_loss(said, wanted)
        if kind == "next":
            said, wanted = said[:, :-1], wanted[:, :-1]
            where = mask[:, 1:]
        elif kind == "tokens":
            where = mask
        return soft_target_loss(said, wanted, temperature=self.weights.temperature, mask=where)

    def _paired(
        self, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The student's layers, and those of the teacher that they stand for."""
        if not ours or not theirs:
            raise BadInputError(
                f"distillation from {self.teacher.name}", got="a model that shows no layers",
                expected="hidden states or attention of each layer",
                remedy="Set hidden, cosine and attention to 0",
            )  # fmt: skip
        chosen = self.layers if self.layers is not None else layer_map(len(ours), len(theirs))
        if len(chosen) != len(ours) or not all(0 <= layer < len(theirs) for layer in chosen):
            raise BadInputError(
                "distillation: layers", got=str(list(chosen)),
                expected=f"{len(ours)} layers of the teacher, from 0 to {len(theirs) - 1}",
            )  # fmt: skip
        return list(ours), [theirs[layer] for layer in chosen]
