"""Small random graphs, and the one way in which the tests of passes run a graph and compare two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import reject

Array = npt.NDArray[Any]


def run(model: ir.Model | bytes, feeds: dict[str, Array]) -> dict[str, Array]:
    """Runs a graph on the CPU, every optimisation of ONNX Runtime off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    content = model if isinstance(model, bytes) else serialized(model)
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def graph(text: str, **weights: Array) -> ir.Model:
    """A model from its text, with initializers for names that the text leaves free."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in weights.items())
    return ir.from_proto(proto)


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def assert_same(
    expected: dict[str, Array], got: dict[str, Array], *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Names in order, count, types, shapes, values; bit for bit without a tolerance (but -0.0 equals 0.0)."""
    assert list(got) == list(expected)
    assert expected, "nothing was compared"
    for name, want in expected.items():
        have = got[name]
        assert have.dtype == want.dtype, name
        assert have.shape == want.shape, name
        if have.dtype.kind in "OUSb" or not (rtol or atol):
            np.testing.assert_array_equal(have, want, err_msg=name)
        else:
            scale = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
            np.testing.assert_allclose(have, want, rtol=0, atol=atol + rtol * scale, err_msg=name)


def without_node_names(model: ir.Model) -> ir.Model:
    """A copy. ONNX Runtime refuses two nodes of one name, though nothing refers to nodes by name."""
    copied = model.clone()
    for root in (copied.graph, *(function.graph for function in copied.functions.values())):
        for node in root.all_nodes():
            node.name = ""
    return copied


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph and inputs for it."""

    model: ir.Model
    feeds: dict[str, Array]

    def expected(self) -> dict[str, Array]:
        """What the graph computes; the test moves on where ONNX Runtime refuses the graph as it was made.

        Its shape inference takes some sums of shapes for sums of their elements.
        """
        onnx.checker.check_model(ir.to_proto(self.model))
        try:
            return run(without_node_names(self.model), self.feeds)
        except Exception as error:
            assert "ShapeInferenceError" in str(error), error
            reject()

    def __repr__(self) -> str:
        shapes = {name: array.shape for name, array in self.feeds.items()}
        return f"Case(feeds={shapes}, model=\n{self.model})"


@dataclasses.dataclass
class _Known:
    """A value of the graph under construction, with what it is for the inputs chosen."""

    value: ir.Value
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


_FLOATS = (np.float32, np.float64, np.float16)
_TYPES = (np.float32, np.float32, np.float32, np.int64, np.int32, np.float16, np.float64)
_SIZES = st.sampled_from([1, 1, 2, 3, 4, 0])


class _Builder:
    def __init__(self, draw: Any, opset: int, twin_names: bool) -> None:
        self.draw = draw
        self.twin_names = twin_names
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.inputs: list[_Known] = []
        self.initializers: list[ir.Value] = []
        self.known: list[_Known] = []
        self.functions: list[ir.Function] = []
        self.count = 0
        self.random = np.random.default_rng(draw(st.integers(0, 2**16)))

    def pick(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def node_name(self) -> str:
        """Names of nodes need not be unique, and need not be there."""
        return self.pick([self.name("node"), "same" if self.twin_names else "", ""])

    def values(self, shape: tuple[int, ...], dtype: Any) -> Array:
        # Small integers: sums and products of them are exact, so that the order of operations is no excuse.
        kind = self.draw(st.integers(0, 5))
        if kind < 2:
            return np.full(shape, kind, dtype)
        return self.random.integers(-4, 5, shape).astype(dtype)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.draw(st.lists(_SIZES, max_size=3)))

    def input(self) -> None:
        shape, dtype = self.shape(), self.pick(_TYPES)
        axes = [size if self.draw(st.booleans()) else self.name("axis") for size in shape]
        type_ = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        value = ir.Value(name=self.name("input"), shape=ir.Shape(axes), type=type_)
        self.inputs.append(_Known(value, self.values(shape, dtype)))
        self.known.append(self.inputs[-1])

    def constant(self, array: Array) -> ir.Value:
        """As an initializer or as a Constant node."""
        tensor = ir.tensor(array)
        if self.draw(st.booleans()):
            node = ir.node("Constant", [], {"value": tensor}, name=self.node_name())
            value = node.outputs[0]
            self.nodes.append(node)
            value.name = self.name("constant")
        else:
            value = ir.Value(name=self.name("weight"))
            value.const_value = tensor
            self.initializers.append(value)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def axes(self, value: ir.Value, axis: int) -> tuple[list[ir.Value | None], dict[str, Any]]:
        """Axes were attributes until operator set 13."""
        return ([value], {"axes": [axis]}) if self.opset < 13 else ([value, self.ints(axis)], {})

    def weight(self) -> None:
        shape = self.pick([(2, 3), (3, 2)]) if self.draw(st.booleans()) else self.shape()
        array = self.values(shape, self.pick(_TYPES))
        known = _Known(self.constant(array), array)
        if array.ndim == 2 and self.draw(st.booleans()):
            self.add("Transpose", [known.value], array.T, perm=[1, 0])
        self.known.append(known)

    def add(self, op: str, inputs: Sequence[ir.Value | None], result: Array, **attributes: Any) -> None:
        node = ir.node(op, inputs, attributes, name=self.node_name())
        output = node.outputs[0]
        output.name = self.name("value")
        # Some graphs come with types, some without.
        if self.draw(st.booleans()):
            output.type = ir.TensorType(ir.DataType.from_numpy(result.dtype))
        self.nodes.append(node)
        self.known.append(_Known(output, np.asarray(result)))
        if self.draw(st.integers(0, 4)) == 0:
            twin = ir.node(op, inputs, attributes, name=self.node_name())
            twin.outputs[0].name = self.name("value")
            self.nodes.append(twin)
            self.known.append(_Known(twin.outputs[0], np.asarray(result)))

    def step(self) -> None:
        getattr(self, "_" + self.pick(_STEPS))()

    def _binary(self) -> None:
        left = self.pick(self.known)
        rights = [
            k for k in self.known if k.array.dtype == left.array.dtype and _broadcast(k.shape, left.shape)
        ]
        right = self.pick(rights)
        if self.draw(st.integers(0, 2)) == 0:
            scalar = np.array(self.pick([0, 1, 1, 2]), left.array.dtype)
            right = _Known(self.constant(scalar), scalar)
        if self.draw(st.booleans()):
            left, right = right, left
        op = self.pick(["Add", "Mul", "Sub"])
        function = {"Add": np.add, "Mul": np.multiply, "Sub": np.subtract}[op]
        with np.errstate(all="ignore"):
            self.add(op, [left.value, right.value], function(left.array, right.array))

    def _transpose(self) -> None:
        one = self.pick(self.known)
        if self.draw(st.booleans()):
            self.add("Transpose", [one.value], one.array.T)
        else:
            order = self.draw(st.permutations(range(one.array.ndim)))
            self.add("Transpose", [one.value], one.array.transpose(order), perm=list(order))

    def _reshape(self) -> None:
        one = self.pick(self.known)
        size = one.array.size
        shapes = [(size,), (1, size), (size, 1), one.shape, one.shape[::-1], (1, *one.shape)]
        shape = self.pick(shapes)
        target = list(shape)
        for axis in range(len(shape)):
            if axis < one.array.ndim and shape[axis] == one.shape[axis] and self.draw(st.booleans()):
                target[axis] = 0
        # A literal zero would mean "as before".
        if any(
            t == 0 and (a >= one.array.ndim or one.shape[a] != 0) and shape[a] == 0
            for a, t in enumerate(target)
        ):
            return
        if size and target and self.draw(st.booleans()):
            target[self.draw(st.integers(0, len(target) - 1))] = -1
        self.add("Reshape", [one.value, self.ints(*target)], one.array.reshape(shape))

    def _slice(self) -> None:
        one = self.pick([k for k in self.known if k.array.ndim] or [None])
        if one is None:
            return
        axis = self.draw(st.integers(0, one.array.ndim - 1))
        start = self.pick([0, 0, 1, -1, -2])
        end = self.pick([1, 2, -1, one.shape[axis], 2**31 - 1, 2**63 - 1])
        step = self.pick([1, 1, 2, None])
        inputs: list[ir.Value | None] = [one.value, self.ints(start), self.ints(end)]
        inputs.append(None if axis == 0 and self.draw(st.booleans()) else self.ints(axis))
        if step is not None:
            inputs.append(self.ints(step))
        elif self.draw(st.booleans()):
            inputs.append(None)
        index: list[slice] = [slice(None)] * one.array.ndim
        index[axis] = slice(start, end, step)
        self.add("Slice", inputs, one.array[tuple(index)])

    def _cast(self) -> None:
        one = self.pick(self.known)
        dtype = np.dtype(self.pick(_TYPES))
        with np.errstate(all="ignore"):
            self.add("Cast", [one.value], one.array.astype(dtype), to=int(ir.DataType.from_numpy(dtype)))

    def _identity(self) -> None:
        one = self.pick(self.known)
        self.add("Identity", [one.value], one.array)

    def _concat(self) -> None:
        one = self.pick([k for k in self.known if k.array.ndim] or [None])
        if one is None:
            return
        axis = self.draw(st.integers(0, one.array.ndim - 1))

        def fits(other: _Known) -> bool:
            rest = [s for a, s in enumerate(other.shape) if a != axis]
            return (
                other.array.dtype == one.array.dtype
                and other.array.ndim == one.array.ndim
                and rest == [s for a, s in enumerate(one.shape) if a != axis]
            )

        others = self.draw(st.lists(st.sampled_from([k for k in self.known if fits(k)]), max_size=2))
        parts = [one, *others]
        self.add(
            "Concat", [p.value for p in parts], np.concatenate([p.array for p in parts], axis), axis=axis
        )

    def _clip(self) -> None:
        """Optional inputs: left out, empty in the middle, or given."""
        one = self.pick([k for k in self.known if k.array.dtype == np.float32] or [None])
        if one is None:
            return
        low = self.pick([None, -1.0])
        high = self.pick([None, 2.0])
        inputs = [
            one.value,
            *(None if b is None else self.constant(np.array(b, np.float32)) for b in (low, high)),
        ]
        result = one.array if low is None and high is None else np.clip(one.array, low, high)
        self.add("Clip", inputs, result)

    def _shape_of(self) -> None:
        one = self.pick(self.known)
        self.add("Shape", [one.value], np.array(one.shape, np.int64))

    def _reshape_like(self) -> None:
        """The shape is computed in the graph, as exporters do it."""
        one = self.pick(self.known)
        like = self.pick([k for k in self.known if k.array.size == one.array.size])
        if 0 in like.shape and like.shape != one.shape:
            return
        shape = ir.node("Shape", [like.value], name=self.name("node"))
        shape.outputs[0].name = self.name("value")
        self.nodes.append(shape)
        self.add("Reshape", [one.value, shape.outputs[0]], one.array.reshape(like.shape))

    def _unsqueeze(self) -> None:
        one = self.pick(self.known)
        if one.array.ndim < 4:
            axis = self.draw(st.integers(0, one.array.ndim))
            inputs, attributes = self.axes(one.value, axis)
            self.add("Unsqueeze", inputs, np.expand_dims(one.array, axis), **attributes)

    def _squeeze(self) -> None:
        one = self.pick(self.known)
        axes = [axis for axis, size in enumerate(one.shape) if size == 1]
        if axes:
            axis = self.pick(axes)
            inputs, attributes = self.axes(one.value, axis)
            self.add("Squeeze", inputs, one.array.squeeze(axis), **attributes)

    def _expand(self) -> None:
        one = self.pick(self.known)
        shape = tuple(self.pick([2, 1]) if size == 1 else size for size in one.shape)
        self.add("Expand", [one.value, self.ints(*shape)], np.broadcast_to(one.array, shape))

    def _gather(self) -> None:
        one = self.pick([k for k in self.known if k.array.ndim and k.shape[0]] or [None])
        if one is not None:
            self.add("Gather", [one.value, self.constant(np.array(0, np.int64))], one.array[0], axis=0)

    def _reduce(self) -> None:
        one = self.pick([k for k in self.known if k.array.ndim and k.array.dtype != np.float16] or [None])
        if one is None:
            return
        axis = self.draw(st.integers(0, one.array.ndim - 1))
        keep = self.draw(st.booleans())
        inputs, attributes = self.axes(one.value, axis)
        result = one.array.sum(axis, keepdims=keep, dtype=one.array.dtype)
        self.add("ReduceSum", inputs, result, keepdims=int(keep), **attributes)

    def _split(self) -> None:
        """Several outputs, of which some may be used by nobody."""
        one = self.pick([k for k in self.known if k.array.ndim and k.shape[0] > 1] or [None])
        if one is None:
            return
        sizes = [1, one.shape[0] - 1]
        inputs: list[ir.Value | None] = [one.value]
        attributes: dict[str, Any] = {"axis": 0}
        if self.opset < 13:
            attributes["split"] = sizes
        else:
            inputs.append(self.ints(*sizes))
        node = ir.node("Split", inputs, attributes, num_outputs=2, name=self.node_name())
        for output, array in zip(node.outputs, np.split(one.array, [1]), strict=True):
            output.name = self.name("value")
            self.known.append(_Known(output, array))
        self.nodes.append(node)

    def _call(self) -> None:
        """A function of the model, which may be called more than once."""
        one = self.pick(self.known)
        if not self.functions or self.draw(st.booleans()):
            x = ir.Value(name="x")
            # Names inside of a function are its own, and may be those of values outside.
            double = ir.node("Add", [x, x], name=self.node_name())
            double.outputs[0].name = "value1"
            copied = ir.node("Identity", [double.outputs[0]], name=self.node_name())
            copied.outputs[0].name = "y"
            body = ir.Graph([x], copied.outputs, nodes=[double, copied], opset_imports={"": self.opset})
            name = self.name("twice")
            self.functions.append(ir.Function("local", name, "", graph=body, attributes=[]))
        chosen = self.pick(self.functions)
        node = ir.node(chosen.name, [one.value], domain="local", name=self.node_name())
        node.outputs[0].name = self.name("value")
        self.nodes.append(node)
        with np.errstate(all="ignore"):
            self.known.append(_Known(node.outputs[0], one.array + one.array))

    def _choice(self) -> None:
        """An If whose branches read values of the outer graph."""
        one = self.pick(self.known)
        others = [k for k in self.known if k.array.dtype == one.array.dtype and k.shape == one.shape]
        other = self.pick(others)
        value = bool(self.draw(st.booleans()))
        condition = self.constant(np.array(value))
        branches = []
        # Both branches may name what is in them alike.
        names = [self.name("inner"), self.name("outer")]
        for chosen in (one, other):
            if self.draw(st.booleans()):
                names = [self.name("inner"), self.name("outer")]
            weights = []
            addend = chosen.value
            if self.draw(st.booleans()):
                addend = ir.Value(name=self.name("weight"), const_value=ir.tensor(chosen.array.dtype.type(0)))
                addend.shape, addend.type = ir.Shape([]), ir.TensorType(addend.const_value.dtype)
                weights = [addend]
            inner = ir.node("Add", [chosen.value, addend], name=self.node_name())
            outer = ir.node("Identity", [inner.outputs[0]], name=self.node_name())
            inner.outputs[0].name, outer.outputs[0].name = names
            branches.append(
                ir.Graph(
                    [], outer.outputs, nodes=[inner, outer], initializers=weights,
                    opset_imports={"": self.opset}, name=self.name("g"),
                )
            )  # fmt: skip
        chosen, branch = (one, branches[0]) if value else (other, branches[1])
        node = ir.node(
            "If", [condition], {"then_branch": branches[0], "else_branch": branches[1]}, name=self.node_name()
        )
        node.outputs[0].name = self.name("value")
        self.nodes.append(node)
        with np.errstate(all="ignore"):
            result = chosen.array if branch.initializers else chosen.array + chosen.array
        self.known.append(_Known(node.outputs[0], result))

    def _loop(self) -> None:
        """A Loop that adds a value of the outer graph three times, and collects what it has after each."""
        one = self.pick(self.known)
        other = self.pick(
            [k for k in self.known if k.array.dtype == one.array.dtype and k.shape == one.shape]
        )
        trips, go = self.constant(np.array(3, np.int64)), self.constant(np.array(True))
        kinds = (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.from_numpy(one.array.dtype))
        given = [ir.Value(name=self.name("body"), type=ir.TensorType(kind)) for kind in kinds]
        given[0].shape, given[1].shape = ir.Shape([]), ir.Shape([])
        again = ir.node("Identity", [given[1]], name=self.node_name())
        added = ir.node("Add", [given[2], other.value], name=self.node_name())
        collected = ir.node("Identity", [added.outputs[0]], name=self.node_name())
        for inside in (again, added, collected):
            inside.outputs[0].name = self.name("body")
        outputs = [again.outputs[0], added.outputs[0], collected.outputs[0]]
        outputs[0].type, outputs[0].shape = given[1].type, ir.Shape([])
        for inside in (given[2], *outputs[1:]):
            inside.type, inside.shape = given[2].type, ir.Shape([None] * one.array.ndim)
        body = ir.Graph(
            given,
            outputs,
            nodes=[again, added, collected],
            opset_imports={"": self.opset},
            name=self.name("g"),
        )
        node = ir.node("Loop", [trips, go, one.value], {"body": body}, num_outputs=2, name=self.node_name())
        self.nodes.append(node)
        with np.errstate(all="ignore"):
            steps = [one.array + other.array]
            steps += [steps[0] + other.array]
            steps += [steps[1] + other.array]
        for output, array in zip(node.outputs, (steps[-1], np.stack(steps)), strict=True):
            output.name = self.name("value")
            self.known.append(_Known(output, array))


_STEPS = (
    "binary", "binary", "transpose", "reshape", "slice", "cast", "identity", "concat", "clip", "shape_of",
    "reshape_like", "unsqueeze", "squeeze", "expand", "gather", "choice", "reduce", "split", "call", "loop",
)  # fmt: skip


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(left, right)
    except ValueError:
        return False
    return True


@st.composite
def cases(draw: Any, *, twin_names: bool = False) -> Case:
    """Graphs of one to twelve random operators, opset 11 to 24, with inputs to run them on.

    Args:
        draw: Hypothesis gives it.
        twin_names: Several nodes may have one name, which ONNX Runtime refuses.
    """
    opset = draw(st.integers(11, 24))
    build = _Builder(draw, opset, twin_names)
    for _ in range(draw(st.integers(1, 2))):
        build.input()
    for _ in range(draw(st.integers(0, 2))):
        build.weight()
    for _ in range(draw(st.integers(1, 12))):
        build.step()
    made = [known for known in build.known if known.value.producer() is not None]
    if not made:
        build._identity()
        made = build.known[-1:]
    others = draw(st.lists(st.sampled_from(made), max_size=2, unique_by=lambda known: known.value.name))
    outputs = list({known.value.name: known for known in [*others, made[-1]]}.values())
    for known in outputs:
        known.value.type = ir.TensorType(ir.DataType.from_numpy(known.array.dtype))
        if known.value.shape is None:
            known.value.shape = ir.Shape([None] * known.array.ndim)
    graph = ir.Graph(
        [known.value for known in build.inputs],
        [known.value for known in outputs],
        nodes=build.nodes,
        initializers=build.initializers,
        opset_imports={"": opset, **({"local": 1} if build.functions else {})},
        name="generated",
    )
    model = ir.Model(graph, ir_version=8 if opset < 19 else 10, functions=build.functions)
    return Case(model, {known.value.name or "": known.array for known in build.inputs})
