"""What few bits cost each weight, and which weights get them under a budget.

One run over the data says how far the product of each weight with few bits is from the one with many: the
attribution. How much that matters for the output of the model is measured for groups of weights, those of
one kind in one part of the depth, by switching a whole group. A weight's cost is its share of its group's,
in proportion to its attribution. What is reported in the end was measured with all chosen weights together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.comparison import kl_divergence
from onnxsmith.graph_passes.context import Activations, Probe, Timings
from onnxsmith.graph_passes.trial_bits import FLAGS, Option, Twins, attributable, switchable

__all__ = ["Sensitivity", "cheapest_within", "groups_of", "measured_sensitivity", "product_times"]

Flags = npt.NDArray[np.bool_]

# Groups that are switched and measured. A model with fewer weights than this has each of them measured.
MAX_GROUPS = 24
# Sets of weights that are measured after the groups were.
_TRIES = 8


@dataclasses.dataclass
class Sensitivity:
    """What was measured.

    Attributes:
        measure: The divergence of the model with the flagged weights in few bits.
        costs: What few bits add, for each weight.
        attribution: The squared error of each weight's product, relative to its square.
        groups: Name of a group to the numbers of its weights.
        group_costs: Name of a group to what few bits for all of it add.
        best: The divergence with many bits everywhere.
        worst: With few bits everywhere.
    """

    measure: Callable[[Flags], float]
    costs: list[float]
    attribution: list[float]
    groups: Mapping[str, list[int]]
    group_costs: Mapping[str, float]
    best: float
    worst: float

    def order(self, saved: Sequence[float]) -> list[int]:
        """The weights, the cheapest for what it saves first; those that save nothing are left out."""
        return sorted((i for i, s in enumerate(saved) if s > 0), key=lambda i: self.costs[i] / saved[i])


def groups_of(names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    """Weights of one kind, alike in shape and in name but for numbers, in parts of the depth.

    Args:
        names: Of the weights, in the graph's order.
        shapes: Of the weights.
    """
    if len(names) <= MAX_GROUPS:
        return {name: [number] for number, name in enumerate(names)}
    kinds: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        kinds.setdefault((re.sub(r"\d+", "*", name), shape), []).append(number)
    parts = max(1, MAX_GROUPS // len(kinds))
    found: dict[str, list[int]] = {}
    for members in kinds.values():
        for piece in np.array_split(np.array(members), min(parts, len(members))):
            first, last = names[piece[0]], names[piece[-1]]
            found[first if first == last else f"{first} ... {last}"] = [int(number) for number in piece]
    return found


def measured_sensitivity(
    model: ir.Model,
    options: Sequence[Option],
    *,
    probe: Probe,
    activations: Activations | None,
    samples: int,
    each: bool,
    use: Callable[[Sensitivity], None],
) -> None:
    """Measures what few bits cost, and calls ``use`` while the trial graph is still open.

    Args:
        model: It stays as it is.
        options: Its weights.
        probe: Runs a model again and again.
        activations: Runs a model once; where None each weight is measured alone.
        samples: Samples that every measurement runs on.
        each: Measure each weight alone: a run for each of them.
        use: What chooses.
    """
    with probe(model.clone(), samples) as run:
        expected = run({})
    names, shapes = [o.weight.name for o in options], [o.weight.shape for o in options]
    grouped = not each and activations is not None
    groups = groups_of(names, shapes) if grouped else {name: [n] for n, name in enumerate(names)}
    attribution = [1.0] * len(options)
    if len(groups) < len(options) and activations is not None:
        attribution = _attribution(model, options, activations, samples)
    trial = model.clone()
    switchable(trial, options)
    is_logits = trial.graph.outputs[0].name == "logits"
    with probe(trial, samples) as run:

        def measure(low: Flags) -> float:
            return _divergence(run, low, expected, is_logits=is_logits)

        none = np.zeros(len(options), np.bool_)
        best, worst = measure(none), measure(~none)
        group_costs: dict[str, float] = {}
        costs = [0.0] * len(options)
        for name, members in groups.items():
            flags = none.copy()
            flags[members] = True
            group_costs[name] = max(measure(flags) - best, 0.0)
            total = sum(attribution[number] for number in members) or 1.0
            for number in members:
                costs[number] = group_costs[name] * attribution[number] / total
        use(Sensitivity(measure, costs, attribution, groups, group_costs, best, worst))


def _attribution(
    model: ir.Model, options: Sequence[Option], activations: Activations, samples: int
) -> list[float]:
    """The relative squared error of each weight's products with few bits, in one run over the samples."""
    trial = model.clone()
    twins = attributable(trial, options)
    names = [name for one in twins for pair in one.errors for name in pair]
    totals = dict.fromkeys(names, 0.0)
    for number, batch in enumerate(activations(trial, names)):
        if number == samples:
            break
        for name in names:
            totals[name] += float(np.asarray(batch[name]).reshape(-1)[0])
    return [
        sum(totals[error] for error, _ in one.errors)
        / (sum(totals[square] for _, square in one.errors) or 1.0)
        for one in twins
    ]


