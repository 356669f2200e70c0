"""Large columns in float: the same weights, half the loss of rounding, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from generated_graphs import Array, graph, serialized
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.block_repairs import SetAccuracyLevel
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import Changes, PreconditionError
from onnxsmith.graph_passes.finer_activations import FinerActivations
from onnxsmith.graph_passes.float_columns import FloatColumns
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import save_package
from onnxsmith.pipeline.bisecting import bisect_models
from onnxsmith.runtime import OrtSession
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.samples import decoder_feeds
from sample_activations import activations_on

LARGE = (70, 5)
COLUMNS = 96
RMS = "SimplifiedLayerNormalization<axis = -1>(x, gain)"
WHOLE = "LayerNormalization<axis = -1>(x, gain, shift)"


def samples(count: int = 3) -> list[Array]:
    random = np.random.default_rng(4)
    return [random.standard_normal((1, 40, COLUMNS)).astype(np.float32) for _ in range(count)]


def quantized(norm: str = RMS, more: str = "", **options: Any) -> ir.Model:
    """Two products with a norm's result, whose columns 70 and 5 are large."""
    random = np.random.default_rng(2)
    gain = random.uniform(0.5, 1.5, COLUMNS).astype(np.float32)
    gain[list(LARGE)] *= [40, 25]
    outputs = f"(float[1, s, 64] y, float[1, s, 48] z{', float[1, s, c] k' if more else ''})"
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[1, s, {COLUMNS}] x) => {outputs} '
        f"<float[1, s, {COLUMNS}] h> {{ h = {norm} y = MatMul(h, w) z = MatMul(h, v) {more} }}",
        gain=gain,
        w=random.gamma(2, size=(COLUMNS, 64)).astype(np.float32),
        v=random.standard_normal((COLUMNS, 48)).astype(np.float32),
        **({"shift": random.standard_normal(COLUMNS).astype(np.float32)} if "shift" in norm else {}),
    )
    QuantizeWeights(**{"bits": 4, "block_size": 32, "minimums": True, **options})(model)
    in_context(model, PassContext(activations=activations_on([{"x": x} for x in samples(2)])))
    return model


