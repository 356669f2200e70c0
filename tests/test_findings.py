"""Each rule about graphs finds its disease, and nothing in a model that has not got it; its remedy cures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from generated_graphs import Array, graph, serialized
from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.finding import Finding
from onnxsmith.graph_passes import make_passes, weight_findings
from onnxsmith.graph_passes.block_repairs import SetAccuracyLevel
from onnxsmith.graph_passes.blocks import dequantize_blocks, pack_codes, quantize_blocks
from onnxsmith.graph_passes.findings import RULES, Target, examine
from onnxsmith.graph_passes.float_kernels import UseFloatKernels
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.onnx_file import load_model, save_model

RANDOM = np.random.default_rng(0)
CPU = Target(features=frozenset({"avx2", "avx512_vnni"}))
HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'


def matrix(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def find(model: ir.Model, rule: str, target: Target = CPU) -> list[Finding]:
    return list(examine(model, target, rules=[rule]))


def treated(model: ir.Model, finding: Finding) -> ir.Model:
    """A copy with the remedy."""
    copy = model.clone()
    for one in make_passes(finding.passes):
        assert one(copy).modified
    return copy


def outputs(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, dict(feeds))
    return found


def executed(model: ir.Model, feeds: Mapping[str, Array], directory: Path) -> dict[str, str]:
    """What ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 4
    options.profile_file_prefix = str(directory / "profile")
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event for event in events if event["name"].endswith("_kernel_time")]
    return {e["name"].removesuffix("_kernel_time"): e["args"]["op_name"] for e in ran}


def close(got: list[Array], want: list[Array], atol: float) -> bool:
    return all(np.abs(a.astype(float) - b).max() <= atol for a, b in zip(got, want, strict=True))


def test_every_rule_has_a_test_here_and_an_unknown_one_is_refused() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{rule}"' in text for rule in RULES)
    with pytest.raises(UnknownNameError, match="unknown rule 'casts'; expected one of accuracy_level"):
        list(examine(graph(f"{HEAD} g (float[2] x) => (float[2] y) {{ y = Relu(x) }}"), CPU, rules=["casts"]))


def block_model(**options: Any) -> ir.Model:
    model = graph(
        f"{HEAD} g (float[m, 64] x) => (float[m, 48] y) {{ [one] y = MatMul(x, w) }}", w=matrix(64, 48)
    )
    QuantizeWeights(**{"bits": 4, **options})(model)
    return model


def test_accuracy_level() -> None:
    sick = block_model(accuracy_level=0)
    (finding,) = find(sick, "accuracy_level")
    assert (finding.kind, finding.count, finding.exact) == ("slow", 1, False)
    assert finding.nodes == ("one_nbits",)
    cured = treated(sick, finding)
    x = matrix(3, 64)
    assert close(outputs(cured, {"x": x}), outputs(sick, {"x": x}), 0.5)
    assert not find(cured, "accuracy_level")
    assert not find(block_model(), "accuracy_level")
    assert not find(sick, "accuracy_level", Target("CUDAExecutionProvider"))
    assert "no fast kernel at all" in find(block_model(bits=8, accuracy_level=0), "accuracy_level")[0].why
    with pytest.raises(BadInputError, match="level: 7; expected 0 to 4"):
        SetAccuracyLevel(level=7)  # type: ignore[arg-type]


