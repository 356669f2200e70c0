"""Convolutions on 8 bit integers: what ONNX Runtime makes of them, and what they lose."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from generated_graphs import Array, graph, run, serialized
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.dynamic import QuantizeDynamic
from onnxsmith.graph_passes.static import QuantizeStatic
from sample_activations import activations_on

TEXT = """<ir_version: 9, opset_import: ["": 18]>
g (float[n, 3, 16, 16] x) => (float[n, 10] y) {
  [stem] a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
  r = Relu(a)
  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
  [one] b = Conv<pads = [1, 1, 1, 1]>(p, w2)
  s = Relu(b)
  [two] c = Conv<pads = [1, 1, 1, 1]>(s, w3, b3)
  [sum] d = Add(c, p)
  t = Relu(d)
  m = GlobalAveragePool(t)
  f = Flatten(m)
  [head] y = Gemm<transB = 1>(f, w4, b4)
}"""


def weights() -> dict[str, Array]:
    random = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 16, 3, 3), "w4": (10, 16)}
    sizes = shapes | {"b1": (16,), "b3": (16,), "b4": (10,)}
    made = {
        name: (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in sizes.items()
    }
    # Output channels of very different size: what one scale for all of them would lose.
    made["w2"] *= np.geomspace(0.02, 1, 16, dtype=np.float32)[:, None, None, None]
    return made


def inputs(count: int, seed: int = 1) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((2, 3, 16, 16)).astype(np.float32) for _ in range(count)]


activations = activations_on([{"x": x} for x in inputs(10)])


def quantized(**options: Any) -> tuple[ir.Model, dict[str, Any], float]:
    model = graph(TEXT, **weights())
    x = inputs(1, seed=7)[0]
    expected = run(model, {"x": x})["y"]
    in_context(model, PassContext(activations=activations))
    details = QuantizeStatic(**options)(model).changes.details
    onnx.checker.check_model(ir.to_proto(model))
    got = run(model, {"x": x})["y"]
    return model, details, float(np.square(got - expected).sum() / np.square(expected).sum())


def kernels(model: ir.Model, directory: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 4
    options.profile_file_prefix = str(directory / "profile")
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": inputs(1)[0]})
    events = json.loads(Path(session.end_profiling()).read_text())
    return Counter(e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))


def test_convolutions_run_on_integers_from_end_to_end(tmp_path: Path) -> None:
    model, details, error = quantized()
    assert (details["convolutions"], details["integer"]) == (3, 1)
    assert 0 < error < 1e-3
    ran = kernels(model, tmp_path)
    assert ran["QLinearConv"] == 3 and ran["QLinearAdd"] == 1 and ran["Conv"] == 0
    assert ran["QuantizeLinear"] <= 2, ran
    layers = details["layers"]
    assert {layers[name]["operator"] for name in ("stem", "one", "two")} == {"Conv"}
    assert layers["sum"]["operator"] == "Add"
    assert all(0 < layers[name]["weight_error"] < 1e-3 for name in ("stem", "one", "two"))
    # Control: one scale for channels that differ loses what is small.
    shared = quantized(per_channel=False)[1]["layers"]
    assert shared["one"]["weight_error"] > 3 * layers["one"]["weight_error"]


@pytest.mark.parametrize("form", ["qdq", "qoperator", "integer"])
@pytest.mark.parametrize("calibration", ["minmax", "percentile"])
def test_every_form_and_method_takes_convolutions(form: str, calibration: str) -> None:
    # Results of the last product are rounded as well in that form, and there are ten of them.
    assert quantized(form=form, calibration=calibration)[2] < (2e-2 if form == "qoperator" else 1e-3)


def test_what_stays_in_float_says_why() -> None:
    _, details, _ = quantized(skip_nodes=("one",))
    assert details["convolutions"] == 2
    model = graph(TEXT, **weights())
    in_context(model, PassContext(activations=activations))
    skipped = QuantizeStatic(skip_nodes=("one",))(model).changes.skipped
    assert skipped["one"] == "skip_nodes has 'one'"
    model = graph(TEXT, **weights())
    in_context(model, PassContext(activations=activations))
    outcome = QuantizeStatic(form="qdq", activations="uint16")(model)
    assert "quantize_static computes Conv on 8 bit integers" in outcome.changes.skipped["stem"]
    assert "Conv" in QuantizeDynamic()(graph(TEXT, **weights())).changes.skipped["stem"]


def test_convolutions_alone_are_enough_to_quantize() -> None:
    alone = graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n, 3, 16, 16] x) => (float[n, 16, 16, 16] y) {
          [stem] y = Conv<pads = [1, 1, 1, 1]>(x, w1)
        }""",
        w1=weights()["w1"],
    )
    in_context(alone, PassContext(activations=activations))
    assert QuantizeStatic()(alone).changes.details["convolutions"] == 1
    turned = graph(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[n, 3, 4, 4] x) => (float[n, 2, 8, 8] y) {
          [up] y = ConvTranspose<strides = [2, 2]>(x, w)
        }""",
        w=np.ones((3, 2, 2, 2), np.float32),
    )
    with pytest.raises(PreconditionError, match="up: ONNX Runtime has no integer ConvTranspose"):
        QuantizeStatic()(turned)


def test_a_table_of_ranges_serves_convolutions_too(tmp_path: Path) -> None:
    _, details, error = quantized()
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"ranges": details["ranges"], "factors": details["factors"]}))
    assert quantized(table=str(table))[2] == pytest.approx(error, rel=0.5)
