"""What is written can be read, and failures leave no debris."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnx_protos import (
    FLOAT,
    add_proto,
    call,
    function,
    names,
    proto_of,
    rich_proto,
    run_python,
    value,
    weights,
    write,
    write_external,
)
from onnxsmith import onnx_file
from onnxsmith.errors import DestinationError, ModelFileError, OnnxsmithError
from onnxsmith.onnx_file import check_model, load_model, save_model, weight_bytes


def model_of(**tensors: ir.TensorProtocol) -> ir.Model:
    initializers = [
        ir.Value(name=n, const_value=t, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape))
        for n, t in tensors.items()
    ]
    outputs = [ir.Value(name=f"{v.name}_out") for v in initializers]
    nodes = [ir.Node("", "Identity", [v], outputs=[o]) for v, o in zip(initializers, outputs, strict=True)]
    for v, o in zip(initializers, outputs, strict=True):
        o.type, o.shape = v.type, v.shape
    graph = ir.Graph([], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def float_tensor(count: int = 1000, start: int = 0) -> ir.Tensor:
    return ir.Tensor(np.arange(start, start + count, dtype=np.float32))


DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "bool": np.bool_,
    "int64": np.int64,
    "float8": ml_dtypes.float8_e4m3fn,
}


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_weights_survive_the_round_trip(tmp_path: Path, dtype: str, inline_limit_bytes: int) -> None:
    array = np.random.default_rng(0).integers(0, 8, (51, 101)).astype(DTYPES[dtype])
    path = tmp_path / "model.onnx"
    model = model_of(odd=ir.Tensor(array[:1, :3]), w=ir.Tensor(array))
    written = save_model(model, path, inline_limit_bytes=inline_limit_bytes)
    assert written == sum(entry.stat().st_size for entry in tmp_path.iterdir())
    assert (tmp_path / "model.onnx.data").exists() == (inline_limit_bytes == 0)
    loaded = load_model(path)
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    assert isinstance(tensor, ir.ExternalTensor) == (inline_limit_bytes == 0)
    assert tensor.dtype == ir.DataType.from_numpy(array.dtype)
    np.testing.assert_array_equal(tensor.numpy().astype(np.float32), array.astype(np.float32))
    check_model(path)


def test_strings_stay_in_the_graph_file(tmp_path: Path) -> None:
    strings = ir.StringTensor(np.array([[b"a" * 3000, b"", "ü".encode()]], dtype=object))
    lazy = ir.LazyTensor(lambda: strings, ir.DataType.STRING, ir.Shape([1, 3]))
    save_model(model_of(s=strings, f=float_tensor()), tmp_path / "m.onnx", inline_limit_bytes=0)
    loaded = load_model(tmp_path / "m.onnx").graph.initializers["s"].const_value
    assert loaded is not None
    assert loaded.numpy().ravel().tolist() == [b"a" * 3000, b"", "ü".encode()]
    save_model(model_of(s=lazy), tmp_path / "m2.onnx")
    again = load_model(tmp_path / "m2.onnx").graph.initializers["s"].const_value
    assert again is not None
    assert again.numpy().ravel().tolist() == [b"a" * 3000, b"", "ü".encode()]


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30])
def test_subgraphs_and_functions_survive_and_saving_is_deterministic(
    tmp_path: Path, inline_limit_bytes: int
) -> None:
    model = load_model(write(tmp_path, rich_proto(), "source.onnx"))
    assert weight_bytes(model) == 600 * 4 * 2 + 4
    first, second = tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"
    for path in (first, second):
        path.parent.mkdir()
        save_model(model, path, inline_limit_bytes=inline_limit_bytes)
        check_model(path)
    assert names(first.parent) == names(second.parent)
    for name in names(first.parent):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    loaded = load_model(first)
    for before, after in zip(model.graphs(), loaded.graphs(), strict=True):
        assert list(before.initializers) == list(after.initializers)
        for name, value_ in before.initializers.items():
            expected, got = value_.const_value, after.initializers[name].const_value
            assert expected is not None
            assert got is not None
            np.testing.assert_array_equal(got.numpy(), expected.numpy())
    assert [f.name for f in loaded.functions.values()] == ["f"]
    # And again from what was mapped, elsewhere.
    third = tmp_path / "c" / "m.onnx"
    third.parent.mkdir()
    save_model(loaded, third, inline_limit_bytes=inline_limit_bytes)
    for name in names(first.parent):
        assert (first.parent / name).read_bytes() == (third.parent / name).read_bytes()


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30])
def test_onnxruntime_computes_the_same_before_and_after(tmp_path: Path, inline_limit_bytes: int) -> None:
    ort = pytest.importorskip("onnxruntime")
    source = write(tmp_path, rich_proto(), "source.onnx")
    target = tmp_path / "target.onnx"
    save_model(load_model(source), target, inline_limit_bytes=inline_limit_bytes)
    for condition in (True, False):
        feeds = {"x": np.linspace(-1, 1, 600, dtype=np.float32), "c": np.array(condition)}
        outputs = [
            ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
            for path in (source, target)
        ]
        assert np.abs(outputs[0]).max() > 0
        np.testing.assert_array_equal(*outputs)


def test_external_tensors_in_attributes_and_functions_move_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    array = np.arange(600, dtype=np.float32)
    (source / "w.bin").write_bytes(array.tobytes())
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[600], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    constant = helper.make_node("Constant", [], ["y"], value=tensor)
    listed = helper.make_node("Listed", [], ["z"], domain="local")
    listed.attribute.add(name="ts", type=onnx.AttributeProto.TENSORS).tensors.extend([tensor, tensor])
    branch = helper.make_graph([], "b", [], [value("t")], [tensor])
    body = helper.make_node("If", ["a"], ["r"], then_branch=branch, else_branch=branch)
    proto = proto_of(
        [constant, listed, call("f", target="q"), call("g", target="p")],
        functions=(function("f", [constant]), function("g", [body], output="r")),
    )
    model = load_model(write(source, proto))
    for limit in (0, 2**30):
        target = tmp_path / f"limit{limit}"
        target.mkdir()
        save_model(model, target / "m.onnx", inline_limit_bytes=limit)
        assert names(target) == (["m.onnx", "m.onnx.data"] if limit == 0 else ["m.onnx"])
        if limit == 0:
            assert (target / "m.onnx.data").stat().st_size == 2400  # six uses, one copy
        loaded = load_model(target / "m.onnx")
        nodes = {node.op_type: node for node in loaded.graph}
        in_function = {f.name: f for f in loaded.functions.values()}
        found = [
            nodes["Constant"].attributes["value"].as_tensor(),
            *nodes["Listed"].attributes["ts"].as_tensors(),
            in_function["f"][0].attributes["value"].as_tensor(),
            in_function["g"][0].attributes["then_branch"].as_graph().initializers["t"].const_value,
        ]
        for got in found:
            assert got is not None
            np.testing.assert_array_equal(got.numpy(), array)
    assert weight_bytes(model) == 2400


def test_shared_weights_are_counted_and_written_once(tmp_path: Path) -> None:
    tensor = float_tensor()
    model = model_of(a=tensor, b=tensor, c=float_tensor(start=5))
    assert weight_bytes(model) == 8000
    save_model(model, tmp_path / "m.onnx", inline_limit_bytes=0)
    assert (tmp_path / "m.onnx.data").stat().st_size == 4096 + 4000
    loaded = load_model(tmp_path / "m.onnx")
    assert weight_bytes(loaded) == 8000
    offsets = [v.const_value.offset for v in loaded.graph.initializers.values()]  # type: ignore[union-attr]
    assert offsets == [0, 0, 4096]


@pytest.mark.parametrize(("ahead_bytes", "most"), [(4000, 2), (3999, 1)])
def test_few_lazy_weights_are_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_bytes: int, most: int
) -> None:
    monkeypatch.setattr("onnxsmith._onnx_write._AHEAD_BYTES", ahead_bytes)
    alive: list[int] = []

    class Counted(np.ndarray):
        def __del__(self) -> None:
            if self.base is None:
                alive.pop()

    def make(number: int) -> Callable[[], ir.Tensor]:
        def compute() -> ir.Tensor:
            array = Counted((1000,), np.float32)
            array[:] = number
            alive.append(number)
            peaks.append(len(alive))
            return ir.Tensor(array)

        return compute

    peaks: list[int] = []
    shape = ir.Shape([1000])
    model = model_of(**{f"w{i}": ir.LazyTensor(make(i), ir.DataType.FLOAT, shape) for i in range(50)})
    before = [v.const_value for v in model.graph.initializers.values()]
    save_model(model, tmp_path / "m.onnx", inline_limit_bytes=0)
    assert len(peaks) == 50
    assert max(peaks) <= most
    assert [v.const_value for v in model.graph.initializers.values()] == before
    for i, v in enumerate(load_model(tmp_path / "m.onnx").graph.initializers.values()):
        assert v.const_value is not None
        assert v.const_value.numpy()[7] == i


def test_the_hash_of_the_data_file_is_known_once_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Above that size a tensor is hashed before the next is computed; some are above it, some below.
    monkeypatch.setattr("onnxsmith._onnx_write._AHEAD_BYTES", 5000)

    def lazy(count: int) -> ir.LazyTensor:
        return ir.LazyTensor(lambda: float_tensor(count, start=count), ir.DataType.FLOAT, ir.Shape([count]))

    model = model_of(**{f"w{i}": lazy(900 + 137 * i) for i in range(9)}, plain=float_tensor(5000))
    hashes: dict[Path, str] = {}
    save_model(model, tmp_path / "m.onnx", inline_limit_bytes=0, hashes=hashes)
    data = tmp_path / "m.onnx.data"
    assert hashes == {data: hashlib.sha256(data.read_bytes()).hexdigest()}

    # What is only copied from another file is not read; and what has no data file has no hash.
    for source, limit in ((load_model(tmp_path / "m.onnx"), 0), (model, 2**30)):
        hashes = {}
        save_model(source, tmp_path / "other.onnx", inline_limit_bytes=limit, hashes=hashes)
        assert hashes == {}


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30])
def test_saving_over_the_mapped_files_does_not_corrupt(tmp_path: Path, inline_limit_bytes: int) -> None:
    path = tmp_path / "m.onnx"
    save_model(model_of(a=float_tensor(), w=float_tensor(start=7)), path, inline_limit_bytes=0)
    model = load_model(path)
    other = model.clone()
    # The second weight moves, because the first one grows; a third hides the file behind a function.
    mapped = model.graph.initializers["w"].const_value
    assert isinstance(mapped, ir.ExternalTensor)
    model.graph.initializers["a"].const_value = float_tensor(3000)
    hiding = ir.LazyTensor(lambda: mapped, mapped.dtype, mapped.shape)
    model.graph.register_initializer(ir.Value(name="lazy", const_value=hiding))
    save_model(model, path, inline_limit_bytes=inline_limit_bytes)

    expected = np.arange(7, 1007, dtype=np.float32)
    for present in (model, load_model(path)):
        for name in ("w", "lazy"):
            tensor = present.graph.initializers[name].const_value
            assert tensor is not None
            np.testing.assert_array_equal(np.frombuffer(tensor.tobytes(), np.float32), expected)
    stale = other.graph.initializers["w"].const_value
    assert stale is mapped
    if inline_limit_bytes == 0:
        with pytest.raises(ValueError, match="invalidated"):
            stale.numpy()
        with pytest.raises(ModelFileError, match=r"invalidated.*Load the model again"):
            save_model(other, tmp_path / "other.onnx")
    else:
        # The data file was not replaced, so what maps it goes on.
        np.testing.assert_array_equal(stale.numpy(), expected)
    # Saving once more, from the files just written.
    before = path.read_bytes()
    save_model(model, path, inline_limit_bytes=inline_limit_bytes)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_destinations_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    model = model_of(w=float_tensor())
    with pytest.raises(DestinationError, match=r"there is no directory .*Create it first"):
        save_model(model, tmp_path / "nope" / "m.onnx")
    (tmp_path / "dir.onnx").mkdir()
    (tmp_path / "m.onnx.data").mkdir()
    for path in (tmp_path / "dir.onnx", tmp_path / "m.onnx"):
        with pytest.raises(DestinationError, match="it is a directory"):
            save_model(model, path)
    with pytest.raises(DestinationError, match="cannot be written: File name too long"):
        save_model(model, tmp_path / ("n" * 300))
    for name in ("", ".", "..", "a/b", "a\\b", "/a", "k.onnx", "a\nb"):
        with pytest.raises(DestinationError, match="external data name"):
            save_model(model, tmp_path / "k.onnx", external_data_name=name)
    assert names(tmp_path) == ["dir.onnx", "m.onnx.data"]
    with pytest.raises(DestinationError, match=r"/proc/m\.onnx: cannot be written"):
        save_model(model, Path("/proc/m.onnx"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission_is_a_destination_error(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(DestinationError, match="Permission denied"):
        save_model(model_of(w=float_tensor()), locked / "m.onnx")


def test_the_data_file_may_have_another_name(tmp_path: Path) -> None:
    save_model(
        model_of(w=float_tensor()),
        tmp_path / "m.onnx",
        external_data_name="weights.bin",
        inline_limit_bytes=0,
    )
    assert names(tmp_path) == ["m.onnx", "weights.bin"]
    assert weights(load_model(tmp_path / "m.onnx"))[999] == 999


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30])
def test_a_full_disk_leaves_the_previous_files_and_no_debris(tmp_path: Path, inline_limit_bytes: int) -> None:
    path = tmp_path / "m.onnx"
    save_model(model_of(w=float_tensor()), path, inline_limit_bytes=0)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    result = run_python(f"""
        import resource
        from pathlib import Path
        import numpy as np
        import onnx_ir as ir
        from onnxsmith.errors import ResourceError
        from onnxsmith.onnx_file import load_model, save_model
        model = load_model(Path({str(path)!r}))
        model.graph.initializers["w"].const_value = ir.Tensor(np.ones(10**6, np.float32))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_model(model, Path({str(path)!r}), inline_limit_bytes={inline_limit_bytes})
        except ResourceError as error:
            print(error)
    """)
    assert "m.onnx: cannot be written: File too large; expected room for about 4000" in result.stdout
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_weight_that_cannot_be_computed_leaves_no_debris(tmp_path: Path) -> None:
    def fail() -> ir.Tensor:
        raise RuntimeError("no such weight")

    lazy = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([1000]))
    model = model_of(a=float_tensor(), w=lazy)
    with pytest.raises(RuntimeError, match="no such weight"):
        save_model(model, tmp_path / "m.onnx", inline_limit_bytes=0)
    assert names(tmp_path) == []
    assert model.graph.initializers["w"].const_value is lazy

    wrong = ir.LazyTensor(float_tensor, ir.DataType.FLOAT, ir.Shape([999]))
    for limit in (0, 2**30):
        with pytest.raises(OnnxsmithError, match="it gave 4000 bytes; expected 3996"):
            save_model(model_of(w=wrong), tmp_path / "m.onnx", inline_limit_bytes=limit)
    assert names(tmp_path) == []


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30])
def test_weights_that_were_cut_since_loading_are_reported(tmp_path: Path, inline_limit_bytes: int) -> None:
    model = load_model(write_external(tmp_path))
    proto = add_proto(location="w.bin")
    proto.graph.initializer[0].dims[:] = [4000]
    (tmp_path / "w.bin").write_bytes(bytes(16000))
    model = load_model(write(tmp_path, proto))
    os.truncate(tmp_path / "w.bin", 100)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ModelFileError, match=r"w\.bin: the data of tensor 'w' cannot be read"):
        save_model(model, target / "m.onnx", inline_limit_bytes=inline_limit_bytes)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelFileError, match="No such file"):
        save_model(model, target / "m.onnx", inline_limit_bytes=inline_limit_bytes)
    assert names(target) == []


def test_a_failure_between_the_two_files_restores_both(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_model(model_of(w=float_tensor()), path, inline_limit_bytes=0)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    staging, old = tmp_path / "staging", tmp_path / "old"
    staging.mkdir()
    old.mkdir()
    (staging / "m.onnx.data").write_bytes(b"new")
    staged = [(staging / "m.onnx.data", tmp_path / "m.onnx.data"), (staging / "missing", path)]
    with pytest.raises(FileNotFoundError):
        onnx_file._publish(staged, old)
    for directory in (staging, old):
        directory.rmdir()
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_model_that_cannot_be_serialised_is_reported(tmp_path: Path) -> None:
    model = model_of(w=float_tensor())
    model.graph.outputs[0].name = None
    with pytest.raises(OnnxsmithError, match="the model cannot be serialised"):
        save_model(model, tmp_path / "m.onnx")
    assert names(tmp_path) == []


def test_importing_the_module_imports_neither_onnx_nor_numpy() -> None:
    code = (
        "import onnxsmith.onnx_file, sys; print({'onnx', 'onnx_ir', 'numpy', 'torch'} & sys.modules.keys())"
    )
    assert run_python(code).stdout.strip() == "set()"