def test_float_zero_points_are_slow_blocks() -> None:
    weight = matrix(48, 64)
    blocks = quantize_blocks(weight, bits=4, block_size=32, symmetric=False, minimums=True)
    zeros = (-blocks.minimums / blocks.scales).astype(np.float32)  # type: ignore[operator]
    sick = graph(
        f"{HEAD} g (float[m, 64] x) => (float[m, 48] y)"
        "{ [one] y = com.microsoft.MatMulNBits<K=64, N=48, bits=4, block_size=32>(x, codes, scales, zeros) }",
        codes=blocks.codes, scales=blocks.scales, zeros=zeros,
    )  # fmt: skip
    (finding,) = find(sick, "slow_blocks")
    assert "float zero points" in finding.what
    cured = treated(sick, finding)
    x = matrix(5, 64)
    exact = [x @ dequantize_blocks(blocks).T]
    assert close(outputs(sick, {"x": x}), exact, 1e-4)
    assert close(outputs(cured, {"x": x}), exact, 1e-4)
    assert not close(outputs(cured, {"x": x}), [x @ weight.T], 1e-2)
    assert not find(cured, "slow_blocks")
    assert len(cured.graph.initializers["codes"].const_value.shape) == 3  # type: ignore[union-attr]
    assert not find(block_model(), "slow_blocks")


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_bits_in_small_blocks_are_slow_blocks(symmetric: bool) -> None:
    # An odd number of blocks, so that packed zero points end in half a byte.
    weight = matrix(8, 48)
    model = graph(f"{HEAD} g (float[m, 48] x) => (float[m, 8] y) {{ y = MatMul(x, w) }}", w=weight.T.copy())
    QuantizeWeights(bits=2, block_size=16, symmetric=symmetric, accuracy_level=0)(model)
    (finding,) = find(model, "slow_blocks")
    cured = treated(model, finding)
    x = matrix(5, 48)
    assert close(outputs(cured, {"x": x}), outputs(model, {"x": x}), 1e-4)
    assert not find(cured, "slow_blocks")
    node = next(n for n in cured.graph if n.op_type == "MatMulNBits")
    assert node.attributes["bits"].as_int() == 4


def test_blocks_that_cannot_be_repacked_say_why() -> None:
    model = graph(
        f"{HEAD} g (float[m, 32] x, int32[32] order) => (float[m, 4] y) "
        "{ [one] y = com.microsoft.MatMulNBits<K=32,N=4,bits=2,block_size=16>(x, codes, scales, , order) }",
        codes=pack_codes(RANDOM.integers(0, 4, (4, 2, 16), np.uint8), 2), scales=matrix(4, 2),
    )  # fmt: skip
    (one,) = make_passes([("repack_blocks", {})])
    outcome = one(model)
    assert getattr(outcome, "changes").skipped == {"one": "it has g_idx, which permutes the blocks"}  # noqa: B009


def test_float_weights_beside_quantized_ones() -> None:
    def model() -> ir.Model:
        return graph(
            f"{HEAD} g (int64[s] ids) => (float[s, 96] y) "
            "{ x = Gather(table, ids) [body] h = MatMul(x, w) [head] y = MatMul(h, v) }",
            table=matrix(96, 64), w=matrix(64, 64), v=matrix(64, 96),
        )  # fmt: skip

    sick = model()
    QuantizeWeights(embeddings=False, skip_nodes=("head",))(sick)
    (finding,) = find(sick, "float_weights")
    assert (finding.kind, finding.count, finding.optional) == ("slow", 2, False)
    cured = treated(sick, finding)
    ids = {"ids": np.arange(7)}
    want = outputs(sick, ids)
    assert close(outputs(cured, ids), want, 0.03 * float(np.abs(want[0]).max()))
    assert not find(cured, "float_weights")
    # Small, and nothing is quantized: nothing to say.
    assert not find(model(), "float_weights")
    large = graph(
        f"{HEAD} g (float[m, 2560] x) => (float[m, 2048] y) {{ y = MatMul(x, w) }}", w=matrix(2560, 2048)
    )
    (choice,) = find(large, "float_weights")
    assert (choice.kind, choice.optional) == ("large", True)
    # In tiles for the own kernels it is as large, and no pass quantizes it.
    assert UseFloatKernels()(large).modified
    (choice,) = find(large, "float_weights")
    assert (choice.count, choice.passes, choice.nodes) == (1, (), ("w_tiles",))
    assert "21 MB of floats in tiles" in choice.what


def test_weights_inside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = block_model()
    assert not find(model, "inline_weights")
    monkeypatch.setattr(weight_findings, "_LARGE_BYTES", 1000)
    (finding,) = find(model, "inline_weights")
    assert (finding.kind, finding.passes, finding.exact) == ("large", (), True)
    assert finding.nodes[0].startswith("w")
    # Written beside the graph they are mapped.
    save_model(model, tmp_path / "beside.onnx", inline_limit_bytes=100)
    assert not find(load_model(tmp_path / "beside.onnx"), "inline_weights")
    save_model(model, tmp_path / "inside.onnx")
    assert find(load_model(tmp_path / "inside.onnx"), "inline_weights")


def test_half_on_cpu() -> None:
    text = (
        f"{HEAD} g (float[m, 32] x) => (float[m, 32] y) "
        "{ a = MatMul(x, w) b = Relu(a) c = Softmax(b) y = Mul(c, v) }"
    )
    healthy = graph(text, w=matrix(32, 32), v=matrix(1))
    sick = healthy.clone()
    for one in make_passes([("to_float16", {})]):
        one(sick)
    assert not find(healthy, "half_on_cpu")
    (finding,) = find(sick, "half_on_cpu")
    assert finding.exact and "float16" in finding.what
    cured = treated(sick, finding)
    x = matrix(4, 32)
    assert close(outputs(cured, {"x": x}), outputs(sick, {"x": x}), 2e-3)
    assert not find(cured, "half_on_cpu")
    assert not any(node.op_type == "Cast" for node in cured.graph)
    assert not find(sick, "half_on_cpu", Target("CUDAExecutionProvider"))


