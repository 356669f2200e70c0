"""Passes on a few of many layers that are alike: the same graph, and no guess where layers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

import onnxsmith.graph_passes as graph_passes
from generated_graphs import Array, assert_same, graph, run, serialized
from onnxsmith.errors import PassError
from onnxsmith.graph_passes import PRESETS, load_pass, make_passes, pass_names, run_passes
from onnxsmith.graph_passes.contract import Changes, GraphPass
from onnxsmith.graph_passes.layer_extension import extended
from onnxsmith.graph_passes.repeated_layers import ShortStack, shorten
from onnxsmith.graph_passes.weights import lazy_initializer
from onnxsmith.onnx_file import check_model
from onnxsmith.package import Component, ModelPackage
from onnxsmith.package_io import save_package

LAYERS = 12
X = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
Feeds = dict[str, Array]


def deep(
    layers: int = LAYERS,
    *,
    activation: Callable[[int], str] = lambda _: "Relu",
    gain: Callable[[int], Array] | None = None,
    extra: str = "",
) -> ir.Model:
    """Layers with two products, a gain, a sum and an entry of a cache each; with an identity to clean up."""
    random = np.random.default_rng(0)
    weights: dict[str, Array] = {}

    def new(name: str, *shape: int) -> str:
        weights[name] = (random.standard_normal(shape) * 0.3).astype(np.float32)
        return name

    lines = [f"h0 = MatMul(x, {new('embedding', 8, 8)})"]
    for i in range(layers):
        weights[f"layers_{i}_gain"] = (gain or (lambda _: random.standard_normal(8).astype(np.float32)))(i)
        lines.append(
            f"n{i} = Mul(h{i}, layers_{i}_gain) q{i} = MatMul(n{i}, {new(f'layers_{i}_a', 8, 6)}) "
            f"c{i} = Add(q{i}, past_{i}) present_{i} = Identity(c{i}) s{i} = Softmax<axis = -1>(c{i}) "
            f"r{i} = {activation(i)}(s{i}) i{i} = Identity(r{i}) "
            f"m{i} = MatMul(i{i}, {new(f'layers_{i}_b', 6, 8)}) h{i + 1} = Add(h{i}, m{i})"
        )
    lines.append(f"y = MatMul(h{layers}, {new('head', 8, 5)})")
    pasts = "".join(f", float[m, 6] past_{i}" for i in range(layers))
    presents = "".join(f", float[m, 6] present_{i}" for i in range(layers))
    model = graph(
        '<ir_version: 9, opset_import: ["": 18]> g '
        f"(float[m, 8] x{pasts}) => (float[m, 5] y{presents}{', float[m, 8] z' if extra else ''}) "
        f"{{ {' '.join(lines)} {extra} }}",
        **weights,
    )
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}" if number == 0 else f"of_{node.outputs[0].name}"
    for i in range(layers):
        value = next(value for value in model.graph.outputs if value.name == f"present_{i}")
        value.name = f"present.{i}.key"
    common.ShapeInferencePass()(model)
    return model


def feeds(layers: int = LAYERS) -> Feeds:
    random = np.random.default_rng(2)
    return {"x": X} | {f"past_{i}": random.standard_normal((3, 6)).astype(np.float32) for i in range(layers)}


def package(model: ir.Model) -> ModelPackage:
    return ModelPackage({"model": Component(model)})


def shortened(model: ir.Model) -> ShortStack:
    found = shorten(model)
    assert found is not None
    return found


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_layers_that_were_left_out_come_back() -> None:
    model = deep()
    before = serialized(model)
    short = shortened(model)
    assert (short.layers, short.kept) == (LAYERS, 4)
    assert len(short.model.graph.outputs) == 5
    assert len(short.model.graph) < len(model.graph) / 2
    # The weights that are copied from are not there meanwhile.
    for name in ("layers_1_a", "layers_2_b", "layers_1_gain"):
        value, known = short.model.graph.initializers[name], model.graph.initializers[name]
        assert value.const_value is not None
        assert known.const_value is not None
        assert value.const_value.shape == known.const_value.shape
        assert not np.allclose(value.const_value.numpy(), known.const_value.numpy())
    made = extended(short)
    assert made is not None
    # To the last byte, names and order included.
    assert serialized(made) == before
    assert serialized(model) == before


@pytest.mark.parametrize(
    ("activation", "kept"),
    [
        (lambda _: "Relu", 4),
        # Units of two layers; the ten between the first and the last are five of them.
        (lambda i: f"Elu<alpha = {1 + i % 2}.5>", 6),
        # Units of three; two layers are too many, and stay with the first.
        (lambda i: f"Elu<alpha = {1 + (i % 3 == 0)}.5>", 10),
        # What the first and the last layer are does not matter.
        (lambda i: f"Elu<alpha = {1 + (0 < i < LAYERS - 1)}.5>", 4),
    ],
)
def test_passes_make_the_same_graph(
    activation: Callable[[int], str], kept: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layers = 16 if kept == 10 else LAYERS
    model = deep(layers, activation=activation)
    expected = run(model, feeds(layers))
    passes = make_passes([("cleanup", {}), ("fuse_norms", {}), ("fuse_transformer", {})])
    made = run_passes(package(model), passes)
    assert made.steps[0].details["of"] == f"{kept} of {layers} layers"
    assert made.steps[0].details["changes"] > 0
    monkeypatch.setattr(graph_passes, "_run_on_short_stack", lambda *_: None)
    whole = run_passes(package(model), passes)
    assert "of" not in whole.steps[0].details
    assert serialized(made.main.model) == serialized(whole.main.model)
    assert len(made.main.model.graph) < len(model.graph)
    assert_same(expected, run(made.main.model, feeds(layers)), rtol=1e-6)
    save_package(made, tmp_path)
    check_model(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "model",
    [
        deep(7),
        # One layer is another than the rest.
        deep(activation=lambda i: f"Elu<alpha = {1 + (i == 6)}.5>"),
        # No two units of the same.
        deep(activation=lambda i: f"Elu<alpha = {1 + (i in (1, 2, 4, 7))}.5>"),
        # Something reads what is inside of a layer, or of a cache.
        deep(extra="z = Add(n6, n6)"),
        deep(extra="w = ReduceSum(past_6) z = Add(h12, w)"),
        # No attention, so no layers.
        graph('<ir_version: 9, opset_import: ["": 18]> g (float[m] x) => (float[m] y) { y = Relu(x) }'),
    ],
)
def test_where_layers_differ_none_is_left_out(model: ir.Model) -> None:
    before = serialized(model)
    assert shorten(model) is None
    assert serialized(model) == before


class _Changing(GraphPass):
    """What a test does to a graph, as a pass that is said to work by layers."""

    name: ClassVar[str] = "changing"
    summary: ClassVar[str] = "changes a graph"
    layerwise: ClassVar[bool] = True

    def __init__(self, *, change: Any = None) -> None:
        self.change = change

    def apply(self, model: ir.Model) -> Changes:
        self.change(model)
        return Changes(1)


def _only_one_layer(model: ir.Model) -> None:
    for node in model.graph:
        if node.name == "of_r2":
            node.op_type = "Elu"


def _one_layer_of_those_left(model: ir.Model) -> None:
    relus = [node for node in model.graph if node.op_type == "Relu"]
    relus[len(relus) // 2].op_type = "Elu"


def _twice_the_weights(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("layers_"):
            tensor = value.const_value
            assert tensor is not None
            value.const_value = ir.tensor(tensor.numpy() * 2, name=name)


def _sums_of_weights(model: ir.Model) -> None:
    for node in model.graph:
        if (node.name or "").startswith("of_q"):
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            total = ir.tensor(weight.const_value.numpy() + 1, name=f"{weight.name}_more")
            value = ir.Value(name=total.name, shape=weight.shape, type=weight.type, const_value=total)
            model.graph.register_initializer(value)
            node.replace_input_with(1, value)


def _weights_of_a_neighbour(model: ir.Model) -> None:
    readers = [node for node in model.graph if (node.name or "").startswith("of_q")]
    weights = [node.inputs[1] for node in readers]
    for node, weight in zip(readers, [*weights[1:], weights[0]], strict=True):
        node.replace_input_with(1, weight)


def _hidden_state_of_two_before(model: ir.Model) -> None:
    sums = [node for node in model.graph if (node.name or "").startswith("of_h")]
    for before, node in zip(sums, sums[2:], strict=False):
        node.replace_input_with(0, before.outputs[0])


@pytest.mark.parametrize(
    "change",
    [
        _only_one_layer,
        _one_layer_of_those_left,
        _twice_the_weights,
        _sums_of_weights,
        _weights_of_a_neighbour,
        _hidden_state_of_two_before,
    ],
)
def test_what_does_not_change_layers_alike_sees_the_whole_model(
    change: Callable[[ir.Model], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [_Changing(change=change), *make_passes([("cleanup", {})])]
    made = run_passes(package(deep()), passes)
    assert all("of" not in step.details for step in made.steps)
    monkeypatch.setattr(graph_passes, "_run_on_short_stack", lambda *_: None)
    whole = run_passes(package(deep()), passes)
    assert serialized(made.main.model) == serialized(whole.main.model)
    # Control: it is a change.
    same = run_passes(package(deep()), make_passes([("cleanup", {})]))
    assert serialized(same.main.model) != serialized(made.main.model)


def test_what_changes_all_layers_alike_sees_a_few() -> None:
    def elus(model: ir.Model) -> None:
        for node in model.graph:
            node.op_type = "Elu" if node.op_type == "Relu" else node.op_type

    model = deep()
    made = run_passes(package(model), [_Changing(change=elus), *make_passes([("cleanup", {})])])
    assert made.steps[0].details["of"] == "4 of 12 layers"
    assert operators(made.main.model).count("Elu") == LAYERS
    assert_same(run(deep(activation=lambda _: "Elu"), feeds()), run(made.main.model, feeds()), rtol=1e-6)


def test_small_constants_that_all_layers_share_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean-up makes one of equal gains, and leaves a multiplication by one out."""
    for gain in (lambda _: np.full(8, 2, np.float32), lambda _: np.ones(8, np.float32)):
        model = deep(gain=gain)
        passes = make_passes([("cleanup", {}), ("fuse_norms", {})])
        made = run_passes(package(model), passes)
        assert "of" in made.steps[0].details
        with monkeypatch.context() as patch:
            patch.setattr(graph_passes, "_run_on_short_stack", lambda *_: None)
            whole = run_passes(package(model), passes)
        assert form(made.main.model) == form(whole.main.model)
        assert sum("gain" in name for name in made.main.model.graph.initializers) <= 1
    # Those of two layers that are equal by chance are not made one in all the others.
    model = deep(gain=lambda i: np.full(8, 2 if i < 4 else i, np.float32))
    made = run_passes(package(model), make_passes([("cleanup", {}), ("fuse_norms", {})]))
    assert "of" in made.steps[0].details
    assert_same(run(model, feeds()), run(made.main.model, feeds()), rtol=1e-6)


