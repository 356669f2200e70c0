"""Clean-up: fewer nodes, the same results to the bit, and nothing left for a second run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from generated_graphs import Array, Case, assert_same, cases, graph, run, serialized
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.cleanup import Cleanup, StripMetadata, operator_counts
from onnxsmith.graph_passes.versions import LowerIrVersion

HEAD = '<ir_version: 9, opset_import: ["": 18]> '
X = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)


def cleaned(text: str, feeds: dict[str, Array] | None = None, **weights: Array) -> ir.Model:
    """Cleans up, and asserts that it computes the same and that a second run finds nothing."""
    model = graph(text, **weights)
    feeds = {"x": X} if feeds is None else feeds
    before = run(model, feeds)
    Cleanup()(model)
    onnx.checker.check_model(ir.to_proto(model))
    assert_same(before, run(model, feeds))
    content = serialized(model)
    assert not Cleanup()(model).modified
    assert serialized(model) == content
    return model


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Add(x, x) b = Add(x, x) y = Mul(a, b)", ["Add", "Mul"]),
        ("a = Identity(x) b = Identity(a) y = Neg(b)", ["Neg"]),
        ("dead = Exp(x) y = Neg(x)", ["Neg"]),
        ("a = Transpose<perm = [1, 0]>(x) b = Transpose<perm = [1, 0]>(a) y = Neg(b)", ["Neg"]),
        ("o = Constant<value = float {1.0}>() a = Mul(x, o) y = Neg(a)", ["Neg"]),
        ("s = Shape(x) f = Shape(x) a = Reshape(x, s) b = Reshape(a, f) y = Neg(b)", ["Neg"]),
        ("k = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>() j = Add(k, k) y = Mul(x, j)", ["Mul"]),
        ("a = Clip(x, , ) y = Neg(a)", ["Clip", "Neg"]),
    ],
)
def test_fires(body: str, left: list[str]) -> None:
    model = cleaned(HEAD + f"g (float[2, 4] x) => (float[2, 4] y) {{ {body} }}")
    assert sorted(operator_counts(model)) == sorted(left)
    assert len(model.graph) == len(left)


def test_says_what_it_removed() -> None:
    model = graph(HEAD + "g (float[2, 4] x) => (float[2, 4] y) { a = Exp(x) b = Identity(x) y = Neg(b) }")
    outcome = Cleanup()(model)
    assert outcome.changes.details == {
        "nodes_before": 3,
        "nodes_after": 1,
        "removed": {"Exp": 1, "Identity": 1},
    }


def test_a_graph_that_is_clean_keeps_its_objects() -> None:
    model = graph(HEAD + "g (float[2, 4] x) => (float[2, 4] y) { y = Neg(x) }")
    Cleanup()(model)
    nodes = list(model.graph)
    assert not Cleanup()(model).modified
    assert list(model.graph) == nodes


@pytest.mark.parametrize("value", ["1e-09", "-1e-09", "1e-30"])
def test_a_tiny_addend_is_no_zero(value: str) -> None:
    """The constant patterns of onnxscript have a tolerance: x + 1e-9 was taken for x + 0."""
    text = (
        HEAD + f"g (float[2] x) => (float[2] y) <float e = {{{value}}}> {{ a = Add(x, e) y = Reciprocal(a) }}"
    )
    assert operator_counts(cleaned(text, {"x": np.zeros(2, np.float32)})) == {"Add": 1, "Reciprocal": 1}


def test_a_factor_near_one_is_no_one() -> None:
    text = HEAD + "g (float[2] x) => (float[2] y) <float e = {1.000001}> { y = Mul(x, e) }"
    assert operator_counts(cleaned(text, {"x": np.full(2, 1e6, np.float32)})) == {"Mul": 1}


def test_no_attribute_that_the_operator_set_lacks() -> None:
    """onnxscript writes Reshape's allowzero, which came with operator set 14."""
    text = (
        '<ir_version: 8, opset_import: ["": 13]> g (float[n] x, float[n] z) => (float[n] y) '
        "{ s = Shape(z) y = Reshape(x, s) }"
    )
    cleaned(text, {"x": X[0], "z": X[0]})


