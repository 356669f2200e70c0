"""Functions of standard operators for onnxsmith's own, in ONNX Runtime without the library."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxsmith.graph_passes.packed_functions import make_callable
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
