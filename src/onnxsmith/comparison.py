"""What it means that two models agree: tolerances, the comparison of two tensors, and verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
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

# So many elements are compared at a time: some ninety bytes each, in double precision.
_PIECE_ELEMENTS = 1 << 18


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
    pair = _Pair.of(reference, candidate, mask, distributions=name == "logits")
    if pair.size == 0:
        # Two empty tensors of the same shape are equal: a cache of length zero is a fact, not a gap.
        return fail(base, max_abs=0.0, max_rel=0.0, scale=0.0, cosine=1.0, passed=True)
    is_float = np.issubdtype(reference.dtype, np.floating) or reference.dtype.kind == "V"
    values = _Values.of(pair)
    if is_float and values.misplaced:
        return fail(
            base,
            count=pair.size,
            reason=f"{values.candidate_infinite} values are NaN or infinite; "
            f"expected {values.reference_infinite}",
        )
    if values.special:
        return fail(
            base,
            count=pair.size,
            reason=f"{values.special} values are another NaN or infinity than the reference's",
        )
    found = _Differences.of(pair, exact=not is_float, significant=max(values.scale * 1e-3, 1e-12))
    zero = values.scale == 0.0 and found.largest == 0.0
    result = dataclasses.replace(
        base,
        count=pair.size - values.not_a_number,
        max_abs=found.largest,
        max_rel=found.largest_relative,
        scale=values.scale,
        cosine=1.0 if zero else found.dot / found.norms if found.norms > 0 else math.nan,
        worst_index=pair.index(found.worst),
    )
    if pair.classes:
        rows = pair.size // pair.classes
        result = dataclasses.replace(
            result, kl=found.divergence / rows, top1_agreement=found.agreements / rows
        )
    reasons = _violations(result, tolerance, exact=not is_float)
    return dataclasses.replace(result, passed=not reasons, reason="; ".join(reasons))


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two tensors as rows that count, read in pieces: in double precision a decoder's logits are many.

    Attributes:
        reference: (rows, width).
        candidate: (rows, width).
        shape: What the tensors have.
        leading: How many of their axes the rows are of.
        chosen: The rows that count; all where None.
        classes: The size of the last axis where it holds distributions; else 0.
    """

    reference: Array
    candidate: Array
    shape: tuple[int, ...]
    leading: int
    chosen: npt.NDArray[np.int64] | None
    classes: int

    @classmethod
    def of(
        cls, reference: Array, candidate: Array, mask: npt.NDArray[np.bool_] | None, *, distributions: bool
    ) -> _Pair:
        shape = reference.shape
        leading = mask.ndim if mask is not None else max(len(shape) - 1, 0) if distributions else len(shape)
        rows, width = math.prod(shape[:leading]), math.prod(shape[leading:])
        return cls(
            reference.reshape(rows, width),
            candidate.reshape(rows, width),
            shape,
            leading,
            None if mask is None else np.flatnonzero(mask),
            shape[-1] if distributions and leading < len(shape) and shape[-1] > 1 else 0,
        )

    @property
    def size(self) -> int:
        """Elements that count."""
        return self.reference.size if self.chosen is None else len(self.chosen) * self.reference.shape[1]

    def pieces(self) -> Iterator[tuple[int, Array, Array]]:
        """Pieces of whole rows, each with how many elements came before it."""
        width = self.reference.shape[1]
        step = max(1, _PIECE_ELEMENTS // width)
        for begin in range(0, self.size // width, step):
            part: Any = slice(begin, begin + step)
            if self.chosen is not None:
                part = self.chosen[part]
            yield begin * width, self.reference[part], self.candidate[part]

    def index(self, position: int) -> tuple[int, ...]:
        """Where an element is in the tensors, of those that count the one of this number."""
        row, column = divmod(position, self.reference.shape[1])
        if self.chosen is not None:
            row = int(self.chosen[row])
        parts = (
            *np.unravel_index(row, self.shape[: self.leading]),
            *np.unravel_index(column, self.shape[self.leading :]),
        )
        return tuple(int(part) for part in parts)


@dataclasses.dataclass
class _Values:
    """What is to know of two tensors before their differences.

    Attributes:
        scale: The largest finite magnitude of the reference.
        reference_infinite: Values of the reference that are NaN or infinite.
        candidate_infinite: Those of the candidate.
        misplaced: Whether they are not at the same places.
        special: Values of the candidate that differ from a NaN or an infinity of the reference.
        not_a_number: NaN of the reference.
    """

    scale: float = 0.0
    reference_infinite: int = 0
    candidate_infinite: int = 0
    misplaced: bool = False
    special: int = 0
    not_a_number: int = 0

    @classmethod
    def of(cls, pair: _Pair) -> _Values:
        found = cls()
        for _, reference, candidate in pair.pieces():
            ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
            finite, theirs = np.isfinite(ref), np.isfinite(cand)
            found.scale = max(found.scale, float(np.where(finite, np.abs(ref), 0.0).max()))
            found.reference_infinite += int(np.count_nonzero(~finite))
            found.candidate_infinite += int(np.count_nonzero(~theirs))
            found.misplaced |= not np.array_equal(finite, theirs)
            found.special += int(np.count_nonzero(_unequal(reference, candidate, ref, cand) & ~finite))
            found.not_a_number += int(np.count_nonzero(np.isnan(ref)))
        return found


@dataclasses.dataclass
class _Differences:
    """How far two tensors are from each other.

    Attributes:
        largest: The largest absolute difference.
        largest_relative: The largest one relative to the reference's element.
        worst: The first element with the largest difference, by its number among those that count.
        dot: The sum of the products of both.
        norms: The product of both Euclidean norms.
        divergence: The sum of the rows' Kullback-Leibler divergences, in nats.
        agreements: Rows whose argmax is the same.
    """

    largest: float = -1.0
    largest_relative: float = 0.0
    worst: int = 0
    dot: float = 0.0
    norms: float = 0.0
    divergence: float = 0.0
    agreements: int = 0

    @classmethod
    def of(cls, pair: _Pair, *, exact: bool, significant: float) -> _Differences:
        found = cls()
        ours = theirs = 0.0
        for begin, reference, candidate in pair.pieces():
            ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
            unequal = _unequal(reference, candidate, ref, cand)
            # Equal infinities have no difference, though subtracting them gives NaN.
            difference = np.zeros(ref.shape)
            np.subtract(cand, ref, out=difference, where=unequal)
            difference = np.abs(difference)
            if exact:
                # Two integers above 2**53 may be one float64.
                difference[unequal] = np.maximum(difference[unequal], 1.0)
            worst = int(np.argmax(difference))
            if difference.flat[worst] > found.largest:
                found.largest, found.worst = float(difference.flat[worst]), begin + worst
            finite = np.isfinite(ref)
            magnitude = np.where(finite, np.abs(ref), 0.0)
            counted = magnitude > significant
            relative = difference[counted] / magnitude[counted]
            found.largest_relative = max(found.largest_relative, float(relative.max(initial=0.0)))
            both = finite & np.isfinite(cand)
            found.dot += float(np.dot(ref[both], cand[both]))
            theirs = math.hypot(theirs, float(np.linalg.norm(magnitude)))
            ours = math.hypot(ours, float(np.linalg.norm(np.where(np.isfinite(cand), cand, 0.0))))
            if pair.classes:
                rows = ref.reshape(-1, pair.classes), cand.reshape(-1, pair.classes)
                found.divergence += float(kl_divergence(*rows).sum())
                found.agreements += int((rows[0].argmax(-1) == rows[1].argmax(-1)).sum())
        found.norms = theirs * ours
        return found


def _unequal(reference: Array, candidate: Array, ref: Array, cand: Array) -> npt.NDArray[np.bool_]:
    """Where two tensors differ, the second pair being the same in double precision; NaN is as NaN."""
    found: npt.NDArray[np.bool_] = (reference != candidate) & ~(np.isnan(ref) & np.isnan(cand))
    return found


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
