"""Prompts on 8 bit integers: a decoder with two branches, one for prompts and one for single tokens.

A token is read from memory: each weight is used once, and 4 bits are read in half the time of 8. A prompt is
computed: each weight is used for every position, and what counts is arithmetic. MatMulNBits unpacks codes and
scales in its inner loop and is no faster there than float32; a product of 8 bit integers takes a third.

Per-row integers alone would cost too much accuracy, because a few columns of a decoder's activations are a
hundred times larger than the others and set the scale of their row. So rows are rotated first, in blocks, by
a Hadamard matrix, which spreads a large column over its block, and the weights with them (QuaRot,
https://arxiv.org/abs/2404.00456). The product stays what it was, since the rotation is orthogonal.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_products import (
    FOLDED,
    Reading,
    deferred,
    is_computed_constant,
    product_with_offsets,
)
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.weights import lazy_initializer

__all__ = ["FastPrompts"]

_DOMAIN = "com.microsoft"
_SUFFIX = "_prompt"
_LARGEST, _SMALLEST = 64, 16
_MIDDLE = 128
_LARGEST_CODE = 127
Floats = npt.NDArray[np.float32]
_Computed = Callable[[Reading], npt.NDArray[Any]]


class FastPrompts(GraphPass):
    """Computes what is longer than a few tokens with 8 bit integers, and shorter inputs as before.

    Both branches write the same cache. The weights of the prompt's branch are kept in 8 bits beside those in
    blocks, so the file and the memory grow by a byte for each weight.
    """

    name: ClassVar[str] = "fast_prompts"
    summary: ClassVar[str] = "a second branch for prompts, on 8 bit integers of rotated rows"

    def __init__(self, *, tokens: int = 8, skip_nodes: tuple[str, ...] = ()) -> None:
        """Sets when the branch is taken.

        Args:
            tokens: Inputs of more tokens go to the prompt's branch.
            skip_nodes: Patterns of node or weight names whose products stay as they are there.
        """
        if tokens < 1:
            raise BadInputError(f"pass {self.name}: tokens", got=str(tokens), expected="at least 1")
        self.tokens = tokens
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Splits the graph behind its first product with a quantized weight."""
        graph = model.graph
        if any(node.op_type == "If" for node in graph):
            return Changes(0, {}, {graph.name or "graph": "it has branches already"})
        ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
        if ids is None or ids.shape is None or ids.shape.rank() != 2:
            return Changes(0, {}, {"input_ids": "the graph has no such input of two axes"})
        skipped: dict[str, str] = {}
        products = set()
        for node in graph:
            if (node.domain, node.op_type) == (_DOMAIN, "MatMulNBits"):
                reason = self._skipped(node) or _refusal(node)
                if reason:
                    skipped[label(node)] = reason
                else:
                    products.add(node)
        if not products:
            return Changes(0, {}, skipped or {graph.name or "graph": "it has no MatMulNBits"})
        moved = _behind(graph, products)
        token = _cut(graph, moved)
        prompt = token.clone(allow_outer_scope_values=True)
        prompt.name = "prompt"
        for node in prompt:
            node.name = f"{node.name or node.op_type}{_SUFFIX}"
            for value in node.outputs:
                value.name = f"{value.name}{_SUFFIX}" if value.name else value.name
        names = {label(node) for node in products}
        writer = _Writer(graph, prompt)
        for node in list(prompt):
            if node.op_type == "MatMulNBits" and label(node).removesuffix(_SUFFIX) in names:
                writer.replace(node)
        _drop_unused(prompt)
        for branch in (token, prompt):
            _take_constants(graph, branch)
        self._branch(graph, ids, token, prompt)
        model.opset_imports.setdefault(_DOMAIN, 1)
        return Changes(
            len(products),
            {"products": len(products), "longer_than": self.tokens, "bytes": writer.nbytes},
            skipped,
        )

    def _skipped(self, node: ir.Node) -> str:
        weight = node.inputs[1]
        names = (node.name or "", (weight.name or "") if weight is not None else "")
        fitting = [p for p in self.skip_nodes if any(fnmatch.fnmatchcase(name, p) for name in names)]
        return f"skip_nodes has {fitting[0]!r}" if fitting else ""

    def _branch(self, graph: ir.Graph, ids: ir.Value, token: ir.Graph, prompt: ir.Graph) -> None:
        size = ir.node("Shape", [ids], {"start": 1, "end": 2}, name="prompt_tokens")
        bound = _constant(graph, np.array([self.tokens], np.int64), "prompt_longer_than")
        longer = ir.node("Greater", [size.outputs[0], bound], name="is_prompt")
        size.outputs[0].name, longer.outputs[0].name = "prompt_tokens", "is_prompt"
        size.outputs[0].type, size.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        longer.outputs[0].type, longer.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
        branches = [ir.AttrGraph("then_branch", prompt), ir.AttrGraph("else_branch", token)]
        choice = ir.Node(
            "", "If", [longer.outputs[0]], branches, num_outputs=len(token.outputs), name="prompt_or_token"
        )
        graph.extend([size, longer, choice])
        made = {}
        for inner, outer in zip(token.outputs, choice.outputs, strict=True):
            outer.name, outer.type, outer.shape = inner.name, inner.type, inner.shape
            made[outer.name] = outer
            inner.name = f"{inner.name}_token"
        for number, value in enumerate(graph.outputs):
            graph.outputs[number] = made.get(value.name, value)


