"""How good a model is on held-out examples, while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnxsmith.training.examples import IGNORED, Examples

if TYPE_CHECKING:
    import torch

__all__ = ["held_out_metrics"]

_METRICS: Mapping[str, tuple[str, ...]] = {"labels": ("accuracy", "f1_macro"), "values": ("pearson",)}
# Its exponential is still a float64.
_HIGHEST = 700.0


def held_out_metrics(model: torch.nn.Module, examples: Examples, *, batch: int = 32) -> dict[str, float]:
    """Accuracy and F1 of classes and tags, Pearson's correlation of values, perplexity of texts.

    The perplexity is the exponential of the mean negative log likelihood of all tokens but the first of each
    example, whatever the loss that is trained on. Of what is embedded nothing is known.

    Args:
        model: In eval mode or not; it is left as it is.
        examples: Held-out ones.
        batch: How many at once.
    """
    import torch

    from onnxsmith.runtime.metrics import Outcome, metric_named
    from onnxsmith.training.objectives import supervised_loss
    from onnxsmith.training.teachers import forward

    if examples.kind == "embedding":
        return {}
    right: list[float] = []
    said: list[float] = []
    lost, counted = 0.0, 0
    was_training = model.training
    model.eval()
    device = str(next(model.parameters()).device)
    order = sorted(range(len(examples)), key=lambda n: len(examples.rows[n].ids))
    with torch.no_grad():
        for begin in range(0, len(order), batch):
            given = examples.batch(order[begin : begin + batch], device=device)
            answers = forward(model, given)
            logits, labels = answers.logits, given["labels"]
            assert logits is not None
            if examples.kind == "next":
                targets = int((labels[:, 1:] != IGNORED).sum())
                lost += float(supervised_loss(answers, given, "next")) * targets
                counted += targets
                continue
            if examples.kind == "value":
                values, known = logits[:, 0].float(), ~torch.isnan(labels)
            else:
                values, known = logits.argmax(-1), labels != IGNORED
            right += labels[known].tolist()
            said += values[known].tolist()
    model.train(was_training)
    if examples.kind == "next":
        return {"perplexity": math.exp(min(lost / counted, _HIGHEST))}
    kind = "values" if examples.kind == "value" else "labels"
    outcome = Outcome(kind, right, said)
    return {name: float(metric_named(name, kind).compute(outcome)) for name in _METRICS[kind]}
