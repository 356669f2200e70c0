"""Attention and norms of the own kernels: what ONNX Runtime's give, the same bits in pieces, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from generated_graphs import Array
from onnxsmith.errors import ModelFileError
from onnxsmith.graph_passes import load_pass, operator_counts
from onnxsmith.graph_passes.own_attention import UseOwnAttention
from onnxsmith.onnx_file import check_model, save_model
from onnxsmith.own_operators import OWN_DOMAIN
from onnxsmith.package import Component, ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.runtime import OrtSession
from onnxsmith.runtime.decoding import open_decoder
from packed_matrices import product, random_matrix

pytestmark = pytest.mark.usefixtures("kernels")

CONTRIB = "com.microsoft"
TYPES = {"lengths": TensorProto.INT32, "total": TensorProto.INT32, "positions": TensorProto.INT64}
NAMES = (
    "query", "key", "value", "past_key", "past_value", "lengths", "total", "cos", "sin", "positions", "bias",
    "sinks",
)  # fmt: skip


def attention_session(
    directory: Path, domain: str, given: dict[str, Array], *, threads: int = 1, **attributes: Any
) -> OrtSession:
    """One operator whose inputs are inputs of the graph."""
    names = [name if name in given else "" for name in NAMES]
    # ONNX Runtime takes positions as they are only with the lengths of the queries.
    if domain == CONTRIB and "query_lengths" in given:
        names += ["", "", "", "", "query_lengths"]
    while not names[-1]:
        names.pop()
    node = helper.make_node("GroupQueryAttention", names, ["y", "k", "v"], domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(
            name,
            TYPES.get(name, TensorProto.INT32 if name == "query_lengths" else TensorProto.FLOAT),
            [f"{name}_{axis}" for axis in range(given[name].ndim)],
        )
        for name in names
        if name
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)])
        for name, rank in (("y", 3), ("k", 4), ("v", 4))
    ]
    graph = helper.make_graph([node], "attention", infos, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    path = directory / f"{domain}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return OrtSession(load_package(path), threads=threads)


def feeds_of(
    batch: int, rows: int, past: int, heads: int, kv_heads: int, size: int, *, packed: bool = True,
    angles: bool = True, **extra: bool,
) -> dict[str, Array]:  # fmt: skip
    random = np.random.default_rng(rows + past + size)
    total = past + rows

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    given: dict[str, Array] = {
        "past_key": normal(batch, kv_heads, past, size),
        "past_value": normal(batch, kv_heads, past, size),
        "lengths": np.full(batch, total - 1, np.int32),
        "total": np.array([total], np.int32),
        "query_lengths": np.full(batch, rows, np.int32),
    }
    if packed:
        given["query"] = normal(batch, rows, (heads + 2 * kv_heads) * size)
    else:
        given |= {"query": normal(batch, rows, heads * size), "key": normal(batch, rows, kv_heads * size)}
        given["value"] = normal(batch, rows, kv_heads * size)
    if angles:
        turns = np.arange(total + 4)[:, None] / 10000 ** (np.arange(size // 2) / (size // 2))
        given |= {"cos": np.cos(turns).astype(np.float32), "sin": np.sin(turns).astype(np.float32)}
        starts = np.arange(batch)[:, None]
        given["positions"] = np.arange(past, total)[None] + starts
    if extra.get("bias"):
        given["bias"] = normal(batch, 1, rows, total)
        # A row that sees nothing but hidden keys has scores whose last digits are lost.
        given["bias"][0, :, max(0, total // 3 - past) :, : total // 3] = -10000
    if extra.get("sinks"):
        given["sinks"] = normal(heads)
    return given


def answers(session: OrtSession, given: dict[str, Array]) -> dict[str, Array]:
    names = {spec.name for spec in session.inputs}
    return session.run({name: array for name, array in given.items() if name in names})


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "packed": ({"heads": 9, "kv_heads": 3, "size": 64}, {}),
    "wide": ({"heads": 4, "kv_heads": 1, "size": 128, "bias": True}, {"scale": 0.05}),
    "apart": ({"heads": 4, "kv_heads": 4, "size": 80, "packed": False, "bias": True}, {}),
    "without rotation": ({"heads": 8, "kv_heads": 2, "size": 32, "packed": False, "angles": False}, {}),
    "interleaved": ({"heads": 4, "kv_heads": 2, "size": 96}, {"rotary_interleaved": 1}),
    "window": ({"heads": 4, "kv_heads": 2, "size": 64, "angles": False}, {"local_window_size": 50}),
    "soft cap": ({"heads": 4, "kv_heads": 2, "size": 48, "angles": False}, {"softcap": 20.0}),
    "sinks": ({"heads": 4, "kv_heads": 2, "size": 64, "sinks": True, "angles": False}, {}),
}


@pytest.mark.parametrize(
    ("batch", "rows", "past"),
    [(1, 1, 3), (1, 1, 300), (2, 1, 130), (1, 40, 0), (2, 200, 0), (1, 9, 140)],
)
@pytest.mark.parametrize("form", FORMS)
def test_it_gives_what_onnx_runtimes_kernel_gives(
    form: str, batch: int, rows: int, past: int, tmp_path: Path
) -> None:
    sizes, attributes = FORMS[form]
    given = feeds_of(batch, rows, past, **sizes)
    attributes = attributes | {
        "num_heads": sizes["heads"],
        "kv_num_heads": sizes["kv_heads"],
        "do_rotary": int("cos" in given),
    }
    with attention_session(tmp_path, CONTRIB, given, **attributes) as theirs:
        expected = answers(theirs, given)
    for threads in (1, 2):
        with attention_session(tmp_path, OWN_DOMAIN, given, threads=threads, **attributes) as ours:
            got = answers(ours, given)
        for name in ("y", "k", "v"):
            np.testing.assert_allclose(got[name], expected[name], atol=5e-6, rtol=0)


@pytest.mark.parametrize("form", ["packed", "window", "sinks", "interleaved"])
def test_a_prompt_in_pieces_gives_the_same_bits(form: str, tmp_path: Path) -> None:
    """Whatever is computed together: a row sees its keys in the same order."""
    sizes, attributes = FORMS[form]
    attributes = attributes | {
        "num_heads": sizes["heads"],
        "kv_num_heads": sizes["kv_heads"],
        "do_rotary": int(sizes.get("angles", True)),
    }
    whole = feeds_of(1, 300, 0, **sizes)
    found = []
    cache = {"past_key": whole["past_key"], "past_value": whole["past_value"]}
    with (
        attention_session(tmp_path, OWN_DOMAIN, whole, **attributes) as session,
        attention_session(tmp_path, OWN_DOMAIN, whole, threads=2, **attributes) as twice,
    ):
        expected = answers(session, whole)
        start = 0
        for number, count in enumerate((1, 3, 20, 1, 7, 140, 1, 127)):
            some = slice(start, start + count)
            given = {
                **whole,
                **cache,
                "query": whole["query"][:, some],
                "total": np.array([start + count], np.int32),
            }
            if "positions" in whole:
                given["positions"] = whole["positions"][:, some]
            piece = answers(twice if number % 2 else session, given)
            found.append(piece["y"])
            cache = {"past_key": piece["k"], "past_value": piece["v"]}
            start += count
    assert start == 300
    assert np.array_equal(np.concatenate(found, axis=1), expected["y"])
    assert np.array_equal(cache["past_key"], expected["k"])


def test_rows_of_angles_are_those_of_a_table(tmp_path: Path) -> None:
    given = feeds_of(2, 5, 20, 4, 2, 64)
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
    rows = {name: given[name][given["positions"].reshape(-1)] for name in ("cos", "sin")}
    with attention_session(tmp_path, OWN_DOMAIN, given, **attributes) as session:
        expected = answers(session, given)
    with attention_session(tmp_path, OWN_DOMAIN, given, rotary_rows=1, **attributes) as session:
        got = answers(session, given | rows)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_rows_that_see_nothing_are_zero(tmp_path: Path) -> None:
    given = feeds_of(1, 3, 0, 4, 2, 64, bias=True)
    given["bias"] = np.full((1, 1, 3, 3), -np.inf, np.float32)
    given["bias"][:, :, 1:] = 0
    with attention_session(tmp_path, OWN_DOMAIN, given, num_heads=4, kv_num_heads=2) as session:
        y = answers(session, given)["y"]
    assert (y[:, 0] == 0).all() and np.isfinite(y).all() and (y[:, 1:] != 0).any()


@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["query", "key"])
def test_numbers_that_are_none_are_not_hidden(name: str, number: float, rows: int, tmp_path: Path) -> None:
    given = feeds_of(2, rows, 5, 4, 2, 64, packed=False, angles=False)
    with attention_session(tmp_path, OWN_DOMAIN, given, num_heads=4, kv_num_heads=2) as session:
        expected = answers(session, given)["y"]
        given[name][0, 1] = number
        got = answers(session, given)["y"]
    lost = ~np.isfinite(got).all(axis=2)
    assert np.isfinite(expected).all()
    # A row sees its own key, and those before it.
    assert lost[0, 1:].all() if name == "key" else lost[0].tolist() == [row == 1 for row in range(rows)]
    np.testing.assert_array_equal(got[0, :1], expected[0, :1])
    np.testing.assert_array_equal(got[1], expected[1])


def test_no_token_leaves_the_cache_as_it_is(tmp_path: Path) -> None:
    given = feeds_of(2, 0, 21, 4, 2, 64)
    with attention_session(tmp_path, OWN_DOMAIN, given, num_heads=4, kv_num_heads=2, do_rotary=1) as session:
        got = answers(session, given)
    assert got["y"].shape == (2, 0, 256)
    np.testing.assert_array_equal(got["k"], given["past_key"])
    np.testing.assert_array_equal(got["v"], given["past_value"])


def test_room_behind_the_last_key_is_zero(tmp_path: Path) -> None:
    given = feeds_of(1, 2, 40, 4, 2, 64)
    given["total"] = np.array([12], np.int32)
    given["positions"] = np.array([[10, 11]])
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
    with attention_session(tmp_path, OWN_DOMAIN, given, **attributes) as session:
        # What ONNX Runtime frees, it takes again.
        answers(session, given | {"total": np.array([42], np.int32), "past_key": given["past_key"] + 7})
        got = answers(session, given)
    for name, past in (("k", given["past_key"]), ("v", given["past_value"])):
        np.testing.assert_array_equal(got[name][:, :, :10], past[:, :, :10])
        assert (got[name][:, :, 10:12] != 0).any() and not got[name][:, :, 12:].any()


@pytest.mark.parametrize("heads", [2**60, 2**62, -4, 0])
def test_a_number_of_heads_that_cannot_be(heads: int, tmp_path: Path) -> None:
    given = feeds_of(1, 2, 3, 4, 4, 64, packed=False)
    with (
        pytest.raises(ModelFileError, match=f"num_heads: got {heads}"),
        attention_session(tmp_path, OWN_DOMAIN, given, num_heads=heads, kv_num_heads=heads),
    ):
        pass


def test_heads_of_no_width(tmp_path: Path) -> None:
    given = feeds_of(1, 2, 3, 4, 4, 0, packed=False, angles=False)
    with (
        attention_session(tmp_path, OWN_DOMAIN, given, num_heads=4, kv_num_heads=4) as session,
        pytest.raises(ModelFileError, match="query: got"),
    ):
        answers(session, given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positions": np.array([[99, 100]])}, "rows of cos_cache"),
        ({"total": np.array([1], np.int32)}, "total_sequence_length"),
        ({"total": np.array([30], np.int32)}, "total_sequence_length"),
        ({"past_value": np.zeros((1, 2, 4, 64), np.float32)}, "past_value"),
        ({"query": np.zeros((1, 2, 500), np.float32)}, "query"),
        ({"cos": np.zeros((26, 16), np.float32)}, "cos_cache"),
    ],
)
def test_wrong_operands_are_errors(change: dict[str, Array], said: str, tmp_path: Path) -> None:
    given = feeds_of(1, 2, 20, 4, 2, 64)
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
    with attention_session(tmp_path, OWN_DOMAIN, given, **attributes) as session:
        with pytest.raises(ModelFileError, match=said):
            answers(session, given | change)
        assert np.isfinite(answers(session, given)["y"]).all()


@pytest.mark.parametrize("skipped", [True, False])
@pytest.mark.parametrize("rows", [1, 21])
def test_a_norm_in_a_product(rows: int, skipped: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(rows)
    matrix = random_matrix(random, 48, 160, offsets="minimums")
    x, skip = (random.standard_normal((rows, 160)).astype(np.float32) for _ in range(2))
    norm = random.uniform(0.5, 2, 160).astype(np.float32)
    inputs = ["x", "skip" if skipped else "", "norm", "B", "scales", "offsets"]
    node = helper.make_node(
        "NormMatMulPacked", inputs, ["y", "sum"], domain=OWN_DOMAIN,
        K=160, N=48, bits=4, block_size=32, epsilon=1e-5,
    )  # fmt: skip
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 160])
        for name in ("x", "skip")[: 1 + skipped]
    ]
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None]) for name in ("y", "sum")
    ]
    weights = [
        numpy_helper.from_array(array, name) for name, array in (matrix.inputs() | {"norm": norm}).items()
    ]
    graph = helper.make_graph([node], "norm", given, results, weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(OWN_DOMAIN, 1)]
    path = tmp_path / "norm.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with OrtSession(load_package(path), threads=2) as session:
        got = session.run({"x": x, "skip": skip} if skipped else {"x": x})
        alone = session.run({"x": x[:1], "skip": skip[:1]} if skipped else {"x": x[:1]})
    total = x + skip if skipped else x
    assert np.array_equal(got["sum"], total)
    assert np.array_equal(alone["y"], got["y"][:1])
    wide = total.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * norm
    # A number between two steps of 1 / 127 may be rounded to the other one.
    steps = np.abs(normed).reshape(rows, -1, 32).max(axis=-1).repeat(32, axis=-1) / 127
    allowed = np.sort(steps[..., None, :] * np.abs(matrix.weight()), axis=-1)[..., -1] + 1e-4
    assert (np.abs(got["y"] - product(normed.astype(np.float32), matrix)) <= allowed).all()


@pytest.fixture(scope="module")
def decoder() -> ir.Model:
    """Two layers with heads of 16, fused as for ONNX Runtime 1.32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from onnxsmith.exporters import LoadedModel, export, torch_program
    from onnxsmith.source import ModelSource, SourceKind

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    loaded = LoadedModel(module, ModelSource(SourceKind.FACTORY, "test:make"), "text-generation", {}, {})
    model = export(loaded, torch_program(loaded), attention="fused").main.model
    for name in ("transpose_weights", "cleanup", "fuse_transformer"):
        load_pass(name).create({})(model)
    for name in ("fuse_silu", "flatten_attention", "rotary_in_attention"):
        load_pass(name).create({})(model)
    return model


