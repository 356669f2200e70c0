"""What an exporter makes, passes change and runtimes open: a model in ONNX with all that belongs to it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.own_operators import rounds_weights

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "COMPONENT_ORDER",
    "MAIN",
    "TEXT_GENERATION",
    "CachePair",
    "Component",
    "ModelPackage",
    "StepRecord",
    "TensorSpec",
    "cache_is_shareable",
    "cache_pairs",
    "depends_on_values",
    "reads_lengths",
]

TEXT_GENERATION = "text-generation"
# The component of a package that has one.
MAIN = "model"
# Those of packages that have several, in the order in which they run.
COMPONENT_ORDER = (
    MAIN,
    "text_model",
    "vision_model",
    "audio_model",
    "encoder_model",
    "decoder_model",
    "decoder_model_merged",
    "decoder_with_past_model",
    "decoder_postnet_and_vocoder",
)

_BLOCK_QUANTIZED = frozenset({"GatherBlockQuantized", "MatMulBnb4", "MatMulNBits"})
_INTEGER_OPERATORS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
    }
)
_PAST = re.compile(r"past_key_values\.(.+)")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """The name, element type and axes of one input or output.

    Attributes:
        name: The value's name in the graph.
        dtype: A numpy name such as ``float32`` (``bfloat16`` and the 4 and 8 bit types as in ``ml_dtypes``).
        shape: One entry per axis: a size, the name of a dynamic axis, or None for an unnamed dynamic axis.
            None instead of a tuple where even the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        axes = "?" if self.shape is None else ", ".join("?" if a is None else str(a) for a in self.shape)
        return f"{self.name}: {self.dtype}[{axes}]"


