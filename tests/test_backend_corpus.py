"""ONNX's own test models as a corpus: what ONNX Runtime computes is the same before and after the passes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import onnx_ir as ir
import pytest

from generated_graphs import Array, assert_same, run, serialized
from onnxsmith.errors import PassError
from onnxsmith.graph_passes import PRESETS, load_pass, make_passes

DATA = Path(onnx.backend.test.__file__).parent / "data"
# Everything of the presets that needs no data and rounds nothing.
PASSES = [spec for spec in PRESETS["cpu-fp32"] if spec[0] != "strip_metadata"]
# One in so many is run by the quick suite.
_NODES, _FILES = 24, 24
# They draw numbers.
_RANDOM = ("bernoulli", "dropout", "multinomial", "random")
# ONNX's own expansion gives Range a vector of one number, which the operator's definition does not allow.
# ONNX Runtime takes it as long as it does not know the shape.
_AGAINST_THE_SPECIFICATION = "affine_grid"


@functools.cache
def node_cases() -> dict[str, Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return {case.name: case for case in collect_testcases(None)}


def folders() -> dict[str, Path]:
    kinds = ("simple", "pytorch-operator", "pytorch-converted")
    return {f"{kind}/{path.name}": path for kind in kinds for path in sorted((DATA / kind).iterdir())}


def marked(names: list[str], one_in: int) -> list[Any]:
    return [n if i % one_in == 0 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(names)]


def tensors_of(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs with the parts of a sequence, which is a list, one by one."""
    found: dict[str, Array] = {}
    for name, value in outputs.items():
        parts = value if isinstance(value, list) else None
        found |= {name: value} if parts is None else {f"{name}[{n}]": part for n, part in enumerate(parts)}
    return found


def check(proto: onnx.ModelProto, feeds: list[Array]) -> None:
    """Same outputs to the bit where nothing is fused, else to rounding; or the model cannot be run at all."""
    model = ir.from_proto(proto)
    names = [value.name or "" for value in model.graph.inputs if value.name not in model.graph.initializers]
    given = dict(zip(names, feeds, strict=False))
    try:
        before = tensors_of(run(proto.SerializeToString(), given))
    except Exception as error:
        pytest.skip(f"ONNX Runtime cannot run it: {str(error)[:80]}")
    fused = 0
    for one in make_passes(PASSES):
        try:
            outcome = one(model)
        except PassError as error:
            pytest.fail(f"{one.name}: {error}")
        fused += outcome.changes.count * one.name.startswith(("fuse", "split"))
        content = serialized(model)
        after = tensors_of(run(content, given))
        close = {"rtol": 1e-5, "atol": 1e-6} if fused else {}
        # A sequence of tensors is a list.
        if any(array.dtype == np.float16 for array in before.values()):
            # Constants are folded in float16, where ONNX Runtime computes in float32 and rounds at the end.
            close = {"rtol": 2e-3, "atol": 1e-4}
        assert_same(before, after, **close)
    assert not load_pass("cleanup").create({})(model).modified or fused


def all_node_names() -> list[str]:
    left_out = (*_RANDOM, _AGAINST_THE_SPECIFICATION)
    return sorted(name for name in node_cases() if not any(word in name for word in left_out))


@pytest.mark.parametrize("name", marked(all_node_names(), _NODES))
def test_nodes(name: str) -> None:
    case = node_cases()[name]
    inputs, _ = case.data_sets[0]
    if any(not isinstance(value, np.ndarray | np.generic) for value in inputs):
        pytest.skip("sequences, maps and optionals are not fed here")
    check(case.model, [np.asarray(value) for value in inputs])


@pytest.mark.parametrize("name", marked(sorted(folders()), _FILES))
def test_models_from_files(name: str) -> None:
    folder = folders()[name]
    feeds = []
    data = folder / "test_data_set_0"
    for number in range(len(list(data.glob("input_*.pb")))):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString((data / f"input_{number}.pb").read_bytes())
            feeds.append(onnx.numpy_helper.to_array(tensor))
        except Exception:
            pytest.skip("sequences, maps and optionals are not fed here")
    check(onnx.load(folder / "model.onnx"), feeds)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((DATA / "light").glob("*.onnx")), ids=lambda path: path.stem)
def test_light_models(path: Path) -> None:
    """Real architectures with made-up weights."""
    proto = onnx.load(path)
    weights = {one.name for one in proto.graph.initializer}
    random = np.random.default_rng(0)
    feeds = []
    for value in proto.graph.input:
        if value.name not in weights:
            shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            feeds.append(random.standard_normal(shape).astype(np.float32))
    check(proto, feeds)