def test_passes_that_see_a_few_layers_take_no_names_of_nodes() -> None:
    layerwise = [found for name in pass_names() if (found := load_pass(name)).layerwise]
    assert {"cleanup", "fuse_transformer"} <= {one.name for one in layerwise}
    for one in layerwise:
        # A layer that is named may be one of those that are left out.
        assert not {"skip_nodes", "overrides"} & one.parameters().keys(), one.name


def test_an_error_is_that_of_the_whole_model() -> None:
    seen: list[int] = []

    def fail(model: ir.Model) -> None:
        seen.append(len(model.graph))
        raise ValueError(f"{len(model.graph)} nodes")

    model = deep()
    count = len(model.graph)
    with pytest.raises(PassError, match=f"changing: ValueError: {count} nodes"):
        run_passes(package(model), [_Changing(change=fail), *make_passes([("cleanup", {})])])
    assert seen[0] < seen[1] == count


def test_verified_steps_see_the_whole_model() -> None:
    def verify(before: ModelPackage, after: ModelPackage, step: Any) -> Mapping[str, Any]:
        assert len(before.main.model.graph) == len(deep().graph)
        return {"looked": True}

    made = run_passes(package(deep()), make_passes([("cleanup", {}), ("fuse_norms", {})]), verify=verify)
    assert made.steps[0].details["verified"] == {"looked": True}
    assert "of" not in made.steps[0].details


