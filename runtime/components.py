"""Models of several graphs: each graph open, run on what the others give it, and compared by itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from onnxsmith.comparison import Comparison, TensorComparison, Tolerance
from onnxsmith.errors import ModelFileError
from onnxsmith.package import TensorSpec
from onnxsmith.program import AxisSizes
from onnxsmith.runtime.backend import Backend
from onnxsmith.runtime.compare import compare_sessions, reference_outputs
from onnxsmith.runtime.samples import Case, cases_for, made_up_values
from onnxsmith.runtime.session import Array, Session

__all__ = ["Expected", "compare_components", "expected_outputs", "open_components"]

ModelT = TypeVar("ModelT")

# What was fed to a reference, and what it gave.
Expected = Mapping[str, list[tuple[Case, dict[str, Array]]]]

# (rows, length of what the first graph takes, length of what later ones take besides).
_CHAIN_SHAPES = ((1, 8, 1), (2, 7, 5), (3, 1, 1), (1, 64, 16), (2, 33, 3))
# Inputs that another graph gives under another name.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "encoder_hidden_states": ("last_hidden_state", "encoder_outputs"),
    "encoder_attention_mask": ("attention_mask",),
    "spectrogram": ("spectrum",),
}


@contextlib.contextmanager
def open_components(
    backend: Backend[ModelT], models: Mapping[str, ModelT], *, name: str = ""
) -> Iterator[dict[str, Session]]:
    """Opens each of several models on a backend.

    Args:
        backend: What opens them.
        models: By component.
        name: What to call the whole in messages.
    """
    with contextlib.ExitStack() as stack:
        sessions = {}
        for component, model in models.items():
            label = name if len(models) == 1 or not name else f"{name}: {component}"
            sessions[component] = stack.enter_context(
                backend.open(model, name=label) if label else backend.open(model)
            )
        yield sessions


def expected_outputs(
    references: Mapping[str, Session],
    *,
    limits: Mapping[str, Mapping[str, int]],
    samples: int | None = None,
    seed: int = 0,
    axis_limits: Mapping[str, Mapping[str, AxisSizes]] | None = None,
    fixed: Mapping[str, Mapping[str, tuple[int | None, ...]]] | None = None,
    sizes: tuple[int, int] | None = None,
    on_refused: Callable[[Case, str], None] | None = None,
) -> Expected:
    """Makes inputs of several shapes, and runs the references on them.

    Where there are several graphs, they run one after the other, and each takes from those before it what
    has its name: a decoder gets hidden states that the encoder computed, and a cache that the first decoder
    filled.

    Args:
        references: The models that are right, by component, in the order in which they run.
        limits: By component, for integer inputs, one above the highest valid value.
        samples: How many cases; all kinds where None.
        seed: Of the random numbers.
        axis_limits: By component, for dynamic axes by name, the sizes that run.
        fixed: By component and input, the sizes of the axes that candidates have fixed.
        sizes: (batch, other dynamic axes), for one case of that size.
        on_refused: Called with a case that a reference of one graph does not run, and why: an ONNX graph does
            not say which sizes it takes. Such a case is left out, if there are others.

    Raises:
        ModelFileError: A reference runs no case.
    """
    if len(references) == 1:
        ((name, session),) = references.items()
        cases = cases_for(
            session,
            limits=limits.get(name, {}),
            samples=samples,
            seed=seed,
            axis_limits=(axis_limits or {}).get(name),
            fixed=(fixed or {}).get(name),
            sizes=sizes,
        )
        if on_refused is None:
            return {name: reference_outputs(session, cases)}
        ran: list[tuple[Case, dict[str, Array]]] = []
        refused: list[tuple[Case, ModelFileError]] = []
        for case in cases:
            try:
                ran += reference_outputs(session, [case])
            except ModelFileError as error:
                refused.append((case, error))
        if not ran and refused:
            raise refused[0][1]
        for case, why in refused:
            on_refused(case, str(why))
        return {name: ran}
    random = np.random.default_rng(seed)
    expected: dict[str, list[tuple[Case, dict[str, Array]]]] = {name: [] for name in references}
    shapes = ((*sizes, 1),) if sizes else _CHAIN_SHAPES[:samples]
    for number, (rows, length, later) in enumerate(shapes):
        known: dict[str, Array] = {}
        for order, (name, session) in enumerate(references.items()):
            bounds = {axis: bound for table in (axis_limits or {}).values() for axis, bound in table.items()}
            case = _case(
                session.inputs,
                known,
                limits=limits.get(name, {}),
                random=random,
                rows=rows,
                # The last graph decodes: mostly one token, sometimes several.
                length=length if order == 0 else later if order == 1 else max(later // 2, 1),
                bounds=bounds,
                fixed=(fixed or {}).get(name, {}),
                pad=number == len(_CHAIN_SHAPES) - 1,
            )
            outputs = session.run(case.feeds)
            expected[name].append((case, outputs))
            known |= outputs
            if order == 0 and "attention_mask" in case.feeds:
                known["attention_mask"] = case.feeds["attention_mask"]
    return expected


def compare_components(
    references: Mapping[str, Session],
    candidates: Mapping[str, Session],
    expected: Expected,
    *,
    tolerance: Tolerance,
    name: str,
    on_case: Callable[[Case], None] | None = None,
) -> Comparison:
    """Compares each component on what the reference was fed, in one verdict.

    A component that only one side has is a comparison that failed.

    Args:
        references: For their names and signatures.
        candidates: What is judged.
        expected: From ``expected_outputs``.
        tolerance: The bounds.
        name: Of the candidate as a whole.
        on_case: Called after each case, for progress.
    """
    if len(references) == len(candidates) == 1:
        (reference,), (candidate,), (cases,) = references.values(), candidates.values(), expected.values()
        return compare_sessions(reference, candidate, cases, tolerance=tolerance, on_case=on_case)
    tensors: list[TensorComparison] = []
    errors = [
        f"the candidate {'lacks' if part in references else 'has'} the component {part}"
        for part in sorted(references.keys() ^ candidates.keys())
    ]
    for part in () if errors else references:
        comparison = compare_sessions(
            references[part], candidates[part], expected[part], tolerance=tolerance, on_case=on_case
        )
        if comparison.error:
            errors.append(f"{part}: {comparison.error}")
        tensors += [dataclasses.replace(t, case=f"{part}: {t.case}") for t in comparison.tensors]
    first = next(iter(references.values()))
    return Comparison(
        reference=first.name.partition(": ")[0],
        candidate=name,
        provider=next(iter(candidates.values())).provider,
        tolerance=tolerance,
        tensors=tuple(tensors),
        error="; ".join(errors),
    )


def _case(
    inputs: tuple[TensorSpec, ...],
    known: Mapping[str, Array],
    *,
    limits: Mapping[str, int],
    random: np.random.Generator,
    rows: int,
    length: int,
    bounds: Mapping[str, AxisSizes],
    fixed: Mapping[str, tuple[int | None, ...]],
    pad: bool,
) -> Case:
    given = {spec.name: found for spec in inputs if (found := _given(spec, known)) is not None}
    sizes: dict[str, int] = {}
    for spec in inputs:
        if spec.name in given:
            for axis, size in zip(spec.shape or (), given[spec.name].shape, strict=False):
                if isinstance(axis, str):
                    sizes.setdefault(axis, size)
    made, tokens = made_up_values(
        tuple(spec for spec in inputs if spec.name not in given),
        sizes,
        limits=limits,
        random=random,
        first=rows,
        rest=length,
        axis_limits=bounds,
        fixed=fixed,
        pad=pad,
    )
    described = " ".join(f"{axis}={size}" for axis, size in sizes.items()) or "fixed shapes"
    feeds: dict[str, Any] = {spec.name: given.get(spec.name, made.get(spec.name)) for spec in inputs}
    return Case(described + (" right-padding" if tokens is not None else ""), feeds, tokens)


def _given(spec: TensorSpec, known: Mapping[str, Array]) -> Array | None:
    """What an earlier graph gave for an input, if it did."""
    names = (spec.name, *_ALIASES.get(spec.name, ()))
    if spec.name.startswith("past_key_values."):
        names = (f"present.{spec.name.removeprefix('past_key_values.')}",)
    elif spec.name not in _ALIASES:
        return None
    for name in names:
        if name in known and known[name].ndim == len(spec.shape or ()):
            return known[name]
    return None