@pytest.mark.parametrize("keep", [True, False])
def test_float32_for_a_signature_in_half(keep: bool) -> None:
    model = graph(
        f"{HEAD} g (float16[m, 8] x) => (float16[m, 8] y, float16[m, 8] z) "
        "{ k = Cast<to = 10>(two) y = Mul(x, k) z = Relu(y) }",
        two=np.full(1, 2, np.float32),
    )
    x = matrix(3, 8).astype(np.float16)
    before = outputs(model, {"x": x})
    (one,) = make_passes([("to_float32", {"keep_io_types": keep})])
    assert one(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    got = outputs(model, {"x": x if keep else x.astype(np.float32)})
    assert [array.dtype for array in got] == ([np.float16] * 2 if keep else [np.float32] * 2)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert close(got, [array.astype(float) for array in before], 1e-3)
    assert not one(model).modified


def test_a_weight_that_is_only_stored_in_half_is_no_disease() -> None:
    model = graph(
        f"{HEAD} g (float[m, 8] x) => (float[m, 8] y) {{ s = Cast<to = 1>(half) y = Mul(x, s) }}",
        half=matrix(8).astype(np.float16),
    )
    assert not find(model, "half_on_cpu") and not find(model, "stray_casts")


@pytest.mark.parametrize(("between", "loses"), [(11, False), (10, True)], ids=["double", "float16"])
def test_stray_casts(between: int, loses: bool) -> None:
    text = (
        f"{HEAD} g (float[m, 8] x) => (float[m, 8] y) "
        f"{{ [a] a = Cast<to = {between}>(x) [b] b = Cast<to = 1>(a) y = Exp(b) }}"
    )
    sick = graph(text)
    sick.graph.node("a").outputs[0].type = ir.TensorType(ir.DataType(between))
    sick.graph.node("b").outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    (finding,) = find(sick, "stray_casts")
    assert finding.nodes == ("b",) and ("fewer digits" in finding.what) == loses
    cured = treated(sick, finding)
    assert [node.op_type for node in cured.graph] == ["Exp"]
    x = matrix(3, 8)
    assert close(outputs(cured, {"x": x}), [np.exp(x)], 1e-5)
    (keeping,) = make_passes([("remove_casts", {"lossy": False})])
    assert keeping(sick.clone()).modified != loses
    needed = graph(f"{HEAD} g (float16[m] x) => (float[m] y) {{ a = Cast<to = 1>(x) y = Exp(a) }}")
    assert not find(needed, "stray_casts")


def test_a_stray_cast_that_is_an_output() -> None:
    model = graph(
        f"{HEAD} g (float[m] x) => (float[m] y) {{ e = Exp(x) d = Cast<to = 11>(e) y = Cast<to = 1>(d) }}"
    )
    for node, kind in zip(model.graph, (1, 11, 1), strict=True):
        node.outputs[0].type = ir.TensorType(ir.DataType(kind))
    cured = treated(model, find(model, "stray_casts")[0])
    assert [value.name for value in cured.graph.outputs] == ["y"]
    assert [node.op_type for node in cured.graph] == ["Exp"]


def integer_parts() -> dict[str, Array]:
    return {
        "w": RANDOM.integers(-127, 127, (64, 64)).astype(np.int8),
        "s": np.full(64, 0.01, np.float32), "z": np.zeros(64, np.int8),
        "sa": np.float32(0.02), "za": np.uint8(128),
    }  # fmt: skip


UNFUSED = f"""{HEAD} g (float[m, 64] x) => (float[m, 64] y) {{
    [q] q = QuantizeLinear(x, sa, za)
    [d] d = DequantizeLinear(q, sa, za)
    p = Softmax(d)
    [f] f = DequantizeLinear<axis = 0>(w, s, z)
    y = Gemm<transB = 1>(p, f)
}}"""
FUSED = f"""{HEAD} g (float[m, 64] x) => (float[m, 64] y) {{
    [q] q = QuantizeLinear(x, sa, za)
    [d] d = DequantizeLinear(q, sa, za)
    [f] f = DequantizeLinear<axis = 1>(w, s, z)
    y = MatMul(d, f)
}}"""


def test_unfused_qdq(tmp_path: Path) -> None:
    parts = integer_parts()
    sick, healthy = graph(UNFUSED, **parts), graph(FUSED, **parts)
    # Within the range that the codes have.
    x = {"x": matrix(3, 64).clip(-2.5, 2.5)}
    seen = Target(executed=executed(sick, x, tmp_path))
    (finding,) = find(sick, "unfused_qdq", seen)
    assert set(finding.nodes) == {"d", "f"}
    assert "1 weights are dequantized in each run and 1 activations" in finding.what
    cured = treated(sick, finding)
    assert [node.op_type for node in cured.graph] == ["Softmax", "Gemm"]
    # Nothing is lost but the rounding of one activation.
    assert close(outputs(cured, x), outputs(sick, x), 0.02)
    weights = {"w": parts["w"].astype(np.float32) * np.float32(0.01)}
    text = "g (float[m, 64] x) => (float[m, 64] y) { p = Softmax(x) y = Gemm<transB = 1>(p, w) }"
    exact = graph(f"{HEAD} {text}",
                  **weights)  # fmt: skip
    assert close(outputs(cured, x), outputs(exact, x), 1e-5)
    assert not find(healthy, "unfused_qdq", Target(executed=executed(healthy, x, tmp_path)))
    # Without having seen it run nobody knows.
    assert not find(sick, "unfused_qdq")


def test_dequantized_in_blocks_as_onnx_does() -> None:
    codes, zeros = RANDOM.integers(0, 255, (8, 6), np.uint8), RANDOM.integers(0, 9, (2, 6), np.uint8)
    model = graph(
        f"{HEAD} g (float[m, 8] x) => (float[m, 6] y) "
        "{ [f] f = DequantizeLinear<axis = 0, block_size = 4>(w, s, z) y = MatMul(x, f) }",
        w=codes, s=matrix(2, 6), z=zeros,
    )  # fmt: skip
    x = {"x": matrix(3, 8)}
    want = outputs(model, x)
    (one,) = make_passes([("remove_unfused_qdq", {"nodes": ["f"]})])
    assert one(model).modified
    assert close(outputs(model, x), want, 1e-3)


def per_tensor_model(spread: float) -> ir.Model:
    floats = matrix(64, 64) * np.linspace(1, spread, 64, dtype=np.float32)
    scale = np.float32(np.abs(floats).max() / 127)
    codes = np.rint(floats / scale).astype(np.int8)
    return graph(
        f"{HEAD} g (float[m, 64] x) => (float[m, 64] y) "
        "{ [f] f = DequantizeLinear(w, s) y = MatMul(x, f) }", w=codes, s=scale,
    )  # fmt: skip


def test_per_tensor() -> None:
    (finding,) = find(per_tensor_model(50.0), "per_tensor")
    assert finding.kind == "wrong" and finding.nodes == ("f",) and not finding.passes
    assert not find(per_tensor_model(1.0), "per_tensor")
    # A scale for each row is what it should be.
    assert not find(graph(FUSED, **integer_parts()), "per_tensor")


def test_saturating_integers() -> None:
    text = (
        f"{HEAD} g (float[m, 64] x) => (int32[m, 64] y) "
        "{ q, s, z = DynamicQuantizeLinear(x) [one] y = MatMulInteger(q, w, z) }"
    )
    old = Target(features=frozenset({"avx2"}))
    sick = graph(text, w=integer_parts()["w"])
    (finding,) = find(sick, "saturating_integers", old)
    assert finding.kind == "wrong" and finding.nodes == ("one",)
    assert not find(sick, "saturating_integers")
    assert not find(graph(text, w=integer_parts()["w"] // 2), "saturating_integers", old)


def test_unfused(onnx_package: Callable[..., Any]) -> None:
    package = onnx_package(
        "g (float[batch, seq, 8] x) => (float[batch, seq, 8] y) "
        "{ i = Identity(x) t = Transpose<perm=[0, 2, 1]>(i) u = Transpose<perm=[0, 2, 1]>(t) y = Relu(u) }"
    )
    (finding,) = find(package.main.model, "unfused")
    assert finding.passes[0][0] == "cleanup"
    cured = treated(package.main.model, finding)
    assert [node.op_type for node in cured.graph] == ["Relu"]
    assert not find(cured, "unfused")


def test_the_graph_stays_as_it_is(tiny_artifact_dir: Path) -> None:
    model = load_model(tiny_artifact_dir / "model.onnx")
    before = serialized(model)
    assert not list(examine(model, CPU))
    assert serialized(model) == before


CUDA = Target("CUDAExecutionProvider")


def test_what_cuda_has_no_kernel_for() -> None:
    """By its published list of kernels; attention with a bias is in test_attention_lengths.py."""
    model = graph(
        HEAD + "g (float[2, 32] x, float16[2, 32] h, int64[3] ids) => (float[2, 32] y, float16[2, 32] z, "
        "float[3, 64] w, float[2, 32] n) { y = com.microsoft.Gelu(x) z = com.microsoft.QuickGelu(h) "
        "w = com.microsoft.GatherBlockQuantized<bits = 8, block_size = 16, quantize_axis = 0> "
        "(table, ids, scales) "
        "n = com.microsoft.DynamicQuantizeMatMul(x, codes, scale) }",
        table=np.zeros((32, 64), np.uint8),
        scales=np.ones((2, 64), np.float32),
        codes=np.zeros((32, 32), np.int8),
        scale=np.ones(1, np.float32),
    )
    refused, lacking = find(model, "cuda_kernels", CUDA)
    assert (refused.kind, refused.count) == ("wrong", 1)
    assert "GatherBlockQuantized with blocks that are not on the last axis" in refused.what
    assert (lacking.kind, lacking.what) == ("slow", "1 nodes: DynamicQuantizeMatMul")
    assert find(model, "cuda_kernels") == []


def test_float32_attention_falls_back_on_cuda(tiny_package: Any) -> None:
    (found,) = find(tiny_package.main.model, "cuda_kernels", CUDA)
    assert found.kind == "slow" and "GroupQueryAttention in float" in found.what
    cured = treated(tiny_package.main.model, found)
    assert find(cured, "cuda_kernels", CUDA) == []
