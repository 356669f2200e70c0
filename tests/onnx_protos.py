"""Small models as messages, whole and broken, and how the tests of model files write and refuse them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, parser

from onnxsmith.errors import ModelFileError
from onnxsmith.onnx_file import load_model

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


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
