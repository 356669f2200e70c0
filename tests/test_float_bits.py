"""fp4, nf4 and fp8 weights against ONNX Runtime's own kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from generated_graphs import Array, graph, run
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.float_bits import CODE_BOOKS, QuantizeFloats, code_book_blocks, code_book_values
from onnxsmith.package import Component, ModelPackage

RANDOM = np.random.default_rng(0)


def matrix(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model(weight: Array, opset: int = 19) -> ir.Model:
    return graph(
        f'<ir_version: 9, opset_import: ["": {opset}]> g (float[m, k] x) => (float[m, n] y) '
        "{ [one] y = MatMul(x, w) }",
        w=weight,
    )


@pytest.mark.parametrize("book", ["fp4", "nf4"])
def test_the_kernel_reads_the_code_book(book: str) -> None:
    """Every code of the book, put into a weight by hand, is what the kernel multiplies with."""
    values = np.array(CODE_BOOKS[book][1], np.float32)
    weight = np.tile(values, 2).reshape(2, 16).T.copy()
    weight = np.concatenate([weight, weight])
    one = model(weight)
    QuantizeFloats(format=book, block_size=32)(one)  # type: ignore[arg-type]
    got = run(one, {"x": np.eye(32, dtype=np.float32)})["y"]
    np.testing.assert_allclose(got, weight, atol=1e-6)


@pytest.mark.parametrize("book", ["fp4", "nf4"])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_four_bits(book: str, block_size: int) -> None:
    weight = matrix(192, 40)
    one = model(weight)
    outcome = QuantizeFloats(format=book, block_size=block_size)(one)  # type: ignore[arg-type]
    x = matrix(5, 192)
    got = run(one, {"x": x})["y"]
    size = outcome.changes.details["layers"]["w"]["block_size"]
    assert size == min(block_size, 64)
    rows = np.ascontiguousarray(weight.T)
    rounded = code_book_values(*code_book_blocks(rows, book, size), book, size).reshape(rows.shape)
    np.testing.assert_allclose(got, x @ rounded.T, rtol=1e-4, atol=1e-4)
    assert np.abs(got - x @ weight).max() > 1e-2
    entry = outcome.changes.details["layers"]["w"]
    assert entry["weight_error"] == pytest.approx(
        np.square(rounded - rows).sum() / np.square(rows).sum(), rel=1e-3
    )
    # nf4 is made for normal numbers.
    assert entry["weight_error"] < (0.02 if book == "nf4" else 0.03)


@pytest.mark.parametrize(("form", "precision"), [("nf4", "int4"), ("fp8", "int8")])
def test_its_precision_is_that_of_quantized_weights(form: str, precision: str) -> None:
    one = model(matrix(64, 8))
    package = ModelPackage({"model": Component(one)})
    assert package.precision == "float32"
    QuantizeFloats(format=form)(one)  # type: ignore[arg-type]
    assert package.precision == precision


def test_eight_bits() -> None:
    weight = matrix(50, 24) * np.geomspace(1e-3, 10, 24, dtype=np.float32)
    one = model(weight)
    outcome = QuantizeFloats(format="fp8")(one)
    onnx.checker.check_model(ir.to_proto(one))
    x = matrix(5, 50)
    want, got = x @ weight, run(one, {"x": x})["y"]
    assert 1e-4 < float(np.square(got - want).sum(0).max() / np.square(want).sum(0).max()) < 2e-3
    assert 0 < outcome.changes.details["layers"]["w"]["weight_error"] < 1e-3
    assert one.graph.initializers["w_fp8"].dtype == ir.DataType.FLOAT8E4M3FN


@pytest.mark.parametrize(
    ("options", "weight", "opset", "message"),
    [
        ({"format": "fp8"}, (32, 8), 18, "one: DequantizeLinear takes fp8 from opset 19 on"),
        ({"format": "nf4"}, (40, 8), 19, "one: rows of 40 are no multiple of 16"),
        ({"skip_nodes": ("one",)}, (32, 8), 19, "one: skip_nodes has 'one'"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], weight: tuple[int, int], opset: int, message: str
) -> None:
    with pytest.raises(PreconditionError, match=message):
        QuantizeFloats(**options)(model(matrix(*weight), opset))


def test_embeddings_stay_and_say_why() -> None:
    one = graph(
        '<ir_version: 9, opset_import: ["": 19]> g (int64[s] ids) => (float[s, n] y) '
        "{ [embed] x = Gather(table, ids) [head] y = MatMul(x, w) }",
        table=matrix(7, 32), w=matrix(32, 8),
    )  # fmt: skip
    changes = QuantizeFloats()(one).changes
    assert list(changes.details["layers"]) == ["w"]
    assert changes.skipped["embed"].startswith("it is an embedding: no operator looks up rows in nf4")
    with pytest.raises(BadInputError, match="format: 'fp6'; expected fp4, nf4 or fp8"):
        QuantizeFloats(format="fp6")  # type: ignore[arg-type]
