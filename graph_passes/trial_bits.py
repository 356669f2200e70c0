"""Trial graphs that hold every weight in few and in many bits, to find out what few bits cost it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.block_operators import BlockFormat, BlockWriter, SharedWeight, find_weights
from onnxsmith.graph_passes.block_search import SEARCH_STEPS
from onnxsmith.graph_passes.integer_operators import GraphWriter
from onnxsmith.graph_passes.rounding import Choice, Rounding, entry_of
from onnxsmith.graph_passes.weights import MatMulWeight

__all__ = ["FLAGS", "Option", "Twins", "attributable", "switchable"]

FLAGS = "onnxsmith_low_bits"
"""Input of a trial graph: for each weight, whether it has few bits."""

_SCALAR = (ir.DataType.FLOAT,)


@dataclasses.dataclass(frozen=True)
class Option:
    """A weight with the two ways to store it."""

    weight: SharedWeight
    low: BlockFormat
    high: BlockFormat
    accuracy_level: int = 4

    def bytes(self, *, low: bool) -> int:
        """What it takes."""
        form = self.low if low else self.high
        rows, columns = self.weight.shape
        blocks = -(-columns // form.block_size)
        scales = (1 + form.minimums) * (2 if form.half_scales else 4)
        zeros = 0 if form.symmetric or form.minimums else form.bits / 8
        return int(rows * (columns * form.bits / 8 + blocks * (scales + zeros)))


@dataclasses.dataclass(frozen=True)
class Twins:
    """The nodes of one weight in a trial graph.

    Attributes:
        pairs: With few bits and with many, for each node that reads the weight: what the names of the nodes
            that take their place begin with.
        errors: Names of the values that hold the squared differences, and the squares.
    """

    pairs: list[tuple[str, str]]
    errors: list[tuple[str, str]]


def switchable(trial: ir.Model, options: Sequence[Option]) -> None:
    """Lets a flag for each weight choose between few and many bits.

    Args:
        trial: A copy of the model; changed.
        options: Of the model.
    """
    writer = GraphWriter(trial)
    flags = ir.Value(name=FLAGS, shape=ir.Shape([len(options)]), type=ir.TensorType(ir.DataType.BOOL))
    trial.graph.inputs.append(flags)

    def choose(number: int, node: ir.Node, twin: ir.Node) -> None:
        (flag,) = writer.add(
            node, "Gather", [flags, writer.constant(np.array(number), "number")], "flag", (ir.DataType.BOOL,)
        )
        output = node.outputs[0]
        (chosen,) = writer.add(
            node, "Where", [flag, twin.outputs[0], output], f"{output.name}_chosen", after=True
        )
        chosen.type, chosen.shape = output.type, output.shape
        where = chosen.producer()
        for reader, index in list(output.uses()):
            if reader is not where:
                reader.replace_input_with(index, chosen)
        if output.is_graph_output():
            name = output.name
            trial.graph.outputs[:] = [chosen if o is output else o for o in trial.graph.outputs]
            output.name, chosen.name = writer.name(f"{name}_high"), name

    matched = _matched(trial, options)
    doubles = [SharedWeight(w.value, w.is_transposed, []) for w in matched]
    for number, (weight, double) in enumerate(zip(matched, doubles, strict=True)):
        for user, twin in _twins(trial, writer, weight):
            double.users.append(
                dataclasses.replace(user, node=twin) if isinstance(user, MatMulWeight) else twin
            )
            choose(number, user.node if isinstance(user, MatMulWeight) else user, twin)
    _store(trial, options, matched, doubles)


def attributable(trial: ir.Model, options: Sequence[Option]) -> list[Twins]:
    """Computes beside every product the same one with few bits, and how far the two are apart.

    What is passed on is the product with many bits, so one run says of every weight what few bits cost its
    own result.

    Args:
        trial: A copy of the model; changed.
        options: Of the model.
    """
    writer = GraphWriter(trial)
    matched = _matched(trial, options)
    doubles = [SharedWeight(w.value, w.is_transposed, []) for w in matched]
    found = []
    for weight, double in zip(matched, doubles, strict=True):
        one = Twins([], [])
        for user, twin in _twins(trial, writer, weight):
            double.users.append(
                dataclasses.replace(user, node=twin) if isinstance(user, MatMulWeight) else twin
            )
            node = user.node if isinstance(user, MatMulWeight) else user
            output = node.outputs[0]
            (difference,) = writer.add(
                node, "Sub", [twin.outputs[0], output], f"{twin.name}_difference", after=True
            )
            maker = difference.producer()
            assert maker is not None
            names = []
            for value in (difference, output):
                (total,) = writer.add(
                    maker, "ReduceSumSquare", [value], f"{twin.name}_square", _SCALAR,
                    attributes={"keepdims": 0}, after=True,
                )  # fmt: skip
                total.shape = ir.Shape([])
                # Or they would be removed with what nobody reads.
                trial.graph.outputs.append(total)
                names.append(total.name or "")
            one.errors.append((names[0], names[1]))
            one.pairs.append((twin.name or "", node.name or output.name or ""))
        found.append(one)
    _store(trial, options, matched, doubles)
    return found


def _matched(trial: ir.Model, options: Sequence[Option]) -> list[SharedWeight]:
    """The weights of the options in a copy of their model."""
    everything, _ = find_weights(trial, embeddings=True, skip_nodes=())
    by_name: Mapping[tuple[str, bool], SharedWeight] = {(w.name, w.is_transposed): w for w in everything}
    matched = []
    for option in options:
        weight = by_name[option.weight.name, option.weight.is_transposed]
        wanted = {_node(user).name for user in option.weight.users}
        users = [user for user in weight.users if _node(user).name in wanted]
        matched.append(SharedWeight(weight.value, weight.is_transposed, users))
    return matched


def _node(user: MatMulWeight | ir.Node) -> ir.Node:
    return user.node if isinstance(user, MatMulWeight) else user


def _twins(
    trial: ir.Model, writer: GraphWriter, weight: SharedWeight
) -> list[tuple[MatMulWeight | ir.Node, ir.Node]]:
    """A second node beside each that reads a weight."""
    made = []
    for user in weight.users:
        node = _node(user)
        twin = ir.Node(
            node.domain,
            node.op_type,
            list(node.inputs),
            list(node.attributes.values()),
            name=writer.name(f"{node.name or node.outputs[0].name}_low"),
        )
        twin.outputs[0].name = writer.name(f"{node.outputs[0].name}_low")
        twin.outputs[0].type, twin.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        trial.graph.insert_before(node, twin)
        made.append((user, twin))
    return made


def _store(
    trial: ir.Model,
    options: Sequence[Option],
    weights: Sequence[SharedWeight],
    doubles: Sequence[SharedWeight],
) -> None:
    blocks = BlockWriter(trial, accuracy_level=options[0].accuracy_level if options else 4)
    for option, weight, double in zip(options, weights, doubles, strict=True):
        for one, form in ((double, option.low), (weight, option.high)):
            entry = entry_of(one, form, "rtn")
            blocks.replace(one, form, Rounding(Choice(one, form, "rtn", entry), SEARCH_STEPS))
    trial.opset_imports.setdefault("com.microsoft", 1)
    common.RemoveUnusedNodesPass()(trial)
