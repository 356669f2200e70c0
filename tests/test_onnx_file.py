"""Model files and weights from strangers: what is read, and what is refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path

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
    if_node,
    proto_of,
    refuses,
    run_python,
    value,
    weights,
    write,
    write_external,
)
from onnxsmith.errors import ModelFileError
from onnxsmith.onnx_file import load_model


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
    assert int(run_python(code).stdout) < 64 * 1024  # KiB


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
