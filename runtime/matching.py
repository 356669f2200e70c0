"""Which intermediate tensor of one model is which of another, after fusion, quantization and renaming."""

from __future__ import annotations

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsmith.runtime.graph_parts import GraphValues
from onnxsmith.runtime.session import Array
from onnxsmith.runtime.tensor_store import StoredTensor, TensorStore, swap_middle
from onnxsmith.runtime.tracing_runs import Weighted

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Layout",
    "Match",
    "match_by_names",
    "match_by_places",
    "match_by_values",
    "match_by_weights",
    "parts_of_products",
    "stem_of",
    "to_layout",
    "with_other_columns",
]

# A candidate's tensor is taken for a reference's where their relative distance is below this, which 4 bit
# weights keep, and no other tensor of the reference is nearly as close.
_MAX_DISTANCE = 0.35
_CERTAIN_DISTANCE = 1e-3
# Larger constants are no choice of a few columns.
_MOST_PICKED = 1 << 20
_RUNNER_UP = 2.0
# What is computed with one weight comes together within so many values.
_NEAR = 12


class Layout(enum.StrEnum):
    """How the reference's elements lie in the candidate's tensor."""

    SAME = "same"
    REFERENCE_SWAPPED = "reference's middle axes swapped"
    CANDIDATE_SWAPPED = "candidate's middle axes swapped"


@dataclasses.dataclass(frozen=True)
class Match:
    """A tensor of the candidate and the one of the reference that it should be.

    Attributes:
        candidate: Name of the candidate's value.
        reference: Name of the reference's tensor.
        layout: How one is turned into the other.
        by: ``name``, ``weight``, ``value`` or ``place``.
    """

    candidate: str
    reference: str
    layout: Layout = Layout.SAME
    by: str = "name"


