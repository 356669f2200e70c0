"""Exports of models without a cache: plain modules and text encoders, each compared on several shapes."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from onnxsmith.comparison import TOLERANCES, Comparison
from onnxsmith.errors import ExportError, UnknownNameError
from onnxsmith.exporters import LoadedModel, export, torch_program
from onnxsmith.exporters.factory import name_inputs
from onnxsmith.package import ModelPackage
from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
nn = torch.nn
F = torch.nn.functional


def loaded(module: Any, inputs: Any, task: str | None = None) -> LoadedModel:
    named = name_inputs(module, inputs, where="test") if inputs is not None else {}
    source = ModelSource(SourceKind.FACTORY, "test:make")
    return LoadedModel(module.eval().requires_grad_(False), source, task, {}, {}, named)


def exported(module: Any, inputs: Any = None, task: str | None = None) -> tuple[ModelPackage, Comparison]:
    """The package, and its comparison with the module without any of ONNX Runtime's optimisations."""
    torch.manual_seed(0)
    model = loaded(module, inputs, task)
    program = torch_program(model)
    package = export(model, program)
    reference = TorchSession(program)
    cases = list(reference_outputs(reference, list(cases_for(reference, limits=program.limits))))
    assert len(cases) > 1
    with OrtSession(package, threads=1, optimize=False) as session:
        return package, compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])


def signature(package: ModelPackage) -> tuple[list[str], list[str]]:
    return [str(spec) for spec in package.main.inputs], [str(spec) for spec in package.main.outputs]


def test_mlp() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    package, comparison = exported(module, torch.ones(4, 3))
    assert comparison.passed, comparison.reason
    assert signature(package) == (["input: float32[batch, 3]"], ["output: float32[batch, 2]"])
    assert set(package.main.model.graph.initializers) == set(module.state_dict())
    assert {tensor.case for tensor in comparison.tensors} == {"batch=1", "batch=2", "batch=3"}


def test_one_row_in_the_example_leaves_the_batch_free() -> None:
    package, comparison = exported(nn.Linear(3, 2), torch.ones(1, 3))
    assert comparison.passed, comparison.reason
    assert signature(package) == (["input: float32[batch, 3]"], ["output: float32[batch, 2]"])


def test_cnn() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    module[1].running_mean.uniform_(-1, 1)
    package, comparison = exported(module, torch.rand(2, 3, 8, 8))
    assert comparison.passed, comparison.reason
    assert signature(package) == (
        ["input: float32[batch, 3, height, width]"],
        ["output: float32[batch, 5]"],
    )


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any
    note: str = "text"
    nothing: None = None


class Named(NamedTuple):
    first: Any
    second: Any


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.make = make

    def forward(self, x: Any) -> Any:
        return self.make(self.linear(x), x)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y, x: y, ["output"]),
        (lambda y, x: {"scores": y, "double": x * 2}, ["scores", "double"]),
        (lambda y, x: (y, x + 1), ["output_0", "output_1"]),
        (lambda y, x: [y], ["output_0"]),
        (lambda y, x: (y, (x + 1, [x + 2])), ["output_0", "output_1.0", "output_1.1.0"]),
        (lambda y, x: {"a": {"b": y}, "c": (x + 1,)}, ["a.b", "c.0"]),
        (lambda y, x: Pair(y, x + 1), ["left", "right"]),
        (lambda y, x: {"pair": Pair(y, {"deep": x + 1})}, ["pair.left", "pair.right.deep"]),
        (lambda y, x: Named(y, x + 1), ["first", "second"]),
        (lambda y, x: {"y": y, "none": None, "number": 3, "flag": True}, ["y"]),
        # An output with the name of an input gets another: a graph has one name space.
        (lambda y, x: {"x": y}, ["x_output"]),
        # An input that comes back untouched, and one tensor under two names.
        (lambda y, x: {"same": x, "y": y}, ["same", "y"]),
        (lambda y, x: {"y": y, "again": y}, ["y", "again"]),
    ],
)
def test_outputs_of_every_form_are_flat_and_named(make: Any, names: list[str]) -> None:
    package, comparison = exported(Returns(make), torch.rand(2, 3))
    assert [spec.name for spec in package.main.outputs] == names
    assert all(spec.shape and spec.shape[0] == "batch" for spec in package.main.outputs)
    assert comparison.passed, comparison.reason


