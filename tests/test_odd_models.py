"""Valid models of unusual form, as other tools write them, optimised to the same results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from onnxsmith import inspect_model, optimize_model
from onnxsmith.graph_passes import PRESETS

X = "float[a, 4] x"
HEAD = '<ir_version: 9, opset_import: ["": 18]> g '
MODELS = {
    "nested functions": '<ir_version: 9, opset_import: ["": 18, "my": 1]> g '
    f"({X}) => (float[a, 4] y) {{ y = my.outer(x) }} "
    '<domain: "my", opset_import: ["": 18, "my": 1]> outer (v) => (w) { t = my.twice(v) w = my.twice(t) } '
    '<domain: "my", opset_import: ["": 18]> twice (v) => (w) '
    "{ two = Constant<value = float {2.0}>() w = Mul(v, two) }",
    "branches": f"{HEAD} ({X}, bool c) => (float[a, 4] y) {{ k = Relu(x) y = If (c) <"
    "then_branch = t () => (float[a, 4] p) { i = Identity(k) p = Neg(i) }, "
    "else_branch = e () => (float[a, 4] q) { q = Identity(k) }> }",
    "a branch that is known": f"{HEAD} ({X}) => (float[a, 4] y) "
    "{ c = Constant<value = bool {1}>() y = If (c) <"
    "then_branch = t () => (float[a, 4] p) { p = Neg(x) }, "
    "else_branch = e () => (float[a, 4] q) { q = Abs(x) }> }",
    "a loop": f"{HEAD} ({X}, int64 n) => (float[a, 4] y, float[b, a, 4] all) "
    "{ c = Constant<value = bool {1}>() y, all = Loop (n, c, x) <body = b (int64 i, bool g, float[a, 4] v) "
    "=> (bool h, float[a, 4] u, float[a, 4] s) { h = Identity(g) u = Add(v, v) s = Add(u, x) }> }",
    "a scan": f"{HEAD} (float[3, 4] x) => (float[4] y, float[3, 4] all) "
    "{ z = Constant<value = float[4] {0, 0, 0, 0}>() y, all = Scan <num_scan_inputs = 1, "
    "body = b (float[4] s, float[4] v) => (float[4] t, float[4] o) "
    "{ t = Add(s, v) o = Identity(t) }>(z, x) }",
    "sequences": f"{HEAD} ({X}) => (float[b, 4] y, seq(float[a, 4]) s) "
    "{ n = Neg(x) s = SequenceConstruct(x, n) y = ConcatFromSequence<axis = 0>(s) }",
    "opset 7": '<ir_version: 3, opset_import: ["": 7]> g (float[2, 4] x) => (float[2, 4] y) '
    "{ d = Dropout<ratio = 0.5>(x) y = Relu(d) }",
    "opset 11": '<ir_version: 6, opset_import: ["": 11]> g (float[2, 4] x) => (float[2, 1] y) '
    "{ u = Unsqueeze<axes = [0]>(x) s = Squeeze<axes = [0]>(u) p = Softmax<axis = 1>(s) "
    "y = ReduceSum<axes = [1]>(p) }",
    "the long name of the default domain": '<ir_version: 9, opset_import: ["ai.onnx": 18]> g '
    "(float[2, 4] x) => (float[2, 4] y) { t = ai.onnx.Identity(x) y = ai.onnx.Neg(t) }",
    "other domains alone": '<ir_version: 9, opset_import: ["com.microsoft": 1]> g '
    "(float[2, 4] x) => (float[2, 4] y) { y = com.microsoft.Gelu(x) }",
    "an output that is an input": f"{HEAD} ({X}) => (float[a, 4] x, float[a, 4] y) {{ y = Neg(x) }}",
    "no nodes": f"{HEAD} ({X}) => (float[a, 4] x) {{ }}",
    "no inputs": f"{HEAD} () => (float[2] y) {{ y = Constant<value = float[2] {{1, 2}}>() }}",
    "one value as two outputs": f"{HEAD} ({X}) => (float[a, 4] y, float[a, 4] z) "
    "{ y = Neg(x) z = Identity(y) }",
    "zero rows": f"{HEAD} (float[0, 4] x) => (float[0, 4] y) {{ t = Mul(x, x) y = Neg(t) }}",
    "text": f"{HEAD} (string[a] x) => (string[b] y) {{ i = Identity(x) y = Concat<axis = 0>(i, x) }}",
    "a declared shape that is wrong": f"{HEAD} (float[2, 4] x) => (float[2, 5] y) "
    "{ t = Transpose(x) s = Transpose(t) y = Neg(s) }",
}


def outputs(path: Path, feeds: dict[str, Any]) -> list[tuple[str, Any]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return list(zip(names, session.run(names, given), strict=True))


@pytest.mark.parametrize("preset", ["clean", "cpu-fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_optimised_to_the_same_results(
    name: str, preset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proto = onnx.parser.parse_model(MODELS[name])
    source = tmp_path / "odd.onnx"
    onnx.save(proto, source)
    rows = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value if proto.graph.input else 0
    known = bool(proto.graph.input) and proto.graph.input[0].type.tensor_type.shape.dim[0].HasField(
        "dim_value"
    )
    x: Any = np.random.default_rng(0).standard_normal((rows if known else 3, 4)).astype(np.float32)
    if name == "text":
        x = np.array(["a", "b"], object)
    feeds = {"x": x, "c": np.array(True), "n": np.array(3)}
    want = outputs(source, feeds)
    with caplog.at_level(logging.WARNING):
        optimize_model(source, tmp_path / "out", list(PRESETS[preset]))
        inspect_model(source, fusions=True)
    # Nothing is written past the messages of the command.
    assert not caplog.records
    got = outputs(tmp_path / "out" / "model.onnx", feeds)
    assert [key for key, _ in got] == [key for key, _ in want]
    assert want
    for (key, one), (_, other) in zip(want, got, strict=True):
        for left, right in zip(
            *(part if isinstance(part, list) else [part] for part in (one, other)), strict=True
        ):
            assert left.shape == right.shape and left.dtype == right.dtype, key
            if left.dtype == object:
                assert left.tolist() == right.tolist()
            else:
                np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6, err_msg=key)
