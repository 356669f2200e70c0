"""Whether a node's weights, after whatever was done to them, are still those of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.own_operators import PACKED_OPERATORS, WEIGHT_INPUT, rounds_weights
from onnxsmith.packed_tiles import packed_rows, untile_values
from onnxsmith.runtime.integer_weights import integer_weights
from onnxsmith.runtime.session import Array

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["audit_weights"]

# A weight is wrong where it is off by more than this share of the largest of its block: rounding is off by
# at most half a step, and a scale that was searched for may cut the largest off by some more.
_MAX_ROUNDING: Mapping[int, float] = {2: 0.9, 4: 0.5, 8: 0.1}
_MAX_FLOAT = 0.02
# Factors of channels that differ by less are one factor, which no pass puts into weights.
_SAME_FACTOR = 0.05
# Of what the graph computes from constants: casts, what is looked up in a table, a product and a sum.
_MAX_DEPTH = 8
# Rows that are unpacked at a time.
_ROWS = 2048


def audit_weights(node: ir.Node, weight: Callable[[str], Array | None]) -> str:
    """Says which weight of a node is wrong.

    Args:
        node: A product or lookup with a weight in blocks, or any node with a floating-point weight or one of
            integers with a scale; see ``integer_weights``.
        weight: Gives the reference's weight for the name of one of the candidate's; None where it has none.

    Returns:
        A sentence; empty where nothing is wrong, or where there is nothing to compare with.
    """
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized") or rounds_weights(node):
        return _audit_blocks(node, weight)
    if node.op_type in PACKED_OPERATORS:
        tiles = _stored(node.inputs[WEIGHT_INPUT[node.op_type]])
        expected = None if tiles is None or not tiles.name else weight(tiles.name)
        if tiles is not None and tiles.name and tiles.const_value is not None and expected is not None:
            matrix = untile_values(tiles.const_value.numpy(), _integer(node, "N", 0))
            return _audit_floats(tiles.name, matrix, expected)
    for value in node.inputs:
        if value is None or not value.is_initializer() or value.const_value is None or not value.name:
            continue
        if value.dtype is None or not value.dtype.is_floating_point():
            continue
        found = _audit_floats(value.name, np.asarray(value.const_value.numpy()), weight(value.name))
        if found:
            return found
    for stored in integer_weights(node, _computed):
        found = _audit_values(
            stored.name, stored.values, weight(stored.name), _MAX_ROUNDING[stored.bits], stored.axis
        )
        if found:
            return found
    return ""


def _audit_floats(name: str, got: Array, expected: Array | None) -> str:
    return _audit_values(name, got, expected, _MAX_FLOAT, None)


def _audit_values(name: str, got: Array, expected: Array | None, share: float, axis: int | None) -> str:
    """What is off by more than a share of the largest value, or of the largest at its place on an axis."""
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
    others = None if axis is None else tuple(n for n in range(got.ndim) if n != axis)
    bound = share * np.abs(expected).max(axis=others, keepdims=True, initial=0.0)
    beyond = difference > bound
    wrong = int(np.count_nonzero(beyond))
    if not wrong or any(_is_rescaled(got, expected, one, share) for one in range(got.ndim)):
        return ""
    worst = np.where(beyond, difference / np.maximum(bound, 1e-12), 0.0)
    at = tuple(int(i) for i in np.unravel_index(int(worst.argmax()), worst.shape))
    return _sentence(name, wrong, at, float(got[at]), float(expected[at]))


def _is_rescaled(got: Array, expected: Array, axis: int, share: float) -> bool:
    """Whether a weight is the reference's with a factor of its own for each place on an axis.

    That is what moves range from activations to weights (SmoothQuant; Xiao et al., 2023, section 4): what is
    before the node is divided by the factors. One place that is off by a factor, or all by the same, is a
    fault.
    """
    others = tuple(n for n in range(got.ndim) if n != axis)
    if got.ndim != 2 or got.shape[axis] < 3:
        return False
    one, two = got.astype(np.float64), expected.astype(np.float64)
    factors = (one * two).sum(axis=others) / np.maximum((two * two).sum(axis=others), 1e-30)
    if np.any(factors <= 0):
        return False
    usual = np.median(factors)
    if np.count_nonzero(np.abs(factors / usual - 1) > _SAME_FACTOR) < max(2, len(factors) // 4):
        return False
    shaped = np.expand_dims(factors, others)
    bound = share * np.abs(shaped * two).max(axis=others, keepdims=True)
    return bool(np.all(np.abs(one - shaped * two) <= bound))


def _far(one: Array, two: Array) -> float:
    return float(np.abs(one.astype(np.float32) - two.astype(np.float32)).sum())


def _audit_blocks(node: ir.Node, weight: Callable[[str], Array | None]) -> str:
    packed = _stored(node.inputs[0] if node.op_type == "GatherBlockQuantized" else node.inputs[1])
    if packed is None or not packed.name:
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
    if node.op_type in PACKED_OPERATORS:
        start = WEIGHT_INPUT[node.op_type]
        tiles, steps, offsets = (_computed(value) for value in [*node.inputs, None][start : start + 3])
        if tiles is not None and steps is not None:
            yield from packed_rows(tiles, steps, offsets, bits=bits, rows=_integer(node, "N", 0))
        return
    matmul = node.op_type == "MatMulNBits"
    inputs = [*node.inputs, None, None]
    stored = _stored(inputs[1] if matmul else inputs[0])
    scales, zero_points = _computed(inputs[2]), _computed(inputs[3])
    if stored is None or stored.const_value is None or scales is None:
        return
    if zero_points is None and inputs[3] is not None:
        return
    block = _integer(node, "block_size", 32 if matmul else 128)
    data: Any = stored.const_value.numpy()
    if data.dtype != np.uint8:
        return
    rows = data.shape[0]
    data = data.reshape(rows, -1)
    scale = scales.reshape(rows, -1)
    points: Any = None if zero_points is None else zero_points.reshape(rows, -1)
    blocks = scale.shape[1]
    added = _added_to_blocks(node, (rows, blocks))
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
        weights = (integers - offset) * steps
        weights = _without_sums(node, weights, bits, block)
        if added is not None:
            weights += np.repeat(added[part].astype(np.float32), block, axis=1)[:, :width]
        yield start, weights


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, seen in another shape where it is a Reshape of one."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    return value if value is not None and value.is_initializer() and value.const_value is not None else None


def _computed(value: ir.Value | None, depth: int = 0) -> Array | None:
    """The array that a value always is, also where the graph computes it from constants; or None."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or depth > _MAX_DEPTH or node.domain not in ("", "ai.onnx"):
        return None
    parts = [_computed(one, depth + 1) for one in node.inputs]
    known = [part for part in parts if part is not None]
    if not parts or len(known) != len(parts):
        return None
    if node.op_type == "Cast" and value.dtype is not None:
        return known[0].astype(value.dtype.numpy())
    if node.op_type == "Constant" or len(known) != 2:
        return None
    if node.op_type == "Gather":
        return np.take(known[0], known[1], axis=_integer(node, "axis", 0))
    if node.op_type == "Reshape":
        return known[0].reshape(known[1])
    if node.op_type == "Add":
        return np.asarray(known[0] + known[1])
    return np.asarray(known[0] * known[1]) if node.op_type == "Mul" else None