@dataclasses.dataclass(frozen=True)
class CachePair:
    """One tensor of a KV cache: the input that takes it and the output that gives it back, longer.

    Attributes:
        past: The input, of shape (batch, kv heads, past length, head size).
        present: The output, of shape (batch, kv heads, total length, head size).
    """

    past: TensorSpec
    present: TensorSpec


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One thing that was done to a model, for the manifest.

    Attributes:
        name: ``export`` or the name of a pass.
        parameters: Every parameter with the value that was used, defaults included.
        seconds: Wall time.
        details: What it did: counts, what was skipped and why.
    """

    name: str
    parameters: Mapping[str, Any]
    seconds: float
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Component:
    """One ONNX graph of a package.

    Attributes:
        model: The graph. Its weights stay on disk, memory-mapped, until something reads them.
        path: The file that holds exactly this model, or None where the model was changed since.
    """

    model: ir.Model
    path: Path | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, without initializers."""
        initializers = self.model.graph.initializers
        return tuple(_spec(value) for value in self.model.graph.inputs if value.name not in initializers)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs."""
        return tuple(_spec(value) for value in self.model.graph.outputs)


@dataclasses.dataclass
class ModelPackage:
    """A model in ONNX, with what a deployment needs besides the graph.

    Attributes:
        components: The graphs by name; ``model`` where there is one.
        task: The Hugging Face task name, such as ``text-generation``; None where unknown.
        files: Tokenizer, processor and configuration files: file name to content.
        source: Where the model came from, for the manifest.
        steps: What was done to it so far, oldest first.
    """

    components: dict[str, Component]
    task: str | None = None
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()

    @property
    def main(self) -> Component:
        """The only component.

        Raises:
            KeyError: There are several.
        """
        if len(self.components) != 1:
            raise KeyError(f"the package has the components {', '.join(self.components)}; name one of them")
        return next(iter(self.components.values()))

    def only(self, name: str) -> ModelPackage:
        """The package with one of its components alone, which is shared and not copied."""
        return dataclasses.replace(self, components={name: self.components[name]})

    @property
    def precision(self) -> str:
        """What bounds the accuracy.

        ``int4`` or ``int8`` where operators compute with quantized weights, else the floating-point type
        that most bytes of the weights have.
        """
        bits: set[int] = set()
        floats: Counter[str] = Counter({"float32": 0})
        for component in self.components.values():
            for node in component.model.graph.all_nodes():
                if node.op_type in _BLOCK_QUANTIZED or rounds_weights(node):
                    attribute = node.attributes.get("bits")
                    bits.add(4 if attribute is None else attribute.as_int())
                elif node.op_type in _INTEGER_OPERATORS or "kv_cache_bit_width" in node.attributes:
                    bits.add(8)
            for value in component.model.graph.initializers.values():
                if (
                    value.dtype is not None
                    and value.dtype.is_floating_point()
                    and value.const_value is not None
                ):
                    floats[str(value.dtype.numpy())] += value.const_value.nbytes
        if bits:
            return "int4" if min(bits) <= 4 else "int8"
        return floats.most_common(1)[0][0]

    def derive(self, **changes: Any) -> ModelPackage:
        """A package with the same weights and fields, but graphs of its own.

        Graph structure is copied, tensors are shared, so this costs no weight memory.
        """
        components = {
            name: Component(component.model.clone(), component.path)
            for name, component in self.components.items()
        }
        return dataclasses.replace(self, components=components, files=dict(self.files), **changes)


def cache_pairs(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> tuple[CachePair, ...]:
    """Finds the KV cache in a signature, by the names that optimum and onnxruntime-genai agree on.

    ``past_key_values.3.key`` goes with ``present.3.key``. Returns no pairs where there is no cache, and none
    for the decoder of an encoder-decoder, which needs more than a cache and tokens.
    """
    if any(".encoder." in spec.name for spec in inputs):
        return ()
    by_name = {spec.name: spec for spec in outputs}
    return tuple(_pairs(inputs, by_name))


def cache_is_shareable(model: ir.Model) -> bool:
    """Whether past and present of a graph's KV cache may be one buffer, longer than what is in it.

    So it is where each cache input goes to a GroupQueryAttention and nowhere else, and what that gives back
    is the cache output: the operator extends a buffer in place, and reads how much of it is valid from other
    inputs. A graph that concatenates, or asks for the shape of its cache, needs the exact length.
    """
    outputs = {value.name: value for value in model.graph.outputs}
    found = 0
    for value in model.graph.inputs:
        match = _PAST.fullmatch(value.name or "")
        if match is None:
            continue
        presents = _made_in_branches(outputs.get(f"present.{match[1]}"))
        uses = list(value.uses())
        if not presents or len(uses) != len(presents):
            return False
        for node, index in uses:
            # Inputs 3 and 4 are past key and value; outputs 1 and 2 what becomes of them.
            if node.op_type != "GroupQueryAttention" or index not in (3, 4) or len(node.outputs) < 3:
                return False
            present = node.outputs[index - 2]
            if present not in presents or any(n.op_type == "Shape" for n, _ in present.uses()):
                return False
        found += 1
    return found > 0


def reads_lengths(model: ir.Model) -> bool:
    """Whether attention takes the first tokens of each row, as many as the mask has, for the row's.

    So it is where GroupQueryAttention has lengths that follow from what is in a mask, as in graphs of
    onnxruntime-genai. Rows may be padded on the right, not on the left.
    """
    return any(
        node.op_type == "GroupQueryAttention" and len(node.inputs) > 5 and depends_on_values(node.inputs[5])
        for node in model.graph.all_nodes()
    )


def depends_on_values(value: ir.Value | None) -> bool:
    """Whether a value depends on what is in an input of its graph, and not on shapes alone."""
    pending = [value]
    seen: set[ir.Value | None] = set()
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        node = one.producer()
        if node is not None:
            pending += () if node.op_type in ("Shape", "Size") else node.inputs
        elif one.const_value is None:
            return True
    return False


def _made_in_branches(value: ir.Value | None) -> set[ir.Value]:
    """A value, or what each branch of the If that makes it gives for it."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "If":
        return set() if value is None else {value}
    branches = [attribute.as_graph() for attribute in node.attributes.values()]
    found: set[ir.Value] = set()
    for branch in branches:
        found |= _made_in_branches(branch.outputs[value.index() or 0])
    return found


def _pairs(inputs: tuple[TensorSpec, ...], outputs: Mapping[str, TensorSpec]) -> Iterator[CachePair]:
    for spec in inputs:
        match = _PAST.fullmatch(spec.name)
        present = outputs.get(f"present.{match[1]}") if match else None
        if present is not None:
            yield CachePair(spec, present)


def _spec(value: ir.Value) -> TensorSpec:
    dtype = "unknown" if value.dtype is None else str(value.dtype.numpy())
    if value.shape is None:
        return TensorSpec(value.name or "", dtype, None)
    axes = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    known = _cache_axes(value) if len(axes) == 4 else None
    if known is not None:
        heads, size = (
            own if isinstance(own, int) else found for own, found in zip(axes[1::2], known, strict=True)
        )
        axes = (axes[0], heads, axes[2], size)
    return TensorSpec(value.name or "", dtype, axes)


def _cache_axes(value: ir.Value) -> tuple[int, int] | None:
    """Heads and their size of what GroupQueryAttention keeps, where its operands say so.

    onnxruntime-genai's builder gives the size of a head a name, as if it were free.
    """
    readers = [node for node, index in value.uses() if index in (3, 4)]
    producer = value.producer()
    for node in (*readers, *(() if producer is None else (producer,))):
        if node.op_type != "GroupQueryAttention" or not node.inputs or node.inputs[0] is None:
            continue
        heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        width = node.inputs[0].shape[-1] if node.inputs[0].shape else None
        parts = heads if node.inputs[1] is not None else heads + 2 * kv_heads
        if isinstance(width, int) and width % parts == 0:
            return kv_heads, width // parts
    return None
