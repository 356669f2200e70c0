"""What the kernels of this project compute, in operators of ONNX, for runtimes that do not have them.

A node of a model that defines a function of its domain, name and overload is computed by a kernel where one
is registered, and by the function elsewhere (ONNX Runtime 1.18 and later). The functions unpack a weight and
multiply in float32: activations are not rounded. Sizes are attributes, so one function serves all weights of
a form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.graph_passes.attention_function import attention_form, attention_text, heads_text
from onnxsmith.graph_passes.matching import input_of, int_attribute
from onnxsmith.own_operators import FLOAT_BITS, OWN_DOMAIN, own_nodes

__all__ = ["IR_VERSION", "function_refusal", "inline_functions", "make_callable", "overload_of", "settle"]

IR_VERSION = 10
"""The first with overloads."""
_DEFAULT_DOMAINS = ("", "ai.onnx")

_SIZES = """
  k = Constant <value_int: int = @K> ()
  n = Constant <value_int: int = @N> ()
  size = Constant <value_int: int = @block_size> ()
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  columns = Reshape (k, one)
  row_count = Reshape (n, one)
  block = Reshape (size, one)
  blocks = Div (columns, block)
  block_shape = Concat <axis = 0> (rest, blocks, block)
  number_shape = Concat <axis = 0> (rest, blocks, one)
  in_tiles = Constant <value_ints = [0, 0, 16, 4]> ()
  split = Reshape (B, in_tiles)
  rows = Transpose <perm = [0, 2, 1, 3]> (split)
  turned_scales = Transpose <perm = [0, 2, 1]> (scales)
"""
_FLOAT_SIZES = """
  k = Constant <value_int: int = @K> ()
  n = Constant <value_int: int = @N> ()
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  columns = Reshape (k, one)
  row_count = Reshape (n, one)
"""
_FLOAT_PRODUCT = """
  lying = Transpose <perm = [1, 0, 2]> (B)
  lying_shape = Concat <axis = 0> (columns, rest)
  wide = Reshape (lying, lying_shape)
  right = Slice (wide, zero, row_count, one)
  product = MatMul (A, right)
"""
_OFFSETS = "  turned_offsets = Transpose <perm = [0, 2, 1]> (offsets)"
# Rows before anything of them is unpacked; those that fill the last tile are none, for negative ids too.
_PICK = """
  width = Constant <value_ints = [{width}]> ()
  bytes_of_columns = Mul (columns, width)
  eight = Constant <value_ints = [8]> ()
  bytes = Div (bytes_of_columns, eight)
  row_shape = Concat <axis = 0> (rest, bytes)
  flat = Reshape (rows, row_shape)
  present = Slice (flat, zero, row_count, zero)
  wanted = Reshape (ids, rest)
  picked = Gather <axis = 0> (present, wanted)
  words = Constant <value_ints = [0, -1, 1, 4]> ()
  chosen = Reshape (picked, words)
  table = Concat <axis = 0> (rest, blocks)
"""
_PICK_NUMBERS = """
  {name}_rows = Reshape (turned_{name}, table)
  present_{name} = Slice ({name}_rows, zero, row_count, zero)
  chosen_{name} = Gather <axis = 0> (present_{name}, wanted)
"""
_NUMBERS = """
  float_{name} = Cast <to = 1> ({source}_{name})
  each_{name} = Reshape (float_{name}, number_shape)
"""
_CODES: Mapping[int, str] = {
    8: "  codes = Cast <to = 1> ({rows})",
    # The low half without BitwiseAnd, which came with opset 18.
    4: """
  four = Constant <value = uint8 {{4}}> ()
  high = BitShift <direction = "RIGHT"> ({rows}, four)
  moved = BitShift <direction = "LEFT"> ({rows}, four)
  low = BitShift <direction = "RIGHT"> (moved, four)
  third = Constant <value_ints = [3]> ()
  low_part = Unsqueeze (low, third)
  high_part = Unsqueeze (high, third)
  both = Concat <axis = 3> (low_part, high_part)
  codes = Cast <to = 1> (both)
""",
}
_WEIGHTS: Mapping[str, str] = {
    "middle": """
  middle = Constant <value_float = {middle}.0> ()
  centred = Sub (blocked, middle)
  weights = Mul (centred, each_scales)
""",
    "zero_points": """
  centred = Sub (blocked, each_offsets)
  weights = Mul (centred, each_scales)
""",
    "minimums": """
  scaled = Mul (blocked, each_scales)
  weights = Add (scaled, each_offsets)
