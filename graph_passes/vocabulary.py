"""Rows of an embedding that the data never uses are left out; token ids stay what they are."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.context import context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.matching import int_attribute, is_operator
from onnxsmith.graph_passes.spilled_weights import spilled
from onnxsmith.graph_passes.weights import constant_of
from onnxsmith.vocabulary_rows import compact_rows

__all__ = ["PruneVocabulary"]


class PruneVocabulary(GraphPass):
    """Keeps the rows of an embedding that calibration data uses, behind a table from ids to rows.

    The tokenizer and the graph's inputs stay as they are. A token that has no row of its own any more gets
    the mean of those that went. An embedding that is the output head too is refused: its logits need every
    row.
    """

    name: ClassVar[str] = "prune_vocabulary"
    summary: ClassVar[str] = "leave out rows of an embedding that calibration data never uses; ids stay"

    def __init__(self, *, input: str = "input_ids", keep: tuple[int, ...] = ()) -> None:
        """Sets what stays.

        Args:
            input: The input with the token ids.
            keep: Ids that keep their row though the data has none of them.
        """
        self.input = input
        self.keep = tuple(keep)

    def apply(self, model: ir.Model) -> Changes:
        """Leaves rows out.

        Raises:
            PreconditionError: No such embedding, or data is missing.
        """
        changes = Changes()
        tables: list[ir.Node] = []
        for node in model.graph:
            reason = self._reason(node)
            if reason:
                changes.skipped[node.inputs[0].name or "?"] = reason  # type: ignore[union-attr]
            elif reason is not None:
                tables.append(node)
        if not tables:
            if any("ids have rows" in reason for reason in changes.skipped.values()):
                return changes
            shown = "; ".join(f"{name}: {why}" for name, why in changes.skipped.items())
            raise PreconditionError(
                f"pass {self.name}",
                got=f"no embedding of {self.input!r} whose rows can go" + (f" ({shown})" if shown else ""),
                expected="a Gather of a float table that nothing else reads",
            )
        activations = context_of(model).activations
        if activations is None:
            raise PreconditionError(
                f"pass {self.name}",
                got="no calibration data",
                expected="data whose tokens stay",
                remedy="Give --calibration-data, or the key calibration of the recipe",
            )
        seen: set[int] = set(self.keep)
        # The embedding is asked for too, because a model without an output cannot run.
        for batch in activations(model, [self.input, tables[0].outputs[0].name or ""]):
            seen.update(np.unique(batch[self.input]).tolist())
        for node in tables:
            rows = self._shrink(model, node, seen)
            changes.details[node.inputs[0].name or "table"] = rows  # type: ignore[union-attr]
            changes.count += rows["rows_before"] - rows["rows_left"]
        changes.details["calibration"] = dict(context_of(model).calibration)
        return changes

    def _reason(self, node: ir.Node) -> str | None:
        """Why an embedding keeps its rows; empty where it need not, None where it is none of the input."""
        if not is_operator(node, "Gather") or int_attribute(node, "axis"):
            return None
        table, index = node.inputs
        tensor = constant_of(table)
        if table is None or index is None or tensor is None or len(tensor.shape) != 2:
            return None
        if not tensor.dtype.is_floating_point():
            return None
        producer = index.producer()
        if producer is not None and is_operator(producer, "Gather") and producer.inputs[1] is not None:
            is_mapped = producer.inputs[1].name == self.input and constant_of(producer.inputs[0]) is not None
            return "its ids have rows of their own already" if is_mapped else None
        if index.name != self.input or not index.is_graph_input():
            return None
        if len(table.uses()) != 1 or table.is_graph_output():
            return "something else reads it, such as the output head, whose logits need every row"
        return ""

    def _shrink(self, model: ir.Model, node: ir.Node, seen: set[int]) -> dict[str, int]:
        table = node.inputs[0]
        tensor = constant_of(table)
        assert table is not None and tensor is not None
        array = tensor.numpy()
        found = compact_rows(array, seen)
        if found is None:
            return {"rows_before": len(array), "rows_left": len(array)}
        left, places = found
        graph, name = model.graph, table.name or "table"
        graph.initializers.pop(name, None)
        # Renamed without its tensor, which other models may share.
        table.const_value = None
        table.name = f"{name}_whole"
        rows = _constant(graph, left, tensor.dtype, name)
        where = _constant(graph, places, ir.DataType.INT32, f"{name}_row_of_id")
        lookup = ir.node("Gather", [where, node.inputs[1]], {"axis": 0}, name=f"{name}_rows")
        graph.insert_before(node, lookup)
        index = node.inputs[1]
        lookup.outputs[0].type = ir.TensorType(ir.DataType.INT32)
        lookup.outputs[0].shape = None if index is None else index.shape
        node.replace_input_with(0, rows)
        node.replace_input_with(1, lookup.outputs[0])
        return {"rows_before": len(array), "rows_left": len(left)}


def _constant(graph: ir.Graph, array: npt.NDArray[np.generic], dtype: ir.DataType, name: str) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(list(array.shape)), type=ir.TensorType(dtype))
    value.const_value = spilled(array, dtype, name)
    graph.register_initializer(value)
    return value
