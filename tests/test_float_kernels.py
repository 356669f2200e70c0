"""Products in float32 by the own kernels: against numpy, the same bits for any rows and threads, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxsmith.errors import ModelFileError
from onnxsmith.own_operators import OWN_DOMAIN
from onnxsmith.package_io import load_package
from onnxsmith.runtime import OrtSession
from packed_matrices import ACTIVATIONS, Array

pytestmark = pytest.mark.usefixtures("kernels")

EPSILON = float(np.finfo(np.float32).eps)


def tiles_of(weight: Array) -> Array:
    """[N, K] to [N / 16, K, 16]."""
    rows, columns = weight.shape
    whole = np.zeros((-(-rows // 16) * 16, columns), np.float32)
    whole[:rows] = weight
    return np.ascontiguousarray(whole.reshape(-1, 16, columns).transpose(0, 2, 1))


def float_model(
    weight: Array, *, bias: Array | None = None, rank: int = 2, **attributes: Any
) -> onnx.ModelProto:
    rows, columns = weight.shape
    inputs = ["A", "B", *(["", "", "bias"] if bias is not None else [])]
    node = helper.make_node(
        "MatMulPacked",
        inputs,
        ["Y"],
        domain=OWN_DOMAIN,
        **({"K": columns, "N": rows, "bits": 32} | attributes),
    )
    axes = [f"axis_{number}" for number in range(rank - 1)]
    weights = {"B": tiles_of(weight)} | ({} if bias is None else {"bias": bias})
    graph = helper.make_graph(
        [node],
        "floats",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [*axes, columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [*axes, "width"])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(OWN_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def opened(directory: Path, model: onnx.ModelProto, threads: int = 1) -> OrtSession:
    path = directory / "floats.onnx"
    onnx.save(model, path)
    return OrtSession(load_package(path), threads=threads)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 200),
    width=st.integers(1, 150),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products(
    rows: int, columns: int, width: int, biased: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((width, columns)).astype(np.float32)
    a = random.standard_normal((rows, columns)).astype(np.float32)
    bias = random.standard_normal(width).astype(np.float32) if biased else None
    with opened(tmp_path_factory.mktemp("floats"), float_model(weight, bias=bias), threads=2) as session:
        got = session.run({"A": a})["Y"]
    expected = a.astype(np.float64) @ weight.T.astype(np.float64)
    allowed = np.abs(a).astype(np.float64) @ np.abs(weight).T * EPSILON * (columns + 2)
    if bias is not None:
        expected, allowed = expected + bias, allowed + np.abs(bias) * EPSILON * 2
    assert got.shape == expected.shape
    assert (np.abs(got - expected) <= allowed + 1e-30).all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    width = 96 if gated else 45
    weight = random.standard_normal((width, 70)).astype(np.float32)
    bias = random.standard_normal(width).astype(np.float32)
    a = random.standard_normal((2, 9, 70)).astype(np.float32)
    attributes = {"activation": activation} | ({} if gated else {"gated": 0})
    with opened(tmp_path, float_model(weight, bias=bias, rank=3, **attributes)) as session:
        got = session.run({"A": a})["Y"]
    plain = a.astype(np.float64) @ weight.T + bias
    function = ACTIVATIONS[activation]
    gate, up = np.split(plain, [width // 2], axis=-1)
    expected = function(gate) * up if gated else function(plain)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("width", [16, 100, 336])
def test_the_same_bits_for_any_rows_and_threads(width: int, tmp_path: Path) -> None:
    random = np.random.default_rng(width)
    weight = random.standard_normal((width, 90)).astype(np.float32)
    a = random.standard_normal((137, 90)).astype(np.float32)
    model = float_model(weight)
    with opened(tmp_path, model) as one, opened(tmp_path, model, threads=2) as two:
        whole = one.run({"A": a})["Y"]
        assert np.array_equal(two.run({"A": a})["Y"], whole)
        start = 0
        for count in (1, 2, 3, 5, 8, 64, 1, 53):
            part = two.run({"A": a[start : start + count]})["Y"]
            assert np.array_equal(part, whole[start : start + count])
            start += count
        assert start == len(a)
        assert one.run({"A": a[:0]})["Y"].shape == (0, width)


def test_a_norm_before_a_product(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    weight = random.standard_normal((40, 48)).astype(np.float32)
    norm = random.uniform(0.5, 2, 48).astype(np.float32)
    x, skip = (random.standard_normal((7, 48)).astype(np.float32) for _ in range(2))
    node = helper.make_node(
        "NormMatMulPacked", ["x", "skip", "norm", "B"], ["y", "sum"], domain=OWN_DOMAIN,
        K=48, N=40, bits=32, epsilon=1e-5,
    )  # fmt: skip
    given_inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 48]) for name in ("x", "skip")
    ]
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "width"]) for name in ("y", "sum")
    ]
    weights = {"B": tiles_of(weight), "norm": norm}
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "norm", given_inputs, results, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(OWN_DOMAIN, 1)]
    with opened(tmp_path, helper.make_model(graph, opset_imports=opsets, ir_version=8)) as session:
        got = session.run({"x": x, "skip": skip})
    total = x + skip
    assert np.array_equal(got["sum"], total)
    wide = total.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * norm
    np.testing.assert_allclose(got["y"], normed @ weight.T, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"N": 60}, "B: got"),
        ({"K": 31}, "expected K = 31 columns"),
        ({"activation": "silu", "N": 40}, "a multiple of 32"),
        ({"bits": 16}, "expected 4, 8 or 32"),
    ],
)
def test_what_does_not_fit_is_an_error(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    weight = np.ones((40, 30), np.float32)
    with (
        pytest.raises(ModelFileError, match=said),
        opened(tmp_path, float_model(weight, **changed)) as session,
    ):
        session.run({"A": np.ones((2, 30), np.float32)})
