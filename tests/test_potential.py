"""What passes could still do: tried on a copy, shown by inspect; and every preset on a tiny decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import graph, serialized
from onnxsmith.comparison import tolerance_for
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.potential import still_to_do
from onnxsmith.graph_passes.precision import ToFloat16
from onnxsmith.onnx_file import save_model
from onnxsmith.package import ModelPackage
from onnxsmith.pipeline.operations import inspect_model
from onnxsmith.pipeline.tables import show_inspect
from onnxsmith.program import TorchProgram

NORM = (
    '<ir_version: 9, opset_import: ["": 18]> g (float[2, 4] x) => (float[2, 4] y) '
    "<float e = {1e-5}, float two = {2.0}, int64[1] a = {-1}> "
    "{ i = Identity(x) s = Pow(i, two) m = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(s, a) "
    "p = Add(m, e) q = Sqrt(p) r = Reciprocal(q) n = Mul(i, r) y = Mul(n, w) }"
)


def norm() -> ir.Model:
    return graph(NORM, w=np.ones(4, np.float32))


def test_it_tries_on_a_copy() -> None:
    model = norm()
    content = serialized(model)
    found = still_to_do(model)
    assert serialized(model) == content
    assert found["cleanup"]["removed"]["Identity"] == 1
    assert found["fuse_norms"]["made"] == {"SimplifiedLayerNormalization": 1}
    run_once = model.clone()
    for one in make_passes([(name, {}) for name in ("transpose_weights", "cleanup", "fuse_norms")]):
        one(run_once)
    assert still_to_do(run_once) == {}


def test_inspect_shows_it_and_the_precision_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = norm()
    ToFloat16()(model)
    save_model(model, tmp_path / "m.onnx")
    result = inspect_model(tmp_path / "m.onnx", fusions=True)
    [part] = result["components"].values()
    assert "ReduceMean" in " ".join(part["precision_map"])
    show_inspect(result)
    shown = capsys.readouterr().out
    assert "stays in float32" in shown
    assert "sums many numbers or squares" in shown
    assert "what passes could still do" in shown or "nothing is left" in shown
    assert "still_to_do" not in next(iter(inspect_model(tmp_path / "m.onnx")["components"].values()))


@pytest.mark.parametrize("preset", ["gpu-fp16", "gpu-int4", "web", "mobile", "cpu-int4-newest"])
def test_presets_for_other_targets_compute_the_same_on_the_cpu(
    preset: str, tiny_package: ModelPackage, tiny_program: TorchProgram
) -> None:
    from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs

    package = run_passes(tiny_package, make_passes(PRESETS[preset]))
    reference = TorchSession(tiny_program)
    cases = reference_outputs(reference, cases_for(reference, limits=tiny_program.limits, samples=4))
    with OrtSession(package, threads=1) as session:
        result = compare_sessions(reference, session, cases, tolerance=tolerance_for(package.precision))
    assert result.passed, result.reason
    expected = {"gpu-fp16": "float16", "mobile": "int8"}.get(preset, "int4")
    assert package.precision == expected
