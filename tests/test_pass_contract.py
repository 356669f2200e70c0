"""The contract of passes: whole or not at all, parameters that are checked, and a report of what was done."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest

from generated_graphs import graph, serialized
from onnxsmith.errors import BadInputError, MissingDependencyError, PassError, ResourceError, UnknownNameError
from onnxsmith.graph_passes import PASSES, load_pass, run_passes
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.package import Component, ModelPackage

TEXT = """<ir_version: 9, opset_import: ["": 18, "local": 1], producer_name: "us", model_version: 3,
  metadata_props: ["key": "value"]>
g (bool c, float[2, 2] x) => (float[2, 2] y) <float[2, 2] d = {1.0, 2.0, 3.0, 4.0}> {
  [first] k = Constant<value = float[2, 2] {1.0, 1.0, 1.0, 1.0}>()
  [call] z = local.twice(x)
  [branch] p = If(c) <then_branch = a () => (float[2, 2] q) { q = Add(z, d) },
                      else_branch = b () => (float[2, 2] r) { r = Mul(z, k) }>
  [last] y = Add(p, w)
}
<domain: "local", opset_import: ["": 18]> twice (i) => (o) { o = Add(i, i) }"""


def model() -> ir.Model:
    return graph(TEXT, w=np.ones((2, 2), np.float32))


class Vandal(GraphPass):
    """Changes everything that there is to change, then raises."""

    name: ClassVar[str] = "vandal"
    summary: ClassVar[str] = "break things"
    error: ClassVar[BaseException] = ValueError("half way")

    def apply(self, model: ir.Model) -> Changes:
        main = model.graph
        model.ir_version, model.producer_name, model.doc_string = 3, "them", "gone"
        model.opset_imports["other"] = 7
        model.metadata_props["key"] = "other"
        model.metadata_props["more"] = "x"
        main.initializers["w"].name = "renamed"
        main.initializers["renamed"].const_value = ir.tensor(np.zeros((2, 2), np.float32))
        main.initializers["d"].dtype = ir.DataType.FLOAT16
        main.initializers["d"].const_value.name = "odd"  # type: ignore[union-attr]
        main.inputs[1].shape = ir.Shape([5, 5])
        main.inputs[1].metadata_props["a"] = "b"
        for inner in model.graph.subgraphs():
            inner[0].outputs[0].name = "inner_renamed"
            inner[0].op_type = "Sub"
        for node in main:
            node.name = f"x_{node.name}"
            if node.op_type == "Constant":
                node.attributes["value"].as_tensor().name = "odd_too"
        for function in model.functions.values():
            function.append(ir.node("Identity", [function.inputs[0]]))
        model.functions.clear()
        main.outputs.clear()
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ValueError("half way"), PassError, r"pass vandal: ValueError: half way\. The model is unchanged"),
        (RuntimeError(""), PassError, "pass vandal: RuntimeError: no message"),
        (MemoryError("40 GB"), ResourceError, "pass vandal: ran out of memory: MemoryError: 40 GB"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (SystemExit(3), SystemExit, "3"),
        (BadInputError("here", got="something"), BadInputError, "here: something"),
    ],
)
def test_a_pass_that_fails_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException], message: str
) -> None:
    monkeypatch.setattr(Vandal, "error", error)
    one = model()
    main, tensor = one.graph, one.graph.initializers["w"].const_value
    before = serialized(one)
    with pytest.raises(raised, match=message):
        Vandal()(one)
    assert serialized(one) == before
    assert one.graph is main
    assert one.graph.initializers["w"].const_value is tensor


def test_control_the_vandal_does_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model()
    before = serialized(one)
    with pytest.raises(ValueError, match="half way"):
        Vandal().apply(one)
    assert serialized(one) != before


def test_a_failure_deep_inside_shows_its_root_and_is_short() -> None:
    class Nested(Vandal):
        name = "nested"

        def apply(self, model: ir.Model) -> Changes:
            try:
                raise KeyError("x" * 2000)
            except KeyError as cause:
                raise RuntimeError("wrapped") from cause

    with pytest.raises(PassError, match="pass nested: KeyError: 'xxx") as caught:
        Nested()(model())
    assert len(str(caught.value)) < 500


class Rename(GraphPass):
    """Renames the first node."""

    name: ClassVar[str] = "rename"
    summary: ClassVar[str] = "rename"

    def __init__(
        self,
        *,
        to: str = "renamed",
        count: int = 1,
        mode: Literal["a", "b", 3] = "a",
        deep: bool = False,
        names: tuple[str, ...] = (),
    ) -> None:
        self.to, self.count, self.mode, self.deep, self.names = to, count, mode, deep, names

    def apply(self, model: ir.Model) -> Changes:
        model.graph[0].name = self.to
        return Changes(self.count, {"to": self.to}, {"other": "why not"})


def test_success_keeps_the_model_object_and_the_tensors() -> None:
    one = model()
    tensor = one.graph.initializers["w"].const_value
    outcome = Rename()(one)
    assert outcome.model is one
    assert outcome.modified
    assert one.graph[0].name == "renamed"
    assert one.graph.initializers["w"].const_value is tensor


def test_what_cannot_fail_half_way_works_without_a_copy() -> None:
    at_once = {name for name in PASSES if load_pass(name).changes_at_once}
    assert at_once == {"strip_metadata", "lower_opset", "lower_ir_version"}
    for name in at_once:
        one = graph('<ir_version: 13, opset_import: ["": 20]> g (float[m] x) => (float[m] y) { y = Tanh(x) }')
        one.doc_string = "what it is"
        main, node = one.graph, one.graph[0]
        assert load_pass(name)()(one).modified, name
        assert one.graph is main
        assert one.graph[0] is node
        assert not load_pass(name)()(one).modified, name


class NodeOfFixedName(GraphPass):
    """Puts a node of one name before the first, as passes do that add a few nodes."""

    name: ClassVar[str] = "node_of_fixed_name"
    summary: ClassVar[str] = "add a node"

    def apply(self, model: ir.Model) -> Changes:
        given = model.graph.inputs[1]
        node = ir.node("Neg", [given], name="lengths_of_rows")
        node.outputs[0].type, node.outputs[0].shape = given.type, given.shape
        given.replace_all_uses_with(node.outputs[0])
        node.replace_input_with(0, given)
        model.graph.insert_before(model.graph[0], node)
        return Changes(1)


def test_nodes_that_passes_name_alike_get_names_of_their_own() -> None:
    """ONNX Runtime does not load two nodes of one name."""
    changed = model()
    for _ in range(2):
        NodeOfFixedName()(changed)
    names = [node.name for node in changed.graph]
    assert len(set(names)) == len(names)
    assert "lengths_of_rows" in names and {"first", "call", "branch", "last"} < set(names)


def test_names_that_came_doubled_stay_for_cleanup_to_change() -> None:
    """Patterns of names, as in skip_nodes, are about the model as it came."""
    changed = model()
    changed.graph[1].name = "first"
    NodeOfFixedName()(changed)
    assert [node.name for node in changed.graph].count("first") == 2


def test_no_change_claimed_means_no_change_kept() -> None:
    one = model()
    main, before = one.graph, serialized(one)
    assert not Rename(count=0)(one).modified
    assert serialized(one) == before
    assert one.graph is main


def test_changes_do_not_reach_a_clone() -> None:
    class Retype(Rename):
        def apply(self, model: ir.Model) -> Changes:
            model.graph.inputs[1].dtype = ir.DataType.FLOAT16
            return Changes(1)

    one = model()
    other = one.clone()
    Retype()(one)
    assert one.graph.inputs[1].dtype == ir.DataType.FLOAT16
    assert other.graph.inputs[1].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (PreconditionError("pass picky", got="no"), PreconditionError, "pass picky: no"),
        (MissingDependencyError("picky", got="no such package"), MissingDependencyError, "no such package"),
        (ZeroDivisionError("oops"), PassError, "pass picky: ZeroDivisionError: oops"),
    ],
)
def test_requires_raises_our_errors(error: Exception, raised: type[Exception], message: str) -> None:
    class Picky(Rename):
        name = "picky"

        def requires(self, model: ir.Model) -> None:
            raise error

    with pytest.raises(raised, match=message):
        Picky()(model())


def test_a_graph_that_cannot_be_copied_is_an_error_of_ours() -> None:
    one = model()
    nodes = list(one.graph)
    one.graph.remove(nodes[1])
    one.graph.append(nodes[1])
    with pytest.raises(PassError, match=r"pass rename: ValueError: Value .* outer-scope"):
        Rename()(one)


def test_run_passes_leaves_the_package_and_records_steps() -> None:
    package = ModelPackage({"model": Component(model())})
    before = serialized(package.main.model)
    seen: list[Any] = []
    result = run_passes(package, [Rename(to="z")], on_step=seen.append)
    assert serialized(package.main.model) == before
    assert result.main.model.graph[0].name == "z"
    assert seen == list(result.steps)
    assert result.steps[0].parameters == {"to": "z", "count": 1, "mode": "a", "deep": False, "names": ()}
    assert result.steps[0].details == {"changes": 1, "to": "z", "skipped": {"other": "why not"}}


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"mode": "3"}, 3),
        ({"mode": 3}, 3),
        ({"mode": "b"}, "b"),
        ({"deep": "true"}, True),
        ({"count": "5"}, 5),
        ({"names": "one"}, ("one",)),
        ({"names": ["one", "two"]}, ("one", "two")),
    ],
)
def test_create_takes_what_recipes_and_command_lines_write(given: dict[str, Any], value: Any) -> None:
    (name,) = given
    got = Rename.create(given).arguments()[name]
    assert (type(got), got) == (type(value), value)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"cuont": 1}, UnknownNameError, r"pass rename: unknown parameter 'cuont'.*Did you mean 'count'\?"),
        ({"count": "many"}, BadInputError, "pass rename: count: 'many'; expected a valid integer"),
        ({"count": True}, BadInputError, "pass rename: count: True; expected a valid integer"),
        ({"count": 1.5}, BadInputError, "pass rename: count: 1.5; expected a valid integer"),
        ({"mode": "4"}, BadInputError, "pass rename: mode: '4'; expected 'a', 'b' or 3"),
        ({"mode": True}, BadInputError, "pass rename: mode: True; expected"),
        ({"deep": "perhaps"}, BadInputError, "pass rename: deep: 'perhaps'; expected a valid boolean"),
        ({"names": [1]}, BadInputError, r"pass rename: names: \[1\]; expected a valid string"),
    ],
)
def test_create_refuses(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Rename.create(given)


@pytest.mark.parametrize("name", sorted(PASSES))
def test_arguments_are_complete_and_plain(name: str) -> None:
    kind = load_pass(name)
    made = kind.create({})
    arguments = made.arguments()
    assert set(arguments) == set(kind.parameters())
    again = kind.create(json.loads(json.dumps(arguments)))
    assert again.arguments() == arguments
