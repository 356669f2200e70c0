"""Fusion for ONNX Runtime, on a decoder made on the spot and on graphs that have nothing to fuse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from generated_graphs import Array, assert_same, graph, run, serialized
from onnxsmith.graph_passes import load_pass, operator_counts
from onnxsmith.graph_passes.cleanup import Cleanup
from onnxsmith.graph_passes.fusion import DROPS_THE_MASK, NOT_NEAR, FuseTransformer
from onnxsmith.graph_passes.fusion_repairs import spread_positions
from onnxsmith.onnx_file import check_model, save_model

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.program import TorchProgram

HEAD = '<ir_version: 9, opset_import: ["": 18]> '


def test_a_real_export_is_clean_after_one_run(exported: ir.Model) -> None:
    model = exported.clone()
    content = serialized(model)
    assert not Cleanup()(model).modified
    assert serialized(model) == content


@pytest.fixture(scope="module", params=["fused", "standard"])
def exported(
    request: pytest.FixtureRequest, tiny_loaded: LoadedModel, tiny_program: TorchProgram
) -> ir.Model:
    from onnxsmith.exporters import export

    model = export(tiny_loaded, tiny_program, attention=request.param).main.model
    for name in ("transpose_weights", "cleanup"):
        load_pass(name).create({})(model)
    return model


def decoder_feeds(model: ir.Model) -> dict[str, Array]:
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {
        "input_ids": random.integers(0, 64, (1, 3)),
        "attention_mask": np.ones((1, 8), np.int64),
        "position_ids": np.arange(5, 8)[None],
    }
    for value in model.graph.inputs:
        if value.name not in feeds:
            assert value.shape is not None
            shape = (1, value.shape[1], 5, value.shape[3])
            feeds[value.name or ""] = random.standard_normal(shape).astype(np.float32)
    return feeds


def test_a_decoder_fuses_whole(exported: ir.Model, tmp_path: Path) -> None:
    model = exported.clone()
    feeds = decoder_feeds(model)
    before = run(model, feeds)
    outcome = FuseTransformer()(model)
    # Two layers with two norms each and one at the end; queries and keys of two layers are rotated.
    expected = {
        "rms_normalization": 5,
        "skip_rms_normalization": 4,
        "rotary_embedding": 4,
        "cos_sin_cache": 4,
    }
    assert expected.items() <= outcome.changes.details["fused"].items()
    counts = operator_counts(model)
    assert counts["SimplifiedLayerNormalization"] == 1
    assert counts["com.microsoft.SkipSimplifiedLayerNormalization"] == 4
    assert counts["com.microsoft.RotaryEmbedding"] == 4
    assert not {"gqa", "packed_qkv_for_gqa"} & set(outcome.changes.details["fused"])
    assert "Pow" not in counts
    save_model(model, tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")
    after = run(model, feeds)
    assert_same(before, after, rtol=1e-5, atol=1e-5)
    padded = feeds | {"attention_mask": np.array([[0, 0, 1, 1, 1, 1, 1, 1]])}
    assert_same(run(exported, padded), run(model, padded), rtol=1e-5, atol=1e-5)
    content = serialized(model)
    assert not FuseTransformer()(model).modified
    assert serialized(model) == content
    # Control: another epsilon is another result.
    for node in model.graph:
        if "epsilon" in node.attributes:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    with pytest.raises(AssertionError):
        assert_same(before, run(model, feeds), rtol=1e-5, atol=1e-5)


def test_reads_no_large_weight(exported: ir.Model) -> None:
    model = exported.clone()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.size == 64 * 32:
            # As large as it would be in a model of a useful size.
            def read(name: str = name) -> ir.Tensor:
                raise AssertionError(f"{name} was read")

            shape = ir.Shape([32 * 1024, 64 * 1024] if tensor.shape[0] == 32 else [64 * 1024, 32 * 1024])
            value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=name)
            value.shape = None
    assert FuseTransformer()(model).changes.details["fused"]["rotary_embedding"] == 4


NOTHING = {
    "convolutions": "g (float[1, 3, 8, 8] x) => (float[1, 5] y) { c = Conv(x, w) r = Relu(c) "
    "p = GlobalAveragePool(r) f = Flatten(p) y = Gemm<transB = 1>(f, v) }",
    "no operator": "g (float[2] x) => (float[2] y) { y = Identity(x) }",
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_fuses_nothing_changes(name: str) -> None:
    weights = {"w": np.ones((4, 3, 3, 3), np.float32), "v": np.ones((5, 4), np.float32)}
    model = graph(HEAD + NOTHING[name], **(weights if name == "convolutions" else {}))
    content = serialized(model)
    outcome = FuseTransformer()(model)
    assert not outcome.modified
    assert serialized(model) == content
    assert outcome.changes.skipped["rms_normalization"] == NOT_NEAR


def rms(inputs: str = "float[2, 4] x", epsilon: str = "1e-05") -> ir.Model:
    text = (
        f"g ({inputs}) => (float[2, 4] y) "
        f"<float e = {{{epsilon}}}, float two = {{2.0}}, int64[1] a = {{-1}}> "
        "{ s = Pow(x, two) m = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(s, a) "
        "p = Add(m, e) q = Sqrt(p) "
        "r = Reciprocal(q) n = Mul(x, r) y = Mul(n, w) }"
    )
    return graph(HEAD + text, w=np.arange(1, 5, dtype=np.float32))


def test_rms_norm_fuses() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    model = rms()
    before = run(model, {"x": x})
    assert FuseTransformer()(model).modified
    assert list(operator_counts(model)) == ["SimplifiedLayerNormalization"]
    assert_same(before, run(model, {"x": x}), rtol=1e-5)


def test_a_tiny_epsilon_is_not_taken_for_zero() -> None:
    """The matcher of onnxscript takes 1e-12 for the zero of its rule x + 0 = x; then zeros become NaN."""
    model = rms(epsilon="1e-12")
    feeds = {"x": np.zeros((2, 4), np.float32)}
    before = run(model, feeds)
    FuseTransformer()(model)
    assert_same(before, run(model, feeds), atol=1e-6)


def test_an_input_keeps_its_default() -> None:
    model = rms("float[2, 4] x, float[4] w")
    FuseTransformer()(model)
    assert [value.name for value in model.graph.inputs] == ["x", "w"]
    assert "w" in model.graph.initializers
    x = np.ones((2, 4), np.float32)
    doubled = run(model, {"x": x, "w": 2 * np.arange(1, 5, dtype=np.float32)})["y"]
    np.testing.assert_allclose(doubled, 2 * run(model, {"x": x})["y"])


def test_a_part_of_a_head_is_not_rotated_as_a_whole(tmp_path: Path) -> None:
    """StableLM rotates a quarter of each head, and onnxscript's fusion of attention turned all of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from onnxsmith import compare_models, export_model, optimize_model

    config = transformers.StableLmConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.StableLmForCausalLM(config).eval().save_pretrained(tmp_path / "source")
    export_model(str(tmp_path / "source"), tmp_path / "raw", attention="standard", verify=False)
    specs: list[tuple[str, dict[str, object]]] = [("cleanup", {}), ("fuse_transformer", {})]
    _, after = optimize_model(tmp_path / "raw", tmp_path / "fused", specs)
    assert after.steps[-1].details["fused"]["partial_rotary_embedding"] == 2
    [result] = compare_models(str(tmp_path / "source"), [tmp_path / "fused"])
    assert result.passed, result.reason