def to_layout(reference: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    """The reference's elements in the places that the candidate has for them."""
    if layout is Layout.REFERENCE_SWAPPED:
        return swap_middle(reference).reshape(shape)
    if layout is Layout.CANDIDATE_SWAPPED:
        batch, heads, sequence, size = shape
        return swap_middle(reference.reshape(batch, sequence, heads, size))
    return reference.reshape(shape)


def _sizes(cases: Mapping[int, StoredTensor]) -> tuple[int, ...]:
    return tuple(int(np.prod(stored.shape)) for _, stored in sorted(cases.items()))


def _shapes(cases: Mapping[int, StoredTensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(stored.shape for _, stored in sorted(cases.items()))


def match_by_names(reference: TensorStore, candidate: TensorStore, names: Iterable[str]) -> dict[str, Match]:
    """Values that have the same name and the same shapes on both sides."""
    return {
        name: Match(name, name)
        for name in names
        if name in reference
        and name in candidate
        and _shapes(reference.cases(name)) == _shapes(candidate.cases(name))
    }


def match_by_weights(
    values: GraphValues,
    weighted: Mapping[str, Weighted],
    reference: TensorStore,
    candidate: TensorStore,
) -> dict[str, Match]:
    """Results of nodes that compute with the same weight on both sides.

    Passes keep a weight's name, perhaps with something after it: ``q_proj.weight`` becomes
    ``q_proj.weight_q4``. Where several nodes use one weight, nothing is said about any of them.

    Args:
        values: Of the candidate.
        weighted: Name or stem of a weight of the reference to what is computed with it.
        reference: Its tensors.
        candidate: Its tensors.
    """
    matches = {}
    for stem, names in _nodes_by_stem(values, weighted, candidate).items():
        target = weighted[stem].output
        if target not in reference:
            continue
        sizes = _sizes(reference.cases(target))
        whole = _whole(values, names)
        if whole is None or whole not in candidate or _sizes(candidate.cases(whole)) != sizes:
            # One weight in two places, as where embedding and head are tied: the one of this size.
            fitting = [name for name in names if _sizes(candidate.cases(name)) == sizes]
            plain = len({values.producers[name].op_type for name in names}) == len(names)
            whole = fitting[0] if len(fitting) == 1 and len(names) == 2 and plain else None
        if whole is not None:
            matches[whole] = Match(whole, target, by="weight")
    return matches


def match_by_places(
    values: GraphValues,
    weighted: Mapping[str, Weighted],
    reference: TensorStore,
    candidate: TensorStore,
) -> dict[str, Match]:
    """What goes into nodes that compute with the same weight on both sides; see ``match_by_weights``.

    It finds tensors that are so wrong that nothing else would.
    """
    matches = {}
    for stem, names in _nodes_by_stem(values, weighted, candidate).items():
        source, inputs = weighted[stem].input, values.inputs_of(values.producers[names[0]])
        if not inputs or source is None or _whole(values, names) is None:
            continue
        name = inputs[0]
        if name not in candidate or source not in reference:
            continue
        if _sizes(candidate.cases(name)) == _sizes(reference.cases(source)):
            matches[name] = Match(name, source, by="place")
    return matches


def parts_of_products(
    values: GraphValues, weighted: Mapping[str, Weighted], candidate: TensorStore
) -> set[str]:
    """What is computed with a part of a weight, such as its blocks without offsets: no reference has it.

    It may well be near to the whole.
    """
    parts: set[str] = set()
    for names in _nodes_by_stem(values, weighted, candidate).values():
        whole = _whole(values, names)
        if whole is not None and whole not in names:
            parts.update(names)
    return parts


def with_other_columns(model: ir.Model) -> set[str]:
    """Values of which some columns are in another scale than the reference's, by ``float_columns``.

    Such columns are picked by rows of zeros and a one, alone or behind rows that sum blocks.
    """
    found = set()
    for node in model.graph:
        if node.op_type != "FusedMatMul" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        rows: ir.Value | None = node.inputs[1]
        joined = node.inputs[1].producer()
        if joined is not None and joined.op_type == "Concat":
            rows = joined.inputs[-1]
        tensor = None if rows is None else rows.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.size > _MOST_PICKED:
            continue
        array = tensor.numpy()
        if np.array_equal(np.count_nonzero(array, axis=1), np.ones(len(array))) and array.max() == 1:
            found.add(node.inputs[0].name or "")
    return found


def _nodes_by_stem(
    values: GraphValues, weighted: Mapping[str, Weighted], candidate: TensorStore
) -> dict[str, list[str]]:
    by_stem: dict[str, list[str]] = defaultdict(list)
    more: set[str] = set()
    for name in values.names:
        if name not in candidate:
            continue
        node = values.producers[name]
        if node.outputs[0].name != name:
            continue
        found = {stem_of(weight, weighted) for weight in values.weights_of(node)} - {None}
        if len(found) == 1:
            stem = found.pop() or ""
            by_stem[stem].append(name)
            if values.does_more(node):
                more.add(stem)
    # What is computed with these weights is inside of a node, and no value of the graph.
    return {stem: names for stem, names in by_stem.items() if stem not in more}


def _whole(values: GraphValues, names: list[str]) -> str | None:
    """The first value that depends on all that is computed with a weight.

    That is the last of a chain, as where a bias is added, or where the blocks of a quantized weight and
    their offsets, which are multiplied apart, come together.
    """
    operators = {values.producers[name].op_type for name in names}
    if len(operators) < len(names):
        # Equal weights of several places may be stored once: nothing comes together.
        return None
    wanted, covered = set(names), dict[str, frozenset[str]]()
    start = values.order[names[0]]
    for name in values.names[start : start + _NEAR]:
        inputs = values.inputs_of(values.producers[name])
        own = frozenset({name} & wanted)
        covered[name] = own.union(*(covered.get(one, frozenset()) for one in inputs))
        if covered[name] == wanted:
            return name
    return None


def stem_of(name: str, stems: Iterable[str]) -> str | None:
    """The longest of some names that a pass may have made this one of."""
    return max((stem for stem in stems if _is_stem(stem, name)), key=len, default=None)


def _is_stem(stem: str, name: str) -> bool:
    return name == stem or (name.startswith(stem) and not name[len(stem)].isalnum())


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """The reference's tensors of one size, as rows."""

    names: list[str]
    layouts: list[Layout]
    rows: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]


def match_by_values(
    reference: TensorStore,
    candidate: TensorStore,
    names: Iterable[str],
    *,
    taken: Collection[str] = (),
    max_distance: float = _MAX_DISTANCE,
) -> dict[str, Match]:
    """Tensors whose elements are nearly those of exactly one tensor of the reference.

    Args:
        reference: What is looked through.
        candidate: Where the tensors are.
        names: The candidate's values to find.
        taken: Tensors of the reference that are not looked at.
        max_distance: Relative distance from which a tensor is another one.
    """
    buckets = _buckets(reference, frozenset(taken))
    found: dict[str, Match] = {}
    for name in names:
        if name not in candidate:
            continue
        cases = candidate.cases(name)
        bucket = buckets.get(_sizes(cases))
        if bucket is None or any(stored.bad for stored in cases.values()):
            continue
        best = _nearest(bucket, _row(cases, swapped=False), max_distance)
        layout = bucket.layouts[best[1]] if best else Layout.SAME
        if all(len(stored.shape) == 4 for stored in cases.values()):
            other = _nearest(bucket, _row(cases, swapped=True), max_distance, only_same=True)
            if other and (best is None or other[0] < best[0]):
                best, layout = other, Layout.CANDIDATE_SWAPPED
        if best is not None:
            found[name] = Match(name, bucket.names[best[1]], layout, by="value")
    return found


def _row(cases: Mapping[int, StoredTensor], *, swapped: bool) -> npt.NDArray[np.float64]:
    ordered = [stored for _, stored in sorted(cases.items())]
    parts: list[Any] = [stored.swapped if swapped else stored.sketch for stored in ordered]
    return np.concatenate(parts)


def _buckets(reference: TensorStore, taken: frozenset[str]) -> dict[tuple[int, ...], _Bucket]:
    entries: dict[tuple[int, ...], list[tuple[str, Layout, Any]]] = defaultdict(list)
    for name in reference:
        cases = reference.cases(name)
        if name in taken or any(stored.bad or not stored.norm for stored in cases.values()):
            continue
        entries[_sizes(cases)].append((name, Layout.SAME, _row(cases, swapped=False)))
        if all(stored.swapped is not None for stored in cases.values()):
            entries[_sizes(cases)].append((name, Layout.REFERENCE_SWAPPED, _row(cases, swapped=True)))
    buckets = {}
    for sizes, items in entries.items():
        rows = np.stack([row for _, _, row in items])
        norms = np.linalg.norm(rows, axis=1)
        buckets[sizes] = _Bucket([n for n, _, _ in items], [lay for _, lay, _ in items], rows, norms)
    return buckets


def _nearest(
    bucket: _Bucket, row: npt.NDArray[np.float64], max_distance: float, *, only_same: bool = False
) -> tuple[float, int] | None:
    """Distance and index of the nearest tensor, if it is near and no different one is nearly as near."""
    distances = np.linalg.norm(bucket.rows - row, axis=1) / bucket.norms
    if only_same:
        distances = np.where([lay is Layout.SAME for lay in bucket.layouts], distances, np.inf)
    best = int(distances.argmin())
    nearest = float(distances[best])
    if nearest > max_distance:
        return None
    if nearest > _CERTAIN_DISTANCE:
        # Copies and views of the same tensor are no rivals.
        apart = np.linalg.norm(bucket.rows - bucket.rows[best], axis=1) / bucket.norms[best]
        rivals = distances[apart > 1e-6]
        if rivals.size and float(rivals.min()) < _RUNNER_UP * nearest:
            return None
    # Of equal ones the first: what comes later only hands it on.
    equal = np.flatnonzero(distances <= nearest * (1 + 1e-9) + 1e-12)
    return nearest, int(equal[0])