def opened(model: ir.Model) -> OrtSession:
    return OrtSession(ModelPackage({"model": Component(model)}), threads=2)


@pytest.mark.parametrize("packed", [True, False])
def test_a_decoder_gives_the_same_with_padding_and_without(decoder: ir.Model, packed: bool) -> None:
    before = decoder.clone()
    if packed:
        load_pass("pack_projections").create({})(before)
    model = before.clone()
    outcome = UseOwnAttention()(model)
    assert outcome.changes.details == {"attention": 2, "angles of new tokens only": True}
    counts = operator_counts(model)
    assert counts["onnxsmith.GroupQueryAttention"] == 2
    # Angles of the cache's other positions are computed no more.
    assert not {"Range", "ReduceMax"} & counts.keys()
    random = np.random.default_rng(0)
    prompt = random.integers(0, 64, (2, 6))
    mask = np.array([[True] * 6, [False] * 2 + [True] * 4])
    with opened(before) as theirs, opened(model) as ours:
        assert ours.shares_cache
        decoders = [open_decoder(session, capacity=16) for session in (theirs, ours)]
        # The sixth step needs a larger buffer.
        for step in range(12):
            new = prompt if step == 0 else random.integers(0, 64, (2, 1))
            shown = mask if step == 0 else None
            expected, got = (one.step(new, shown) for one in decoders)
            seen = mask if step == 0 else np.ones((2, 1), bool)
            np.testing.assert_allclose(got[seen], expected[seen], atol=2e-5)