def test_an_output_whose_size_is_computed_is_not_declared_fixed() -> None:
    package, comparison = exported(
        Returns(lambda y, x: {"flat": x.reshape(-1), "fixed": y.sum(0)}), torch.rand(4, 3)
    )
    assert comparison.passed, comparison.reason
    shapes = {spec.name: spec.shape for spec in package.main.outputs}
    assert shapes["fixed"] == (2,)
    assert isinstance(shapes["flat"][0], str) and "batch" in shapes["flat"][0]


def test_a_fixed_output_as_long_as_the_batch_is_not_declared_dynamic() -> None:
    package, comparison = exported(
        Returns(lambda y, x: {"y": y, "weights": x.sum(0)[:2] + 0}), torch.rand(2, 3)
    )
    assert comparison.passed, comparison.reason
    assert package.main.outputs[1].shape == (2,)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 2, 8))
        self.register_buffer("offset", torch.ones(8), persistent=False)

    def forward(self, ids: Any) -> Any:
        return self.head(self.embed(ids) * self.scale + self.offset)


def test_tied_weights_are_stored_once_and_buffers_are_kept() -> None:
    module = Tied()
    package, comparison = exported(module, torch.randint(0, 16, (2, 5)))
    assert comparison.passed, comparison.reason
    tables = [v for v in package.main.model.graph.initializers.values() if list(v.shape or ()) == [16, 8]]
    assert len(tables) == 1
    assert {"scale", "offset"} <= set(package.main.model.graph.initializers)


def test_weights_are_shared_with_the_module() -> None:
    module = nn.Linear(3, 2)
    package, _ = exported(module, torch.ones(2, 3))
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert (package.main.model.graph.initializers["weight"].const_value.numpy() == 7.0).all()


def test_integer_inputs_stay_inside_their_table() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Any, weights: Any) -> Any:
            return (self.table(ids) * weights[..., None]).sum(1)

    ids = torch.tensor([[0, 8], [3, 1]])
    package, comparison = exported(Two(), {"ids": ids, "weights": torch.rand(2, 2)})
    assert comparison.passed, comparison.reason
    assert signature(package)[0] == ["ids: int64[batch, sequence]", "weights: float32[batch, sequence]"]


def test_a_batch_norm_weight_that_changes_is_noticed() -> None:
    """The control: with one weight of the graph changed, the comparison must fail."""
    import onnx_ir as ir

    torch.manual_seed(0)
    model = loaded(nn.Linear(3, 2), torch.ones(2, 3))
    program = torch_program(model)
    package = export(model, program)
    weight = package.main.model.graph.initializers["weight"]
    changed = weight.const_value.numpy().copy()
    changed[1, 2] += 0.01
    weight.const_value = ir.tensor(changed, name="weight")
    reference = TorchSession(program)
    cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits)))
    with OrtSession(package, threads=1) as session:
        comparison = compare_sessions(reference, session, cases, tolerance=TOLERANCES["float32"])
    assert not comparison.passed
    assert "differs by" in comparison.reason


# What cannot be exported


