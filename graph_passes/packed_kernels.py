"""Products with weights in blocks, computed by the kernels of this project.

The kernels (docs/kernels.md) read codes, scales, zero points and float minimums in the order in which they
lie in the file, add a bias and compute the gate of an MLP. So what ``block_operators`` writes for ONNX
Runtime as five nodes is one here, with the weights that the blocks stand for, bit by bit.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.block_nodes import BlockTarget, add_node, lazy, unused
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.names import value_names
from onnxsmith.graph_passes.packed_functions import make_callable
from onnxsmith.graph_passes.packed_joins import Gate, Joined, find_gates, find_joined
from onnxsmith.graph_passes.packed_products import Lookup, Product, Uses, find_uses
from onnxsmith.graph_passes.packed_weights import BlockWeight, TiledWeight, joined_weight
from onnxsmith.graph_passes.weights import common_name, constant_of
from onnxsmith.own_operators import OWN_DOMAIN

__all__ = ["UsePackedKernels"]

_INT8 = 4
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class UsePackedKernels(GraphPass):
    """Has the kernels of this project compute what MatMulNBits and GatherBlockQuantized do.

    Weights stay what they are to the last bit; activations are rounded to 8 bits in blocks of 16 columns,
    where MatMulNBits rounds them in blocks as long as the weight's. That halves what rounding them costs, for
    a fifth of a prompt's time and none of a token's; blocks of 32 are for models without a cache. Query, key
    and value become one product where their formats agree, and so do gate and up of an MLP, with the
    activation between them. The graph is for the kernels, which are compiled where it runs; without them,
    functions in the model compute it in float32.
    """

    name: ClassVar[str] = "use_packed_kernels"
    summary: ClassVar[str] = (
        "weights in blocks in the layout of this project's own kernels, which compute them"
    )

    def __init__(self, *, skip_nodes: tuple[str, ...] = (), activation_block: Literal[0, 16, 32] = 0) -> None:
        """Sets what stays.

        Args:
            activation_block: How many columns of an activation are rounded with one scale, at most: blocks
                of the weight may be shorter. 0 is 16 for models with a KV cache, and 32 for others, whose
                products have many rows at a time.
            skip_nodes: Patterns of node or weight names that stay with ONNX Runtime's operators.
        """
        self.skip_nodes = tuple(skip_nodes)
        self.activation_block = activation_block

    def apply(self, model: ir.Model) -> Changes:
        """Changes the graph and its branches; weights are put in tiles when they are written."""
        uses = find_uses(model, refuse=self._skipped)
        changes = Changes(skipped=dict(uses.refused))
        if not uses.found:
            return changes
        gates, reasons = find_gates(uses)
        joined, more = find_joined(model, uses, gates)
        changes.skipped |= reasons | more
        columns = self.activation_block or (16 if _has_cache(model) else 32)
        writer = _Writer(model, uses, columns)
        formats: Counter[str] = Counter()
        wholes: list[Gate | Joined] = [*gates, *joined]
        inside = {part.node for whole in wholes for part in whole.parts}
        for use in uses.found:
            formats[str(use.weight)] += 1
            if isinstance(use, Lookup):
                writer.lookup(use)
            elif use.node not in inside:
                writer.product(use)
        for gate in gates:
            writer.gate(gate)
        for whole in joined:
            writer.joined(whole)
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault(OWN_DOMAIN, 1)
        make_callable(model)
        changes.count = len(uses.found)
        lookups = sum(isinstance(use, Lookup) for use in uses.found)
        changes.details = {
            "needs": "the kernels of onnxsmith, see docs/kernels.md",
            "products": changes.count - lookups,
            "lookups": lookups,
            "gates": len(gates),
            "joined": len(joined),
            "arithmetic": f"int8, activations rounded to 8 bits in blocks of {columns}",
            "formats": dict(sorted(formats.items())),
        }
        return changes

    def _skipped(self, node: ir.Node, weight: BlockWeight) -> str:
        names = (node.name or "", weight.name)
        fitting = [p for p in self.skip_nodes if any(fnmatch.fnmatchcase(name, p) for name in names)]
        return f"skip_nodes has {fitting[0]!r}" if fitting else ""


class _Writer:
    """Puts the kernels' nodes in the place of what they compute."""

    def __init__(self, model: ir.Model, uses: Uses, activation_block: int) -> None:
        self._model = model
        self._activation_block = activation_block
        self._taken = value_names(model)
        self._targets: dict[ir.Graph, BlockTarget] = {}
        self._tiled: dict[tuple[ir.Value | None, ...], TiledWeight] = {}
        # A weight that is read in several graphs stands in the outermost.
        self._homes: dict[tuple[ir.Value | None, ...], set[ir.Graph]] = {}
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

    def gate(self, gate: Gate) -> None:
        """Gate and up in one, with the activation."""
        weight = joined_weight([part.weight for part in gate.parts])
        bias = self._bias(gate.parts, gate.node)
        made = self._matmul(gate.node, gate.parts[0].x, weight, bias, gate.parts[0], gate.activation)
        self._replace(gate.node.outputs[0], made)

    def joined(self, whole: Joined) -> None:
        """Query, key and value in one."""
        first = whole.parts[0]
        weight = joined_weight([part.weight for part in whole.parts])
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
        weight: BlockWeight,
        bias: ir.Value | None,
        first: Product,
        activation: str = "none",
    ) -> ir.Value:
        tiled = self._store(weight, first.node)
        inputs = [x, tiled.codes, tiled.scales, tiled.offsets, bias]
        name = f"{label(first.node)}_packed"
        attributes = {"activation": activation, "activation_block": self._activation_block}
        return self._node(before, "MatMulPacked", inputs, weight, attributes, name)

    def _node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        weight: BlockWeight,
        attributes: dict[str, Any],
        name: str,
    ) -> ir.Value:
        given = list(inputs)
        while given[-1] is None:
            given.pop()
        numbers = {
            "K": weight.columns,
            "N": weight.rows,
            "bits": weight.bits,
            "block_size": weight.block_size,
        }
        node = ir.node(op_type, given, numbers | attributes, domain=OWN_DOMAIN, name=name)
        _graph_of(before).insert_before(before, node)
        return node.outputs[0]

    def _replace(self, old: ir.Value, made: ir.Value) -> None:
        """A value takes the place, name and type of another."""
        name = old.name
        made.type, made.shape = old.type or ir.TensorType(_FLOAT), old.shape
        old.replace_all_uses_with(made, replace_graph_outputs=old.is_graph_output())
        producer = old.producer()
        assert producer is not None
        old.name, made.name = unused(self._into(producer), f"{name}_before"), name

    def _store(self, weight: BlockWeight, node: ir.Node) -> TiledWeight:
        if weight.identity not in self._tiled:
            homes = self._homes.get(weight.identity, {_graph_of(node)})
            home = next(iter(homes)) if len(homes) == 1 else self._model.graph
            self._tiled[weight.identity] = TiledWeight.store(self._target(home), weight)
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


def _has_cache(model: ir.Model) -> bool:
    return any((value.name or "").startswith("past_key_values") for value in model.graph.inputs)


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph
