"""The first wrong tensor and the node to blame: planted faults in a quantised, fused decoder are found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from onnxsmith.comparison import Tolerance
from onnxsmith.errors import BadInputError, DestinationError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.bisecting import bisect_models, open_traceable
from onnxsmith.pipeline.cli import app
from onnxsmith.pipeline.depth_page import render_depth_page
from onnxsmith.runtime import (
    Divergence,
    GraphReference,
    OrtBackend,
    TorchReference,
    cases_for,
    find_divergence,
)

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

helper, numpy_helper = onnx.helper, onnx.numpy_helper
DOWN = "model.layers.0.mlp.down_proj.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def quantized_dir(tiny_loaded: Any, tiny_program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder, fused and with 4 bit weights."""
    from onnxsmith.exporters import export
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes

    directory = tmp_path_factory.mktemp("int4")
    # Packed zero points, which is the plainest form of four bits.
    passes = [*PRESETS["cpu-fp32"][:-3], ("quantize_weights", {"bits": 4, "block_size": 32})]
    package = run_passes(export(tiny_loaded, tiny_program), make_passes(passes))
    save_package(package.derive(), directory)
    return directory


def planted(source: Path, target: Path, change: Callable[[Any], str]) -> str:
    """A copy with a fault; the name of the node at fault."""
    shutil.copytree(source, target)
    model = onnx.load(target / "model.onnx")
    node = change(model)
    onnx.save(model, target / "model.onnx")
    return node


