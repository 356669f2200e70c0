"""Weights in integers, as ONNX Runtime's quantizer writes them: a wrong scale is found at its node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.onnx_file import load_model
from onnxsmith.pipeline.bisecting import bisect_models
from onnxsmith.runtime.weight_audit import audit_weights

onnx = pytest.importorskip("onnx")
quantization = pytest.importorskip("onnxruntime.quantization")
pytest.importorskip("sympy", reason="onnxruntime's quantizer imports it")

helper, numpy_helper = onnx.helper, onnx.numpy_helper
SIZE = 32
LAYERS = 4


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
    """Random inputs for calibration."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self._left = [{"x": random.standard_normal((8, SIZE)).astype(np.float32)} for _ in range(8)]

    def get_next(self) -> dict[str, Any] | None:
        return self._left.pop() if self._left else None


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of a product, a bias and a tanh."""
    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for number in range(LAYERS):
        matrix = (random.standard_normal((SIZE, SIZE)) / 6).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{number}"))
        weights.append(numpy_helper.from_array((matrix[0] / 3).astype(np.float32), f"b{number}"))
        names = [f"{kind}{number}" for kind in ("m", "a", "t")]
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], [names[0]], f"product{number}"))
        nodes.append(helper.make_node("Add", [names[0], f"b{number}"], [names[1]], f"bias{number}"))
        nodes.append(helper.make_node("Tanh", [names[1]], [names[2]], f"tanh{number}"))
        value = names[2]
    nodes[-1].output[0] = "y"
    kind = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "layers", [kind("x", 1, ["n", SIZE])], [kind("y", 1, ["n", SIZE])], weights
    )
    path = tmp_path_factory.mktemp("floats") / "floats.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def quantized(source: Path, target: Path, form: str) -> Path:
    quantization.quantize_static(
        str(source), str(target), Samples(), quant_format=quantization.QuantFormat[form],
        per_channel=form == "QDQ",
    )  # fmt: skip
    return target


def edited(source: Path, target: Path, name: str, factors: Any) -> Path:
    """A copy in which a weight or scale is multiplied."""
    model = onnx.load(source)
    tensor = next(one for one in model.graph.initializer if one.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factors).astype(array.dtype), name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_a_wrong_scale_is_found_at_its_node(floats: Path, tmp_path: Path, form: str) -> None:
    healthy = quantized(floats, tmp_path / "healthy.onnx", form)
    result = bisect_models(str(floats), healthy, samples=2, threads=1)
    assert not any(blame.detail for blame in result.blamed), result.verdict
    factors: Any = 8.0
    if form == "QDQ":
        factors = np.ones(SIZE, np.float32)
        factors[5] = 8
    wrong = edited(healthy, tmp_path / "wrong.onnx", "w2_scale", factors)
    result = bisect_models(str(floats), wrong, samples=2, threads=1)
    assert not result.passed
    blamed = result.blamed[0]
    node = {"QDQ": ("product2", "MatMul"), "QOperator": ("product2_quant", "QLinearMatMul")}[form]
    assert (blamed.node, blamed.operator) == node
    assert "of w2_quantized wrong: at [" in blamed.detail
    if form == "QDQ":
        assert ", 5] it is" in blamed.detail


def test_range_that_was_moved_into_weights_is_no_fault(floats: Path, tmp_path: Path) -> None:
    """SmoothQuant gives each input channel a factor; one channel alone, or one for all, is a fault."""
    right = {one.name: numpy_helper.to_array(one) for one in onnx.load(floats).graph.initializer}
    random = np.random.default_rng(2)
    moved = np.exp(random.normal(0, 0.5, (SIZE, 1))).astype(np.float32)
    one = np.ones((SIZE, 1), np.float32)
    one[3] = 2
    for factors, said in ((moved, False), (one, True), (np.full((SIZE, 1), 2, np.float32), True)):
        found = []
        path = edited(floats, tmp_path / "moved.onnx", "w1", factors)
        target = quantized(path, tmp_path / "target.onnx", "QDQ")
        for node in load_model(target).graph:
            if node.name == "product1":
                found.append(audit_weights(node, lambda name: right.get(name.removesuffix("_quantized"))))
        assert [bool(text) for text in found] == [said], found
