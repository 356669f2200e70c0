"""Masks of padding inside the keys: exact, and refused where a mask is more than padding."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generated_graphs import Array, assert_same, graph, run, serialized
from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.graph_passes import PRESETS, load_pass, make_passes, run_passes
from onnxsmith.graph_passes.gelu import SplitBiasGelu
from onnxsmith.graph_passes.key_masks import MaskInKeys
from onnxsmith.package import ModelPackage
from onnxsmith.source import ModelSource

HEAD = '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> '
LOWEST = np.finfo(np.float32).min
# From a mask of ones and zeros to a bias of scores, as torch's exporter writes it.
MASKS = {
    "where": """
        one_row = Unsqueeze(mask, axes) shape = Shape(x) b = Gather(shape, zero_index)
        t = Gather(shape, one_index) square = Concat<axis = 0>(b, one_index, t, t)
        wide = Expand(one_row, square) real = Cast<to = 1>(wide) rest = Sub(one, real)
        hidden = Cast<to = 9>(rest) bias = Where(hidden, lowest, rest)""",
    "product": """
        real = Cast<to = 1>(mask) rest = Sub(one, real) added = Mul(rest, lowest) row = Unsqueeze(added, axes)
        shape = Shape(x) b = Gather(shape, zero_index) t = Gather(shape, one_index)
        square = Concat<axis = 0>(b, one_index, t, t) bias = Expand(row, square)""",
    "numbers": """
        real = Cast<to = 1>(mask) row = Unsqueeze(real, axes) shape = Shape(x) b = Gather(shape, zero_index)
        t = Gather(shape, one_index) square = Concat<axis = 0>(b, one_index, t, t)
        bias = Expand(row, square)""",
}
APART = """
    qm = MatMul(x, wq) {q} km = MatMul(x, wk) {k} vm = MatMul(x, wv) {v}
    y = com.microsoft.MultiHeadAttention<num_heads = {heads}{scale}>({operands})"""


def shapes_known(model: ir.Model) -> ir.Model:
    load_pass("infer_shapes").create({})(model)
    return model


def apart(
    mask: str,
    *,
    heads: int,
    size: int,
    values: int,
    biases: str,
    scale: float,
    seed: int,
    padding: bool = False,
) -> ir.Model:
    """Attention whose query, key and value are products of their own."""
    rng = np.random.default_rng(seed)
    widths = {"q": heads * size, "k": heads * size, "v": heads * values}
    weights: dict[str, Array] = {
        f"w{name}": (rng.standard_normal((12, width)) / 3).astype(np.float32)
        for name, width in widths.items()
    }
    vectors = {name: rng.standard_normal(width).astype(np.float32) for name, width in widths.items()}
    added = (
        {name: f"{name} = Add({name}m, b{name})" for name in widths} if biases in ("added", "both") else {}
    )
    weights |= {f"b{name}": vector for name, vector in vectors.items()} if added else {}
    operands = [*(name if added else f"{name}m" for name in widths)]
    if biases in ("inside", "both"):
        weights["inner"] = np.concatenate([*vectors.values()])
    operands += ["inner" if "inner" in weights else "", *(["mask"] if padding else ["", "bias"])]
    body = ("" if padding else MASKS[mask]) + APART.format(
        heads=heads, scale=f", scale = {scale}" if scale else "", operands=", ".join(operands),
        **{name: added.get(name, "") for name in widths},
    )  # fmt: skip
    if not padding:
        weights |= {
            "one": np.array(1, np.float32), "lowest": np.array(LOWEST), "axes": np.array([1, 2]),
            "zero_index": np.array([0]), "one_index": np.array([1]),
        }  # fmt: skip
        weights = {name: array for name, array in weights.items() if name in body}
    kind = "int32" if padding else "int64"
    inputs = f"float[batch, tokens, 12] x, {kind}[batch, tokens] mask"
    return shapes_known(
        graph(HEAD + f"g ({inputs}) => (float[batch, tokens, out] y) {{ {body} }}", **weights)
    )


def rows(batch: int, tokens: int, seed: int, kind: Any = np.int64) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    mask = (rng.random((batch, tokens)) < 0.7).astype(kind)
    # A whole row, one with padding on the left, and one that has nothing to look at where there are so many.
    mask[0] = 1
    mask[-1, : tokens // 2], mask[-1, tokens // 2 :] = 0, 1
    if batch > 2:
        mask[1] = 0
    return {"x": rng.standard_normal((batch, tokens, 12)).astype(np.float32), "mask": mask}


def attention_of(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in ("MultiHeadAttention", "Attention")]


def is_masked(node: ir.Node) -> bool:
    return any(value is not None for value in node.inputs[4:])


@settings(max_examples=60, deadline=None)
@given(
    mask=st.sampled_from(sorted(MASKS)),
    heads=st.integers(1, 4),
    size=st.sampled_from([1, 4, 8, 16, 31, 32]),
    values=st.sampled_from([4, 8, 32]),
    biases=st.sampled_from(["none", "added", "inside", "both"]),
    scale=st.sampled_from([0.0, 0.5, 1.0]),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_attention_gives_the_same(
    mask: str,
    heads: int,
    size: int,
    values: int,
    biases: str,
    scale: float,
    batch: int,
    tokens: int,
    seed: int,
) -> None:
    model = apart(mask, heads=heads, size=size, values=values, biases=biases, scale=scale, seed=seed)
    feeds = rows(batch, tokens, seed)
    expected = run(model, feeds)

    outcome = MaskInKeys()(model)

    assert outcome.modified, outcome.changes.skipped
    assert not any(map(is_masked, attention_of(model)))
    assert_same(expected, run(model, feeds), rtol=2e-5)
    assert not MaskInKeys()(model).modified


@pytest.mark.parametrize("hidden", [0.0, -50.0, -1e9])
def test_a_mask_of_padding_gives_the_same(hidden: float) -> None:
    model = apart("", heads=3, size=8, values=4, biases="inside", scale=0, seed=1, padding=True)
    node = attention_of(model)[0]
    if hidden:
        node.attributes["mask_filter_value"] = ir.AttrFloat32("mask_filter_value", hidden)
    feeds = rows(2, 20, 1, np.int32)
    expected = run(model, feeds)

    assert MaskInKeys()(model).modified

    assert not is_masked(attention_of(model)[0])
    assert_same(expected, run(model, feeds), rtol=2e-5)


def test_attention_with_its_projections_inside_is_opened_only_where_that_helps() -> None:
    def packed(bias: str) -> ir.Model:
        rng = np.random.default_rng(2)
        body = MASKS["where"] + f" y = com.microsoft.Attention<num_heads = 3>(x, w, v, , , {bias})"
        return shapes_known(
            graph(
                HEAD + "g (float[batch, tokens, 12] x, int64[batch, tokens] mask, "
                f"float[batch, 1, tokens, tokens] given) => (float[batch, tokens, 24] y) {{ {body} }}",
                w=(rng.standard_normal((12, 72)) / 3).astype(np.float32),
                v=rng.standard_normal(72).astype(np.float32),
                one=np.array(1, np.float32), lowest=np.array(LOWEST), axes=np.array([1, 2]),
                zero_index=np.array([0]), one_index=np.array([1]),
            )
        )  # fmt: skip

    model, other = packed("bias"), packed("given")
    feeds = rows(3, 30, 2) | {"given": np.zeros((3, 1, 30, 30), np.float32)}
    expected = run(model, feeds)

    outcome = MaskInKeys()(model)

    assert outcome.changes.count == 1
    assert [node.op_type for node in attention_of(model)] == ["MultiHeadAttention"]
    assert_same(expected, run(model, feeds), rtol=2e-5)
    kept = MaskInKeys()(other)
    assert not kept.modified
    assert [node.op_type for node in attention_of(other)] == ["Attention"]
    assert "'given', which may differ between queries" in "".join(kept.changes.skipped.values())


def test_what_is_more_than_padding_stays() -> None:
    def refusal(change: str, to: str, inputs: str = "") -> str:
        model = apart("numbers", heads=2, size=8, values=8, biases="none", scale=0, seed=3)
        text = HEAD + (
            f"g (float[batch, tokens, 12] x, int64[batch, tokens] mask{inputs}) => "
            "(float[batch, tokens, 16] y) { " + (MASKS["numbers"] + APART.format(
                heads=2, scale="", q="", k="", v="", operands="qm, km, vm, , , bias"
            )).replace(change, to) + " }"
        )  # fmt: skip
        weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
        changed = shapes_known(graph(text, **weights))
        outcome = MaskInKeys()(changed)
        assert not outcome.modified
        (reason,) = outcome.changes.skipped.values()
        return reason

    assert "causal" in refusal("num_heads = 2", "num_heads = 2, unidirectional = 1")
    assert "'causal', which may differ" in refusal(
        "bias = Expand(row, square)", "bias = Add(row, causal)", ", float[1, 1, tokens, tokens] causal"
    )
    assert "'heads', which may differ" in refusal(
        "bias = Expand(row, square)", "bias = Add(row, heads)", ", float[1, 2, tokens, tokens] heads"
    )
    assert "not a product" in refusal("qm, km, vm, ", "qm, keys, vm, ", ", float[batch, tokens, 16] keys")
    assert "cache" in refusal(
        "qm, km, vm, , , bias", "qm, km, vm, , , bias, past, past",
        ", float[batch, 2, 0, 8] past",
    )  # fmt: skip
    assert "one number for all keys" in refusal(
        "bias = Expand(row, square)", "five = Constant<value = float {5.0}>() bias = Expand(five, square)"
    )


def test_attention_in_other_types_stays() -> None:
    model = apart("product", heads=2, size=8, values=8, biases="none", scale=0, seed=4)
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.FLOAT16)

    outcome = MaskInKeys()(model)

    assert not outcome.modified
    assert "float32" in "".join(outcome.changes.skipped.values())


def encoder(kind: str, folder: Path) -> ModelPackage:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 40,
    }  # fmt: skip
    if kind == "distilbert":
        sizes = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    model.save_pretrained(folder)
    loaded = load_torch(ModelSource.parse(str(folder)))
    return export(loaded, torch_program(loaded))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_encoders_give_the_same_with_padding_on_either_side(kind: str, tmp_path: Path) -> None:
    package = encoder(kind, tmp_path)
    specs = PRESETS["cpu-fp32"]
    without = [one for one in specs if one[0] not in ("mask_in_keys", "split_bias_gelu")]
    plain, moved = (
        run_passes(package.derive(), make_passes(given)).components["model"].model
        for given in (without, specs)
    )
    names = {value.name for value in plain.graph.inputs}
    rng = np.random.default_rng(0)
    mask = np.ones((3, 11), np.int64)
    mask[1, 7:], mask[2, :4] = 0, 0
    given = {"input_ids": rng.integers(5, 60, (3, 11)), "attention_mask": mask, "token_type_ids": 0 * mask}
    feeds = {name: array for name, array in given.items() if name in names}

    assert len(attention_of(moved)) == 2
    assert not any(map(is_masked, attention_of(moved)))
    assert any(map(is_masked, attention_of(plain)))
    assert_same(run(plain, feeds), run(moved, feeds), rtol=1e-5)


def test_integer_products_take_the_biases_of_attention_in(tmp_path: Path) -> None:
    package = encoder("bert", tmp_path)

    quantized = run_passes(package, make_passes(PRESETS["cpu-int8-dynamic"])).components["model"].model

    for node in attention_of(quantized):
        assert [value is not None for value in node.inputs] == [True] * 3
    assert not any(node.op_type in ("BiasGelu", "Sum") and len(node.inputs) == 3 for node in quantized.graph)


def test_heads_can_be_pruned_afterwards(tmp_path: Path) -> None:
    package = encoder("bert", tmp_path)
    specs = [one for one in PRESETS["cpu-fp32"] if one[0] not in ("mask_in_keys", "split_bias_gelu")]
    plain = run_passes(package, make_passes(specs)).components["model"].model
    moved = plain.clone()
    MaskInKeys()(moved)
    mask = np.ones((2, 9), np.int64)
    mask[1, 5:] = 0
    feeds = {"input_ids": np.arange(18).reshape(2, 9) + 5, "attention_mask": mask, "token_type_ids": 0 * mask}
    pruning = {"ratio": 0.5, "method": "random"}

    for model in (plain, moved):
        assert load_pass("prune_heads").create(pruning)(model).modified

    assert [node.attributes["num_heads"].as_int() for node in attention_of(moved)] == [2, 2]
    assert_same(run(plain, feeds), run(moved, feeds), rtol=1e-5)


def test_bias_and_gelu_apart_give_the_same_and_stay_apart() -> None:
    rng = np.random.default_rng(5)
    model = graph(
        HEAD + "g (float[rows, 40] x) => (float[rows, 40] y) { y = com.microsoft.BiasGelu(x, b) }",
        b=rng.standard_normal(40).astype(np.float32),
    )
    feeds = {"x": rng.standard_normal((7, 40)).astype(np.float32)}
    expected = run(model, feeds)

    outcome = SplitBiasGelu()(model)

    assert outcome.changes.details == {"split": 1}
    assert_same(expected, run(model, feeds), rtol=1e-6)
    assert [node.op_type for node in optimized(model)] == ["Sum", "Gelu"]
    assert not SplitBiasGelu()(model).modified


def optimized(model: ir.Model) -> list[ir.Node]:
    """The nodes that ONNX Runtime runs."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "seen.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
        return list(ir.load(options.optimized_model_filepath).graph)