""",
}
_PRODUCT = """
  matrix_shape = Concat <axis = 0> (rest, columns)
  matrix = Reshape (weights, matrix_shape)
  present = Slice (matrix, zero, row_count, zero)
  right = Transpose <perm = [1, 0]> (present)
  product = MatMul (A, right)
"""
_HALVES = """
  two = Constant <value_ints = [2]> ()
  half = Div (row_count, two)
  gate = Slice ({whole}, zero, half, rest)
  up = Slice ({whole}, half, row_count, rest)
"""
_ACTIVATIONS: Mapping[str, str] = {
    "silu": """
  part = Sigmoid (gate)
  active = Mul (gate, part)
""",
    "gelu": """
  root = Constant <value_float = 0.7071067811865476> ()
  scaled_gate = Mul (gate, root)
  error = Erf (scaled_gate)
  unit = Constant <value_float = 1.0> ()
  lifted = Add (error, unit)
  point_five = Constant <value_float = 0.5> ()
  halved = Mul (gate, point_five)
  active = Mul (halved, lifted)
""",
    "gelu_tanh": """
  factor = Constant <value_float = 0.044715> ()
  square = Mul (gate, gate)
  cube = Mul (square, gate)
  bent = Mul (cube, factor)
  inner = Add (gate, bent)
  root = Constant <value_float = 0.7978845608028654> ()
  argument = Mul (inner, root)
  tangent = Tanh (argument)
  unit = Constant <value_float = 1.0> ()
  lifted = Add (tangent, unit)
  point_five = Constant <value_float = 0.5> ()
  halved = Mul (gate, point_five)
  active = Mul (halved, lifted)
""",
}
_LOOKUP = """
  ids_shape = Shape (ids)
  whole_shape = Concat <axis = 0> (ids_shape, columns)
  Y = Reshape (weights, whole_shape)
"""


# The inputs before those of the weight.
_BEFORE: Mapping[str, tuple[str, ...]] = {
    "MatMulPacked": ("A",),
    "GatherPacked": ("ids",),
    "NormMatMulPacked": ("x", "skip", "norm"),
}
_ATTENTION: Mapping[str, Callable[[ir.Node, int], str]] = {
    "GroupQueryAttention": attention_text,
    "MultiHeadAttention": heads_text,
}
_NORM = """
  total = Add (x, skip)
  power = Mul (total, total)
  mean = {mean}
  tiny = Constant <value_float: float = @epsilon> ()
  raised = Add (mean, tiny)
  deviation = Sqrt (raised)
  level = Div (total, deviation)
  A = Mul (level, norm)
"""
# From this operator set on, axes are an input.
_AXES_AS_INPUT = 18
# Of which the other operators in these functions are: Unsqueeze with axes as an input.
_LEAST_OPSET = 13
_MEANS: Mapping[bool, str] = {
    False: "ReduceMean <axes = [-1], keepdims = 1> (power)",
    True: "ReduceMean <keepdims = 1> (power, rest)",
}


def overload_of(node: ir.Node) -> str:
    """The name of a node's form: one function computes all nodes of a form."""
    if node.op_type in _ATTENTION:
        return attention_form(node)
    parts = [str(int_attribute(node, "bits")), _kind(node)]
    activation = node.attributes.get("activation")
    if activation is not None and activation.as_string() != "none":
        parts.append(activation.as_string())
        if not int_attribute(node, "gated", 1):
            parts.append("alone")
    if _weight_input(node, 3) is not None:
        parts.append("bias")
    if _weight_input(node, 4) is not None:
        parts.append("residual")
    return "_".join(parts)


def function_refusal(model: ir.Model) -> str:
    """Why a model can have no such functions, nor what calls them; an empty string where it can."""
    opset = max(model.opset_imports.get(domain, 0) for domain in _DEFAULT_DOMAINS)
    if opset >= _LEAST_OPSET:
        return ""
    return f"the operator set is {opset}; expected {_LEAST_OPSET} or later (convert_opset changes it)"


def settle(model: ir.Model) -> None:
    """What comes behind a pass that made or changed nodes of the kernels' domain.

    Args:
        model: Changed in place: without what nothing reads any more, with the domain, and with a function for
            each of its nodes.
    """
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault(OWN_DOMAIN, 1)
    make_callable(model)


