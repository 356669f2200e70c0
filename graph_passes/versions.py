"""Versions of the operator set and of the file format: runtimes are often older than the newest onnx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.own_functions import own_functions_aside
from onnxsmith.graph_passes.packed_functions import make_callable
from onnxsmith.graph_passes.structure import require_signature, signature

__all__ = ["ConvertOpset", "LowerIrVersion", "LowerOpset"]

# Operator set of the default domain -> the IR version that came with it
# (https://github.com/onnx/onnx/blob/main/docs/Versioning.md). Runtimes in the field stop at an IR
# version, whatever the graph uses of it.
_IR_OF_OPSET = ((18, 8), (20, 9), (22, 10), (23, 11), (24, 12), (25, 13))
_DEFAULT_DOMAINS = ("", "ai.onnx")
# The first operator set that onnxscript's converter converts from.
_ONNXSCRIPT_FROM = 18
_SMALL_ELEMENTS = 1024
# Registered by ONNX Runtime in ONNX's own domain, and so in no version of ONNX.
_NOT_ONNX = frozenset({"SimplifiedLayerNormalization"})
# Element type -> the IR version that brought it. Those that an older onnx_ir does not know are left out.
_IR_OF_TYPE: Mapping[ir.DataType, int] = {
    ir.DataType[name]: version
    for version, names in {
        9: ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
        10: ("INT4", "UINT4"),
        11: ("FLOAT4E2M1",),
        12: ("FLOAT8E8M0",),
        13: ("INT2", "UINT2"),
    }.items()
    for name in names
    if name in ir.DataType.__members__
}


class ConvertOpset(GraphPass):
    """Rewrites the graph for another version of the operator set.

    Upwards with the converter of ``onnx`` up to 18, from there with that of ``onnxscript``, which knows
    the operators of ONNX Runtime. Downwards only as far as no operator changes its
    definition, which is what lower_opset does.
    """

    name: ClassVar[str] = "convert_opset"
    summary: ClassVar[str] = "rewrite the graph for another operator set"

    def __init__(self, *, version: int = 20) -> None:
        """Sets the target.

        Args:
            version: Version of ONNX's operator set.

        Raises:
            BadInputError: A version that the installed onnx does not have.
        """
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if not 7 <= version <= newest:
            raise BadInputError(
                f"pass {self.name}: version", got=str(version), expected=f"7 to {newest}, what onnx has here"
            )
        self.version = version

    def apply(self, model: ir.Model) -> Changes:
        """Converts the graph; functions are inlined first.

        Raises:
            PreconditionError: The way down would change what an operator means.
        """
        before = _opset(model)
        if before == self.version:
            return Changes()
        if before > self.version:
            needed, culprit = _needed_opset(model)
            if needed > self.version:
                raise PreconditionError(
                    f"pass {self.name}",
                    got=f"opset {before} with {culprit}, which has its present meaning since opset {needed}",
                    expected=f"a version of {needed} or more",
                    remedy=f"Use lower_opset, or export with --opset {self.version}",
                )
            _set_opset(model, self.version)
            return Changes(1, {"before": before, "after": self.version})
        from onnxscript import version_converter

        interface = signature(model)
        with own_functions_aside(model):
            common.InlinePass()(model)
            if before < _ONNXSCRIPT_FROM:
                # onnxscript changes nothing in a graph below 18 but the number, and says nothing.
                _convert_with_onnx(model, min(self.version, _ONNXSCRIPT_FROM))
            if self.version > _ONNXSCRIPT_FROM:
                version_converter.convert_version(model, self.version)
        _set_opset(model, self.version)
        for graph in model.graphs():
            for node in graph:
                if node.domain in _DEFAULT_DOMAINS:
                    node.version = None
        make_callable(model)
        require_signature(model, interface, self.name)
        return Changes(1, {"before": before, "after": self.version})


def _convert_with_onnx(model: ir.Model, version: int) -> None:
    """Converts without handing over the weights: protobuf holds 2 GB at most, and copies."""
    import onnx.version_converter

    graph = model.graph
    weights = {
        value.name or "": value
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.size > _SMALL_ELEMENTS
    }
    inputs = list(graph.inputs)
    for name, value in weights.items():
        del graph.initializers[name]
        if not value.is_graph_input():
            graph.inputs.append(value)
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), version))
    except Exception as error:
        # Whatever the C++ code raises: RuntimeError mostly, for operators that it does not know.
        text = " ".join(str(error).split())
        raise PreconditionError(
            "pass convert_opset",
            got=f"onnx cannot convert the graph from opset {_opset(model)} to {version}: {text[:300]}",
            expected="operators that its converter knows",
            remedy="Export the model again with the opset that you need",
        ) from error
    names = {value.name for value in inputs}
    for value in list(converted.graph.inputs):
        if value.name in weights:
            value.const_value = weights[value.name].const_value
            converted.graph.register_initializer(value)
            if value.name not in names:
                converted.graph.inputs.remove(value)
    model.graph = converted.graph


class LowerOpset(GraphPass):
    """Declares the lowest operator set in which every node means what it means now.

    No node is rewritten: an operator set is lower than another for this graph if each of its operators has
    the same definition in both.
    """

    name: ClassVar[str] = "lower_opset"
    summary: ClassVar[str] = "declare the lowest operator set that the graph needs: older runtimes load it"
    changes_at_once: ClassVar[bool] = True

    def __init__(self, *, lowest: int = 18) -> None:
        """Sets a floor.

        Args:
            lowest: Never below this. Later passes may add operators; 18 has all that ours add.
        """
        self.lowest = lowest

    def apply(self, model: ir.Model) -> Changes:
        """Lowers the version, never raises it."""
        before = _opset(model)
        needed, culprit = _needed_opset(model)
        needed = max(needed, self.lowest)
        if needed >= before:
            return Changes(0, {"opset": before, "because_of": culprit} if culprit else {})
        if any(_opset(function) != before for function in model.functions.values()):
            return Changes(0, {}, {"opset": "the model has functions of other operator sets"})
        _set_opset(model, needed)
        return Changes(1, {"before": before, "after": needed, "because_of": culprit})


def _opset(model: ir.Model | ir.Function) -> int:
    return max((model.opset_imports.get(domain, 0) for domain in _DEFAULT_DOMAINS), default=0)


def _set_opset(model: ir.Model, version: int) -> None:
    for imports in (model.opset_imports, *(one.opset_imports for one in model.functions.values())):
        for domain in _DEFAULT_DOMAINS:
            if domain in imports:
                imports[domain] = version


def _needed_opset(model: ir.Model) -> tuple[int, str]:
    """The lowest version in which all operators have the definition that they have now, and which one."""
    import onnx

    opset, needed, culprit = _opset(model), 1, ""
    for op_type in sorted({node.op_type for node in _nodes(model) if node.domain in _DEFAULT_DOMAINS}):
        if op_type in _NOT_ONNX:
            continue
        try:
            since = onnx.defs.get_schema(op_type, max_inclusive_version=opset).since_version
        except onnx.defs.SchemaError:
            # An operator that onnx does not know may need anything.
            return opset, op_type
        if since > needed:
            needed, culprit = since, op_type
    return needed, culprit


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


class LowerIrVersion(GraphPass):
    """Declares the lowest IR version that the graph's operator set and types need."""

    name: ClassVar[str] = "lower_ir_version"
    summary: ClassVar[str] = "declare the lowest IR version that the graph needs: older runtimes load it"
    changes_at_once: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> Changes:
        """Lowers the version, never raises it."""
        opset = _opset(model)
        needed = next((version for last, version in _IR_OF_OPSET if opset <= last), model.ir_version)
        if model.functions:
            needed = max(needed, 10)  # overloads and metadata of functions
        if model.device_configurations:
            needed = max(needed, 11)
        needed = max(needed, *(_IR_OF_TYPE.get(dtype, 0) for dtype in _element_types(model)), 0)
        if needed >= model.ir_version:
            return Changes()
        before, model.ir_version = model.ir_version, needed
        return Changes(1, {"before": before, "after": needed})


def _element_types(model: ir.Model) -> set[ir.DataType]:
    """Every element type that a value, a tensor or a Cast has."""
    found: set[ir.DataType | None] = set()
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        for graph in (root, *root.subgraphs()):
            found.update(value.dtype for value in (*graph.inputs, *graph.initializers.values()))
            for node in graph:
                found.update(value.dtype for value in node.outputs)
                for name, attribute in node.attributes.items():
                    if attribute.is_ref():
                        continue
                    if attribute.type is ir.AttributeType.TENSOR:
                        found.add(attribute.as_tensor().dtype)
                    elif attribute.type is ir.AttributeType.INT and name in ("to", "dtype", "output_dtype"):
                        found.add(ir.DataType(attribute.as_int()))
    return {dtype for dtype in found if dtype is not None}