def product_times(model: ir.Model, options: Sequence[Option], timings: Timings) -> list[tuple[float, float]]:
    """Milliseconds of each weight's products in one step, with few bits and with many.

    Args:
        model: It stays as it is.
        options: Its weights.
        timings: Measures the nodes of a model.
    """
    trial = model.clone()
    twins = attributable(trial, options)
    times = timings(trial)

    def of(name: str) -> float:
        # A product with minimums is several nodes, whose names begin alike.
        return sum(ms for node, ms in times.items() if node == name or node.startswith(f"{name}_nbits"))

    return [_both(one, of) for one in twins]


def _both(one: Twins, of: Callable[[str], float]) -> tuple[float, float]:
    return sum(of(low) for low, _ in one.pairs), sum(of(high) for _, high in one.pairs)


def cheapest_within(found: Sensitivity, saved: Sequence[float], budget: float) -> tuple[Flags, float]:
    """As many weights with few bits as a budget of divergence allows, and the divergence, measured.

    Costs do not just add up, so the budget that they are given is adjusted to what is measured.

    Args:
        found: What few bits cost.
        saved: What they save.
        budget: The highest divergence.
    """
    none = np.zeros(len(saved), np.bool_)
    order = found.order(saved)
    if found.worst <= budget:
        everything = none.copy()
        everything[order] = True
        return everything, found.worst if everything.all() else found.measure(everything)
    chosen, divergence = none, found.best
    keeps, breaks = 0.0, None
    given = budget - found.best
    for _ in range(_TRIES):
        low, total = none.copy(), 0.0
        for number in order:
            if total + found.costs[number] <= given:
                low[number] = True
                total += found.costs[number]
        measured = found.measure(low)
        if measured <= budget:
            keeps = given
            if np.dot(low, saved) >= np.dot(chosen, saved):
                chosen, divergence = low, measured
            if low[order].all():
                break
        else:
            breaks = given
        given = 2 * keeps if breaks is None else (keeps + breaks) / 2
    return chosen, divergence


def _divergence(
    run: Callable[[dict[str, Any]], list[npt.NDArray[Any]]],
    low: Flags,
    expected: Sequence[npt.NDArray[Any]],
    *,
    is_logits: bool,
) -> float:
    total = count = 0.0
    for got, want in zip(run({FLAGS: low}), expected, strict=True):
        if not np.isfinite(got).all():
            return float("inf")
        if is_logits:
            # Some positions at a time: float64 copies of all of them may take gigabytes.
            ours, theirs = got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1])
            for begin in range(0, len(ours), 32):
                part = slice(begin, begin + 32)
                total += float(kl_divergence(theirs[part].astype(float), ours[part].astype(float)).sum())
            count += len(ours)
        else:
            total += float(np.square(got.astype(float) - want).sum())
            count += float(np.square(want.astype(float)).sum())
    return total / count if count else 0.0
