"""Which nodes must stay in float32, by measuring on data: ranges first, then the nodes that add error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxsmith.errors import BadInputError, PassError
from onnxsmith.graph_passes.context import Activations, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.packed_functions import inline_functions
from onnxsmith.graph_passes.precision import complete_types, convert_floats

__all__ = ["MixedPrecision"]

_TARGETS: Mapping[str, tuple[ir.DataType, float]] = {
    "float16": (ir.DataType.FLOAT16, 65504.0),
    "bfloat16": (ir.DataType.BFLOAT16, 3.38e38),
}
# Values compared at once: both models' are in memory together.
_GROUP = 48


@dataclasses.dataclass
class _Sums:
    """Of one value over all data.

    Attributes:
        signal: Sum of squares of the reference.
        noise: Sum of squares of the difference.
        highest: Largest magnitude of the reference.
        finite: Whether the candidate was finite where the reference was.
    """

    signal: float = 0.0
    noise: float = 0.0
    highest: float = 0.0
    finite: bool = True

    @property
    def error(self) -> float:
        """Relative error: the norm of the difference over that of the reference."""
        if not self.finite:
            return math.inf
        return math.sqrt(self.noise / self.signal) if self.signal else math.sqrt(self.noise)


class MixedPrecision(GraphPass):
    """Converts to 16 bits as far as a tolerance allows, measured on calibration data.

    Nodes whose values come near the end of the type's range stay in float32. Everything else is converted,
    and the error of every value against float32 is measured in one sweep. If the outputs are off by more
    than the tolerance, those nodes stay that add most, which is the error of their results less that of
    their operands; the number of them doubles each round, so that a few sweeps are enough for any graph.
    Results that are not finite are never accepted.
    """

    name: ClassVar[str] = "mixed_precision"
    summary: ClassVar[str] = "16 bits as far as a tolerance on calibration data allows; says what stays, why"

    def __init__(
        self,
        *,
        target: Literal["float16", "bfloat16"] = "float16",
        max_error: float = 0.005,
        keep_io_types: bool = True,
        headroom: float = 2.0,
        rounds: int = 8,
    ) -> None:
        """Sets the tolerance.

        Args:
            target: The type of what is converted.
            max_error: Highest relative error of an output: norm of the difference over norm of the output.
            keep_io_types: Keep inputs and outputs in float32.
            headroom: A value may reach this part of the type's range: 2 is half of it.
            rounds: Highest number of measurements.

        Raises:
            BadInputError: A number that makes no sense.
        """
        for key, value, lowest in (
            ("max_error", max_error, 0.0),
            ("headroom", headroom, 1.0),
            ("rounds", rounds, 1),
        ):
            if not value >= lowest or (key == "max_error" and not value > 0):
                raise BadInputError(
                    f"pass {self.name}: {key}", got=repr(value), expected=f"more than {lowest:g}"
                )
        self.target = target
        self.max_error = max_error
        self.keep_io_types = keep_io_types
        self.headroom = headroom
        self.rounds = rounds

    def requires(self, model: ir.Model) -> None:
        """Raises PreconditionError where there is no data to measure on."""
        if context_of(model).activations is None:
            raise PreconditionError(
                f"pass {self.name}",
                got="no calibration data",
                expected="data to measure on",
                remedy="Give some, or use to_float16, which goes by the kind of operator",
            )

    def apply(self, model: ir.Model) -> Changes:
        """Measures, converts, and says what stays and why.

        Raises:
            PassError: The tolerance was not met in the given number of rounds.
        """
        run = context_of(model).activations
        assert run is not None
        dtype, limit = _TARGETS[self.target]
        inline_functions(model)
        complete_types(model, self.name)
        reference = model.clone()
        kept = self._by_range(reference, run, limit)
        by_range = len(kept)
        step, measured = 0, []
        for number in range(self.rounds):
            candidate = model.clone()
            changes = convert_floats(candidate, dtype, kept=kept, keep_io_types=True, name=self.name)
            if not changes.count:
                return Changes(0, {"error": 0.0, "rounds": number}, changes.skipped or dict(kept))
            sums = _measure(reference, candidate, run)
            error = max((sums[name].error for name in _output_names(reference, sums)), default=math.inf)
            measured.append({"kept": len(kept), "error": error})
            if error <= self.max_error:
                if not self.keep_io_types:
                    candidate = model.clone()
                    changes = convert_floats(candidate, dtype, kept=kept, keep_io_types=False, name=self.name)
                model.graph = candidate.graph
                model.metadata_props.update(candidate.metadata_props)
                changes.details |= {"error": error, "kept_for_range": by_range, "rounds": measured}
                return changes
            step = max(2 * step, math.ceil(len(model.graph) / 50))
            added = _worst(reference, sums, kept, step)
            if not added:
                break
            kept |= added
        raise PassError(
            f"pass {self.name}",
            got=f"a relative error of {measured[-1]['error']:.3g} with {len(kept)} nodes in float32",
            expected=f"at most {self.max_error:g} after {self.rounds} measurements",
            remedy="The model is unchanged. Allow a larger max_error or more rounds",
        )

    def _by_range(self, model: ir.Model, run: Activations, limit: float) -> dict[str, str]:
        highest: dict[str, float] = {}
        names = list(_values(model))
        for start in range(0, len(names), _GROUP):
            for batch in run(model, names[start : start + _GROUP]):
                for name, array in batch.items():
                    peak = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
                    highest[name] = max(highest.get(name, 0.0), peak)
        bound = limit / self.headroom
        kept: dict[str, str] = {}
        for node in model.graph:
            values = [value for value in (*node.inputs, *node.outputs) if value is not None]
            peak = max((highest.get(value.name or "", 0.0) for value in values), default=0.0)
            if peak > bound:
                kept[label(node)] = f"a value reaches {peak:.3g}; {self.target} ends at {limit:.3g}"
        return kept


def _values(model: ir.Model) -> Iterator[str]:
    for node in model.graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value.name and (value.uses() or value.is_graph_output()):
                yield value.name


def _output_names(model: ir.Model, sums: Mapping[str, _Sums]) -> list[str]:
    return [name for value in model.graph.outputs if (name := value.name or "") in sums]


def _measure(reference: ir.Model, candidate: ir.Model, run: Activations) -> dict[str, _Sums]:
    """The error of each value that both have, in one sweep of the data for each group of values."""
    there = {value.name for node in candidate.graph for value in node.outputs}
    names = [name for name in _values(reference) if name in there]
    sums = {name: _Sums() for name in names}
    for start in range(0, len(names), _GROUP):
        group = names[start : start + _GROUP]
        for left, right in zip(run(reference, group), run(candidate, group), strict=True):
            for name in group:
                _add(sums[name], left[name], right[name])
    return sums


def _add(sums: _Sums, want: Any, have: Any) -> None:
    want, have = np.asarray(want, np.float64), np.asarray(have, np.float64)
    usable = np.isfinite(want)
    sums.finite &= bool(np.isfinite(have[usable]).all())
    if not sums.finite:
        return
    sums.signal += float(np.square(want[usable]).sum())
    sums.noise += float(np.square(want[usable] - have[usable]).sum())
    sums.highest = max(sums.highest, float(np.abs(want[usable]).max(initial=0.0)))


def _worst(model: ir.Model, sums: Mapping[str, _Sums], kept: Mapping[str, str], count: int) -> dict[str, str]:
    """The nodes that add most error: that of their results, less the largest of their operands."""
    ranked: list[tuple[float, str]] = []
    for node in model.graph:
        name = label(node)
        results = [sums[key].error for v in node.outputs if (key := v.name or "") in sums]
        if name in kept or not results:
            continue
        names = [v.name or "" for v in node.inputs if v is not None]
        operands = [sums[key].error for key in names if key in sums]
        before, after = max(operands, default=0.0), max(results)
        if math.isinf(before):
            continue
        if after > before:
            ranked.append((after - before, name))
    ranked.sort(key=lambda item: -item[0])
    return {name: _said(added) for added, name in ranked[:count]}


def _said(added: float) -> str:
    return (
        "its result is not finite in 16 bits"
        if math.isinf(added)
        else f"adds a relative error of {added:.2g}"
    )
