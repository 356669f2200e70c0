"""Graphs without their random numbers: only those can be compared with PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxsmith.package import ModelPackage

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["draws_numbers", "silenced"]

_NORMAL = frozenset({"RandomNormal", "RandomNormalLike"})
_UNIFORM = frozenset({"RandomUniform", "RandomUniformLike"})


def draws_numbers(package: ModelPackage) -> bool:
    """Whether a graph of the package has random numbers in it, so that two runs of it differ."""
    return any(
        node.op_type in _NORMAL | _UNIFORM and node.domain in ("", "ai.onnx")
        for component in package.components.values()
        for node in component.model.graph.all_nodes()
    )


def silenced(package: ModelPackage) -> ModelPackage:
    """The package with the mean of the distribution in the place of each number that it draws."""
    quiet = package.derive()
    for component in quiet.components.values():
        component.path = None
        for node in component.model.graph.all_nodes():
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type in _NORMAL:
                _center(node)
            elif node.op_type in _UNIFORM:
                middle = (_float(node, "low", 0.0) + _float(node, "high", 1.0)) / 2
                _set(node, low=middle, high=middle)
    return quiet


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _set(node: ir.Node, **values: float) -> None:
    import onnx_ir as ir

    for name, value in values.items():
        node.attributes[name] = ir.AttrFloat32(name, value)


def _center(node: ir.Node) -> None:
    """Takes the spread away behind the node, because ONNX Runtime dies of a spread of zero."""
    import numpy as np
    import onnx_ir as ir

    graph, drawn = node.graph, node.outputs[0]
    assert graph is not None
    kind = drawn.dtype or ir.DataType.FLOAT
    before = list(drawn.uses())
    result, last = drawn, node
    for operator, number in (("Mul", 0.0), ("Add", _float(node, "mean", 0.0))):
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(number, kind.numpy()), name=None)})
        new = ir.node(operator, [result, constant.outputs[0]])
        graph.insert_after(last, [constant, new])
        result, last = new.outputs[0], new
        result.type, result.shape = drawn.type, drawn.shape
    for user, index in before:
        user.replace_input_with(index, result)
