"""Finer rounding of activations: the weights stay what they are, less is lost, branches, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from generated_graphs import Array, graph, serialized
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes import make_passes, run_passes
from onnxsmith.graph_passes.block_repairs import SetAccuracyLevel
from onnxsmith.graph_passes.contract import Changes
from onnxsmith.graph_passes.finer_activations import FinerActivations
from onnxsmith.graph_passes.minimums import FoldMinimums
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.package import ModelPackage
from onnxsmith.runtime import OrtSession
from onnxsmith.runtime.decoding import open_decoder

OUTLIER = 70
ROWS = 40


def run(model: ir.Model, x: Array) -> Array:
    """What a graph computes; constants are folded, as scales in MatMulNBits must be."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(["y"], {"x": x})[0]
    return found


def product(columns: int = 192, **options: Any) -> tuple[ir.Model, Array]:
    """A quantized product, and an input with a column that is large beside the others."""
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[m, {columns}] x) => (float[m, {ROWS}] y) '
        "{ y = MatMul(x, w) }",
        # Means of blocks that are not zero.
        w=np.random.default_rng(2).gamma(2, size=(columns, ROWS)).astype(np.float32),
    )
    QuantizeWeights(**{"bits": 4, "block_size": 32, **options})(model)
    x = np.random.default_rng(3).standard_normal((64, columns)).astype(np.float32)
    x[:, OUTLIER % columns] *= 20
    return model, x


def finer(model: ir.Model, **options: Any) -> Changes:
    return FinerActivations(**{"after": "any", **options})(model).changes


def in_floats(model: ir.Model, x: Array) -> Array:
    """The product without rounding of activations."""
    copied = model.clone()
    SetAccuracyLevel(level=1)(copied)
    return run(copied, x)


def lost(model: ir.Model, x: Array) -> float:
    """The squared error of rounding activations."""
    return float(np.square(run(model, x) - in_floats(model, x)).mean())


FORMS = (
    {"minimums": True},
    {"minimums": True, "half_scales": True},
    {"minimums": True, "bits": 8},
    {"symmetric": True},
    {"symmetric": True, "bits": 8, "half_scales": True},
    {},
    {"bits": 8},
    {"block_size": 64},
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)) or "zero points")
# An odd number of blocks leaves half a byte of zero points empty.
@pytest.mark.parametrize("columns", [128, 96])
def test_weights_stay_and_less_is_lost(form: dict[str, Any], columns: int) -> None:
    model, x = product(columns, **form)
    size = next(node for node in model.graph if node.op_type == "MatMulNBits").attributes["block_size"]
    before, error, level = in_floats(model, x), lost(model, x), serialized(model)
    changes = finer(model)
    minimums = bool(form.get("minimums"))
    assert size.as_int() > 16
    assert changes.details == {"centred": int(minimums), "split": 1, "block_size": 16}
    after = in_floats(model, x)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max())
    assert 0 < lost(model, x) < 0.8 * error
    assert finer(model).count == 0
    assert serialized(model) != level
    # The control: another scale for one half of a block is another weight.
    [gather] = [node for node in model.graph if node.op_type == "Gather" and "by_16" in (node.name or "")]
    index = gather.inputs[1]
    assert index is not None and index.const_value is not None
    wrong = index.const_value.numpy().copy()
    wrong[1] = wrong[-1]
    index.const_value = ir.tensor(wrong, name=index.name)
    assert np.abs(in_floats(model, x) - before).max() > 1e-3 * np.abs(before).max()


def test_central_zero_points_alone() -> None:
    """Of weights that share a sign, most of the error goes; no byte is added but for zero points."""
    model, x = product(minimums=True, half_scales=True)
    error, bytes_before = lost(model, x), stored_bytes(model)
    assert finer(model, widest=0).details == {"centred": 1, "split": 0, "block_size": 16}
    assert 0 < lost(model, x) < 0.8 * error
    # Half a byte for each of 6 blocks in 40 rows, and the table of 256 pairs; the middle code is gone.
    assert stored_bytes(model) - bytes_before == 40 * 3 + 512 - 4
    worse, _ = product(minimums=True, half_scales=True)
    finer(worse, widest=0)
    zeros = next(v for name, v in worse.graph.initializers.items() if name.endswith("_centres"))
    assert zeros.const_value is not None and zeros.const_value.numpy().max() > 0
    zeros.const_value = ir.tensor(np.zeros_like(zeros.const_value.numpy()), name=zeros.name)
    # With zero points elsewhere the weight is still the same, and more is lost.
    np.testing.assert_allclose(in_floats(worse, x), in_floats(model, x), rtol=0, atol=1e-3)
    assert lost(worse, x) > 1.5 * lost(model, x)


def stored_bytes(model: ir.Model) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(
        tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype != ir.DataType.INT64
    )


def test_wide_products_and_named_ones_stay() -> None:
    model, _ = product(32)
    assert finer(model, widest=1.2).count == 0
    assert finer(model, widest=1.3).details["split"] == 1
    model, _ = product(minimums=True)
    skipped = finer(model, skip_nodes=("w*",)).skipped
    assert [*skipped.values()] == ["skip_nodes has 'w*'"]
    coarse, x = product(256, block_size=128)
    error = lost(coarse, x)
    assert finer(coarse, block_size=64).details == {"centred": 0, "split": 1, "block_size": 64}
    assert lost(coarse, x) < error


