"""The KV cache in 8 bits, with GroupQueryAttention of ONNX Runtime 1.32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.context import context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.matching import int_attribute, label

__all__ = ["QuantizeCache"]

Floats = npt.NDArray[np.float32]

# Where GroupQueryAttention has what.
_KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _KEY_SCALE, _VALUE_SCALE = 1, 2, 3, 4, 12, 13
_TOP = 127.0
_OTHERS = frozenset({"Attention", "DecoderMaskedMultiHeadAttention", "MultiHeadAttention", "Concat"})


@dataclasses.dataclass(frozen=True)
class _Cached:
    """A GroupQueryAttention with its cache.

    Attributes:
        node: The node.
        heads: Of keys and values.
        size: Of a head.
    """

    node: ir.Node
    heads: int
    size: int

    def observed(self, index: int) -> tuple[str, slice]:
        """The value that keys or values come from, and which of its channels they are."""
        width = self.heads * self.size
        value = self.node.inputs[index]
        if value is not None:
            return value.name or "", slice(0, width)
        packed = self.node.inputs[0]
        assert packed is not None
        begin = int_attribute(self.node, "num_heads", 0) * self.size + (index - 1) * width
        return packed.name or "", slice(begin, begin + width)


class QuantizeCache(GraphPass):
    """Keeps keys and values of past tokens in int8: a quarter of float32's memory for each token.

    Scales come from calibration data: one for each channel of each head, or one for each cache. Inputs and
    outputs of the cache become int8, and whoever runs the model only passes them on. Other operators than
    GroupQueryAttention have no such cache, and a model with them is refused.
    """

    name: ClassVar[str] = "quantize_cache"
    summary: ClassVar[str] = "the KV cache of GroupQueryAttention in 8 bits (ONNX Runtime 1.32)"

    def __init__(
        self, *, scales: Literal["per_channel", "per_tensor"] = "per_channel", headroom: float = 1.1
    ) -> None:
        """Sets the scales.

        Args:
            scales: One for each channel of each head, or one for each cache.
            headroom: The range of the codes, relative to the largest magnitude that the data showed.

        Raises:
            BadInputError: A headroom below 1.
        """
        if not headroom >= 1:
            raise BadInputError(f"pass {self.name}: headroom", got=str(headroom), expected="1 or more")
        self.scales = scales
        self.headroom = headroom

    def apply(self, model: ir.Model) -> Changes:
        """Measures keys and values, then changes the types of the cache.

        Raises:
            PreconditionError: There is no cache that can be kept in 8 bits, or no data.
        """
        found, skipped = _caches(model)
        if not found:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
            raise PreconditionError(
                f"pass {self.name}",
                got=f"no cache that can be kept in 8 bits ({reasons or 'there is no KV cache'})",
                expected="GroupQueryAttention whose past and present are inputs and outputs of the graph",
                remedy="Export with attention=fused; other operators have no 8 bit cache in ONNX Runtime",
            )
        activations = context_of(model).activations
        if activations is None:
            raise PreconditionError(
                f"pass {self.name}",
                got="no calibration data",
                expected="data to measure keys and values on",
                remedy="Give --calibration-data, or the key calibration of the recipe",
            )
        largest: dict[tuple[ir.Node, int], Floats] = {}
        names = list(dict.fromkeys(one.observed(index)[0] for one in found for index in (_KEY, _VALUE)))
        for batch in activations(model, names):
            for one in found:
                for index in (_KEY, _VALUE):
                    seen = _magnitudes(one, index, batch)
                    largest[one.node, index] = np.maximum(largest.get((one.node, index), seen), seen)
        layers: dict[str, dict[str, Any]] = {}
        for one in found:
            scales = [self._scales(one, largest[one.node, index]) for index in (_KEY, _VALUE)]
            self._store(model, one, scales)
            layers[label(one.node)] = {
                "bits": 8,
                "method": self.scales,
                "largest_key": float(largest[one.node, _KEY].max()),
                "largest_value": float(largest[one.node, _VALUE].max()),
            }
        details = {
            "caches": len(found),
            "bytes_per_token": sum(2 * one.heads * one.size for one in found),
            "layers": layers,
            "calibration": dict(context_of(model).calibration),
        }
        return Changes(len(found), details, skipped)

    def _scales(self, one: _Cached, largest: Floats) -> Floats:
        step: Floats = np.maximum(largest * np.float32(self.headroom / _TOP), np.float32(1e-8))
        if self.scales == "per_tensor":
            return np.asarray([step.max()], np.float32)
        return np.asarray(step, np.float32).reshape(1, one.heads, 1, one.size)

    def _store(self, model: ir.Model, one: _Cached, scales: Sequence[Floats]) -> None:
        node = one.node
        node.resize_inputs(max(len(node.inputs), _VALUE_SCALE + 1))
        pairs = ((_KEY_SCALE, "key", scales[0]), (_VALUE_SCALE, "value", scales[1]))
        for index, what, array in pairs:
            name = f"{node.name or node.outputs[0].name}_{what}_scale"
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
            value.const_value = ir.tensor(array.astype(np.float32), name=name)
            model.graph.register_initializer(value)
            node.replace_input_with(index, value)
        kind = "PER_CHANNEL" if self.scales == "per_channel" else "PER_TENSOR"
        for name in ("k_quant_type", "v_quant_type"):
            node.attributes[name] = ir.AttrString(name, kind)
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        past = (node.inputs[_PAST_KEY], node.inputs[_PAST_VALUE])
        for cached in (*past, node.outputs[1], node.outputs[2]):
            assert cached is not None
            cached.type = ir.TensorType(ir.DataType.INT8)


def _caches(model: ir.Model) -> tuple[list[_Cached], dict[str, str]]:
    found: list[_Cached] = []
    skipped: dict[str, str] = {}
    for node in model.graph:
        if node.op_type != "GroupQueryAttention":
            if node.op_type in _OTHERS and _touches_cache(node):
                skipped[label(node)] = f"{node.op_type} has no 8 bit cache"
            continue
        reason = _refusal(node)
        if reason:
            skipped[label(node)] = reason
            continue
        past = node.inputs[_PAST_KEY]
        assert past is not None and past.shape is not None
        found.append(_Cached(node, int(past.shape[1]), int(past.shape[3])))  # type: ignore[arg-type]
    return found, skipped


def _touches_cache(node: ir.Node) -> bool:
    return any(v is not None and (v.name or "").startswith("past_key_values.") for v in node.inputs)


def _refusal(node: ir.Node) -> str:
    if len(node.inputs) <= _PAST_VALUE or len(node.outputs) < 3:
        return "it has no cache"
    for past, present in (
        (node.inputs[_PAST_KEY], node.outputs[1]),
        (node.inputs[_PAST_VALUE], node.outputs[2]),
    ):
        if past is None or not past.is_graph_input() or not present.is_graph_output():
            return "its cache is not an input and an output of the graph"
        if len(list(past.uses())) != 1 or list(present.uses()):
            return "something else reads its cache"
        if past.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return f"its cache is {past.dtype} already"
        if past.shape is None or not all(isinstance(past.shape[axis], int) for axis in (1, 3)):
            return "the shape of its cache is not known"
    return ""


def _magnitudes(one: _Cached, index: int, batch: Any) -> Floats:
    """(heads, size): the largest magnitude of each channel of keys or values in a batch."""
    name, channels = one.observed(index)
    array = np.abs(np.asarray(batch[name], np.float32))[..., channels].reshape(-1, one.heads, one.size)
    seen: Floats = array.max(0, initial=0)
    if index == _KEY and int_attribute(one.node, "do_rotary", 0):
        # Rotated inside, two channels at a time, which keeps the length of the pair and no more.
        half = one.size // 2
        if int_attribute(one.node, "rotary_interleaved", 0):
            pair = np.hypot(seen[:, 0::2], seen[:, 1::2])
            seen = np.repeat(pair, 2, axis=1)
        else:
            pair = np.hypot(seen[:, :half], seen[:, half : 2 * half])
            seen = np.concatenate([pair, pair, seen[:, 2 * half :]], axis=1)
    return seen