def test_what_the_kernel_lacks_stays_with_onnx_runtime(decoder: ir.Model) -> None:
    model = decoder.clone()
    first, second = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    first.attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    past = second.inputs[3]
    assert past is not None and past.shape is not None
    past.shape = ir.Shape([*list(past.shape)[:3], 24])
    outcome = UseOwnAttention()(model)
    assert not outcome.modified
    assert list(outcome.changes.skipped.values()) == [
        "the kernel has no smooth_softmax",
        "the size of its heads is no known multiple of 16",
    ]


def test_lengths_of_rows_stay_with_onnx_runtime(decoder: ir.Model) -> None:
    model = decoder.clone()
    load_pass("lengths_in_attention").create({})(model)
    outcome = UseOwnAttention()(model)
    assert set(outcome.changes.skipped.values()) == {"its rows have lengths of their own"}


def raw_session(path: Path) -> Any:
    """ONNX Runtime without the library."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("quantized", [False, True])
def test_without_the_library_functions_compute_it(decoder: ir.Model, quantized: bool, tmp_path: Path) -> None:
    """Attention exactly; products of the quantized weights without the rounding of activations."""
    before = decoder.clone()
    if quantized:
        load_pass("quantize_weights").create({"bits": 8, "block_size": 32})(before)
    model = before.clone()
    if quantized:
        load_pass("set_accuracy_level").create({"level": 1})(before)
        assert load_pass("use_packed_kernels").create({})(model).modified
    UseOwnAttention()(model)
    if quantized:
        outcome = load_pass("norms_in_products").create({})(model)
        assert outcome.changes.count == 4 and not outcome.changes.skipped
        counts = operator_counts(model)
        assert counts["onnxsmith.NormMatMulPacked"] == 4
    assert model.ir_version >= 10
    check_shapes(model)
    paths = [tmp_path / f"{name}.onnx" for name in ("before", "after")]
    for one, path in zip((before, model), paths, strict=True):
        save_model(one, path)
    check_model(paths[1])
    random = np.random.default_rng(0)
    mask = np.array([[1] * 6, [0] * 2 + [1] * 4])
    given: dict[str, Array] = {
        "input_ids": random.integers(0, 64, (2, 6)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
    }
    empty = {f"past_key_values.{layer}.{kind}": np.zeros((2, 2, 0, 16), np.float32)
             for layer in range(2) for kind in ("key", "value")}  # fmt: skip
    theirs, ours = (raw_session(path) for path in paths)
    names = [output.name for output in ours.get_outputs()]
    first = ours.run(names, given | empty)
    np.testing.assert_allclose(first[0][mask == 1], theirs.run(names, given | empty)[0][mask == 1], atol=5e-5)
    # A second call, with a cache and several tokens.
    given["input_ids"] = random.integers(0, 64, (2, 3))
    given["attention_mask"] = np.concatenate([mask, np.ones((2, 3), np.int64)], axis=1)
    given["position_ids"] = given["attention_mask"].cumsum(axis=1)[:, 6:] - 1
    past = {
        name.replace("present", "past_key_values"): value
        for name, value in zip(names, first, strict=True)
        if name.startswith("present")
    }
    got, expected = (session.run(names, given | past)[0] for session in (ours, theirs))
    np.testing.assert_allclose(got, expected, atol=5e-5)


def check_shapes(model: ir.Model) -> None:
    """The results of the own operators have known types and ranks."""
    load_pass("infer_shapes").create({})(model)
    for node in model.graph:
        if node.domain == OWN_DOMAIN:
            assert all(output.shape is not None and output.dtype is not None for output in node.outputs)


def test_a_norm_that_two_products_read_stays(decoder: ir.Model) -> None:
    model = decoder.clone()
    load_pass("quantize_weights").create({"bits": 8, "block_size": 32})(model)
    load_pass("use_packed_kernels").create({})(model)
    norm = next(node for node in model.graph if node.op_type == "SkipSimplifiedLayerNormalization")
    model.graph.outputs.append(norm.outputs[0])
    outcome = load_pass("norms_in_products").create({})(model)
    assert outcome.changes.count == 3
    assert list(outcome.changes.skipped.values()) == ["more than one product reads it"]
