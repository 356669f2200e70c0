"""Modules as users have them: wrapped, scripted, compiled, with complex numbers or sparse tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.errors import ExportError, SourceError
from onnxsmith.exporters import load_torch, torch_program
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
