"""The first tensors in which a model leaves its reference, and the nodes that make the error.

A node whose inputs are wrong gives wrong outputs and is not to blame. So each node of the candidate is also
given the reference's values in place of its inputs: what is wrong then was made by the node itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxsmith.comparison import Tolerance, compare_tensors, tolerance_for
from onnxsmith.errors import BadInputError
from onnxsmith.package import ModelPackage
from onnxsmith.runtime.backend import Backend
from onnxsmith.runtime.blaming import blame_nodes
from onnxsmith.runtime.divergence import (
    ROUNDING,
    Blame,
    Divergence,
    Reproduction,
    TensorTrace,
    changed_kernels,
)
from onnxsmith.runtime.graph_parts import GIVEN_SUFFIX, GivenValue, GraphValues, build_part
from onnxsmith.runtime.matching import (
    Match,
    match_by_names,
    match_by_places,
    match_by_values,
    match_by_weights,
    parts_of_products,
    to_layout,
    with_other_columns,
)
from onnxsmith.runtime.references import Reference
from onnxsmith.runtime.reproduction import SmallCase, relative_error, write_reproduction
from onnxsmith.runtime.samples import Case, numpy_dtype
from onnxsmith.runtime.session import Array
from onnxsmith.runtime.tensor_errors import ErrorSum, TensorError
from onnxsmith.runtime.tensor_store import TensorStore, hide_padding
from onnxsmith.runtime.tracing_runs import Forced, Weighted, trace_graph

__all__ = ["find_divergence"]

# Names of two graphs are not believed where so many of the pairs that they make do not fit each other.
_MAX_MISFITS = 0.3
_MISFIT = 0.7
_ROUNDS = 5
# A match by value that is so far off on right inputs was the wrong one.
_FAR = 0.2
# A tensor in about the direction of another, and so many times longer or shorter, is in another scale.
_SAME_DIRECTION = 0.7
_SCALED = 3.0


def find_divergence(
    reference: Reference,
    candidate: ModelPackage,
    backend: Backend[ModelPackage],
    cases: Sequence[Case],
    *,
    name: str = "candidate",
    tolerance: Tolerance | None = None,
    unoptimized: Backend[ModelPackage] | None = None,
    reproduce_in: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
    on_interrupt: Callable[[], None] | None = None,
) -> Divergence:
    """Compares every tensor of a candidate with the reference's, and finds the nodes that make the error.

    Args:
        reference: What is right.
        candidate: What is judged.
        backend: What runs it, whole and in pieces.
        cases: Inputs; the same shape of tensors is assumed within a case only.
        name: Of the candidate, for messages.
        tolerance: The bounds of a divergence; by the candidate's precision where None.
        unoptimized: The same backend without ONNX Runtime's own optimisation, to tell whether that is what
            makes the difference.
        reproduce_in: A directory that exists; where a node is to blame, it gets the smallest model and inputs
            that show it, with a script.
        on_progress: Called with what is being done.
        on_interrupt: Called where Ctrl-C ended the search. What was compared until then is ranked and
            returned. Where None, or where nothing was compared, the interrupt goes on to the caller.

    Raises:
        BadInputError: No case, or no tensor that both sides have.
        OnnxsmithError: A side cannot be run.
    """
    if not cases:
        raise BadInputError("bisect", got="no inputs", expected="at least one case")
    search = _Search(reference, candidate, backend, cases, tolerance, on_progress or _say_nothing, name)
    with search.expected, search.natural:
        try:
            return search.run(name, unoptimized, reproduce_in)
        except KeyboardInterrupt:
            if on_interrupt is None or not search.compared:
                raise
            on_interrupt()
            return search.so_far(name)


class _Search:
    def __init__(
        self,
        reference: Reference,
        candidate: ModelPackage,
        backend: Backend[ModelPackage],
        cases: Sequence[Case],
        tolerance: Tolerance | None,
        say: Callable[[str], None],
        name: str,
    ) -> None:
        self.name = name
        self.reference, self.candidate, self.backend = reference, candidate, backend
        self.cases, self._listener = cases, say
        self.doing = ""
        self.tolerance = tolerance or tolerance_for(candidate.precision)
        self.values = GraphValues(candidate.main.model)
        self.expected, self.natural = TensorStore(), TensorStore()
        # Tensors that are a multiple of the reference's, and how many times it.
        self.scaled: dict[str, float] = {}
        # What is known where the search is interrupted.
        self.weighted: Mapping[str, Weighted] = {}
        # Of the pieces, and of the untouched model.
        self.kernels: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self.matches: dict[str, Match] = {}
        self.introduced: dict[str, TensorError] = {}
        self.found: Divergence | None = None

    def say(self, what: str) -> None:
        self.doing = what
        self._listener(what)

    @property
    def compared(self) -> bool:
        """Whether both sides have run, if only in part."""
        return any(self._is_whole(self.natural, name) for name in self.natural)

    def run(
        self, name: str, unoptimized: Backend[ModelPackage] | None, reproduce_in: Path | None
    ) -> Divergence:
        self.say("reference")
        self.weighted = self.reference.trace(self.cases, self.expected)
        self.say("candidate")
        self._on_pieces("candidate", self.natural, None, self.kernels[0])
        matches, introduced, bad = self._matched()
        if not matches:
            raise BadInputError(
                f"bisect: {name}",
                got="no floating-point tensor that the reference has too",
                expected="two forms of one model",
                remedy="Compare their outputs with `onnxsmith compare`",
            )
        self.say("errors")
        traces = [self._trace(matches[n], introduced[n]) for n in self.values.names if n in matches]
        outputs, tapping, whole = self._untouched(name)
        optimizer = None
        diverges = any(trace.reason for trace in traces)
        if unoptimized is not None and (tapping > ROUNDING or (outputs and not diverges)):
            optimizer = self._change(unoptimized, whole)
        blamed = self._blamed(traces, matches, bad)
        result = dataclasses.replace(
            self._divergence(name, traces, blamed, matches),
            outputs=outputs, tapping_change=tapping, optimizer_change=optimizer,
            kernels=changed_kernels(*self.kernels, named=self.values.all_named),
        )  # fmt: skip
        self.found = result
        if reproduce_in is None or result.passed or not blamed or not blamed[0].introduced.size:
            return result
        self.say("reproduction")
        made = self._reproduce(blamed[0], matches, reproduce_in)
        return dataclasses.replace(result, reproduction=made)

    def so_far(self, name: str) -> Divergence:
        """What is known of a search that was interrupted."""
        doing = self.doing
        if self.found is not None:
            # All but the small model is there.
            return dataclasses.replace(self.found, interrupted=doing)
        self.say("what was compared until then")
        for key in [n for n in self.natural if not self._is_whole(self.natural, n)]:
            self.natural.drop(key)
        matches = self.matches or self._first_matches()[0]
        traces = [self._trace(matches[n], self.introduced.get(n)) for n in self.values.names if n in matches]
        blamed = self._blamed(traces, matches, set())
        return dataclasses.replace(self._divergence(name, traces, blamed, matches), interrupted=doing)

    def _divergence(
        self, name: str, traces: Sequence[TensorTrace], blamed: Sequence[Blame], matches: Mapping[str, Match]
    ) -> Divergence:
        return Divergence(
            reference=self.reference.session.name,
            candidate=name,
            provider=self.backend.name,
            cases=tuple(case.name for case in self.cases),
            tolerance=self.tolerance,
            tensors=tuple(traces),
            unmatched=tuple(n for n in self.values.names if n in self.natural and n not in matches),
            first=next((trace for trace in traces if trace.reason), None),
            blamed=tuple(blamed),
            outputs={},
            tapping_change=0.0,
            bytes_traced=self.expected.bytes_written + self.natural.bytes_written,
        )

    def _blamed(
        self, traces: Sequence[TensorTrace], matches: Mapping[str, Match], bad: set[str]
    ) -> list[Blame]:
        return blame_nodes(
            traces, matches, bad, values=self.values, weight=self.reference.weight, scaled=self.scaled,
            tolerance=self.tolerance,
        )  # fmt: skip

    def _is_whole(self, store: TensorStore, name: str) -> bool:
        """Whether a tensor is there in all cases: an interrupt may come between two."""
        return len(store.cases(name)) == len(self.cases)

    def _reproduce(self, blame: Blame, matches: Mapping[str, Match], directory: Path) -> Reproduction:
        """The segment of the worst node as a model, from the reference's tensors to the one that is wrong."""
        forced = self._forced(matches)
        given = {name: source.value for name, source in forced.items()}
        segment = self.values.segment(blame.tensor, matches)
        inner = [
            v.name for n in segment for v in n.outputs if v.name in self.natural and v.name not in matches
        ]
        # Reading what lies between may be what shows the fault: then it is read in the small model too.
        for outputs in ([blame.tensor], [blame.tensor, *(name for name in inner if name)]):
            part = build_part(self.candidate.main.model, given=given, outputs=outputs)
            cases = self._small_cases(part, blame.tensor, matches, forced)
            if max(case.error for case in cases) >= 0.5 * min(blame.introduced.size, 1e30):
                break
        return write_reproduction(directory, part, self.backend, cases, blame)

    def _on_pieces(
        self,
        what: str,
        store: TensorStore,
        forced: Mapping[str, Forced] | None,
        kernels: dict[str, str] | None = None,
    ) -> None:
        trace_graph(
            self.values, self.backend, self.cases, store, forced=forced, kernels=kernels, of=self.name,
            on_piece=lambda done, total: self.say(f"{what}: tensor {done} of {total}"),
        )  # fmt: skip

    def _small_cases(
        self, part: ModelPackage, output: str, matches: Mapping[str, Match], forced: Mapping[str, Forced]
    ) -> list[SmallCase]:
        taken = {spec.name for spec in part.main.inputs}
        cases = []
        with self.backend.open(part, name="the part to blame") as session:
            for index, case in enumerate(self.cases):
                feeds = {name: array for name, array in case.feeds.items() if name in taken}
                for name, source in forced.items():
                    key = f"{name}{GIVEN_SUFFIX}"
                    if key in taken:
                        feeds[key] = source.array(index).astype(numpy_dtype(source.value.dtype), copy=False)
                expected = np.asarray(self._expected(matches[output], index))
                got = session.run(feeds)[output]
                hidden = (hide_padding(array, case) for array in (expected, got))
                cases.append(SmallCase(feeds, expected, relative_error(*hidden)))
        return cases

    def _first_matches(self) -> tuple[dict[str, Match], dict[str, Match], dict[str, Match]]:
        """All matches before nodes ran on right inputs; those by names, and those that are certain."""
        names = self._comparable()
        signature = [spec.name for spec in self.candidate.main.outputs]
        fixed = match_by_weights(self.values, self.weighted, self.expected, self.natural)
        fixed |= match_by_names(self.expected, self.natural, signature)
        by_name = match_by_names(self.expected, self.natural, names)
        by_value = match_by_values(self.expected, self.natural, names)
        return {**by_value, **by_name, **fixed}, by_name, fixed

    def _comparable(self) -> list[str]:
        """Values that the reference may have, too."""
        others = parts_of_products(self.values, self.weighted, self.natural)
        others |= with_other_columns(self.values.model)
        return [name for name in self.values.names if name not in others]

    def _matched(self) -> tuple[dict[str, Match], dict[str, TensorError], set[str]]:
        """Matches, the error that each match introduces, and values that are not finite on right inputs."""
        names, weighted = self._comparable(), self.weighted
        matches, by_name, fixed = self._first_matches()
        errors: dict[str, TensorError] = {}
        bad: set[str] = set()
        for turn in range(_ROUNDS):
            with TensorStore() as forced:
                try:
                    self._on_pieces(
                        f"nodes on the reference's inputs, turn {turn + 1}", forced, self._forced(matches)
                    )
                finally:
                    # Where it is interrupted this is all that will be known.
                    self._note(matches, forced)
                errors = {n: error for n, error in self.introduced.items() if n in forced}
                bad = {n for n in forced if any(stored.bad for stored in forced.cases(n).values())}
                free = [n for n in by_name if n not in fixed]
                misfits = [n for n in free if errors[n].relative > _MISFIT]
                if len(misfits) > max(2, _MAX_MISFITS * len(free)):
                    # The names of one graph mean something else in the other.
                    by_name = {}
                    matches = {**match_by_values(self.expected, self.natural, names), **fixed}
                    continue
                if turn == _ROUNDS - 1:
                    break
                scaled = self._scaled(matches, forced)
                if scaled:
                    self.scaled |= scaled
                    fixed = {n: m for n, m in fixed.items() if n not in self.scaled}
                    matches = {n: m for n, m in matches.items() if n not in scaled}
                    continue
                places = match_by_places(self.values, weighted, self.expected, self.natural)
                places = {n: m for n, m in places.items() if n in names and n not in self.scaled}
                found = match_by_values(self.expected, forced, names, max_distance=_FAR)
                better = self._better(matches, found, places, errors)
                if better == matches:
                    break
                matches = better
        return {n: m for n, m in matches.items() if n in errors}, errors, bad

    def _note(self, matches: Mapping[str, Match], forced: TensorStore) -> None:
        kept = {n: e for n, e in self.introduced.items() if self.matches.get(n) == matches.get(n)}
        new = {
            n: self._error(m, forced) for n, m in matches.items() if n in forced and self._is_whole(forced, n)
        }
        self.matches, self.introduced = dict(matches), kept | new

    def _scaled(self, matches: Mapping[str, Match], forced: TensorStore) -> dict[str, float]:
        """Matches by a weight whose tensors are multiples of each other, with the factor.

        Some graphs compute in another scale and return from it, so the place is not the same.
        """
        found = {}
        for name, match in matches.items():
            if match.by not in ("weight", "place") or name not in forced:
                continue
            got, right = (
                np.concatenate([stored.sketch for _, stored in sorted(store.cases(key).items())])
                for store, key in ((forced, name), (self.expected, match.reference))
            )
            norms = float(np.linalg.norm(got)), float(np.linalg.norm(right))
            if not all(norms):
                continue
            cosine = float(got @ right) / (norms[0] * norms[1])
            factor = float(got @ right) / norms[1] ** 2
            if cosine > _SAME_DIRECTION and not 1 / _SCALED < factor < _SCALED:
                found[name] = factor
        return found

    @staticmethod
    def _better(
        matches: Mapping[str, Match],
        found: Mapping[str, Match],
        places: Mapping[str, Match],
        errors: Mapping[str, TensorError],
    ) -> dict[str, Match]:
        """Corrects matches by what nodes give for right inputs, which is closer to the truth.

        Matches by value are made again: among tensors that are like each other, error may have led to the
        wrong one.
        """
        kept = {
            n: m for n, m in matches.items() if m.by != "value" or n in found or errors[n].relative < _FAR
        }
        better = {n: m for n, m in found.items() if n not in kept or kept[n].by == "value"}
        by_place = {n: m for n, m in places.items() if n not in kept and n not in better}
        return {**kept, **by_place, **better}

    def _forced(self, matches: Mapping[str, Match]) -> dict[str, Forced]:
        forced = {}
        for name, match in matches.items():
            first = self.natural.get(name, 0)
            value = GivenValue(first.dtype, len(first.shape))
            forced[name] = Forced(value, functools.partial(self._expected, match))
        return forced

    def _expected(self, match: Match, case: int) -> Array:
        array = self.expected.get(match.reference, case).load()
        return to_layout(array, self.natural.get(match.candidate, case).shape, match.layout)

    def _error(self, match: Match, store: TensorStore) -> TensorError:
        total = ErrorSum()
        for index, case in enumerate(self.cases):
            expected = hide_padding(self._expected(match, index), case)
            total.add(expected, hide_padding(store.get(match.candidate, index).load(), case))
        return total.total()

    def _trace(self, match: Match, introduced: TensorError | None) -> TensorTrace:
        node = self.values.producers[match.candidate]
        return TensorTrace(
            name=match.candidate,
            node=node.name or match.candidate,
            operator=node.op_type,
            reference=match.reference,
            matched_by=match.by,
            depth=self.values.order[match.candidate],
            error=self._error(match, self.natural),
            introduced=introduced,
            reason=self._reason(match),
        )

    def _reason(self, match: Match) -> str:
        for index, case in enumerate(self.cases):
            expected = hide_padding(np.asarray(self._expected(match, index), np.float32), case)
            got = hide_padding(self.natural.get(match.candidate, index).load().astype(np.float32), case)
            result = compare_tensors(
                expected, got, name=match.candidate, case=case.name, tolerance=self.tolerance
            )
            if not result.passed:
                return f"{result.reason} in '{case.name}'"
        return ""

    def _untouched(self, name: str) -> tuple[dict[str, str], float, list[dict[str, Array]]]:
        """Runs the candidate as it is: outputs that diverge, and how far tapping is from it."""
        found: dict[str, str] = {}
        change, whole = 0.0, []
        with self.backend.open(self.candidate, name=name) as session:
            shared = [s.name for s in session.outputs if s.name in self.natural and s.name in self.expected]
            wanted = {spec.name for spec in session.inputs}
            for index, case in enumerate(self.cases):
                feeds = {key: value for key, value in case.feeds.items() if key in wanted}
                outputs = session.run(feeds, shared)
                whole.append(outputs)
                for key, array in outputs.items():
                    got = hide_padding(np.asarray(array, np.float32), case)
                    tapped = hide_padding(self.natural.get(key, index).load(), case)
                    change = max(change, _relative(tapped, got))
                    right = hide_padding(np.asarray(self.expected.get(key, index).load(), np.float32), case)
                    result = compare_tensors(right, got, name=key, case=case.name, tolerance=self.tolerance)
                    if not result.passed:
                        found.setdefault(key, f"{result.reason} in '{case.name}'")
            self.kernels[1].update(session.kernels())
        return found, change, whole

    def _change(self, backend: Backend[ModelPackage], whole: list[dict[str, Array]]) -> float:
        change = 0.0
        with backend.open(self.candidate, name="unoptimized") as session:
            wanted = {spec.name for spec in session.inputs}
            for case, before in zip(self.cases, whole, strict=True):
                feeds = {key: value for key, value in case.feeds.items() if key in wanted}
                for key, array in session.run(feeds, list(before)).items():
                    change = max(
                        change, _relative(hide_padding(array, case), hide_padding(before[key], case))
                    )
        return change


def _say_nothing(_: str) -> None:
    pass


def _relative(one: Array, two: Array) -> float:
    total = ErrorSum()
    total.add(two, one)
    result = total.total()
    return math.inf if result.bad else result.relative
