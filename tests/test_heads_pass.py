"""The pass to the own attention without a cache: the same numbers, one product for three, small masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from generated_graphs import Array, graph
from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.contract import Changes
from onnxsmith.graph_passes.float_kernels import UseFloatKernels
from onnxsmith.graph_passes.own_attention import UseOwnAttention
from onnxsmith.graph_passes.packed_kernels import UsePackedKernels
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.graph_passes.shapes import InferShapes
from onnxsmith.own_operators import OWN_DOMAIN
from onnxsmith.package import ModelPackage
from onnxsmith.packed_tiles import untile_values
from onnxsmith.runtime import OrtSession, cases_for, value_limits
from onnxsmith.source import ModelSource
from test_float_products import outputs
from test_kernel_presets import plain_runtime
from test_key_masks import MASKS, encoder

WIDTH = 64
HEAD = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> '
PARTS = "q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv) q = Add(q0, bq) v = Add(v0, bv) "
ATTEND = "y = com.microsoft.MultiHeadAttention<num_heads = 4>({operands})"
CONSTANTS: dict[str, Array] = {
    "one": np.array(1, np.float32), "lowest": np.array(np.finfo(np.float32).min), "axes": np.array([1, 2]),
    "zero_index": np.array([0]), "one_index": np.array([1]),
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention(
    operands: str = "q, k0, v", before: str = PARTS, *, inputs: str = "", after: str = "", **weights: Array
) -> ir.Model:
    body = before + ATTEND.format(operands=operands) + after
    given = {f"w{name}": random(WIDTH, WIDTH, seed=number) / 4 for number, name in enumerate("qkv")}
    given |= {f"b{name}": random(WIDTH, seed=10 + number) for number, name in enumerate("qkv")}
    given |= {"inner": random(3 * WIDTH, seed=20), "wqkv": random(WIDTH, 3 * WIDTH, seed=21) / 4}
    given |= CONSTANTS | weights
    words = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    text = (
        HEAD + f"g (float[batch, tokens, {WIDTH}] x, int64[batch, tokens] mask{inputs}) => "
        f"(float[batch, tokens, out] y) {{ {body} }}"
    )
    model = graph(text, **{name: array for name, array in given.items() if name in words})
    InferShapes()(model)
    return model


def feeds(batch: int, tokens: int) -> dict[str, Array]:
    mask = np.ones((batch, tokens), np.int64)
    for row in range(1, batch):
        mask[row, tokens - row * tokens // 4 :] = 0
    return {"x": random(batch, tokens, WIDTH, seed=3), "mask": mask}


def with_products(model: ir.Model, bits: int = 32, **form: Any) -> ir.Model:
    if bits == 32:
        UseFloatKernels()(model)
    else:
        QuantizeWeights(bits=bits, block_size=32, **form)(model)
        UsePackedKernels()(model)
    InferShapes()(model)
    return model


def taken(model: ir.Model) -> Changes:
    changes = UseOwnAttention()(model).changes
    onnx.checker.check_model(ir.to_proto(model))
    return changes


def heads(model: ir.Model) -> ir.Node:
    (node,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    return node


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same_as(before: ir.Model, model: ir.Model, given: dict[str, Array], kernels: Path) -> None:
    """By functions and by kernels, each as before."""
    for library in (None, kernels):
        want, got = outputs(before, given, library)["y"], outputs(model, given, library)["y"]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 32},
        {"bits": 8, "symmetric": True, "half_scales": True},
        {"bits": 4, "minimums": True, "half_scales": True},
        {"bits": 4},
    ],
)
def test_three_products_become_one(form: dict[str, Any], kernels: Path) -> None:
    before = with_products(attention(), **form)
    model = before.clone()
    assert taken(model).details == {"attention": 1, "without a cache": 1, "of one operand": 1}
    assert kinds(model) == ["MatMulPacked", "MultiHeadAttention"]
    product, node = model.graph
    assert product.attributes["N"].as_int() == 3 * WIDTH
    assert [value is not None for value in node.inputs] == [True]
    # The biases of query and value, and zeros for the key.
    bias = product.inputs[4]
    assert bias is not None and bias.const_value is not None
    np.testing.assert_array_equal(
        bias.const_value.numpy(), np.concatenate([random(64, seed=10), np.zeros(64), random(64, seed=12)])
    )
    if form["bits"] == 32:
        tiles = product.inputs[1]
        assert tiles is not None and tiles.const_value is not None
        whole = np.concatenate([random(WIDTH, WIDTH, seed=number) / 4 for number in range(3)], axis=1)
        np.testing.assert_array_equal(untile_values(tiles.const_value.numpy(), 3 * WIDTH), whole.T)
    # Nothing is kept of what stood apart.
    assert len([value for value in model.graph.initializers if "tiles" in value]) == 1
    assert set(model.functions) == {node.op_identifier() for node in model.graph}
    for shape in ((1, 1), (3, 40), (2, 130)):
        assert_same_as(before, model, feeds(*shape), kernels)


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_parts_of_one_product_are_read_as_one(opset: int, kernels: Path) -> None:
    split = "Split<axis = -1>" if opset < 18 else "Split<axis = -1, num_outputs = 3>"
    before = attention("q, k, v, inner", f"p = MatMul(x, wqkv) q, k, v = {split}(p) ")
    before.opset_imports[""] = opset
    with_products(before)
    model = before.clone()
    assert taken(model).details["of one operand"] == 1
    assert kinds(model) == ["MatMulPacked", "MultiHeadAttention"]
    assert [value.name if value else None for value in heads(model).inputs] == ["p", None, None, "inner"]
    assert_same_as(before, model, feeds(2, 33), kernels)


@pytest.mark.parametrize(
    ("before", "operands", "weights", "inputs"),
    [
        # Of another text, as in a decoder of BART.
        (PARTS.replace("MatMul(x, wk)", "MatMul(z, wk)").replace("MatMul(x, wv)", "MatMul(z, wv)"), "", {},
         ", float[batch, others, 64] z"),
        (PARTS, "", {"wv": random(WIDTH, 32), "bv": random(32)}, ""),
        (PARTS, "", {"wq": random(WIDTH, 72) / 4, "wk": random(WIDTH, 72) / 4, "bq": random(72)}, ""),
        # Parts in another order.
        ("p = MatMul(x, wqkv) q, v, k0 = Split<axis = -1, num_outputs = 3>(p) ", "", {}, ""),
        ("p = MatMul(x, wqkv) q, k0, v = Split<axis = -1>(p, sizes) ", "",
         {"sizes": np.array([64, 64, 32]), "wqkv": random(WIDTH, 160)}, ""),
        # What another product reads too.
        ("q0 = MatMul(x, wq) k0 = MatMul(x, wk) v = MatMul(x, wq) q = Add(q0, bq) ", "", {}, ""),
        (PARTS, "q0, k0, k0", {}, ""),
        # An activation of one.
        ("q0 = MatMul(x, wq) q = Gelu(q0) k0 = MatMul(x, wk) v = MatMul(x, wv) ", "", {}, ""),
    ],
)  # fmt: skip
def test_what_is_not_one_product_stays_apart(
    before: str, operands: str, weights: dict[str, Array], inputs: str, kernels: Path
) -> None:
    model = attention(operands or "q, k0, v", before, inputs=inputs, **weights)
    with_products(model)
    apart = model.clone()
    assert taken(model).details == {"attention": 1, "without a cache": 1, "of one operand": 0}
    assert heads(model).domain == OWN_DOMAIN and all(value is not None for value in heads(model).inputs[:3])
    given = feeds(2, 20) | ({"z": random(2, 35, WIDTH, seed=4)} if inputs else {})
    assert_same_as(apart, model, given, kernels)


def test_a_product_that_is_read_elsewhere_stays() -> None:
    model = with_products(attention("q0, k0, v0"))
    key = heads(model).inputs[1]
    assert key is not None
    model.graph.outputs.append(key)
    assert taken(model).details["of one operand"] == 0


@pytest.mark.parametrize("mask", sorted(MASKS))
def test_a_mask_of_padding_is_one_row(mask: str, kernels: Path) -> None:
    before = attention("q, k0, v, inner, , bias", MASKS[mask] + PARTS)
    with_products(before)
    model = before.clone()
    assert taken(model).details["of one operand"] == 1
    assert "Expand" not in kinds(model)
    scores = heads(model).inputs[4]
    assert scores is not None and scores.shape == ir.Shape(["batch", 1, 1, "tokens"])
    for shape in ((1, 1), (3, 20), (3, 130)):
        assert_same_as(before, model, feeds(*shape), kernels)


def test_what_masks_become_together(kernels: Path) -> None:
    """Numbers of texts and of keys make one for each key of each text, and are known to."""
    masks = """p = Tanh(keys) m0 = Expand(p, square) m1 = Expand(texts, square) m2 = Mul(m0, m1)
        m3 = Add(m2, m1) m4 = Expand(both, square) bias = Add(m3, m4) """
    inputs = """, float[1, 1, 1, tokens] keys, float[batch, 1, 1, 1] texts, float[batch, 1, 1, tokens] both,
        int64[4] square"""
    before = attention("q, k0, v, , , bias", masks + PARTS, inputs=inputs)
    for node in before.graph:
        if node.op_type in ("Expand", "Mul", "Add") and node.outputs[0].name not in ("q", "v"):
            node.outputs[0].shape = ir.Shape(["batch", 1, "tokens", "tokens"])
    given = feeds(3, 5) | {"keys": random(1, 1, 1, 5, seed=4), "texts": random(3, 1, 1, 1, seed=5)}
    given |= {"both": random(3, 1, 1, 5, seed=6), "square": np.array([3, 1, 5, 5])}
    with_products(before)
    model = before.clone()
    taken(model)
    scores = heads(model).inputs[4]
    assert scores is not None and scores.shape == ir.Shape(["batch", 1, 1, "tokens"])
    assert_same_as(before, model, given, kernels)


@pytest.mark.parametrize(
    ("bias", "inputs"),
    [
        ("bias = Add(row, causal)", ", float[1, 1, tokens, tokens] causal"),
        ("bias = Add(row, causal)", ", float[1, 4, tokens, tokens] causal"),
        ("bias = Expand(causal, square)", ", float[1, 1, 1, 1] causal"),
        ("bias = Expand(causal, square)", ", float[1, 1, 1, t] causal"),
    ],
)
def test_what_may_be_more_than_a_row_stays_whole(bias: str, inputs: str, kernels: Path) -> None:
    masks = MASKS["numbers"].replace("bias = Expand(row, square)", bias)
    before = attention("q, k0, v, , , bias", masks + PARTS, inputs=inputs)
    with_products(before)
    model = before.clone()
    taken(model)
    scores = heads(model).inputs[4]
    assert scores is not None and scores.name == "bias"
    axes = inputs.partition("[")[2].partition("]")[0].split(", ")
    shape = [9 if axis == "tokens" else 1 if axis == "t" else int(axis) for axis in axes]
    assert_same_as(before, model, feeds(3, 9) | {"causal": random(*shape)}, kernels)


@pytest.mark.parametrize("hidden", [0.0, -50.0])
def test_a_mask_of_keys_becomes_a_bias(hidden: float, kernels: Path) -> None:
    cast = "narrow = Cast<to = 6>(mask) "
    before = attention("q, k0, v, inner, narrow", cast + PARTS)
    if hidden:
        heads(before).attributes["mask_filter_value"] = ir.AttrFloat32("mask_filter_value", hidden)
    with_products(before)
    model = before.clone()
    assert taken(model).details["of one operand"] == 1
    assert set(heads(model).attributes) == {"num_heads"}
    assert_same_as(before, model, feeds(3, 20), kernels)


@pytest.mark.parametrize(
    ("operands", "before", "inputs", "reason"),
    [
        ("q, k0, v, , , , past, past", PARTS, ", float[batch, 4, 0, 16] past", "it has a cache"),
        ("q, given, given", PARTS, ", float[batch, 4, tokens, 16] given", "4 axes; the kernel wants three"),
        ("q, k0, v, , lengths", PARTS, ", int32[batch] lengths", "not a number for each key alone"),
        ("packed", "", ", float[batch, tokens, 4, 3, 16] packed", "its query has 5 axes"),
    ],
)
def test_what_the_kernel_lacks_stays(operands: str, before: str, inputs: str, reason: str) -> None:
    model = attention(operands, before, inputs=inputs)
    outcome = UseOwnAttention()(model)
    assert not outcome.modified
    (said,) = outcome.changes.skipped.values()
    assert reason in said


def test_attention_of_other_types_or_with_more_results_stays() -> None:
    causal, half, keys = attention(), attention(), attention()
    heads(causal).attributes["unidirectional"] = ir.AttrInt64("unidirectional", 1)
    for value in heads(half).inputs:
        assert value is not None
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    node = heads(keys)
    node.resize_outputs(3)
    node.outputs[1].name = "present"
    keys.graph.outputs.append(node.outputs[1])
    said = [*(next(iter(UseOwnAttention()(one).changes.skipped.values())) for one in (causal, half, keys))]
    assert said == [
        "it has a causal mask of its own",
        "the kernel computes in float32",
        "its keys and values are read, or its scores",
    ]


def test_a_projection_inside_attention_is_opened_unless_it_shall_stay(kernels: Path) -> None:
    attend = "y = com.microsoft.Attention<num_heads = 4>(x, wqkv, inner)"
    text = HEAD + f"g (float[batch, tokens, 64] x) => (float[batch, tokens, 64] y) {{ {attend} }}"
    before = graph(text, wqkv=random(WIDTH, 3 * WIDTH) / 4, inner=random(3 * WIDTH))
    InferShapes()(before)
    kept, model = before.clone(), before.clone()
    assert not UseFloatKernels(skip_nodes=("wq*",))(kept).modified
    assert kinds(kept) == ["Attention"]
    with_products(model)
    assert kinds(model) == ["MatMulPacked", "Split", "MultiHeadAttention"]
    given = {"x": feeds(2, 30)["x"]}
    assert_same_as(before, model, given, kernels)
    taken(model)
    assert kinds(model) == ["MatMulPacked", "MultiHeadAttention"]
    assert_same_as(before, model, given, kernels)


def both(package: ModelPackage) -> list[ModelPackage]:
    """For ONNX Runtime's operators, and for the own kernels."""
    presets = ("cpu-fp32", "cpu-fp32-kernels")
    return [run_passes(package.derive(), make_passes(PRESETS[preset])) for preset in presets]


