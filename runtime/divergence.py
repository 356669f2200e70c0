"""Where a model leaves its reference: tensors with their errors, and the nodes that make them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith.comparison import Tolerance
from onnxsmith.runtime.tensor_errors import TensorError

__all__ = ["ROUNDING", "Blame", "Divergence", "Reproduction", "TensorTrace", "changed_kernels"]

# Relative error of one operator in float32 that needs no explanation.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class TensorTrace:
    """One tensor of the candidate that was found in the reference.

    Attributes:
        name: The candidate's value.
        node: The node that computes it.
        operator: Its operator.
        reference: The reference's tensor.
        matched_by: ``name``, ``weight``, ``value`` or ``place``.
        depth: Its place in the candidate's order, from 0.
        error: How far it is from the reference when the model runs as it is.
        introduced: How far it is where everything that it is computed from is the reference's; None where the
            search was interrupted before that was tried.
        reason: Why it is out of the tolerance, or an empty string.
    """

    name: str
    node: str
    operator: str
    reference: str
    matched_by: str
    depth: int
    error: TensorError
    introduced: TensorError | None
    reason: str = ""

    @property
    def own(self) -> float:
        """The size of what it introduces; 0 where that is not known."""
        return 0.0 if self.introduced is None else self.introduced.size


@dataclasses.dataclass(frozen=True)
class Blame:
    """A node that makes error of its own.

    Attributes:
        node: Its name.
        operator: Its operator.
        tensor: The tensor in which the error shows.
        reference: The reference's tensor.
        nodes: All nodes between the tensors that are known; more than one where the reference has nothing
            to compare in between.
        introduced: Error that it makes from right inputs.
        inherited: Largest error of its inputs when the model runs as it is.
        error: Error of its output when the model runs as it is.
        typical: What is usual for nodes of its kind in this model.
        stands_out: Whether it makes far more than that, or numbers that are not finite.
        detail: What is known beyond the numbers, such as which weight is wrong.
        estimated: Whether ``introduced`` is only what the error grows by from the node's inputs to its
            output, because the search was interrupted before the node ran on right inputs.
    """

    node: str
    operator: str
    tensor: str
    reference: str
    nodes: tuple[str, ...]
    introduced: TensorError
    inherited: float
    error: TensorError
    typical: float
    stands_out: bool
    detail: str = ""
    estimated: bool = False

    @property
    def factor(self) -> float:
        """How many times the usual error it makes."""
        return self.introduced.size / max(self.typical, ROUNDING)


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What was written.

    Attributes:
        directory: Where.
        nodes: Operators of the small model, in their order.
        bytes: Size of the small model with its weights.
        shapes: Input name to shape.
        error: The relative error that it shows.
    """

    directory: Path
    nodes: tuple[str, ...]
    bytes: int
    shapes: Mapping[str, tuple[int, ...]]
    error: float


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where a candidate leaves its reference.

    Attributes:
        reference: What was compared with.
        candidate: What was compared.
        provider: Where the candidate ran.
        cases: Names of the inputs.
        tolerance: The bounds that decide what is a divergence.
        tensors: Every tensor found on both sides, in the candidate's order.
        unmatched: Floating-point values of the candidate that the reference does not have.
        first: The first tensor out of the tolerance; None where all keep it.
        blamed: Nodes by the error that they make, the worst first.
        outputs: Outputs of the untouched candidate out of the tolerance: name to reason.
        tapping_change: Largest relative difference that reading intermediate tensors made to an output.
            Above rounding, other kernels ran than in the untouched model.
        kernels: Operators of which reading intermediate tensors changed the kernels that ran, with how many
            ran in the untouched model and in the pieces; see ``changed_kernels``. Empty where the backend
            does not record them.
        optimizer_change: The same for turning ONNX Runtime's own optimisation off; None where not looked at.
        bytes_traced: Bytes of tensors that were looked at.
        reproduction: The smallest model and inputs that show the worst node's error; None where no node is
            to blame, or nobody asked for it.
        interrupted: What was being done when the search was interrupted; empty where it was not. Then only
            the tensors in ``tensors`` were compared.
    """

    reference: str
    candidate: str
    provider: str
    cases: tuple[str, ...]
    tolerance: Tolerance
    tensors: tuple[TensorTrace, ...]
    unmatched: tuple[str, ...]
    first: TensorTrace | None
    blamed: tuple[Blame, ...]
    outputs: Mapping[str, str]
    tapping_change: float
    kernels: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    optimizer_change: float | None = None
    bytes_traced: int = 0
    reproduction: Reproduction | None = None
    interrupted: str = ""

    @property
    def suspects(self) -> tuple[Blame, ...]:
        """The nodes that stand out."""
        return tuple(blame for blame in self.blamed if blame.stands_out)

    @property
    def undefined(self) -> tuple[TensorTrace, ...]:
        """Tensors that hold NaN in the reference, where nothing could be compared."""
        return tuple(trace for trace in self.tensors if trace.error.undefined)

    @property
    def incomparable(self) -> tuple[TensorTrace, ...]:
        """Those of them that are NaN throughout: of these nothing is known."""
        return tuple(trace for trace in self.undefined if not trace.error.comparable)

    @property
    def passed(self) -> bool:
        """Whether everything was compared, nothing diverges and no node stands out."""
        found = self.first is not None or self.outputs or self.suspects
        return not found and not self.incomparable and not self.interrupted

    @property
    def changed_by_tapping(self) -> bool:
        """Whether reading intermediate tensors changed an output by more than rounding."""
        return self.tapping_change > ROUNDING

    @property
    def verdict(self) -> str:
        """What was found, in a sentence or two."""
        diverges = self.first is not None or bool(self.outputs)
        worst = self.suspects[:1] or (self.blamed[:1] if diverges else ())
        parts = []
        if self.first is not None:
            parts.append(
                f"first divergence at {self.first.name!r} ({self.first.operator}): {self.first.reason}"
            )
        elif self.outputs:
            name, reason = next(iter(self.outputs.items()))
            parts.append(f"only the untouched model's output {name!r} diverges: {reason}")
        if worst:
            parts.append(f"blame {_said(worst[0])}")
        if not parts:
            compared = len(self.tensors) - len(self.incomparable)
            parts.append(f"no divergence in {compared} tensors" if compared else "nothing was compared")
        if self.undefined:
            parts.append(_said_of_nan(self.undefined, self.incomparable))
        if self.interrupted:
            parts.append(f"interrupted at {self.interrupted}: the tensors after these were not compared")
        if self.changed_by_tapping:
            if not self.outputs and self.first is not None:
                parts.append("the outputs of the untouched model keep the tolerance")
            parts.append(
                f"reading intermediate tensors changed an output by {self.tapping_change:.2g}, so other "
                "kernels ran"
            )
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            **dataclasses.asdict(self),
            "passed": self.passed,
            "verdict": self.verdict,
            "changed_by_tapping": self.changed_by_tapping,
        }


def changed_kernels(
    pieces: Mapping[str, str], whole: Mapping[str, str], *, named: bool
) -> dict[str, tuple[int, int]]:
    """Operators of which other kernels ran in pieces of a model than in the whole.

    Fewer in pieces are fusions that a tensor which was read cut, more are what they were made of. What a
    provider compiled is always among them, because what is fused inside of it nobody knows.

    Args:
        pieces: Node to operator of what ran in all pieces together.
        whole: The same of the untouched model; nothing is said where it is empty.
        named: Whether all nodes have names. Pieces share nodes that compute shapes and masks; where these
            have no names, more of an operator in pieces says nothing unless the whole has none.

    Returns:
        Operator to kernels in the whole and in pieces.
    """
    one, other = Counter(whole.values()), Counter(pieces.values())
    return {
        name: (one[name], other[name])
        for name in sorted({*one, *other} if whole else ())
        if one[name] > other[name]
        or (one[name] < other[name] and (named or not one[name]))
        or name.startswith("compiled by ")
    }


def _said_of_nan(undefined: Sequence[TensorTrace], incomparable: Sequence[TensorTrace]) -> str:
    count = sum(trace.error.undefined for trace in undefined)
    if not incomparable:
        return f"{count} elements of {len(undefined)} tensors are NaN in the reference and were not compared"
    return (
        f"{len(incomparable)} tensors could not be compared, because the reference gives only NaN for them, "
        f"{incomparable[0].name!r} first: look for NaN in the inputs"
    )


def _said(blame: Blame) -> str:
    error = blame.introduced
    if blame.detail and not error.comparable:
        return f"{blame.node} ({blame.operator}): {blame.detail}"
    if blame.estimated and not error.bad:
        return (
            f"{blame.node} ({blame.operator}): its error is {error.size:.2g} larger than that of its inputs"
        )
    what = (
        f"{error.bad} values that are not finite"
        if error.bad
        else f"an error of {error.size:.2g} of its own, {blame.factor:.0f} times what is usual for its kind"
        if blame.stands_out
        else f"an error of {error.size:.2g} of its own, the most of all nodes"
    )
    return f"{blame.node} ({blame.operator}): {what}" + (f", {blame.detail}" if blame.detail else "")