def _refusal(node: ir.Node) -> str:
    columns, bits = node.attributes["K"].as_int(), node.attributes["bits"].as_int()
    if bits not in (4, 8):
        return f"codes of {bits} bits; expected 4 or 8"
    if _block(columns) < _SMALLEST:
        return f"rows of {columns} numbers, which have no blocks of a power of two from {_SMALLEST} on"
    if any(value is not None for value in node.inputs[4:]):
        return "it has a group index or a bias"
    if not all(is_computed_constant(value) for value in node.inputs[1:4] if value is not None):
        return "its weight is not constant"
    x = node.inputs[0]
    if x is None or x.dtype != ir.DataType.FLOAT or x.shape is None or x.shape.rank() < 2:
        return "its left side is not known to be float32 of two axes or more"
    if product_with_offsets(node, x)[0].is_graph_output():
        return "it is the output head, which a prompt needs for its last position only"
    return ""


def _block(columns: int) -> int:
    return min(columns & -columns, _LARGEST)


def _behind(graph: ir.Graph, products: set[ir.Node]) -> list[ir.Node]:
    """The products and all that follows from them, in order."""
    moved, made = [], set[ir.Value]()
    for node in graph:
        reads = {value for value in node.inputs if value is not None}
        if node in products or reads & made:
            moved.append(node)
            made.update(node.outputs)
    return moved


def _cut(graph: ir.Graph, moved: list[ir.Node]) -> ir.Graph:
    """Takes nodes out of a graph and makes a branch of them, whose outputs are the graph's that they make."""
    inside = set(moved)
    outputs = [value for value in graph.outputs if value.producer() in inside]
    kept = list(graph.outputs)
    graph.outputs.clear()
    graph.remove(moved)
    branch = ir.Graph([], outputs, nodes=moved, name="token", opset_imports=graph.opset_imports)
    # Those that are made in the branch are replaced when the branch has its node.
    placeholders = {value: ir.Value(name=value.name, type=value.type, shape=value.shape) for value in outputs}
    graph.outputs.extend(placeholders.get(value, value) for value in kept)
    return branch


