"""MultiHeadAttention of the own kernels: against numpy, the same bits for any rows and threads, errors.

Where nothing else is said, it is computed twice: by the library, and by the function for runtimes without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from generated_graphs import Array
from onnxsmith.graph_passes import load_pass
from onnxsmith.graph_passes.packed_functions import make_callable
from onnxsmith.own_operators import OWN_DOMAIN

NAMES = ("query", "key", "value", "bias", "attention_bias")
LOWEST = np.finfo(np.float32).min


def model_of(given: dict[str, Array], opset: int = 18, **attributes: Any) -> ir.Model:
    """One operator whose inputs are inputs of the graph, and the function for it."""
    names = [name if name in given else "" for name in NAMES]
    while not names[-1]:
        names.pop()
    node = helper.make_node("MultiHeadAttention", names, ["y"], domain=OWN_DOMAIN, **attributes)
    infos = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(array.ndim)]
        )
        for name, array in given.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "rows", "width"])
    graph = helper.make_graph([node], "attention", infos, [output])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(OWN_DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    make_callable(model)
    onnx.checker.check_model(ir.to_proto(model))
    return model


def session_of(model: ir.Model, library: Path | None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def answer(session: ort.InferenceSession, given: dict[str, Array]) -> Array:
    return np.asarray(session.run(["y"], given)[0])


def operands(
    batch: int, rows: int, keys: int, heads: int, size: int, *, values: int = 0, seed: int = 0,
    packed: bool = False, bias: bool = False, scores: tuple[int, ...] = (),
) -> dict[str, Array]:  # fmt: skip
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    widths = (heads * size, heads * size, heads * (values or size))
    query, key, value = (
        normal(batch, rows, widths[0]),
        normal(batch, keys, widths[1]),
        normal(batch, keys, widths[2]),
    )
    given = (
        {"query": np.concatenate([query, key, value], -1)}
        if packed
        else {"query": query, "key": key, "value": value}
    )
    if bias:
        given["bias"] = normal(sum(widths))
    if scores:
        given["attention_bias"] = normal(*scores)
        # Padding; the last key is there for all.
        given["attention_bias"][..., : keys // 3][random.random((*scores[:-1], keys // 3)) < 0.5] = LOWEST
    return given


def expected(given: dict[str, Array], heads: int, scale: float = 0.0) -> Array:
    """In float64."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    parts = np.split(wide["query"], 3, -1) if "key" not in given else [wide[name] for name in NAMES[:3]]
    if "bias" in given:
        ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
        parts = [part + one for part, one in zip(parts, np.split(wide["bias"], ends), strict=True)]
    query, key, value = (part.reshape(*part.shape[:2], heads, -1).transpose(0, 2, 1, 3) for part in parts)
    scores = query @ key.transpose(0, 1, 3, 2) * (scale or query.shape[-1] ** -0.5)
    scores = scores + wide.get("attention_bias", 0)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    found = weights / weights.sum(-1, keepdims=True) @ value
    return np.asarray(found.transpose(0, 2, 1, 3).reshape(*parts[0].shape[:2], -1))


def assert_gives(
    given: dict[str, Array], heads: int, library: Path, opset: int = 18, **attributes: Any
) -> None:
    model = model_of(given, opset, num_heads=heads, **attributes)
    want = expected(given, heads, attributes.get("scale", 0.0))
    for one, threads in ((None, 1), (library, 1), (library, 2)):
        got = answer(session_of(model, one, threads), given)
        assert got.shape == want.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64, 128, 300])
