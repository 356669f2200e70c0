"""The check after each pass: it passes what is right, names what is wrong, and nothing is written then."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxsmith.errors import CheckFailedError
from onnxsmith.graph_passes import make_passes, registry, run_passes
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.operations import optimize_model
from onnxsmith.pipeline.stepwise import StepVerifier

TEXT = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 8] x, float[batch, 8] unread) => (float[batch, 8] y, float[batch, 8] z)
{ d = Dropout(x) h = MatMul(d, w) y = Relu(h) z = Tanh(h) }
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(TEXT)
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


class ScaleWeights(GraphPass):
    """A pass that is wrong by one part in a hundred."""

    name: ClassVar[str] = "scale_weights"
    summary: ClassVar[str] = "wrong"

    def apply(self, model: ir.Model) -> Changes:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name="w")
        return Changes(1)


class BreakGraph(GraphPass):
    """A pass that leaves a graph which no checker takes."""

    name: ClassVar[str] = "break_graph"
    summary: ClassVar[str] = "wrong"

    def apply(self, model: ir.Model) -> Changes:
        next(node for node in model.graph if node.op_type == "MatMul").op_type = "NoSuchOperator"
        return Changes(1)


def test_right_passes_are_compared_step_by_step(model: Path) -> None:
    steps = [
        ("cleanup", {}),
        ("set_axes", {"batch": 3}),
        ("remove_unused_inputs", {}),
        ("select_outputs", {"names": ["h"]}),
        ("cleanup", {}),
    ]
    after = run_passes(load_package(model), make_passes(steps), verify=StepVerifier())
    found = [step.details.get("verified") for step in after.steps]
    assert found[0] is not None
    assert found[0]["max_abs"] == 0.0
    assert found[0]["tensors"] >= 4
    assert found[1] is not None
    assert found[1]["compared"]
    assert found[2] is not None
    assert found[2]["compared"]
    assert found[3] == {"compared": False, "why": "the pass changed the outputs"}
    # Nothing was left to clean up, so there was nothing to compare.
    assert found[4] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ScaleWeights, "pass scale_weights: the model after it differs from the one before: .*"),
        (BreakGraph, "pass break_graph: the model after it is broken: .*NoSuchOperator"),
    ],
)
def test_the_pass_that_breaks_the_model_is_named(
    wrong: type[GraphPass], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PASSES", {**registry.PASSES, wrong.name: f"{__name__}:{wrong.__name__}"})
    specs = [("cleanup", {}), (wrong.name, {}), ("lower_opset", {})]
    with pytest.raises(CheckFailedError, match=message):
        optimize_model(model, tmp_path / "out", specs, verify_each=True)
    assert not (tmp_path / "out").exists()


def test_rounding_is_judged_by_its_precision(model: Path, tmp_path: Path) -> None:
    specs = [("cleanup", {}), ("quantize_weights", {"block_size": 16}), ("strip_metadata", {})]
    proto = onnx.load(model)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 64
    onnx.save(proto, model)
    _, after = optimize_model(model, tmp_path / "out", specs, verify_each=True)
    step = next(step for step in after.steps if step.name == "quantize_weights")
    assert step.details["verified"]["max_abs"] > 0
    again: ModelPackage = load_package(tmp_path / "out")
    assert again.precision == "int4"


def test_a_model_that_came_with_two_nodes_of_one_name_is_no_passs_fault(tmp_path: Path) -> None:
    text = TEXT.replace("h = MatMul(d, w) y = Relu(h)", "[same] h = Abs(d) [same] y = Relu(h)")
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    _, after = optimize_model(
        tmp_path / "model.onnx", tmp_path / "out", [("set_axes", {"batch": 2})], verify_each=True
    )
    assert after.steps[-1].details["verified"]["compared"]
