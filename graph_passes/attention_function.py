"""What the own attention kernels compute, as ONNX Runtime's operators, for runtimes without them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxsmith.graph_passes.matching import int_attribute
from onnxsmith.own_operators import OWN_DOMAIN

__all__ = ["attention_form", "attention_text", "heads_text"]

_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "lengths", "total", "cosine", "sine", "positions",
    "bias", "sinks",
)  # fmt: skip
_POSITIONS = 9
# From this operator set on, Split is told how many parts it makes.
_SPLIT_INTO_PARTS = 18
# Behind them: scales of an integer cache and weights of norms, which the kernel has not.
_NONE_OF = ("",) * 4
_SIZES = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  size = Shape (query)
  batch = Gather (size, zero)
  sequence = Gather (size, one)
  narrow_sequence = Cast <to = 6> (sequence)
  sequences = Expand (narrow_sequence, batch)
"""
# A row of angles for each token: its place among them is its position, and the table is made long enough.
_ROWS = """
  batch_and_sequence = Concat <axis = 0> (batch, sequence)
  start = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  none = Constant <value_ints = [0, 0]> ()
  tokens = Mul (batch, sequence)
  token = Squeeze (tokens)
  counted = Range (start, token, step)
  places = Reshape (counted, batch_and_sequence)
  flat = Constant <value_ints = [-1]> ()
  wide_total = Cast <to = 7> (total)
  more = Reshape (wide_total, flat)
  last = Constant <value_ints = [0]> ()
  pads = Concat <axis = 0> (none, more, last)
  long_cosine = Pad (cosine, pads)
  long_sine = Pad (sine, pads)
"""
# Of MultiHeadAttention; without key and value, the query holds all three.
_HEADS_INPUTS = ("query", "key", "value", "bias", "attention_bias")
# A row of the bias for each query, which ONNX Runtime's operator wants.
_ROWS_OF_BIAS = """
  one = Constant <value_ints = [1]> ()
  query_size = Shape ({query})
  queries = Gather (query_size, one)
  key_size = Shape ({key})
  keys = Gather (key_size, one)
  square = Concat <axis = 0> (one, one, queries, keys)
  bias_of_scores = Expand (attention_bias, square)
"""


def attention_form(node: ir.Node) -> str:
    """The name of a node's form: which inputs and which attributes it has."""
    given = "".join("1" if value is not None else "0" for value in node.inputs)
    return "_".join([given, *sorted(node.attributes)])


def attention_text(node: ir.Node, opset: int) -> str:
    """The function of a form of GroupQueryAttention, in ONNX's text."""
    names = [name if value is not None else "" for name, value in zip(_INPUTS, node.inputs, strict=False)]
    rows = bool(int_attribute(node, "rotary_rows"))
    body = [_SIZES]
    inner = [*names, *[""] * (len(_INPUTS) - len(names)), *_NONE_OF, "sequences"]
    if rows:
        body.append(_ROWS)
        inner[7:10] = ["long_cosine", "long_sine", "places"]
    attributes = _passed_on(node, but="rotary_rows")
    call = f"com.microsoft.GroupQueryAttention <{attributes}> ({', '.join(inner)})"
    body.append(f"  y, present_key, present_value = {call}")
    return _function(node, opset, names, ["y", "present_key", "present_value"], body)


def heads_text(node: ir.Node, opset: int) -> str:
    """The function of a form of MultiHeadAttention, in ONNX's text."""
    names = [
        name if value is not None else "" for name, value in zip(_HEADS_INPUTS, node.inputs, strict=False)
    ]
    inner = [*names, *[""] * (len(_HEADS_INPUTS) - len(names))]
    body = []
    if not inner[1]:
        # Before opset 18, as many equal parts as outputs were what Split did by itself.
        parts = "axis = -1, num_outputs = 3" if opset >= _SPLIT_INTO_PARTS else "axis = -1"
        inner[:3] = ["query_part", "key_part", "value_part"]
        body.append(f"  query_part, key_part, value_part = Split <{parts}> (query)")
    if inner[4]:
        body.append(_ROWS_OF_BIAS.format(query=inner[0], key=inner[1]))
        inner[4] = "bias_of_scores"
    # Between the bias of the operands and that of the scores stands a mask of padding.
    operands = ", ".join([*inner[:4], "", inner[4]]).rstrip(", ")
    body.append(f"  y = com.microsoft.MultiHeadAttention <{_passed_on(node)}> ({operands})")
    return _function(node, opset, names, ["y"], body)


def _passed_on(node: ir.Node, *, but: str = "") -> str:
    """Attributes of the operator inside, which are those of the node."""
    return ", ".join(
        f"{name}: {'float' if attribute.type is ir.AttributeType.FLOAT else 'int'} = @{name}"
        for name, attribute in node.attributes.items()
        if name != but
    )


def _function(
    node: ir.Node, opset: int, names: Sequence[str], outputs: Sequence[str], body: Sequence[str]
) -> str:
    inputs = ", ".join(name or f"absent_{number}" for number, name in enumerate(names))
    return (
        f'<domain: "{OWN_DOMAIN}", opset_import: ["": {opset}, "com.microsoft": 1]> '
        f"{node.op_type} <{', '.join(node.attributes)}> ({inputs}) "
        f"=> ({', '.join(outputs)}) {{\n" + "\n".join(body) + "\n}"
    )
