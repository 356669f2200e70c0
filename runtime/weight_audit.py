"""Whether a node's weights, after whatever was done to them, are still those of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.runtime.session import Array

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["audit_weights"]

# A weight is wrong where it is off by more than this share of the largest of its block: rounding is off by
# at most half a step, and a scale that was searched for may cut the largest off by some more.
_MAX_ROUNDING: Mapping[int, float] = {2: 0.9, 4: 0.5, 8: 0.1}
_MAX_FLOAT = 0.02
# Rows that are unpacked at a time.
_ROWS = 2048


def audit_weights(node: ir.Node, weight: Callable[[str], Array | None]) -> str:
    """Says which weight of a node is wrong.

    Args:
        node: MatMulNBits or GatherBlockQuantized, or any node with a floating-point weight.
        weight: Gives the reference's weight for the name of one of the candidate's; None where it has none.

    Returns:
        A sentence; empty where nothing is wrong, or where there is nothing to compare with.
    """
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return _audit_blocks(node, weight)
    for value in node.inputs:
        if value is None or not value.is_initializer() or value.const_value is None or not value.name:
            continue
        if value.dtype is None or not value.dtype.is_floating_point():
            continue
        found = _audit_floats(value.name, np.asarray(value.const_value.numpy()), weight(value.name))
        if found:
            return found
    return ""


def _audit_floats(name: str, got: Array, expected: Array | None) -> str:
    if expected is None:
        return ""
    if got.shape != expected.shape:
        if got.ndim == 2 and got.T.shape == expected.shape:
            expected = expected.T
        else:
            return ""
    elif got.ndim == 2 and got.shape[0] == got.shape[1] and _far(got, expected) > _far(got, expected.T):
        # A square matrix may be turned.
        expected = expected.T
    difference = np.abs(got.astype(np.float32) - expected.astype(np.float32))
    largest = float(np.abs(expected).max(initial=0.0))
    if not difference.size or not float(difference.max()) > _MAX_FLOAT * largest:
        return ""
    at = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    wrong = int(np.count_nonzero(difference > _MAX_FLOAT * largest))
    return _sentence(name, wrong, at, float(got[at]), float(expected[at]))


def _far(one: Array, two: Array) -> float:
    return float(np.abs(one.astype(np.float32) - two.astype(np.float32)).sum())


def _audit_blocks(node: ir.Node, weight: Callable[[str], Array | None]) -> str:
    packed = node.inputs[1] if node.op_type == "MatMulNBits" else node.inputs[0]
    if packed is None or not packed.name or packed.const_value is None:
        return ""
    expected = weight(packed.name)
    if expected is None or expected.ndim != 2:
        return ""
    found = [text for turned in (expected, expected.T) for text in [_wrong_blocks(node, packed.name, turned)]]
    # Stored one way or the other: the right way is the one in which less is wrong.
    fitting = [result for result in found if result is not None]
    return min(fitting, default=(0, ""))[1]


def _wrong_blocks(node: ir.Node, name: str, expected: Array) -> tuple[int, str] | None:
    """How many weights are wrong, and what to say of them; None where the shapes do not fit."""
    bits, block = _integer(node, "bits", 4), _integer(node, "block_size", 32)
    wrong, worst = 0, (0.0, (0, 0), 0.0, 0.0)
    for start, got in _unpacked(node, bits):
        rows = np.asarray(expected[start : start + len(got)], np.float32)
        width = rows.shape[1]
        if len(rows) != len(got) or not 0 <= got.shape[1] - width < block:
            return None
        difference = np.abs(got[:, :width] - rows)
        bound = _MAX_ROUNDING.get(bits, 0.5) * _largest_of_blocks(rows, block)
        beyond = difference > bound
        wrong += int(np.count_nonzero(beyond))
        ratio = np.where(beyond, difference / np.maximum(bound, 1e-12), 0.0)
        at = np.unravel_index(int(ratio.argmax()), ratio.shape)
        if ratio[at] > worst[0]:
            place = (start + int(at[0]), int(at[1]))
            worst = (float(ratio[at]), place, float(got[at]), float(rows[at]))
    if not wrong:
        return 0, ""
    _, place, got_value, right = worst
    text = _sentence(name, wrong, place, got_value, right)
    return wrong, f"{text} (block {place[1] // block} of row {place[0]})"


def _sentence(name: str, wrong: int, at: tuple[int, ...], got: float, expected: float) -> str:
    count = "1 value" if wrong == 1 else f"{wrong} values"
    return f"{count} of {name} wrong: at {list(at)} it is {got:.4g}, expected about {expected:.4g}"


def _largest_of_blocks(rows: Array, block: int) -> Array:
    count = -(-rows.shape[1] // block)
    padded = np.zeros((len(rows), count * block), np.float32)
    padded[:, : rows.shape[1]] = np.abs(rows)
    largest = padded.reshape(len(rows), count, block).max(axis=2)
    return np.repeat(largest, block, axis=1)[:, : rows.shape[1]]


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _unpacked(node: ir.Node, bits: int) -> Iterator[tuple[int, Array]]:
    """The weights of some rows at a time, as (rows, blocks * block size)."""
    matmul = node.op_type == "MatMulNBits"
    tensors = [None if v is None or v.const_value is None else v.const_value for v in node.inputs]
    if matmul:
        packed, scales = tensors[1], tensors[2]
        zero_points = tensors[3] if len(tensors) > 3 else None
    else:
        packed, scales = tensors[0], tensors[2]
        zero_points = tensors[3] if len(tensors) > 3 else None
    if packed is None or scales is None:
        return
    block = _integer(node, "block_size", 32 if matmul else 128)
    data: Any = packed.numpy()
    if data.dtype != np.uint8:
        return
    rows = data.shape[0]
    data = data.reshape(rows, -1)
    scale = np.asarray(scales.numpy()).reshape(rows, -1)
    points: Any = None if zero_points is None else np.asarray(zero_points.numpy()).reshape(rows, -1)
    blocks = scale.shape[1]
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        integers = _levels(data[part], bits)[:, : blocks * block]
        if points is None:
            offset: Any = np.float32(1 << (bits - 1))
        elif points.dtype == np.uint8:
            offset = np.repeat(_levels(points[part], bits)[:, :blocks], block, axis=1)
        else:
            offset = np.repeat(points[part].astype(np.float32), block, axis=1)
        width = integers.shape[1]
        offset = offset if np.ndim(offset) == 0 else offset[:, :width]
        steps = np.repeat(scale[part].astype(np.float32), block, axis=1)[:, :width]
        yield start, (integers - offset) * steps


def _levels(packed: Array, bits: int) -> Array:
    """The integers in bytes, the lowest bits first, as float32."""
    if bits == 8:
        return packed.astype(np.float32)
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(packed), -1).astype(np.float32)
