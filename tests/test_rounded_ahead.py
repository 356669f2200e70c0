"""Weights that a process rounds ahead: the same bits, and only what was asked for."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import onnxsmith.graph_passes.rounding as rounding
from onnxsmith.errors import BadInputError
from onnxsmith.exporters import export, load_torch
from onnxsmith.exporters.stored_weights import stored_matrices
from onnxsmith.graph_passes import make_passes, run_passes
from onnxsmith.graph_passes.blocks import dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.context import PassContext
from onnxsmith.graph_passes.rounded_ahead import RoundedAhead, rounding_ahead
from onnxsmith.package_io import save_package
from onnxsmith.source import ModelSource
from onnxsmith.stored_rows import StoredMatrix, StoredRows

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")

FORMATS: dict[str, dict[str, Any]] = {
    "minimums": {"minimums": True, "half_scales": True},
    "zero points": {},
    "symmetric": {"symmetric": True, "bits": 8, "half_scales": True},
    "plain": {"search_steps": 0, "block_size": 16},
}


def written(directory: Path, **tensors: Any) -> list[StoredMatrix]:
    directory.mkdir(exist_ok=True)
    safetensors.save_file(tensors, directory / "model.safetensors")
    return stored_matrices(directory)


def numbers(rows: int, columns: int, seed: int = 0) -> Any:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def wait(ahead: RoundedAhead | None, count: int) -> RoundedAhead:
    assert ahead is not None
    began = time.monotonic()
    while len(ahead._done) < count:
        assert time.monotonic() - began < 60, "the process does nothing"
        time.sleep(0.01)
    return ahead


def rows_of(matrix: StoredMatrix) -> StoredRows:
    return StoredRows(matrix.file, matrix.name, np.arange(matrix.shape[0]))


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_the_same_to_the_bit(form: str, tmp_path: Path) -> None:
    tensors = {
        "a": numbers(48, 64), "b": numbers(16, 64, 1).half(), "c": numbers(48, 64, 2).bfloat16(),
        "odd": numbers(5, 33), "bias": torch.ones(64),
    }  # fmt: skip
    matrices = {one.name: one for one in written(tmp_path, **tensors)}
    assert set(matrices) == {"a", "b", "c", "odd"}
    (one,) = make_passes([("quantize_weights", FORMATS[form])])
    given = one.arguments()
    settings = {name: given[name] for name in ("bits", "block_size", "symmetric", "minimums", "search_steps")}
    settings["scale_type"] = "float16" if given["half_scales"] else "float32"
    with rounding_ahead(list(matrices.values()), [one]) as ahead:
        ahead = wait(ahead, 3)
        for names in (("a",), ("b",), ("c",), ("a", "c", "b")):
            parts = [rows_of(matrices[name]) for name in names]
            whole = np.concatenate([tensors[name].float().numpy() for name in names])
            found = ahead.blocks(parts, settings)
            expected = quantize_blocks(whole, **settings)
            assert found is not None
            for field in dataclasses.fields(expected):
                np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
            np.testing.assert_array_equal(dequantize_blocks(found), dequantize_blocks(expected))
        # What was not foreseen.
        a = rows_of(matrices["a"])
        assert ahead.blocks([a], settings | {"block_size": 64}) is None
        assert ahead.blocks([rows_of(matrices["odd"])], settings) is None
        assert ahead.blocks([dataclasses.replace(a, order=a.order[::-1])], settings) is None
        assert ahead.blocks([dataclasses.replace(a, file=tmp_path / "other")], settings) is None
        assert ahead.blocks([], settings) is None
        process = ahead._process
    assert process.poll() is not None


def test_who_needs_a_weight_before_it_is_ready_rounds_the_rest(tmp_path: Path) -> None:
    matrices = written(tmp_path, **{f"w{i}": numbers(2048, 2048, i) for i in range(4)})
    (one,) = make_passes([("quantize_weights", {})])
    with rounding_ahead(matrices, [one]) as ahead:
        assert ahead is not None
        settings = ahead._settings[matrices[-1].file, matrices[-1].name]
        assert ahead.blocks([rows_of(matrices[-1])], settings) is None
        # It does not take the processor from us any more.
        assert ahead._process.wait(timeout=30)
        assert len(ahead._done) < len(matrices)


def test_where_there_is_nothing_to_do_ahead(tmp_path: Path) -> None:
    matrices = written(tmp_path, a=numbers(32, 64))
    for passes in (
        [],
        make_passes([("cleanup", {}), ("quantize_dynamic", {})]),
        make_passes([("quantize_weights", {"method": "hqq"})]),
        make_passes([("quantize_weights", {"method": "gptq"})]),
        make_passes([("quantize_weights", {"balance": True})]),
        make_passes([("quantize_weights", {"block_size": 128})]),
    ):
        with rounding_ahead(matrices, passes) as ahead:
            assert ahead is None
    quantize = make_passes([("quantize_weights", {})])
    with rounding_ahead([], quantize) as ahead:
        assert ahead is None
    with rounding_ahead(matrices, quantize, directory=tmp_path / "none") as ahead:
        assert ahead is None
    (tmp_path / "room").mkdir()
    with rounding_ahead(matrices, quantize, directory=tmp_path / "room") as ahead:
        wait(ahead, 1)
        # Nothing is left behind, whatever happens.
        assert not list((tmp_path / "room").iterdir())


@pytest.mark.parametrize("passes", [
    [("transpose_weights", {}), ("cleanup", {}), ("quantize_weights", {"minimums": True, "block_size": 16})],
    [("quantize_weights", {"block_size": 16, "embedding_block_size": 32})],
    [("quantize_weights", {"block_size": 16, "overrides": {"*q_proj*": {"bits": 8}}})],
])  # fmt: skip
def test_an_artifact_is_the_same_to_the_byte(
    tiny_llama_dir: Path, tmp_path: Path, passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[str] = []
    quantize = rounding.quantize_blocks

    def counted(*arguments: Any, **options: Any) -> Any:
        rounded.append(options["name"])
        return quantize(*arguments, **options)

    monkeypatch.setattr(rounding, "quantize_blocks", counted)
    made = {}
    for name in ("ahead", "alone"):
        package = export(load_torch(ModelSource.parse(str(tiny_llama_dir)), lazy=True))
        specs = make_passes(passes)
        directory = tmp_path / name
        directory.mkdir()
        with rounding_ahead(stored_matrices(tiny_llama_dir) if name == "ahead" else [], specs) as ahead:
            if ahead is not None:
                wait(ahead, len(ahead._settings))
            package = run_passes(package, specs, context=PassContext(ahead=ahead))
            rounded.clear()
            save_package(package, directory)
        made[name] = package.steps[-1].details, len(rounded)
    assert made["ahead"][0] == made["alone"][0]
    assert made["ahead"][1] < made["alone"][1]
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ahead", "alone")
    ]
    assert "model.onnx" in files[0]
    assert files[0] == files[1]


def test_a_weight_that_is_not_a_number_is_an_error_all_the_same(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = safetensors.load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = float("nan")
    safetensors.save_file(state, file, metadata={"format": "pt"})
    passes = make_passes([("quantize_weights", {"block_size": 16})])
    package = export(load_torch(ModelSource.parse(str(tmp_path / "m")), lazy=True))
    with rounding_ahead(stored_matrices(tmp_path / "m"), passes) as ahead:
        assert ahead is not None
        wait(ahead, len(ahead._settings) - 1)
        package = run_passes(package, passes, context=PassContext(ahead=ahead))
        with pytest.raises(BadInputError, match=f"weight {name!r}: .*NaN"):
            save_package(package, tmp_path)


def test_float32_that_is_not_written_needs_no_room(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith import export_model
    from onnxsmith.errors import ResourceError
    from onnxsmith.pipeline import staging

    def few(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=weights // 2)

    weights = sum(math.prod(one.shape) * 4 for one in stored_matrices(tiny_llama_dir))
    monkeypatch.setattr(staging, "shutil", SimpleNamespace(**vars(staging.shutil) | {"disk_usage": few}))
    with pytest.raises(ResourceError, match="MB free on the disk"):
        export_model(str(tiny_llama_dir), tmp_path / "float", verify=False)
    export_model(str(tiny_llama_dir), tmp_path / "small", specs=[("quantize_weights", {})], verify=False)
    assert (tmp_path / "small" / "manifest.json").exists()
    assert not (tmp_path / "float").exists()
