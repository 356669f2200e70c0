"""Graphs from strangers: names, order, nesting and damage are refused with a reason."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from onnx_protos import (
    call,
    function,
    if_node,
    names,
    proto_of,
    refuses,
    relu,
    rich_proto,
    scalar,
    value,
    write,
)
from onnxsmith.errors import BadInputError, ModelFileError
from onnxsmith.onnx_file import check_model, load_model, save_model, weight_bytes


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
