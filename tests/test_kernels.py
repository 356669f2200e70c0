"""Operators of onnxsmith against numpy: all kinds of weights, odd sizes, the same bits everywhere, errors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxsmith.errors import ModelFileError
from onnxsmith.package_io import load_package
from onnxsmith.runtime import OrtSession
from packed_matrices import (
    ACTIVATIONS,
    OFFSETS,
    Array,
    Matrix,
    gather_node,
    matmul_model,
    matmul_node,
    model_of,
    norm_node,
    product,
    random_matrix,
    rounded,
    save,
)

pytestmark = pytest.mark.usefixtures("kernels")

HERE = Path(__file__).parent
INSTRUCTION_SETS = ("generic", "avx2", "avxvnni", "avx512vnni")
EPSILON = float(np.finfo(np.float32).eps)


def open_session(directory: Path, model: Any, *, threads: int = 1) -> OrtSession:
    return OrtSession(load_package(save(model, directory / "packed.onnx")), threads=threads)


def most_error(a: Array, matrix: Matrix) -> Array:
    """What float32 may lose of each result: half a unit for each block, of what is added up."""
    scales = np.repeat(matrix.scales.astype(np.float64), matrix.block_size, axis=1)
    largest = scales * matrix.codes
    if matrix.offsets is not None:
        offsets = np.abs(np.repeat(matrix.offsets.astype(np.float64), matrix.block_size, axis=1))
        largest = largest + (scales * offsets if matrix.offsets.dtype == np.uint8 else offsets)
    else:
        largest = largest + scales * 2 ** (matrix.bits - 1)
    blocks = matrix.shape[1] // matrix.unit
    return np.asarray(np.abs(rounded(a, matrix.unit)) @ largest.T * EPSILON * (blocks + 4))


def assert_product(directory: Path, matrix: Matrix, a: Array, *, bias: Array | None = None) -> None:
    with open_session(directory, matmul_model(matrix, bias=bias, rank=a.ndim)) as session:
        got = session.run({"A": a})["Y"]
    expected = product(a, matrix, bias)
    assert got.dtype == np.float32 and got.shape == expected.shape
    allowed = most_error(a, matrix) + (0 if bias is None else np.abs(bias) * 2 * EPSILON) + 1e-30
    assert (np.abs(got - expected) <= allowed).all(), np.max(np.abs(got - expected) / allowed)


@pytest.mark.parametrize("scales", [np.float16, np.float32])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_products(bits: int, block_size: int, offsets: str, scales: type[Any], tmp_path: Path) -> None:
    random = np.random.default_rng(bits + block_size)
    matrix = random_matrix(
        random, 40, 2 * max(block_size, 32), bits=bits, block_size=block_size, offsets=offsets, scales=scales
    )
    a = random.standard_normal((11, matrix.shape[1])).astype(np.float32)
    assert_product(tmp_path, matrix, a)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11, 70])
@pytest.mark.parametrize("activation_block", [16, 64, 128])
@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_activations(
    bits: int, block_size: int, activation_block: int, rows: int, tmp_path: Path
) -> None:
    random = np.random.default_rng(bits + block_size + rows)
    matrix = random_matrix(random, 72, 256, bits=bits, block_size=block_size, offsets=OFFSETS[rows % 3])
    matrix = dataclasses.replace(matrix, activation_block=activation_block)
    bias = random.standard_normal(72).astype(np.float32)
    a = random.standard_normal((rows, 256)).astype(np.float32)
    assert_product(tmp_path, matrix, a, bias=bias)
    with open_session(tmp_path, matmul_model(matrix, bias=bias)) as session:
        whole = session.run({"A": a})["Y"]
        for row in range(0, rows, 13):
            np.testing.assert_array_equal(session.run({"A": a[row : row + 1]})["Y"][0], whole[row])


def test_a_wrong_scale_is_seen(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    matrix = random_matrix(random, 40, 64)
    a = random.standard_normal((3, 64)).astype(np.float32)
    scales = matrix.scales.copy()
    scales[17, 1] *= np.float16(1.01)
    wrong = dataclasses.replace(matrix, scales=scales)
    with open_session(tmp_path, matmul_model(wrong)) as session:
        error = np.abs(session.run({"A": a})["Y"] - product(a, matrix))
    assert (error > most_error(a, matrix)).any(axis=0).tolist() == [n == 17 for n in range(40)]


def test_minimums_may_have_another_type_than_scales(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    matrix = random_matrix(random, 32, 64, offsets="minimums")
    assert matrix.offsets is not None
    a = random.standard_normal((2, 64)).astype(np.float32)
    for scales, offsets in ((np.float16, np.float32), (np.float32, np.float16)):
        mixed = dataclasses.replace(
            matrix, scales=matrix.scales.astype(scales), offsets=matrix.offsets.astype(offsets)
        )
        assert_product(tmp_path, mixed, a)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 3), (2, 0), (2, 2, 3), (65,), (200,)])
def test_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    matrix = random_matrix(random, 50, 96, offsets="zero_points")
    bias = random.standard_normal(50).astype(np.float32)
    assert_product(tmp_path, matrix, random.standard_normal((*shape, 96)).astype(np.float32), bias=bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_gates(bits: int, activation: str, with_bias: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    matrix = random_matrix(random, 96, 128, bits=bits)
    bias = random.standard_normal(96).astype(np.float32) * 3 if with_bias else None
    a = random.standard_normal((9, 128)).astype(np.float32) * np.float32(4)
    with open_session(tmp_path, matmul_model(matrix, bias=bias, activation=activation)) as session:
        got = session.run({"A": a})["Y"]
    expected = product(a, matrix, bias, activation)
    assert got.shape == expected.shape == (9, 48)
    plain = product(a, matrix, bias)
    # Far from zero both sides of each gate are met.
    assert plain[:, :48].min() < -4 and plain[:, :48].max() > 4
    scale = np.abs(plain).max() * np.maximum(np.abs(plain[:, 48:]), 1)
    assert (np.abs(got - expected) <= 2e-6 * scale).all()


@pytest.mark.parametrize("scales", [np.float16, np.float32])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_exact(bits: int, offsets: str, scales: type[Any], tmp_path: Path) -> None:
    matrix = random_matrix(
        np.random.default_rng(4), 37, 96, bits=bits, block_size=16, offsets=offsets, scales=scales
    )
    ids = np.array([[0, 36, 5], [-1, -37, 5]], np.int64)
    model = model_of(gather_node(matrix), matrix.inputs(), {"ids": ["rows", "columns"]})
    with open_session(tmp_path, model) as session:
        got = session.run({"ids": ids})["Y"]
        assert session.run({"ids": ids[:, :0]})["Y"].shape == (2, 0, 96)
    steps = np.repeat(matrix.scales.astype(np.float32), 16, axis=1)
    if matrix.offsets is None:
        rows = steps * (matrix.codes.astype(np.float32) - 2 ** (bits - 1))
    else:
        offset = np.repeat(matrix.offsets.astype(np.float32), 16, axis=1)
        codes = matrix.codes.astype(np.float32)
        rows = steps * (codes - offset) if offsets == "zero_points" else steps * codes + offset
    np.testing.assert_array_equal(got, rows[ids])


def norm_model(matrix: Matrix, norm: Array, *, skip: bool, epsilon: float = 1e-5) -> Any:
    shapes: dict[str, Any] = {"A": ["rows", matrix.shape[1]]}
    if skip:
        shapes["skip"] = shapes["A"]
    node = norm_node(matrix, skip=skip, epsilon=epsilon)
    model = model_of(node, matrix.inputs() | {"norm": norm}, shapes)
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, shapes["A"]))
    return model


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS)
def test_norms_before_products(offsets: str, skip: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    matrix = random_matrix(random, 48, 160, offsets=offsets)
    norm = random.uniform(0.5, 2, 160).astype(np.float32)
    a, b = random.standard_normal((2, 7, 160)).astype(np.float32)
    a[3] = b[3] = 0
    feeds = {"A": a, "skip": b} if skip else {"A": a}
    with open_session(tmp_path, norm_model(matrix, norm, skip=skip, epsilon=0.25)) as session:
        got = session.run(feeds)
        alone = session.run({name: array[2:3] for name, array in feeds.items()})
    total = a + b if skip else a
    np.testing.assert_array_equal(got["sum"], total)
    np.testing.assert_array_equal(got["Y"][2:3], alone["Y"])
    exact = total.astype(np.float64)
    rows = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 0.25) * norm
    # A digit that is lost in a norm may turn a rounding; that is one step of one number.
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    allowed = most_error(rows.astype(np.float32), matrix) * 4 + 3 * step * np.abs(matrix.weight()).max()
    expected = product(rows.astype(np.float32), matrix)
    assert (np.abs(got["Y"] - expected) <= allowed + 1e-30).all()
    assert np.abs(expected).max() > 20 * allowed.max()


@pytest.mark.parametrize("shape", [(1, 3, 64), (3, 64), (1, 64), (64,)])
def test_a_skip_is_repeated_for_each_of_a_batch(shape: tuple[int, ...], tmp_path: Path) -> None:
    random = np.random.default_rng(12)
    matrix = random_matrix(random, 48, 64)
    norm = random.uniform(0.5, 2, 64).astype(np.float32)
    a = random.standard_normal((2, 3, 64)).astype(np.float32)
    skip = random.standard_normal(shape).astype(np.float32)

    def run(given: Array) -> dict[str, Array]:
        node = norm_node(matrix, skip=True)
        shapes = {"A": ["b", "s", 64], "skip": [f"axis{n}" for n in range(given.ndim)]}
        model = model_of(node, matrix.inputs() | {"norm": norm}, shapes)
        model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, shapes["A"]))
        with open_session(tmp_path, model) as session:
            return session.run({"A": a, "skip": given})

    got, whole = run(skip), run(np.broadcast_to(skip, a.shape).copy())
    np.testing.assert_array_equal(got["sum"], a + skip)
    np.testing.assert_array_equal(got["Y"], whole["Y"])
    with pytest.raises(ModelFileError, match="NormMatMulPacked, skip: got"):
        run(np.zeros((2, 1, 64), np.float32))


SUBNORMAL = """
import sys, dataclasses, numpy as np, onnxruntime as ort
sys.path.insert(0, {here!r})
from onnxsmith.runtime.kernel_library import register_kernels
from packed_matrices import gather_node, model_of, random_matrix
matrix = random_matrix(np.random.default_rng(13), 16, 64)
matrix = dataclasses.replace(matrix, scales=np.full_like(matrix.scales, np.float16(3e-6)))
options = ort.SessionOptions()
options.add_session_config_entry("session.set_denormal_as_zero", "1")
register_kernels(options)
model = model_of(gather_node(matrix), matrix.inputs(), {{"ids": ["rows"]}})
session = ort.InferenceSession(model.SerializeToString(), options)
got = session.run(None, {{"ids": np.arange(16)}})[0]
assert np.array_equal(got, matrix.weight().astype(np.float32)), got
"""


def test_small_scales_hold_where_subnormal_numbers_are_taken_for_zero() -> None:
    # Which of the two it is, the first session of a process says.
    program = SUBNORMAL.format(here=str(HERE))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@given(
    rows=st.integers(1, 80),
    blocks=st.integers(1, 6),
    count=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    offsets=st.sampled_from(OFFSETS),
    threads=st.integers(1, 3),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_size(
    rows: int,
    blocks: int,
    count: int,
    bits: int,
    block_size: int,
    offsets: str,
    threads: int,
    exponent: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    random = np.random.default_rng(seed)
    columns = blocks * max(block_size, 32)
    matrix = random_matrix(random, rows, columns, bits=bits, block_size=block_size, offsets=offsets)
    a = np.ldexp(random.standard_normal((count, columns)), exponent).astype(np.float32)
    a[random.random(count) < 0.1] = 0
    with open_session(tmp_path_factory.mktemp("any"), matmul_model(matrix), threads=threads) as session:
        got = session.run({"A": a})["Y"]
        # A row does not depend on those beside it.
        alone = np.concatenate([session.run({"A": row[None]})["Y"] for row in a])
    np.testing.assert_array_equal(got, alone)
    assert (np.abs(got - product(a, matrix)) <= most_error(a, matrix) + 1e-30).all()


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_threads_change_nothing(activation: str, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    matrix = random_matrix(random, 1024, 576, offsets="minimums")
    a = random.standard_normal((130, 576)).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 5):
        with open_session(tmp_path, matmul_model(matrix, activation=activation), threads=threads) as session:
            results += [session.run({"A": a})["Y"], session.run({"A": a[:1]})["Y"]]
    for many, one in zip(results[::2], results[1::2], strict=True):
        np.testing.assert_array_equal(many, results[0])
        np.testing.assert_array_equal(one, results[0][:1])


def test_numbers_that_are_none_stay_in_their_row(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    matrix = random_matrix(random, 32, 64)
    a = random.standard_normal((4, 64)).astype(np.float32)
    a[1, 3], a[2, 5] = np.inf, np.nan
    with open_session(tmp_path, matmul_model(matrix)) as session:
        got = session.run({"A": a})["Y"]
    assert not np.isfinite(got[1:3]).any()
    assert (np.abs(got[[0, 3]] - product(a[[0, 3]], matrix)) <= most_error(a[[0, 3]], matrix)).all()


CASES = """
import sys, numpy as np
sys.path.insert(0, {here!r})
from pathlib import Path
from onnxsmith.package_io import load_package
from onnxsmith.runtime import OrtSession
from onnxsmith.runtime.kernel_library import instruction_set, kernel_library
from packed_matrices import ACTIVATIONS, OFFSETS, matmul_model, random_matrix, save
from test_kernels import norm_model
directory = Path(sys.argv[1])
print(instruction_set(kernel_library()))
random = np.random.default_rng(7)
results = {{}}
for bits in (4, 8):
    for offsets in OFFSETS:
        for block_size in (16, 32, 128):
            for scales in (np.float16, np.float32):
                for activation in ("none", *(ACTIVATIONS if block_size == 32 else ())):
                    matrix = random_matrix(random, 96, 256, bits=bits, block_size=block_size,
                                           offsets=offsets, scales=scales)
                    # All codes of 8 bits at their ends: sums of products in 16 bits would overflow.
                    matrix.codes[:40] = 2**bits - 1
                    bias = random.standard_normal(96).astype(np.float32)
                    a = random.standard_normal((13, 256)).astype(np.float32)
                    a[5] = 1
                    a[6] = 0
                    a[7] = -1e-38
                    a[8] *= np.float32(1e20)
                    path = save(matmul_model(matrix, bias=bias, activation=activation), directory / "m.onnx")
                    with OrtSession(load_package(path), threads=1) as session:
                        key = f"{{bits}} {{offsets}} {{block_size}} {{np.dtype(scales)}} {{activation}}"
                        results[key] = session.run({{"A": a}})["Y"]
                norm = random.uniform(0.5, 2, 256).astype(np.float32)
                path = save(norm_model(matrix, norm, skip=True), directory / "m.onnx")
                with OrtSession(load_package(path), threads=1) as session:
                    for name, array in session.run({{"A": a, "skip": a[::-1].copy()}}).items():
                        results[f"{{key}} {{name}} after a norm"] = array
