"""Clean-up: what can go without changing what the graph computes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.corrections import corrected_onnxscript
from onnxsmith.graph_passes.folding import constants_as_tensors, fold_constants, local_rules
from onnxsmith.graph_passes.names import doubled_names, left_out_stay_so
from onnxsmith.graph_passes.own_functions import own_functions_aside
from onnxsmith.graph_passes.rule_dispatch import rules_by_operator
from onnxsmith.graph_passes.structure import (
    Fingerprint,
    only_small_constants,
    release_dead_users,
    require_signature,
    restore_outputs,
    signature,
    without_passed_through,
)

__all__ = ["Cleanup", "StripMetadata", "folds_anything", "operator_counts"]

# Folding uncovers rewrites and rewrites uncover folding. Two rounds have been seen to be enough.
_ROUNDS = 8
# Their result may be of any size, whatever the size of their inputs.
_GROWING = frozenset({"Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"})


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator there are, subgraphs included, most frequent first."""
    counts = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in model.graph.all_nodes()
    )
    return dict(counts.most_common())


def folds_anything(model: ir.Model, *, max_input_elements: int = 1024) -> bool:
    """Whether a node has nothing but small constants as inputs, so that folding could take it away."""
    return any(
        bool(node.inputs)
        and all(
            value is None
            or (
                value.const_value is not None
                and not value.is_graph_input()
                and value.const_value.size <= max_input_elements
            )
            for value in node.inputs
        )
        for node in model.graph
    )


class Cleanup(GraphPass):
    """Folds constants and removes what is dead, doubled or without effect.

    Made of the passes of onnxscript and onnx_ir: constant folding with size limits, no-op and shape
    rewrites, dead nodes and functions, common subexpressions, and equal small initializers.
    """

    name: ClassVar[str] = "cleanup"
    summary: ClassVar[str] = "fold constants; remove dead, doubled and no-op nodes"
    layerwise: ClassVar[bool] = True

    def __init__(self, *, max_input_elements: int = 1024, max_output_elements: int = 262144) -> None:
        """Sets the limits.

        Args:
            max_input_elements: A node with a larger constant input is not folded.
            max_output_elements: A node with a larger constant result is not folded.

        Raises:
            BadInputError: A limit is negative.
        """
        for name, limit in (
            ("max_input_elements", max_input_elements),
            ("max_output_elements", max_output_elements),
        ):
            if limit < 0:
                raise BadInputError(f"pass {self.name}: {name}", got=str(limit), expected="0 or more")
        self.max_input_elements = max_input_elements
        self.max_output_elements = max_output_elements

    def apply(self, model: ir.Model) -> Changes:
        """Cleans up until nothing changes any more."""
        before, initializers = operator_counts(model), len(model.graph.initializers)
        interface = signature(model)
        rules = local_rules(model.opset_imports.get("", 0))
        renamed = doubled_names(model)
        rounds = 0
        with own_functions_aside(model), without_passed_through(model.graph):
            state = Fingerprint(model)
            for _ in range(_ROUNDS):
                with left_out_stay_so(model):
                    self._round(model, rules)
                last, state = state, Fingerprint(model)
                if state == last:
                    break
                rounds += 1
        if not rounds and not renamed:
            return Changes()
        require_signature(model, interface, self.name)
        after = operator_counts(model)
        differences = {op: before.get(op, 0) - after.get(op, 0) for op in (*before, *after)}
        count = sum(abs(n) for n in differences.values()) + abs(initializers - len(model.graph.initializers))
        count += renamed
        return Changes(
            max(1, count),
            {
                "nodes_before": sum(before.values()),
                "nodes_after": sum(after.values()),
                "removed": {op: n for op, n in differences.items() if n > 0},
            },
        )

    def _round(self, model: ir.Model, rules: Any) -> None:
        outputs = [(value.type, value.shape) for value in model.graph.outputs]
        # Constants become initializers, so that equal ones can be found and stored once.
        lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        if model.functions:
            common.InlinePass()(model)
        lift(model)
        with only_small_constants(model, max_elements=self.max_input_elements, keep=_normalized(model)):
            with corrected_onnxscript(model):
                fold_constants(
                    model,
                    max_input_elements=self.max_input_elements,
                    max_output_elements=self.max_output_elements,
                    should_fold=self._should_fold,
                )
            release_dead_users(model)
            with rules_by_operator():
                rules.apply_to_model(model)
            if model.opset_imports.get("", 0) < 12:
                constants_as_tensors(model)
        ir.passes.Sequential(
            common.RemoveUnusedNodesPass(),
            lift,
            # Small ones only: comparing weights would read all of them.
            common.DeduplicateInitializersPass(size_limit=self.max_input_elements),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
            # An output that is an input needs a node of its own; names must be unique.
            common.OutputFixPass(),
            common.NameFixPass(),
        )(model)
        restore_outputs(model.graph, outputs)

    def _should_fold(self, node: ir.Node) -> bool | None:
        """False for what must not be computed; None leaves the decision to onnxscript."""
        if node.op_type == "Bernoulli":
            # Missing in onnxscript's list of random operators.
            return False
        # Unlike onnxscript's own limit, this one holds for Transpose too.
        constants = (value.const_value for value in node.inputs if value is not None)
        if any(tensor is not None and tensor.size > self.max_input_elements for tensor in constants):
            return False
        # Before it is computed, not after: an Expand of one element may have any size.
        sizes = [_static_size(value) for value in node.outputs]
        if any(size is not None and size > self.max_output_elements for size in sizes):
            return False
        return False if None in sizes and node.op_type in _GROWING else None


def _static_size(value: ir.Value) -> int | None:
    if value.shape is None or not value.shape.is_static():
        return None
    return math.prod(value.shape.numpy())


def _normalized(model: ir.Model) -> set[ir.Value]:
    """The weights that a BatchNormalization after them is folded into, and its own parameters."""
    found: set[ir.Value] = set()
    for node in model.graph:
        producer = (
            node.inputs[0].producer() if node.op_type == "BatchNormalization" and node.inputs[0] else None
        )
        if producer is not None and producer.op_type in ("Conv", "ConvTranspose", "Gemm"):
            found.update(value for value in (*producer.inputs, *node.inputs) if value is not None)
    return found


class StripMetadata(GraphPass):
    """Removes documentation strings and exporter metadata.

    torch's exporter writes stack traces with the paths of the machine that it ran on.
    """

    name: ClassVar[str] = "strip_metadata"
    summary: ClassVar[str] = "remove stack traces, paths and documentation strings that exporters leave"
    changes_at_once: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Removes them from everything but the model itself, whose metadata may be the user's."""
        # Not with onnx_ir's own pass: that forgets values and the model's documentation.
        count = int(bool(model.doc_string))
        model.doc_string = None
        for root in (model.graph, *(function.graph for function in model.functions.values())):
            for graph in (root, *root.subgraphs()):
                values = [*graph.inputs, *graph.initializers.values()]
                for node in graph:
                    values += node.outputs
                for owner in {id(one): one for one in (graph, *graph, *values)}.values():
                    count += bool(owner.metadata_props) + bool(owner.doc_string)
                    owner.metadata_props.clear()
                    owner.doc_string = None
        for function in model.functions.values():
            count += bool(function.metadata_props) + bool(function.doc_string)
            function.metadata_props.clear()
            function.doc_string = None
        return Changes(count)
