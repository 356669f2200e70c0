"""How good a model is on held-out examples, while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnxsmith.training.examples import IGNORED, Examples

if TYPE_CHECKING:
    import torch

__all__ = ["held_out_metrics"]

_METRICS: Mapping[str, tuple[str, ...]] = {"labels": ("accuracy", "f1_macro"), "values": ("pearson",)}


def held_out_metrics(model: torch.nn.Module, examples: Examples, *, batch: int = 32) -> dict[str, float]:
    """Accuracy and F1 of classes and tags, Pearson's correlation of values; nothing of texts.

    Args:
        model: In eval mode or not; it is left as it is.
        examples: Held-out ones.
        batch: How many at once.
    """
    import torch

    from onnxsmith.runtime.metrics import Outcome, metric_named
    from onnxsmith.training.teachers import forward

    if examples.kind not in ("class", "value", "tokens"):
        return {}
    right: list[float] = []
    said: list[float] = []
    was_training = model.training
    model.eval()
    device = str(next(model.parameters()).device)
    order = sorted(range(len(examples)), key=lambda n: len(examples.rows[n].ids))
    with torch.no_grad():
        for begin in range(0, len(order), batch):
            given = examples.batch(order[begin : begin + batch], device=device)
            logits = forward(model, given).logits
            assert logits is not None
            labels = given["labels"]
            if examples.kind == "value":
                values, known = logits[:, 0].float(), ~torch.isnan(labels)
            else:
                values, known = logits.argmax(-1), labels != IGNORED
            right += labels[known].tolist()
            said += values[known].tolist()
    model.train(was_training)
    kind = "values" if examples.kind == "value" else "labels"
    outcome = Outcome(kind, right, said)
    return {name: float(metric_named(name, kind).compute(outcome)) for name in _METRICS[kind]}