def test_outputs_keep_their_ranks() -> None:
    """The first of two equal nodes takes the place of the second, whose result is an output."""
    text = (
        HEAD + "g (float[a, b] x, int64[1] s) => (float[c] y, float[d, b] z) "
        "{ u = Reshape(x, s) y = Reshape(x, s) z = Neg(x) }"
    )
    model = graph(text)
    Cleanup()(model)
    onnx.checker.check_model(ir.to_proto(model))
    assert [str(value.shape) for value in model.graph.outputs] == ["[c]", "[d,b]"]


def test_nodes_of_one_name_get_names_of_their_own() -> None:
    model = graph(HEAD + "g (float[2, 4] x) => (float[2, 4] y) { [a] h = Neg(x) [a] y = Exp(h) }")
    assert Cleanup()(model).modified
    assert len({node.name for node in model.graph}) == 2
    run(model, {"x": X})
    assert not Cleanup()(model).modified


def test_outputs_that_are_left_out_stay_so() -> None:
    """With a name, ONNX Runtime would compute them."""
    model = graph(
        '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> g (float[2, 4] x) => (float[2, 4] y) '
        "{ i = Identity(x) y, a, b, s = com.microsoft.SkipSimplifiedLayerNormalization(i, x, w) }",
        w=np.ones(4, np.float32),
    )
    for value in model.graph[-1].outputs[1:3]:
        value.name = ""
    assert Cleanup()(model).modified
    assert [value.name for value in model.graph[-1].outputs] == ["y", "", "", "s"]
    assert not Cleanup()(model).modified


def test_no_form_of_a_constant_that_the_operator_set_lacks() -> None:
    """onnxscript writes value_ints, which came with operator set 12."""
    text = (
        '<ir_version: 8, opset_import: ["": 11]> g (float[2, 4] x) => (float[2, 4] y, int64[2] s) '
        "{ y = Neg(x) s = Shape(x) }"
    )
    model = cleaned(text)
    assert operator_counts(model) == {"Neg": 1, "Constant": 1}


def test_nothing_large_is_computed() -> None:
    shape = ", ".join(["100000"] * 3)
    text = (
        f"g (int64[1] x) => (float[1] y) <float o = {{1.0}}, int64[3] s = {{{shape}}}, int64 b = {{0}}> "
        "{ e = Expand(o, s) f = Gather(e, b) g = Gather(f, b) y = Gather(g, x) }"
    )
    model = graph(HEAD + text)
    Cleanup()(model)
    assert "Expand" in operator_counts(model)


def test_random_numbers_stay_random() -> None:
    text = (
        HEAD + "g (float[2] x) => (float[2] y) <float[2] p = {0.5, 0.5}> "
        "{ a = Bernoulli(p) c = RandomNormal<shape = [2]>() d = RandomNormal<shape = [2]>() "
        "s = Add(a, c) t = Add(s, d) y = Add(t, x) }"
    )
    model = graph(text)
    Cleanup()(model)
    counts = operator_counts(model)
    assert (counts["Bernoulli"], counts["RandomNormal"]) == (1, 2)


def test_defaults_of_inputs_stay_defaults() -> None:
    text = (
        HEAD + "g (float[2, 4] x, float[4] w = {1.0, 1.0, 1.0, 1.0}) => (float[2, 4] y) <float o = {1.0}> "
        "{ v = Mul(w, o) u = Add(v, v) y = Mul(x, u) }"
    )
    model = cleaned(text)
    assert [value.name for value in model.graph.inputs] == ["x", "w"]
    w = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(run(model, {"x": X, "w": w})["y"], X * (2 * w))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 4] x) => (float[2, 4] x) { }",
        "g (float[2, 4] x) => (float[2, 4] y) { y = Identity(x) }",
        "g (float[2, 4] x) => (float[2, 4] y, float[2, 4] z) { y = Neg(x) z = Neg(x) }",
        "g (float[2, 4] x) => (float[2, 4] y, float[2] w) <float[2] w = {1.0, 2.0}> { y = Neg(x) }",
        "g (float[2, 4] x) => (float[2, 4] y, int64[2] s) { y = Neg(x) s = Shape(x) }",
    ],
    ids=["the input", "a copy of the input", "twins", "a weight", "a constant"],
)
def test_the_signature_stays(text: str) -> None:
    model = graph(HEAD + text)
    wanted = [value.name for value in model.graph.outputs]
    if text.startswith("g (float[2, 4] x) => (float[2, 4] x)"):
        content = serialized(model)
        try:
            Cleanup()(model)
        except Exception as error:
            assert "signature" in str(error)
            assert serialized(model) == content
    else:
        model = cleaned(HEAD + text)
    assert [value.name for value in model.graph.outputs] == wanted
    assert [value.name for value in model.graph.inputs] == ["x"]


