"""What the own attention kernel computes, as ONNX Runtime's GroupQueryAttention, for runtimes without it."""

from __future__ import annotations

import onnx_ir as ir

from onnxsmith.graph_passes.matching import int_attribute
from onnxsmith.own_operators import OWN_DOMAIN

__all__ = ["attention_form", "attention_text"]

_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "lengths", "total", "cosine", "sine", "positions",
    "bias", "sinks",
)  # fmt: skip
_POSITIONS = 9
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


def attention_form(node: ir.Node) -> str:
    """The name of a node's form: which inputs and which attributes it has."""
    given = "".join("1" if value is not None else "0" for value in node.inputs)
    return "_".join([given, *sorted(node.attributes)])


def attention_text(node: ir.Node, opset: int) -> str:
    """The function of a form, in ONNX's text."""
    names = [name if value is not None else "" for name, value in zip(_INPUTS, node.inputs, strict=False)]
    rows = bool(int_attribute(node, "rotary_rows"))
    body = [_SIZES]
    inner = [*names, *[""] * (len(_INPUTS) - len(names)), *_NONE_OF, "sequences"]
    if rows:
        body.append(_ROWS)
        inner[7:10] = ["long_cosine", "long_sine", "places"]
    attributes = ", ".join(
        f"{name}: {'float' if attribute.type is ir.AttributeType.FLOAT else 'int'} = @{name}"
        for name, attribute in node.attributes.items()
        if name != "rotary_rows"
    )
    call = f"com.microsoft.GroupQueryAttention <{attributes}> ({', '.join(inner)})"
    body.append(f"  y, present_key, present_value = {call}")
    return (
        f'<domain: "{OWN_DOMAIN}", opset_import: ["": {opset}, "com.microsoft": 1]> '
        f"{node.op_type} <{', '.join(node.attributes)}> "
        f"({', '.join(name or f'absent_{number}' for number, name in enumerate(names))}) "
        "=> (y, present_key, present_value) {\n" + "\n".join(body) + "\n}"
    )