def test_lazy_weights_are_not_read() -> None:
    model = deep()
    for name, value in list(model.graph.initializers.items()):
        if name.endswith(("_a", "_b")):
            tensor = value.const_value
            assert tensor is not None
            del model.graph.initializers[name]
            wide = np.zeros((200, 200), np.float32)

            def compute(_array: Array = wide) -> Array:
                raise AssertionError("a weight was read")

            new = lazy_initializer(model.graph, name, ir.DataType.FLOAT, (200, 200), compute)
            value.replace_all_uses_with(new)
    made = run_passes(package(model), make_passes([("cleanup", {}), ("fuse_norms", {})]))
    assert "of" in made.steps[0].details
    for name, value in made.main.model.graph.initializers.items():
        assert value.const_value is model.graph.initializers[name].const_value


def test_a_deep_decoder_gets_the_same_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from onnxsmith.exporters import export, load_torch
    from onnxsmith.source import ModelSource

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=10, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1, 0.1)
    model.save_pretrained(tmp_path)
    exported = export(load_torch(ModelSource.parse(str(tmp_path))))
    passes = make_passes(PRESETS["cpu-int4-newest"])
    made = run_passes(exported, passes)
    of = {step.name: step.details.get("of") for step in made.steps}
    assert of["cleanup"] == of["fuse_transformer"] == of["flatten_attention"] == "4 of 10 layers"
    assert of["quantize_weights"] is None
    monkeypatch.setattr(graph_passes, "_run_on_short_stack", lambda *_: None)
    whole = run_passes(exported, passes)
    assert form(made.main.model) == form(whole.main.model)


def form(model: ir.Model) -> list[Any]:
    """A graph with numbers for names of inner values: passes number these as they come."""
    numbers: dict[ir.Value, Any] = {}

    def value(one: ir.Value | None) -> Any:
        if one is None or one.is_graph_input() or one.is_graph_output():
            return None if one is None else one.name
        if one not in numbers:
            tensor = one.const_value if one.is_initializer() else None
            numbers[one] = (len(numbers), None if tensor is None else (tensor.dtype, tensor.tobytes()))
        return numbers[one]

    nodes: list[Any] = [
        (
            node.op_identifier(),
            [value(one) for one in node.inputs],
            [(value(one), one.dtype, str(one.shape)) for one in node.outputs],
            sorted((name, repr(one.value)) for name, one in node.attributes.items()),
        )
        for node in model.graph
    ]
    return [*nodes, [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]]