ATTENTION = """
  [viewq] q4 = Reshape(x, view) q = Transpose<perm = [0, 2, 1, 3]>(q4)
  k4 = Reshape(k3, view) k = Transpose<perm = [0, 2, 3, 1]>(k4)
  v4 = Reshape(v3, view) v = Transpose<perm = [0, 2, 1, 3]>(v4)
  scores = MatMul(q, k) s = Mul(scores, scale) masked = Add(s, mask) p = Softmax<axis = -1>(masked)
  o = MatMul(p, v) ot = Transpose<perm = [0, 2, 1, 3]>(o) r = Reshape(ot, rows) y = Abs(r)
"""


def attention(rows: list[int], shape: str, *, mask: str = "batch, 1, tokens, tokens") -> ir.Model:
    import onnx_ir.passes.common as common

    inputs = ", ".join(f"float[batch, tokens, 32] {name}" for name in ("x", "k3", "v3"))
    model = graph(
        HEAD + f"g ({inputs}, float[{mask}] mask) => (float[{shape}] y) {{ {ATTENTION} }}",
        view=np.array([0, 0, 4, 8]), rows=np.array(rows), scale=np.array(0.3, np.float32),
    )  # fmt: skip
    common.ShapeInferencePass()(model)
    return model


def attention_feeds(batch: int, tokens: int, mask: tuple[int, ...]) -> dict[str, Array]:
    random = np.random.default_rng(batch)
    feeds = {n: random.standard_normal((batch, tokens, 32)).astype(np.float32) for n in ("x", "k3", "v3")}
    return feeds | {"mask": random.standard_normal(mask).astype(np.float32)}