class Branches(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Loops(nn.Module):
    def forward(self, x: Any) -> Any:
        for row in (x > 0).nonzero():
            x = x + row.sum()
        return x


class Prints(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * float(x.sum().item())


@pytest.mark.parametrize(
    ("kind", "line"), [(Branches, "if x.sum() > 0:"), (Loops, "for row in (x > 0).nonzero():")]
)
def test_control_flow_on_values_is_refused_with_the_line(
    kind: type[Any], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    number = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.strip() == line
    )
    model = loaded(kind(), torch.ones(2, 3))
    with pytest.raises(ExportError) as caught:
        export(model)
    message = str(caught.value)
    assert f"{kind.__name__}: torch cannot trace it at test_export_plain.py:{number} `{line}`" in message
    assert "torch.where or torch.cond" in message
    assert "\n" not in message
    # torch prints the whole graph so far when it meets such a line.
    assert capfd.readouterr() == ("", "")


def test_a_batch_that_the_model_fixes_is_refused() -> None:
    class Fixes(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1 if x.shape[0] == 2 else x - 1

    with pytest.raises(
        ExportError, match=r"Fixes: input 'x' axis 0 \(batch\): torch fixed it to 2.*a dynamic axis"
    ):
        export(loaded(Fixes(), torch.ones(2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y, x: None, r"Returns: forward\(\) returns no tensor; expected at least one"),
        (lambda y, x: {}, r"forward\(\) returns no tensor"),
        (lambda y, x: (3, "x"), r"forward\(\) returns no tensor"),
        (lambda y, x: object(), r"output of forward\(\) is a object; expected tensors in"),
        (lambda y, x: {"y": y, "rest": {1, 2}}, r"output rest is a set; expected tensors in"),
        (
            lambda y, x: 1 / 0,
            r"forward\(\) fails on the example inputs at test_export_plain\.py:\d+ .*ZeroDivisionError",
        ),
        (lambda y, x: [][0], r"IndexError: list index out of range; expected example inputs that run"),
    ],
)
def test_a_module_without_a_signature_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        torch_program(loaded(Returns(make), torch.rand(2, 3)))


def test_an_error_without_a_text_is_reported() -> None:
    def fail(y: Any, x: Any) -> Any:
        raise KeyError

    with pytest.raises(ExportError, match=r"fails on the example inputs.*KeyError"):
        torch_program(loaded(Returns(fail), torch.rand(2, 3)))


def test_bad_options() -> None:
    model = loaded(nn.Linear(3, 2), torch.ones(2, 3))
    with pytest.raises(UnknownNameError, match=r"unknown attention 'fuzed'.*Did you mean 'fused'\?"):
        export(model, attention="fuzed")
    for opset in (17, 26):
        with pytest.raises(ExportError, match=f"export: opset: {opset}; expected 18 to 25"):
            export(model, opset=opset)


@pytest.mark.parametrize("opset", [18, 21])
def test_the_opset_is_the_wanted_one(opset: int) -> None:
    assert (
        export(loaded(nn.Linear(3, 2), torch.ones(2, 3)), opset=opset).main.model.opset_imports[""] == opset
    )


def test_what_was_done_is_recorded() -> None:
    (step,) = export(loaded(nn.Linear(3, 2), torch.ones(2, 3))).steps
    assert (step.name, step.parameters["exporter"]) == ("export", "torch")


# Structures, state and control flow


class NgramModel(nn.Module):
    """A feed-forward language model: the last words, each looked up, all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.hidden = nn.Linear(3 * 8, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, words: Any) -> Any:
        return self.head(torch.tanh(self.hidden(self.embed(words).flatten(1)))).log_softmax(-1)


def test_an_ngram_language_model_keeps_its_order() -> None:
    package, comparison = exported(NgramModel(), torch.randint(0, 50, (4, 3)))
    assert comparison.passed, comparison.reason
    assert signature(package) == (["words: int64[batch, 3]"], ["output: float32[batch, 50]"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_recurrent_layers(kind: type[Any], batch_first: bool) -> None:
    module = kind(5, 6, 2, batch_first=batch_first)
    package, comparison = exported(module, torch.rand(3, 4, 5))
    assert comparison.passed, comparison.reason
    order = ["batch", "sequence"] if batch_first else ["sequence", "batch"]
    (given,), outputs = signature(package)
    assert given == f"input: float32[{order[0]}, {order[1]}, 5]"
    assert outputs[0] == f"output_0: float32[{order[0]}, {order[1]}, 6]"
    # The state of each layer: the number of layers is no axis that may change.
    assert all("[2, batch, 6]" in text for text in outputs[1:])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
        pytest.param(nn.GRU, {"bidirectional": True, "bias": False}, marks=pytest.mark.slow),
        pytest.param(nn.RNN, {"nonlinearity": "relu", "num_layers": 2}, marks=pytest.mark.slow),
        (nn.RNN, {}),
    ],
)
def test_recurrent_layers_of_every_form(kind: type[Any], options: dict[str, Any]) -> None:
    package, comparison = exported(kind(5, 6, batch_first=True, **options), torch.rand(3, 4, 5))
    assert comparison.passed, comparison.reason
    # The operators of ONNX, not a copy of the step for each time.
    found = [node.op_type for node in package.main.model.graph]
    assert found.count(kind.__name__) == options.get("num_layers", 1)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_that_have_no_operator_are_refused() -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(5, 6, batch_first=True)

        def forward(self, x: Any) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, [4, 4], batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    with pytest.raises(ExportError, match=r"rnn \(GRU\): a packed sequence; expected a padded tensor"):
        export(loaded(Packs(), torch.rand(2, 4, 5)))
    with pytest.raises(ExportError, match=r"model \(LSTM\): a projected state"):
        export(loaded(nn.LSTM(5, 6, proj_size=3), torch.rand(4, 3, 5)))


class Stepped(nn.Module):
    """One step of an LSTM whose state is an input, in a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: Any, state: Any) -> Any:
        out, (h, c) = self.cell(x * state["scale"], (state["hidden"][0], state["hidden"][1]))
        return {"out": out, "state": {"hidden": [h, c], "scale": state["scale"]}}


def test_nested_inputs_and_outputs_go_round() -> None:
    state = {"hidden": (torch.rand(1, 3, 6), torch.rand(1, 3, 6)), "scale": torch.tensor(2.0), "unused": None}
    package, comparison = exported(Stepped(), {"x": torch.rand(3, 4, 5), "state": state})
    assert comparison.passed, comparison.reason
    inputs, outputs = signature(package)
    assert inputs == [
        "x: float32[batch, sequence, 5]",
        "state.hidden.0: float32[1, batch, 6]",
        "state.hidden.1: float32[1, batch, 6]",
        "state.scale: float32[]",
    ]
    assert [text.partition(":")[0] for text in outputs] == [
        "out",
        "state.hidden.0_output",
        "state.hidden.1_output",
        "state.scale_output",
    ]


@dataclasses.dataclass
class Request:
    ids: Any
    weights: Any
    scale: float = 2.0


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (lambda a, b: {"request": Request(a, b)}, ["request.ids", "request.weights"]),
        pytest.param(
            lambda a, b: {"request": Named(a, b)},
            ["request.first", "request.second"],
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda a, b: {"request": [a, b]}, ["request.0", "request.1"], marks=pytest.mark.slow),
        (lambda a, b: {"request": {"a": a, "more": {"b": b, "n": 3}}}, ["request.a", "request.more.b"]),
    ],
)
def test_inputs_of_every_form_are_flat_and_named(value: Any, names: list[str]) -> None:
    class Takes(nn.Module):
        def forward(self, request: Any) -> Any:
            if isinstance(request, Request):
                return request.ids * request.weights * request.scale
            if isinstance(request, dict):
                return request["a"] + request["more"]["b"] * request["more"]["n"]
            return request[0] - request[1]

    package, comparison = exported(Takes(), value(torch.rand(2, 3), torch.rand(2, 3)))
    assert comparison.passed, comparison.reason
    assert [spec.name for spec in package.main.inputs] == names


