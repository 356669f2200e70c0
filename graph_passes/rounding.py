"""How one weight is rounded, by which algorithm, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.array_threads import in_threads
from onnxsmith.graph_passes.awq import (
    Scaling,
    best_exponent,
    divide_activation,
    divide_rows,
    scale_weight,
)
from onnxsmith.graph_passes.block_operators import BlockFormat, SharedWeight
from onnxsmith.graph_passes.blocks import QuantizedBlocks, dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.context import Activations
from onnxsmith.graph_passes.gptq import Factor, gptq_blocks, inverse_factor, second_moments
from onnxsmith.graph_passes.rounded_ahead import RoundedAhead
from onnxsmith.graph_passes.weights import rows_tensor
from onnxsmith.onnx_file import drop_pages
from onnxsmith.sparse_rounding import output_error
from onnxsmith.stored_rows import known_rows

__all__ = ["NEEDS_DATA", "Choice", "Rounding", "calibrated", "entry_of", "method_for", "relative_error"]

Floats = npt.NDArray[np.float32]

NEEDS_DATA = frozenset({"gptq", "awq"})


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is done with one weight.

    Attributes:
        weight: The weight.
        form: How it is stored.
        method: ``rtn``, ``hqq``, ``gptq`` or ``awq``.
        entry: What is said of it in the manifest; errors are filled in when they are known.
    """

    weight: SharedWeight
    form: BlockFormat
    method: str
    entry: dict[str, Any]


def entry_of(weight: SharedWeight, form: BlockFormat, method: str) -> dict[str, Any]:
    """What the manifest says of a weight."""
    return {
        "shape": list(weight.shape),
        "method": method,
        "bits": form.bits,
        "block_size": form.block_size,
        "zero_points": "float minimum" if form.minimums else "none" if form.symmetric else "integer",
        # Filled in when the weight is rounded, which for most methods is when it is written.
        "weight_error": None,
    }


class Rounding:
    """Rounds one weight when it is written, and then fills in what that cost."""

    def __init__(
        self,
        choice: Choice,
        search_steps: int,
        importance: Floats | None = None,
        ahead: RoundedAhead | None = None,
    ) -> None:
        self._choice, self._steps, self._importance = choice, search_steps, importance
        self._ahead = ahead

    def __call__(self) -> QuantizedBlocks:
        """Reads the weight and rounds it."""
        choice = self._choice
        rows = choice.weight.rows()
        blocks = self._known() or _quantized(rows, choice, self._steps, self._importance)
        choice.entry["weight_error"] = relative_error(rows, blocks)
        drop_pages(choice.weight.tensor)
        return blocks

    def _known(self) -> QuantizedBlocks | None:
        """The blocks, where they were made ahead."""
        weight = self._choice.weight
        straight = rows_tensor(weight.tensor, weight.is_transposed)
        if (
            self._ahead is None or straight is None or self._importance is not None
            or self._choice.method != "rtn" or weight.tensor.dtype != ir.DataType.FLOAT
        ):  # fmt: skip
            return None
        return self._ahead.blocks(known_rows(straight), _settings(self._choice, self._steps))


def calibrated(
    model: ir.Model,
    choices: Sequence[Choice],
    activations: Activations,
    *,
    search_steps: int,
) -> dict[str, QuantizedBlocks | Rounding]:
    """Rounds the weights whose method looks at activations.

    The graph changes where AWQ scales an activation.

    Returns:
        Name of the weight to its blocks, or to what will make them.
    """
    by_activation: dict[str, list[Choice]] = {}
    for choice in choices:
        for value in dict.fromkeys(choice.weight.activations):
            by_activation.setdefault(value.name or "", []).append(choice)
    widths = {name: found[0].weight.shape[1] for name, found in by_activation.items()}
    made: dict[str, QuantizedBlocks | Rounding] = {}
    waiting: dict[str, list[Floats]] = {}
    scalings: list[tuple[list[Choice], Scaling]] = []
    for name, moments in second_moments(model, widths, activations):
        users = by_activation[name]
        alike = [c for c in users if c.method == "awq"]
        if alike:
            scaling, importance = _searched(alike, moments, search_steps)
            scalings.append((alike, scaling))
            made |= {c.weight.name: Rounding(c, search_steps, importance) for c in alike}
        factor: Factor | None = None
        for choice in (c for c in users if c.method == "gptq"):
            sources = len(dict.fromkeys(choice.weight.activations))
            if sources == 1 and not choice.weight.gathers:
                factor = factor or inverse_factor(moments)
                made[choice.weight.name] = _gptq(choice, moments, factor, search_steps)
                continue
            parts = waiting.setdefault(choice.weight.name, [])
            parts.append(moments)
            if len(parts) == sources:
                mean = moments if len(parts) == 1 else np.asarray(np.mean(parts, axis=0), np.float32)
                own = inverse_factor(_with_rows(mean) if choice.weight.gathers else mean)
                made[choice.weight.name] = _gptq(choice, mean, own, search_steps)
                del waiting[choice.weight.name]
    # The graph is changed only after the last run over the data.
    for alike, scaling in scalings:
        _scale(model, alike, scaling)
    return made