def assert_agrees(exact: ModelPackage, made: ModelPackage, directory: Path, *, near: float = 2e-5) -> None:
    """The first output in three runtimes: ONNX Runtime's operators, the functions, the kernels."""
    with OrtSession(exact, threads=1) as reference, OrtSession(made, threads=2) as candidate:
        cases = list(cases_for(reference, limits=value_limits(exact), samples=4, seed=0))
        name = reference.outputs[0].name
        expected = [reference.run(case.feeds)[name] for case in cases]
        by_kernels = [candidate.run(case.feeds)[name] for case in cases]
    functions = [one[name] for one in plain_runtime(made, cases, directory)]
    assert len(cases) > 1
    for case, want, *found in zip(cases, expected, by_kernels, functions, strict=True):
        # Nothing is asked of what stands at padding.
        kept = slice(None) if case.tokens is None else case.tokens[:, -want.shape[1] :]
        for got in found:
            atol = near * np.abs(want[kept]).max()
            np.testing.assert_allclose(got[kept], want[kept], rtol=0, atol=atol, err_msg=case.name)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_encoders_with_padding_on_either_side(kind: str, tmp_path: Path, kernels: Path) -> None:
    """A text gives the same alone, and padded in a batch, which is what PyTorch gives."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made = run_passes(encoder(kind, tmp_path), make_passes(PRESETS["cpu-fp32-kernels"]))
    own = [node.op_type for node in made.main.model.graph if node.domain == OWN_DOMAIN]
    assert own.count("MultiHeadAttention") == 2
    assert not {"MultiHeadAttention", "Attention", "Expand"} & {
        node.op_type for node in made.main.model.graph if node.domain != OWN_DOMAIN
    }
    module = transformers.AutoModel.from_pretrained(tmp_path).eval()
    rng = np.random.default_rng(0)
    mask = np.ones((3, 17), np.int64)
    mask[1, 7:], mask[2, :4] = 0, 0
    given = {"input_ids": rng.integers(5, 60, (3, 17)), "attention_mask": mask, "token_type_ids": 0 * mask}
    with OrtSession(made, threads=2) as session:
        names = {spec.name for spec in session.inputs}
        named = {name: array for name, array in given.items() if name in names}
        got = session.run(named)["last_hidden_state"]
        with torch.no_grad():
            want = module(**{k: torch.from_numpy(v) for k, v in named.items()}).last_hidden_state.numpy()
        np.testing.assert_allclose(got[mask == 1], want[mask == 1], rtol=0, atol=2e-5)
        short = {name: array[1:2, :7] for name, array in named.items()}
        alone = session.run(short)["last_hidden_state"]
    np.testing.assert_allclose(alone[0], got[1, :7], rtol=0, atol=1e-5)


def vision(folder: Path) -> ModelPackage:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32,
        patch_size=8,
    )  # fmt: skip
    return saved(transformers.ViTModel(config), folder)


def pairs(folder: Path) -> ModelPackage:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    text = {"vocab_size": 60, "max_position_embeddings": 40} | tokens
    config = transformers.CLIPConfig(
        text_config=sizes | text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=32
    )
    return saved(transformers.CLIPModel(config), folder)


def saved(module: Any, folder: Path) -> ModelPackage:
    module.eval().save_pretrained(folder)
    loaded = load_torch(ModelSource.parse(str(folder)))
    return export(loaded, torch_program(loaded))


@pytest.mark.parametrize(("make", "layers"), [(vision, 2), (pairs, 4)])
def test_encoders_of_images(
    make: Callable[[Path], ModelPackage], layers: int, tmp_path: Path, kernels: Path
) -> None:
    package = make(tmp_path / "model")
    exact, made = both(package)
    (step,) = (step for step in made.steps if step.name == "use_own_attention")
    assert step.details["of one operand"] == layers and step.details["skipped"] == {}
    (step,) = (step for step in made.steps if step.name == "sums_in_products")
    assert step.details["sums"] == 2 * layers
    assert_agrees(exact, made, tmp_path / "made")


@pytest.mark.parametrize("family", ["Bart", "Whisper"])
def test_encoders_of_sequence_to_sequence_models(family: str, tmp_path: Path, kernels: Path) -> None:
    seq2seq = pytest.importorskip("test_export_seq2seq")
    package = export(seq2seq.loaded(family))
    exact, made = both(package)
    (step,) = (step for step in made.steps if step.name == "use_own_attention")
    assert step.details["encoder_model"]["of one operand"] >= 1
    # What made up inputs for Whisper's decoder knows nothing of its number of positions.
    for name in ("encoder_model", "decoder_model")[: 2 if family == "Bart" else 1]:
        assert_agrees(
            *(ModelPackage({"model": one.components[name]}) for one in (exact, made)), tmp_path / name
        )