def _drop_unused(branch: ir.Graph) -> None:
    for node in reversed(list(branch)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            branch.remove(node, safe=True)


def _take_constants(graph: ir.Graph, branch: ir.Graph) -> None:
    """Moves what only a branch needs into it: what comes from outside costs time in each call."""

    def is_own(value: ir.Value) -> bool:
        return bool(value.uses()) and all(use.node.graph is branch for use in value.uses())

    for node in reversed(list(graph)):
        if (
            node.op_type in FOLDED
            and all(map(is_own, node.outputs))
            and all(map(is_computed_constant, node.inputs))
        ):
            graph.remove(node)
            branch.insert_before(branch[0], node)
    given = set(graph.inputs)
    for name, value in list(graph.initializers.items()):
        if value not in given and is_own(value):
            del graph.initializers[name]
            branch.register_initializer(value)


class _Writer:
    """Puts integer products in the place of those in blocks."""

    def __init__(self, graph: ir.Graph, branch: ir.Graph) -> None:
        self._graph, self._branch = graph, branch
        self._rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.nbytes = 0

    def replace(self, node: ir.Node) -> None:
        """Replaces one product, and what adds the offsets of its blocks."""
        x = node.inputs[0]
        assert x is not None
        if x not in self._rows:
            self._rows[x] = self._quantized(node, x)
        codes, largest = self._rows[x]
        result, offsets = product_with_offsets(node, x)
        weight, scales = self._weight(node, offsets)
        one = self._shared(np.array([1], np.float32), "one")
        middle = self._shared(np.array([_MIDDLE], np.uint8), "middle")
        name = label(node)
        product = self._add(
            node,
            "MatMulIntegerToFloat",
            [codes, weight, one, scales, middle],
            f"{name}_integers",
            domain=_DOMAIN,
        )
        # The last node that made it is gone then.
        last = result.producer()
        assert last is not None
        scaled = self._add(last, "Mul", [product, largest], f"{name}_scaled")
        product.shape = scaled.shape = result.shape
        result.replace_all_uses_with(scaled, replace_graph_outputs=result.is_graph_output())

    def _quantized(self, node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Codes of the rotated rows, and the largest magnitude of each row."""
        columns, name = node.attributes["K"].as_int(), x.name or "x"
        assert x.shape is not None
        leading, block = x.shape.rank() - 1, _block(columns)
        parts = self._shared(
            np.array([*[0] * leading, columns // block, block], np.int64), f"blocks_{columns}_{leading}"
        )
        whole = self._shared(np.array([*[0] * leading, columns], np.int64), f"row_{columns}_{leading}")
        axis = self._shared(np.array([-1], np.int64), "last_axis")
        split = self._add(node, "Reshape", [x, parts], f"{name}_blocks")
        turned = self._add(
            node, "MatMul", [split, self._shared(_hadamard(block), f"hadamard_{block}")], f"{name}_turned"
        )
        rows = self._add(node, "Reshape", [turned, whole], f"{name}_rows")
        highest = self._add(node, "ReduceMax", [rows, axis], f"{name}_highest")
        lowest = self._add(node, "ReduceMin", [rows, axis], f"{name}_lowest")
        negated = self._add(node, "Neg", [lowest], f"{name}_lowest_negated")
        # A row of zeros stays one.
        least = self._shared(np.array([1e-30], np.float32), "least")
        largest = self._add(node, "Max", [highest, negated, least], f"{name}_largest")
        most = self._shared(np.array(_LARGEST_CODE, np.float32), "most")
        inverse = self._add(node, "Div", [most, largest], f"{name}_inverse")
        spread = self._add(node, "Mul", [rows, inverse], f"{name}_spread")
        unit = self._shared(np.array(1, np.float32), "unit")
        middle = self._shared(np.array(_MIDDLE, np.uint8), "middle_scalar")
        codes = self._add(
            node, "QuantizeLinear", [spread, unit, middle], f"{name}_codes", dtype=ir.DataType.UINT8
        )
        return codes, largest

    def _weight(self, node: ir.Node, offsets: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        columns, rows = node.attributes["K"].as_int(), node.attributes["N"].as_int()
        source = node.inputs[1]
        assert source is not None
        base = f"{(source.name or 'weight')}{_SUFFIX}"
        known = self._graph.initializers.get(base)
        if known is not None:
            return known, self._graph.initializers[f"{base}_scales"]
        inputs = [None if value is None else deferred(value) for value in node.inputs[1:4]]
        shift = None if offsets is None else deferred(offsets)
        bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
        memo = _Pair(lambda: _integers(inputs, shift, columns, rows, bits, block))
        codes = lazy_initializer(self._graph, base, ir.DataType.INT8, (columns, rows), memo.first)
        scales = lazy_initializer(self._graph, f"{base}_scales", ir.DataType.FLOAT, (rows,), memo.second)
        self.nbytes += columns * rows + 4 * rows
        return codes, scales

    def _add(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(op_type, inputs, domain=domain, name=f"{name}{_SUFFIX}")
        node.outputs[0].name, node.outputs[0].type = f"{name}{_SUFFIX}", ir.TensorType(dtype)
        self._branch.insert_before(before, node)
        return node.outputs[0]

    def _shared(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        return _constant(self._graph, array, f"{name}{_SUFFIX}")


class _Pair:
    """Computes two arrays at once for two tensors that are written one after the other."""

    def __init__(self, compute: Callable[[], tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> None:
        self._compute = compute
        self._second: npt.NDArray[Any] | None = None

    def first(self) -> npt.NDArray[Any]:
        one, self._second = self._compute()
        return one

    def second(self) -> npt.NDArray[Any]:
        two, self._second = self._second, None
        return self._compute()[1] if two is None else two


def _integers(
    inputs: Sequence[_Computed | None],
    offsets: _Computed | None,
    columns: int,
    rows: int,
    bits: int,
    block: int,
) -> tuple[npt.NDArray[np.int8], Floats]:
    """The rotated weight as (K, N) codes, and a scale for each of its columns."""
    reading = Reading()
    given = [None if compute is None else compute(reading) for compute in inputs]
    codes, scales, zeros = (*given, None)[:3]
    assert codes is not None and scales is not None
    raw = codes.reshape(rows, -1)
    unpacked = raw if bits == 8 else np.stack([raw & 15, raw >> 4], axis=-1).reshape(rows, -1)
    blocks = -(-columns // block)
    values = unpacked.reshape(rows, blocks, block).astype(np.float32)
    if zeros is None:
        values -= float(1 << (bits - 1))
    elif zeros.dtype == np.uint8:
        packed = zeros.reshape(rows, -1)
        points = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)
        values -= points[:, :blocks, None].astype(np.float32)
    else:
        values -= zeros.reshape(rows, blocks, 1).astype(np.float32)
    values *= scales.reshape(rows, blocks, 1).astype(np.float32)
    if offsets is not None:
        shift = offsets(reading).reshape(rows, -1)
        # Blocks of the sums may be several of the product's.
        each = np.repeat(shift, blocks // shift.shape[1], axis=1)
        values += each.reshape(rows, blocks, 1).astype(np.float32)
    reading.drop_pages()
    weight = values.reshape(rows, -1)[:, :columns]
    size = _block(columns)
    turned = (weight.reshape(-1, size) @ _hadamard(size)).reshape(rows, columns)
    largest = np.maximum(np.abs(turned).max(axis=1), np.float32(1e-30))
    integers = np.rint(turned * (_LARGEST_CODE / largest)[:, None]).astype(np.int8)
    # The rows' own scales are given as their largest magnitudes; both factors of 127 are here.
    return np.ascontiguousarray(integers.T), (largest / _LARGEST_CODE**2).astype(np.float32)


def _hadamard(size: int) -> Floats:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Floats = (matrix / np.sqrt(np.float32(size))).astype(np.float32)
    return scaled


def _constant(graph: ir.Graph, array: npt.NDArray[Any], name: str) -> ir.Value:
    """One of a name in the graph."""
    known = graph.initializers.get(name)
    if known is not None:
        return known
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value