def _gptq(choice: Choice, moments: Floats, factor: Factor, search_steps: int) -> QuantizedBlocks:
    form, rows = choice.form, choice.weight.rows()
    blocks = gptq_blocks(
        rows, factor, bits=form.bits, block_size=form.block_size, symmetric=form.symmetric,
        minimums=form.minimums, search_steps=search_steps, scale_type=_scale_type(choice),
        name=choice.weight.name,
    )  # fmt: skip
    choice.entry["weight_error"] = relative_error(rows, blocks)
    choice.entry["output_error"] = output_error(rows, dequantize_blocks(blocks), moments)
    drop_pages(choice.weight.tensor)
    return blocks


def _with_rows(moments: Floats) -> Floats:
    """Moments for a weight whose rows are looked up too: there an error counts as it is."""
    scale = float(np.diagonal(moments).mean()) or 1.0
    return np.asarray(moments / scale + np.eye(len(moments), dtype=np.float32), np.float32)


def _searched(alike: list[Choice], moments: Floats, search_steps: int) -> tuple[Scaling, Floats]:
    """The scaling of one activation for AWQ, and how much each scaled column then counts."""

    def rounded(matrix: Floats) -> Floats:
        return dequantize_blocks(_quantized(matrix, alike[0], min(search_steps, 3), None))

    wanted = _with_rows(moments) if any(c.weight.gathers for c in alike) else moments
    scaling = best_exponent([c.weight.rows() for c in alike], moments, rounded, judged_by=wanted)
    scaled = moments / np.outer(scaling.factors, scaling.factors)
    importance = np.asarray(np.diagonal(wanted) / np.square(scaling.factors), np.float32)
    for choice in alike:
        rows = choice.weight.rows() * scaling.factors
        blocks = _quantized(rows, choice, search_steps, importance)
        choice.entry["output_error"] = output_error(rows, dequantize_blocks(blocks), scaled)
    return scaling, importance


def _scale(model: ir.Model, alike: list[Choice], scaling: Scaling) -> None:
    how = "none needed"
    if scaling.exponent:
        activation = alike[0].weight.activations[0]
        nodes = [user.node for c in alike for user in c.weight.users if not isinstance(user, ir.Node)]
        how = divide_activation(model, activation, nodes, scaling.factors)
        for choice in alike:
            scale_weight(model, choice.weight, scaling.factors)
            for gather in (user for user in choice.weight.users if isinstance(user, ir.Node)):
                divide_rows(model, gather, scaling.factors)
    for choice in alike:
        choice.entry.update(exponent=scaling.exponent, scaling=how)


def _quantized(rows: Floats, choice: Choice, search_steps: int, importance: Floats | None) -> QuantizedBlocks:
    return quantize_blocks(
        rows,
        **_settings(choice, search_steps),
        importance=importance,
        name=choice.weight.name,
        method="hqq" if choice.method == "hqq" else "rtn",
    )


def _settings(choice: Choice, search_steps: int) -> dict[str, Any]:
    """Of ``quantize_blocks``."""
    form = choice.form
    return {
        "bits": form.bits,
        "block_size": form.block_size,
        "symmetric": form.symmetric,
        "minimums": form.minimums,
        "search_steps": search_steps,
        "scale_type": np.dtype(_scale_type(choice)).name,
    }


def _scale_type(choice: Choice) -> npt.DTypeLike:
    return np.float16 if choice.form.half_scales else choice.weight.tensor.dtype.numpy()


def relative_error(rows: Floats, blocks: QuantizedBlocks) -> float:
    """The squared error of a weight, relative to its square; looked at some rows at a time."""
    step = max(1, (1 << 17) // max(1, rows.shape[1]))

    def squares(begin: int) -> tuple[float, float]:
        part = rows[begin : begin + step]
        difference = (dequantize_blocks(blocks.rows(begin, begin + step)) - part).ravel()
        return float(np.dot(difference, difference)), float(np.dot(part.ravel(), part.ravel()))

    error = square = 0.0
    # In order, so that the sums are the same with any number of threads.
    for lost, whole in in_threads(squares, range(0, len(rows), step)):
        error += lost
        square += whole
    return error / square if square else 0.0


def method_for(weight: SharedWeight, method: str) -> tuple[str, str]:
    """The method that a weight gets, and why it is another one than was asked for."""
    if method not in NEEDS_DATA:
        return method, ""
    if not weight.activations:
        return "rtn", f"{method} needs activations, and an embedding has none"
    if method == "awq" and len(dict.fromkeys(weight.activations)) > 1:
        return "rtn", "awq cannot scale two activations for one weight"
    if method == "awq" and weight.read_elsewhere:
        return "rtn", "awq cannot scale a weight that stays in float elsewhere"
    return method, ""
