"""The mathematics of teaching: losses between a student, the right answers, and a teacher.

All are means over what is taught: over the examples of a batch for classes and values, over the tokens that
are no padding for tokens and texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxsmith.errors import BadInputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "attention_loss",
    "cosine_loss",
    "hidden_loss",
    "layer_map",
    "pooled",
    "soft_target_loss",
    "value_loss",
]


def soft_target_loss(
    student: torch.Tensor, teacher: torch.Tensor, *, temperature: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""How far a student's predictions are from its teacher's, at a temperature.

    With logits :math:`z`, :math:`p_T(z)_i = e^{z_i/T} / \sum_j e^{z_j/T}`:

    .. math:: L = T^2 \, \mathrm{KL}(p_T(z_t) \,\|\, p_T(z_s))
              = T^2 \sum_i p_T(z_t)_i \, (\log p_T(z_t)_i - \log p_T(z_s)_i)

    The factor keeps the size of the gradients the same whatever the temperature: they shrink as
    :math:`1/T^2`. Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network",
    section 2; cross entropy with soft targets there differs from this by the teacher's entropy, a constant.

    Args:
        student: Logits, (..., classes).
        teacher: Logits of the same shape.
        temperature: T, above 0; higher shows more of what the teacher thinks of wrong answers.
        mask: (...), nonzero where it counts; everywhere where None.

    Returns:
        The mean over what counts, in nats, computed in float32.
    """
    import torch

    if temperature <= 0:
        raise BadInputError("distillation: temperature", got=str(temperature), expected="above 0")
    if student.shape != teacher.shape:
        raise BadInputError(
            "distillation: logits", got=f"{list(student.shape)} of the student",
            expected=f"{list(teacher.shape)} as the teacher's",
            remedy="Both need the same classes or the same vocabulary",
        )  # fmt: skip
    said = torch.log_softmax(student.float() / temperature, -1)
    wanted = torch.log_softmax(teacher.float() / temperature, -1)
    divergence = (wanted.exp() * (wanted - said)).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def value_loss(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""The mean of :math:`(s - t)^2`: for values, and for embeddings of sentences.

    For embeddings: Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using
    Knowledge Distillation", equation 1.

    Args:
        student: (..., size).
        teacher: The same shape.
        mask: (...), nonzero where it counts.
    """
    return _mean((student.float() - teacher.float()).pow(2).mean(-1), mask)


def hidden_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    *,
    mask: torch.Tensor,
    projections: Sequence[torch.nn.Module] | None = None,
) -> torch.Tensor:
    r"""How far the student's hidden states are from those of the teacher's layers that they stand for.

    .. math:: L = \frac{1}{M} \sum_{m=1}^{M} \mathrm{MSE}(H^s_m W_m, H^t_{g(m)})

    with :math:`g` from ``layer_map`` and :math:`W_m` learned where the widths differ, the identity else.
    Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", equation 8. The
    error is divided by the mean square of the teacher's states, so that layers of any scale, and models of
    any width, weigh the same.

    Args:
        student: M tensors (batch, tokens, student's width).
        teacher: M tensors (batch, tokens, teacher's width).
        mask: (batch, tokens), nonzero at tokens.
        projections: M modules from the student's to the teacher's width.

    Returns:
        A number that is 1 where the student knows nothing (zeros), 0 where it is right.
    """
    total = student[0].new_zeros((), dtype=_float32())
    for number, (said, wanted) in enumerate(zip(student, teacher, strict=True)):
        ours = projections[number](said) if projections is not None else said
        scale = _mean(wanted.float().pow(2).mean(-1), mask).clamp(min=1e-12)
        total = total + value_loss(ours, wanted, mask=mask) / scale
    return total / len(student)


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
    r"""The mean of :math:`1 - \cos(H^s, H^t)` over tokens.

    Source: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3, whose loss of the last
    hidden states this is.

    Args:
        student: (batch, tokens, width).
        teacher: The same shape.
        mask: (batch, tokens), nonzero at tokens.
    """
    import torch

    return _mean(1 - torch.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def attention_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], *, mask: torch.Tensor
) -> torch.Tensor:
    r"""How far the student's attention is from the teacher's.

    .. math:: L = \frac{1}{M} \sum_m \mathrm{mean}_{h,i} \, \mathrm{KL}(A^t_{g(m),h,i} \,\|\, A^s_{m,h,i})

    over heads :math:`h` and positions :math:`i` that ask. Source: Sun et al. 2020, "MobileBERT", equation 2
    (TinyBERT, equation 7, takes the squared error of the scores). Where the numbers of heads differ, because
    heads were pruned, the means over heads are compared: a mean of distributions is one.

    Args:
        student: M tensors (batch, heads, tokens, tokens), rows that sum to 1.
        teacher: The same with the teacher's heads.
        mask: (batch, tokens), nonzero at tokens.
    """
    total = student[0].new_zeros((), dtype=_float32())
    for ours, theirs in zip(student, teacher, strict=True):
        said, wanted = ours.float(), theirs.float()
        if said.shape[1] != wanted.shape[1]:
            said, wanted = said.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
        # What is hidden has 0 on both sides, and 0 log 0 is 0.
        logs = wanted.clamp(min=1e-9).log() - said.clamp(min=1e-9).log()
        total = total + _mean((wanted * logs).sum(-1).mean(1), mask)
    return total / len(student)


def layer_map(student: int, teacher: int) -> list[int]:
    """Which of the teacher's layers each layer of the student stands for: evenly spaced, the last the last.

    Source: TinyBERT, section 3.2: g(m) = m * N / M, with layers counted from 1.

    Args:
        student: Number of the student's layers, M.
        teacher: Number of the teacher's layers, N.

    Returns:
        For each layer of the student the teacher's, both counted from 0.
    """
    if student < 1:
        raise BadInputError("distillation: layers", got=str(student), expected="at least 1")
    return [max(round((m + 1) * teacher / student) - 1, 0) for m in range(student)]


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over tokens, (batch, width), in float32."""
    weight = mask.to(hidden.device)[..., None].float()
    return (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.mean()
    weight = (mask != 0).to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def _float32() -> torch.dtype:
    import torch

    return torch.float32