FUNCTIONS = """<ir_version: 9, opset_import: ["": 18, "local": 1]>
g (bool c, int64 n, float[2, 4] x) => (float[2, 4] y, float[2, 4] v, float s, float[2] t) {
  two = Constant<value = float {2.0}>()
  z = local.twice(x)
  y = If(c) <then_branch = a () => (p) { o = Constant<value = float {1.0}>() r = Mul(z, o) p = Add(r, two) },
             else_branch = b () => (q) { q = local.twice(z) }>
  true = Constant<value = bool {1}>()
  v = Loop(n, true, x) <body = l (int64 i, bool k, float[2, 4] w) => (bool k2, float[2, 4] w2) {
    k2 = Identity(k) j = Identity(w) w2 = Add(j, two) }>
  zero = Constant<value = float {0.0}>()
  u = Constant<value = float[2] {3.0, 4.0}>()
  s, t = Scan<num_scan_inputs = 1, body = m (float state, float e) => (float state2, float out) {
    d = Identity(e) state2 = Add(state, d) out = Mul(state2, two) }>(zero, u)
}
<domain: "local", opset_import: ["": 18]> twice (i) => (o) { o = Add(i, i) }"""


@pytest.mark.parametrize("condition", [True, False])
def test_subgraphs_and_functions_survive(condition: bool) -> None:
    feeds = {"c": np.array(condition), "n": np.array(3), "x": X}
    model = cleaned(FUNCTIONS, feeds)
    counts = operator_counts(model)
    assert {"If", "Loop", "Scan"} <= set(counts)
    assert "Identity" not in counts or counts["Identity"] <= 1
    assert not model.functions


def test_what_only_a_dead_branch_reads_goes() -> None:
    """onnxscript leaves the nodes of the other branch among the users of what they read."""
    text = (
        HEAD + "g (float[2, 4] x) => (float[2, 4] y) <bool c = {0}, float[4] w = {1.0, 2.0, 3.0, 4.0}> { "
        "h = Exp(x) y = If(c) <then_branch = a () => (p) { p = Add(h, w) }, "
        "else_branch = b () => (q) { q = Neg(x) }> }"
    )
    model = cleaned(text)
    assert operator_counts(model) == {"Neg": 1}
    assert not model.graph.initializers


def counting(shape: tuple[int, ...], reads: list[str], name: str) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        reads.append(name)
        return ir.Tensor(np.ones(shape, np.float32), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)


