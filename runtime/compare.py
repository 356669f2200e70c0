"""Two models on the same inputs: do they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from onnxsmith.comparison import Comparison, TensorComparison, Tolerance, compare_tensors
from onnxsmith.errors import FeedError, ModelFileError
from onnxsmith.runtime.samples import Case
from onnxsmith.runtime.session import Array, Session

__all__ = ["compare_sessions", "reference_outputs"]


def _as_codes(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A cache in floats as the codes that a session with a cache in 8 bits takes."""
    scales = session.cache_scales
    return {
        name: np.clip(np.rint(array / scales[name]), -128, 127).astype(np.int8)
        if name in scales and array.dtype.kind == "f"
        else array
        for name, array in feeds.items()
    }


def _as_floats(session: Session, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """What the codes of a cache in 8 bits stand for."""
    scales = session.cache_scales
    return {
        name: array.astype(np.float32) * scales[name] if name in scales and array.dtype == np.int8 else array
        for name, array in outputs.items()
    }


def reference_outputs(reference: Session, cases: Iterable[Case]) -> list[tuple[Case, dict[str, Array]]]:
    """Runs the reference once, for comparison with several candidates."""
    return [(case, reference.run(case.feeds)) for case in cases]


def compare_sessions(
    reference: Session,
    candidate: Session,
    expected: Iterable[tuple[Case, dict[str, Array]]],
    *,
    tolerance: Tolerance,
    on_case: Callable[[Case], None] | None = None,
) -> Comparison:
    """Runs a candidate on the reference's inputs and compares every output.

    Inputs that the candidate does not take are left out and outputs that only one side has are reported;
    both sides must have the names that matter. Padded positions are not compared. A candidate that refuses
    or cannot run a case is a comparison that failed, not an exception.

    Args:
        reference: For its name and signature.
        candidate: What is judged.
        expected: The cases and what the reference gave, from ``reference_outputs``.
        tolerance: The bounds.
        on_case: Called after each case, for progress.
    """
    tensors: list[TensorComparison] = []
    specs = {spec.name: spec for spec in reference.outputs}
    wanted = {spec.name for spec in candidate.inputs}
    given = {spec.name for spec in reference.inputs}
    error = ""
    missing_inputs = sorted(wanted - given)
    shared = [spec.name for spec in candidate.outputs if spec.name in specs]
    if missing_inputs:
        names = ", ".join(missing_inputs[:4])
        error = f"the candidate needs the inputs {names}, which the reference does not take"
    elif not shared:
        ours, theirs = (", ".join(s.name for s in side.outputs[:4]) for side in (candidate, reference))
        error = f"no output in common: the candidate has {ours}, the reference {theirs}"
    lacking = [name for name in specs if name not in shared]
    for case, outputs in () if error else expected:
        feeds = {name: value for name, value in case.feeds.items() if name in wanted}
        try:
            got = _as_floats(candidate, candidate.run(_as_codes(candidate, feeds), shared))
        except (FeedError, ModelFileError) as refusal:
            error = f"case '{case.name}': {refusal}"
            break
        for name in shared:
            ref, mask = outputs[name], None
            where = case.mask_for(specs[name], ref.shape)
            if where is not None:
                axis, counting = where
                batch, positions = counting.shape
                between = (1,) * (axis - 1)
                mask = np.broadcast_to(counting.reshape(batch, *between, positions), ref.shape[: axis + 1])
            tensors.append(
                compare_tensors(ref, got[name], name=name, case=case.name, tolerance=tolerance, mask=mask)
            )
        tensors += [
            TensorComparison(
                case.name,
                name,
                0,
                outputs[name].shape,
                str(outputs[name].dtype),
                reason="the candidate lacks it",
            )
            for name in lacking
        ]
        if on_case is not None:
            on_case(case)
    return Comparison(
        reference=reference.name,
        candidate=candidate.name,
        provider=candidate.provider,
        tolerance=tolerance,
        tensors=tuple(tensors),
        error=error,
    )
