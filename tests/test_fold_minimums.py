"""Minimums as columns: the weights they stand for, the products that come of it, branches, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import Array, graph, run, serialized
from onnxsmith.graph_passes import make_passes, run_passes
from onnxsmith.graph_passes.block_repairs import SetAccuracyLevel
from onnxsmith.graph_passes.blocks import dequantize_blocks, pack_codes, quantize_blocks
from onnxsmith.graph_passes.contract import Changes
from onnxsmith.graph_passes.minimums import FoldMinimums, fold_offsets
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.package import ModelPackage
from onnxsmith.runtime import OrtSession
from onnxsmith.runtime.decoding import open_decoder

FORMS = ((4, 32, np.float32), (4, 16, np.float16), (8, 32, np.float32))


def whole_weight(folded: Any, columns: int) -> Array:
    """The weight of x that a product with x and its block sums has."""
    weight, digits = dequantize_blocks(folded), 8 // folded.bits
    blocks = columns // folded.block_size
    sums = weight[:, columns:].reshape(len(weight), digits, blocks)
    added = sum(sums[:, n] / np.float32(1 << folded.bits) ** n for n in range(digits))
    return np.asarray(weight[:, :columns] + np.repeat(added, folded.block_size, axis=1))


@pytest.mark.parametrize(("bits", "size", "stored"), FORMS)
def test_weights_are_those_of_before_but_for_a_part_of_a_step(bits: int, size: int, stored: Any) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((24, 6 * size)).astype(np.float32)
    before = quantize_blocks(
        weight, bits=bits, block_size=size, symmetric=False, minimums=True, scale_type=stored
    )
    assert before.minimums is not None
    offsets = before.minimums + before.scales * (1 << (bits - 1))
    folded = fold_offsets(before.codes, before.scales, offsets, bits=bits, scale_type=stored)
    assert folded.columns == 6 * size + 6 * (8 // bits)
    error = np.abs(whole_weight(folded, 6 * size) - dequantize_blocks(before))
    bound = before.scales.max(axis=1) / (476 if bits == 4 else 508)
    # A scale in float16 may be rounded up by a thousandth.
    assert (error.max(axis=1) <= bound * 1.003 + 1e-6).all()
    assert error.max() > 0
    # Without the rests the error is a hundred times larger.
    bare = folded.codes.copy()
    bare[:, 6:] = pack_codes(np.full((*bare[:, 6:].shape[:2], size), 1 << (bits - 1), np.uint8), bits)
    rests = whole_weight(type(folded)(**{**vars(folded), "codes": bare}), 6 * size) - dequantize_blocks(
        before
    )
    assert np.abs(rests).max() > 50 * error.max()


def test_empty_blocks_and_minimums_out_of_reach() -> None:
    """Blocks of equal weights have scale 0; where zero points do not reach, the rest is larger."""
    random = np.random.default_rng(1)
    codes = pack_codes(random.integers(0, 16, (3, 4, 32)).astype(np.uint8), 4)
    scales = np.abs(random.standard_normal((3, 4))).astype(np.float32)
    offsets = random.standard_normal((3, 4)).astype(np.float32)
    scales[0, 1] = 0
    scales[1] = offsets[1] = 0
    offsets[2, 3] = scales[2, 3] * 40
    folded = fold_offsets(codes, scales, offsets, bits=4, scale_type=np.float32)
    levels = np.stack([codes & 15, codes >> 4], axis=-1).reshape(3, 4, 32).astype(np.float32) - 8
    want = (levels * scales[..., None] + offsets[..., None]).reshape(3, -1)
    error = np.abs(whole_weight(folded, 128) - want).max(axis=1)
    assert error[1] == 0
    assert error[0] < max(scales[0].max(), abs(offsets[0, 1])) / 200
    assert error[2] < scales[2, 3] * 33 / 230


def product(columns: int, rank: int = 3, **options: Any) -> tuple[ir.Model, Array, Array]:
    """A quantized product, its input, and what it gave before."""
    axes = ", ".join(["m", "s", "t"][: rank - 1])
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[{axes}, {columns}] x) => (float[{axes}, 24] y) '
        "{ y = MatMul(x, w) }",
        w=np.random.default_rng(2).standard_normal((columns, 24)).astype(np.float32),
    )
    QuantizeWeights(bits=4, block_size=16, minimums=True, **options)(model)
    x = np.random.default_rng(3).standard_normal((2,) * (rank - 1) + (columns,)).astype(np.float32) + 0.5
    return model, x, run(model, {"x": x})["y"]


def folded(model: ir.Model) -> Changes:
    return FoldMinimums()(model).changes


@pytest.mark.parametrize(("columns", "rank"), [(64, 2), (64, 3), (160, 4), (65 * 16, 3)])
def test_one_product_gives_what_three_nodes_gave(columns: int, rank: int) -> None:
    model, x, before = product(columns, rank)
    assert folded(model).count == 1
    operators = [node.op_type for node in model.graph]
    assert operators.count("MatMulNBits") == (2 if columns < 1024 else 1) and "Add" not in operators
    assert operators.count("ReduceSum") == (0 if columns < 1024 else 1)
    got = run(model, {"x": x})["y"]
    assert got.shape == before.shape
    scale = np.abs(before).max()
    # 8 bits for activations, as before.
    np.testing.assert_allclose(got, before, rtol=0, atol=0.02 * scale)
    assert folded(model).count == 0
    # In floats only the minimums differ.
    exact, _, _ = product(columns, rank)
    SetAccuracyLevel(level=1)(exact)
    SetAccuracyLevel(level=1)(model)
    want, got = run(exact, {"x": x})["y"], run(model, {"x": x})["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * scale)
    name = next(name for name in model.graph.initializers if name.endswith("folded_scales"))
    value = model.graph.initializers[name]
    assert value.const_value is not None
    scales = value.const_value.numpy().copy()
    scales[:, columns // 16 :] *= 2
    value.const_value = ir.tensor(scales, name=name)
    assert np.abs(run(model, {"x": x})["y"] - want).max() > 1e-2 * scale


def test_products_of_one_input_share_its_sums() -> None:
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g (float[m, 64] x) => (float[m, 24] y, float[m, 24] z) '
        "{ y = MatMul(x, w) z = MatMul(x, v) }",
        w=np.random.default_rng(2).standard_normal((64, 24)).astype(np.float32),
        v=np.random.default_rng(4).standard_normal((64, 24)).astype(np.float32),
    )
    QuantizeWeights(bits=4, block_size=32, minimums=True)(model)
    x = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    before = run(model, {"x": x})
    assert folded(model).details == {"folded": 2}
    assert [node.op_type for node in model.graph].count("Concat") == 1
    after = run(model, {"x": x})
    assert list(after) == ["y", "z"]
    for name in after:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=0.02 * np.abs(before[name]).max())


def test_it_refuses_and_says_why() -> None:
    model, _, _ = product(64, accuracy_level=1)
    before = serialized(model)
    assert [*folded(model).skipped.values()] == [
        "its accuracy_level is 1, where float minimums are exact; expected 4"
    ]
    assert serialized(model) == before
    embedding = graph(
        '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> '
        "g (int64[m] i, float[m, 64] x) => (float[m, 64] e, float[m, 40] y) "
        "{ e = Gather(w, i) y = com.microsoft.FusedMatMul<transB = 1>(x, w) }",
        w=np.random.default_rng(2).standard_normal((40, 64)).astype(np.float32),
    )
    QuantizeWeights(bits=4, block_size=32, minimums=True)(embedding)
    assert [*folded(embedding).skipped.values()] == ["something else reads its weight"]


def test_tokens_of_a_decoder_with_two_branches(tiny_package: ModelPackage) -> None:
    """Folded in the token's branch; the prompt's, which has weights of its own, is what it was."""
    form = {"bits": 4, "block_size": 16, "minimums": True, "half_scales": True}
    plain = run_passes(tiny_package, make_passes([("quantize_weights", form)]))
    once = run_passes(plain, make_passes([("fold_minimums", {})]))
    two = run_passes(plain, make_passes([("fast_prompts", {})]))
    both = run_passes(two, make_passes([("fold_minimums", {})]))
    # The head is in both branches, in one set of weights.
    assert both.steps[-1].details["folded"] == once.steps[-1].details["folded"] - 1 > 4
    assert [*both.steps[-1].details["skipped"].values()] == ["something else reads its weight"] * 2
    long, short = np.arange(2, 14)[None], np.arange(2, 6)[None]
    found: dict[str, list[Array]] = {}
    for name, package in (("plain", plain), ("once", once), ("two", two), ("both", both)):
        with OrtSession(package, threads=1) as session:
            decoder = open_decoder(session)
            first = decoder.step(long)
            decoder.reset()
            found[name] = [first, decoder.step(short)]
    np.testing.assert_array_equal(found["both"][0], found["two"][0])
    for name in ("once", "both"):
        off = np.linalg.norm(found[name][1] - found["plain"][1]) / np.linalg.norm(found["plain"][1])
        assert 0 < off < 0.03, name
