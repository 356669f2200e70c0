"""Sessions: what they take, what they refuse and why, where they run, and what they leave behind."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxsmith.errors import FeedError, ModelFileError, ProviderUnavailableError, UnknownNameError
from onnxsmith.package import ModelPackage, TensorSpec
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import (
    PROVIDERS,
    OrtSession,
    Session,
    TorchSession,
    available_providers,
    resolve_provider,
)
from onnxsmith.runtime.session import Array

pytest.importorskip("onnxruntime")

Make = Callable[..., ModelPackage]


class Echo(Session):
    """A backend that gives back what it was fed, to see what the checks let through."""

    def __init__(self, *inputs: TensorSpec) -> None:
        self.inputs = self.outputs = inputs
        self.provider = "echo"
        self.name = "echo"

    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        return {name: feeds[name] for name in outputs}


IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
HIDDEN = TensorSpec("hidden", "float32", ("batch", "sequence", 4))


def ids(*shape: int) -> Array:
    return np.zeros(shape, np.int64)


def hidden(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def test_feeds_that_fit_pass() -> None:
    given = {"ids": ids(2, 3), "hidden": hidden(2, 3, 4)}
    got = Echo(IDS, HIDDEN).run(given)
    assert {name: value.shape for name, value in got.items()} == {"ids": (2, 3), "hidden": (2, 3, 4)}


REFUSED: Sequence[tuple[dict[str, Array], type[Exception], str]] = (
    (
        {"ids": ids(2, 3)},
        FeedError,
        r"echo: no value for hidden; expected hidden: float32\[batch, sequence, 4\]",
    ),
    ({}, FeedError, r"no value for ids, hidden; expected ids: int64\[batch, sequence\]; hidden: float32"),
    (
        {"ids": ids(2, 3), "hiden": hidden(2, 3, 4)},
        UnknownNameError,
        r"unknown input 'hiden'; expected one of hidden, ids\. Did you mean 'hidden'\?",
    ),
    (
        {"ids": ids(2, 3), "hidden": np.zeros((2, 3, 4), np.float64)},
        FeedError,
        "input 'hidden': element type float64; expected float32",
    ),
    (
        {"ids": np.zeros((2, 3), np.float32), "hidden": hidden(2, 3, 4)},
        FeedError,
        "input 'ids': element type float32; expected int64",
    ),
    (
        {"ids": np.zeros((2, 3), np.bool_), "hidden": hidden(2, 3, 4)},
        FeedError,
        "input 'ids': element type bool; expected int64",
    ),
    (
        {"ids": ids(3), "hidden": hidden(2, 3, 4)},
        FeedError,
        r"input 'ids': shape \(3,\); expected ids: int64\[batch, sequence\]",
    ),
    (
        {"ids": ids(2, 3), "hidden": hidden(2, 3, 5)},
        FeedError,
        r"input 'hidden': 5 on axis 2 of shape \(2, 3, 5\); expected hidden: float32",
    ),
    (
        {"ids": ids(2, 3), "hidden": hidden(2, 7, 4)},
        FeedError,
        r"input 'hidden': 7 on axis 1 \(sequence\); expected 3, as in input 'ids'",
    ),
    (
        {"ids": ids(2, 3), "hidden": hidden(1, 3, 4)},
        FeedError,
        r"1 on axis 0 \(batch\); expected 2, as in input 'ids'",
    ),
)


@pytest.mark.parametrize(("feeds", "kind", "message"), REFUSED)
def test_feeds_that_do_not_fit_are_refused(
    feeds: dict[str, Array], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        Echo(IDS, HIDDEN).run(feeds)
    assert getattr(caught.value, "exit_status", None) == 2


def test_one_name_on_two_axes_of_an_input_is_one_size() -> None:
    square = Echo(TensorSpec("x", "float32", ("n", "n")))
    assert square.run({"x": hidden(3, 3)})["x"].shape == (3, 3)
    with pytest.raises(FeedError, match=r"2 on axis 1 \(n\); expected 3, as in input 'x'"):
        square.run({"x": hidden(3, 2)})


def test_unnamed_axes_and_unknown_ranks_take_any_size() -> None:
    session = Echo(TensorSpec("a", "float32", (None, None)), TensorSpec("b", "float32", None))
    got = session.run({"a": hidden(2, 5), "b": hidden(1, 2, 3, 4)})
    assert (got["a"].shape, got["b"].shape) == ((2, 5), (1, 2, 3, 4))


@pytest.mark.parametrize("wanted", ["int32", "int64"])
@pytest.mark.parametrize("given", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64])
def test_integers_change_their_width_where_the_values_fit(wanted: str, given: type[Any]) -> None:
    session = Echo(TensorSpec("ids", wanted, ("n",)))
    got = session.run({"ids": np.array([0, 1, 127], given)})["ids"]
    assert str(got.dtype) == wanted
    assert got.tolist() == [0, 1, 127]


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        ("int32", np.array([2**31], np.int64)),
        ("int32", np.array([-(2**31) - 1], np.int64)),
        ("int64", np.array([2**63], np.uint64)),
    ],
)
def test_integers_that_would_change_their_value_are_refused(wanted: str, value: Array) -> None:
    with pytest.raises(FeedError, match=f"element type {value.dtype}; expected {wanted}"):
        Echo(TensorSpec("ids", wanted, ("n",))).run({"ids": value})


def test_an_empty_integer_array_changes_its_width() -> None:
    got = Echo(TensorSpec("ids", "int64", ("n",))).run({"ids": np.zeros(0, np.int32)})["ids"]
    assert got.dtype == np.int64


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown output 'hiden'.*Did you mean 'hidden'"):
        Echo(IDS, HIDDEN).run({"ids": ids(1, 1), "hidden": hidden(1, 1, 4)}, ["hiden"])


SUM = """
sum (float[batch, 3] x, float[3] y) => (float[batch, 3] total, float[batch, 3] product) {
    total = Add(x, y)
    product = Mul(x, y)
}"""


@pytest.fixture
def total(onnx_package: Make) -> Iterator[OrtSession]:
    with OrtSession(onnx_package(SUM), threads=1, name="sum") as session:
        yield session


def test_onnx_runtime_computes(total: OrtSession) -> None:
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 10, 100], np.float32)
    got = total.run({"x": x, "y": y})
    assert list(got) == ["total", "product"]
    np.testing.assert_array_equal(got["total"], x + y)
    np.testing.assert_array_equal(got["product"], x * y)


def test_only_the_wanted_outputs_come_back_in_their_order(total: OrtSession) -> None:
    feeds = {"x": hidden(2, 3), "y": hidden(3)}
    assert list(total.run(feeds, ["product"])) == ["product"]
    assert list(total.run(feeds, ["product", "total"])) == ["product", "total"]


def test_a_graph_that_fails_while_it_runs_says_so(onnx_package: Make) -> None:
    package = onnx_package(
        "g (float[n] x) => (float[2, 4] y) { s = Constant<value_ints=[2, 4]>() y = Reshape(x, s) }"
    )
    with OrtSession(package, name="frozen") as session:
        assert session.run({"x": hidden(8)})["y"].shape == (2, 4)
        with pytest.raises(
            ModelFileError, match=r"frozen: ONNX Runtime fails in CPUExecutionProvider: .*Reshape"
        ):
            session.run({"x": hidden(9)})


def test_a_graph_that_onnx_runtime_does_not_know_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnxsmith.package_io import load_package

    opsets = '<ir_version: 9, opset_import: ["" : 20, "nobody" : 1]>'
    text = f"{opsets} g (float[n] x) => (float[n] y) {{ y = nobody.Op(x) }}"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"refuses the model on CPUExecutionProvider: .*nobody"):
        OrtSession(load_package(tmp_path / "m.onnx"))


def test_an_unknown_component_is_refused(onnx_package: Make) -> None:
    with pytest.raises(UnknownNameError, match="unknown component 'decoder'; expected one of model"):
        OrtSession(onnx_package(SUM), component="decoder")


def test_a_changed_graph_runs_from_a_temporary_file_that_close_removes(
    onnx_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = onnx_package(SUM)
    package.main.path = None
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with OrtSession(package) as session:
        assert [path.name for path in temporary.rglob("*.onnx")] == ["model.onnx"]
        assert session.run({"x": hidden(1, 3), "y": hidden(3)})["total"].shape == (1, 3)
    assert list(temporary.iterdir()) == []


def test_a_session_that_does_not_open_leaves_nothing(
    onnx_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = onnx_package(SUM)
    package.main.path = None
    package.main.model.graph.node(0).op_type = "NoSuchOperator"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(ModelFileError, match="NoSuchOperator"):
        OrtSession(package)
    assert list(temporary.iterdir()) == []


def test_a_closed_session_does_not_run(onnx_package: Make) -> None:
    with OrtSession(onnx_package(SUM)) as session:
        pass
    session.close()
    with pytest.raises(AssertionError, match="closed"):
        session.run({"x": hidden(1, 3), "y": hidden(3)})


def test_the_context_manager_does_not_swallow_errors(onnx_package: Make) -> None:
    with pytest.raises(ZeroDivisionError), OrtSession(onnx_package(SUM)):
        raise ZeroDivisionError


def test_the_cpu_goes_by_both_names() -> None:
    assert resolve_provider("cpu") == resolve_provider("CPU") == "CPUExecutionProvider"
    assert resolve_provider("CPUExecutionProvider") == "CPUExecutionProvider"


def test_every_installed_provider_resolves() -> None:
    assert "CPUExecutionProvider" in available_providers()
    assert [resolve_provider(name) for name in available_providers()] == available_providers()


def test_an_unknown_provider_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown execution provider 'cudda'.*Did you mean 'cuda'\?"):
        resolve_provider("cudda")


def missing() -> list[str]:
    return [name for name, provider in PROVIDERS.items() if provider.ort_name not in available_providers()]


@pytest.mark.parametrize("name", missing())
def test_a_known_provider_that_is_not_installed_says_what_brings_it(
    name: str, onnx_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nor in an environment of its own.
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "home"))
    provider = PROVIDERS[name]
    brings = f"`onnxsmith providers --install {name}`"
    if provider.package in ("", "onnxruntime"):
        brings = "a build of onnxruntime with --use_" if not provider.package else "`pip install onnxruntime`"
    message = rf"{name}: the installed onnxruntime has .*; expected {provider.ort_name}.*{re.escape(brings)}"
    with pytest.raises(ProviderUnavailableError, match=message) as caught:
        OrtSession(onnx_package(SUM), provider=name)
    assert caught.value.exit_status == 3


def test_a_pip_command_names_one_package() -> None:
    assert len(PROVIDERS) >= 10
    for provider in PROVIDERS.values():
        assert re.fullmatch(r"(onnxruntime(-[a-z]+)?|nxrt-ep-cpu)?", provider.package)


def test_placement_counts_every_node(onnx_package: Make) -> None:
    with OrtSession(onnx_package(SUM), optimize=False) as session:
        placement = session.check_placement()
    assert placement.nodes == {"CPUExecutionProvider": 2}
    assert placement.operators == {"CPUExecutionProvider": {"Add": 1, "Mul": 1}}
    assert placement.share("CPUExecutionProvider") == 1.0
    assert placement.share("CUDAExecutionProvider") == 0.0
    # Who got every node took all of the time, which need not be measured.
    counts = {"nodes": 2, "share": 1.0, "operators": {"Add": 1, "Mul": 1}}
    assert placement.to_json() == {"CPUExecutionProvider": counts | {"time_share": 1.0, "bytes_share": 1.0}}


def test_placement_is_after_onnx_runtimes_own_optimisation(onnx_package: Make) -> None:
    text = "g (float[n] x) => (float[n] y) { a = Identity(x) b = Identity(a) y = Abs(b) }"
    counts = {}
    for optimize in (False, True):
        with OrtSession(onnx_package(text), optimize=optimize) as session:
            counts[optimize] = session.placement().nodes["CPUExecutionProvider"]
    assert counts == {False: 3, True: 1}


def torch_program_of(function: Callable[..., Any], *inputs: TensorSpec) -> TorchProgram:
    torch = pytest.importorskip("torch")

    class Module(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, **tensors: Any) -> dict[str, Any]:
            return {"y": function(torch, *tensors.values())}

    return TorchProgram(Module(), inputs, (TensorSpec("y", "float32", None),), {})


def test_torch_takes_a_scalar_as_a_scalar() -> None:
    program = torch_program_of(lambda torch, x: torch.tensor(float(x.ndim)), TensorSpec("x", "float32", ()))
    with TorchSession(program) as session:
        assert session.run({"x": np.array(2.0, np.float32)})["y"] == 0.0


def test_torch_takes_an_array_that_must_not_be_written() -> None:
    x = np.arange(3, dtype=np.float32)
    x.flags.writeable = False
    program = torch_program_of(lambda torch, x: x + 1, TensorSpec("x", "float32", ("n",)))
    # torch would warn, and warnings are errors here.
    with TorchSession(program) as session:
        assert session.run({"x": x})["y"].tolist() == [1, 2, 3]


def test_torch_runs_in_bfloat16() -> None:
    program = torch_program_of(lambda torch, x: (x * 2).t(), TensorSpec("x", "bfloat16", ("n", 2)))
    x = np.array([[1, 2], [3, 4]], ml_dtypes.bfloat16)
    with TorchSession(program) as session:
        got = session.run({"x": x})["y"]
    assert got.dtype == ml_dtypes.bfloat16
    assert got.astype(np.float32).tolist() == [[2, 6], [4, 8]]


def test_both_backends_show_the_same_signature(
    tiny_program: TorchProgram, tiny_package: ModelPackage
) -> None:
    with TorchSession(tiny_program) as torch_session, OrtSession(tiny_package) as ort_session:
        assert torch_session.inputs == ort_session.inputs
        assert torch_session.outputs == ort_session.outputs
        assert len(ort_session.cache) == 4
        assert torch_session.cache == ort_session.cache


def test_what_is_no_tensor_is_refused(onnx_package: Make) -> None:
    package = onnx_package("g (float[n, 4] x) => (seq(float[n, 1]) y) { y = SplitToSequence<axis = 1>(x) }")
    with pytest.raises(ModelFileError, match=r"model: output 'y': a sequence; expected a tensor. Export it"):
        OrtSession(package)