def test_positional_and_variable_parameters() -> None:
    class Sums(nn.Module):
        def forward(self, first: Any, /, *rest: Any) -> Any:
            return first + sum(rest)

    package, comparison = exported(Sums(), (torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3)))
    assert comparison.passed, comparison.reason
    assert [spec.name for spec in package.main.inputs] == ["first", "rest.0", "rest.1"]


def test_two_towers_have_batches_of_their_own() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = nn.Linear(8, 4), nn.Linear(6, 4)

        def forward(self, user: Any, item: Any) -> Any:
            return self.user(user) @ self.item(item).T

    package, comparison = exported(Towers(), (torch.rand(2, 8), torch.rand(2, 6)))
    assert comparison.passed, comparison.reason
    assert signature(package) == (
        ["user: float32[user_batch, 8]", "item: float32[item_batch, 6]"],
        ["output: float32[user_batch, item_batch]"],
    )
    assert "user_batch=2 item_batch=3" in {tensor.case for tensor in comparison.tensors}


def test_an_input_that_is_written_to_stays_as_it_is() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Any) -> Any:
            x.mul_(2)
            x[:, 0] = 0
            return x + 1, x.clone().add_(3)

    given = torch.rand(2, 3) + 1
    _, comparison = exported(InPlace(), given)
    assert comparison.passed, comparison.reason
    assert (given >= 1).all()


def test_a_module_that_remembers_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x + self.calls

    with pytest.raises(
        ExportError, match=r"Counts: forward\(\) changes its buffer calls; .*without state\. Take what"
    ):
        export(loaded(Counts(), torch.rand(2, 3)))


def test_cond_keeps_both_branches() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Any) -> Any:
            return torch.cond(x.sum() > 0, lambda v: self.linear(v), lambda v: v - 1, (x,))

    package, comparison = exported(Conditional(), torch.rand(2, 3))
    assert comparison.passed, comparison.reason
    node = next(node for node in package.main.model.graph if node.op_type == "If")
    assert {"then_branch", "else_branch"} <= set(node.attributes)
    # Random inputs have sums of both signs, so both branches ran.
    program = torch_program(loaded(Conditional(), torch.rand(2, 3)))
    reference = TorchSession(program)
    signs = {bool(case.feeds["x"].sum() > 0) for case in cases_for(reference, limits=program.limits)}
    assert signs == {True, False}


def test_an_untraceable_line_is_named_with_its_module() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), Branches())])

        def forward(self, x: Any) -> Any:
            return self.blocks[0](x)

    place = r"blocks\.0\.1 \(Branches\) at test_export_plain\.py:\d+ `if x\.sum"
    with pytest.raises(ExportError, match=f"Deep: torch cannot trace it in {place}"):
        export(loaded(Deep(), torch.ones(2, 3)))


