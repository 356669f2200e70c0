"""Floating-point precision: which nodes compute in 16 bits, and where values change their type."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.packed_functions import inline_functions
from onnxsmith.graph_passes.shapes import infer_shapes
from onnxsmith.onnx_file import drop_pages

__all__ = [
    "PRECISION_MAP",
    "SENSITIVE",
    "ToBfloat16",
    "ToFloat16",
    "complete_types",
    "convert_floats",
    "precision_map",
]

PRECISION_MAP = "onnxsmith.precision_map"
"""Metadata of a model: JSON, node that stays in float32 to the reason."""

SENSITIVE: Mapping[str, str] = {
    **{
        op: "sums many numbers or squares: overflows or loses digits"
        for op in (
            "CumSum", "GlobalLpPool", "LpNormalization", "Pow", "ReduceL1", "ReduceL2", "ReduceLogSum",
            "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare",
        )
    },
    **{op: "grows faster than the type's range" for op in ("Exp", "LogSoftmax", "Softmax", "Softplus")},
    **{
        op: "a norm: its variance is a mean of squares"
        for op in (
            "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
            "RMSNormalization", "SimplifiedLayerNormalization",
        )
    },
    **dict.fromkeys(("RandomNormal", "RandomUniform"), "draws numbers that depend on the type"),
    "Range": "counts, and 16 bits do not hold each number above 2048",
}  # fmt: skip
"""Operators that stay in float32, and why. Fused ones of ONNX Runtime do such parts in float32 themselves."""

_CONTRIB = "com.microsoft"
_BOUNDARY = "a Cast between the two types"
_DEFAULT_DOMAINS = ("", "ai.onnx")
# They move numbers and compute nothing: their precision is that of what surrounds them.
_LAYOUT = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
     "Unsqueeze"}
)  # fmt: skip
# Operator -> inputs that are float32 whatever the type of the others.
_ALWAYS_FLOAT: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2})}
_PART_ELEMENTS = 1 << 22
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


class ToFloat16(GraphPass):
    """Converts weights and computation to float16, and keeps what would overflow or lose its digits.

    Weights are converted when they are written, one at a time. Numbers beyond the range of the type, such as
    the lowest float32 in attention masks, become its last finite number. On the CPU provider this is a format
    for size and not for speed: most kernels there compute in float32 behind casts.
    """

    name: ClassVar[str] = "to_float16"
    summary: ClassVar[str] = "convert weights and computation to float16 (on CPUs: for size, not for speed)"
    target: ClassVar[ir.DataType] = ir.DataType.FLOAT16

    def __init__(
        self,
        *,
        keep_io_types: bool = True,
        keep_operators: tuple[str, ...] = (),
        keep_nodes: tuple[str, ...] = (),
        convert_sensitive: bool = False,
    ) -> None:
        """Sets what stays in float32.

        Args:
            keep_io_types: Keep inputs and outputs in float32, behind casts. Clients that do not look at
                the type of an output read garbage otherwise.
            keep_operators: Operator types that stay in float32 besides the defaults.
            keep_nodes: Patterns of names of nodes that stay in float32.
            convert_sensitive: Also convert norms, softmax, sums and powers.
        """
        self.keep_io_types = keep_io_types
        self.keep_operators = tuple(keep_operators)
        self.keep_nodes = tuple(keep_nodes)
        self.convert_sensitive = convert_sensitive

    def apply(self, model: ir.Model) -> Changes:
        """Converts the main graph; what is inside of loops and branches stays in float32."""
        kept: dict[str, str] = {}
        for node in model.graph:
            if node.op_type in self.keep_operators:
                kept[label(node)] = "keep_operators names its type"
            elif any(fnmatch.fnmatchcase(node.name or "", pattern) for pattern in self.keep_nodes):
                kept[label(node)] = "keep_nodes names it"
            elif not self.convert_sensitive and node.op_type in SENSITIVE:
                kept[label(node)] = SENSITIVE[node.op_type]
        return convert_floats(model, self.target, kept=kept, keep_io_types=self.keep_io_types, name=self.name)


class ToBfloat16(ToFloat16):
    """Converts weights and computation to bfloat16: the range of float32, 8 bits of digits.

    Operators whose definition in the graph's operator set does not take bfloat16 stay in float32.
    """

    name: ClassVar[str] = "to_bfloat16"
    summary: ClassVar[str] = "convert weights and computation to bfloat16"
    target: ClassVar[ir.DataType] = ir.DataType.BFLOAT16


def precision_map(model: ir.Model) -> dict[str, str]:
    """The nodes that a conversion left in float32, and why; empty where there was none."""
    found: dict[str, str] = json.loads(model.metadata_props.get(PRECISION_MAP, "{}"))
    return found


def convert_floats(
    model: ir.Model, target: ir.DataType, *, kept: Mapping[str, str], keep_io_types: bool, name: str
) -> Changes:
    """Converts every node but those kept, with one Cast for each value and direction at most.

    Args:
        model: The model; functions are inlined.
        target: FLOAT16 or BFLOAT16.
        kept: Label of a node that stays in float32, to the reason.
        keep_io_types: Whether inputs and outputs stay in float32.
        name: The pass, for messages.

    Raises:
        PreconditionError: The type of a value is not known.
    """
    inline_functions(model)
    complete_types(model, name)
    graph = model.graph
    before = _float_bytes(model)
    stays = {node: reason for node in graph if (reason := _reason(node, target, kept, model))}
    _follow_neighbours(graph, stays)
    converted = [node for node in graph if node not in stays and _touches_floats(node)]
    if not converted:
        return Changes()
    counts: Counter[str] = Counter()
    small: dict[ir.Value, ir.Value] = {}
    produced = {value for node in converted for value in node.outputs if _is_float(value)}
    for node in converted:
        for value in node.outputs:
            if value in produced:
                # A new object: clones of a graph share the type objects of its values.
                value.type = ir.TensorType(target)
        _convert_attributes(node, target)
    # In order: the file of a model must not depend on where its values lie in memory.
    outputs = dict.fromkeys(value for value in graph.outputs if value in produced)
    if not keep_io_types:
        for given in graph.inputs:
            if given not in graph.initializers.values() and _is_float(given):
                given.type = ir.TensorType(target)
                produced.add(given)
    for node in converted:
        fixed = _ALWAYS_FLOAT.get(node.op_type, frozenset())
        for index, operand in enumerate(node.inputs):
            if operand is None or index in fixed or not _is_float(operand):
                continue
            if operand not in small:
                small[operand] = _narrowed(graph, operand, target, counts)
            node.replace_input_with(index, small[operand])
    _widen_for_kept(graph, converted, produced, target, counts)
    if keep_io_types:
        for value in outputs:
            _restore_output(graph, value, target, counts)
    _drop_wide_weights(graph, small)
    graph.sort()
    reasons = {
        label(node): reason for node, reason in stays.items() if reason != _BOUNDARY and _touches_floats(node)
    }
    model.metadata_props[PRECISION_MAP] = json.dumps(reasons)
    return Changes(
        len(converted),
        {
            "converted": len(converted),
            "kept": len(reasons),
            "casts": counts["casts"],
            "float32_bytes_before": before,
            "float32_bytes_after": _float_bytes(model),
        },
        reasons,
    )


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _touches_floats(node: ir.Node) -> bool:
    return any(value is not None and _is_float(value) for value in (*node.inputs, *node.outputs))


def complete_types(model: ir.Model, name: str) -> None:
    """Every value gets an element type: from ONNX, or for operators of ONNX Runtime from their operands."""
    missing = any(value.dtype is None for node in model.graph for value in node.outputs)
    if missing and any(node.domain in _DEFAULT_DOMAINS for node in model.graph):
        infer_shapes(model)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is not None or not (value.uses() or value.is_graph_output()):
                continue
            known = [one.dtype for one in node.inputs if one is not None and one.dtype is not None]
            if (
                node.domain in _DEFAULT_DOMAINS and node.op_type != "SimplifiedLayerNormalization"
            ) or not known:
                raise PreconditionError(
                    f"pass {name}",
                    got=f"no element type for {value.name!r}, which {node.op_type} makes",
                    expected="a model whose types can be inferred",
                )
            value.type = ir.TensorType(known[0])


def _reason(node: ir.Node, target: ir.DataType, kept: Mapping[str, str], model: ir.Model) -> str:
    """Why a node stays in float32, or an empty string."""
    if label(node) in kept:
        return kept[label(node)]
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for attribute in node.attributes.values()):  # fmt: skip
        return "has a body, which is left as it is"
    if node.op_type == "Cast" and {
        node.outputs[0].dtype,
        node.inputs[0].dtype if node.inputs[0] else None,
    } == {
        target,
        ir.DataType.FLOAT,
    }:
        return _BOUNDARY
    inner = [use.node for value in node.outputs for use in value.uses() if use.node.graph is not model.graph]
    if inner:
        return "the body of a loop or branch reads it"
    if node.domain in _DEFAULT_DOMAINS:
        return _schema_reason(node, target, model)
    if node.domain != _CONTRIB:
        return f"the domain {node.domain!r} is not known"
    if target == ir.DataType.BFLOAT16:
        return "operators of ONNX Runtime have bfloat16 kernels on few providers"
    return ""


def _schema_reason(node: ir.Node, target: ir.DataType, model: ir.Model) -> str:
    import onnx

    opset = max(model.opset_imports.get(domain, 0) for domain in _DEFAULT_DOMAINS)
    wanted = f"tensor({target.name.lower()})"
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset)
    except onnx.defs.SchemaError:
        # Such as SimplifiedLayerNormalization, which ONNX Runtime registers in ONNX's domain.
        return "" if target == ir.DataType.FLOAT16 else "onnx does not know it"
    fixed = _ALWAYS_FLOAT.get(node.op_type, frozenset())
    for formal, actual in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, value in enumerate(actual):
            if (
                value is None
                or not _is_float(value)
                or not formal
                or (actual is node.inputs and index in fixed)
            ):
                continue
            # The last parameter may stand for any number of values.
            if wanted not in formal[min(index, len(formal) - 1)].types:
                return f"{node.op_type} of opset {opset} does not take {target.name.lower()}"
    return ""


def _follow_neighbours(graph: ir.Graph, stays: dict[ir.Node, str]) -> None:
    """What only moves numbers between nodes that stay would need a Cast on either side: it stays too."""
    for node in graph:
        if node in stays or node.op_type not in _LAYOUT or node.domain not in _DEFAULT_DOMAINS:
            continue
        makers = [value.producer() for value in node.inputs if value is not None and _is_float(value)]
        users = [use.node for value in node.outputs for use in value.uses()]
        if makers and users and all(one in stays for one in (*makers, *users)):
            stays[node] = "moves numbers between nodes that stay"


def _convert_attributes(node: ir.Node, target: ir.DataType) -> None:
    if node.domain not in _DEFAULT_DOMAINS:
        return
    for name in _TYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_int() == ir.DataType.FLOAT.value:
            node.attributes[name] = ir.AttrInt64(name, target.value)
    attribute = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and attribute is None:
        node.attributes["value"] = ir.AttrTensor(
            "value", ir.Tensor(np.zeros(1, target.numpy()), dtype=target)
        )
    elif attribute is not None and attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", _narrow_tensor(tensor, target, tensor.name))
    for name in ("value_float", "value_floats"):
        scalar = node.attributes.pop(name, None)
        if scalar is not None:
            array = np.array(scalar.value, np.float32)
            node.attributes["value"] = ir.AttrTensor("value", _narrow_tensor(ir.tensor(array), target, None))


def _narrowed(graph: ir.Graph, value: ir.Value, target: ir.DataType, counts: Counter[str]) -> ir.Value:
    """The value in 16 bits: a new initializer, or a Cast behind it."""
    tensor = value.const_value
    if tensor is not None and value.is_initializer() and not value.is_graph_input():
        name = f"{value.name}_{target.name.lower()}"
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(target))
        made.const_value = ir.LazyTensor(
            lambda: _narrow_tensor(tensor, target, made.name),
            dtype=target,
            shape=ir.Shape(list(tensor.shape.numpy())),
            name=name,
        )
        graph.register_initializer(made)
        return made
    return _cast(graph, value, target, counts)


def _drop_wide_weights(graph: ir.Graph, small: Mapping[ir.Value, ir.Value]) -> None:
    """Removes weights that nobody reads any more; their narrow form takes over the name."""
    for value, narrow in small.items():
        if not value.is_initializer() or value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        name = value.name or ""
        del graph.initializers[name]
        if narrow.is_initializer():
            narrow.name = name


def _narrow_tensor(tensor: ir.TensorProtocol, target: ir.DataType, name: str | None) -> ir.TensorProtocol:
    array = np.asarray(tensor.numpy(), np.float32)
    narrow = np.empty(array.shape, target.numpy())
    flat, made = array.reshape(-1), narrow.reshape(-1)
    # In parts, so that what lies between the two types is small whatever the weight.
    for start in range(0, flat.size, _PART_ELEMENTS):
        part = flat[start : start + _PART_ELEMENTS]
        made[start : start + _PART_ELEMENTS] = (
            _to_half(part, single=array.size == 1) if target == ir.DataType.FLOAT16 else part
        )
    drop_pages(tensor)
    return ir.Tensor(narrow, dtype=target, name=name)


def _to_half(array: npt.NDArray[np.float32], *, single: bool) -> npt.NDArray[np.float16]:
    """Finite numbers stay finite, and what is not zero does not become zero: an epsilon is there for that."""
    limits = np.finfo(np.float16)
    finite = np.isfinite(array)
    bounded: Any = np.where(finite, np.clip(array, limits.min, limits.max), array)
    half: npt.NDArray[np.float16] = bounded.astype(np.float16)
    if single:
        lost = (half == 0) & (array != 0)
        half = np.where(lost, np.copysign(limits.smallest_subnormal, array), half).astype(np.float16)
    return half


def _cast(graph: ir.Graph, value: ir.Value, target: ir.DataType, counts: Counter[str]) -> ir.Value:
    # A value that was just widened comes from one that has the type already.
    maker = value.producer()
    if maker is not None and maker.op_type == "Cast" and maker.inputs[0] is not None:
        source = maker.inputs[0]
        if source.dtype == target:
            return source
    node = ir.node("Cast", [value], {"to": target.value}, name=f"{value.name}_to_{target.name.lower()}")
    made = node.outputs[0]
    made.name, made.shape, made.type = (
        f"{value.name}_{target.name.lower()}",
        value.shape,
        ir.TensorType(target),
    )
    if maker is not None and maker.graph is graph:
        graph.insert_after(maker, node)
    else:
        first = next(iter(graph))
        graph.insert_before(first, node)
    counts["casts"] += 1
    return made


def _widen_for_kept(
    graph: ir.Graph,
    converted: list[ir.Node],
    produced: set[ir.Value],
    target: ir.DataType,
    counts: Counter[str],
) -> None:
    narrow = set(converted)
    wide: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        inside = [node, *(one for g in _bodies(node) for one in g)]
        for user in inside:
            fixed = _ALWAYS_FLOAT.get(user.op_type, frozenset()) if user in narrow else None
            for index, value in enumerate(user.inputs):
                if value is None or value not in produced or value.dtype != target:
                    continue
                if fixed is not None and index not in fixed:
                    continue
                if user.op_type == "Cast" and user not in narrow:
                    continue  # it takes either type
                if value not in wide:
                    wide[value] = _cast(graph, value, ir.DataType.FLOAT, counts)
                user.replace_input_with(index, wide[value])


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
            yield from attribute.as_graph().subgraphs()


def _restore_output(graph: ir.Graph, value: ir.Value, target: ir.DataType, counts: Counter[str]) -> None:
    name = value.name
    value.name = f"{name}_{target.name.lower()}"
    wide = next(
        (
            use.node.outputs[0]
            for use in value.uses()
            if use.node.op_type == "Cast" and use.node.outputs[0].dtype == ir.DataType.FLOAT
        ),
        None,
    )
    if wide is None or wide.is_graph_output():
        wide = _cast(graph, value, ir.DataType.FLOAT, counts)
    wide.name = name
    wide.shape = value.shape
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = wide


def _float_bytes(model: ir.Model) -> int:
    """The bytes of all float32 constants, in initializers and attributes, in the graph and its subgraphs."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    for node in model.graph.all_nodes():
        tensors += [
            attribute.as_tensor()
            for attribute in node.attributes.values()
            if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref()
        ]
    return sum(t.nbytes for t in tensors if t is not None and t.dtype == ir.DataType.FLOAT)
