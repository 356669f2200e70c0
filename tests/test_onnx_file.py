"""Files from strangers are refused with a reason; what is written can be read; failures leave no debris."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from onnxsmith import onnx_file
from onnxsmith.errors import (
    BadInputError,
    DestinationError,
    ModelFileError,
    OnnxsmithError,
)
from onnxsmith.onnx_file import check_model, load_model, save_model, weight_bytes

FLOAT = TensorProto.FLOAT


def value(name: str, shape: list[int] | None = None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, [4] if shape is None else shape)


def proto_of(
    nodes: list[onnx.NodeProto],
    *,
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] = ("y",),
    initializers: tuple[onnx.TensorProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [value(n) for n in inputs], [value(n) for n in outputs], list(initializers)
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def add_proto(**external: str) -> onnx.ModelProto:
    """x + w, with w of four floats: inline, or external with these entries."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4])
    if external:
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in external.items():
            tensor.external_data.add(key=key, value=text)
    else:
        tensor.raw_data = np.arange(4, dtype=np.float32).tobytes()
    return proto_of([helper.make_node("Add", ["x", "w"], ["y"], name="add")], initializers=(tensor,))


def write(directory: Path, proto: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = directory / name
    path.write_bytes(proto.SerializeToString())
    return path


def write_external(directory: Path, **external: str) -> Path:
    (directory / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    return write(directory, add_proto(**({"location": "w.bin"} | external)))


def refuses(directory: Path, proto: onnx.ModelProto, match: str) -> None:
    with pytest.raises(ModelFileError, match=match):
        load_model(write(directory, proto))


def weights(model: ir.Model) -> np.ndarray:
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# --- the file itself


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty: not an ONNX model, or truncated"),
        (b"hello, this is a text file\n" * 20, "not an ONNX model, or truncated"),
        (b"<!DOCTYPE html><html><body>404</body></html>", r"truncated \(it is an HTML page\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (bytes(100), "not an ONNX model"),
        (add_proto().SerializeToString()[:-40], "truncated"),
    ],
)
def test_content_that_is_no_model_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=match) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_missing_file_directory_and_fifo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nope\.onnx: cannot be read: No such file"):
        load_model(tmp_path / "nope.onnx")
    with pytest.raises(ModelFileError, match=r"it is a directory; expected an \.onnx file"):
        load_model(tmp_path)
    os.mkfifo(tmp_path / "fifo.onnx")
    with pytest.raises(ModelFileError, match="it is a FIFO"):
        load_model(tmp_path / "fifo.onnx")
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_model(Path("a\0b.onnx"))


def test_more_than_protobuf_can_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ModelFileError, match="2147483648 bytes; expected at most 2147483647"):
        load_model(path)


@pytest.mark.parametrize(
    ("field", "match"),
    [("graph", "not an ONNX model"), ("ir_version", "no ir_version"), ("opset_import", "no opset_import")],
)
def test_a_message_without_essentials_is_refused(tmp_path: Path, field: str, match: str) -> None:
    proto = add_proto()
    proto.ClearField(field)  # type: ignore[arg-type]
    refuses(tmp_path, proto, match)


def test_contradicting_opsets_are_refused(tmp_path: Path) -> None:
    proto = add_proto()
    proto.opset_import.add(domain="", version=3)
    refuses(tmp_path, proto, "opset_import names domain '' with versions 17 and 3")
    proto = add_proto()
    proto.opset_import.add(domain="other", version=0)
    refuses(tmp_path, proto, "opset version 0 of domain 'other'")