def test_a_table_that_is_kept_for_the_last_length_is_one_for_any() -> None:
    """As in ESM's rotary embedding: what an example left behind is no fact about the module."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.length: int | None = None
            self.table: Any = None

        def forward(self, x: Any) -> Any:
            if x.shape[1] != self.length or self.table.device != x.device:
                self.length = x.shape[1]
                self.table = torch.arange(x.shape[1]).cos()
            return x * self.table[None, :, None]

    package, comparison = exported(Remembers(), torch.rand(2, 7, 3))
    assert comparison.passed, comparison.reason
    assert signature(package)[0] == ["x: float32[batch, sequence, length]"]


def test_a_module_that_keeps_what_it_sees_is_not_changed_by_trying() -> None:
    class Narrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window = 100

        def forward(self, x: Any) -> Any:
            self.window = min(self.window, x.shape[1])
            return x[:, : self.window] * 2

    module = Narrows()
    torch_program(loaded(module, torch.rand(2, 9)))
    assert module.window == 100


@pytest.mark.slow
def test_a_transformer_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    package, comparison = exported(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.rand(2, 5, 16)
    )
    assert comparison.passed, comparison.reason
    assert signature(package)[0] == ["src: float32[batch, sequence, 16]"]


# Text encoders

ENCODERS = {
    "feature-extraction": (
        "AutoModel",
        {"last_hidden_state": ("batch", "sequence", 32), "pooler_output": ("batch", 32)},
    ),
    "text-classification": ("AutoModelForSequenceClassification", {"logits": ("batch", 3)}),
    "token-classification": ("AutoModelForTokenClassification", {"logits": ("batch", "sequence", 3)}),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        {"start_logits": ("batch", "sequence"), "end_logits": ("batch", "sequence")},
    ),
    "fill-mask": ("AutoModelForMaskedLM", {"logits": ("batch", "sequence", 64)}),
}


def encoder(task: str, family: str = "Bert", **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 80,
        # A question's answer has a beginning and an end.
        "num_labels": 2 if task == "question-answering" else 3,
        "initializer_range": 0.3,
    }
    config = getattr(transformers, f"{family}Config")(**options | changes)
    with warnings.catch_warnings():
        # ModernBert's module calls torch.compile when it is imported, and that imports what torch deprecates.
        warnings.simplefilter("ignore")
        return getattr(transformers, ENCODERS[task][0]).from_config(config)


@pytest.mark.parametrize(
    "task",
    [
        task
        if task in ("feature-extraction", "question-answering")
        else pytest.param(task, marks=pytest.mark.slow)
        for task in ENCODERS
    ],
)
def test_bert(task: str) -> None:
    package, comparison = exported(encoder(task), task=task)
    assert comparison.passed, comparison.reason
    assert any("padding" in tensor.case for tensor in comparison.tensors)
    assert signature(package)[0] == [
        f"{name}: int64[batch, sequence]" for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    outputs = {spec.name: spec.shape for spec in package.main.outputs}
    assert outputs == ENCODERS[task][1]
    assert package.task == task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Roberta", {"type_vocab_size": 1, "pad_token_id": 1}),
        ("DistilBert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48}),
        ("Electra", {"embedding_size": 16}),
        ("Albert", {"embedding_size": 16}),
        ("MPNet", {"pad_token_id": 1}),
        (
            "ModernBert",
            {
                "pad_token_id": 0,
                "global_attn_every_n_layers": 2,
                "local_attention": 8,
                "cls_token_id": 1,
                "sep_token_id": 2,
            },
        ),
    ],
)
def test_other_encoders(family: str, changes: dict[str, Any]) -> None:
    package, comparison = exported(encoder("fill-mask", family, **changes), task="fill-mask")
    assert comparison.passed, comparison.reason
    assert "input_ids" in {spec.name for spec in package.main.inputs}


@pytest.mark.slow
def test_features_of_a_decoder_come_without_its_cache() -> None:
    package, comparison = exported(encoder("feature-extraction", "Llama"), task="feature-extraction")
    assert comparison.passed, comparison.reason
    assert [spec.name for spec in package.main.outputs] == ["last_hidden_state"]


def test_a_model_that_takes_no_text_is_refused() -> None:
    with pytest.raises(
        ExportError,
        match=r"Linear: forward\(\) takes input; expected a model that takes input_ids, pixel_values",
    ):
        torch_program(loaded(nn.Linear(3, 2), None, task="feature-extraction"))