@pytest.mark.parametrize("size", [16, 24, 32, 64, 80])
def test_it_is_that_of_float64(size: int, rows: int, packed: bool, kernels: Path) -> None:
    given = operands(2, rows, rows, 3, size, packed=packed, bias=packed, scores=(2, 1, 1, rows))
    assert_gives(given, 3, kernels)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 90),
    keys=st.integers(1, 300),
    heads=st.integers(1, 5),
    size=st.sampled_from([1, 3, 8, 16, 24, 33, 64, 80, 128]),
    values=st.sampled_from([0, 4, 17, 32, 80]),
    packed=st.booleans(),
    bias=st.booleans(),
    masked=st.tuples(st.booleans(), st.booleans(), st.booleans()) | st.none(),
    scale=st.sampled_from([0.0, 0.05, 0.15]),
    opset=st.sampled_from([13, 17, 18, 21]),
    seed=st.integers(0, 1000),
)
def test_every_form(
    batch: int, rows: int, keys: int, heads: int, size: int, values: int, packed: bool, bias: bool,
    masked: tuple[bool, bool, bool] | None, scale: float, opset: int, seed: int, kernels: Path,
) -> None:  # fmt: skip
    keys, values = (rows, 0) if packed else (keys, values)
    wide = (batch, heads, rows)
    scores = (
        () if masked is None else (*(n if full else 1 for n, full in zip(wide, masked, strict=True)), keys)
    )
    given = operands(
        batch, rows, keys, heads, size, values=values, packed=packed, bias=bias, scores=scores, seed=seed
    )
    assert_gives(given, heads, kernels, opset, **({"scale": scale} if scale else {}))


@pytest.mark.parametrize("scores", [(3, 1, 1, 137), (1, 4, 137, 137), ()])
@pytest.mark.parametrize("size", [24, 32, 64])
def test_the_same_bits_for_any_rows_texts_and_threads(
    size: int, scores: tuple[int, ...], kernels: Path
) -> None:
    """A query alone and among others, a text alone and among others, packed and apart."""
    given = operands(3, 137, 137, 4, size, packed=True, bias=True, scores=scores)
    query, key, value = np.split(given["query"], 3, -1)
    apart = {**{name: array for name, array in given.items() if name != "query"}}
    apart |= {"query": query, "key": key, "value": value}
    packed, parted = (model_of(one, num_heads=4) for one in (given, apart))
    whole = answer(session_of(packed, kernels), given)
    assert np.array_equal(answer(session_of(packed, kernels, 2), given), whole)
    one, two = session_of(parted, kernels), session_of(parted, kernels, 2)
    assert np.array_equal(answer(two, apart), whole)
    mask = apart.get("attention_bias")
    start = 0
    for count in (1, 2, 3, 5, 8, 64, 1, 53):
        some = slice(start, start + count)
        part = apart | {"query": query[:, some]}
        if mask is not None and mask.shape[2] > 1:
            part["attention_bias"] = mask[:, :, some]
        assert np.array_equal(answer(two if count % 2 else one, part), whole[:, some])
        start += count
    assert start == 137
    for text in range(3):
        alone = {name: array[text : text + 1] if array.ndim == 3 else array for name, array in given.items()}
        if mask is not None and mask.shape[0] > 1:
            alone["attention_bias"] = mask[text : text + 1]
        assert np.array_equal(answer(session_of(packed, kernels), alone), whole[text : text + 1])


def test_keys_behind_the_last_that_is_seen_do_not_matter(kernels: Path) -> None:
    """A text padded to any length is the text itself, but for the last digits."""
    given = operands(1, 20, 20, 4, 32, packed=True)
    short = answer(session_of(model_of(given, num_heads=4), kernels), given)
    for more in (1, 12, 44, 130):
        padded = {"query": np.concatenate([given["query"], np.full((1, more, 384), 3.0, np.float32)], 1)}
        padded["attention_bias"] = np.where(np.arange(20 + more) < 20, np.float32(0), LOWEST)[
            None, None, None
        ]
        got = answer(session_of(model_of(padded, num_heads=4), kernels), padded)
        np.testing.assert_allclose(got[:, :20], short, rtol=0, atol=2e-6)