np.savez(directory / "results.npz", **results)
"""


def results_of(isa: str, directory: Path) -> dict[str, Array]:
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CASES.format(here=str(HERE)), str(directory)],
        env={**os.environ, "ONNXSMITH_KERNELS_ISA": isa},
        capture_output=True,
        check=False,
        text=True,
    )
    if "ONNXSMITH_KERNELS_ISA" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
    with np.load(directory / "results.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS[1:])
def test_every_instruction_set_gives_the_same_bits(isa: str, tmp_path: Path) -> None:
    theirs = results_of(isa, tmp_path / isa)
    plain = results_of("generic", tmp_path / "generic")
    assert len(plain) > 40 and plain.keys() == theirs.keys()
    for name, array in plain.items():
        assert array.any(), name
        np.testing.assert_array_equal(theirs[name].view(np.int32), array.view(np.int32), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS[:-1])
def test_attention_holds_on_every_instruction_set(isa: str) -> None:
    """Its own tests took the fastest one that is here."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_own_attention.py"],
        env={**os.environ, "ONNXSMITH_KERNELS_ISA": isa}, cwd=HERE,
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"bits": 3}, "bits: got 3, expected 4, 8 or 32"),
        ({"block_size": 24}, "block_size: got 24, expected"),
        ({"block_size": 0}, "block_size: got 0, expected"),
        ({"block_size": -32}, "block_size: got -32, expected"),
        ({"K": 48}, "K: got 48, expected a multiple of 32"),
        ({"K": -64}, "K: got -64, expected at least 1"),
        ({"K": 128}, r"A: got \[2, 64\], expected K = 128 columns"),
        ({"N": 0}, "N: got 0, expected at least 1"),
        ({"N": 48}, r"B: got \[2, 8, 64\], expected \[3, 8, 64\]"),
        ({"N": 2**62}, "N: got .*less than"),
        ({"K": 2**62}, "K: got .*less than"),
        ({"block_size": 64}, r"scales: got \[2, 2, 16\], expected \[2, 1, 16\]"),
        ({"activation_block": 48}, "activation_block: got 48, expected 16, 32, 64 or 128"),
        (
            {"activation_block": 64, "block_size": 96},
            "block_size: got 96, expected a multiple of the activation",
        ),
        (
            {"activation_block": 128, "block_size": 96},
            "block_size: got 96, expected 16, 32, 64, or a multiple",
        ),
        ({"activation": "relu"}, "activation: got 'relu', expected none, silu, gelu or gelu_tanh"),
    ],
)
def test_wrong_attributes_of_a_product(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    matrix = random_matrix(np.random.default_rng(8), 32, 64)
    model = model_of(matmul_node(matrix, **changed), matrix.inputs(), {"A": ["rows", "K"]})
    with (
        pytest.raises(ModelFileError, match=f"MatMulPacked, .*{reason}"),
        open_session(tmp_path, model) as session,
    ):
        session.run({"A": np.ones((2, 64), np.float32)})


@pytest.mark.parametrize("missing", ["K", "N", "bits", "block_size"])
def test_missing_attributes(missing: str, tmp_path: Path) -> None:
    matrix = random_matrix(np.random.default_rng(8), 32, 64)
    node = matmul_node(matrix)
    kept = [attribute for attribute in node.attribute if attribute.name != missing]
    del node.attribute[:]
    node.attribute.extend(kept)
    with pytest.raises(ModelFileError, match=f"attribute {missing}|block_size: got 0"):
        open_session(tmp_path, model_of(node, matrix.inputs(), {"A": ["rows", 64]}))


def test_what_onnx_runtime_says_is_passed_on(tmp_path: Path) -> None:
    matrix = random_matrix(np.random.default_rng(8), 32, 64)
    model = model_of(matmul_node(matrix, K="64"), matrix.inputs(), {"A": ["rows", 64]})
    with pytest.raises(ModelFileError, match=r"refuses the attribute K: \S+"):
        open_session(tmp_path, model)


def test_half_a_gate(tmp_path: Path) -> None:
    matrix = random_matrix(np.random.default_rng(8), 48, 64)
    with pytest.raises(
        ModelFileError, match="N with an activation that is gated: got 48, expected a multiple of 32"
    ):
        open_session(tmp_path, matmul_model(matrix, activation="silu"))


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("B", np.zeros((2, 8, 32), np.uint8), r"B: got \[2, 8, 32\]"),
        ("scales", np.ones((2, 16, 2), np.float16), r"scales: got \[2, 16, 2\]"),
        ("scales", np.ones((2, 2, 16), np.int32), "scales: got element type 6, expected float32 or float16"),
        ("offsets", np.ones((1, 2, 16), np.uint8), r"offsets: got \[1, 2, 16\]"),
        ("offsets", np.ones((2, 2, 16), np.int64), "offsets: got element type 7"),
        ("bias", np.ones(33, np.float32), r"bias: got \[33\], expected \[32\]"),
    ],
)
def test_wrong_inputs(name: str, array: Array, reason: str, tmp_path: Path) -> None:
    matrix = random_matrix(np.random.default_rng(9), 32, 64, offsets="zero_points")
    bias = np.zeros(32, np.float32)
    weights = matrix.inputs() | {"bias": bias, name: array}
    model = model_of(matmul_node(matrix, bias=True), weights, {"A": ["rows", 64]})
    with (
        pytest.raises(ModelFileError, match=f"MatMulPacked, {reason}"),
        open_session(tmp_path, model) as session,
    ):
        session.run({"A": np.ones((2, 64), np.float32)})


@pytest.mark.parametrize("shape", [(2, 32), (2, 128), (64, 1), ()])
def test_activations_of_another_width(shape: tuple[int, ...], tmp_path: Path) -> None:
    matrix = random_matrix(np.random.default_rng(9), 32, 64)
    model = model_of(matmul_node(matrix), matrix.inputs(), {"A": [f"axis{n}" for n in range(len(shape))]})
    with (
        open_session(tmp_path, model) as session,
        pytest.raises(ModelFileError, match=r"MatMulPacked, A: got \[.*expected K = 64 columns"),
    ):
        session.run({"A": np.ones(shape, np.float32)})


@pytest.mark.parametrize("row", [37, -38, 2**62, -(2**63)])
def test_rows_that_are_not_there(row: int, tmp_path: Path) -> None:
    matrix = random_matrix(np.random.default_rng(10), 37, 64)
    model = model_of(gather_node(matrix), matrix.inputs(), {"ids": ["rows"]})
    with (
        open_session(tmp_path, model) as session,
        pytest.raises(ModelFileError, match=f"GatherPacked, ids: got {row}, expected numbers in"),
    ):
        session.run({"ids": np.array([0, row], np.int64)})
