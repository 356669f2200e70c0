"""Modules as users have them: wrapped, scripted, compiled, with complex numbers or sparse tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import ExportError, SourceError
from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.runtime import OrtSession, TorchSession
from onnxsmith.source import ModelSource
from test_export_plain import exported, loaded, signature

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
nn = torch.nn
# Of torch, about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

_FACTORIES = """
import torch
def scripted(): return torch.jit.script(torch.nn.Linear(3, 4)), torch.rand(2, 3)
def parallel(): return torch.nn.DataParallel(torch.nn.Linear(3, 4)), torch.rand(2, 3)
def compiled(): return torch.compile(torch.nn.DataParallel(torch.nn.Linear(3, 4))), torch.rand(2, 3)
"""


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrapped_modules.py").write_text(_FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wrapped_modules", raising=False)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("name", ["parallel", "compiled"])
def test_a_module_inside_another_that_computes_the_same(name: str) -> None:
    model = load_torch(ModelSource.parse(f"wrapped_modules:{name}"))
    assert type(model.module) is nn.Linear
    assert [spec.name for spec in torch_program(model).inputs] == ["input"]


@pytest.mark.usefixtures("factories")
def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(SourceError, match=r"a RecursiveScriptModule.*Return the module that was scripted"):
        load_torch(ModelSource.parse("wrapped_modules:scripted"))


def test_complex_numbers_inside_are_exported() -> None:
    package, comparison = exported(Calls(lambda x: torch.fft.rfft(x).abs()), torch.rand(2, 8))
    assert comparison.passed, comparison.reason
    assert signature(package)[0] == ["x: float32[batch, length]"]


def test_a_complex_output_is_refused() -> None:
    with pytest.raises(ExportError, match=r"output output is complex.*Return torch.view_as_real"):
        torch_program(loaded(Calls(torch.fft.rfft), torch.rand(2, 8)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.rand(2, 3, dtype=torch.complex64), r"input x is complex.*Take torch.view_as_real"),
        (torch.eye(3).to_sparse(), r"input x is in the layout torch.sparse_coo.*Take a dense tensor"),
    ],
)
def test_an_input_that_no_graph_has_is_refused(tensor: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        loaded(Calls(lambda x: x.abs()), tensor)


def test_what_acts_on_each_number_has_one_batch() -> None:
    class Scaled(nn.Module):
        def forward(self, xs: list[Any], scales: dict[str, Any]) -> Any:
            return sum(xs) * scales["w"]

    inputs = {"xs": [torch.rand(2, 3), torch.rand(2, 3)], "scales": {"w": torch.rand(3)}}
    package, comparison = exported(Scaled(), inputs)
    assert comparison.passed, comparison.reason
    assert signature(package)[0] == [
        "xs.0: float32[batch, length]",
        "xs.1: float32[batch, length]",
        "scales.w: float32[length]",
    ]


def test_trying_sizes_says_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """torch.cond logs a trace where a branch fails, which a size that does not fit makes it do."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Any) -> Any:
            return torch.cond(x.sum() > 0, lambda v: self.one(v), lambda v: self.other(v), (x,))

    torch_program(loaded(Either(), torch.rand(2, 3)))
    assert "Traceback" not in capfd.readouterr().err


class Encoder(nn.Module):
    """A transformer of torch's own, whose mask says where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Any, padding: Any) -> Any:
        return self.layers(x, src_key_padding_mask=padding)


class Attention(nn.Module):
    """A mask that says where there is none."""

    def forward(self, x: Any, mask: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None, None])


@pytest.mark.parametrize(
    ("make", "sizes", "hides"), [(Encoder, (3, 7, 16), True), (Attention, (3, 2, 7, 8), False)]
)
def test_a_row_of_padding_is_as_in_torch(make: Any, sizes: tuple[int, ...], hides: bool) -> None:
    torch.manual_seed(0)
    mask = torch.full((sizes[0], sizes[-2]), not hides)
    mask[0, 4:] = hides
    model = loaded(make(), (torch.randn(sizes), mask))
    program = torch_program(model)
    mask[1] = hides
    feeds = {"x": torch.randn(sizes).numpy(), program.inputs[1].name: mask.numpy()}
    (expected,) = TorchSession(program).run(feeds).values()
    with OrtSession(export(model, program), threads=1) as session:
        (found,) = session.run(feeds).values()
    assert np.isfinite(expected).all()
    assert expected[1].any() != (make is Attention)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("AdaptiveAvgPool2d", (9, 8)), ("AdaptiveAvgPool2d", (10, 9)), ("AdaptiveMaxPool2d", (9, 8))],
)
def test_pooling_to_a_size_is_for_one_size(kind: str, size: tuple[int, int]) -> None:
    """Its decomposition depends on whether one size divides the other; for (1, 1) it does not."""
    image = torch.rand(2, 3, *size)
    package, comparison = exported(nn.Sequential(nn.Conv2d(3, 4, 1), getattr(nn, kind)((3, 2))), image)
    assert comparison.passed, comparison.reason
    assert package.main.inputs[0].shape == ("batch", 3, *size)
    assert set(package.steps[0].details["model"]["fixed_axes"]) == {"height", "width"}
    package, comparison = exported(nn.Sequential(nn.Conv2d(3, 4, 1), getattr(nn, kind)(1)), image)
    assert comparison.passed, comparison.reason
    assert package.main.inputs[0].shape == ("batch", 3, "height", "width")


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Any) -> Any:
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return x - self.mean


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Average, r"Average: forward\(\) changes its buffer mean; expected a module without state"),
        (Counter, r"Counter: forward\(\) gives another output when it is called again"),
    ],
)
def test_a_module_that_answers_differently_each_time_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        exported(make(), torch.rand(3, 4))


def test_an_operator_without_an_onnx_form_is_named_with_its_line() -> None:
    class Middle(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.median(-1).values

    with pytest.raises(
        ExportError,
        match=r"Sequential: it uses aten\.median\.dim in 1 \(Middle\) at test_export_modules\.py:\d+ "
        r"`return x\.median\(-1\)\.values`, for which torch's exporter has no ONNX form; "
        r"expected operators that have one\. Compute it with others",
    ):
        exported(nn.Sequential(nn.Linear(4, 4), Middle()), torch.rand(3, 4))


def test_the_same_random_numbers_are_no_state() -> None:
    class Noise(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + torch.randn_like(x)

    package, _ = exported(Noise(), torch.rand(3, 4))
    assert [node.op_type for node in package.main.model.graph] == ["RandomNormalLike", "Add"]
