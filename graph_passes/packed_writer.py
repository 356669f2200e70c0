"""The nodes of this project's kernels, put in the place of what they compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.block_nodes import BlockTarget, add_node, lazy, unused
from onnxsmith.graph_passes.contract import Changes
from onnxsmith.graph_passes.float_weights import FloatWeight
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.names import value_names
from onnxsmith.graph_passes.packed_functions import settle
from onnxsmith.graph_passes.packed_joins import (
    Activated,
    Gate,
    Joined,
    find_activated,
    find_gates,
    find_joined,
)
from onnxsmith.graph_passes.packed_products import Lookup, PackedWeight, Product, Uses
from onnxsmith.graph_passes.packed_weights import BlockWeight, TiledWeight
from onnxsmith.graph_passes.weights import common_name, constant_of
from onnxsmith.own_operators import OWN_DOMAIN

__all__ = ["write_uses"]

_INT8 = 4
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def write_uses(model: ir.Model, uses: Uses, attributes: Mapping[str, Any]) -> Changes:
    """Replaces products and lookups, each with its bias, and with what of its surroundings a kernel computes.

    Args:
        model: Changed in place.
        uses: What is replaced; something.
        attributes: Of every product.

    Returns:
        How many, what of them, and what was left apart and why.
    """
    gates, skipped = find_gates(uses)
    joined, more = find_joined(model, uses, gates)
    activated = find_activated(uses, gates)
    writer = _Writer(model, uses, attributes)
    wholes: list[Gate | Joined] = [*gates, *joined]
    inside = {part.node for whole in wholes for part in whole.parts} | {one.product.node for one in activated}
    formats: Counter[str] = Counter()
    for use in uses.found:
        formats[str(use.weight)] += 1
        if isinstance(use, Lookup):
            writer.lookup(use)
        elif use.node not in inside:
            writer.product(use)
    for gate in gates:
        writer.gate(gate)
    for one in activated:
        writer.activated(one)
    for whole in joined:
        writer.joined(whole)
    settle(model)
    lookups = sum(isinstance(use, Lookup) for use in uses.found)
    details = {
        "needs": "the kernels of onnxsmith, see docs/kernels.md",
        "products": len(uses.found) - lookups,
        "lookups": lookups,
        "gates": len(gates),
        "activations": len(activated),
        "joined": len(joined),
        "formats": dict(sorted(formats.items())),
    }
    return Changes(len(uses.found), details, uses.refused | skipped | more)


class _Writer:
    """Puts the kernels' nodes in the place of what they compute."""

    def __init__(self, model: ir.Model, uses: Uses, attributes: Mapping[str, Any]) -> None:
        """Sets what is written.

        Args:
            model: Changed in place.
            uses: What is replaced.
            attributes: Of every product.
        """
        self._model = model
        self._attributes = attributes
        self._taken = value_names(model)
        self._targets: dict[ir.Graph, BlockTarget] = {}
        self._tiled: dict[tuple[ir.Value | None, ...], TiledWeight] = {}
        # A weight that is read in several graphs stands in the outermost.
        self._homes: dict[tuple[ir.Value | None, ...], set[ir.Graph]] = {}
        # What took a value's place: uses were found before anything was replaced.
        self._made: dict[ir.Value, ir.Value] = {}
        for use in uses.found:
            self._homes.setdefault(use.weight.identity, set()).add(_graph_of(use.node))

    def product(self, product: Product) -> None:
        """One product."""
        made = self._matmul(product.last, product.x, product.weight, product.bias, product)
        self._replace(product.result, made)
        if product.summed is not None:
            kept = [value for value in product.summed.inputs if value is not product.bias]
            product.summed.resize_inputs(len(kept))
            for index, value in enumerate(kept):
                product.summed.replace_input_with(index, value)

    def activated(self, activated: Activated) -> None:
        """One product, with the activation of it."""
        product, node = activated.product, activated.node
        made = self._matmul(
            node, product.x, product.weight, product.bias, product, activated.activation, gated=False
        )
        self._replace(node.outputs[0], made)

    def gate(self, gate: Gate) -> None:
        """Gate and up in one, with the activation."""
        weight = _joined_weight(gate.parts)
        bias = self._bias(gate.parts, gate.node)
        made = self._matmul(gate.node, gate.parts[0].x, weight, bias, gate.parts[0], gate.activation)
        self._replace(gate.node.outputs[0], made)

    def joined(self, whole: Joined) -> None:
        """Query, key and value in one."""
        first = whole.parts[0]
        weight = _joined_weight(whole.parts)
        made = self._matmul(whole.node, first.x, weight, self._bias(whole.parts, whole.node), first)
        made.name = unused(
            self._into(whole.node), common_name([part.result.name or "" for part in whole.parts])
        )
        made.type = first.result.type or ir.TensorType(_FLOAT)
        if first.result.shape is not None:
            made.shape = ir.Shape([*first.result.shape[:-1], weight.rows])
        whole.node.replace_input_with(0, made)
        whole.node.replace_input_with(1, None)
        whole.node.replace_input_with(2, None)

    def lookup(self, lookup: Lookup) -> None:
        """Rows of a weight."""
        into, tiled, ids = self._into(lookup.node), self._store(lookup.weight, lookup.node), lookup.ids
        if ids.dtype is not _INT64:
            name = f"{ids.name}_int64"
            ids = add_node(into, lookup.last, "Cast", [ids], {"to": _INT64}, name, _INT64)
            ids.shape = lookup.ids.shape
        inputs = [ids, tiled.codes, tiled.scales, tiled.offsets]
        name = f"{label(lookup.node)}_packed"
        self._replace(lookup.result, self._node(lookup.last, "GatherPacked", inputs, lookup.weight, {}, name))

    def _matmul(
        self,
        before: ir.Node,
        x: ir.Value,
        weight: PackedWeight,
        bias: ir.Value | None,
        first: Product,
        activation: str = "none",
        *,
        gated: bool = True,
    ) -> ir.Value:
        tiled = self._store(weight, first.node)
        inputs = [self._made.get(x, x), tiled.codes, tiled.scales, tiled.offsets, bias]
        name = f"{label(first.node)}_packed"
        attributes = {"activation": activation, **({} if gated else {"gated": 0}), **self._attributes}
        return self._node(before, "MatMulPacked", inputs, weight, attributes, name)

    def _node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        weight: PackedWeight,
        attributes: dict[str, Any],
        name: str,
    ) -> ir.Value:
        given = list(inputs)
        while given[-1] is None:
            given.pop()
        node = ir.node(op_type, given, weight.attributes | attributes, domain=OWN_DOMAIN, name=name)
        _graph_of(before).insert_before(before, node)
        return node.outputs[0]

    def _replace(self, old: ir.Value, made: ir.Value) -> None:
        """A value takes the place, name and type of another."""
        name = old.name
        made.type, made.shape = old.type or ir.TensorType(_FLOAT), old.shape
        old.replace_all_uses_with(made, replace_graph_outputs=old.is_graph_output())
        self._made[old] = made
        producer = old.producer()
        assert producer is not None
        old.name, made.name = unused(self._into(producer), f"{name}_before"), name

    def _store(self, weight: PackedWeight, node: ir.Node) -> TiledWeight:
        if weight.identity not in self._tiled:
            homes = self._homes.get(weight.identity, {_graph_of(node)})
            home = next(iter(homes)) if len(homes) == 1 else self._model.graph
            self._tiled[weight.identity] = weight.store(self._target(home))
        return self._tiled[weight.identity]

    def _bias(self, parts: Sequence[Product], node: ir.Node) -> ir.Value | None:
        """The biases one after the other; zeros where there is none."""
        given = [(constant_of(part.bias), part.weight.rows) for part in parts]
        if all(tensor is None for tensor, _ in given):
            return None

        def compute() -> npt.NDArray[np.float32]:
            return np.concatenate(
                [np.zeros(rows, np.float32) if tensor is None else tensor.numpy() for tensor, rows in given]
            )

        names = [part.bias.name or "bias" for part in parts if part.bias is not None]
        name = common_name(names) if len(names) > 1 else f"{names[0]}_joined"
        return lazy(self._into(node), name, _FLOAT, (sum(rows for _, rows in given),), compute)

    def _into(self, node: ir.Node) -> BlockTarget:
        return self._target(_graph_of(node))

    def _target(self, graph: ir.Graph) -> BlockTarget:
        return self._targets.setdefault(graph, BlockTarget(graph, _INT8, self._taken))


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def _joined_weight(parts: Sequence[Product]) -> PackedWeight:
    """One weight of those of products, which have one form."""
    floats = [part.weight for part in parts if isinstance(part.weight, FloatWeight)]
    blocks = [part.weight for part in parts if isinstance(part.weight, BlockWeight)]
    return floats[0].joined(floats) if floats else blocks[0].joined(blocks)
