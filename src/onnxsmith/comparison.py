"""What it means that two models agree: tolerances, the comparison of two tensors, and verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import UnknownNameError

__all__ = [
    "TOLERANCES",
    "Comparison",
    "TensorComparison",
    "Tolerance",
    "compare_tensors",
    "kl_divergence",
    "tolerance_for",
]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds that a candidate's tensor must keep against the reference's. None is not checked.

    The elementwise bound is ``|candidate - reference| <= atol + rtol * max|reference|``: the scale is the
    tensor's largest magnitude and not each element's own, because rounding in a sum is relative to its
    terms, and an element near zero would otherwise fail for noise.

    Attributes:
        atol: Absolute part, in the tensor's units.
        rtol: Part relative to the largest magnitude of the reference tensor.
        min_cosine: Lowest cosine similarity of the flattened tensors.
        max_kl: Highest mean Kullback-Leibler divergence of the softmax over the last axis, in nats
            (outputs named ``logits`` only).
        min_top1_agreement: Lowest share of positions whose argmax agrees (outputs named ``logits`` only).
    """

    atol: float | None = None
    rtol: float | None = None
    min_cosine: float | None = None
    max_kl: float | None = None
    min_top1_agreement: float | None = None


# By the precision of the candidate. Quantized weights move every element, so there only the direction is
# bounded: it catches a broken graph. How much a quantized model loses is a question for a text or a data
# set, not for made-up inputs, and is held by budgets.
TOLERANCES: Mapping[str, Tolerance] = {
    "float64": Tolerance(atol=1e-9, rtol=1e-9, min_cosine=0.999999),
    "float32": Tolerance(atol=1e-5, rtol=1e-4, min_cosine=0.9999),
    "float16": Tolerance(atol=1e-3, rtol=2e-2, min_cosine=0.999),
    "bfloat16": Tolerance(atol=1e-2, rtol=1e-1, min_cosine=0.99),
    "int8": Tolerance(min_cosine=0.95),
    "int4": Tolerance(min_cosine=0.50),
}


def tolerance_for(precision: str) -> Tolerance:
    """The default tolerance of a precision.

    Raises:
        UnknownNameError: No such precision.
    """
    try:
        return TOLERANCES[precision]
    except KeyError:
        raise UnknownNameError("tolerance", name=precision, known=TOLERANCES, kind="precision") from None


@dataclasses.dataclass(frozen=True)
class TensorComparison:
    """One output of one case, reference against candidate.

    Attributes:
        case: Which inputs, such as ``prefill batch=2 length=7``.
        name: The output.
        count: Elements compared.
        shape: The reference's shape.
        dtype: The reference's element type.
        max_abs: Largest absolute difference.
        max_rel: Largest difference relative to the reference's element, over the elements that are
            larger than a thousandth of the tensor's largest.
        scale: Largest magnitude of the reference.
        cosine: Cosine similarity of the flattened tensors; NaN if one of them is all zeros.
        kl: Mean KL(reference || candidate) of the softmax over the last axis, in nats; None if not logits.
        top1_agreement: Share of positions with the same argmax; None if not logits.
        worst_index: Where ``max_abs`` is.
        passed: Whether every bound held.
        reason: Why it failed, or an empty string.
    """

    case: str
    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    max_abs: float = math.nan
    max_rel: float = math.nan
    scale: float = math.nan
    cosine: float = math.nan
    kl: float | None = None
    top1_agreement: float | None = None
    worst_index: tuple[int, ...] = ()
    passed: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One candidate on one provider against the reference.

    Attributes:
        reference: What was compared with.
        candidate: What was compared.
        provider: Where the candidate ran.
        tolerance: The bounds used.
        tensors: Every output of every case.
        error: Why nothing could be compared, or an empty string.
        placement: Provider to nodes and share, of the candidate; None where nothing is known.
        placement_by_graph: The same of each graph, where the candidate has several.
    """

    reference: str
    candidate: str
    provider: str
    tolerance: Tolerance
    tensors: tuple[TensorComparison, ...]
    error: str = ""
    placement: Mapping[str, Any] | None = None
    placement_by_graph: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it held. Nothing compared is a failure."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it did not pass, or an empty string."""
        if self.error:
            return self.error
        failed = [t for t in self.tensors if not t.passed]
        if not failed:
            # Empty tensors alone, or NaN beside NaN, say nothing about a model either.
            if any(t.count for t in self.tensors):
                return ""
            return "nothing was compared" + (": all tensors are empty or NaN" if self.tensors else "")
        first = failed[0]
        return (
            f"{len(failed)} of {len(self.tensors)} tensors differ; first {first.name!r} in case "
            f"'{first.case}': {first.reason}"
        )

    @property
    def worst(self) -> TensorComparison | None:
        """The tensor with the largest difference relative to its scale."""
        measured = [t for t in self.tensors if not math.isnan(t.max_abs)]
        return max(measured, key=lambda t: t.max_abs / (t.scale or 1.0), default=None)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**dataclasses.asdict(self), "passed": self.passed, "reason": self.reason}


