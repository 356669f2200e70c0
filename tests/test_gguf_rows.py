"""A GGUF file's configuration from a header that is known, and which of its rows a weight is made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from generated_graphs import serialized
from onnxsmith.exporters import export, load_torch
from onnxsmith.exporters.gguf_header import header_known
from onnxsmith.exporters.stored_weights import _row_order
from onnxsmith.gguf_file import GgufFile
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.block_operators import SharedWeight, find_weights
from onnxsmith.graph_passes.context import PassContext
from onnxsmith.graph_passes.gguf_blocks import GgufRows
from onnxsmith.graph_passes.weights import joined_weights, matrix_rows, rows_tensor, turned
from onnxsmith.package import ModelPackage
from onnxsmith.source import ModelSource
from onnxsmith.stored_rows import known_rows
from test_loading import write_gguf

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("rows") / "tiny.gguf", kind="Q8_0")


def exported(file: Path, passes: list[str]) -> ModelPackage:
    package = export(load_torch(ModelSource.parse(str(file)), lazy=True))
    return run_passes(package, make_passes([(name, {}) for name in passes]))


def weights(package: ModelPackage) -> list[SharedWeight]:
    found = find_weights(package.main.model, embeddings=True, skip_nodes=())[0]
    # Without the rotary frequencies, which the model has computed.
    return [weight for weight in found if weight.name.endswith(".weight")]


def test_the_configuration_is_the_one_that_transformers_reads(file: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", only=3)

    def config(path: Path) -> dict[str, Any]:
        found = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        content: dict[str, Any] = found.to_dict()
        return content

    reader = gguf.GGUFReader
    expected = config(file)
    with header_known(GgufFile.open(file)):
        assert gguf.GGUFReader is not reader
        assert config(file) == expected
        # Another file, which has no weight of a head of its own, is read as always.
        assert config(other)["tie_word_embeddings"]
    assert gguf.GGUFReader is reader
    assert not expected["tie_word_embeddings"]
    assert expected["num_key_value_heads"] == 2
    # Control: it is the header that decides.
    changed = GgufFile.open(file)
    changed.metadata["llama.context_length"] = 17  # type: ignore[index]
    with header_known(changed):
        assert config(file)["max_position_embeddings"] == 17


@pytest.mark.parametrize(
    "passes", [[], ["transpose_weights"], [name for name, _ in PRESETS["cpu-fp32-newest"]]]
)
def test_noted_rows_are_those_that_hold_the_weights(file: Path, passes: list[str]) -> None:
    rows = GgufRows(GgufFile.open(file))
    found = weights(exported(file, passes))
    assert len(found) >= 9
    for weight in found:
        straight = rows_tensor(weight.tensor, weight.is_transposed)
        assert straight is not None
        whole = weight.tensor.numpy()
        held = matrix_rows(weight.tensor, weight.is_transposed)
        np.testing.assert_array_equal(held, whole if weight.is_transposed else turned(whole))
        placed, match = rows.place(known_rows(straight)), rows.find(held)
        assert placed is not None
        assert match is not None
        assert [t.name for t in placed.tensors] == [t.name for t in match.tensors]
        np.testing.assert_array_equal(placed.tensor, match.tensor)
        np.testing.assert_array_equal(placed.row, match.row)
    # Rotated weights lie in another order in the file.
    query = next(weight for weight in found if "q_proj" in weight.name)
    straight = rows_tensor(query.tensor, query.is_transposed)
    assert straight is not None
    order = known_rows(straight)[0].order
    assert not np.array_equal(order, np.sort(order))


@pytest.mark.parametrize("passes", [[], ["transpose_weights"]])
def test_weights_that_are_joined_keep_their_rows(file: Path, passes: list[str]) -> None:
    package = exported(file, passes)
    parts = [
        weight for weight in weights(package) if "layers.1.mlp" in weight.name and "down" not in weight.name
    ]
    held = [matrix_rows(weight.tensor, weight.is_transposed) for weight in parts]
    assert len(parts) == 2
    way = parts[0].is_transposed
    assert way == (not passes)
    joined = joined_weights(
        package.main.model.graph, [p.value for p in parts], axis=0 if way else 1
    ).const_value
    assert joined is not None
    expected = np.concatenate(held)
    np.testing.assert_array_equal(matrix_rows(joined, way), expected)
    np.testing.assert_array_equal(joined.numpy(), expected if way else expected.T)
    straight = rows_tensor(joined, way)
    assert straight is not None
    assert [part.tensor for part in known_rows(straight)] == [
        f"blk.1.ffn_{name}.weight" for name in ("gate", "up")
    ]


def test_blocks_are_the_same_without_notes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    find = GgufRows.find
    monkeypatch.setattr(GgufRows, "find", lambda self, matrix: searched.append(1) or find(self, matrix))
    package = exported(file, ["transpose_weights", "cleanup"])
    keep, context = make_passes([("keep_gguf_blocks", {})]), PassContext(gguf=file)
    noted = run_passes(package, keep, context=context)
    assert not searched
    for weight in weights(package):
        weight.tensor.meta.clear()
    looked_up = run_passes(package, keep, context=context)
    assert searched
    assert serialized(noted.main.model) == serialized(looked_up.main.model)
    assert noted.steps[-1].details == looked_up.steps[-1].details


def test_rows_of_another_file_or_shape_are_not_placed(file: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", kind="Q8_0")
    noted = [known_rows(weight.tensor) for weight in weights(exported(file, []))]
    rows = GgufRows(GgufFile.open(file))
    assert all(rows.place(parts) for parts in noted)
    assert GgufRows(GgufFile.open(other)).place(noted[0]) is None
    assert rows.place(()) is None
    of_many_widths = [part for parts in noted for part in parts]
    assert rows.place(of_many_widths) is None


def test_a_conversion_that_computes_has_no_order_of_rows() -> None:
    tensor = SimpleNamespace(name="blk.0.attn_q.weight", shape=(4, 2))

    def order(change: Any, of: Any = tensor) -> Any:
        def process(weights: Any, **_: Any) -> Any:
            return SimpleNamespace(weights=change(weights))

        return _row_order(of, SimpleNamespace(process=process), {})

    np.testing.assert_array_equal(order(lambda w: w[::-1]), [3, 2, 1, 0])
    for change in (
        lambda w: w - 1,
        lambda w: w * 2,
        lambda w: w[:2],
        lambda w: w.astype(float),
        lambda w: w.T,
    ):
        assert order(change) is None
    assert order(lambda w: w, SimpleNamespace(name="norm", shape=(4,))) is None
