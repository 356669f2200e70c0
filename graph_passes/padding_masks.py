"""Biases of attention's scores that are the same for all queries and heads: one number for each key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxsmith.graph_passes.integer_operators import GraphWriter
from onnxsmith.graph_passes.matching import axes_of
from onnxsmith.graph_passes.rewriting import NoMatchError
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["KeyBiases", "has_keys"]

_FLOAT = ir.DataType.FLOAT
# Each number of what they make follows from the numbers at the same place of what they read.
_ELEMENTWISE = frozenset(
    {
        "Add",
        "And",
        "Cast",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Sub",
        "Where",
    }
)
# What ONNX Runtime adds where a mask of padding is 0.
_FILTER = -10000.0


def has_keys(value: ir.Value) -> bool:
    """Whether a bias of scores has a number for each key, and not one for all.

    Raises:
        NoMatchError: It may have more: it is not known to be the same for all queries and heads.
    """
    tensor, node = constant_of(value), value.producer()
    if tensor is not None and tensor.size == 1:
        return False
    if _is_of_keys(value):
        return True
    if node is not None and node.domain in ("", "ai.onnx") and None not in node.inputs:
        operands = _operands(node)
        if node.op_type == "Expand":
            return has_keys(operands[0])
        if node.op_type in _ELEMENTWISE:
            return any([has_keys(one) for one in operands])
    raise NoMatchError(f"its mask holds {value.name!r}, which may differ between queries or heads")


def _is_of_keys(value: ir.Value) -> bool:
    """Whether the axes are (batch or 1, 1 for all heads, 1 for all queries, keys)."""
    axes = axes_of(value)
    return axes is not None and len(axes) == 4 and axes[1:3] == (1, 1)


def _operands(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


class KeyBiases:
    """Writes such biases, each once."""

    def __init__(self, writer: GraphWriter) -> None:
        """Begins with a graph.

        Args:
            writer: Of the graph.
        """
        self._writer = writer
        self._narrowed: dict[ir.Value, ir.Value] = {}
        self._of_padding: dict[tuple[ir.Value, float], ir.Value] = {}

    def of_padding(self, node: ir.Node, padding: ir.Value) -> ir.Value:
        """(batch, 1, 1, keys) from a mask of padding (batch, keys) that is 0 where a key is hidden.

        Args:
            node: The attention, before which it is put.
            padding: Its mask.
        """
        given = node.attributes.get("mask_filter_value")
        hidden = _FILTER if given is None else given.as_float()
        if (padding, hidden) not in self._of_padding:
            writer, name = self._writer, padding.name or "padding"
            (shown,) = writer.add(
                node,
                "Cast",
                [padding],
                f"{name}_shown",
                (ir.DataType.BOOL,),
                attributes={"to": ir.DataType.BOOL},
            )
            numbers = [
                writer.constant(np.array(number, np.float32), what)
                for number, what in ((0, "shown"), (hidden, "hidden"))
            ]
            (bias,) = writer.add(node, "Where", [shown, *numbers], f"{name}_bias")
            axes = writer.constant(np.array([1, 2], np.int64), "heads_and_queries")
            (made,) = writer.add(node, "Unsqueeze", [bias, axes], f"{name}_of_heads")
            known = list(axes_of(padding) or ())
            shown.shape, bias.shape, made.shape = (
                padding.shape,
                padding.shape,
                ir.Shape([known[0], 1, 1, known[1]]),
            )
            self._of_padding[padding, hidden] = made
        return self._of_padding[padding, hidden]

    def narrow(self, value: ir.Value) -> ir.Value:
        """The same bias for one query and one head; what ``has_keys`` accepted."""
        if value in self._narrowed or constant_of(value) is not None or _is_of_keys(value):
            return self._narrowed.get(value, value)
        node = value.producer()
        assert node is not None
        operands = [self.narrow(one) for one in _operands(node)[: 1 if node.op_type == "Expand" else None]]
        if node.op_type == "Expand":
            made = operands[0]
        else:
            attributes = {key: attribute.value for key, attribute in node.attributes.items()}
            (made,) = self._writer.add(
                node, node.op_type, operands, f"{value.name}_of_keys", (value.dtype or _FLOAT,),
                attributes=attributes, domain=node.domain,
            )  # fmt: skip
            shapes = [axes_of(one) for one in operands]
            if None not in shapes:
                made.shape = ir.Shape(_broadcast([axes for axes in shapes if axes is not None]))
        self._narrowed[value] = made
        return made


def _broadcast(shapes: Sequence[Sequence[int | str | None]]) -> list[int | str | None]:
    """What shapes become together, where none is wrong: of an axis, the size that is not 1."""
    rank = max(map(len, shapes))
    wide: list[list[int | str | None]] = [[*[1] * (rank - len(axes)), *axes] for axes in shapes]
    return [next((size for size in sizes if size != 1), 1) for sizes in zip(*wide, strict=True)]