def compare_tensors(
    reference: Array,
    candidate: Array,
    *,
    name: str,
    case: str,
    tolerance: Tolerance,
    mask: npt.NDArray[np.bool_] | None = None,
) -> TensorComparison:
    """Compares two tensors: element type, shape, finiteness, then values.

    Args:
        reference: What is right.
        candidate: What is judged.
        name: The output's name. ``logits`` are also compared as distributions over their last axis.
        case: Which inputs produced them.
        tolerance: The bounds.
        mask: Of the shape of the leading axes; only positions that are true count (padding does not).
    """
    base = TensorComparison(case, name, 0, reference.shape, str(reference.dtype))
    fail = dataclasses.replace
    if reference.shape != candidate.shape:
        return fail(base, reason=f"shape is {candidate.shape}; expected {reference.shape}")
    if reference.dtype != candidate.dtype:
        return fail(base, reason=f"element type is {candidate.dtype}; expected {reference.dtype}")
    index: Array | None = None
    if mask is not None:
        index = np.argwhere(mask)
        reference, candidate = reference[mask], candidate[mask]
    if reference.size == 0:
        # Two empty tensors of the same shape are equal: a cache of length zero is a fact, not a gap.
        return fail(base, max_abs=0.0, max_rel=0.0, scale=0.0, cosine=1.0, passed=True)
    is_float = np.issubdtype(reference.dtype, np.floating) or reference.dtype.kind == "V"
    ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
    if is_float and not np.array_equal(np.isfinite(ref), np.isfinite(cand)):
        return fail(
            base,
            count=ref.size,
            reason=f"{np.count_nonzero(~np.isfinite(cand))} values are NaN or infinite; "
            f"expected {np.count_nonzero(~np.isfinite(ref))}",
        )
    unequal = (reference != candidate) & ~(np.isnan(ref) & np.isnan(cand))
    special = unequal & ~np.isfinite(ref)
    if special.any():
        return fail(
            base,
            count=ref.size,
            reason=f"{np.count_nonzero(special)} values are another NaN or infinity than the reference's",
        )
    # Equal infinities have no difference, though subtracting them gives NaN.
    difference = np.zeros(ref.shape)
    np.subtract(cand, ref, out=difference, where=unequal)
    difference = np.abs(difference)
    if not is_float:
        # Two integers above 2**53 may be one float64.
        difference[unequal] = np.maximum(difference[unequal], 1.0)
    magnitude = np.where(np.isfinite(ref), np.abs(ref), 0.0)
    scale = float(magnitude.max())
    worst = int(np.argmax(difference))
    worst_index = tuple(int(i) for i in np.unravel_index(worst, difference.shape))
    if index is not None:
        worst_index = (*(int(i) for i in index[worst_index[0]]), *worst_index[1:])
    significant = magnitude > max(scale * 1e-3, 1e-12)
    max_rel = float((difference[significant] / magnitude[significant]).max()) if significant.any() else 0.0
    norm = float(np.linalg.norm(magnitude) * np.linalg.norm(np.where(np.isfinite(cand), cand, 0.0)))
    finite = np.isfinite(ref) & np.isfinite(cand)
    dot = float(np.dot(ref[finite].ravel(), cand[finite].ravel()))
    zero = scale == 0.0 and not difference.any()
    result = dataclasses.replace(
        base,
        count=int(ref.size - np.count_nonzero(np.isnan(ref))),
        max_abs=float(difference.flat[worst]),
        max_rel=max_rel,
        scale=scale,
        cosine=1.0 if zero else dot / norm if norm > 0 else math.nan,
        worst_index=worst_index,
    )
    if name == "logits" and ref.ndim >= 1 and ref.shape[-1] > 1:
        rows_ref, rows_cand = ref.reshape(-1, ref.shape[-1]), cand.reshape(-1, ref.shape[-1])
        result = dataclasses.replace(
            result,
            kl=float(kl_divergence(rows_ref, rows_cand).mean()),
            top1_agreement=float((rows_ref.argmax(-1) == rows_cand.argmax(-1)).mean()),
        )
    reasons = _violations(result, tolerance, exact=not is_float)
    return dataclasses.replace(result, passed=not reasons, reason="; ".join(reasons))


def kl_divergence(reference: Array, candidate: Array) -> Array:
    """KL(reference || candidate) of the softmax over the last axis, in nats, one value per row.

    Args:
        reference: Logits of shape (..., classes).
        candidate: Logits of the same shape.
    """
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    # What the reference rules out, with a logit of minus infinity, adds nothing: p log p tends to 0.
    possible = log_p > -np.inf
    ratio = np.zeros_like(log_p)
    np.subtract(log_p, log_q, out=ratio, where=possible)
    divergence: Array = (np.exp(log_p) * ratio).sum(axis=-1)
    # Rounding can leave a negative zero; the divergence itself cannot be negative.
    return np.maximum(divergence, 0.0)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _violations(result: TensorComparison, tolerance: Tolerance, *, exact: bool) -> Sequence[str]:
    found: list[str] = []
    if exact:
        if result.max_abs != 0.0:
            found.append(f"integers differ by up to {result.max_abs:g} at {list(result.worst_index)}")
        return found
    if tolerance.atol is not None or tolerance.rtol is not None:
        bound = (tolerance.atol or 0.0) + (tolerance.rtol or 0.0) * result.scale
        if not result.max_abs <= bound:
            found.append(
                f"differs by {result.max_abs:.3g} at {list(result.worst_index)}; "
                f"expected at most {bound:.3g} (atol {tolerance.atol or 0:g} + "
                f"rtol {tolerance.rtol or 0:g} x {result.scale:.3g})"
            )
    if tolerance.min_cosine is not None and not result.cosine >= tolerance.min_cosine:
        found.append(f"cosine is {result.cosine:.6f}; expected at least {tolerance.min_cosine:g}")
    if tolerance.max_kl is not None and result.kl is not None and not result.kl <= tolerance.max_kl:
        found.append(f"KL divergence is {result.kl:.4g} nats; expected at most {tolerance.max_kl:g}")
    if (
        tolerance.min_top1_agreement is not None
        and result.top1_agreement is not None
        and not result.top1_agreement >= tolerance.min_top1_agreement
    ):
        found.append(
            f"top-1 agreement is {result.top1_agreement:.3f}; "
            f"expected at least {tolerance.min_top1_agreement:g}"
        )
    return found