def edit(model: Any, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> str:
    """Changes a weight; the name of the node that uses it."""
    tensor = next(i for i in model.graph.initializer if i.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    [user] = [node.name for node in model.graph.node if name in node.input]
    return user


def wrong_weight(model: Any) -> str:
    def flip(packed: np.ndarray[Any, Any]) -> None:
        flat = packed.reshape(-1)
        low = flat & 15
        at = int(np.argmin(low))
        # From one end of the range to the other: the sign of a large weight.
        flat[at] |= 15

    return edit(model, f"{KEY}_q4", flip)


def wrong_scale(model: Any) -> str:
    def grow(scales: np.ndarray[Any, Any]) -> None:
        scales.reshape(-1)[13] *= 16

    return edit(model, f"{DOWN}_scales", grow)


def overflow(model: Any, healthy: Divergence) -> str:
    """One MatMulNBits computes in float16, in a scale in which its inputs fit and its result does not."""
    largest = {trace.name: trace.error.scale for trace in healthy.tensors}
    quantised = [n for n in model.graph.node if n.op_type == "MatMulNBits" and n.input[0] in largest]
    node = max(quantised, key=lambda n: largest[n.output[0]] / largest[n.input[0]])
    index = list(model.graph.node).index(node)
    source, scales, result = node.input[0], node.input[2], node.output[0]
    factor = 55000.0 / largest[source]
    assert factor * largest[result] > 75000
    for name, value in (("up", factor), ("down", 1 / factor)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    tensor = next(i for i in model.graph.initializer if i.name == scales)
    half = numpy_helper.to_array(tensor).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(half, "scales_half"))
    node.input[0], node.input[2], node.output[0] = "x_half", "scales_half", "y_half"
    around = [
        helper.make_node("Mul", [source, "up"], ["x_up"], name="scale_up"),
        helper.make_node("Cast", ["x_up"], ["x_half"], name="to_half", to=10),
        node,
        helper.make_node("Cast", ["y_half"], ["y_up"], name="to_float", to=1),
        helper.make_node("Mul", ["y_up", "down"], [result], name="scale_down"),
    ]
    nodes = [*model.graph.node[:index], *around, *model.graph.node[index + 1 :]]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return str(node.name)


@pytest.fixture(scope="module")
def healthy(quantized_dir: Path, tiny_llama_dir: Path) -> Divergence:
    return bisect_models(str(tiny_llama_dir), quantized_dir, samples=3, threads=1)


FAULTS: Mapping[str, Callable[..., str]] = {
    "weight": lambda model, _: wrong_weight(model),
    "scale": lambda model, _: wrong_scale(model),
    "overflow": overflow,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("reference", ["torch", "onnx"])
def test_a_planted_fault_is_found_at_its_node(
    fault: str,
    reference: str,
    healthy: Divergence,
    quantized_dir: Path,
    tiny_llama_dir: Path,
    tiny_artifact_dir: Path,
    tmp_path: Path,
) -> None:
    node = planted(quantized_dir, tmp_path / "faulty", lambda model: FAULTS[fault](model, healthy))
    against = str(tiny_llama_dir if reference == "torch" else tiny_artifact_dir)
    result = bisect_models(against, tmp_path / "faulty", samples=3, threads=1, output=tmp_path / "shown")
    assert not result.passed
    assert result.blamed[0].node == node, result.verdict
    assert [blame.node for blame in result.suspects] == [node]
    assert node in result.verdict
    assert result.tapping_change < 1e-5
    if fault == "overflow":
        assert result.blamed[0].introduced.bad > 0
    else:
        weight = KEY if fault == "weight" else DOWN
        assert f"{weight}_q4 wrong" in result.blamed[0].detail
        # What comes after the fault is off too, and is not blamed.
        depth = next(t.depth for t in result.tensors if t.node == node)
        later = [t for t in result.tensors if t.depth > depth]
        assert max(t.error.size for t in later) > 0.2
    # The small model shows it without onnxsmith.
    made = result.reproduction
    assert made is not None
    assert len(made.nodes) <= 6
    assert made.bytes < 20_000
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "shown" / "reproduce.py")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, "differs" in done.stdout) == (1, True), done.stdout + done.stderr


def test_without_a_fault_nobody_is_to_blame(
    quantized_dir: Path, tiny_llama_dir: Path, tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "nothing"
    result = bisect_models(str(tiny_llama_dir), quantized_dir, samples=3, threads=1, output=output)
    assert result.passed, result.verdict
    assert (result.first, result.suspects, dict(result.outputs)) == (None, (), {})
    assert not output.exists()
    assert len(result.tensors) > 35
    # Rounding to 4 bits is made by the quantised nodes, and handed on by all others.
    for blame in result.blamed:
        quantised = blame.operator in ("MatMulNBits", "GatherBlockQuantized")
        assert (blame.introduced.size > 0.02) == quantised, blame
    exact = bisect_models(str(tiny_llama_dir), tiny_artifact_dir, samples=3, threads=1)
    assert exact.passed
    assert max(t.error.relative for t in exact.tensors) < 1e-4


def test_torch_and_fused_tensors_are_matched(quantized_dir: Path, tiny_llama_dir: Path) -> None:
    result = bisect_models(str(tiny_llama_dir), quantized_dir, samples=2, threads=1)
    pairs = {(t.operator, t.reference) for t in result.tensors}
    for expected in (
        ("MatMulNBits", "model.layers.1.mlp.down_proj/linear#0"),
        ("GroupQueryAttention", "model.layers.1.self_attn/scaled_dot_product_attention#0"),
        ("RotaryEmbedding", "model.layers.0.self_attn/add#1"),
        ("SkipSimplifiedLayerNormalization", "model.layers.0/add#1"),
    ):
        assert expected in pairs
    assert {t.matched_by for t in result.tensors} >= {"name", "weight", "value"}


def test_a_kernel_that_only_runs_when_tapped_is_said(
    quantized_dir: Path, tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    """ONNX Runtime removes casts to float16 and back, unless somebody reads what lies between."""

    def change(model: Any) -> str:
        index = next(i for i, n in enumerate(model.graph.node) if n.op_type == "Mul" and "silu" in n.input)
        node = model.graph.node[index]
        first, second, result = node.input[0], node.input[1], node.output[0]
        for name, value in (("up", 60000.0), ("down", 1 / 60000.0)):
            model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        nodes = [
            helper.make_node("Mul", [first, "up"], ["a_up"], name="scale_up"),
            helper.make_node("Cast", ["a_up"], ["a_half"], name="to_half", to=10),
            helper.make_node("Cast", [second], ["b_half"], name="other_half", to=10),
            helper.make_node("Mul", ["a_half", "b_half"], ["ab_half"], name="half_mul"),
            helper.make_node("Cast", ["ab_half"], ["ab"], name="to_float", to=1),
            helper.make_node("Mul", ["ab", "down"], [result], name="scale_down"),
        ]
        del model.graph.node[index]
        for offset, one in enumerate(nodes):
            model.graph.node.insert(index + offset, one)
        return "to_half"

    node = planted(quantized_dir, tmp_path / "casts", change)
    result = bisect_models(str(tiny_artifact_dir), tmp_path / "casts", samples=2, threads=1)
    assert result.changed_by_tapping
    assert result.optimizer_change is not None
    assert dict(result.outputs) == {}
    assert "the outputs of the untouched model keep the tolerance" in result.verdict
    assert "so other kernels ran" in result.verdict
    assert result.blamed[0].node == node
    # Two casts to float16 and the product between them ran only where they were read.
    assert result.kernels["Cast"][0] < result.kernels["Cast"][1]
    done = CliRunner().invoke(
        app,
        ["bisect", str(tiny_artifact_dir), str(tmp_path / "casts"), "--samples", "1", "--report",
         str(tmp_path / "page.html")],
    )  # fmt: skip
    said = "Other kernels ran to read intermediate tensors, in the untouched model"
    assert f"{said} -> in pieces: Cast" in done.output
    assert f"{said} &rarr; in pieces:" in (tmp_path / "page.html").read_text()


def test_two_faults_are_both_found(quantized_dir: Path, tiny_artifact_dir: Path, tmp_path: Path) -> None:
    nodes = set()

    def both(model: Any) -> str:
        nodes.update((wrong_weight(model), wrong_scale(model)))
        return ""

    planted(quantized_dir, tmp_path / "two", both)
    result = bisect_models(str(tiny_artifact_dir), tmp_path / "two", samples=2, threads=1)
    assert {blame.node for blame in result.suspects} == nodes
    assert len(nodes) == 2


def test_a_subgraph_is_blamed_as_its_node(onnx_package: Callable[..., ModelPackage]) -> None:
    text = """g (float[batch, 4] x, bool c) => (float[batch, 4] y) {{
        a = Relu(x)
        b = If(c) <then_branch = then () => (float[batch, 4] t) {{ t = {branch}(a) }},
                   else_branch = other () => (float[batch, 4] e) {{ e = Neg(a) }}>
        y = Abs(b)
    }}"""
    right = onnx_package(text.format(branch="Sqrt"), "right")
    wrong = onnx_package(text.format(branch="Exp"), "wrong")
    backend = OrtBackend(threads=1)
    random = np.random.default_rng(0)
    from onnxsmith.runtime import Case

    cases = [
        Case(f"{flag}", {"x": random.random((3, 4), np.float32), "c": np.array(flag)})
        for flag in (True, False)
    ]
    with backend.open(right, name="right") as session:
        result = find_divergence(GraphReference(session, right, backend), wrong, backend, cases)
    assert result.first is not None
    assert (result.first.name, result.first.operator) == ("b", "If")
    assert [blame.operator for blame in result.suspects] == ["If"]


def test_a_residual_in_the_node_of_a_bias_is_no_fault(onnx_package: Callable[..., ModelPackage]) -> None:
    """What a bias is added to may be added to a residual in the same node: its result is not the layer's."""
    head = (
        "g (float[n, 8] x, float[n, 8] r) => (float[n, 8] y) <float[8] b = {0.5,-0.5,0.5,1,-1,0.5,-0.5,1}> "
    )
    reference = onnx_package(head + "{ h = Exp(x) l = Add(h, b) s = Add(l, r) y = Tanh(s) }", "plain")
    candidate = onnx_package(head + "{ k = Exp(x) t = Sum(k, r, b) y = Tanh(t) }", "fused")
    backend = OrtBackend(threads=1)
    with backend.open(reference, name="plain") as session:
        cases = list(cases_for(session, limits={}, samples=2))
        result = find_divergence(GraphReference(session, reference, backend), candidate, backend, cases)
    assert result.passed, result.verdict
    assert not result.suspects
    assert {(trace.name, trace.reference) for trace in result.tensors} == {("k", "h"), ("t", "s"), ("y", "y")}


def test_names_that_mean_something_else_are_not_believed(onnx_package: Callable[..., ModelPackage]) -> None:
    def chain(names: list[str]) -> str:
        operators = ["Sin", "Exp", "Neg", "Sqrt", "Tanh", "Cos"]
        lines, before = [], "p"
        for operator, name in zip(operators, names, strict=True):
            lines.append(f"{name}_in = Abs({before})" if operator == "Sqrt" else "")
            source = f"{name}_in" if operator == "Sqrt" else before
            lines.append(f"{name} = {operator}({source})")
            before = name
        body = "\n".join([*lines, f"y = Mul({before}, p)"])
        return f"g (float[batch, 8] x) => (float[batch, 8] y) {{ p = Abs(x)\n{body} }}"

    names = ["a", "b", "c", "d", "e", "f"]
    right = onnx_package(chain(names), "right")
    other = onnx_package(chain(names[::-1]), "other")
    backend = OrtBackend(threads=1)
    with backend.open(right) as session:
        cases = list(cases_for(session, limits={}, samples=3))
        result = find_divergence(GraphReference(session, right, backend), other, backend, cases)
    assert result.passed, result.verdict
    found = {t.name: t.reference for t in result.tensors}
    assert found["f"] == "a"
    assert found["a"] == "f"


def test_nothing_to_compare_is_refused(
    onnx_package: Callable[..., ModelPackage], tiny_artifact_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    backend = OrtBackend()
    package = onnx_package("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    other = onnx_package("g (float[n] x) => (float[1] z) { z = ReduceSum(x) }", "other")
    with backend.open(package) as session:
        reference = GraphReference(session, package, backend)
        with pytest.raises(BadInputError, match="bisect: no inputs; expected at least one case"):
            find_divergence(reference, package, backend, [])
        with pytest.raises(
            BadInputError, match="no floating-point tensor that the reference has too; expected"
        ):
            find_divergence(reference, other, backend, list(cases_for(session, limits={}, samples=2)))
    with pytest.raises(BadInputError, match="bisect: --samples: 0; expected at least 1"):
        bisect_models(str(tiny_llama_dir), tiny_artifact_dir, samples=0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DestinationError, match="a directory with other things in it"):
        bisect_models(str(tiny_llama_dir), tiny_artifact_dir, output=tmp_path)


def test_the_command(quantized_dir: Path, tiny_artifact_dir: Path, tmp_path: Path) -> None:
    node = planted(quantized_dir, tmp_path / "faulty", wrong_scale)
    runner = CliRunner()
    page, target = tmp_path / "page.html", tmp_path / "result.json"
    arguments = ["bisect", str(tiny_artifact_dir), str(tmp_path / "faulty"), "--samples", "2"]
    done = runner.invoke(app, [*arguments, "--report", str(page), "--json", str(target)])
    assert done.exit_code == 1, done.output
    assert f"blame {node} (MatMulNBits)" in done.output
    result = json.loads(target.read_text())
    assert result["blamed"][0]["node"] == node
    assert result["passed"] is False
    text = page.read_text()
    assert "FAIL" in text
    assert node in text
    assert text.count("<circle") > 60
    done = runner.invoke(app, ["bisect", str(tiny_artifact_dir), str(quantized_dir), "--samples", "1"])
    assert (done.exit_code, "no divergence in" in done.output) == (0, True)
    # A bound that 4 bits cannot keep.
    done = runner.invoke(app, ["bisect", str(tiny_artifact_dir), str(quantized_dir), "--rtol", "1e-4"])
    assert (done.exit_code, "first divergence" in done.output) == (1, True)


def test_a_page_without_errors(tiny_artifact_dir: Path) -> None:
    with open_traceable(str(tiny_artifact_dir), None) as (reference, limits):
        cases = list(cases_for(reference.session, limits=limits, samples=2))
        result: Divergence = find_divergence(
            reference, load_package(tiny_artifact_dir), OrtBackend(), cases, tolerance=Tolerance(rtol=1e-3)
        )
        assert isinstance(reference, GraphReference)
    page = render_depth_page([dataclasses.replace(result, candidate="<b>")])
    assert "PASS" in page
    assert "&lt;b&gt;" in page
    assert "<b>&" not in page
    assert TorchReference is not GraphReference


def test_compare_takes_bounds_of_predictions_and_writes_a_page(
    quantized_dir: Path, tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    runner, page = CliRunner(), tmp_path / "depth.html"
    arguments = ["compare", str(tiny_artifact_dir), str(quantized_dir), "--samples", "2"]
    loose = ["--max-kl", "50", "--min-top1", "0", "--min-cosine", "0.2"]
    done = runner.invoke(app, [*arguments, *loose, "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text().count("<circle") > 60
    for bound, said in (
        (["--max-kl", "1e-6"], "KL divergence is"),
        (["--min-top1", "1"], "top-1 agreement is"),
        (["--min-cosine", "1"], "cosine is"),
    ):
        done = runner.invoke(app, [*arguments, *bound])
        assert (done.exit_code, said in done.output) == (1, True), done.output
        assert "onnxsmith bisect REFERENCE CANDIDATE" in done.output
    done = runner.invoke(app, [*arguments, "--min-top1", "2"])
    assert (done.exit_code, "--min-top1: 2.0; expected between 0 and 1" in done.output) == (2, True)


def test_of_several_graphs_one_is_named(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    for name in ("encoder_model", "decoder_model"):
        shutil.copy(tiny_artifact_dir / "model.onnx", tmp_path / f"{name}.onnx")
    shutil.copy(tiny_artifact_dir / "config.json", tmp_path)
    (tmp_path / "manifest.json").write_text(
        json.dumps({"components": {n: f"{n}.onnx" for n in ("encoder_model", "decoder_model")}})
    )
    both = "encoder_model, decoder_model"
    with pytest.raises(BadInputError, match=f"graphs {both}; expected one graph. Name one: --component enc"):
        bisect_models(str(tiny_artifact_dir), tmp_path)
    with pytest.raises(BadInputError, match=f"--component: 'model'; expected one of {both}"):
        bisect_models(str(tiny_artifact_dir), tmp_path, component="model")
    # The reference is one graph, or has one of that name.
    for reference in (tiny_artifact_dir, tmp_path):
        right = bisect_models(str(reference), tmp_path, component="decoder_model", samples=1, threads=1)
        assert right.passed and len(right.tensors) > 10
    model = onnx.load(tmp_path / "decoder_model.onnx")
    node = edit(model, DOWN, lambda weight: weight.reshape(-1).__setitem__(3, 40))
    onnx.save(model, tmp_path / "decoder_model.onnx")
    wrong = bisect_models(str(tiny_artifact_dir), tmp_path, component="decoder_model", samples=1, threads=1)
    assert [blame.node for blame in wrong.suspects] == [node]
    fine = bisect_models(str(tiny_artifact_dir), tmp_path, component="encoder_model", samples=1, threads=1)
    assert fine.passed


@pytest.mark.parametrize("finer", [False, True], ids=["", "finer"])
@pytest.mark.parametrize("folded", [False, True], ids=["apart", "folded"])
def test_blocks_with_offsets_are_one_weight(
    tiny_loaded: Any, tiny_program: Any, tiny_artifact_dir: Path, tmp_path: Path, folded: bool, finer: bool
) -> None:
    """The preset's form of 4 bits multiplies blocks and offsets apart, or has the offsets as columns.

    Either may have zero points at means, and half its blocks.
    """
    from onnxsmith.exporters import export
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes

    (tmp_path / "int4").mkdir()
    package = run_passes(export(tiny_loaded, tiny_program), make_passes(PRESETS["cpu-int4"]))
    faults, codes = FAULTS_OF_BLOCKS, f"{DOWN}_q4"
    if folded:
        package = run_passes(package, make_passes([("fold_minimums", {})]))
        faults, codes = FAULTS_OF_FOLDED_BLOCKS, f"{DOWN}_q4_folded"
    if finer:
        package = run_passes(package, make_passes([("finer_activations", {"after": "any"})]))
        codes += "_by_16"
        faults = {part + ("_by_16" if part in codes else ""): fault for part, fault in faults.items()}
    save_package(package.derive(), tmp_path / "int4")
    result = bisect_models(str(tiny_artifact_dir), tmp_path / "int4", samples=3, threads=1)
    assert result.passed, result.verdict
    assert not any(blame.detail for blame in result.blamed)
    for number, (part, fault) in enumerate(faults.items()):

        def change(model: Any, part: str = part, fault: Callable[[Any], None] = fault) -> str:
            edit(model, f"{DOWN}_{part}", fault)
            [user] = [node.name for node in model.graph.node if codes in node.input]
            return str(user)

        node = planted(tmp_path / "int4", tmp_path / f"faulty{number}", change)
        result = bisect_models(str(tiny_artifact_dir), tmp_path / f"faulty{number}", samples=2, threads=1)
        assert [blame.node for blame in result.suspects] == [node], result.verdict
        assert f"of {codes} wrong" in result.suspects[0].detail


FAULTS_OF_BLOCKS: Mapping[str, Callable[[Any], None]] = {
    "scales": lambda scales: scales.reshape(-1).__setitem__(13, scales.max() * 30),
    "minimums": lambda minimums: minimums.reshape(-1).__setitem__(13, np.abs(minimums).max() * 5),
    "q4": lambda codes: codes.reshape(-1).__setitem__(slice(16, 32), 255 - codes.reshape(-1)[16:32]),
}
FAULTS_OF_FOLDED_BLOCKS: Mapping[str, Callable[[Any], None]] = {
    "q4_folded_scales": lambda scales: scales.reshape(-1).__setitem__(13, scales.max() * 30),
    "q4_folded": lambda codes: codes.reshape(-1).__setitem__(slice(16, 32), 255 - codes.reshape(-1)[16:32]),
}
