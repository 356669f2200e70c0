"""Columns of activations and of weights brought to the same spread, before both are rounded in blocks.

With int8 arithmetic MatMulNBits rounds activations too, in the blocks of the weight, and a column that is
large beside the others of its block leaves these few steps. SmoothQuant (Xiao et al., 2022,
https://arxiv.org/abs/2211.10438) divides such columns and multiplies the weights' by the same factor; here
the factor is a power of ``rms(activation) / rms(weight)``: with 1/2, which is what most activations get, the
column is as large in both. Only where a normalisation makes the activation: its gain takes the division, so
that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.awq import can_fold, divide_activation, divide_rows, scale_weight
from onnxsmith.graph_passes.block_operators import SharedWeight
from onnxsmith.graph_passes.context import Activations
from onnxsmith.onnx_file import drop_pages

__all__ = ["BALANCE_SAMPLES", "balance_columns"]

Floats = npt.NDArray[np.float32]

BALANCE_SAMPLES = 8
"""Samples that columns are measured on: their spread hardly depends on the text."""

_EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5)
# What an error of a row that is looked up counts beside one of a product with it: layers follow that add to
# the row, while a head's product is a logit at once.
_SHARE_OF_ROWS = 0.25
_SMALLEST = np.float32(1e-12)


def balance_columns(
    model: ir.Model,
    weights: Sequence[SharedWeight],
    activations: Activations,
    *,
    block_size: int,
    samples: int = BALANCE_SAMPLES,
) -> dict[str, float]:
    """Scales the columns of weights, and the gains of the normalisations before them.

    The rows of a weight that is an embedding too are scaled back where they are looked up.

    Args:
        model: Changed in place; its outputs stay the same but for rounding.
        weights: Those that will be rounded.
        activations: Runs the model.
        block_size: Columns that share a scale.
        samples: How many batches are looked at.

    Returns:
        Names of the weights that were scaled, and the exponents of their factors.
    """
    readers: dict[str, list[SharedWeight]] = {}
    values: dict[str, ir.Value] = {}
    for weight in weights:
        for value in dict.fromkeys(weight.activations):
            readers.setdefault(value.name or "", []).append(weight)
            values[value.name or ""] = value
    alike = {
        name: found
        for name, found in readers.items()
        if all(len(dict.fromkeys(w.activations)) == 1 and not w.read_elsewhere for w in found)
        and can_fold(values[name], _nodes(found))
    }
    if not alike:
        return {}
    widths = {name: found[0].shape[1] for name, found in alike.items()}
    squares = _mean_squares(model, widths, activations, samples)
    scaled: dict[str, float] = {}
    for name, found in alike.items():
        looked_up = any(weight.gathers for weight in found)
        exponent, factors = _factors(squares[name], _squares_of(found), block_size, looked_up=looked_up)
        if not exponent:
            continue
        divide_activation(model, values[name], _nodes(found), factors)
        for weight in found:
            scale_weight(model, weight, factors)
            for gather in (user for user in weight.users if isinstance(user, ir.Node)):
                divide_rows(model, gather, factors)
            scaled[weight.name] = exponent
    return scaled


def _nodes(weights: Sequence[SharedWeight]) -> list[ir.Node]:
    return [user.node for weight in weights for user in weight.users if not isinstance(user, ir.Node)]


def _factors(inputs: Floats, columns: Floats, block_size: int, *, looked_up: bool) -> tuple[float, Floats]:
    """The exponent with the smallest error of the outputs, and the factors, (K,).

    A rounding error is as large as the largest column of its block; it is estimated from mean squares.

    Args:
        inputs: (K,): mean squares of the activation.
        columns: (K,): those of the weights.
        block_size: Columns that share a scale.
        looked_up: Whether rows of the weight are looked up, too, where each column counts as it is.
    """
    ratio = np.sqrt(inputs / columns)
    best, smallest = (0.0, np.ones_like(ratio)), np.inf
    for exponent in _EXPONENTS:
        factors = np.power(ratio, np.float32(exponent))
        # Around one, so that no column leaves the range of the others.
        factors /= np.exp(np.log(factors).mean())
        factors = np.clip(factors, np.float32(1e-2), np.float32(1e2))
        squares = np.square(factors)
        divided, multiplied = inputs / squares, columns * squares
        error = _error(divided, multiplied, block_size) + _error(multiplied, divided, block_size)
        error /= float(np.dot(inputs, columns))
        if looked_up:
            error += _SHARE_OF_ROWS * _error(multiplied, 1 / squares, block_size) / float(columns.sum())
        if error < smallest * 0.999:
            smallest, best = error, (exponent, factors)
    return best


def _error(rounded: Floats, other: Floats, block_size: int) -> float:
    """Of products with a rounded side: each block's largest mean square, times all of the other side."""
    starts = np.arange(0, len(rounded), block_size)
    return float(np.dot(np.maximum.reduceat(rounded, starts), np.add.reduceat(other, starts)))


def _squares_of(weights: Sequence[SharedWeight]) -> Floats:
    """The mean square of each column, (K,), over the rows of all weights."""
    total, rows = np.zeros(weights[0].shape[1], np.float32), 0
    for weight in weights:
        matrix = weight.rows()
        total += np.einsum("ij,ij->j", matrix, matrix)
        rows += len(matrix)
        drop_pages(weight.tensor)
    return np.asarray(np.maximum(total / np.float32(rows), _SMALLEST), np.float32)


def _mean_squares(
    model: ir.Model, widths: dict[str, int], activations: Activations, samples: int
) -> dict[str, Floats]:
    """Those of each column, (K,), over the rows of some samples; one batch is held at a time."""
    sums = {name: np.zeros(width, np.float32) for name, width in widths.items()}
    counts = dict.fromkeys(widths, 0)
    for number, batch in enumerate(activations(model, list(widths))):
        for name, width in widths.items():
            x = np.asarray(batch[name], np.float32).reshape(-1, width)
            sums[name] += np.einsum("ij,ij->j", x, x)
            counts[name] += len(x)
        if number + 1 == samples:
            break
    return {name: np.maximum(t / np.float32(max(counts[name], 1)), _SMALLEST) for name, t in sums.items()}