def test_large_weights_are_not_read() -> None:
    text = (
        HEAD + "g (float[2, 64] x) => (float[2, 64] y) { t = Transpose<perm = [1, 0]>(a) h = MatMul(x, t) "
        "i = Mul(h, b) j = Add(i, c) k = Identity(j) y = Sub(k, d) }"
    )
    shapes = {"a": (64, 64), "b": (32, 64), "c": (32, 64), "d": (32, 64)}
    model = graph(text, **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    reads: list[str] = []
    for name, shape in shapes.items():
        model.graph.initializers[name].const_value = counting(shape, reads, name)
    names = list(model.graph.initializers)
    assert Cleanup()(model).modified
    assert reads == []
    assert list(model.graph.initializers) == names
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Mul", "Add", "Sub"]


def test_large_weights_on_disk_are_not_read(tmp_path: Path) -> None:
    data = tmp_path / "w.data"
    size = 1 << 36
    with data.open("wb") as file:
        file.truncate(size)
    tensor = ir.ExternalTensor(
        "w.data", 0, size, ir.DataType.FLOAT, shape=ir.Shape((1 << 17, 1 << 17)), name="w", base_dir=tmp_path
    )
    model = graph(
        HEAD + "g (float[m, k] x) => (float[m, n] y) { a = Identity(w) h = MatMul(x, a) y = Identity(h) }",
        w=np.ones((1, 1), np.float32),
    )
    model.graph.initializers["w"].const_value = tensor
    model.graph.initializers["w"].shape = ir.Shape((1 << 17, 1 << 17))
    Cleanup()(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert model.graph.initializers["w"].const_value is tensor


def test_batch_normalization_is_folded_into_a_convolution() -> None:
    random = np.random.default_rng(0)
    weights: dict[str, Array] = {
        "w": random.standard_normal((16, 16, 3, 3)).astype(np.float32),
        **{name: random.uniform(0.5, 1, 16).astype(np.float32) for name in ("s", "b", "m", "v")},
    }
    text = (
        HEAD + "g (float[1, 16, 8, 8] x) => (float[1, 16, 6, 6] y) "
        "{ c = Conv(x, w) y = BatchNormalization(c, s, b, m, v) }"
    )
    model = graph(text, **weights)
    feeds = {"x": random.standard_normal((1, 16, 8, 8)).astype(np.float32)}
    before = run(model, feeds)
    Cleanup()(model)
    assert operator_counts(model) == {"Conv": 1}
    # Rounding of the weights differs: this is the one rewrite that is not exact.
    assert_same(before, run(model, feeds), rtol=1e-5)


@pytest.mark.parametrize("limit", ["max_input_elements", "max_output_elements"])
def test_limits_are_checked(limit: str) -> None:
    with pytest.raises(BadInputError, match=f"pass cleanup: {limit}: -1; expected 0 or more"):
        Cleanup(**{limit: -1})


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(twin_names=True))
def test_any_graph_computes_the_same(case: Case) -> None:
    before = case.expected()
    Cleanup()(case.model)
    onnx.checker.check_model(ir.to_proto(case.model))
    assert_same(before, run(case.model, case.feeds))
    content = serialized(case.model)
    assert not Cleanup()(case.model).modified
    assert serialized(case.model) == content


def test_control_a_wrong_constant_is_noticed() -> None:
    text = HEAD + "g (float[2, 4] x) => (float[2, 4] y) <float o = {1.0}> { a = Add(x, o) y = Neg(a) }"
    before = run(graph(text), {"x": X})
    wrong = graph(text.replace("{1.0}", "{1.0000001}"))
    with pytest.raises(AssertionError):
        assert_same(before, run(wrong, {"x": X}))


def chain(length: int) -> ir.Model:
    value = ir.Value(name="x", shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes: list[ir.Node] = []
    last = value
    for index in range(length // 4):
        one = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.float32))}, name=f"c{index}")
        factor = ir.node("Mul", [last, one.outputs[0]], name=f"m{index}")
        copy = ir.node("Identity", [factor.outputs[0]], name=f"i{index}")
        step = ir.node("Sin", [copy.outputs[0]], name=f"s{index}")
        nodes += [one, factor, copy, step]
        last = step.outputs[0]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"v{index}"
    last.shape, last.type = ir.Shape([4]), ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(
        ir.Graph([value], [last], nodes=nodes, opset_imports={"": 18}, name="chain"), ir_version=9
    )