@pytest.mark.parametrize("text", ["add", "w", "model-producer"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, text: str) -> None:
    proto = add_proto()
    proto.producer_name = "model-producer"
    content = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    length = bytes([len(text)])
    path.write_bytes(content.replace(length + text.encode(), length + b"\xff" * len(text)))
    with pytest.raises(ModelFileError, match="not UTF-8"):
        load_model(path)


def test_what_onnx_ir_cannot_represent_is_refused_shortly(tmp_path: Path) -> None:
    proto = add_proto()
    proto.graph.value_info.add(name="x").type.map_type.key_type = TensorProto.INT64
    proto.graph.input[0].type.map_type.key_type = TensorProto.INT64
    refuses(tmp_path, proto, "onnx_ir cannot represent it: NotImplementedError: Map types")


# --- external data


@pytest.mark.parametrize(
    ("external", "match"),
    [
        ({"location": ""}, "without a location"),
        ({"location": "/etc/passwd"}, "leads out of the model's directory"),
        ({"location": "../w.bin"}, "leads out of the model's directory"),
        ({"location": "a/../../w.bin"}, "leads out of the model's directory"),
        ({"location": "..\\w.bin"}, "leads out of the model's directory"),
        ({"location": "C:\\w.bin"}, "leads out of the model's directory"),
        ({"location": "C:w.bin"}, "leads out of the model's directory"),
        ({"location": "\\\\host\\share\\w.bin"}, "leads out of the model's directory"),
        ({"location": "w\0.bin"}, "control characters"),
        ({"location": "missing.bin"}, "'missing.bin' cannot be read: No such file"),
        ({"location": "w" * 300}, "cannot be read: File name too long"),
        ({"location": "w.bin/x"}, "cannot be read: Not a directory"),
        ({"location": "."}, "is a directory; expected a regular file"),
        ({"offset": "-1"}, "external data offset '-1'"),
        ({"offset": "1_0"}, "external data offset '1_0'"),
        ({"offset": "٣"}, "external data offset"),
        ({"length": "1e3"}, "external data length '1e3'"),
        ({"offset": "9" * 30}, "external data offset '999"),
        ({"length": "12"}, r"length 12; expected 16 bytes for shape \[4\]"),
        ({"offset": "1"}, "at offset 1 with length 16, but 'w.bin' has 16 bytes"),
    ],
)
def test_hostile_external_data_is_refused(tmp_path: Path, external: dict[str, str], match: str) -> None:
    with pytest.raises(ModelFileError, match=match) as caught:
        load_model(write_external(tmp_path, **external))
    assert "initializer 'w'" in str(caught.value)


def test_external_data_entries_given_twice_are_refused(tmp_path: Path) -> None:
    write_external(tmp_path)
    proto = add_proto(location="w.bin")
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    refuses(tmp_path, proto, "two external data entries 'location'")


def test_external_strings_are_refused(tmp_path: Path) -> None:
    write_external(tmp_path)
    proto = add_proto(location="w.bin")
    proto.graph.initializer[0].data_type = TensorProto.STRING
    refuses(tmp_path, proto, "strings in external data")


@pytest.mark.filterwarnings("error")
def test_unknown_external_data_keys_are_ignored(tmp_path: Path) -> None:
    path = write_external(tmp_path, checksum="abc", basepath="/etc", __class__="x")
    np.testing.assert_array_equal(weights(load_model(path)), np.arange(4, dtype=np.float32))


def test_links_out_of_the_directory_are_refused_and_links_within_are_not(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    path = write_external(directory)
    (directory / "w.bin").rename(directory / "real.bin")
    (directory / "w.bin").symlink_to("real.bin")
    np.testing.assert_array_equal(weights(load_model(path)), np.arange(4, dtype=np.float32))

    (directory / "w.bin").unlink()
    (directory / "w.bin").symlink_to("/etc/passwd")
    with pytest.raises(ModelFileError, match=r"link that leads out of the model's directory.*`cp -rL`"):
        load_model(path)

    (directory / "w.bin").unlink()
    (directory / "w.bin").symlink_to("w.bin")
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_model(path)

    # A directory that is itself a link out, and one whose name only begins like the model's.
    (tmp_path / "model2").mkdir()
    (tmp_path / "model2" / "w.bin").write_bytes(bytes(16))
    (directory / "sub").symlink_to("../model2")
    with pytest.raises(ModelFileError, match="leads out"):
        load_model(write(directory, add_proto(location="sub/w.bin")))


def test_hard_links_are_refused(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    os.link(tmp_path / "w.bin", tmp_path / "other.bin")
    with pytest.raises(ModelFileError, match="2 hard links"):
        load_model(path)


def test_a_fifo_as_data_does_not_hang(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    (tmp_path / "w.bin").unlink()
    os.mkfifo(tmp_path / "w.bin")
    with pytest.raises(ModelFileError, match="is a FIFO"):
        load_model(path)


def test_external_data_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load_model(Path("model.onnx"))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(weights(model), np.arange(4, dtype=np.float32))


def test_external_tensors_without_length_and_empty_ones_can_be_read(tmp_path: Path) -> None:
    model = load_model(write_external(tmp_path, offset="0"))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.length == 16

    proto = add_proto(location="w.bin")
    proto.graph.initializer[0].dims[:] = [0, 4]
    assert weights(load_model(write(tmp_path, proto))).shape == (0, 4)


def test_packed_external_data_has_its_length_rounded_up(tmp_path: Path) -> None:
    proto = add_proto(location="w.bin", length="2")
    proto.graph.initializer[0].data_type = TensorProto.INT4
    proto.graph.initializer[0].dims[:] = [3]
    (tmp_path / "w.bin").write_bytes(bytes([0x21, 0x03]))
    assert weights(load_model(write(tmp_path, proto))).astype(int).tolist() == [1, 2, 3]
    proto.graph.initializer[0].external_data[1].value = "1"
    refuses(tmp_path, proto, "length 1; expected 2 bytes")


def test_loading_reads_no_weights(tmp_path: Path) -> None:
    size = 512 * 2**20
    proto = add_proto(location="w.bin")
    proto.graph.initializer[0].dims[:] = [size // 4]
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(size)
    path = write(tmp_path, proto)
    code = f"""
        import resource
        from pathlib import Path
        import onnx_ir
        from onnxsmith.onnx_file import load_model, weight_bytes
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert weight_bytes(load_model(Path({str(path)!r}))) == {size}
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    assert int(run(code).stdout) < 64 * 1024  # KiB


# --- inline tensors


def tensor_of(**fields: object) -> onnx.ModelProto:
    proto = add_proto()
    tensor = proto.graph.initializer[0]
    tensor.Clear()
    tensor.MergeFrom(TensorProto(**({"name": "w"} | fields)))  # type: ignore[arg-type]
    return proto


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"data_type": FLOAT, "dims": [-1], "raw_data": b"1234"}, r"shape \[-1\]; expected sizes of 0"),
        ({"data_type": FLOAT, "dims": [2**40, 2**40], "raw_data": b"1234"}, "absurdly large"),
        ({"data_type": FLOAT, "dims": [2**40, 2**40, 0]}, "absurdly large"),
        ({"data_type": FLOAT, "dims": [2**62]}, "absurdly large"),
        (
            {"data_type": FLOAT, "dims": [2**30], "raw_data": b"1234"},
            "4 bytes of raw_data; expected 4294967296",
        ),
        ({"data_type": FLOAT, "dims": [1] * 65, "raw_data": b"1234"}, "65 axes; expected at most 64"),
        ({"data_type": FLOAT, "dims": [4], "raw_data": bytes(15)}, "15 bytes of raw_data; expected 16"),
        ({"data_type": FLOAT, "dims": [4]}, "0 float_data; expected 4"),
        ({"data_type": FLOAT, "dims": [0], "raw_data": b"1234"}, "4 bytes of raw_data; expected 0"),
        ({"data_type": FLOAT, "dims": [2], "float_data": [1.0]}, "1 float_data; expected 2"),
        (
            {"data_type": FLOAT, "dims": [1], "int32_data": [1]},
            "data in int32_data; expected .* in float_data",
        ),
        (
            {"data_type": FLOAT, "dims": [1], "float_data": [1.0], "raw_data": b"1234"},
            "data in both float_data and raw_data",
        ),
        ({"data_type": FLOAT, "dims": [1], "float_data": [1.0], "raw_data": b""}, "data in both"),
        ({"data_type": TensorProto.STRING, "dims": [1], "raw_data": b"1"}, "data in raw_data"),
        ({"data_type": TensorProto.STRING, "dims": [2], "string_data": [b"1"]}, "1 string_data; expected 2"),
        ({"data_type": TensorProto.INT4, "dims": [3], "int32_data": [1, 2, 3]}, "3 int32_data; expected 2"),
        ({"data_type": TensorProto.COMPLEX64, "dims": [2], "float_data": [1.0, 2.0]}, "expected 4"),
        ({"data_type": 0, "dims": [1], "raw_data": b"1234"}, "unknown element type 0"),
        ({"data_type": 99, "dims": [1], "raw_data": b"1234"}, "unknown element type 99"),
        (
            {"data_type": FLOAT, "dims": [1], "raw_data": b"1234", "segment": TensorProto.Segment(begin=0)},
            "segment of another",
        ),
    ],
)
def test_hostile_inline_tensors_are_refused(tmp_path: Path, fields: dict[str, object], match: str) -> None:
    refuses(tmp_path, tensor_of(**fields), match)


@pytest.mark.parametrize("dtype", range(1, 29))
def test_every_element_type_is_sized_as_onnx_ir_sizes_it(tmp_path: Path, dtype: int) -> None:
    if dtype == TensorProto.STRING:
        load_model(write(tmp_path, tensor_of(data_type=dtype, dims=[3], string_data=[b"a", b"", b"c"])))
        return
    nbytes = -(-3 * ir.DataType(dtype).bitwidth // 8)
    model = load_model(write(tmp_path, tensor_of(data_type=dtype, dims=[3], raw_data=bytes(nbytes))))
    assert weights(model).shape == (3,)
    refuses(tmp_path, tensor_of(data_type=dtype, dims=[3], raw_data=bytes(nbytes + 1)), "bytes of raw_data")
    typed = {1: "float", 7: "int64", 11: "double", 12: "uint64", 13: "uint64", 14: "float", 15: "double"}
    count = {14: 6, 15: 6, 21: 2, 22: 2, 23: 2, 25: 1, 26: 1}.get(dtype, 3)
    field = f"{typed.get(dtype, 'int32')}_data"
    model = load_model(write(tmp_path, tensor_of(data_type=dtype, dims=[3], **{field: [0] * count})))
    assert weights(model).shape == (3,)


def test_tensors_are_checked_wherever_they_hide(tmp_path: Path) -> None:
    bad = TensorProto(name="t", data_type=FLOAT, dims=[2], raw_data=b"")
    evil = TensorProto(name="t", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    evil.external_data.add(key="location", value="/etc/passwd")
    for tensor, match in ((bad, "0 bytes of raw_data"), (evil, "leads out")):
        constant = helper.make_node("Constant", [], ["y"], name="c", value=tensor)
        refuses(tmp_path, proto_of([constant]), f"node 'c', attribute 'value'.*{match}")
        many = helper.make_node("Many", ["x"], ["y"], domain="local")
        many.attribute.add(name="ts", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
        refuses(tmp_path, proto_of([many]), match)
        refuses(tmp_path, proto_of([if_node([constant], ["y"])], inputs=("c",)), match)
        branch = helper.make_graph([], "b", [], [value("t")], [tensor])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch)
        refuses(
            tmp_path, proto_of([node], inputs=("c",)), f"attribute 'then_branch', initializer 't'.*{match}"
        )
        refuses(tmp_path, proto_of([call("f")], functions=(function("f", [constant]),)), match)
        default = function("f", [helper.make_node("Relu", ["a"], ["y"])])
        default.attribute_proto.add(name="d", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        refuses(tmp_path, proto_of([call("f")], functions=(default,)), match)


def test_sparse_tensors_are_refused_as_onnx_ir_would_drop_them(tmp_path: Path) -> None:
    proto = add_proto()
    proto.graph.sparse_initializer.add(dims=[4])
    refuses(tmp_path, proto, "1 sparse initializers")
    node = helper.make_node("Constant", [], ["y"], name="c")
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.dims[:] = [
        4
    ]
    refuses(tmp_path, proto_of([node]), "attribute 'sparse_value' is a sparse tensor")


# --- names, order, nesting


def relu(source: str, target: str, name: str = "") -> onnx.NodeProto:
    return helper.make_node("Relu", [source], [target], name=name)


def if_node(nodes: list[onnx.NodeProto], outputs: list[str], **names_of: str) -> onnx.NodeProto:
    branch = helper.make_graph(nodes, "branch", [], [value(n) for n in outputs])
    return helper.make_node("If", ["c"], ["out"], name="if", then_branch=branch, else_branch=branch)


def function(name: str, nodes: list[onnx.NodeProto], output: str = "y") -> onnx.FunctionProto:
    return helper.make_function("local", name, ["a"], [output], nodes, [helper.make_opsetid("", 17)])


def call(name: str, source: str = "x", target: str = "y") -> onnx.NodeProto:
    return helper.make_node(name, [source], [target], domain="local", name=f"call_{name}")


def scalar(name: str) -> onnx.TensorProto:
    return TensorProto(name=name, data_type=FLOAT, dims=[1], raw_data=b"1234")


@pytest.mark.parametrize(
    ("proto", "match"),
    [
        (
            proto_of([relu("x", "y")], initializers=(scalar("w"), scalar("w"))),
            "initializer 'w' is defined twice",
        ),
        (
            proto_of([relu("x", "y")], initializers=(scalar(""),)),
            "a initializer has no name|initializer has no",
        ),
        (proto_of([relu("x", "y")], inputs=("x", "x")), "graph input 'x' is defined twice"),
        (
            proto_of([relu("x", "y", "n"), relu("x", "y", "m")]),
            "'y' is defined twice, by node 'n' and by node 'm'",
        ),
        (proto_of([relu("x", "x")], outputs=("x",)), "'x' is defined twice, by an input or initializer"),
        (proto_of([relu("w", "w")], initializers=(scalar("w"),), outputs=("w",)), "'w' is defined twice"),
        (proto_of([helper.make_node("Split", ["x"], ["y", "y"])]), "'y' is defined twice"),
        (proto_of([relu("nowhere", "y", "n")]), "node 'n' uses value 'nowhere', which no node"),
        (proto_of([relu("nowhere", "y")]), r"node #0 \('Relu'\) uses value 'nowhere'"),
        (proto_of([relu("x", "z")]), "graph output 'y' is not produced by any node"),
        (proto_of([relu("x", "z")], outputs=("",)), "graph output '' is not produced"),
        (
            proto_of([relu("z", "y", "second"), relu("x", "z", "first")]),
            "not sorted: node 'second' uses value 'z' before node 'first' produces it",
        ),
        (
            proto_of([relu("x", "s", "start"), relu("b", "a", "n"), relu("a", "b", "m"), relu("b", "y")]),
            "cycle: 'n' -> 'm' -> 'n'",
        ),
        (proto_of([relu("y", "y", "self")]), "cycle: 'self' -> 'self'"),
        (proto_of([helper.make_node("", ["x"], ["y"])]), "has no op_type"),
        (
            proto_of(
                [relu("x", "out2"), if_node([relu("x", "x2"), relu("x2", "c")], ["c"])], inputs=("c", "x")
            ),
            "output 'c' redefines a value of an outer graph",
        ),
        (
            proto_of([relu("x", "t"), if_node([relu("x", "t")], ["t"])], inputs=("c", "x"), outputs=("out",)),
            "output 't' redefines a value of an outer graph",
        ),
        (
            proto_of([if_node([], ["x"])], inputs=("c", "x"), outputs=("out",)),
            "'x' is a value of an outer graph",
        ),
        (
            proto_of(
                [if_node([relu("late", "t", "inner")], ["t"]), relu("x", "late", "producer")],
                inputs=("c", "x"),
                outputs=("out",),
            ),
            "node 'inner' uses value 'late' before node 'producer' produces it",
        ),
        (
            proto_of(
                [if_node([relu("late", "t", "inner")], ["t"]), relu("out", "late", "producer")],
                inputs=("c",),
                outputs=("out",),
            ),
            "cycle: 'if' -> 'producer' -> 'if'",
        ),
        (
            proto_of([call("f")], functions=(function("f", [relu("a", "y")]),) * 2),
            "function 'f' of domain 'local', overload '', is defined twice",
        ),
        (proto_of([call("f")], functions=(function("f", [call("f", "a")]),)), "cycle: 'f' -> 'f'"),
        (
            proto_of(
                [call("f")], functions=(function("f", [call("g", "a")]), function("g", [call("f", "a")]))
            ),
            "functions call each other in a cycle: 'f' -> 'g' -> 'f'",
        ),
        (
            proto_of([call("f")], functions=(function("f", [relu("x", "y")]),)),
            "function 'f': node .* uses value 'x'",
        ),
        (
            proto_of([call("f")], functions=(function("f", [relu("a", "z")]),)),
            "function 'f': graph output 'y'",
        ),
    ],
)
def test_broken_structure_is_refused(tmp_path: Path, proto: onnx.ModelProto, match: str) -> None:
    refuses(tmp_path, proto, match)


def test_recursion_through_a_subgraph_is_found(tmp_path: Path) -> None:
    branch = helper.make_graph([call("f", "a", "z")], "b", [], [value("z")])
    body = helper.make_node("If", ["a"], ["y"], then_branch=branch, else_branch=branch)
    refuses(tmp_path, proto_of([call("f")], functions=(function("f", [body]),)), "cycle: 'f' -> 'f'")


def test_attributes_given_twice_or_without_type_are_refused(tmp_path: Path) -> None:
    node = relu("x", "y", "n")
    node.attribute.add(name="a", type=onnx.AttributeProto.INT, i=1)
    node.attribute.add(name="a", type=onnx.AttributeProto.INT, i=2)
    refuses(tmp_path, proto_of([node]), "node 'n': attribute 'a' is given twice")
    node = relu("x", "y", "n")
    node.attribute.add(name="a", i=1)
    refuses(tmp_path, proto_of([node]), "attribute 'a' has no type")


def nested(levels: int) -> bytes:
    """A model with graphs inside each other, made of bytes because protobuf refuses to build it."""

    def field(number: int, content: bytes) -> bytes:
        length, size = bytearray(), len(content)
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *length, size]) + content

    content = proto_of([relu("x", "v0")], inputs=(), outputs=("v0",)).graph.SerializeToString()
    for level in range(levels):
        node = helper.make_node("If", ["c"], [f"v{level + 1}"]).SerializeToString()
        attribute = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH)
        node += field(5, attribute.SerializeToString() + field(6, content))
        content = onnx.GraphProto(output=[value(f"v{level + 1}")]).SerializeToString() + field(1, node)
    proto = proto_of([], inputs=("c", "x"), outputs=())
    content += proto.graph.SerializeToString()
    proto.ClearField("graph")
    return proto.SerializeToString() + field(7, content)


def test_nesting_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(nested(20))
    assert len(list(load_model(path).graphs())) == 21
    for levels, match in ((28, "too deeply; expected at most 24"), (40, "too deeply for protobuf; expected")):
        path.write_bytes(nested(levels))
        with pytest.raises(ModelFileError, match=match):
            load_model(path)


def test_siblings_may_use_the_same_names(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, rich_proto()))
    assert len(list(model.graphs())) == 3
    check_model(tmp_path / "model.onnx")


def chain(count: int) -> onnx.ModelProto:
    return proto_of(
        [relu(f"v{i}", f"v{i + 1}", f"n{i}") for i in range(count)], inputs=("v0",), outputs=(f"v{count}",)
    )


def test_a_hundred_thousand_nodes_load_in_seconds(tmp_path: Path) -> None:
    count = 100_000
    proto = chain(count)
    path = write(tmp_path, proto)
    started = time.perf_counter()
    assert len(load_model(path).graph) == count
    assert (
        time.perf_counter() - started < 60
    )  # 5 on the machine this was written on; quadratic would be hours

    proto.graph.node[0].input[0] = f"v{count}"
    started = time.perf_counter()
    with pytest.raises(ModelFileError, match=r"cycle: 'n0' -> .* more\) .* -> 'n0'") as caught:
        load_model(write(tmp_path, proto))
    assert time.perf_counter() - started < 60
    assert len(str(caught.value)) < 1000


def test_a_long_cycle_of_functions_is_found_without_recursion(tmp_path: Path) -> None:
    count = 5000
    functions = tuple(function(f"f{i}", [call(f"f{(i + 1) % count}", "a")]) for i in range(count))
    refuses(tmp_path, proto_of([call("f0")], functions=functions), "functions call each other in a cycle")


def test_contrib_operators_load(tmp_path: Path) -> None:
    proto = proto_of([helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft", made_up=3)])
    proto.opset_import.add(domain="com.microsoft", version=1)
    path = write(tmp_path, proto)
    assert load_model(path).graph[0].domain == "com.microsoft"
    check_model(path)


def test_check_model_accepts_what_the_runtime_has_in_the_standard_domain(tmp_path: Path) -> None:
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "w"], ["y"], axis=-1, epsilon=1e-5)
    path = write(tmp_path, proto_of([node], initializers=(scalar("w"),)))
    check_model(path)
    assert not onnx.defs.has("SimplifiedLayerNormalization")


def test_check_model_repeats_what_the_checker_said(tmp_path: Path) -> None:
    path = write(tmp_path, proto_of([helper.make_node("NoSuchOperator", ["x"], ["y"])]))
    load_model(path)
    with pytest.raises(ModelFileError, match=r"onnx\.checker refuses the model: .*NoSuchOperator"):
        check_model(path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        check_model(tmp_path / "nope.onnx")


def test_every_model_that_onnx_ships_loads_or_is_refused_with_a_reason() -> None:
    models = sorted(Path(onnx.__file__).parent.rglob("*.onnx"))
    assert len(models) > 50
    for path in models:
        assert len(load_model(path).graph.outputs) > 0


# --- fuzzing


@pytest.fixture(scope="module")
def fuzz_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    model = ir.serde.deserialize_model(rich_proto())
    save_model(model, directory / "seed.onnx", inline_limit_bytes=0)
    assert names(directory) == ["seed.onnx", "seed.onnx.data"]
    return directory


@settings(max_examples=600, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_are_refused(fuzz_directory: Path, data: st.DataObject) -> None:
    content = bytearray((fuzz_directory / "seed.onnx").read_bytes())
    positions = st.integers(0, len(content) - 1)
    for position, byte in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)), max_size=6)):
        content[position] = byte
    content = content[: data.draw(st.none() | positions)]
    path = fuzz_directory / "fuzzed.onnx"
    path.write_bytes(content)
    try:
        model = load_model(path)
    except BadInputError:
        return
    # What was accepted can also be used.
    for value_ in model.graph.initializers.values():
        if value_.const_value is not None and value_.const_value.dtype != ir.DataType.STRING:
            value_.const_value.tobytes()
    weight_bytes(model)


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(fuzz_directory: Path, content: bytes) -> None:
    path = fuzz_directory / "random.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        load_model(path)


# --- writing


def rich_proto() -> onnx.ModelProto:
    """Subgraphs with weights of their own, a function with a constant, large and small weights."""
    proto = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        g (float[600] x, bool c) => (float[600] y) {
            a = Add (x, big)
            b = If (c) <
                then_branch = t () => (float[600] r) { r = Mul (a, inner) },
                else_branch = e () => (float[600] r) { r = local.f (a) }
            >
            y = Add (b, small)
        }
        <domain: "local", opset_import: ["" : 17]>
        f (v) => (o) {
            k = Constant <value = float[1] {2.0}> ()
            o = Mul (v, k)
        }
    """)
    rng = np.random.default_rng(0)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.random(600, np.float32), "big"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.random(1, np.float32), "small"))
    inner = proto.graph.node[1].attribute[0].g
    assert inner.name == "t"
    inner.initializer.append(onnx.numpy_helper.from_array(rng.random(600, np.float32), "inner"))
    return proto


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


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30])
def test_a_full_disk_leaves_the_previous_files_and_no_debris(tmp_path: Path, inline_limit_bytes: int) -> None:
    path = tmp_path / "m.onnx"
    save_model(model_of(w=float_tensor()), path, inline_limit_bytes=0)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    result = run(f"""
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
    assert run(code).stdout.strip() == "set()"