@pytest.mark.parametrize(
    ("rows", "shape", "reshapes"),
    [
        ([0, 0, 32], "batch, tokens, 32", 0),
        ([0, 0, -1], "batch, tokens, 32", 0),
        # As GPT-2 has it, for a Gemm.
        ([-1, 32], "rows, 32", 1),
        ([0, -1], "batch, width", 1),
        ([0, 0, 8, 4], "batch, tokens, 8, 4", 1),
        ([0, 0, -1, 16], "batch, tokens, 2, 16", 1),
        ([-1], "all", 1),
    ],
)
def test_what_reads_attention_gets_the_shape_that_it_asked_for(
    rows: list[int], shape: str, reshapes: int
) -> None:
    """onnxscript puts MultiHeadAttention in the place of any Reshape that comes after attention."""
    model = attention(rows, shape)
    cases = [attention_feeds(b, t, (b, 1, t, t)) for b, t in ((1, 3), (2, 1), (3, 5))]
    before = [run(model, case) for case in cases]
    assert FuseTransformer()(model).modified
    counts = operator_counts(model)
    assert counts["com.microsoft.MultiHeadAttention"] == 1
    assert counts.get("Reshape", 0) == reshapes
    for case, want in zip(cases, before, strict=True):
        assert_same(want, run(model, case), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_same(before[2], run(model, cases[2] | {"mask": cases[2]["mask"] * 0}), rtol=1e-3)


def test_an_axis_that_is_copied_from_the_heads_is_still_there() -> None:
    model = attention([0, 0, 0, 2, -1], "batch, tokens, 4, 2, 4")
    case = attention_feeds(2, 3, (2, 1, 3, 3))
    before = run(model, case)
    assert FuseTransformer()(model).modified
    assert_same(before, run(model, case), rtol=1e-5)


@pytest.mark.parametrize("mask", ["batch, 1, 1, 1", "batch, 1, tokens, 1", "1, 4, tokens, tokens", "tokens"])
def test_a_mask_that_is_broadcast_is_spread(mask: str) -> None:
    model = attention([0, 0, 32], "batch, tokens, 32", mask=mask)
    sizes = {"batch": 2, "tokens": 5}
    shape = tuple(sizes.get(name) or int(name) for name in mask.split(", "))
    case = attention_feeds(2, 5, shape)
    before = run(model, case)
    FuseTransformer()(model)
    assert_same(before, run(model, case), rtol=1e-5)


@pytest.mark.parametrize("bias", ["rows", "tensor", "one number"])
def test_what_is_added_to_a_projection_need_not_be_a_bias(bias: str) -> None:
    """onnxscript takes it for one, and joins three of them, whatever their shapes."""
    import onnx_ir.passes.common as common

    kinds = {"rows": np.ones((1, 32), np.float32), "one number": np.ones(1, np.float32), "tensor": None}
    added = kinds[bias]
    body = ATTENTION.replace("Reshape(x, view)", "Reshape(xs, view)")
    inputs = ", ".join(f"float[batch, tokens, 32] {name}" for name in ("x", "k3", "v3"))
    more = "" if added is not None else ", float[batch, tokens, 32] e"
    model = graph(
        HEAD + f"g ({inputs}, float[batch, 1, tokens, tokens] mask{more}) => (float[batch, tokens, 32] y) "
        f"{{ xs = Add(x, e) {body} }}",
        view=np.array([0, 0, 4, 8]), rows=np.array([0, 0, 32]), scale=np.array(0.3, np.float32),
        **({} if added is None else {"e": added}),
    )  # fmt: skip
    common.ShapeInferencePass()(model)
    case = attention_feeds(2, 3, (2, 1, 3, 3))
    if added is None:
        case["e"] = case["x"] * 2
    before = run(model, case)
    assert FuseTransformer()(model).modified
    assert operator_counts(model)["com.microsoft.MultiHeadAttention"] == 1
    assert_same(before, run(model, case), rtol=1e-5)


def test_a_cache_of_other_tokens_is_read_as_it_is() -> None:
    """Cross-attention of a decoder with cache: keys and values come as (batch, heads, length, size)."""
    import onnx_ir.passes.common as common

    body = """
      q4 = Reshape(x, view) q = Transpose<perm = [0, 2, 1, 3]>(q4)
      kt = Transpose<perm = [0, 1, 3, 2]>(k) scores = MatMul(q, kt) s = Mul(scores, scale)
      p = Softmax<axis = -1>(s) o = MatMul(p, v) ot = Transpose<perm = [0, 2, 1, 3]>(o) r = Reshape(ot, rows)
      y = Abs(r)
    """
    model = graph(
        HEAD + "g (float[batch, tokens, 32] x, float[batch, 4, others, 8] k, float[batch, 4, others, 8] v) "
        f"=> (float[batch, tokens, 32] y) {{ {body} }}",
        view=np.array([0, 0, 4, 8]), rows=np.array([0, 0, 32]), scale=np.array(0.3, np.float32),
    )  # fmt: skip
    common.ShapeInferencePass()(model)
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal((2, 3, 32)), "k": random.standard_normal((2, 4, 7, 8))}
    feeds["v"] = random.standard_normal((2, 4, 7, 8))
    case = {name: array.astype(np.float32) for name, array in feeds.items()}
    before = run(model, case)
    outcome = FuseTransformer()(model)
    assert outcome.changes.details["caches_read_as_heads"] == 1
    assert operator_counts(model) == {"com.microsoft.MultiHeadAttention": 1, "Abs": 1}
    assert_same(before, run(model, case), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_same(before, run(model, case | {"k": case["v"]}), rtol=1e-3)


def projected(*, quantized: bool) -> ir.Model:
    """Attention of three projections of one value; quantized: as quantization-aware training ends."""
    import onnx_ir.passes.common as common

    random = np.random.default_rng(0)
    weights: dict[str, Array] = {name: random.integers(-127, 128, (32, 32)).astype(np.int8) for name in "qkv"}
    head = "xq = QuantizeLinear(x, scale, zero) xd = DequantizeLinear(xq, scale, zero) " if quantized else ""
    for name in "qkv":
        if quantized:
            head += f"w{name} = DequantizeLinear(c{name}, step) {name}m = MatMul(xd, w{name}) "
        else:
            head += f"{name}m = MatMul(x, w{name}) "
        head += f"{name}3 = Add({name}m, b{name}) "
    given = (
        {
            "scale": np.array(0.02, np.float32),
            "zero": np.array(128, np.uint8),
            "step": np.array(0.01, np.float32),
        }
        | {f"c{name}": array for name, array in weights.items()}
        if quantized
        else {f"w{name}": array.astype(np.float32) * np.float32(0.01) for name, array in weights.items()}
    )
    given |= {f"b{name}": random.standard_normal(32).astype(np.float32) for name in "qkv"}
    body = ATTENTION.replace("Reshape(x, view)", "Reshape(q3, view)").replace("scale)", "factor)")
    model = graph(
        HEAD + "g (float[batch, tokens, 32] x, float[batch, 1, tokens, tokens] mask) => "
        f"(float[batch, tokens, 32] y) {{ {head} {body} }}",
        view=np.array([0, 0, 4, 8]), rows=np.array([0, 0, 32]), factor=np.array(0.3, np.float32), **given,
    )  # fmt: skip
    common.ShapeInferencePass()(model)
    return model


def test_products_that_are_computed_in_integers_are_not_packed_into_attention() -> None:
    model = projected(quantized=True)
    case = {
        name: array for name, array in attention_feeds(2, 3, (2, 1, 3, 3)).items() if name in ("x", "mask")
    }
    before = run(model, case)
    outcome = FuseTransformer()(model)
    counts = operator_counts(model)
    assert counts["com.microsoft.MultiHeadAttention"] == 1 and "com.microsoft.Attention" not in counts
    assert (counts["MatMul"], counts["DequantizeLinear"]) == (3, 4)
    reasons = {why for what, why in outcome.changes.skipped.items() if what.startswith("attention at ")}
    assert reasons == {"a product of dequantized values stays, which runtimes compute in integers"}
    assert_same(before, run(model, case), rtol=1e-5)
    # The same in float is packed.
    control = projected(quantized=False)
    FuseTransformer()(control)
    assert "com.microsoft.Attention" in operator_counts(control)


def test_a_transposition_of_dequantized_weights_is_no_part_of_the_product() -> None:
    """FusedMatMul has no form in integers."""
    text = (
        "g (float[2, 32] x{more}) => (float[2, 16] y) "
        "{{ {q} t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }}"
    )
    weight = np.ones((16, 32), np.int8)
    quantized = graph(
        HEAD + text.format(q="w = DequantizeLinear(c, s)", more=""), c=weight, s=np.array(0.1, np.float32)
    )
    assert not FuseTransformer()(quantized).modified
    model = graph(HEAD + text.format(q="", more=", float[16, 32] w"))
    assert FuseTransformer()(model).changes.details["made"] == {"com.microsoft.FusedMatMul": 1}


NEAR = {
    # The condition that fails, of a pattern whose nodes are there or nearly.
    "another power": (
        "Pow(x, two)",
        "Pow(x, three)",
        "rms_normalization at ",
        "mismatch: expected 2.0, got 3.0",
    ),
    "no mean": ("ReduceMean<", "ReduceMax<", "rms_normalization at ", "expected ReduceMean, got ReduceMax"),
    "an epsilon that is given": (
        "Add(m, e)",
        "Add(m, given)",
        "rms_normalization at ",
        "epsilon is not a float value",
    ),
    "a mean that is read": (
        "n = Mul(x, r)",
        "n = Mul(x, r) z = Neg(m)",
        "rms_normalization at ",
        "other uses",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_is_near_a_pattern_of_onnxscript_says_what_fails(name: str) -> None:
    old, new, fusion, reason = NEAR[name]
    text = (
        "g (float[2, 4] x, float given) => (float[2, 4] y, float[2, 1] z) "
        "<float e = {1e-05}, float two = {2.0}, float three = {3.0}, int64[1] a = {-1}> "
        "{ s = Pow(x, two) m = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(s, a) p = Add(m, e) "
        "q = Sqrt(p) r = Reciprocal(q) n = Mul(x, r) y = Mul(n, w) END }"
    )
    text = text.replace("END", "" if "z = " in new else "z = ReduceMin<keepdims = 1>(x, a)")
    assert old in text
    model = graph(HEAD + text.replace(old, new), w=np.ones(4, np.float32))
    outcome = FuseTransformer()(model)
    assert not outcome.modified
    found = {why for what, why in outcome.changes.skipped.items() if what.startswith(fusion)}
    assert len(found) == 1 and reason in next(iter(found)), outcome.changes.skipped


def test_what_is_fused_is_not_near(exported: ir.Model) -> None:
    """Of a decoder that fuses whole, nothing is said to be left out."""
    outcome = FuseTransformer()(exported.clone())
    assert set(outcome.changes.skipped.values()) <= {NOT_NEAR, DROPS_THE_MASK}


def test_a_cleanup_that_has_nothing_to_do_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.rewriter.ort_fusions import _core

    from onnxsmith.graph_passes.corrections import corrected_onnxscript

    model = graph("""<ir_version: 9, opset_import: ["": 18]>
    g (float[n] x) => (float[n] z) { y = Neg(x)
      z = Exp(y) }""")
    optimize, runs = _core.optimize, []
    monkeypatch.setattr(
        _core, "optimize", lambda given, **options: (runs.append(1), optimize(given, **options))
    )
    with corrected_onnxscript(model):
        for _ in range(3):
            _core.optimize(model)
        assert len(runs) == 1
        # x + 0 is there to be taken away, which the next one does; the one after that finds nothing.
        zero = ir.Value(name="zero", const_value=ir.tensor(np.float32(0), name="zero"))
        model.graph.register_initializer(zero)
        last = model.graph.node(1)
        added = ir.node("Add", [last.inputs[0], zero])
        model.graph.insert_before(last, added)
        last.replace_input_with(0, added.outputs[0])
        for _ in range(4):
            _core.optimize(model)
    assert len(runs) == 3
    assert [node.op_type for node in model.graph] == ["Neg", "Exp"]


def test_positions_of_one_row_are_those_of_all_rows() -> None:
    """The operator takes no positions (1, tokens) for a batch, and onnxscript leaves them so."""
    angles = np.arange(16)[:, None] * np.array([1.0, 0.1], np.float32)
    text = """<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>
    g (float[batch, 3, tokens, 4] x, int64[1, tokens] positions) => (float[batch, 3, tokens, 4] y, z) {
      y = com.microsoft.RotaryEmbedding(x, positions, cos, sin)
      z = com.microsoft.RotaryEmbedding(y, positions, cos, sin)
    }"""
    model = graph(text, cos=np.cos(angles).astype(np.float32), sin=np.sin(angles).astype(np.float32))
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    positions = np.array([[3, 1, 4, 9, 0]])
    rows = [run(model, {"x": x[i : i + 1], "positions": positions}) for i in range(2)]

    assert spread_positions(model) == 2

    assert [node.op_type for node in model.graph].count("Expand") == 1
    found = run(model, {"x": x, "positions": positions})
    for name in ("y", "z"):
        np.testing.assert_array_equal(found[name], np.concatenate([row[name] for row in rows]))
    assert spread_positions(model) == 0


@pytest.mark.parametrize(
    "shapes", ["float[4, tokens, 8] x, float[6, 8] w", "float[2, 4, tokens, 8] x, float[6, 8] w"]
)
def test_turned_batches_are_multiplied_with_a_matrix(shapes: str) -> None:
    """As in SigLIP's pooling: FusedMatMul turns batches only beside an operand that has them too."""
    rank = 3 if "[4" in shapes else 4
    order, first = ([1, 0, 2], "") if rank == 3 else ([1, 2, 0, 3], "a, ")
    text = f"""<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>
    g ({shapes}) => (float[{first}b, c, 6] y) {{
      t = Transpose<perm = {order}>(x) wt = Transpose<perm = [1, 0]>(w)
      y = MatMul(t, wt)
    }}"""
    model = graph(text)
    common.ShapeInferencePass()(model)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 5, 8) if rank == 3 else (2, 4, 5, 8)).astype(np.float32)
    feeds = {"x": x, "w": rng.standard_normal((6, 8)).astype(np.float32)}
    expected = run(model, feeds)

    FuseTransformer()(model)

    assert_same(expected, run(model, feeds), rtol=1e-6)