@pytest.mark.slow
def test_time_is_about_linear() -> None:
    seconds: dict[int, float] = {}
    for length in (2000, 10_000):
        model = chain(length)
        began = time.process_time()
        Cleanup()(model)
        seconds[length] = time.process_time() - began
        assert operator_counts(model) == {"Sin": length // 4}
    assert seconds[10_000] < 60
    assert seconds[10_000] < 10 * seconds[2000]


def test_strip_metadata() -> None:
    model = graph(HEAD + "g (float[2, 4] x) => (float[2, 4] y) { y = Neg(x) }")
    model.graph[0].metadata_props["stack"] = "/home/someone/model.py"
    model.graph[0].doc_string = "File /home/someone"
    model.graph[0].outputs[0].metadata_props["a"] = "/home/someone"
    model.graph.inputs[0].metadata_props["a"] = "/home/someone"
    model.graph.doc_string = model.doc_string = "/home/someone"
    before = run(model, {"x": X})
    assert StripMetadata()(model).modified
    content = serialized(model)
    assert b"someone" not in content
    assert_same(before, run(model, {"x": X}))
    assert not StripMetadata()(model).modified
    assert serialized(model) == content


def versioned(opset: int, ir_version: int) -> ir.Model:
    return graph(
        f'<ir_version: {ir_version}, opset_import: ["": {opset}]> '
        "g (float[2, 4] x) => (float[2, 4] y) { y = Neg(x) }"
    )


@pytest.mark.parametrize(
    ("opset", "before", "after"),
    [
        (17, 10, 8),
        (18, 10, 8),
        (20, 10, 9),
        (21, 11, 10),
        (23, 13, 11),
        (25, 14, 13),
        (26, 14, 14),
        (18, 7, 7),
    ],
)
def test_lower_ir_version(opset: int, before: int, after: int) -> None:
    model = versioned(opset, before)
    outcome = LowerIrVersion()(model)
    assert model.ir_version == after
    assert outcome.modified == (before != after)
    assert not LowerIrVersion()(model).modified
    if opset <= 23:
        np.testing.assert_array_equal(run(model, {"x": X})["y"], -X)


def add_constant(model: ir.Model, dtype: ir.DataType) -> None:
    tensor = ir.Tensor(np.zeros(2, dtype.numpy()), dtype=dtype)
    node = ir.node("Constant", [], {"value": tensor})
    node.outputs[0].name = "k"
    model.graph.insert_before(model.graph[0], node)


@pytest.mark.parametrize(
    ("dtype", "version"),
    [
        ("INT4", 10),
        ("UINT4", 10),
        ("FLOAT8E4M3FN", 9),
        ("FLOAT8E5M2FNUZ", 9),
        ("FLOAT4E2M1", 11),
        ("INT8", 8),
    ],
)
@pytest.mark.parametrize("where", ["initializer", "constant", "cast", "branch"])
def test_types_need_their_ir_version(dtype: str, version: int, where: str) -> None:
    model = versioned(18, 12)
    kind: Any = ir.DataType[dtype]
    if where == "initializer":
        value = ir.Value(name="k", const_value=ir.Tensor(np.zeros(2, kind.numpy()), dtype=kind, name="k"))
        value.shape, value.type = ir.Shape([2]), ir.TensorType(kind)
        model.graph.register_initializer(value)
    elif where == "cast":
        node = ir.node("Cast", [model.graph.inputs[0]], {"to": int(kind)})
        node.outputs[0].name = "k"
        model.graph.append(node)
    elif where == "constant":
        add_constant(model, kind)
    else:
        constant = ir.node("Constant", [], {"value": ir.Tensor(np.zeros(2, kind.numpy()), dtype=kind)})
        constant.outputs[0].name = "k"
        inner = ir.Graph([], constant.outputs, nodes=[constant], opset_imports={"": 18}, name="inner")
        condition = ir.Value(name="c", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        model.graph.inputs.append(condition)
        node = ir.node("If", [condition], {"then_branch": inner})
        node.outputs[0].name = "k2"
        model.graph.append(node)
    LowerIrVersion()(model)
    assert model.ir_version == version


@pytest.mark.parametrize(
    ("split", "left"),
    [
        ("SplitToSequence<axis = -1>(x, three)", {"Split": 1, "Add": 1}),
        ("SplitToSequence<axis = 1>(x, four)", {"Split": 1, "Add": 1}),
        ("SplitToSequence<axis = 1>(x, sizes)", {"Split": 1, "Add": 1}),
        ("SplitToSequence<axis = 1>(x, asked)", None),
        ("SplitToSequence<axis = 1, keepdims = 0>(x)", None),
    ],
)
@pytest.mark.parametrize("opset", [12, 17, 18])
def test_parts_of_a_sequence_that_are_known_become_split(
    split: str, left: dict[str, int] | None, opset: int
) -> None:
    """Torch writes ``split`` so: GPT-2's query, key and value."""
    output = "float[2] y" if split.endswith("keepdims = 0>(x)") else "float[2, width] y"
    model = graph(
        f'<ir_version: 7, opset_import: ["" : {opset}]> g (float[2, 6] x, int64 asked) => ({output}) '
        f"{{ parts = {split} a = SequenceAt(parts, zero) b = SequenceAt(parts, one) y = Add(a, b) }}",
        three=np.array(3), four=np.array(5), sizes=np.array([3, 3]), zero=np.array(0), one=np.array(1),
    )  # fmt: skip
    case = {"x": np.arange(12, dtype=np.float32).reshape(2, 6), "asked": np.array(3)}
    before = run(model, case)
    Cleanup()(model)
    if left is not None and opset >= (18 if "three" in split else 13):
        assert operator_counts(model) == left
    else:
        assert "SplitToSequence" in operator_counts(model)
    assert_same(before, run(model, case))