def _added_to_blocks(node: ir.Node, shape: tuple[int, int]) -> Array | None:
    """What is added to each weight of a block where the graph multiplies blocks and offsets apart.

    ``MatMulNBits(x) + block_sums(x) @ offsets.T``, or for rows that are looked up,
    ``GatherBlockQuantized(i) + Gather(offsets, i) @ spread``. A block of sums may be several of the product.
    """
    for user, _ in node.outputs[0].uses():
        if user.op_type != "Add":
            continue
        others = [value for value in user.inputs if value is not None and value is not node.outputs[0]]
        product = others[0].producer() if others else None
        if product is None or product.op_type not in ("MatMul", "FusedMatMul"):
            continue
        if node.op_type == "GatherBlockQuantized":
            rows = product.inputs[0].producer() if product.inputs[0] is not None else None
            found = _computed(rows.inputs[0]) if rows is not None and rows.op_type == "Gather" else None
        else:
            found = _computed(_before_columns(product.inputs[1]))
        if found is not None and found.ndim == 2:
            for offsets in (found, found.T):
                times = shape[1] // max(1, offsets.shape[1])
                if (len(offsets), offsets.shape[1] * times) == shape:
                    return np.repeat(offsets, times, axis=1)
            return None
    return None


def _before_columns(value: ir.Value | None) -> ir.Value | None:
    """Offsets of blocks alone, where columns that ``float_columns`` adds stand behind them."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == "Concat" else value


def _without_sums(node: ir.Node, weights: Array, bits: int, block: int) -> Array:
    """The weights of x, where a product has block sums of x behind x: one for each digit of eight bits.

    ``MatMulNBits([x, sums, sums / 16], w)``, as ``fold_minimums`` writes it: what a sum is multiplied with is
    added to each weight of its block.
    """
    longer = (
        node.inputs[0].producer() if node.op_type == "MatMulNBits" and node.inputs[0] is not None else None
    )
    if longer is None or longer.op_type != "Concat":
        return weights
    whole, digits = _integer(node, "K", 0), 8 // bits
    columns = _columns(longer)
    # Blocks of the product may be smaller than those of the sums, by a power of two.
    for block in (block << more for more in range(8)):
        blocks = whole // (block + digits)
        if blocks * (block + digits) == whole and columns in (0, blocks * block):
            break
    else:
        return weights
    own = weights[:, : blocks * block]
    sums = weights[:, blocks * block : whole].reshape(len(weights), digits, blocks)
    factors = np.float32(1 << bits) ** -np.arange(digits, dtype=np.float32)
    whole_rows: Array = own + np.repeat((sums * factors[:, None]).sum(axis=1), block, axis=1)
    return whole_rows


def _columns(longer: ir.Node) -> int:
    """The width of what stands first in a Concat, as products with sums behind it have it; 0 if unknown."""
    for value in longer.inputs[1:]:
        sums = value.producer() if value is not None else None
        if sums is not None and sums.op_type == "MatMulNBits":
            return _integer(sums, "K", 0)
    first = longer.inputs[0]
    width = first.shape[-1] if first is not None and first.shape is not None else None
    return width if isinstance(width, int) else 0


def _levels(packed: Array, bits: int) -> Array:
    """The integers in bytes, the lowest bits first, as float32."""
    if bits == 8:
        return packed.astype(np.float32)
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(packed), -1).astype(np.float32)