def make_callable(model: ir.Model) -> int:
    """Gives each node of the kernels' domain the function that computes it where there are no kernels.

    Args:
        model: Changed in place. Functions of that domain that no node calls any more are taken away.

    Returns:
        How many functions the model has for it.
    """
    opset = max(model.opset_imports.get(domain, 0) for domain in _DEFAULT_DOMAINS)
    made: set[tuple[str, str, str]] = set()
    for node in model.graph.all_nodes():
        if node.domain != OWN_DOMAIN:
            continue
        node.overload = overload_of(node)
        key = node.op_identifier()
        if key not in made:
            model.functions[key] = _function(node, opset)
            made.add(key)
    # Forms that a pass has changed into others.
    used = {node.op_identifier() for node in own_nodes(model)}
    for key in [key for key in model.functions if key[0] == OWN_DOMAIN and key not in used]:
        del model.functions[key]
    if made:
        model.ir_version = max(model.ir_version, IR_VERSION)
    return len(made)


def inline_functions(model: ir.Model) -> None:
    """Puts the bodies of functions in the place of the nodes that call them, but for those of kernels.

    With the body in its place, a runtime would not find the node that it has a kernel for.
    """
    if any(function.domain != OWN_DOMAIN for function in model.functions.values()):
        common.InlinePass(lambda function: function.domain != OWN_DOMAIN)(model)


def _kind(node: ir.Node) -> str:
    if int_attribute(node, "bits") == FLOAT_BITS:
        return "floats"
    offsets = _weight_input(node, 2)
    if offsets is None:
        return "middle"
    return "zero_points" if offsets.dtype is ir.DataType.UINT8 else "minimums"


def _weight_input(node: ir.Node, index: int) -> ir.Value | None:
    """Of codes, scales, offsets, bias and residual."""
    return input_of(node, len(_BEFORE[node.op_type]) + index)


def _function(node: ir.Node, opset: int) -> ir.Function:
    import onnx.parser

    make = _ATTENTION.get(node.op_type, _text)
    proto = onnx.parser.parse_function(make(node, opset))
    proto.overload = node.overload
    return ir.serde.deserialize_function(proto)


def _text(node: ir.Node, opset: int) -> str:
    lookup = node.op_type == "GatherPacked"
    norm = node.op_type == "NormMatMulPacked"
    floats = int_attribute(node, "bits") == FLOAT_BITS
    body = [_FLOAT_SIZES, _FLOAT_PRODUCT] if floats else _unpacked(node)
    if norm:
        # Behind the constants, and before the product.
        body.insert(1, _NORM.format(mean=_MEANS[opset >= _AXES_AS_INPUT]))
    body += [_LOOKUP] if lookup else _result(node)
    before = _BEFORE[node.op_type]
    names = ["B", "scales", "offsets", "bias", "residual"][: len(node.inputs) - len(before)]
    given = [*before, *names]
    attributes = ", ".join(node.attributes)
    return (
        f'<domain: "{OWN_DOMAIN}", opset_import: ["": {opset}]> {node.op_type} <{attributes}> '
        f"({', '.join(given)}) => (Y{', total' if norm else ''}) {{\n" + "\n".join(body) + "\n}"
    )


def _unpacked(node: ir.Node) -> list[str]:
    """From the codes to the product, or for a lookup to its weights."""
    bits, kind = int_attribute(node, "bits"), _kind(node)
    names = ["scales", *(["offsets"] if kind != "middle" else [])]
    lookup = node.op_type == "GatherPacked"
    body = [_SIZES, *([_OFFSETS] if kind != "middle" else [])]
    if lookup:
        body += [_PICK.format(width=bits), *(_PICK_NUMBERS.format(name=name) for name in names)]
    source = "chosen" if lookup else "turned"
    body += [_NUMBERS.format(name=name, source=source) for name in names]
    body.append(_CODES[bits].format(rows="chosen" if lookup else "rows"))
    body += ["  blocked = Reshape (codes, block_shape)", _WEIGHTS[kind].format(middle=1 << (bits - 1))]
    return body if lookup else [*body, _PRODUCT]


def _result(node: ir.Node) -> list[str]:
    """From the product to the result: bias, activation and what is added to it."""
    body, whole = [], "product"
    if _weight_input(node, 3) is not None:
        body.append("  biased = Add (product, bias)")
        whole = "biased"
    named = node.attributes.get("activation")
    activation = "none" if named is None else named.as_string()
    if activation != "none" and not int_attribute(node, "gated", 1):
        body += [f"  gate = Identity ({whole})", _ACTIVATIONS[activation]]
        whole = "active"
    elif activation != "none":
        body += [_HALVES.format(whole=whole), _ACTIVATIONS[activation], "  gated_up = Mul (active, up)"]
        whole = "gated_up"
    if _weight_input(node, 4) is not None:
        return [*body, f"  Y = Add ({whole}, residual)"]
    return [*body, f"  Y = Identity ({whole})"]
