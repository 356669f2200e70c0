"""Taking units out of a graph: every weight, constant, shape and attribute that they are part of shrinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import PassError
from onnxsmith.graph_passes.channel_attention import rotary_heads
from onnxsmith.graph_passes.channel_rules import WITH_CONSTANTS
from onnxsmith.graph_passes.channels import ChannelGraph, Side, spread_over
from onnxsmith.graph_passes.computed_shapes import Element, shape_elements
from onnxsmith.graph_passes.matching import constant_integers, int_attribute, label
from onnxsmith.graph_passes.weights import constant_of

__all__ = ["remove_units"]

Ids = npt.NDArray[np.int64]
Kept = npt.NDArray[np.bool_]


def remove_units(model: ir.Model, graph: ChannelGraph, units: Collection[int]) -> None:
    """Removes units, in place.

    Args:
        model: The model whose channels were followed.
        graph: The channels.
        units: Those that go; none of them blocked.

    Raises:
        PassError: Some value would have to lose a part that is not whole rows of it.
    """
    if units:
        _Removal(model, graph, units).run()


@dataclasses.dataclass(frozen=True)
class _Change:
    """What stays of a value: for each axis which positions, None where all do."""

    axes: tuple[Kept | None, ...]

    def sizes(self) -> dict[int, int]:
        """Axis to its new size, for those that shrink."""
        return {axis: int(kept.sum()) for axis, kept in enumerate(self.axes) if kept is not None}


class _Removal:
    def __init__(self, model: ir.Model, graph: ChannelGraph, units: Collection[int]) -> None:
        self._model = model
        self._graph = graph
        gone = np.zeros(len(graph.labels) + 1, bool)
        gone[: len(graph.labels)] = np.isin(graph.labels, np.fromiter(units, np.int64))
        # The last one is for -1.
        self._gone = gone
        self._changes: dict[ir.Value, _Change] = {}
        self._weights: dict[tuple[ir.Value, tuple[bytes | None, ...]], ir.Value] = {}

    def run(self) -> None:
        for value, ids in self._graph.ids.items():
            change = self._change(value, ids)
            if any(kept is not None for kept in change.axes):
                self._changes[value] = change
        sides: dict[ir.Node, list[Side]] = {}
        for side in self._graph.sides:
            sides.setdefault(side.node, []).append(side)
        for node in list(self._model.graph):
            if node in sides:
                self._weight(node, sides[node])
            if any(value in self._changes for value in (*node.inputs, *node.outputs) if value is not None):
                self._node(node)
        for value in self._changes:
            if value.shape is not None:
                sizes = self._sizes(value)
                value.shape = ir.Shape([sizes.get(axis, dim) for axis, dim in enumerate(value.shape)])
        common.RemoveUnusedNodesPass()(self._model)

    def _change(self, value: ir.Value, ids: Ids) -> _Change:
        stays = ~self._gone[ids]
        axes: list[Kept | None] = []
        whole = np.ones((1,) * ids.ndim, bool)
        for axis in range(ids.ndim):
            others = tuple(other for other in range(ids.ndim) if other != axis)
            kept = np.asarray(stays.any(others))
            axes.append(None if kept.all() else kept)
            shape = [1] * ids.ndim
            shape[axis] = -1
            whole = whole & kept.reshape(shape)
        if not np.array_equal(np.broadcast_to(whole, stays.shape), stays) or not stays.any():
            raise PassError(
                f"pruning: value {value.name!r}",
                got="parts that go which are not whole rows of it",
                expected="units that leave a smaller tensor",
            )
        if axes and axes[0] is not None and ids.shape[0] == 1:
            raise PassError(
                f"pruning: value {value.name!r}", got="all of it goes", expected="some units left"
            )
        return _Change(tuple(axes))

    def _sizes(self, value: ir.Value) -> dict[int, int]:
        """The sizes of axes that shrink; one with a name gets its size from elsewhere."""
        dims = list(value.shape or ())
        return {
            axis: size
            for axis, size in self._changes[value].sizes().items()
            if axis >= len(dims) or isinstance(dims[axis], int)
        }

    def _kept(self, ids: Ids) -> Kept | None:
        kept = ~self._gone[ids]
        return None if kept.all() else kept

    def _weight(self, node: ir.Node, sides: Sequence[Side]) -> None:
        """Slices the weight of a node along both of its axes."""
        first = sides[0]
        rank = len(first.source.shape or ())
        axes: list[Kept | None] = [None] * rank
        for side in sides:
            axes[side.axis] = self._kept(side.ids)
        if all(kept is None for kept in axes):
            return
        value = self._sliced(first.source, axes)
        given = node.inputs[first.position]
        if given is first.source:
            node.replace_input_with(first.position, value)
        else:
            # Behind a Transpose, which others may read too.
            turned = ir.node("Transpose", [value], {"perm": [1, 0]}, name=f"{value.name}_transposed")
            self._model.graph.insert_before(node, turned)
            turned.outputs[0].type = value.type
            node.replace_input_with(first.position, turned.outputs[0])
        if node.op_type == "Conv":
            made = next(side for side in sides if not side.is_input)
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if bias is not None:
                self._slice_input(node, 2, {0: self._kept(made.ids)})
            if int_attribute(node, "group", 1) > 1:
                node.attributes["group"] = ir.AttrInt64("group", int((~self._gone[made.ids]).sum()))
        elif node.op_type == "Attention":
            self._packed_attention(node, next(side for side in sides if not side.is_input))

    def _packed_attention(self, node: ir.Node, made: Side) -> None:
        kept = self._kept(made.ids)
        if kept is None:
            return
        heads = int_attribute(node, "num_heads")
        left = int(kept[: len(kept) // 3].reshape(heads, -1).all(1).sum())
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", left)
        # Named where they are not the width of what comes in.
        width = int(kept.sum()) // 3
        node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", [width] * 3)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self._slice_input(node, 2, {0: kept})

    def _sliced(self, source: ir.Value, axes: Sequence[Kept | None]) -> ir.Value:
        """A constant with some positions of its axes, computed when it is written; one for equal axes."""
        key = (source, tuple(None if kept is None else kept.tobytes() for kept in axes))
        if key in self._weights:
            return self._weights[key]
        tensor = constant_of(source)
        assert tensor is not None
        indices = [None if kept is None else np.flatnonzero(kept) for kept in axes]
        sizes = [
            size if index is None else len(index)
            for size, index in zip(tensor.shape.numpy(), indices, strict=True)
        ]
        again = sum(known is source for known, _ in self._weights)
        name = f"{source.name}_pruned_{again}" if again else source.name
        graph = self._model.graph
        if not again and source.is_initializer():
            graph.initializers.pop(source.name or "")
            # Renamed without its tensor, which other models may share.
            source.const_value = None
            source.name = f"{source.name}_unpruned"
            source.const_value = _as_named(tensor)
            graph.register_initializer(source)

        def compute() -> ir.TensorProtocol:
            array = tensor.numpy()
            for axis, index in enumerate(indices):
                if index is not None:
                    array = np.take(array, index, axis)
            return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=name)

        value = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(tensor.dtype))
        value.const_value = ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(sizes), name=name)
        graph.register_initializer(value)
        self._weights[key] = value
        return value

    def _slice_input(self, node: ir.Node, position: int, axes: Mapping[int, Kept | None]) -> None:
        """Slices a constant input of a node."""
        value = node.inputs[position]
        tensor = constant_of(value)
        if value is None or tensor is None:
            return
        kept = [axes.get(axis) for axis in range(len(tensor.shape))]
        fits = [
            k if k is not None and len(k) == size else None
            for k, size in zip(kept, tensor.shape.numpy(), strict=True)
        ]
        if any(k is not None for k in fits):
            node.replace_input_with(position, self._sliced(value, fits))

    def _node(self, node: ir.Node) -> None:
        rule = _RULES.get(node.op_type)
        if rule is not None:
            rule(self, node)
            return
        # Constants beside a value that shrinks: biases, factors, gains of norms.
        out = self._changes.get(node.outputs[0])
        if out is None or node.op_type not in WITH_CONSTANTS:
            return
        for position in range(2 if node.op_type == "Gemm" else 0, len(node.inputs)):
            self._spread(node, position, out.axes[-1])
            tensor = constant_of(node.inputs[position])
            if tensor is not None:
                offset = len(out.axes) - len(tensor.shape)
                self._slice_input(
                    node, position,
                    {axis - offset: kept for axis, kept in enumerate(out.axes) if axis >= offset},
                )  # fmt: skip

    def _spread(self, node: ir.Node, position: int, kept: Kept | None) -> None:
        """Numbers of positions times a vector: a vector with what stays, for this node alone."""
        value = node.inputs[position]
        at = spread_over(value)
        if value is None or at is None or kept is None or value in self._changes:
            return
        made = value.producer()
        assert made is not None
        inputs = list(made.inputs)
        vector = inputs[at]
        if vector is None or vector.shape is None or vector.shape.numpy() != (len(kept),):
            return
        inputs[at] = self._sliced(vector, [kept])
        name = f"{label(made)}_pruned_for_{label(node)}"
        new = ir.node("Mul", inputs, name=name)
        new.outputs[0].name, new.outputs[0].type = name, value.type
        if value.shape is not None:
            new.outputs[0].shape = ir.Shape([*list(value.shape)[:-1], int(kept.sum())])
        self._model.graph.insert_before(node, new)
        node.replace_input_with(position, new.outputs[0])

    def _channel_constants(self, node: ir.Node) -> None:
        """BatchNormalization: one number for each channel."""
        out = self._changes.get(node.outputs[0])
        if out is not None:
            for position in range(1, len(node.inputs)):
                self._slice_input(node, position, {0: out.axes[1]})

    def _target(self, node: ir.Node) -> None:
        """Reshape and Expand: the sizes that they are given."""
        change = self._changes.get(node.outputs[0])
        if change is None or len(node.inputs) < 2 or node.inputs[1] is None:
            return
        sizes, target = self._sizes(node.outputs[0]), node.inputs[1]
        numbers = constant_integers(target)
        if numbers is not None:
            new = [
                sizes[axis] if axis in sizes and number > 0 else number for axis, number in enumerate(numbers)
            ]
            if new != numbers:
                node.replace_input_with(1, self._integers(target, new))
            return
        if not sizes:
            return
        elements = shape_elements(target)
        if elements is None or len(elements) != len(change.axes):
            self._refuse(node, "a target shape whose numbers are not known")
        assert elements is not None
        wrong = {axis: size for axis, size in sizes.items() if not self._follows(elements[axis], size)}
        if not wrong:
            return
        if any(not isinstance(elements[axis], int) for axis in wrong):
            self._refuse(node, "a target size that is computed")
        # Number by number, each from where it came.
        parts: list[ir.Value | None] = []
        for axis in range(len(elements)):
            if axis in wrong:
                parts.append(self._integers(target, [wrong[axis]]))
                continue
            begin, end = self._integers(target, [axis]), self._integers(target, [axis + 1])
            one = ir.node("Slice", [target, begin, end], name=f"{label(node)}_target_{axis}")
            self._model.graph.insert_before(node, one)
            one.outputs[0].type, one.outputs[0].shape = target.type, ir.Shape([1])
            parts.append(one.outputs[0])
        joined = ir.node("Concat", parts, {"axis": 0}, name=f"{label(node)}_target")
        self._model.graph.insert_before(node, joined)
        joined.outputs[0].type, joined.outputs[0].shape = target.type, target.shape
        node.replace_input_with(1, joined.outputs[0])

    def _follows(self, element: Element, size: int) -> bool:
        """Whether a number of a target shape becomes this size by itself."""
        if isinstance(element, int):
            return element in (-1, 0, size)
        if element is None:
            return False
        value, axis = element
        change = self._changes.get(value)
        return change is not None and self._sizes(value).get(axis) == size

    def _split(self, node: ir.Node) -> None:
        change = next((self._changes[v] for v in node.outputs if v in self._changes), None)
        given = self._changes.get(node.inputs[0]) if node.inputs[0] is not None else None
        if change is None or given is None:
            return
        axis = int_attribute(node, "axis") % len(given.axes)
        if given.axes[axis] is None:
            return
        sizes = []
        for output in node.outputs:
            kept = self._changes[output].axes[axis] if output in self._changes else None
            dim = output.shape[axis] if output.shape is not None else None
            size = int(kept.sum()) if kept is not None else dim
            if not isinstance(size, int):
                self._refuse(node, "a part whose size is not known")
            assert isinstance(size, int)
            sizes.append(size)
        for name in ("num_outputs", "split"):
            node.attributes.pop(name, None)
        near = node.inputs[0]
        assert near is not None
        value = self._integers(near, sizes)
        if len(node.inputs) > 1:
            node.replace_input_with(1, value)
        else:
            node.resize_inputs(2)
            node.replace_input_with(1, value)

    def _split_to_sequence(self, node: ir.Node) -> None:
        """Parts of one size stay parts of one size."""
        given = self._changes.get(node.inputs[0]) if node.inputs[0] is not None else None
        axis = int_attribute(node, "axis")
        if given is None or given.axes[axis % len(given.axes)] is None:
            return
        kept = given.axes[axis % len(given.axes)]
        size, target = constant_integers(node.inputs[1]), node.inputs[1]
        assert kept is not None and size is not None and target is not None
        ends = np.arange(0, len(kept), size[0]) if len(size) == 1 else np.cumsum([0, *size[:-1]])
        sizes = np.add.reduceat(kept, ends).tolist()
        if len(size) == 1 and len(set(sizes)) == 1 and target.shape is not None and not target.shape.rank():
            node.replace_input_with(1, self._constant(target, np.array(sizes[0], np.int64)))
        else:
            node.replace_input_with(1, self._integers(target, sizes))

    def _slice(self, node: ir.Node) -> None:
        given = self._changes.get(node.inputs[0]) if node.inputs[0] is not None else None
        if given is None:
            return
        values = [*node.inputs, None, None][1:4]
        starts, ends = constant_integers(values[0]), constant_integers(values[1])
        axes = constant_integers(values[2]) if values[2] is not None else None
        if starts is None or ends is None:
            return
        axes = axes if axes is not None else list(range(len(starts)))
        for number, axis in enumerate(axes):
            kept = given.axes[axis % len(given.axes)]
            if kept is not None:
                start, end, _ = slice(starts[number], ends[number]).indices(len(kept))
                starts[number], ends[number] = int(kept[:start].sum()), int(kept[:end].sum())
        for position, numbers in ((1, starts), (2, ends)):
            old = node.inputs[position]
            assert old is not None
            node.replace_input_with(position, self._integers(old, numbers))

    def _gather(self, node: ir.Node) -> None:
        given = self._changes.get(node.inputs[0]) if node.inputs[0] is not None else None
        axis = int_attribute(node, "axis")
        if given is None or given.axes[axis % len(given.axes)] is None:
            return
        kept = given.axes[axis % len(given.axes)]
        tensor = constant_of(node.inputs[1])
        assert kept is not None and tensor is not None and node.inputs[1] is not None
        index = tensor.numpy() % len(kept)
        if not kept[index].all():
            index = index[kept[index]]
        new = (np.cumsum(kept) - 1)[index].astype(np.int64)
        node.replace_input_with(1, self._constant(node.inputs[1], new))

    def _attention(self, node: ir.Node) -> None:
        """Numbers of heads: as many as stay of what the operator gives."""
        out = self._changes.get(node.outputs[0])
        if out is None or (node.op_type == "Attention" and node.domain == "com.microsoft"):
            return
        axis = 1 if len(out.axes) == 4 else 2
        kept = out.axes[axis]
        assert kept is not None
        old_heads = int_attribute(node, "num_heads") or int_attribute(node, "q_num_heads")
        for name in ("num_heads", "kv_num_heads", "q_num_heads"):
            old = int_attribute(node, name)
            if old:
                node.attributes[name] = ir.AttrInt64(name, old * int(kept.sum()) // len(kept))
        if node.op_type == "MultiHeadAttention" and len(node.inputs) > 3:
            self._slice_input(node, 3, {0: np.concatenate([self._last(v) for v in node.inputs[:3]])})
        elif node.op_type == "GroupQueryAttention" and len(node.inputs) > 11 and node.inputs[11] is not None:
            # The sink: one number for each head.
            self._slice_input(node, 11, {0: np.asarray(kept.reshape(old_heads, -1).all(1))})

    def _last(self, value: ir.Value | None) -> Kept:
        """Which positions of a value's last axis stay."""
        assert value is not None
        kept = self._changes[value].axes[-1] if value in self._changes else None
        return kept if kept is not None else np.ones(self._graph.ids[value].shape[-1], bool)

    def _rotary(self, node: ir.Node) -> None:
        value = node.inputs[0]
        change = self._changes.get(value) if value is not None else None
        if value is None or change is None or not int_attribute(node, "num_heads"):
            return
        ids = self._graph.ids[value]
        heads, axis = rotary_heads(node, ids), 1 if ids.ndim == 4 else 2
        kept = change.axes[axis]
        assert heads is not None and kept is not None
        left = heads * int(kept.sum()) // len(kept)
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", left)

    def _integers(self, near: ir.Value, numbers: Sequence[int]) -> ir.Value:
        return self._constant(near, np.array(numbers, np.int64))

    def _constant(self, near: ir.Value, array: npt.NDArray[np.int64]) -> ir.Value:
        name, graph = f"{near.name}_pruned", self._model.graph
        while name in graph.initializers:
            name += "_"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(list(array.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    def _refuse(self, node: ir.Node, got: str) -> None:
        raise PassError(
            f"pruning: node {label(node)!r}",
            got=got,
            expected="constants",
            remedy="Run cleanup first, or exclude its weights with skip_nodes",
        )


def _as_named(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same numbers under a name of their own."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
    )


def _nothing(_removal: _Removal, _node: ir.Node) -> None:
    """What such a node does follows from its inputs."""


_RULES: Mapping[str, Callable[[_Removal, ir.Node], None]] = MappingProxyType(
    {
        "Attention": _Removal._attention,
        "BatchNormalization": _Removal._channel_constants,
        "Concat": _nothing,
        "Conv": _nothing,
        "Expand": _Removal._target,
        "Gather": _Removal._gather,
        "GroupQueryAttention": _Removal._attention,
        "MultiHeadAttention": _Removal._attention,
        "Reshape": _Removal._target,
        "RotaryEmbedding": _Removal._rotary,
        "Slice": _Removal._slice,
        "Split": _Removal._split,
        "SplitToSequence": _Removal._split_to_sequence,
    }
)