def test_rows_that_see_nothing(kernels: Path) -> None:
    """With the lowest number for all keys the mean of their values, with -inf zeros."""
    given = operands(1, 5, 40, 2, 32, scores=(1, 1, 5, 40))
    given["attention_bias"][:] = 0
    given["attention_bias"][:, :, 1] = LOWEST
    given["attention_bias"][:, :, 2] = -np.inf
    got = answer(session_of(model_of(given, num_heads=2), kernels), given)
    np.testing.assert_allclose(got[0, 1], given["value"][0].mean(0), rtol=0, atol=1e-5)
    assert not got[0, 2].any()
    seen = given | {"attention_bias": np.zeros((1, 1, 5, 40), np.float32)}
    np.testing.assert_allclose(got[0, [0, 3, 4]], expected(seen, 2)[0, [0, 3, 4]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_numbers_that_are_none_are_not_hidden(name: str, number: float, rows: int, kernels: Path) -> None:
    given = operands(2, rows, rows, 2, 32)
    session = session_of(model_of(given, num_heads=2), kernels)
    before = answer(session, given)
    given[name][0, 1] = number
    got = answer(session, given)
    lost = ~np.isfinite(got).all(axis=2)
    assert np.isfinite(before).all()
    # Each query sees every key.
    assert lost[0].tolist() == [row == 1 for row in range(rows)] if name == "query" else lost[0].all()
    np.testing.assert_array_equal(got[1], before[1])


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0)])
def test_nothing_to_compute(batch: int, rows: int, kernels: Path) -> None:
    given = operands(batch, rows, rows, 2, 32, packed=True)
    assert answer(session_of(model_of(given, num_heads=2), kernels), given).shape == (batch, rows, 64)


@pytest.mark.parametrize(
    ("changed", "attributes", "said"),
    [
        ({"query": (1, 6, 3 * 64 + 1)}, {}, "query"),
        ({"query": (6, 192)}, {}, "query"),
        ({"key": (1, 9, 64)}, {}, "key"),
        ({"key": (1, 9, 64), "value": (1, 8, 64), "query": (1, 6, 64)}, {}, "value"),
        ({"key": (2, 9, 64), "value": (2, 9, 64), "query": (1, 6, 64)}, {}, "key"),
        ({"key": (1, 9, 48), "value": (1, 9, 64), "query": (1, 6, 64)}, {}, "key"),
        ({"key": (1, 9, 64), "value": (1, 9, 63), "query": (1, 6, 64)}, {}, "value"),
        ({"bias": (191,)}, {}, "bias"),
        ({"bias": (1, 192)}, {}, "bias"),
        ({"attention_bias": (1, 1, 6, 7)}, {}, "attention_bias"),
        ({"attention_bias": (1, 3, 6, 6)}, {}, "attention_bias"),
        ({"attention_bias": (2, 1, 6, 6)}, {}, "attention_bias"),
        ({"attention_bias": (1, 1, 5, 6)}, {}, "attention_bias"),
        ({"attention_bias": (6, 6)}, {}, "attention_bias"),
        ({}, {"num_heads": 5}, "query"),
        ({}, {"num_heads": 0}, "num_heads"),
        ({}, {"num_heads": -4}, "num_heads"),
        ({}, {"num_heads": 2**61}, ""),
    ],
)
def test_what_does_not_fit_is_an_error(
    changed: dict[str, tuple[int, ...]], attributes: dict[str, int], said: str, kernels: Path
) -> None:
    given = operands(1, 6, 6, 2, 32, packed=True) | {
        name: np.ones(shape, np.float32) for name, shape in changed.items()
    }
    with pytest.raises(Exception, match=f"{said}.*(got|expected)"):
        answer(session_of(model_of(given, **({"num_heads": 2} | attributes)), kernels), given)


@pytest.mark.parametrize("packed", [True, False])
def test_the_shape_of_the_result_is_known(packed: bool) -> None:
    given = operands(2, 6, 6, 2, 32, packed=packed)
    model = model_of(given, num_heads=2)
    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", "rows", given[value.name or ""].shape[-1]])
    load_pass("infer_shapes").create({})(model)
    (node,) = model.graph
    assert node.outputs[0].shape == ir.Shape(["batch", "rows", 64])
    assert node.outputs[0].dtype is ir.DataType.FLOAT