def test_after_minimums_became_columns() -> None:
    """Rows of 96 and six digits are three blocks of 32 and a part of one, so seven of 16."""
    model, x = product(96, minimums=True, half_scales=True)
    FoldMinimums()(model)
    before, error = in_floats(model, x), lost(model, x)
    # The product that sums blocks stays.
    assert finer(model).details == {"centred": 0, "split": 1, "block_size": 16}
    np.testing.assert_allclose(in_floats(model, x), before, rtol=0, atol=2e-6 * np.abs(before).max())
    assert lost(model, x) < 0.8 * error
    shapes = {name: tuple(v.shape or ()) for name, v in model.graph.initializers.items() if "by_16" in name}
    assert (ROWS, 7, 8) in shapes.values() and (ROWS, 4) in shapes.values()


def test_a_weight_that_is_an_embedding_too_is_stored_once() -> None:
    model = graph(
        '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]> '
        "g (int64[m] i, float[m, 64] x) => (float[m, 64] e, float[m, 40] y) "
        "{ e = Gather(w, i) y = com.microsoft.FusedMatMul<transB = 1>(x, w) }",
        w=np.random.default_rng(2).gamma(2, size=(40, 64)).astype(np.float32),
    )
    QuantizeWeights(bits=4, block_size=32, minimums=True)(model)
    before = stored_bytes(model)
    assert finer(model).details == {"centred": 1, "split": 1, "block_size": 16}
    # Zero points of 2 blocks for the offsets and of 4 for the product, and the table.
    assert stored_bytes(model) == before + 40 * 1 + 40 * 2 + 512
    embedding = next(node for node in model.graph if node.op_type == "GatherBlockQuantized")
    assert embedding.attributes["block_size"].as_int() == 32 and len(embedding.inputs) == 3


def test_it_refuses_and_says_why() -> None:
    for options, why in (
        ({"accuracy_level": 1}, "its accuracy_level is 1: activations are not rounded; expected 4"),
        ({"bits": 2}, "codes of 2 bits; expected 4 or 8"),
    ):
        model, _ = product(**options)
        before = serialized(model)
        changes = finer(model)
        assert ([*changes.skipped.values()], changes.count) == ([why], 0)
        assert serialized(model) == before
    model, _ = product()
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    zeros = ir.Value(name="zeros", shape=ir.Shape([40, 6]), type=ir.TensorType(ir.DataType.FLOAT))
    zeros.const_value = ir.tensor(np.zeros((40, 6), np.float32), name="zeros")
    model.graph.register_initializer(zeros)
    node.replace_input_with(3, zeros)
    assert [*finer(model).skipped.values()] == ["its zero points are not integers"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 48}, "finer_activations: block_size: 48; expected 16, 32, 64, 128"),
        ({"after": "all"}, "finer_activations: after: 'all'; expected norms or any"),
        ({"widest": -1.0}, "finer_activations: widest: -1.0; expected 0"),
        ({"widest": float("nan")}, "finer_activations: widest: nan; expected 0"),
    ],
)
def test_parameters_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        FinerActivations(**options)


@pytest.mark.parametrize("first", ["fast_prompts", "finer_activations"])
def test_a_decoder_and_its_branches(tiny_package: ModelPackage, first: str) -> None:
    """Before or after the branch for prompts, whose weights are made of the same blocks."""
    form = {"bits": 4, "block_size": 32, "minimums": True, "half_scales": True}
    plain = run_passes(tiny_package, make_passes([("quantize_weights", form)]))
    two = run_passes(plain, make_passes([("fast_prompts", {})]))
    specs = [("fast_prompts", {}), ("finer_activations", {"after": "any"})]
    both = run_passes(plain, make_passes(specs if first == "fast_prompts" else specs[::-1]))
    found: dict[str, list[Array]] = {}
    exact = run_passes(plain, make_passes([("set_accuracy_level", {"level": 1})]))
    for name, package in (("exact", exact), ("two", two), ("both", both)):
        with OrtSession(package, threads=1) as session:
            decoder = open_decoder(session)
            steps = [decoder.step(np.arange(2, 14)[None])]
            for start in range(0, 60, 6):
                decoder.reset()
                steps.append(decoder.step(np.arange(start, start + 6)[None]))
            found[name] = [steps[0], np.concatenate(steps[1:])]
    for number, share in ((0, 1.05), (1, 0.85)):
        off = [np.square(found[name][number] - found["exact"][number]).mean() for name in ("two", "both")]
        assert 0 < off[1] < share * off[0], number


@pytest.mark.parametrize("folded", [False, True], ids=["apart", "folded"])
def test_what_follows_norms_is_split(tiny_package: ModelPackage, folded: bool) -> None:
    """Query, key and value, and wider ones where they are not too wide; not what attention and gate give."""
    form = {"bits": 4, "block_size": 32, "minimums": True, "half_scales": True}
    specs = [("quantize_weights", form), *([("fold_minimums", {})] if folded else [])]
    plain = run_passes(tiny_package, make_passes(specs))
    for options, kinds in (
        ({}, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}),
        ({"widest": 1.0}, {"q_proj", "k_proj", "v_proj"}),
        (
            {"after": "any"},
            {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "o_proj", "down_proj"},
        ),
    ):
        model = run_passes(plain, make_passes([("finer_activations", options)])).main.model
        split = set()
        for node in model.graph:
            if node.op_type == "MatMulNBits" and node.attributes["block_size"].as_int() == 16:
                code = node.inputs[1]
                assert code is not None
                name = (code.name or "").split(".weight")[0]
                split.add(name.split(".")[-1])
        assert split == kinds, options
