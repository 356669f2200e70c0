"""What stays of a weight is adapted to what goes, by least squares on the activations that it reads.

With H = x.T @ x, the weight that keeps only the columns k and changes the output ``x @ W.T`` least is
``W H_:k inv(H_kk)`` (Frantar and Alistarh, Optimal Brain Compression, 2022, https://arxiv.org/abs/2208.11580).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.channels import Side
from onnxsmith.graph_passes.spilled_weights import spilled
from onnxsmith.graph_passes.unit_groups import GraphUnits, WeightGroup, positions

__all__ = ["adapt_readers", "adapted", "hessian_scores"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
_DAMPING = 0.01


def hessian_scores(units: GraphUnits, group: WeightGroup, moments: Mapping[str, Floats]) -> Doubles:
    """The squared error of the output when a unit and all that went before it are gone, the rest adapted.

    Units go one by one, each time the one whose loss is smallest, ``trace(W_c inv(inv(H)_cc) W_c.T)``; the
    weight and the inverse are updated after each, so that of two units that do the same only one is cheap.

    Args:
        units: Of ``find_graph_units``.
        group: One of its groups.
        moments: Name of what a weight reads to ``x.T @ x / rows`` of it.
    """
    sides = [
        _Reader(
            _columns(side).astype(np.float64),
            np.linalg.inv(_damped(_moments(side, moments))).astype(np.float64),
            list(positions(units, group, side)),
        )
        for side in group.readers
    ]
    total, scores = 0.0, np.zeros(group.count)
    left = np.ones(group.count, bool)
    while left.any():
        losses = sum((side.losses(left) for side in sides), np.zeros(group.count))
        unit = int(np.argmin(np.where(left, losses, np.inf)))
        total += max(float(losses[unit]), 0.0)
        # Strictly rising, so that a lower score is an earlier one.
        scores[unit] = total = np.nextafter(total, np.inf)
        left[unit] = False
        for side in sides:
            side.remove(unit)
    return scores


class _Reader:
    def __init__(self, matrix: Doubles, inverse: Doubles, places: Sequence[npt.NDArray[np.int64]]) -> None:
        self._matrix = matrix
        self._inverse = inverse
        self._places = places
        self._single = all(len(part) == 1 for part in places)
        self._flat = np.concatenate(places)

    def losses(self, left: npt.NDArray[np.bool_]) -> Doubles:
        if self._single:
            diagonal = np.maximum(np.diagonal(self._inverse)[self._flat], 1e-30)
            return np.asarray(np.square(self._matrix[:, self._flat]).sum(0) / diagonal)
        found = np.zeros(len(self._places))
        for number in np.flatnonzero(left).tolist():
            places = self._places[number]
            part, within = self._matrix[:, places], np.linalg.inv(self._inverse[np.ix_(places, places)])
            found[number] = np.einsum("nc,cd,nd->", part, within, part, optimize=True)
        return found

    def remove(self, unit: int) -> None:
        places = self._places[unit]
        within = np.linalg.inv(self._inverse[np.ix_(places, places)])
        rows = within @ self._inverse[places]
        self._matrix -= self._matrix[:, places] @ rows
        self._inverse -= self._inverse[:, places] @ rows
        self._matrix[:, places] = 0
        self._inverse[places], self._inverse[:, places] = 0, 0
        # So that the block stays one that can be inverted; the columns are zero.
        self._inverse[places, places] = 1


def adapted(matrix: Floats, moments: Floats, kept: npt.NDArray[np.bool_]) -> Floats:
    """A weight (N, K) whose kept columns do what all of them did; the others are zero."""
    damped = _damped(moments)
    within = damped[np.ix_(kept, kept)]
    solved = np.linalg.solve(within, damped[kept] @ matrix.T.astype(np.float64)).T
    result = np.zeros_like(matrix)
    result[:, kept] = solved
    return result


def adapt_readers(
    units: GraphUnits,
    groups: Sequence[WeightGroup],
    gone: Sequence[npt.NDArray[np.bool_]],
    moments: Mapping[str, Floats],
) -> None:
    """Adapts all weights that read units which go."""
    for group, mask in zip(groups, gone, strict=True):
        if not mask.any():
            continue
        for side in group.readers:
            kept = np.ones(len(side.ids), bool)
            for places, no in zip(positions(units, group, side), mask, strict=True):
                kept[places] = not no
            _replace(side, _moments(side, moments), kept)


def _replace(side: Side, moments: Floats, kept: npt.NDArray[np.bool_]) -> None:
    source, axis, old = side.source, side.axis, side.source.const_value
    assert old is not None
    tensor: ir.TensorProtocol = old

    array = np.moveaxis(tensor.numpy(), axis, 1).astype(np.float32)
    made = np.moveaxis(adapted(array, moments, kept), 1, axis).astype(tensor.dtype.numpy())
    source.const_value = spilled(made, tensor.dtype, source.name)


def _moments(side: Side, moments: Mapping[str, Floats]) -> Floats:
    given = side.node.inputs[0]
    assert given is not None
    return moments[given.name or ""]


def _columns(side: Side) -> Floats:
    """The weight as (N, K)."""
    assert side.source.const_value is not None
    array = side.source.const_value.numpy().astype(np.float32, copy=False)
    return np.moveaxis(array, side.axis, 1)


def _damped(moments: Floats) -> Doubles:
    matrix = moments.astype(np.float64)
    mean = float(np.diagonal(matrix).mean()) or 1.0
    return matrix + np.eye(len(matrix)) * (_DAMPING * mean)
