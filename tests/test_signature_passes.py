"""Fixed axes, chosen outputs, unread inputs, wanted logits; versions of the operator set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from generated_graphs import Array, assert_same, graph, run, serialized
from onnxsmith.errors import BadInputError, PassError
from onnxsmith.graph_passes import load_pass, make_passes, operator_counts
from onnxsmith.graph_passes.cleanup import Cleanup
from onnxsmith.graph_passes.signature import LogitsToKeep, RemoveUnusedInputs, SelectOutputs, SetAxes
from onnxsmith.graph_passes.versions import ConvertOpset, LowerOpset
from onnxsmith.onnx_file import check_model, save_model
from onnxsmith.pipeline.arguments import pass_spec

HEAD = '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> '
RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((4, 6)).astype(np.float32)


def views() -> ir.Model:
    """Computes the shape that it views its input in, as exporters write it."""
    model = graph(
        HEAD + "g (float[batch, sequence, 4] x) => (float[batch, heads, sequence, 2] y) { "
        "s = Shape<start = 0, end = 2>(x) t = Concat<axis = 0>(s, tail) v = Reshape(x, t) "
        "y = Transpose<perm = [0, 2, 1, 3]>(v) }",
        tail=np.array([2, 2]),
    )
    for node in model.graph:
        if node.op_type == "Reshape":
            node.outputs[0].shape = ir.Shape(["batch", "sequence", 2, 2])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model


X = RANDOM.standard_normal((2, 3, 4)).astype(np.float32)


def test_fixed_axes_let_shapes_fold() -> None:
    model = views()
    before = run(model, {"x": X})
    [one] = make_passes([pass_spec("set_axes:batch=2,sequence=3")])
    assert one.arguments() == {"axes": {"batch": 2, "sequence": 3}}
    assert one(model).modified
    assert str(model.graph.inputs[0].shape) == "[2,3,4]"
    assert not one(model).modified
    Cleanup()(model)
    assert operator_counts(model) == {"Reshape": 1, "Transpose": 1}
    assert_same(before, run(model, {"x": X}))


def test_sizes_that_follow_are_fixed_too() -> None:
    model = views()
    model.graph.outputs[0].shape = ir.Shape(["batch", 2, "2*sequence + 1", "sequence // other"])
    SetAxes(axes={"sequence": 5})(model)
    assert str(model.graph.outputs[0].shape) == "[batch,2,11,sequence // other]"


def test_an_axis_may_be_named_by_input_and_number() -> None:
    model = views()
    SetAxes(axes={"x.1": 3})(model)
    assert str(model.graph.inputs[0].shape) == "[batch,3,4]"
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert str(values["v"].shape) == "[batch,3,2,2]"
    assert not SetAxes(axes={"x.1": 3})(model).modified


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"btach": 1}, "the axis 'btach'; expected one of the dynamic axes batch, sequence, x.0, x.1"),
        ({}, "no axis; expected at least one"),
        ({"x.2": 5}, "axis 2 of 'x' fixed at 4"),
        ({"x.0": 1, "batch": 2}, "sizes 2 and 1 for the axis 'batch'"),
    ],
)
def test_axes_that_are_refused(axes: dict[str, int], message: str) -> None:
    model = views()
    content = serialized(model)
    with pytest.raises(PassError) as caught:
        SetAxes(axes=axes)(model)
    assert message in str(caught.value)
    assert serialized(model) == content


@pytest.mark.parametrize("size", [0, -1, True, "two"])
def test_sizes_that_are_refused(size: object) -> None:
    with pytest.raises(BadInputError, match=r"set_axes: batch: .*; expected 1 or more"):
        load_pass("set_axes").create({"batch": size})


def test_axes_are_a_mapping() -> None:
    with pytest.raises(BadInputError, match="expected a mapping from axis to size"):
        load_pass("set_axes").create({"axes": [1]})


def two_heads() -> ir.Model:
    return graph(
        HEAD + "g (float[batch, 4] x, float[batch, 6] other) => (float[batch, 6] y) "
        "{ hidden = MatMul(x, w) r = Relu(hidden) y = Add(r, other) }",
        w=W,
    )


def test_a_model_is_cut_at_named_tensors(tmp_path: Path) -> None:
    model = two_heads()
    feeds = {"x": X[0], "other": np.ones((3, 6), np.float32)}
    outcome = SelectOutputs(names=("hidden",))(model)
    assert outcome.changes.details == {
        "outputs": ["hidden"],
        "nodes_removed": 2,
        "inputs_removed": ["other"],
    }
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_allclose(run(model, {"x": feeds["x"]})["hidden"], X[0] @ W, rtol=1e-6)
    save_model(model, tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")
    assert not SelectOutputs(names=("hidden",))(model).modified


def test_inputs_stay_on_request() -> None:
    model = two_heads()
    SelectOutputs(names=("r", "hidden"), remove_inputs=False)(model)
    assert [value.name for value in model.graph.inputs] == ["x", "other"]
    got = run(model, {"x": X[0], "other": np.ones((3, 6), np.float32)})
    assert list(got) == ["r", "hidden"]
    np.testing.assert_array_equal(got["r"], np.maximum(got["hidden"], 0))
    assert RemoveUnusedInputs()(model).changes.details == {"inputs_removed": ["other"]}
    assert not RemoveUnusedInputs()(model).modified


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("hiden",), "'hiden', which no node of the main graph makes; expected a value such as hidden"),
        (("x",), "'x', which no node of the main graph makes"),
        ((), "each output once"),
        (("y", "y"), "each output once"),
    ],
)
def test_outputs_that_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(PassError) as caught:
        SelectOutputs(names=names)(two_heads())
    assert message in str(caught.value)


def decoder(tail: str = "logits = MatMul(h, w)") -> ir.Model:
    model = graph(
        HEAD + "g (float[batch, sequence, 4] x) => (float[batch, sequence, 6] logits) "
        f"<float cap = {{3.0}}> {{ h = Relu(x) {tail} }}",
        w=W,
    )
    shapes = {"h": 4, "p": 6, "q": 6, "r": 6}
    for node in model.graph:
        value = node.outputs[0]
        if value.name in shapes:
            value.shape = ir.Shape(["batch", "sequence", shapes[value.name]])
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


@pytest.mark.parametrize(
    "tail", ["logits = MatMul(h, w)", "p = MatMul(h, w) q = Div(p, cap) r = Tanh(q) logits = Mul(r, cap)"]
)
def test_logits_of_the_last_positions(tail: str, tmp_path: Path) -> None:
    model = decoder(tail)
    before = run(model, {"x": X})
    outcome = LogitsToKeep()(model)
    assert outcome.changes.details == {"input": "num_logits_to_keep", "default": 0}
    assert_same(before, run(model, {"x": X}))
    for kept in (1, 2, 3):
        got = run(model, {"x": X, "num_logits_to_keep": np.array(kept)})["logits"]
        np.testing.assert_allclose(got, before["logits"][:, -kept:], rtol=1e-6)
    assert not LogitsToKeep()(model).modified
    save_model(model, tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("p = MatMul(h, w) logits = Softmax<axis = 1>(p)", "lies between the output head and it"),
        ("logits = Relu(h)", "lies between the output head and it"),
        ("p = MatMul(h, w) q = Add(p, p) logits = Tanh(q)", "lies between the output head and it"),
    ],
)
def test_logits_that_are_left_alone(tail: str, reason: str) -> None:
    outcome = LogitsToKeep()(decoder(tail))
    assert not outcome.modified
    assert reason in outcome.changes.skipped["logits"]
    assert LogitsToKeep(output="scores")(decoder()).changes.skipped == {
        "scores": "the graph has no such output"
    }


def test_the_lowest_operator_set_that_means_the_same() -> None:
    model = graph(HEAD.replace("20", "21") + "g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }")
    outcome = LowerOpset()(model)
    assert outcome.changes.details == {"before": 21, "after": 18, "because_of": "Relu"}
    assert model.opset_imports[""] == 18
    assert not LowerOpset()(model).modified
    assert LowerOpset(lowest=7)(model).changes.details["after"] == 14


def test_an_operator_of_a_late_set_keeps_it() -> None:
    """Gelu came with 20; ReduceMax took its axes as an input with 18 and more types with 20."""
    text = HEAD.replace("20", "21") + "g (float[2, 4] x) => (float[2, 4] y) { y = Gelu(x) }"
    assert LowerOpset()(graph(text)).changes.details == {"before": 21, "after": 20, "because_of": "Gelu"}
    unknown = HEAD.replace("20", "21") + "g (float[2, 4] x) => (float[2, 4] y) { y = Unheard(x) }"
    outcome = LowerOpset()(graph(unknown))
    assert not outcome.modified
    assert outcome.changes.details == {"opset": 21, "because_of": "Unheard"}


def test_conversion_to_a_later_operator_set() -> None:
    model = graph(
        '<ir_version: 7, opset_import: ["" : 12]> g (float[2, 4] x) => (float[2, 1] y) '
        "{ s = Softmax<axis = 1>(x) y = ReduceSum<axes = [1], keepdims = 1>(s) }"
    )
    before: dict[str, Array] = run(model, {"x": X[0, :2]})
    assert ConvertOpset(version=18)(model).changes.details == {"before": 12, "after": 18}
    assert model.opset_imports[""] == 18
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same(before, run(model, {"x": X[0, :2]}), rtol=1e-6)
    assert not ConvertOpset(version=18)(model).modified
    with pytest.raises(PassError, match=r"opset 18 with \w+, .* since opset 13"):
        ConvertOpset(version=12)(model)
    assert ConvertOpset(version=15)(model).changes.details == {"before": 18, "after": 15}
    with pytest.raises(BadInputError, match="convert_opset: version: 99; expected 7 to"):
        ConvertOpset(version=99)


def test_a_cut_behind_a_call_of_a_function() -> None:
    """Types are not inferred through calls: the function is inlined, so that the output gets one."""
    text = """<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
    g (float[n, 4] x) => (float[n, 4] y) { h = own.Twice(x) r = Relu(h) y = Neg(r) }
    <opset_import: ["" : 18], domain: "own"> Twice (a) => (b) { b = Add(a, a) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert load_pass("select_outputs").create({"names": ["r"]})(model).modified
    [output] = model.graph.outputs
    assert (output.name, output.dtype) == ("r", ir.DataType.FLOAT)
    x = np.array([[1, -2, 3, -4]], np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})["r"], np.maximum(2 * x, 0))
