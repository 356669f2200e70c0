"""The places in a model that hold tensors, and how large those are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Slot", "Substitute", "graphs", "identity", "slots", "total_bytes", "weight_slots"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place in a model that holds a tensor.

    Attributes:
        tensor: What it holds.
        replace: Puts another tensor there.
        is_initializer: True for initializers, False for tensors in attributes.
    """

    tensor: ir.TensorProtocol
    replace: Callable[[Any], None]
    is_initializer: bool


@dataclasses.dataclass(frozen=True)
class Substitute:
    """What stands in a slot while the model is serialised."""

    slot: Slot
    tensor: Any


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """All graphs of a model; ``model.graphs()`` leaves functions out."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def slots(model: ir.Model) -> Iterator[Slot]:
    """All tensors of a model, in an order that depends only on the model."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield Slot(value.const_value, functools.partial(setattr, value, "const_value"), True)
        for node in graph:
            if node.attributes:
                yield from _attribute_slots(node.attributes)
    for function in model.functions.values():
        yield from _attribute_slots(function.attributes)


def _attribute_slots(attributes: Any) -> Iterator[Slot]:
    import onnx_ir

    for name, attribute in list(attributes.items()):
        if attribute.is_ref() or attribute.value is None:
            continue
        if attribute.type == onnx_ir.AttributeType.TENSOR:

            def replace(new: Any, name: str = name, old: ir.Attr = attribute) -> None:
                attributes[name] = (
                    old if new is old.value else onnx_ir.AttrTensor(name, new, doc_string=old.doc_string)
                )

            yield Slot(attribute.value, replace, False)
        elif attribute.type == onnx_ir.AttributeType.TENSORS:
            for index, tensor in enumerate(attribute.value):

                def replace_at(new: Any, name: str = name, index: int = index) -> None:
                    present = attributes[name]
                    tensors = [*present.value[:index], new, *present.value[index + 1 :]]
                    attributes[name] = onnx_ir.AttrTensors(name, tensors, doc_string=present.doc_string)

                yield Slot(tensor, replace_at, False)


def weight_slots(model: ir.Model) -> list[Slot]:
    """The tensors that may go to the data file: initializers, and attributes that come from one."""
    import onnx_ir

    return [
        slot
        for slot in slots(model)
        if slot.is_initializer or isinstance(slot.tensor, onnx_ir.ExternalTensor)
    ]


def total_bytes(tensors: Iterable[Any]) -> int:
    """The bytes of tensors, those that share their data counted once."""
    import onnx_ir

    return sum(
        # Strings have no size before they are computed; onnx_ir raises where such a tensor is lazy.
        {
            identity(tensor): tensor.nbytes
            for tensor in tensors
            if tensor.dtype != onnx_ir.DataType.STRING or isinstance(tensor, onnx_ir.StringTensor)
        }.values()
    )


def identity(tensor: Any) -> tuple[Any, ...]:
    """Equal for tensors that are known to have the same content without looking at it."""
    import onnx_ir

    if isinstance(tensor, onnx_ir.ExternalTensor):
        return (tensor.path, tensor.offset or 0, tensor.nbytes)
    return (id(tensor),)
