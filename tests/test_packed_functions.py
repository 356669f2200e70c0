"""Functions of standard operators for onnxsmith's own, in ONNX Runtime without the library."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from generated_graphs import graph
from onnxsmith.graph_passes.contract import GraphPass
from onnxsmith.graph_passes.float_kernels import UseFloatKernels
from onnxsmith.graph_passes.packed_functions import make_callable
from onnxsmith.graph_passes.packed_kernels import UsePackedKernels
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.own_operators import OWN_DOMAIN
from packed_matrices import OFFSETS, Array, gather_node, model_of, random_matrix


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_counted_from_the_end_too(bits: int, offsets: str) -> None:
    # 37 rows: the last tile is filled up.
    matrix = random_matrix(np.random.default_rng(0), 37, 64, bits=bits, offsets=offsets)
    model = ir.from_proto(model_of(gather_node(matrix), matrix.inputs(), {"ids": ["rows"]}))
    assert make_callable(model) == 1
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options)

    def run(*ids: int) -> Array:
        return np.asarray(session.run(None, {"ids": np.array(ids)})[0])

    np.testing.assert_allclose(run(0, 36, -1, -37), matrix.weight()[[0, 36, 36, 0]], rtol=1e-6, atol=1e-6)
    for strange in (37, -38, 47):
        with pytest.raises(Exception, match="out of data bounds"):
            run(strange)


def chain(opset: int) -> ir.Model:
    """Rows of a table, and two products of them with nothing between."""
    random = np.random.default_rng(1)
    shapes = {"table": (41, 64), "first": (64, 96), "second": (96, 48)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (int64[b, s] ids) => (float[b, s, 48] y) {{
      x = Gather(table, ids)
      z = MatMul(x, first)
      y = MatMul(z, second)
    }}"""
    return graph(text, **arrays)


def answer(model: ir.Model) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return np.asarray(session.run(None, {"ids": np.array([[0, 40, 7], [16, 15, 3]])})[0])


@pytest.mark.parametrize("name", ["blocks", "floats"])
def test_a_product_of_what_another_kernel_computes(name: str) -> None:
    model = chain(17)
    one: GraphPass = UseFloatKernels()
    expected = ["Gather", "MatMulPacked", "MatMulPacked"]
    if name == "blocks":
        QuantizeWeights(bits=8, block_size=32, embedding_block_size=32)(model)
        one, expected = UsePackedKernels(), ["GatherPacked", *expected[1:]]
    before = answer(model)
    one(model)
    assert [node.op_type for node in model.graph] == expected
    np.testing.assert_allclose(answer(model), before, rtol=0, atol=2e-2 * np.abs(before).max())


@pytest.mark.parametrize("opset", [11, 12, 13])
def test_older_operator_sets_keep_what_they_have(opset: int) -> None:
    for one in (UsePackedKernels(), UseFloatKernels()):
        model = chain(opset)
        if isinstance(one, UsePackedKernels):
            QuantizeWeights(bits=8, block_size=32, embedding_block_size=32)(model)
        before = answer(model)
        changes = one(model).changes
        own = [node.op_type for node in model.graph if node.domain == OWN_DOMAIN]
        assert bool(own) == bool(changes.count) == (opset >= 13)
        if opset < 13:
            assert "expected 13 or later" in changes.skipped["graph"]
        np.testing.assert_allclose(answer(model), before, rtol=0, atol=2e-2 * np.abs(before).max())
