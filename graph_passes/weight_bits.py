"""Which weight has how many bits: the precision of a graph, weight by weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from onnxsmith.own_operators import PACKED_OPERATORS, WEIGHT_INPUT

__all__ = ["weight_bits"]

_BLOCKS = frozenset({"MatMulNBits", "GatherBlockQuantized"})
# A weight has at least so many values; what is smaller is a bias, a norm or a constant.
_LEAST = 256


def weight_bits(model: ir.Model) -> list[dict[str, Any]]:
    """The weights of the main graph in the order in which they are used.

    Returns:
        For each ``name``, ``operator`` of its first user, ``bits``, ``values`` (its number of values) and
        ``bytes`` of what is stored for it, scales and zero points of blocks included.
    """
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for node in model.graph:
        for name, bits, values, parts in _weights_of(node):
            fresh = [part for part in parts if id(part) not in seen]
            if not fresh or id(parts[0]) in seen:
                continue
            seen.update(id(part) for part in fresh)
            stored = sum(part.const_value.nbytes for part in fresh if part.const_value is not None)
            found.append(
                {"name": name, "operator": node.op_type, "bits": bits, "values": values, "bytes": stored}
            )
    return found


def _weights_of(node: ir.Node) -> Iterator[tuple[str, int, int, list[ir.Value]]]:
    constants = [value for value in node.inputs if value is not None and value.const_value is not None]
    if node.op_type in PACKED_OPERATORS:
        start = WEIGHT_INPUT[node.op_type]
        parts = [value for value in node.inputs[start : start + 3] if value in constants]
        if parts:
            # Without the rows that fill up a tile.
            values = node.attributes["N"].as_int() * node.attributes["K"].as_int()
            yield parts[0].name or node.name or "?", node.attributes["bits"].as_int(), values, parts
        constants = [value for value in constants if value not in parts]
    if node.op_type in _BLOCKS and constants:
        bits = node.attributes.get("bits")
        width = bits.as_int() if bits is not None else 4
        first = next((value for value in constants if _size(value) >= _LEAST), constants[0])
        dtype = first.const_value.dtype if first.const_value is not None else None
        packed = dtype in (ir.DataType.UINT8, ir.DataType.INT8)
        values = _size(first) * 8 // width if packed else _size(first)
        rest = [value for value in constants if value is not first]
        yield first.name or node.name or "?", width, values, [first, *rest]
        return
    for value in constants:
        tensor = value.const_value
        if tensor is None or _size(value) < _LEAST:
            continue
        yield value.name or node.name or "?", int(tensor.dtype.itemsize * 8), _size(value), [value]


def _size(value: ir.Value) -> int:
    return int(value.const_value.size) if value.const_value is not None else 0