def run(model: ir.Model, x: Array) -> list[Array]:
    """What a graph computes; constants are folded, as computed scales must be."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(["y", "z"], {"x": x})
    return found


def in_floats(model: ir.Model, x: Array) -> list[Array]:
    copied = model.clone()
    SetAccuracyLevel(level=1)(copied)
    return run(copied, x)


def lost(model: ir.Model, x: Array) -> float:
    """The squared error of rounding activations."""
    pairs = zip(run(model, x), in_floats(model, x), strict=True)
    return float(sum(np.square(got - want).sum() for got, want in pairs))


def taken_out(model: ir.Model, **options: Any) -> Changes:
    return FloatColumns(**options)(model).changes


FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"half_scales": True},
    {"bits": 8},
    {"minimums": False, "symmetric": True},
    {"minimums": False, "bits": 8, "symmetric": True, "half_scales": True},
    {"minimums": False},
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)) or "minimums")
@pytest.mark.parametrize("norm", [RMS, WHOLE], ids=["rms", "mean"])
@pytest.mark.parametrize("finer", [False, True], ids=["", "finer"])
def test_the_largest_columns_are_found_and_the_product_stays(
    form: dict[str, Any], norm: str, finer: bool
) -> None:
    model, x = quantized(norm, **form), samples()[-1]
    if finer:
        FinerActivations()(model)
    before, error = in_floats(model, x), lost(model, x)
    changes = taken_out(model)
    assert changes.details == {"norms": 1, "products": 2, "columns": {"h": list(LARGE)}}
    for got, want in zip(in_floats(model, x), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())
    # A column of 40 and one of 25 beside columns of about 2.
    assert 0 < lost(model, x) < 0.05 * error
    # The control: without what was added in float, the columns are missing.
    for value in list(model.graph.initializers.values()):
        if "_missing" in (value.name or "") and value.const_value is not None:
            value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=value.name)
    assert np.abs(run(model, x)[0] - before[0]).max() > 0.3 * np.abs(before[0]).max()


def test_one_column_and_products_with_minimums_need_no_node_more() -> None:
    model, x = quantized(), samples()[-1]
    count, error = len(model.graph), lost(model, x)
    assert taken_out(model, columns=1, samples=1).details["columns"] == {"h": [70]}
    # Reshape and ReduceSum are one product; three constants are joined where the model is loaded.
    assert len(model.graph) == count - 1 + 3
    assert lost(model, x) < 0.6 * error


def test_it_refuses_and_says_why() -> None:
    read = quantized(more="k = Identity(h)")
    open_gain = quantized()
    open_gain.graph.inputs.append(open_gain.graph.initializers["gain"])
    summed = quantized()
    sums = next(node for node in summed.graph if node.op_type == "ReduceSum").outputs[0]
    summed.graph.outputs.append(sums)
    grouped = quantized(minimums=False, symmetric=True)
    node = next(node for node in grouped.graph if node.op_type == "MatMulNBits")
    node.resize_inputs(6)
    bias = ir.Value(name="bias", shape=ir.Shape([64]), type=ir.TensorType(ir.DataType.FLOAT))
    bias.const_value = ir.tensor(np.zeros(64, np.float32), name="bias")
    grouped.graph.register_initializer(bias)
    node.replace_input_with(5, bias)
    for model, options, why in (
        (read, {}, "something else reads what it gives"),
        (open_gain, {}, "its gain or shift is not a float32 constant"),
        (summed, {}, "something else reads sums of what it gives"),
        (grouped, {}, "y_nbits has a group index or a bias"),
        (quantized(), {"columns": 96}, "it has 96 columns"),
    ):
        before = serialized(model)
        changes = taken_out(model, **options)
        assert ([*changes.skipped.values()], changes.count) == ([why], 0)
        assert serialized(model) == before
    assert taken_out(quantized(accuracy_level=1)).count == 0
    bare = quantized()
    in_context(bare, PassContext())
    with pytest.raises(PreconditionError, match="finding large columns without calibration data"):
        taken_out(bare)
    for name in ("columns", "samples"):
        with pytest.raises(BadInputError, match=f"float_columns: {name}: 0; expected at least 1"):
            FloatColumns(**{name: 0})


def test_a_second_run_takes_what_is_largest_then() -> None:
    """Sums with picked columns are not plain sums any more, so products with minimums stay as they are."""
    model = quantized()
    taken_out(model)
    before = serialized(model)
    changes = taken_out(model)
    assert ([*changes.skipped.values()], changes.count) == (["something else reads what it gives"], 0)
    assert serialized(model) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_decoder_loses_less(tiny_package: ModelPackage, bits: int) -> None:
    """Prompts and tokens, norms with and without a residual, the head, which has no minimums with 8 bits."""
    form = {
        "bits": bits,
        "block_size": 16,
        "half_scales": True,
        "symmetric": bits == 8,
        "minimums": bits == 4,
    }
    plain = run_passes(tiny_package, make_passes([("quantize_weights", form)]))
    ids = [np.arange(begin, begin + 12)[None] for begin in range(0, 48, 12)]
    with OrtSession(plain, threads=1) as session:
        batches = [decoder_feeds(session.inputs, one) for one in ids]
    context = PassContext(activations=activations_on(batches))
    fewer = run_passes(plain, make_passes([("float_columns", {"columns": 4})]), context=context)
    assert fewer.steps[-1].details["norms"] == 2 * 2 + 1
    exact = run_passes(plain, make_passes([("set_accuracy_level", {"level": 1})]))
    found: dict[str, Array] = {}
    for name, package in (("exact", exact), ("plain", plain), ("fewer", fewer)):
        with OrtSession(package, threads=1) as session:
            decoder = open_decoder(session)
            steps = []
            for one in ids:
                decoder.reset()
                steps += [decoder.step(one), decoder.step(one[:, :1])]
            found[name] = np.concatenate(steps, axis=1)
    off = [np.square(found[name] - found["exact"]).mean() for name in ("plain", "fewer")]
    assert 0 < off[1] < (0.9 if bits == 4 else 0.95) * off[0]


def test_columns_in_float_are_no_fault(
    tiny_loaded: Any, tiny_program: Any, tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    """Columns of norms' results are smaller than the reference's, and what they lack is added to products."""
    from onnxsmith.exporters import export

    package = run_passes(export(tiny_loaded, tiny_program), make_passes(PRESETS["cpu-int4"]))
    with OrtSession(package, threads=1) as session:
        inputs = session.inputs
    context = PassContext(activations=activations_on([decoder_feeds(inputs, np.arange(2, 14)[None])]))
    specs = [("finer_activations", {"widest": 0.0}), ("float_columns", {})]
    package = run_passes(package, make_passes(specs), context=context)
    assert package.steps[-1].details["norms"] == 5
    (tmp_path / "columns").mkdir()
    save_package(package.derive(), tmp_path / "columns")
    result = bisect_models(str(tiny_artifact_dir), tmp_path / "columns", samples=3, threads=1)
    assert result.passed, result.verdict
    assert not any(blame.detail for blame in result.blamed)
    # A fault of the weight is still found beside them.
    path = tmp_path / "columns" / "model.onnx"
    model = onnx.load(path)
    codes = next(
        one for one in model.graph.initializer if one.name.endswith("layers.0.mlp.down_proj.weight_q4")
    )
    changed = onnx.numpy_helper.to_array(codes).copy()
    changed.reshape(-1)[16:32] ^= 255
    codes.CopyFrom(onnx.numpy_helper.from_array(changed, codes.name))
    onnx.save(model, path)
    [user] = [node.name for node in model.graph.node if codes.name in node.input]
    result = bisect_models(str(tiny_artifact_dir), tmp_path / "columns", samples=2, threads=1)
    assert [blame.node for blame in result.suspects] == [user], result.verdict
